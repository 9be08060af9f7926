"""A run of `gka.training.train` on this job's ranks, which may lose a rank or get a signal at a step.

Arguments: the file for the curves, the run's tables (JSON), its folder, and of what happens (JSON): "step",
or "writing" for when the tensors of that step's checkpoint are written, "rank", and "signal", without which
that rank's disk is full, and "delay", the seconds after the step's begin, if not at once; whether to resume;
and the dtype of everything, float64 if there is none.
"""

import errno
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console

from gka.errors import InputError
from gka.parallel import current
from gka.training import Interrupted, RunConfig, train
from gka.training.mesh_trainer import MeshTrainer
from gka.training.trainer import DecoderTrainer


def send(event: dict[str, Any]) -> None:
    """Send this process the signal, now or after the delay, in the midst of whatever it does then."""
    if event.get("delay"):
        late = threading.Timer(event["delay"], os.kill, (os.getpid(), event["signal"]))
        late.daemon = True
        late.start()
    else:
        os.kill(os.getpid(), event["signal"])


def disturb(event: dict[str, Any]) -> None:
    """Send this process the signal, or let its disk be full, when the run comes to the step."""
    if "writing" in event:
        disturb_writing(event)
        return
    for kind in (DecoderTrainer, MeshTrainer):
        usual: Any = kind.get_batch_samples

        def at_step(self: Any, *arguments: Any, usual: Any = usual) -> Any:
            if (self.state.global_step, current().rank) == (event["step"], event["rank"]):
                send(event)
            return usual(self, *arguments)

        kind.get_batch_samples = at_step  # pyright: ignore[reportAttributeAccessIssue]


def disturb_writing(event: dict[str, Any]) -> None:
    usual = dcp.FileSystemWriter.write_data

    def writing(self: Any, *arguments: Any) -> Any:
        step = Path(self.path).name.removeprefix("checkpoint-")
        if (int(step), int(os.environ["RANK"])) == (event["writing"], event["rank"]):
            if "signal" not in event:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.kill(os.getpid(), event["signal"])
        return usual(self, *arguments)

    dcp.FileSystemWriter.write_data = writing  # pyright: ignore[reportAttributeAccessIssue]


def main() -> int:
    found, tables, output, event, resume, *dtype = sys.argv[1:]
    torch.set_default_dtype(getattr(torch, dtype[0] if dtype else "float64"))
    if event != "null":
        disturb(json.loads(event))
    config = RunConfig.from_tables(json.loads(tables))
    try:
        metrics = train(
            config, Path(output), console=Console(quiet=True), resume=resume == "resume"
        )
    except InputError as error:
        print(f"told: {error}", flush=True)
        os._exit(2)
    except Interrupted as stop:
        print(f"stopped after {stop.step} by {stop.signal}", flush=True)
        return 3
    if os.environ["RANK"] == "0":
        Path(found).write_text(json.dumps(metrics))
    return 0


if __name__ == "__main__":
    sys.exit(main())
