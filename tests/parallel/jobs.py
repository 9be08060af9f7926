"""Processes of a test that exchange over gloo, and what each of them is to run."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


def run_ranks(program: str, ranks: int, *arguments: str, timeout: float = 300) -> Any:
    """Run a file of this folder in several processes; the JSON that rank 0 writes to the path it gets first.

    Raises:
        AssertionError: a rank failed, with what it said.
    """
    codes, said = end_ranks(program, ranks, *arguments, timeout=timeout)
    failed = [rank for rank, code in enumerate(codes) if code]
    assert not failed, f"ranks {failed} failed:\n" + said[failed[0]]
    return json.loads(Path(arguments[0]).read_text())


def end_ranks(
    program: str, ranks: int, *arguments: str, timeout: float = 300
) -> tuple[list[int], list[str]]:
    """Exit status and output of each of several processes that run a file of this folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        env = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)]),
        }  # fmt: skip
        command = [sys.executable, str(TESTS / "parallel" / program), *arguments]
        processes.append(
            subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    said = [process.communicate(timeout=timeout)[0] for process in processes]
    return [process.returncode for process in processes], said
