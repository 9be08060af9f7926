"""Starts one process a GPU for all cells of a number of GPUs, and ends them if they hang or lose a rank."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.scale.cells import Cell
from benchmarks.scale.files import Folder

from gka.storage import write_json

PATIENCE = 30.0  # seconds between a rank's lack of memory and the end of those that wait for it
AFTER_LOSS = 15.0  # seconds that ranks have to end after the first one
CHECK_SECONDS = 100.0  # for the check, so that the cells get the rest
OPEN = 0.2
SPENT = "the time was spent"
Found = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Launch:
    """What all launches share.

    Attributes:
        folder: of the processes' files. device: "cuda" or "cpu".
        until: when everything must be done, by `time.time()`. cell_seconds: when a cell is taken to hang.
        check: types of products with which losses are checked.
        found: gets each cell's key and figures.
    """

    folder: Path
    device: str
    tiny: bool
    until: float
    cell_seconds: float
    check: tuple[str, ...]
    found: Found
    say: Callable[[str], None]

    def run(self, gpus: int, cells: list[Cell], check: bool, limit: float) -> None:
        """Measure these cells on that many GPUs, in `limit` seconds.

        After a cell that hung or lost a rank, the others are started anew.
        """
        begun, left = time.time(), list(cells)
        while left or check:
            end = min(begun + limit, self.until)
            if time.time() >= end:
                break
            taken, broken = self._once(gpus, left, check, end)
            check = check and f"check/{gpus}" not in taken
            left = [again for cell in left if (again := _again(cell, taken)) is not None]
            if broken is None:
                break
        for key in [f"check/{gpus}"] * check + [cell.key for cell in left]:
            self.found(key, {"status": "not measured", "message": SPENT})

    def _once(
        self, gpus: int, cells: list[Cell], check: bool, end: float
    ) -> tuple[dict[str, dict[str, Any]], str | None]:
        """One start of the processes: what was found, and why they were ended, if they were."""
        self.folder.mkdir(parents=True, exist_ok=True)
        folder, taken = Folder(self.folder), {}
        folder.clear()
        spec = self.folder / f"asked-{gpus}.json"
        write_json(spec, {
            "folder": str(self.folder), "device": self.device, "tiny": self.tiny, "until": end,
            "check": list(self.check) if check else [], "cells": [asdict(cell) for cell in cells],
        })  # fmt: skip
        processes = started(gpus, spec)
        why = None
        try:
            while why is None and any(process.poll() is None for process in processes):
                time.sleep(OPEN)
                self._take(folder, taken)
                why = self._why_end(folder, processes, end)
        finally:
            ended(processes)
        self._take(folder, taken)
        failed = [process.returncode for process in processes if process.returncode]
        if why is None and failed:
            why = f"a process ended with {failed[0]}"
        asked = [f"check/{gpus}"] * check + [cell.key for cell in cells]
        return taken, self._broken(folder, taken, why, asked)

    def _take(self, folder: Folder, taken: dict[str, dict[str, Any]]) -> None:
        for key, found in folder.take().items():
            taken[key] = found
            self.found(key, found)

    def _why_end(self, folder: Folder, processes: list[Any], end: float) -> str | None:
        """Why the processes must be ended, or None."""
        now, begun, memory = time.time(), folder.begun(), folder.memory()
        if now > end + OPEN:
            return SPENT
        if memory is not None and now > memory["time"] + PATIENCE:
            return memory["message"]
        limit = self.cell_seconds
        if begun is not None and begun[0].startswith("check/"):
            limit = min(limit, CHECK_SECONDS)
        if begun is not None and now > begun[1] + limit:
            tell_stacks(processes)
            return f"not done after {limit:.0f} s"
        if any(process.poll() for process in processes):
            deadline = time.time() + AFTER_LOSS
            while time.time() < deadline and any(p.poll() is None for p in processes):
                time.sleep(OPEN)
            return f"a process ended with {next(p.returncode for p in processes if p.poll())}"
        return None

    def _broken(
        self, folder: Folder, taken: dict[str, dict[str, Any]], why: str | None, asked: list[str]
    ) -> str | None:
        """Record the cell that was being measured as failed, or all if none was reached; `why`."""
        if why is None or why == SPENT:
            return why
        begun, memory = folder.begun(), folder.memory()
        way = memory["way"] if memory else None
        for key in [begun[0]] if begun else asked:
            if key not in taken:
                taken[key] = {"status": "failed", "message": why, "out_of_memory": way}
                self.found(key, taken[key])
        return why


def _again(cell: Cell, taken: dict[str, dict[str, Any]]) -> Cell | None:
    """The cell if it is not measured yet, or with more checkpointing after one rank had no memory."""
    if cell.key not in taken:
        return cell
    way = taken[cell.key].get("out_of_memory")
    more = cell.ways[cell.ways.index(way) + 1 :] if way in cell.ways else ()
    return replace(cell, ways=more) if more else None


def started(gpus: int, spec: Path) -> list[subprocess.Popen]:
    """One process a GPU, with torchrun's environment."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    words = [sys.executable, "-m", "benchmarks.run", "scale", "--worker", str(spec)]
    shared = {
        "WORLD_SIZE": gpus,
        "LOCAL_WORLD_SIZE": gpus,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    threads = max(1, (os.cpu_count() or 1) // gpus)
    found = []
    for rank in range(gpus):
        own = {name: str(x) for name, x in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        env = {"OMP_NUM_THREADS": str(min(threads, 8)), **os.environ, **own}
        found.append(subprocess.Popen(words, env=env, start_new_session=True))
    return found


def tell_stacks(processes: list[subprocess.Popen]) -> None:
    """Let processes that hang say where."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGUSR1)
    time.sleep(5 * OPEN)


def ended(processes: list[subprocess.Popen]) -> None:
    """End what still runs, with what it started."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def available(device: str) -> tuple[int, str, int]:
    """GPUs of this host, their name and bytes; another process asks, as asking takes memory of them."""
    if device != "cuda":
        return 0, "CPU", 0
    code = (
        "import json, torch; n = torch.cuda.device_count(); "
        "print(json.dumps([n, torch.cuda.get_device_name() if n else '', "
        "torch.cuda.get_device_properties(0).total_memory if n else 0]))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    number, name, memory = json.loads(told.stdout.splitlines()[-1])
    return number, name, memory
