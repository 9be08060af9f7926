"""Starts of one run of `gka.training.train`, which is killed again and again and resumed each time.

Arguments: a file of what to do (JSON): "tables", "output", "dtype" and "starts", each with "ranks" and
"event" (see a_run.py; null for none); and a file for what each start ended with. Processes are forked, so
that torch is imported once for all of them.
"""

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import a_run
import torch

FORK = multiprocessing.get_context("fork")
PATIENCE = 300.0  # seconds for one start


def rank_of(rank: int, ranks: int, port: int, said: Path, arguments: list[str]) -> None:
    """Be one rank of a start; what it says goes to the file."""
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    sys.argv[1:] = arguments
    sys.exit(a_run.main())


def start(ranks: int, folder: Path, arguments: list[str]) -> tuple[list[int | None], list[str]]:
    """Exit status and output of each rank of a start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [folder / f"said-{rank}.txt" for rank in range(ranks)]
    processes = [
        FORK.Process(target=rank_of, args=(rank, ranks, port, files[rank], arguments))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes], [file.read_text() for file in files]


def sealed(output: Path) -> int:
    """The step of the last whole checkpoint."""
    steps = (path.parent.name for path in output.glob("checkpoints/checkpoint-*/complete.json"))
    return max((int(name.removeprefix("checkpoint-")) for name in steps), default=0)


def main() -> None:
    asked, found = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    output, results = Path(asked["output"]), found.with_suffix(".metrics.json")
    told: list[dict[str, Any]] = []
    for number, one in enumerate(asked["starts"]):
        how = "resume" if number else "new"
        arguments = [
            str(results),
            json.dumps(asked["tables"]),
            str(output),
            json.dumps(one["event"]),
        ]
        began = sealed(output)
        codes, said = start(one["ranks"], found.parent, [*arguments, how, asked["dtype"]])
        told.append({"codes": codes, "said": said, "from": began, "sealed": sealed(output)})
    found.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
