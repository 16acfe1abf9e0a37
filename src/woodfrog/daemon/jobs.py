"""Work that may take minutes and that people wait for: its answer when it is ready, how far it is until then."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from woodfrog.backends.base import Progress
from woodfrog.errors import DaemonError, NotFoundError, WoodfrogError

__all__ = ["Job", "Jobs"]

log = logging.getLogger("woodfrog")

_KEPT = 50
_FETCH_S = 600.0
"""How long a file waits for its client, which may be gone."""


@dataclass(eq=False)
class Job:
    """One piece of work. Its end is kept until others have ended since."""

    id: str
    what: str
    step: str = ""
    done: int = 0
    total: int = 0
    result: dict[str, Any] | None = None
    error: WoodfrogError | None = None
    file: Path | None = None
    """What is to be fetched; removed when that was not begun within `_FETCH_S` of its end."""
    unwanted: bool = False
    """Nobody will fetch it."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def progress(self, step: str, done: int, total: int) -> None:
        self.step, self.done, self.total = step, done, total

    def view(self) -> dict[str, Any]:
        state = "running" if not self.ended.is_set() else "failed" if self.error else "done"
        return {
            "job": self.id,
            "what": self.what,
            "state": state,
            "step": self.step,
            "done": self.done,
            "total": self.total,
            "for_client": self.file is not None,
        }


class Jobs:
    """All work of this kind of one daemon. A client that goes away does not end it."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(
        self,
        what: str,
        work: Callable[[Progress], Awaitable[dict[str, Any]]],
        *,
        file: Path | None = None,
        cleanup: Path | None = None,
    ) -> Job:
        """Begin `work`.

        Args:
            file: what it writes for the client to fetch.
            cleanup: a file to remove when it has ended.
        """
        job = Job(uuid.uuid4().hex[:12], what, file=file)
        self._jobs[job.id] = job
        task = asyncio.get_running_loop().create_task(self._run(job, work, cleanup))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    async def _run(self, job: Job, work: Callable[[Progress], Awaitable[dict[str, Any]]], cleanup: Path | None) -> None:
        try:
            job.result = await work(job.progress)
        except WoodfrogError as e:
            job.error = e
        except Exception as e:
            log.exception("%s", job.what)
            job.error = DaemonError(f"{job.what}: internal error: {type(e).__name__}: {e}", code="internal")
        finally:
            if cleanup is not None:
                cleanup.unlink(missing_ok=True)
            if job.result is None or job.unwanted:
                self.drop_file(job)
            elif job.file is not None:
                asyncio.get_running_loop().call_later(_FETCH_S, self.drop_file, job)
            job.ended.set()
            self._forget()

    def _forget(self) -> None:
        ended = [job for job in self._jobs.values() if job.ended.is_set()]
        for job in ended[:-_KEPT]:
            self.drop_file(job)
            del self._jobs[job.id]

    def give_up(self, job: Job) -> None:
        """Nobody will fetch what it writes: remove that, as soon as it is written."""
        job.unwanted = True
        if job.ended.is_set():
            self.drop_file(job)

    @staticmethod
    def drop_file(job: Job) -> None:
        """Remove what was to be fetched."""
        if job.file is not None:
            job.file.unlink(missing_ok=True)
            job.file = None

    def get(self, job_id: str) -> Job:
        """A job by its id.

        Raises:
            NotFoundError: it never was, or is no longer kept.
        """
        try:
            return self._jobs[job_id]
        except KeyError:
            raise NotFoundError(f"no job {job_id!r}; a restart of the daemon ends them", job=job_id) from None

    def list(self) -> list[dict[str, Any]]:
        """All that are kept, the oldest first."""
        return [job.view() for job in self._jobs.values()]
