"""The HTTP API. JSON for people's data, raw bytes for the users' payloads; described by OpenAPI at /openapi.json."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import itertools
import json
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import woodfrog
from woodfrog import protocol
from woodfrog.backends.payload import CHUNK, Payload, Spool, in_thread, spooled
from woodfrog.control.state import Load
from woodfrog.daemon import keeping, looking, volumes, watching
from woodfrog.daemon.connections import JsonRoute
from woodfrog.daemon.controller import CallRecord, Controller, failure_of
from woodfrog.daemon.journal import INLINE_BYTES
from woodfrog.daemon.package import Package
from woodfrog.errors import (
    AuthError,
    DaemonError,
    HostError,
    IncompatibleSnapshot,
    InstanceCrashed,
    IntegrityError,
    NotFoundError,
    OutputExpired,
    SpecError,
    StoreError,
    WoodfrogError,
)
from woodfrog.snapshot.catalogue import PINNED, PUSHED, WITHDRAWN, Catalogue
from woodfrog.snapshot.compat import WorkerClass, explain_mismatch
from woodfrog.snapshot.manifest import Manifest
from woodfrog.spec import function_key, split_tag, to_dict
from woodfrog.store.content import ContentStore
from woodfrog.store.files import store_error
from woodfrog.telemetry import counters

__all__ = ["TokenAuth", "build"]

log = logging.getLogger("woodfrog")

_MAX_WAIT_S = 300.0
_MAX_BODY = protocol.MAX_BODY
_MAX_UPLOAD = 1 << 30
_EXEC_TIMEOUT_S = 60.0
_PAGE = 200

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def _status_of(error: WoodfrogError) -> int:
    for kind, status in (
        (NotFoundError, 404),
        (SpecError, 400),
        (StoreError, 507),
        (HostError, 503),
        (IntegrityError, 409),
        (IncompatibleSnapshot, 409),
    ):
        if isinstance(error, kind):
            return status
    return 500


class _Json(JSONResponse):
    """ASCII only: text from workers may hold what UTF-8 cannot."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


