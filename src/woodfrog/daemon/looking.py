"""The routes of the HTTP API that look into memory: what is in a snapshot, and what differs from it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from typing import Any

from fastapi import FastAPI, Query

from woodfrog.daemon.controller import Controller
from woodfrog.errors import DaemonError, IntegrityError, NotFoundError, SpecError, WoodfrogError
from woodfrog.linux import procfs
from woodfrog.snapshot.catalogue import Catalogue, Opened
from woodfrog.snapshot.manifest import Manifest

__all__ = ["add_routes"]

_TIMEOUT_S = 300.0
_MOST_FILES = 20
_CONTENTS = (sys.executable, "-P", "-m", "woodfrog.snapshot.contents")


def _place(opened: Opened) -> dict[str, Any]:
    files = None if opened.files is None else [str(path) for path in opened.files]
    return {"images": str(opened.images), "files": files}


def _layers(manifest: Manifest) -> list[dict[str, Any]]:
    """The largest files that the sandbox wrote."""
    mine = [f for f in manifest.files if f.path.startswith(("fs/", "shm/"))]
    paths = {"fs": "", "shm": "/dev/shm"}
    rows = []
    for file in sorted(mine, key=lambda f: -f.size)[:_MOST_FILES]:
        layer, _, rest = file.path.partition("/")
        rows.append({"file": f"{paths[layer]}/{rest}", "bytes": file.size})
    return rows


async def _look(what: str, request: dict[str, Any]) -> dict[str, Any]:
    """Ask a process of its own: it reads every page, and keeps this one's event loop free.

    Raises:
        IntegrityError: what it reads is not as it should be.
        DaemonError: it takes too long, or breaks.
    """
    process = await asyncio.create_subprocess_exec(
        *_CONTENTS,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd="/",
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(json.dumps(request).encode()), _TIMEOUT_S)
    except TimeoutError:
        raise DaemonError(f"{what}: not looked through within {_TIMEOUT_S:.0f} s", code="look-timeout") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        last = err.decode(errors="replace").strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        raise DaemonError(f"{what}: {last[0]}", code="internal")
    answer: dict[str, Any] = json.loads(out)
    if "error" in answer:
        raise IntegrityError(f"{what} cannot be read: {answer['error']}", code="unreadable")
    return answer


def add_routes(api: FastAPI, controller: Controller, catalogue: Catalogue) -> None:
    """Add them."""
    one = asyncio.Semaphore(1)

    async def place(snapshot_id: str, stack: contextlib.AsyncExitStack) -> dict[str, Any]:
        """Where a snapshot's memory is; it stays there for as long as the stack."""
        await stack.enter_async_context(controller.backend.keeper.using(snapshot_id))
        return _place(await asyncio.to_thread(catalogue.open_verified, snapshot_id))

    @api.get("/v1/snapshots/{snapshot_id}/contents", tags=["snapshots"])
    async def snapshot_contents(snapshot_id: str, most: int = Query(50, ge=1, le=100_000)) -> dict[str, Any]:
        """What is in a snapshot: by kind of memory, library, file and mapping. Reads all of it, which takes seconds."""
        manifest = catalogue.get(snapshot_id)
        request: dict[str, Any] = {"most": most}
        async with contextlib.AsyncExitStack() as stack, one:
            request["of"] = await place(manifest.id, stack)
            if manifest.parent:
                with contextlib.suppress(WoodfrogError):  # gone or damaged: nothing can be compared with it
                    request["parent"] = await place(catalogue.get(manifest.parent).id, stack)
            answer = await _look(f"snapshot {manifest.id}", request)
        return {
            "id": manifest.id,
            "form": manifest.form,
            "parent": manifest.parent,
            "compared": "parent" in request,
            "stored_bytes": manifest.stored_bytes if manifest.form == "packed" else manifest.pages_bytes,
            "files_bytes": manifest.fs_bytes,
            "written": _layers(manifest),
            **answer,
        }

    def container(text: str) -> str | None:
        """The container of that id, or of the only one that begins so; None when it is not one's."""
        if text in controller.instances:
            return text
        found = [i for i in controller.instances if text and i.startswith(text)]
        return found[0] if len(found) == 1 else None

    def processes(found: str, snapshot: str) -> dict[str, int]:
        """The processes of a container that was thawed from a snapshot, by their pid in it."""
        described = controller.backend.describe(found) or {}
        pid, origin = described.get("pid"), described.get("snapshot")
        if not isinstance(pid, int):
            raise NotFoundError(f"container {found} has no process just now", container=found)
        if origin != snapshot:
            was = f"thawed from {origin}" if origin else "not thawed"
            raise SpecError(f"container {found} was {was}, not from {snapshot}", code="bad-request")
        try:
            return {str(procfs.status(p).ns_pids[-1]): p for p in procfs.tree(pid)}
        except ProcessLookupError:
            raise NotFoundError(f"container {found} is gone", container=found) from None

    @api.get("/v1/snapshots/{snapshot_id}/diff/{other}", tags=["snapshots"])
    async def difference(snapshot_id: str, other: str, most: int = Query(20, ge=0, le=10_000)) -> dict[str, Any]:
        """Which pages differ in another snapshot, or in a running container that was thawed from this one."""
        before = catalogue.get(snapshot_id)
        found = container(other)
        request: dict[str, Any] = {"most": most}
        more: dict[str, Any] = {}
        async with contextlib.AsyncExitStack() as stack, one:
            if found is not None:
                name = found
                request["of"] = {"pids": processes(found, before.id)}
                more = {"container": found, "served": controller.instances[found].served}
            else:
                name = catalogue.get(other).id
                request["of"] = await place(name, stack)
            request["before"] = await place(before.id, stack)
            answer = await _look(f"{before.id} and {name}", request)
        return {"before": before.id, "after": name, **more, **answer}
