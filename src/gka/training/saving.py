"""Sharded checkpoints that are written while training goes on.

A save copies this rank's part of the state to the CPU, and training continues. A thread of every rank writes
the copies, reads back what it wrote, and rank 0 seals the checkpoint once all have. The next save and the end
of the run wait for the one before. So a checkpoint is sealed or unfinished, and an unfinished one is never
the only one.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from gka.parallel.background import BackgroundWork
from gka.parallel.job import Job
from gka.parallel.state import Staging, State, state_of, write_state
from gka.storage import storage_errors
from gka.training.checkpoints import SEAL, seal_together

ADVICE = "earlier checkpoints are kept: free space, then go on with --resume"


class BackgroundSaves:
    """The saves of a run. Every rank makes the same calls in the same order.

    Args:
        job: its ranks.
    """

    def __init__(self, job: Job) -> None:
        self._work = BackgroundWork(job)
        self._staging = Staging(pinned=job.device.type == "cuda")
        self._state: State = {}
        self._folder: Path | None = None

    def stage(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        """Copy the state, after the save before has ended.

        Raises:
            SharedError: that one failed.
        """
        self.finish()
        self._state = self._staging.copies(state_of(model, optimizer))

    def begin(self, folder: Path) -> None:
        """Start to write what was staged to the checkpoint `folder`, whose other files are there."""
        self._folder, state, self._state = folder, self._state, {}
        self._work.begin(lambda job: _write(folder, state, job))

    def check(self) -> None:
        """Take note of a save that has ended on all ranks.

        Raises:
            SharedError: it failed.
        """
        if self._work.running and self._work.has_ended():
            self.finish()

    def finish(self) -> None:
        """Wait for the save that is being written.

        Raises:
            SharedError: on every rank, if it failed on one; the message has folder, reason and rank. What was
                written of the checkpoint is deleted.
        """
        try:
            self._work.finish()
        except Exception:
            if self._work.job.is_main and self._folder is not None:
                discard_unsealed(self._folder)
            raise

    def close(self) -> None:
        """Wait for the save, whatever comes of it: the end after another error."""
        self._work.close()


def _write(folder: Path, state: State, job: Job) -> None:
    with torch.no_grad(), storage_errors(f"checkpoint {folder}", advice=ADVICE):
        write_state(folder, state, job)
    seal_together(folder, job)


def discard_unsealed(folder: Path) -> None:
    """Delete a checkpoint that was not sealed: it takes up the space that is missing."""
    if not (folder / SEAL).exists():
        shutil.rmtree(folder, ignore_errors=True)
