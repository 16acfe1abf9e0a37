"""Calls: sending them, waiting for them over lost connections, many at once, and generators."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import contextvars
import json
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from uuid import uuid4

from woodfrog.errors import (
    CallCancelled,
    CallNotFound,
    DaemonError,
    NotFoundError,
    NotOverYet,
    SerializationError,
    SpecError,
    StartupError,
    WoodfrogError,
)
from woodfrog.protocol import unpack_items
from woodfrog.sdk import checks, payload
from woodfrog.sdk.client import Client, Reply, connect, error_from_answer, segment
from woodfrog.sdk.dual import ClassDual, Dual
from woodfrog.sdk.functions import inside
from woodfrog.sdk.hooks import in_worker

__all__ = ["Call", "FunctionCall", "Target", "aio_iterate", "in_thread", "map_calls"]

T = TypeVar("T")
R = TypeVar("R")

WAIT_S = 55.0
"""Longest single wait for an answer; below the idle limits of usual proxies."""
LEAVE_S = 0.5
"""How long after the end of a loop or task in a detached run the block's own end tells that it was interrupted."""
DETACHED_WAIT_S = 2.0
"""Longest single wait in a detached run: the threads that wait keep an interrupted program from its end."""
CANCEL_S = 2.0
"""How long a cancellation waits for a daemon that is away."""
WINDOW = 100
"""Inputs of one map that are under way at a time."""
MAX_PARAMS = 32 << 10
_END: Any = object()


@dataclass(frozen=True)
class Target:
    """What is called: a function or method of a running or deployed app."""

    client: Client
    app: str
    tag: str
    params: bytes | None = None
    """Pickled constructor arguments of a class."""

    def __post_init__(self) -> None:
        if self.params is not None and len(self.params) > MAX_PARAMS:
            raise SpecError(
                f"{self.tag}: the constructor's arguments take {len(self.params)} bytes, the limit is {MAX_PARAMS}: "
                "pass large data to a method"
            )


class Detached:
    """A run that goes on without this process."""

    def __init__(self) -> None:
        self.interrupted = threading.Event()
        """Its block was ended by Ctrl-C: what was called there goes on."""
        self.left: list[Call] = []
        """What nobody here waits for any more."""


detached: dict[str, Detached] = {}
"""By the name of its app."""


def give_up(calls: Sequence[Call]) -> None:
    """Nobody here waits for calls of one app any more: cancel them, except those of a detached run that ends by Ctrl-C.

    Loops and asyncio's tasks are left in the same way for that as for any other reason: the end of the run's block, a
    moment later, makes the difference.
    """
    run = detached.get(calls[0].target.app) if calls else None
    if run is None:
        for call in calls:
            call.cancel()
        return
    calls = [call for call in calls if call not in run.left]
    run.left += calls

    def decide() -> None:
        if not run.interrupted.wait(LEAVE_S):
            for call in calls:
                call.cancel()
                run.left.remove(call)

    threading.Thread(target=decide, name="woodfrog-leave").start()


