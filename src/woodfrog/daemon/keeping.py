"""The routes of the HTTP API that look after snapshots: verify, collect, pin, move, trust, and what they take."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.types import Receive, Scope, Send

from woodfrog.backends.base import Progress, SnapshotKeeper
from woodfrog.daemon.controller import Controller
from woodfrog.daemon.jobs import Job, Jobs
from woodfrog.errors import HostError, NotFoundError, SpecError, StoreError
from woodfrog.snapshot.catalogue import PINNED, Catalogue
from woodfrog.store.files import store_error, write_atomic

__all__ = ["ADMIN", "add_routes"]

log = logging.getLogger("woodfrog")

ADMIN = "admin"
"""Below `<home>/keys`, for root's eyes only: who sends what is in it may do what only root may."""
_MAX_WAIT_S = 300.0

Work = Callable[[Progress], Awaitable[dict[str, Any]]]


class _Admin:
    """Tells root from others who may use the socket: only root can read the file. It is another at each start."""

    def __init__(self, path: Path) -> None:
        self._secret = secrets.token_hex(32)
        self._unwritten: StoreError | None = None
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            write_atomic(path, self._secret.encode())
        except StoreError as e:  # on a full disk a daemon has to start, to make room
            self._unwritten = e
            log.warning("keys cannot be trusted, nor distrusted, until the daemon is started again: %s", e.message)

    def check(self, request: Request) -> None:
        if self._unwritten is not None:
            raise self._unwritten
        given = request.headers.get("woodfrog-admin", "")
        if not secrets.compare_digest(given.encode(), self._secret.encode()):
            raise HostError("only root on the daemon's machine may change whom it trusts: use sudo", code="not-root")


class _Once(FileResponse):
    """A file that is removed when it was sent, or its client went away in the middle of it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            Path(self.path).unlink(missing_ok=True)


async def _take(request: Request, spool: Path) -> Path:
    """The request's body as a file."""
    fd, name = await asyncio.to_thread(tempfile.mkstemp, prefix=".import-", dir=spool)
    path = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            async for chunk in request.stream():
                await asyncio.to_thread(file.write, chunk)
        return path
    except BaseException as e:
        path.unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise store_error("cannot take the file", path, e) from e
        raise


