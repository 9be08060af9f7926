"""The processes of a job: what they agree on, and what happens when one of them fails or is lost.

Besides the group that carries gradients a job has two small ones on the CPU. In `control` ranks exchange
flags, errors and checksums; its waits may be long, for one rank may prepare data for hours. In `watch` every
rank waits for a farewell of the next one: the system closes a dead process's connections, so the one before
it knows at once, and no hung collective has to time out first.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from gka.errors import InputError, LostRank, SharedError, reason_of
from gka.parallel.mesh import device_type

PATIENCE = timedelta(days=30)
"""Longest wait in `control` and `watch`."""
GRACE = 5.0
"""Seconds that the main thread has to end by itself after a rank was lost."""
_FAREWELL = 1
_LOST, _TOLD = "gka/lost", "gka/told"  # keys of the store


@dataclass
class Job:
    """This process's part of a job.

    Attributes:
        rank, ranks: this process and the number of all.
        device: where it computes.
        control: the group of flags and errors; None in a job of one process.
        advice: what to do when a rank is lost, the end of the message about it.
        lost: the first rank that was found lost.
    """

    rank: int = 0
    ranks: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: Any = None
    advice: str = ""
    lost: int | None = None
    _store: Any = None
    _watch: Any = None
    _watcher: threading.Thread | None = None
    _found: threading.Event = field(default_factory=threading.Event)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and tells the user."""
        return self.rank == 0

    def apart(self) -> "Job":
        """This job with a control group of its own, for exchanges on another thread; every rank calls it."""
        if self.ranks == 1:
            return Job(device=self.device)
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        return Job(self.rank, self.ranks, self.device, control)

    def any(self, value: int) -> int:
        """The largest of all ranks' values."""
        if self.ranks == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.control)
        return int(found)

    def sum(self, value: int) -> int:
        """The sum of all ranks' values."""
        if self.ranks == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, group=self.control)
        return int(found)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; anything that can be pickled."""
        if self.ranks == 1:
            return [value]
        found: list[Any] = [None] * self.ranks
        dist.all_gather_object(found, value, group=self.control)
        return found

    def wait(self) -> None:
        """Until every rank is here."""
        if self.ranks > 1:
            dist.barrier(group=self.control)

    @contextmanager
    def together(self) -> Iterator[None]:
        """If the block fails on one rank, let it fail on all.

        All ranks must enter the block, and nothing in it may wait for another rank.

        Raises:
            SharedError: on every rank, where the block raised an `InputError` on some; the message has the
                first one, and its rank unless that is 0.
            Exception: another error on the rank that had it; then the others raise `SharedError`.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.ranks == 1:
            if error is not None:
                raise error
            return
        told = None
        if error is not None:
            known = isinstance(error, InputError)
            told = str(error) if known else f"{type(error).__name__}: {reason_of(error)}"
        every = self.gather(told)
        if not any(every):
            return
        if error is not None and not isinstance(error, InputError):
            raise error
        rank, first = next((r, text) for r, text in enumerate(every) if text)
        where = "" if rank == 0 else f"rank {rank}: "
        raise SharedError(f"{where}{first}") from error

    def main_first(self, work: Callable[[], Any]) -> Any:
        """`work()` on rank 0, then on all others, which find what it has stored: each has its result."""
        result: Any = None
        with self.together():
            if self.is_main:
                result = work()
        with self.together():
            if not self.is_main:
                result = work()
        return result

    def agree(self, facts: dict[str, str]) -> None:
        """Check that every rank states the same facts.

        Raises:
            SharedError: one differs from rank 0's; the message names fact and rank.
        """
        every = self.gather(facts)
        for rank, theirs in enumerate(every):
            for name, value in every[0].items():
                if theirs.get(name) != value:
                    raise SharedError(
                        f"rank {rank} has another {name} than rank 0 ({theirs.get(name)}, not {value}): "
                        "start every process with the same command, files and installed versions"
                    )

    def check_alive(self, error: BaseException) -> None:
        """Raise `LostRank` if `error` came of the loss of a rank; else return."""
        end = time.monotonic() + (GRACE if self.ranks > 1 else 0)
        while time.monotonic() < end:
            if self._found.wait(0.1) or self._is_noted():
                raise LostRank(self.lost, self._told()) from error

    def _is_noted(self) -> bool:
        """Whether another rank has noted a loss in the store."""
        with contextlib.suppress(Exception):
            if self._store.check([_LOST]):
                self.lost = int(self._store.get(_LOST))
                return True
        return False

    def _told(self) -> str:
        """The message about a lost rank, "" where another rank has it."""
        first = True
        with contextlib.suppress(Exception):  # the store may have been lost with the rank
            first = self._store.add(_TOLD, 1) == 1
        if not first:
            return ""
        end = f". {self.advice}" if self.advice else ""
        return f"rank {self.lost} of {self.ranks} was lost (killed, or its machine failed){end}"

    def _look(self) -> None:
        """Wait for the next rank's farewell."""
        following, word = (self.rank + 1) % self.ranks, torch.zeros(1, dtype=torch.int64)
        try:
            dist.recv(word, src=following, group=self._watch)
        except Exception:
            self.lost = following
            with contextlib.suppress(Exception):  # whoever found out first
                found = self._store.compare_set(_LOST, "", str(following))
                self.lost = int(found)
            self._found.set()
            # the main thread, unless it hangs in a collective, ends the process first
            time.sleep(GRACE + 1)
            if told := self._told():
                print(f"gka: {told}", file=sys.stderr, flush=True)
            os._exit(1)

    def finish(self, orderly: bool = True) -> None:
        """Leave the job; after an error that other ranks do not share, not `orderly`."""
        global _job
        _job = None
        if self.ranks == 1 or not orderly:
            return
        word = torch.full((1,), _FAREWELL)
        dist.send(word, dst=(self.rank - 1) % self.ranks, group=self._watch)
        if self._watcher is not None:
            self._watcher.join()
        self.wait()
        dist.destroy_process_group()