class Call:
    """One call with an id made here, so that sending it again never runs it twice."""

    def __init__(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.id = uuid4().hex
        self.target = target
        self._process = os.getpid()
        self._body = payload.dumps_arguments(args, kwargs, target.tag)
        self._cancelled = False
        self._over = False
        """Nothing is sent any more."""

    def send(self, wait: float = 0.0) -> Reply:
        """Hand the call to the daemon; its answer if there is one within `wait` seconds."""
        if self._cancelled:
            raise CallCancelled(f"{self.target.tag}: the call was cancelled")
        headers = {"woodfrog-call": self.id, "woodfrog-encoding": "pickle", "content-type": "application/octet-stream"}
        if self.target.params is not None:
            headers["woodfrog-params"] = base64.b64encode(self.target.params).decode()
        t = self.target
        return t.client.request(
            "POST",
            f"/apps/{segment(t.app)}/calls/{segment(t.tag)}",
            headers=headers,
            content=self._body,
            wait=wait,
            kept=f"the call may have been taken on: {_asked_again(self.id)}",
            new=True,
        )

    def run(self) -> Any:
        """Send, wait, and return the result or raise what the call raised. Ctrl-C cancels the call (see `give_up`)."""
        run = detached.get(self.target.app)
        try:
            reply = self.send(DETACHED_WAIT_S if run else WAIT_S)
            self._body = b""
            with _versions_told(self.target.client, self.id):
                return outcome(wait_for(self.target.client, self.id, reply, run=run), self.target.tag)
        except KeyboardInterrupt:
            self._over = True
            give_up([self])
            raise
        finally:
            self._over = True

    def cancel(self) -> None:
        """Cancel from any thread; also a call that is on its way to the daemon, and may arrive after this.

        Not from a forked child, which leaves its copy of a loop or a map behind while the parent goes on with its own.
        """
        if os.getpid() != self._process:
            return
        self._cancelled = True
        deadline = time.monotonic() + (0.2 if self._over else CANCEL_S)
        with self.target.client.apart(CANCEL_S) as client:
            while not cancel(client, self.id) and time.monotonic() < deadline:
                time.sleep(0.05)

    def items(self) -> Iterator[Any]:
        """The items of a generator, as they come. Leaving early cancels the call: the generator is closed."""
        client, tag = self.target.client, self.target.tag
        ended = False
        try:
            first = self.send()
            if first.headers.get("woodfrog-status", "pending") not in ("pending", "success"):
                ended = True
                outcome(first, tag)
            self._body, after = b"", 0
            run = detached.get(self.target.app)
            wait = DETACHED_WAIT_S if run else WAIT_S
            while run is None or not run.interrupted.is_set():
                reply = client.request(
                    "GET", f"/calls/{self.id}/items", params={"after": str(after)}, wait=wait, kept=_kept(self.id)
                )
                for kind, body in unpack_items(reply.body.getvalue()):
                    if kind == b"i":
                        after += 1
                        with _versions_told(client, self.id):
                            item = payload.load_result(body, tag)
                        yield item
                        continue
                    ended = True
                    if kind == b"e":
                        with _versions_told(client, self.id):
                            raise payload.remote_exception(body, tag)
                    if kind == b"f":
                        raise _failure(body, tag)
                    return
                status = reply.headers.get("woodfrog-status", "pending")
                if status != "pending" and not reply.body.getvalue():
                    ended = True
                    if status != "success":
                        outcome(wait_for(client, self.id, None), tag)
                    return
        finally:
            self._over = True
            if not ended:
                give_up([self])


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _failure(body: bytes, tag: str) -> WoodfrogError:
    """Why a call came to no answer; with the traceback of a start that failed."""
    error = error_from_answer(_json(body), f"{tag} failed")
    if isinstance(error, StartupError) and error.fields.get("traceback"):
        error.__cause__ = payload.RemoteTraceback(str(error.fields["traceback"]))
    return error


def _kept(call_id: str) -> str:
    return f"the call is kept: {_asked_again(call_id)}"


def _asked_again(call_id: str) -> str:
    return f"woodfrog.FunctionCall.from_id({call_id!r}).get() asks for it again"


def cancel(client: Client, call_id: str) -> bool:
    """Cancel a call; nothing happens when it is already over. False where the daemon does not know it or is away."""
    with contextlib.suppress(NotFoundError, DaemonError):
        client.request("POST", f"/calls/{call_id}/cancel", reconnect_s=min(CANCEL_S, client.reconnect_s))
        return True
    return False


def wait_for(
    client: Client, call_id: str, reply: Reply | None, deadline: float | None = None, run: Detached | None = None
) -> Reply:
    """Poll until the call is over, however often the daemon is restarted meanwhile.

    Raises:
        CallCancelled: `run` was interrupted; the call goes on.
        NotOverYet: `deadline` (monotonic seconds) has passed, also where the daemon is away.
        CallNotFound: the daemon knows no such call (any more).
    """
    while reply is None or reply.status == 202 or reply.headers.get("woodfrog-status") == "pending":
        if run is not None and run.interrupted.is_set():
            raise CallCancelled(f"call {call_id} is not waited for any more: its run was interrupted")
        wait, patience = DETACHED_WAIT_S if run else WAIT_S, client.reconnect_s
        if deadline is not None:
            left = max(0.0, deadline - time.monotonic())
            wait, patience = min(wait, left), min(patience, left)
            if left == 0.0 and reply is not None:
                raise NotOverYet(f"call {call_id} is not over yet")
        try:
            new = reply is None
            reply = client.request(
                "GET", f"/calls/{call_id}", wait=wait, kept=_kept(call_id), reconnect_s=patience, new=new
            )
        except NotFoundError as e:
            raise CallNotFound(e.message, code=e.code, **e.fields) from None
        except DaemonError as e:
            if e.code != "daemon-lost" or patience == client.reconnect_s:
                raise
            raise NotOverYet(
                f"call {call_id} is not over yet, as far as is known: woodfrog's daemon at {client.where} is away"
                f"{client.remedy()}",
                retryable=True,
            ) from None
    return reply


def outcome(reply: Reply, tag: str) -> Any:
    """The value of an answer.

    Raises:
        Exception: the user's own, as it was raised; or an ExecutionError where the call came to no answer.
    """
    status = reply.headers.get("woodfrog-status")
    if status == "success":
        return payload.load_result(reply.body, tag)
    if status == "exception":
        raise payload.remote_exception(reply.body, tag)
    if status == "failure":
        raise _failure(reply.body.getvalue(), tag)
    if status == "cancelled":
        error = error_from_answer(_json(reply.body.getvalue()), f"{tag}: the call was cancelled")
        raise (
            error
            if isinstance(error, CallCancelled)
            else CallCancelled(f"{tag}: {error.message.removeprefix(tag + ': ')}")
        )
    raise DaemonError(
        f"{tag}: the daemon answered {reply.status} with status {status!r}, which this client does not know"
    )


@contextlib.contextmanager
def _versions_told(client: Client, call_id: str) -> Iterator[None]:
    """To the error of a pickle that could not be read, add which versions differ between here and the container."""
    try:
        yield
    except SerializationError as e:
        with contextlib.suppress(Exception):  # the error itself is what matters
            if found := _versions_differ(client, call_id, e):
                e.message += f"{'' if e.message.endswith('?') else ';'} {found}"
        raise


def _versions_differ(client: Client, call_id: str, error: SerializationError) -> str:
    from woodfrog import versions

    there = error.fields.get("versions")
    modules = error.fields.get("modules")
    if modules is not None:
        app = client.request("GET", f"/calls/{call_id}/trace").json()["app"]
        runtime = client.request("GET", f"/apps/{segment(app)}").json()["runtime"]
        there = versions.installed_at(runtime["sys_path"], modules, runtime["version"])
    elif not isinstance(there, dict):
        return ""
    names = "here", "in the container"
    return versions.difference(versions.here(name for name in there if name != versions.PYTHON), there, names)


# Waiting without blocking an event loop: threads of our own, since the loop's default pool has a handful only.

_aio_pool: ThreadPoolExecutor | None = None


def _threads() -> ThreadPoolExecutor:
    global _aio_pool
    if _aio_pool is None:
        _aio_pool = ThreadPoolExecutor(256, thread_name_prefix="woodfrog-aio")
    return _aio_pool


def _after_fork() -> None:
    global _aio_pool
    _aio_pool = None  # its threads are the parent's


os.register_at_fork(after_in_child=_after_fork)


async def _run_in_thread(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(_threads(), lambda: context.run(function, *args, **kwargs))


def in_thread(function: Callable[..., T]) -> Callable[..., Coroutine[Any, Any, T]]:
    """`function` as one that can be awaited."""

    def start(*args: Any, **kwargs: Any) -> Coroutine[Any, Any, T]:
        return _run_in_thread(function, *args, **kwargs)

    return start


@checks.lacking(
    {
        "get_call_graph": "look with `woodfrog app calls`",
        "get_dashboard_url": "look with `woodfrog app calls`",
        "hydrate": "its get() tells whether it is there",
        "iter": "call a generator with .remote_gen()",
        "logs": "look with `woodfrog app logs`",
        "num_inputs": "a call has one input",
    }
)
class FunctionCall(Generic[R]):
    """A call that was started with `.spawn`.

    Example:
        >>> call = square.spawn(3)  # doctest: +SKIP
        >>> call.get(timeout=10)  # doctest: +SKIP
        9
    """

    def __init__(self, object_id: str, client: Client | None = None, tag: str = "the call") -> None:
        self.object_id = object_id
        self._known_client = client
        self._tag = tag

    @ClassDual
    @classmethod
    def from_id(cls, function_call_id: str, client: Any = None) -> FunctionCall[Any]:
        """The call of that id (`object_id`), also from another program. Asks nothing of the daemon yet."""
        if not isinstance(function_call_id, str) or not function_call_id:
            raise SpecError(f"FunctionCall.from_id needs the id of a call, got {function_call_id!r}")
        return cls(function_call_id, client if isinstance(client, Client) else None)

    def _client(self) -> Client:
        if self._known_client is None:
            if in_worker():
                raise inside(f"FunctionCall {self.object_id!r}", "wait for it on the client, and pass on its result")
            self._known_client = connect()
        return self._known_client

    def _get(self, timeout: float | None = None) -> R:
        deadline = None if timeout is None else time.monotonic() + timeout
        with _versions_told(self._client(), self.object_id):
            found: R = outcome(wait_for(self._client(), self.object_id, None, deadline), self._tag)
        return found

    def _cancel(self, terminate_containers: bool = False) -> None:
        del terminate_containers
        cancel(self._client(), self.object_id)

    @property
    def get(self) -> Dual[..., R, Coroutine[Any, Any, R]]:
        """`get(timeout=None)`: the result. `timeout` in seconds; 0 asks once.

        Raises:
            NotOverYet: no result within `timeout`; the call goes on. It is a TimeoutError.
            CallNotFound: the result is no longer kept, or there never was such a call.
            Exception: what the call raised.
        """
        return Dual(self._get, in_thread(self._get))

    @property
    def cancel(self) -> Dual[..., None, Coroutine[Any, Any, None]]:
        """`cancel()`: stop the call; its `get` raises CallCancelled."""
        return Dual(self._cancel, in_thread(self._cancel))

    @staticmethod
    def _gather(*function_calls: FunctionCall[T]) -> list[T]:
        return [call._get() for call in function_calls]

    gather = Dual(_gather, in_thread(_gather))
    """`gather(*function_calls)`: the results of several calls, in their order; the first exception is raised."""

    def __reduce__(self) -> tuple[Any, ...]:
        return FunctionCall, (self.object_id, None, self._tag)

    def __repr__(self) -> str:
        return f"FunctionCall.from_id({self.object_id!r})"


async def run_aio(call: Callable[[], Call]) -> Any:
    """Make, send and await a call; cancelling the task cancels the call (see `give_up`)."""
    made = await _run_in_thread(call)
    try:
        return await _run_in_thread(made.run)
    except asyncio.CancelledError:
        if made.target.app in detached:
            give_up([made])  # at once: the end of the run's block, which may come next, is to know of it
        else:
            _threads().submit(made.cancel)
        raise


def _guarded(iterator: Iterator[T]) -> T:
    # A StopIteration cannot pass through a future.
    return next(iterator, _END)


async def aio_iterate(iterator: Iterator[T], close: Callable[[], None]) -> AsyncIterator[T]:
    """The items of a blocking iterator; `close` is called when it is left early, from another thread."""
    over = False
    try:
        while True:
            item = await _run_in_thread(_guarded, iterator)
            if item is _END:
                over = True
                return
            yield item
    except Exception:
        over = True
        raise
    finally:
        if not over:
            _threads().submit(close)


class MapRun:
    """Many calls of one target: a bounded number under way, inputs taken as they are needed."""

    def __init__(
        self,
        target: Target,
        inputs: Iterable[tuple[tuple[Any, ...], dict[str, Any]]],
        *,
        order_outputs: bool,
        return_exceptions: bool,
        window: int = WINDOW,
    ) -> None:
        self._target, self._inputs = target, inputs
        self._ordered, self._keep_exceptions = order_outputs, return_exceptions
        self._slots = threading.Semaphore(window)
        self._pool = ThreadPoolExecutor(window, thread_name_prefix="woodfrog-map")
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._active: dict[str, Call] = {}
        self._context = contextvars.copy_context()

    def _one(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = Call(self._target, args, kwargs)
        with self._lock:
            if self._stop.is_set():
                raise CallCancelled(f"{self._target.tag}: the map was left early")
            self._active[call.id] = call
        try:
            return call.run()
        finally:
            with self._lock:
                self._active.pop(call.id, None)

    def _feed(self) -> None:
        count = 0
        try:
            for args, kwargs in self._inputs:
                self._slots.acquire()
                if self._stop.is_set():
                    return
                future = self._pool.submit(self._one, args, kwargs)
                count += 1
                if self._ordered:
                    self._ready.put(future)
                else:
                    future.add_done_callback(self._ready.put)
        except BaseException as e:
            self._ready.put(e)
        else:
            self._ready.put(count)

    def __iter__(self) -> Iterator[Any]:
        threading.Thread(target=self._context.run, args=(self._feed,), daemon=True, name="woodfrog-map-inputs").start()
        total, seen = None, 0
        try:
            while total is None or seen < total:
                ready = self._ready.get()
                if ready is _END:
                    return
                if isinstance(ready, int):
                    total = ready
                    continue
                if isinstance(ready, BaseException):
                    raise ready
                future: Future[Any] = ready
                try:
                    value = future.result()
                except Exception as e:
                    if not self._keep_exceptions:
                        raise
                    value = e
                seen += 1
                self._slots.release()
                del ready, future
                yield value
        finally:
            self.close()

    def close(self) -> None:
        """Cancel what is under way. Safe from any thread, and twice."""
        with self._lock:
            already = self._stop.is_set()
            self._stop.set()
            active = list(self._active.values())
        if already:
            return
        self._slots.release()
        self._ready.put(_END)
        self._pool.shutdown(wait=False, cancel_futures=True)
        give_up(active)


def map_calls(
    target: Target, inputs: Iterable[tuple[tuple[Any, ...], dict[str, Any]]], **options: Any
) -> Iterator[Any]:
    """The results of many calls; see MapRun."""
    yield from MapRun(target, inputs, **options)


def zipped(
    iterators: Sequence[Iterable[Any]], kwargs: dict[str, Any], loop: asyncio.AbstractEventLoop | None = None
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Inputs of `.map`; asynchronous iterables are drained on `loop`."""
    for args in zip(*(_blocking(i, loop) for i in iterators), strict=False):
        yield args, kwargs


def starred(
    iterable: Iterable[Any], kwargs: dict[str, Any], loop: asyncio.AbstractEventLoop | None = None
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Inputs of `.starmap`."""
    for args in _blocking(iterable, loop):
        yield tuple(args), kwargs


def _blocking(iterable: Any, loop: asyncio.AbstractEventLoop | None) -> Iterator[Any]:
    if loop is None or not hasattr(iterable, "__aiter__"):
        yield from iterable
        return
    source = iterable.__aiter__()

    async def following() -> Any:
        return await anext(source, _END)

    while (item := asyncio.run_coroutine_threadsafe(following(), loop).result()) is not _END:
        yield item