def add_routes(
    api: FastAPI, controller: Controller, catalogue: Catalogue, spool: Path, json_response: type[JSONResponse]
) -> Jobs:
    """Add them.

    Args:
        spool: where files are that come and go.
    """
    jobs = Jobs()
    admin = _Admin(controller.settings.home / "keys" / ADMIN)

    def keeper() -> SnapshotKeeper:
        return controller.backend.keeper

    async def answer(job: Job, wait: float) -> Response:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(job.ended.wait(), min(wait, _MAX_WAIT_S))
        if not job.ended.is_set():
            return json_response(job.view(), status_code=202)
        if job.error is not None:
            raise job.error
        result = dict(job.result or {})
        if job.file is not None:
            result["file"] = f"/jobs/{job.id}/file"
        return json_response(result)

    Wait = Query(0.0, ge=0, description="Seconds to wait for the result; 202 and the job's state when it takes longer.")

    # Jobs

    @api.get("/v1/jobs", tags=["jobs"])
    async def list_jobs() -> dict[str, Any]:
        """Work that takes its time, and how far it is."""
        return {"jobs": jobs.list()}

    @api.get("/v1/jobs/{job_id}", tags=["jobs"], responses={202: {"description": "Still running: its state."}})
    async def job_result(job_id: str, wait: float = Wait) -> Response:
        """The job's result, or its error, as the request that began it would have answered."""
        return await answer(jobs.get(job_id), wait)

    @api.get("/v1/jobs/{job_id}/file", tags=["jobs"])
    async def job_file(job_id: str) -> Response:
        """The file that an export wrote, once; it is removed when it has been sent."""
        job = jobs.get(job_id)
        if job.file is None or not job.ended.is_set():
            raise NotFoundError(f"job {job_id} has no file, or it was fetched already", job=job_id)
        path, job.file = job.file, None
        return _Once(path, media_type="application/octet-stream")

    @api.delete("/v1/jobs/{job_id}/file", tags=["jobs"])
    async def drop_job_file(job_id: str) -> dict[str, Any]:
        """Nobody will fetch it: it is removed as soon as it is written."""
        jobs.give_up(jobs.get(job_id))
        return {"job": job_id}

    # Removing

    @api.post("/v1/snapshots/{snapshot_id}/invalidate", tags=["snapshots"])
    async def invalidate(snapshot_id: str, tier: bool = False, force: bool = False, wait: float = Wait) -> Response:
        """Never use a snapshot again and remove it; with `tier`, from the tier as well, for all machines.

        With `tier` it need not be on this machine; its id must be whole then. A pinned one is refused without `force`.
        """
        found, here = snapshot_id, True
        if snapshot_id not in catalogue.damaged:
            try:
                found = catalogue.get(snapshot_id).id
            except NotFoundError:
                if not tier:
                    raise
                here = False
            if here and not force and catalogue.marked(found, PINNED):
                raise SpecError(f"snapshot {found} is pinned: unpin it, or give force=1", code="pinned")

        async def everywhere(_: Progress) -> dict[str, Any]:
            # The tier first: when it fails, nothing has changed.
            gone = await keeper().withdraw(found)
            if not (gone["found"] or here):
                raise NotFoundError(f"no snapshot {found} here or in {gone['tier']}", snapshot=found)
            removed = controller.invalidate(found)
            return {
                "snapshot": found, "removed": removed, "here": here, "tier": gone["tier"], "in_tier": gone["found"]
            }  # fmt: skip

        if tier:
            return await answer(jobs.start(f"invalidate {found}", everywhere), wait)
        return json_response({"snapshot": found, "removed": controller.invalidate(found)})

    # Checking and collecting

    @api.post("/v1/snapshots/verify", tags=["snapshots"])
    async def verify_all(wait: float = Wait) -> Response:
        """Read every byte of every snapshot and of the page store again."""
        return await answer(jobs.start("verify", lambda p: keeper().verify(None, p)), wait)

    @api.post("/v1/snapshots/{snapshot_id}/verify", tags=["snapshots"])
    async def verify(snapshot_id: str, wait: float = Wait) -> Response:
        """Read every byte of one snapshot again."""
        if snapshot_id in catalogue.damaged:
            why = catalogue.damaged[snapshot_id]
            return json_response({"snapshots": [{"id": snapshot_id, "bytes": 0, "problems": [why]}], "store": []})
        found = catalogue.get(snapshot_id).id
        return await answer(jobs.start(f"verify {found}", lambda p: keeper().verify(found, p)), wait)

    @api.post("/v1/snapshots/gc", tags=["snapshots"])
    async def gc(dry_run: bool = False, rebuilt: bool = False, tier: bool = False, wait: float = Wait) -> Response:
        """Remove from the page store what no snapshot and no container needs; with `tier`, from the tier instead.

        `rebuilt`: also what is there for faster thaws only.
        """
        if tier:
            return await answer(jobs.start("gc", lambda p: keeper().gc_tier(dry_run=dry_run, progress=p)), wait)
        work: Work = lambda p: keeper().gc(dry_run=dry_run, rebuilt=rebuilt, progress=p)  # noqa: E731
        return await answer(jobs.start("gc", work), wait)

    @api.post("/v1/snapshots/{snapshot_id}/pin", tags=["snapshots"])
    async def pin(snapshot_id: str) -> dict[str, Any]:
        """Keep a snapshot until a person removes it."""
        return await keeper().pin(catalogue.get(snapshot_id).id)

    @api.post("/v1/snapshots/{snapshot_id}/unpin", tags=["snapshots"])
    async def unpin(snapshot_id: str) -> dict[str, Any]:
        """The opposite of pin."""
        return await keeper().unpin(catalogue.get(snapshot_id).id)

    # Moving

    @api.post("/v1/snapshots/{snapshot_id}/export", tags=["snapshots"])
    async def export(snapshot_id: str, wait: float = Wait) -> Response:
        """Make one file of a snapshot; `file` in the answer says where to fetch it."""
        found = catalogue.get(snapshot_id).id
        target = spool / f".export-{secrets.token_hex(8)}"
        work: Work = lambda p: keeper().export(found, target, p)  # noqa: E731
        return await answer(jobs.start(f"export {found}", work, file=target), wait)

    @api.post("/v1/snapshots/import", tags=["snapshots"])
    async def import_(request: Request, wait: float = Wait) -> Response:
        """Take up a snapshot from the file in the body. Its maker's key must be trusted."""
        path = await _take(request, spool)
        work: Work = lambda p: keeper().import_(path, p)  # noqa: E731
        return await answer(jobs.start("import", work, cleanup=path), wait)

    @api.post("/v1/snapshots/{snapshot_id}/push", tags=["snapshots"])
    async def push(snapshot_id: str, anyway: bool = False, wait: float = Wait) -> Response:
        """Copy a snapshot to the tier; with `anyway` also one that was removed from there for all machines."""
        found = catalogue.get(snapshot_id).id
        return await answer(jobs.start(f"push {found}", lambda p: keeper().push(found, p, anyway=anyway)), wait)

    @api.post("/v1/snapshots/{snapshot_id}/pull", tags=["snapshots"])
    async def pull(snapshot_id: str, wait: float = Wait) -> Response:
        """Bring a snapshot from the tier; the id must be whole."""
        return await answer(jobs.start(f"pull {snapshot_id}", lambda p: keeper().pull(snapshot_id, p)), wait)

    # The tier

    @api.get("/v1/tier", tags=["tier"])
    async def tier() -> dict[str, Any]:
        """The tier's name; an error (`no-tier`) when none is configured."""
        return await keeper().tier()

    @api.post("/v1/tier/list", tags=["tier"])
    async def list_tier(wait: float = Wait) -> Response:
        """What is in the tier: a row for each snapshot, and for each that was removed. Reads every manifest there."""
        return await answer(jobs.start("list the tier", lambda p: keeper().list_tier(p)), wait)

    # Trust

    @api.get("/v1/trust", tags=["trust"])
    async def trust_list() -> dict[str, Any]:
        """This machine's key, and the keys whose snapshots it takes up."""
        return await keeper().trust_list()

    @api.post("/v1/trust", tags=["trust"])
    async def trust_add(request: Request, body: dict[str, str]) -> dict[str, Any]:
        """Trust another machine's key. Root only: its snapshots run with CRIU's powers."""
        admin.check(request)
        text = body.get("key", "")
        if not text.strip():
            raise SpecError("trust wants a key: one line, as `woodfrog snapshot trust` shows it", code="bad-request")
        return await keeper().trust_add(text, body.get("comment", ""))

    @api.post("/v1/trust/{fingerprint}/remove", tags=["trust"])
    async def trust_remove(request: Request, fingerprint: str) -> dict[str, Any]:
        """Trust a key no longer. Root only."""
        admin.check(request)
        return await keeper().trust_remove(fingerprint)

    # The store

    @api.get("/v1/store", tags=["store"])
    async def store_stats() -> dict[str, Any]:
        """What the snapshots take, all together and each."""
        return await keeper().store_stats()

    return jobs
