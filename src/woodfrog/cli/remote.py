"""The daemon as the command line sees it: the SDK's client, and the plain-JSON requests the commands make of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from woodfrog.cli import output
from woodfrog.errors import NotFoundError, WoodfrogError

if TYPE_CHECKING:
    from woodfrog.sdk.client import Client


def connect(*, start: bool = True) -> Client:
    """The daemon's client; starts the daemon on this machine when none runs, unless `start` is False."""
    from woodfrog.sdk import client

    return client.connect(start=start)


def get(client: Client, path: str, **params: Any) -> dict[str, Any]:
    """A JSON object of the API."""
    answer = client.request("GET", path, params=params).json()
    return answer if isinstance(answer, dict) else {}


def post(client: Client, path: str, data: Any = None, *, wait: float = 0.0) -> dict[str, Any]:
    """Ask for something; `wait` adds to the seconds the answer may take."""
    answer = client.request("POST", path, data={} if data is None else data, wait=wait).json()
    return answer if isinstance(answer, dict) else {}


def put(client: Client, path: str, data: Any) -> dict[str, Any]:
    """Put a JSON value under a name."""
    answer = client.request("PUT", path, data=data).json()
    return answer if isinstance(answer, dict) else {}


def segment(name: str) -> str:
    """A name as one segment of a path."""
    from woodfrog.sdk.client import segment as quoted

    return quoted(name)


def split_target(client: Client, target: str) -> tuple[str, str]:
    """`APP.FUNC`, `APP.CLASS.METHOD` or `APP::FUNC` → app and tag. Only a name with several dots asks the daemon.

    Raises:
        NotFoundError: not of that form.
    """
    app, colons, tag = target.partition("::")
    if colons and app and tag:
        return app, tag
    parts = target.split(".")
    if len(parts) < 2 or not all(parts):
        raise NotFoundError(f"{target!r} names no function: write APP.FUNC or APP.CLASS.METHOD", code="bad-target")
    if len(parts) > 2:
        apps = {item["app"] for item in get(client, "/apps")["apps"]}
        for cut in range(len(parts) - 1, 0, -1):
            if ".".join(parts[:cut]) in apps:
                return ".".join(parts[:cut]), ".".join(parts[cut:])
    return parts[0], ".".join(parts[1:])


QUICK_S = 0.3
"""Work that takes longer says how far it is."""
POLL_S = 0.5
GIVE_UP_S = 2.0


@contextmanager
def waiting(client: Client, *, quiet: bool = False) -> Iterator[output.Progress]:
    """For what is going on while something is waited for, also when the daemon goes away."""
    with output.Progress(quiet=quiet) as progress:
        before = client.on_lost
        if not quiet:
            client.on_lost = progress.say
        try:
            yield progress
        finally:
            client.on_lost = before


def finish(client: Client, answer: dict[str, Any], *, quiet: bool) -> dict[str, Any]:
    """Wait for the end of work in the daemon, saying how far it is.

    Args:
        answer: to the request that began it: its result, or a job's state.
    """
    with waiting(client, quiet=quiet) as progress:
        try:
            while answer.get("state") == "running" and "job" in answer:
                progress.say(job_words(answer))
                reply = client.request("GET", f"/jobs/{segment(answer['job'])}", wait=POLL_S)
                answer = reply.json()
        except KeyboardInterrupt:
            progress.clear()
            if answer.get("for_client"):
                _give_up(client, answer)
            else:
                output.note(f"{answer.get('what')} goes on in the daemon")
            raise
    return answer


def _give_up(client: Client, job: dict[str, Any]) -> None:
    """Nobody will fetch the file that a job writes."""
    with suppress(WoodfrogError), client.apart(GIVE_UP_S) as apart:  # where it fails, the daemon waits a while for us
        apart.request("DELETE", f"/jobs/{segment(job['job'])}/file")


def work(client: Client, path: str, *, quiet: bool, **params: Any) -> dict[str, Any]:
    """Have the daemon do something that may take minutes, and wait for it."""
    reply = client.request("POST", path, params=params, wait=QUICK_S)
    answer = reply.json()
    return finish(client, answer if isinstance(answer, dict) else {}, quiet=quiet)


def job_words(job: dict[str, Any]) -> str:
    """How far it is, in words."""
    step, done, total = job.get("step"), job.get("done") or 0, job.get("total") or 0
    if not step or total <= 1:
        return str(job.get("what"))
    how_far = f"{output.size(done)} of {output.size(total)}" if step == "bytes" else f"{done} of {total} {step}"
    return f"{job.get('what')}: {how_far}"