class TokenAuth:
    """ASGI wrapper for TCP: nothing without the bearer token. That for metrics opens them alone."""

    def __init__(self, app: FastAPI, token: str, metrics_token: str = "") -> None:
        self._app = app
        self._expected = b"Bearer " + token.encode()
        self._for_metrics = b"Bearer " + metrics_token.encode() if metrics_token else self._expected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            given = dict(scope["headers"]).get(b"authorization", b"")
            metrics = (scope["type"], scope.get("method"), scope.get("path")) == ("http", "GET", "/metrics")
            seen = metrics and hmac.compare_digest(given, self._for_metrics)
            if not (seen or hmac.compare_digest(given, self._expected)):
                error = AuthError("wrong or missing token; set WOODFROG_TOKEN").to_dict()
                # What else it sends is not wanted.
                await _Json({"error": error}, status_code=401, headers={"Connection": "close"})(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _body(request: Request, spool: Path) -> Payload:
    """The request's body: in memory while small, else on disk; in both where the journal keeps it in a file."""
    parts: list[bytes] = []
    size = 0
    spooling: Spool | None = None
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > _MAX_BODY:
                raise SpecError(
                    f"a payload of over {_MAX_BODY >> 30} GiB; use a Volume for data of this size", code="too-large"
                )
            if spooling is None and size > protocol.SPOOL_BYTES:
                spooling = Spool(spool)
                for part in parts:
                    await spooling.write(part)
                parts.clear()
            if spooling is None:
                parts.append(chunk)
            else:
                await spooling.write(chunk)
        if spooling is not None:
            return Payload(path=await spooling.close())
        payload = Payload(data=b"".join(parts))
        return await spooled(payload, spool) if size > INLINE_BYTES else payload
    except BaseException as e:
        if spooling is not None:
            await spooling.drop()
        if isinstance(e, OSError):
            raise store_error("cannot take the payload", spool / "payload", e) from e
        raise


async def _small_body(request: Request) -> bytes:
    """A body that is wanted in memory."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > _MAX_UPLOAD:
            raise SpecError(
                f"over {_MAX_UPLOAD >> 20} MiB in one upload; keep data in a Volume and out of the program's directory",
                code="too-large",
            )
    return bytes(data)


class _File(FileResponse):
    """A large answer; `sent` is told when all of it has gone out."""

    chunk_size = CHUNK  # each is read in a thread

    def __init__(self, path: Path, sent: Callable[[], None], **more: Any) -> None:
        super().__init__(path, **more)
        self._sent = sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watched(message: MutableMapping[str, Any]) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self._sent()

        await super().__call__(scope, receive, watched)


def _answer(record: CallRecord, fetched: Callable[[str], None]) -> Response:
    headers = {"Woodfrog-Call": record.row.id, "Woodfrog-Status": record.outcome or "pending"}
    if record.outcome is None:
        return Response(status_code=202, headers=headers)
    as_json = record.row.encoding == "json"
    if record.outcome == "success" or (record.outcome == "exception" and not as_json):
        media_type = "application/json" if as_json else "application/octet-stream"
        if record.result.data is None and record.result.path is not None:
            sent = partial(fetched, record.row.id)
            return _File(record.result.path, sent, media_type=media_type, headers=headers)
        fetched(record.row.id)
        return Response(record.result.data, media_type=media_type, headers=headers)
    fetched(record.row.id)
    if record.outcome == "exception":
        return _Json({"error": record.error}, headers=headers)
    return _Json({"error": failure_of(record).to_dict()}, headers=headers)


def _failure_frame(error: WoodfrogError) -> bytes:
    return json.dumps({"error": error.to_dict()}).encode()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    if not event.is_set() and seconds > 0:
        try:
            await asyncio.wait_for(event.wait(), min(seconds, _MAX_WAIT_S))
        except TimeoutError:
            return


def _class_for(manifest: Manifest, classes: tuple[WorkerClass, ...]) -> WorkerClass:
    """The class of this machine that a snapshot is to be compared with: one of its GPUs', where it holds GPU memory."""
    chip = manifest.host.get("gpu")
    of_gpus = [c for c in classes if "gpu" in c.parts]
    if chip is None or not of_gpus:
        return classes[0]
    return next((c for c in of_gpus if c.parts["gpu"] == chip), of_gpus[0])


def _snapshot_row(catalogue: Catalogue, manifest: Manifest, classes: tuple[WorkerClass, ...]) -> dict[str, Any]:
    here = _class_for(manifest, classes)
    why = catalogue.retired(manifest.id)
    state = "retired" if why else "ready"
    if not why and manifest.worker_class != here.digest:
        state, why = "other-host", explain_mismatch(manifest.host, here.parts)
    return {
        "id": manifest.id,
        "app": manifest.app,
        "function": manifest.tag,
        "state": state,
        "why": why,
        "created": manifest.created,
        "memory_bytes": manifest.pages_bytes,
        "files_bytes": manifest.fs_bytes,
        "tasks": manifest.tasks,
        "function_key": manifest.function_key,
        "worker_class": manifest.worker_class,
        "kind": manifest.kind,
        "modules": list(manifest.modules),
        "parent": manifest.parent,
        "form": manifest.form,
        "stored_bytes": manifest.stored_bytes if manifest.form == "packed" else manifest.pages_bytes,
        "pinned": catalogue.marked(manifest.id, PINNED),
        "pushed": catalogue.marked(manifest.id, PUSHED),
        "withdrawn": catalogue.marked(manifest.id, WITHDRAWN),
    }


def build(
    controller: Controller,
    *,
    content: ContentStore,
    catalogue: Catalogue,
    worker_class: WorkerClass,
    gpu_classes: tuple[WorkerClass, ...] = (),
    shutdown: Callable[[], None],
) -> FastAPI:
    """The application over one controller."""
    api = FastAPI(
        title="woodfrog",
        version=woodfrog.__version__,
        docs_url=None,
        redoc_url=None,
        default_response_class=_Json,
        redirect_slashes=False,
    )
    api.router.route_class = JsonRoute
    settings = controller.settings
    classes = (worker_class, *gpu_classes)
    spool = settings.home / "calls"
    package = Package(Path(woodfrog.__file__).parent)
    begun = time.monotonic()

    @api.exception_handler(WoodfrogError)
    async def _on_error(request: Request, error: WoodfrogError) -> JSONResponse:
        return _Json({"error": error.to_dict()}, status_code=_status_of(error))

    @api.exception_handler(RequestValidationError)
    async def _on_bad_request(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return await _on_error(request, SpecError(f"{where}: {first['msg']}", code="bad-request"))

    @api.exception_handler(HTTPException)
    async def _on_http(request: Request, error: HTTPException) -> JSONResponse:
        said = SpecError(f"{request.method} {request.url.path}: {error.detail}", code="bad-request")
        return _Json({"error": said.to_dict()}, status_code=error.status_code)

    @api.exception_handler(ClientDisconnect)
    async def _on_disconnect(request: Request, error: ClientDisconnect) -> Response:
        log.info("%s %s: its client went away in the middle of it", request.method, request.url.path)
        return Response(status_code=400)  # nobody reads it

    @api.exception_handler(Exception)
    async def _on_bug(request: Request, error: Exception) -> JSONResponse:
        said = DaemonError(
            f"internal error: {type(error).__name__}: {error}; report it with the daemon's log", code="internal"
        )
        return _Json({"error": said.to_dict()}, status_code=500)

    def call_of(call_id: str) -> CallRecord:
        record = controller.find_call(call_id)
        if record is None:
            seconds = f"{settings.keep_results_s:.0f}"
            text = f"no call {call_id!r}; results are kept for {seconds} s (WOODFROG_KEEP_RESULTS_S)"
            if settings.keep_results_mib:
                text += f", {settings.keep_results_mib} MiB of them (WOODFROG_KEEP_RESULTS_MIB)"
            text += "; where the disk has little room, those that were fetched go earlier"
            raise NotFoundError(text, call=call_id)
        return record

    # The daemon

    @api.get("/v1/health")
    async def health() -> dict[str, Any]:
        return {
            "version": woodfrog.__version__,
            "protocol": protocol.VERSION,
            "pid": os.getpid(),
            "state_dir": str(settings.home),
            "package": str(package.path),
            "intact": package.intact,
            "current": await asyncio.to_thread(package.current),
            "calls": len(controller.state.calls),
            "uptime_s": round(time.monotonic() - begun, 1),
            "worker_class": worker_class.digest,
            "counters": dict(counters),
        }

    @api.post("/v1/shutdown")
    async def shut_down() -> dict[str, Any]:
        shutdown()
        return {"stopping": True}

    @api.get("/v1/state")
    async def state() -> dict[str, Any]:
        """The control machine's own view."""
        return controller.state.snapshot_view()

    # GPUs

    @api.get("/v1/gpus")
    async def gpus() -> dict[str, Any]:
        return {"gpus": controller.backend.gpus()}

    @api.post("/v1/gpus/check")
    async def check_gpus() -> dict[str, Any]:
        """Look at all of them now; Xid errors seen before are forgotten."""
        await controller.backend.check_gpus()
        return await gpus()

    # Code, blobs, secrets

    @api.head("/v1/code/{digest}")
    async def has_code(digest: str) -> Response:
        return Response(status_code=200 if content.has_code(digest) else 404)

    @api.put("/v1/code/{digest}")
    async def put_code(digest: str, request: Request) -> dict[str, Any]:
        data = await _small_body(request)
        await asyncio.to_thread(content.put_code, digest, data)
        return {"digest": digest}

    @api.head("/v1/blobs/{digest}")
    async def has_blob(digest: str) -> Response:
        return Response(status_code=200 if content.has_blob(digest) else 404)

    @api.put("/v1/blobs/{digest}")
    async def put_blob(digest: str, request: Request) -> dict[str, Any]:
        data = await _small_body(request)
        await asyncio.to_thread(content.put_blob, digest, data)
        return {"digest": digest}

    @api.put("/v1/secrets/{name}")
    async def put_secret(name: str, values: dict[str, str]) -> dict[str, Any]:
        controller.resources.put_secret(name, values)
        return {"name": name, "keys": sorted(values)}

    def users_of(name: str) -> list[str]:
        """The functions of running and deployed apps that name a secret."""
        specs = (controller.apps[key][1] for key in controller.active.items())
        return sorted(f"{s.name}.{f.tag}" for s in specs for f in s.functions if name in {x.name for x in f.secrets})

    @api.get("/v1/secrets")
    async def secrets() -> dict[str, Any]:
        return {"secrets": controller.resources.secret_names()}

    @api.get("/v1/secrets/{name}/functions")
    async def secret_users(name: str) -> dict[str, Any]:
        """Who names it."""
        return {"name": name, "functions": users_of(name)}

    @api.delete("/v1/secrets/{name}")
    async def delete_secret(name: str, force: bool = False) -> dict[str, Any]:
        """Remove a secret; refused while a function names it, unless `force` is given."""
        users = users_of(name)
        if users and not force:
            raise SpecError(
                f"secret {name!r} is named by {', '.join(users)}: stop their apps, or give force=1, and they start "
                "without its variables",
                code="secret-in-use",
            )
        controller.resources.delete_secret(name)
        return {"name": name, "deleted": True}

    # Apps

    @api.post("/v1/apps/{app}/deploy")
    async def deploy(app: str, body: dict[str, Any]) -> dict[str, Any]:
        spec = body.get("spec")
        if not isinstance(spec, dict) or spec.get("name") != app:
            raise SpecError(f"deploy of {app!r}: the body has no spec of that name", code="bad-request")
        client = body.get("client")
        return controller.deploy(
            spec,
            ephemeral=bool(body.get("ephemeral")),
            client=client if isinstance(client, dict) else {},
            capture=bool(body.get("snapshot")),
            rolling=body.get("strategy") != "recreate",
        )

    def app_row(name: str, loads: dict[tuple[str, str], Load], starts: dict[str, dict[str, int]]) -> dict[str, Any]:
        version = controller.active[name]
        row, spec = controller.apps[name, version]
        instances = [i for i in controller.instances.values() if i.request.app == name]
        last = controller.last_errors.get(name)
        return {
            "app": name,
            "version": version,
            "ephemeral": row.ephemeral,
            "deployed": row.deployed,
            "description": spec.description,
            "functions": [f.tag for f in spec.functions],
            "left_out": to_dict(spec.left_out),
            "containers": len(instances),
            "waiting_for_memory": sum(
                w["calls"] for w in controller.state.memory_waits(time.monotonic()) if w["app"] == name
            ),
            "calls": watching.load_row(watching.of_app(loads, name), controller.now()),
            "starts": {kind: starts.get(name, {}).get(kind, 0) for kind in watching.STARTS},
            "last_error": {"at": last[0], "function": last[1], "message": last[2]} if last else None,
        }

    @api.get("/v1/apps")
    async def apps() -> dict[str, Any]:
        starts, loads = await controller.starts.of_a_day(), controller.state.load_view()
        return {"apps": [app_row(name, loads, starts) for name in sorted(controller.active)]}

    @api.get("/v1/apps/{app}")
    async def app_detail(app: str) -> dict[str, Any]:
        controller.app(app)
        starts, loads = await controller.starts.of_a_day(), controller.state.load_view()
        _, spec = controller.app(app)  # it may have been stopped meanwhile
        functions = []
        for f in spec.functions:
            plain = to_dict(f)
            plain["secrets"] = [{"name": s.name, "keys": sorted(s.values)} for s in f.secrets]
            plain["key"] = function_key(f, spec.runtime)
            plain["capture"] = controller.state.capture_view(app, f.tag)
            plain["warm"] = controller.state.warm_view(app, f.tag)
            plain["snapshots"] = controller.state.snapshots_view(app, f.tag)
            plain["calls"] = watching.load_row(loads.get((app, f.tag)), controller.now())
            mine = [i for i in controller.instances.values() if (i.request.app, i.request.spec.tag) == (app, f.tag)]
            plain["containers"] = len(mine)
            functions.append(plain)
        return {**app_row(app, loads, starts), "functions": functions, "runtime": to_dict(spec.runtime)}

    @api.post("/v1/apps/{app}/stop")
    async def stop_app(app: str) -> dict[str, Any]:
        return {"app": app, "stopped": True, "cancelled": controller.stop_app(app)}

    @api.post("/v1/apps/{app}/rollback")
    async def rollback(app: str, body: dict[str, Any]) -> dict[str, Any]:
        version = body.get("version")
        if version is not None and type(version) is not int:
            raise SpecError(f"rollback of {app!r}: version is a number, got {version!r}", code="bad-request")
        return controller.rollback(app, version)

    @api.post("/v1/apps/{app}/touch")
    async def touch_app(app: str) -> dict[str, Any]:
        """Its client is there: an ephemeral app is not idle."""
        controller.app(app)
        return {"app": app}

    @api.get("/v1/apps/{app}/history")
    async def history(app: str) -> dict[str, Any]:
        rows = controller.journal.deploys(app)
        if not rows:
            raise NotFoundError(f"no app {app!r} was ever deployed here", app=app)
        active = controller.active.get(app)
        return {
            "app": app,
            "versions": [
                {
                    "version": r.version,
                    "deployed": r.deployed,
                    "stopped": r.stopped,
                    "active": r.version == active,
                    "ephemeral": r.ephemeral,
                    "client": r.client,
                    "rollback": r.client.get("rollback"),
                    "functions": [f["tag"] for f in r.spec.get("functions", [])],
                }
                for r in rows
            ],
        }

    @api.get("/v1/apps/{app}/logs")
    async def app_logs(
        app: str,
        follow: bool = False,
        since: float = 0.0,
        after: int | None = Query(None, ge=0),
        last: int | None = Query(None, ge=0),
        function: str = "",
        container: str = "",
        call: str = "",
    ) -> StreamingResponse:
        over = controller.is_over(app)
        which = {"function": function, "instance": container, "call": call}
        log = controller.logs.app(app)
        lines = log.show(which, last=last, since=since, after=after, follow=follow and not over)
        return StreamingResponse(lines, media_type="application/x-ndjson")

    # Calls

    @api.get("/v1/apps/{app}/calls")
    async def app_calls(app: str, limit: int = Query(50, ge=1, le=1000), failed: bool = False) -> dict[str, Any]:
        deploys = controller.journal.deploys(app)
        if not deploys:
            raise NotFoundError(f"no app {app!r} was ever deployed here", app=app)
        classes = {f["tag"] for row in deploys for f in row.spec.get("functions", []) if f.get("kind") == "class"}
        unfinished = controller.state.calls
        short = {c.id for c in unfinished.values() if c.state == "queued" and c.group.hungry}

        def ran(call_id: str) -> int | None:
            record = controller.calls.get(call_id)
            return record.ran if record is not None else None

        return {
            "calls": [
                {
                    "id": row.id,
                    "function": f"{row.tag}.{row.method}" if row.tag in classes else row.tag,
                    # Of one that is over and not answered yet the machine knows nothing.
                    "status": row.outcome or (unfinished[row.id].state if row.id in unfinished else "running"),
                    "waits_for": "memory" if row.id in short else "",
                    "version": ran(row.id) or row.version,
                    "submitted": row.submitted,
                    "finished": row.finished,
                    "error": row.error,
                }
                for row in controller.journal.recent_of(app, limit, failed=failed)
            ]
        }

    @api.post("/v1/apps/{app}/calls/{tag}")
    async def submit(app: str, tag: str, request: Request, wait: float = 0.0) -> Response:
        encoding = request.headers.get("woodfrog-encoding", "")
        if not encoding:
            encoding = "json" if request.headers.get("content-type", "").startswith("application/json") else "pickle"
        if encoding not in ("json", "pickle"):
            raise SpecError(f"encoding {encoding!r} is not json or pickle", code="bad-request")
        call_id = request.headers.get("woodfrog-call") or uuid.uuid4().hex
        if not call_id.isalnum() or len(call_id) > 64:
            raise SpecError(f"call id {call_id[:80]!r}: letters and digits only, at most 64", code="bad-request")
        try:
            params = base64.b64decode(request.headers.get("woodfrog-params", ""), validate=True)
        except (binascii.Error, ValueError):
            raise SpecError("Woodfrog-Params is not base64", code="bad-request") from None
        service, method = split_tag(tag)
        payload = await _body(request, spool)
        try:
            record = controller.submit(
                call_id,
                app=app,
                service=service,
                method=method,
                params=params,
                digest=hashlib.sha256(params).hexdigest() if params else "",
                encoding=encoding,
                payload=payload,
            )
        finally:
            if payload.path is not None and payload.path.exists():  # else the journal has moved it
                await in_thread(payload.path.unlink, True)
        await _wait(record.done, wait)
        return _answer(record, controller.fetched)

    def known_to_results(app: str, count: int) -> None:
        """Raises NotFoundError for the name of an app that there never was."""
        if app and not count and not controller.journal.deploys(app):
            raise NotFoundError(f"no app {app!r} was ever deployed here", app=app)

    @api.get("/v1/results")
    async def results(app: str = "", before: float = Query(0.0, ge=0.0)) -> dict[str, Any]:
        """What results of finished calls take; with `before` of those that finished before it (Unix time)."""
        controller.tell_fetched()
        usage = await asyncio.to_thread(controller.journal.usage, app, before)
        known_to_results(app, len(usage))
        return {
            "apps": usage,
            "limit_bytes": settings.keep_results_mib << 20,
            "keep_s": settings.keep_results_s,
        }

    @api.delete("/v1/results")
    async def delete_results(app: str = "", before: float = Query(0.0, ge=0.0)) -> dict[str, Any]:
        if not app and not before:
            raise SpecError("name an app, or a time before which results go (before=)", code="bad-request")
        count, size = await controller.remove_results(app, before)
        known_to_results(app, count)
        return {"deleted": count, "bytes": size}

    @api.get("/v1/calls")
    async def recent_calls(limit: int = Query(50, ge=1, le=1000)) -> dict[str, Any]:
        return {"calls": [to_dict(row) | {"trace": None} for row in controller.journal.recent(limit)]}

    @api.get("/v1/calls/{call_id}")
    async def get_call(call_id: str, wait: float = 0.0) -> Response:
        record = call_of(call_id)
        await _wait(record.done, wait)
        return _answer(record, controller.fetched)

    def items_answer(record: CallRecord, frames: list[tuple[bytes, bytes]]) -> Response:
        headers = {"Woodfrog-Call": record.row.id, "Woodfrog-Status": record.outcome or "pending"}
        return Response(protocol.pack_items(frames), media_type="application/octet-stream", headers=headers)

    @api.get("/v1/calls/{call_id}/items")
    async def items(call_id: str, after: int = Query(0, ge=0), wait: float = 0.0) -> Response:
        """A generator's items from number `after` on, at least one unless the wait runs out."""
        record = call_of(call_id)
        record.asked = time.monotonic()
        if record.taken_up and after > record.sent:
            # Its items are of a run that ended with the daemon before this one: a second run need not go on from them.
            lost = InstanceCrashed(
                f"the daemon ended in the middle of this generator, after {after} items, and another run would not "
                "go on from them: call it again",
                call=call_id,
            )
            controller.cancel(call_id, lost)
            return items_answer(record, [(b"f", _failure_frame(lost))])
        record.acknowledge(after)
        deadline = time.monotonic() + min(wait, _MAX_WAIT_S)
        while record.count <= after and not record.done.is_set() and time.monotonic() < deadline:
            record.changed.clear()
            await _wait(record.changed, deadline - time.monotonic())
        first = after - record.taken
        if first < 0:
            raise OutputExpired(
                f"items of call {call_id} before number {record.taken} were taken already", call=call_id
            )
        page = list(itertools.islice(record.items, first, first + _PAGE))
        if any(payload.data is None for _, payload in page):
            try:
                out = await in_thread(lambda: [(kind, payload.read()) for kind, payload in page])
            except FileNotFoundError:  # meanwhile somebody said that they have come
                raise OutputExpired(f"items of call {call_id} were taken meanwhile", call=call_id) from None
        else:
            out = [(kind, payload.read()) for kind, payload in page]
        if record.outcome is not None and after + len(out) >= record.count:
            record.closed = time.monotonic()
            if record.outcome == "success" and record.from_journal:
                gone = OutputExpired(f"the items of call {call_id} are no longer kept", call=call_id)
                out.append((b"f", _failure_frame(gone)))
            elif record.outcome == "success":
                out.append((b"d", b""))
            elif record.outcome == "exception":
                out.append(
                    (b"e", await in_thread(record.result.read) if record.result.data is None else record.result.data)
                )
            else:
                out.append((b"f", _failure_frame(failure_of(record))))
        record.sent = max(record.sent, after + sum(kind == b"i" for kind, _ in out))
        return items_answer(record, out)

    @api.post("/v1/calls/{call_id}/cancel")
    async def cancel(call_id: str) -> dict[str, Any]:
        record = call_of(call_id)
        controller.cancel(call_id)
        return {"call": call_id, "finished": record.outcome}

    @api.get("/v1/calls/{call_id}/trace")
    async def trace(call_id: str) -> dict[str, Any]:
        record = call_of(call_id)
        stage = None
        if record.outcome is None and record.instance_id is None:
            starting = [
                controller.backend.describe(i)
                for i, info in controller.instances.items()
                if info.request.app == record.row.app and info.request.spec.tag == record.row.tag and not info.ready
            ]
            stage = next((d["stage"] for d in starting if d), "queued")
        return {
            "call": call_id,
            "app": record.row.app,
            "function": f"{record.row.tag}.{record.row.method}"
            if record.row.method != record.row.tag
            else record.row.tag,
            "status": record.outcome or "pending",
            "stage": stage,
            "instance": record.instance_id,
            "start": record.mode,
            "submitted": record.row.submitted,
            "error": record.error,
            "phases": record.trace(),
        }

    # Containers

    def container(instance_id: str) -> str:
        if instance_id in controller.instances:
            return instance_id
        found = [i for i in controller.instances if i.startswith(instance_id)]
        if len(found) != 1:
            raise NotFoundError(
                f"no container {instance_id!r}: `woodfrog container list` shows those that exist, `woodfrog app logs "
                "APP --container ID` what one has said that is gone",
                container=instance_id,
            )
        return found[0]

    def container_row(instance_id: str) -> dict[str, Any]:
        info = controller.instances[instance_id]
        # The backend may not know it yet, or any more.
        known = {"id": instance_id, "app": info.request.app, "function": info.request.spec.tag, "stage": "starting"}
        described = controller.backend.describe(instance_id) or known
        return {**described, "call": info.call_id, "served": info.served}

    @api.get("/v1/containers")
    async def containers() -> dict[str, Any]:
        rows = [container_row(i) for i in controller.instances]
        return {"containers": [{k: v for k, v in row.items() if k != "phases"} for row in rows]}

    @api.get("/v1/containers/{instance_id}")
    async def container_detail(instance_id: str) -> dict[str, Any]:
        return container_row(container(instance_id))

    @api.post("/v1/containers/{instance_id}/stop")
    async def stop_container(instance_id: str) -> dict[str, Any]:
        found = container(instance_id)
        controller.stop_instance(found)
        return {"container": found, "stopping": True}

    @api.get("/v1/containers/{instance_id}/logs")
    async def container_logs(
        instance_id: str, follow: bool = False, last: int | None = Query(None, ge=0)
    ) -> StreamingResponse:
        found = container(instance_id)
        log = controller.logs.app(controller.instances[found].request.app)
        return StreamingResponse(
            log.show({"instance": found}, last=last, follow=follow), media_type="application/x-ndjson"
        )

    @api.post("/v1/containers/{instance_id}/exec")
    async def execute(instance_id: str, body: dict[str, Any]) -> dict[str, Any]:
        argv = body.get("argv")
        if not isinstance(argv, list) or not argv or not all(isinstance(a, str) for a in argv):
            raise SpecError("exec wants argv: a list of at least one text", code="bad-request")
        timeout = body.get("timeout", _EXEC_TIMEOUT_S)
        if not isinstance(timeout, (int, float)) or not 0 < timeout <= 600:
            raise SpecError("exec: timeout is a number of seconds up to 600", code="bad-request")
        return await controller.backend.execute(container(instance_id), argv, timeout)

    # Snapshots

    @api.get("/v1/snapshots")
    async def snapshots() -> dict[str, Any]:
        rows = [_snapshot_row(catalogue, m, classes) for m in catalogue.manifests()]
        damaged = [{"id": i, "state": "damaged", "why": why} for i, why in sorted(catalogue.damaged.items())]
        return {"snapshots": rows + damaged}

    @api.get("/v1/snapshots/{snapshot_id}")
    async def snapshot_detail(snapshot_id: str, log: bool = False) -> dict[str, Any]:
        failed = catalogue.failure(snapshot_id)
        if failed is not None:
            row = {"id": snapshot_id, "state": "failed", "why": failed.splitlines()[0]}
            return {**row, "log": {"dump.log": failed}} if log else row
        manifest = catalogue.get(snapshot_id)
        out = _snapshot_row(catalogue, manifest, classes)
        out["host"] = manifest.host
        out["root_pid"] = manifest.root_pid
        out["phases"] = [dict(zip(("name", "ms"), p.split("="), strict=True)) for p in manifest.phases]
        out["files"] = [to_dict(f) for f in manifest.files]
        out["warnings"] = list(manifest.warnings)
        out["external_files"] = len(manifest.external)
        out["gpu_bytes"] = manifest.gpu_bytes
        if log:
            folder = catalogue.path(manifest.id) / "log"
            out["log"] = {p.name: p.read_text(errors="replace") for p in sorted(folder.glob("*.log"))}
        return out

    @api.post("/v1/snapshots/create")
    async def create_snapshot(body: dict[str, str]) -> dict[str, Any]:
        app, tag = body.get("app", ""), body.get("tag", "")
        controller.request_snapshot(app, tag)
        return {"app": app, "function": tag, "requested": True}

    keeping.add_routes(api, controller, catalogue, spool, _Json)
    looking.add_routes(api, controller, catalogue)
    watching.add_routes(api, controller, catalogue)
    volumes.add_routes(api, controller)
    return api
