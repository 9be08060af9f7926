"""Work that every rank does on a thread, beside training; all of them learn together how it ended."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from gka.parallel.job import Job


class BackgroundWork:
    """One piece of work at a time. Every rank makes the same calls in the same order.

    Args:
        job: of the main threads; the threads of the work exchange in a group of their own.
    """

    def __init__(self, job: Job) -> None:
        self.job, self._apart = job, job.apart()
        self._threads = ThreadPoolExecutor(1, "gka-background")
        self._task: Future[None] | None = None

    def begin(self, work: Callable[[Job], None]) -> None:
        """Start `work`, which gets the job whose exchanges it may use; the work before must have ended."""
        assert self._task is None, "the work before has not been finished"
        self._task = self._threads.submit(work, self._apart)

    @property
    def running(self) -> bool:
        """Whether a piece of work has begun and is not `finish`ed."""
        return self._task is not None

    def has_ended(self) -> bool:
        """Whether the work has ended on every rank, well or not."""
        return self._task is None or not self.job.any(not self._task.done())

    def finish(self) -> None:
        """Wait for the work.

        Raises:
            SharedError: on every rank, if it failed on one with an `InputError`.
            Exception: another error, on the ranks that had it; `SharedError` on the others.
        """
        task, self._task = self._task, None
        if task is None:
            return
        wait([task])
        with self.job.together():
            task.result()

    def close(self) -> None:
        """Wait for the work, whatever comes of it; nothing is begun afterwards."""
        with contextlib.suppress(Exception):
            self._threads.shutdown(wait=True)