_job: Job | None = None


def current() -> Job:
    """The job that `start` has begun, or one of this process alone."""
    return _job or Job()


def start(device: str | None = None) -> Job:
    """Begin a job with the processes that torchrun has started; of one process without torchrun.

    The process group is made with NCCL on GPUs, one for each rank of a machine, and with gloo on CPUs. A
    group that the program has made is used.

    Args:
        device: "cuda" or "cpu". None: GPUs where torch has some.

    Raises:
        InputError: a machine has fewer GPUs than processes.
    """
    global _job
    if _job is not None:
        return _job
    kind = device or device_type()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        _job = Job(device=torch.device(kind))
        return _job
    place = _device(kind)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo", device_id=place if kind == "cuda" else None
        )
    _job = _started(Job(dist.get_rank(), dist.get_world_size(), place))
    return _job


def _device(kind: str) -> torch.device:
    if kind != "cuda":
        return torch.device(kind)
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there:
        raise InputError(
            f"this machine has {there} GPUs, and process {local + 1} was started on it: start at most one "
            "process a GPU (torchrun --nproc-per-node)"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _started(job: Job) -> Job:
    """Make a job's own groups and begin to watch."""
    job.control = dist.new_group(backend="gloo", timeout=PATIENCE)
    job._watch = dist.new_group(backend="gloo", timeout=PATIENCE)
    store: Any = dist.distributed_c10d._get_default_store()
    job._store = store.clone()
    # Every connection exists before a rank can be lost.
    dist.barrier(group=job._watch)
    job.wait()
    job._watcher = threading.Thread(target=job._look, daemon=True)
    job._watcher.start()
    return job


@contextmanager
def joined(advice: str = "") -> Iterator[Job]:
    """`start()` for a block, and its end; inside another such block the same job.

    Args:
        advice: for the message about a lost rank: what to do.
    """
    outer = _job is not None
    job = start()
    former, job.advice = job.advice, advice
    orderly = False
    try:
        yield job
        orderly = True
    except Exception as error:
        orderly = getattr(error, "on_every_rank", False)
        raise
    finally:
        job.advice = former
        if not outer:
            job.finish(orderly)
