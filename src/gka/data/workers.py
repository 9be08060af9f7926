"""Worker processes for tokenising, each fed with parts through its standard input.

They are started as a command of their own, not by `multiprocessing`: that would run the user's script again
in each of them, and would leave them alive if this process is killed. A worker ends when its input is closed,
which the system does when its parent ends.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

from gka.data.packed import Shard
from gka.data.sources import Part
from gka.data.text import Encoder
from gka.data.writing import write_part
from gka.errors import InputError

_COMMAND = "from gka.data.workers import serve; serve()"
_TOLD, _DONE, _FAILED = "told", "done", "failed"


@dataclass(frozen=True)
class Job:
    """What workers need besides parts.

    Attributes:
        folder: where shards are written.
        tokenizer: a Hugging Face tokenizer.
        column: as in `gka.data.sources.parts_of`.
    """

    folder: Path
    tokenizer: Any
    column: str


def tokenise(
    job: Job,
    parts: Sequence[Part],
    count: int,
    told: Callable[[int], None],
    done: Callable[[Shard], None],
) -> None:
    """Tokenise parts, one after another, on `count` processes; with one, in this process.

    Args:
        job: what to do.
        parts: the parts, each given to one process.
        count: number of processes.
        told: called with the number of bytes of text just tokenised.
        done: called with each finished shard.

    Raises:
        InputError: a part failed, or a worker was ended. No further part is begun then.
    """
    if count == 1 or len(parts) == 1:
        encode = Encoder(job.tokenizer)
        for part in parts:
            done(write_part(job.folder, part, encode, job.column, told))
        return
    left: SimpleQueue[Part] = SimpleQueue()
    for part in sorted(parts, key=lambda p: -p.size):  # large ones first, so that all end together
        left.put(part)
    crew = [_Worker(job, left, told, done) for _ in range(min(count, len(parts)))]
    try:
        for worker in crew:
            worker.start()
        while any(worker.is_alive() for worker in crew):
            for worker in crew:
                worker.join(0.1)  # short, so that signals are handled
            if any(worker.error for worker in crew):
                break
    finally:
        for worker in crew:
            worker.end()
    for worker in crew:
        if worker.error:
            raise worker.error


class _Worker(threading.Thread):
    """A process, and the thread that feeds it."""

    def __init__(self, job: Job, left: "SimpleQueue[Part]", told: Any, done: Any) -> None:
        super().__init__(name="gka-tokenise", daemon=True)
        self.job, self.left, self.told, self.done = job, left, told, done
        self.error: Exception | None = None
        self.ending = False
        path = os.pathsep.join(p for p in sys.path if p)
        environment = os.environ | {
            "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def run(self) -> None:
        try:
            self._feed()
        except Exception as error:  # raised again in the caller's thread
            if not self.ending:
                self.error = error

    def _feed(self) -> None:
        part = None
        try:
            self._send(self.job)
            while True:
                try:
                    part = self.left.get_nowait()
                except Empty:
                    return
                self._send(part)
                self._listen()
        except (OSError, EOFError, pickle.UnpicklingError):
            status = self.process.wait()
            what = f"part {part.number}" if part else "its first part"
            how = f"signal {-status}" if status < 0 else f"status {status}"
            raise InputError(
                f"a tokenising process ended with {how} at {what} (out of memory?); finished parts are kept: "
                "run again to go on, with fewer workers if memory is short"
            ) from None

    def _send(self, value: Any) -> None:
        stdin: Any = self.process.stdin
        pickle.dump(value, stdin)
        stdin.flush()

    def _listen(self) -> None:
        """Pass on what the worker says until its part is done or has failed."""
        stdout: Any = self.process.stdout
        while True:
            kind, value = pickle.load(stdout)
            if kind == _FAILED:
                raise value
            if kind == _DONE:
                self.done(value)
                return
            self.told(value)

    def end(self) -> None:
        """End the process, and the thread with it."""
        self.ending = True
        if self.is_alive():
            self.process.kill()  # it is within a part; what it writes is a draft
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()
        if self.ident is not None:
            self.join()
        self.process.stdout.close()  # type: ignore[union-attr]


def serve() -> None:
    """A worker's main function: a job, then parts, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    incoming, outgoing = sys.stdin.buffer, _private_output()
    with contextlib.suppress(BrokenPipeError, EOFError):
        job: Job = pickle.load(incoming)
        encode = Encoder(job.tokenizer)
        while True:
            part: Part = pickle.load(incoming)
            _say(outgoing, *_done(job, part, encode, lambda size: _say(outgoing, _TOLD, size)))


def _done(job: Job, part: Part, encode: Encoder, told: Callable[[int], None]) -> tuple[str, Any]:
    try:
        return _DONE, write_part(job.folder, part, encode, job.column, told)
    except InputError as error:
        return _FAILED, type(error)(str(error))


def _private_output() -> IO[bytes]:
    """Standard output for messages alone; what a library prints goes to standard error."""
    private = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return private


def _say(outgoing: IO[bytes], kind: str, value: Any) -> None:
    pickle.dump((kind, value), outgoing)
    outgoing.flush()
