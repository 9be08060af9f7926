"""What a run writes while it trains: log.jsonl, a line for each log, and on request TensorBoard's events.

A line has the step and, by its kind: loss, learning_rate, grad_norm, seconds (in steps since the start),
tokens, tokens_per_second, mfu, memory_gib and skipped; or eval_loss; or health, a table for each Gated
KalmaNet layer.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments

from gka.errors import InputError
from gka.models import GKAForCausalLM
from gka.models.flops import matrix_parameters, peak_tflops, token_flops
from gka.storage import storage_errors, write_text
from gka.training.folder import EVENTS, LOG
from gka.training.guards import StepWatch
from gka.training.health import decoder_of, measure_health

_NOTED = ("loss", "eval_loss", "learning_rate", "grad_norm", "seconds", "skipped")


class Utilisation:
    """Model FLOPs of a run's tokens, against the peak of its cards.

    Args:
        model: the model that is trained; without a `GKAForCausalLM` in it nothing is known.
        length: tokens of a sequence.
        device: a rank's device. ranks: how many there are.
    """

    def __init__(self, model: torch.nn.Module, length: int, device: torch.device, ranks: int):
        found = next((m for m in model.modules() if isinstance(m, GKAForCausalLM)), None)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = peak_tflops(name)
        self.peak = None if peak is None else 1e12 * peak * ranks
        self.flops = None
        if found is not None and length:
            self.flops = token_flops(found.config, length, matrix_parameters(found)).known

    def mfu(self, tokens_per_second: float) -> float | None:
        """Share of the peak; None on a card without a data sheet here, or for another model."""
        if self.peak is None or self.flops is None:
            return None
        return self.flops * tokens_per_second / self.peak


class WriteLog(TrainerCallback):
    """Writes log.jsonl, and events for TensorBoard if `tensorboard`; only rank 0 writes.

    Args:
        folder: of the run or stage.
        tokens_per_step: of all ranks.
        use: model FLOPs and peak.
        tensorboard: whether to write events to `folder`/tensorboard.
    """

    def __init__(
        self, folder: Path, tokens_per_step: int, use: Utilisation, tensorboard: bool
    ) -> None:
        self.path, self.tokens, self.use = folder / LOG, tokens_per_step, use
        self.events = folder / EVENTS if tensorboard else None
        self.writer: Any = None
        self._writes = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._writes = state.is_world_process_zero
        noted = [row for row in state.log_history if "seconds" in row]
        self._before = (noted[-1]["step"], noted[-1]["seconds"]) if noted else (0, 0.0)
        if not self._writes:
            return
        keep_lines(self.path, state.global_step)
        if self.events is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.events), purge_step=state.global_step + 1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        row = state.log_history[-1]
        noted = {name: row[name] for name in _NOTED if name in row}
        if noted:
            self.write(state.global_step, {**noted, **self._speed(args, state, row)})

    def on_train_end(self, args, state, control, **kwargs):
        if self.writer is not None:
            self.writer.close()

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append a line; numbers, and those of nested tables, are TensorBoard's scalars."""
        if not self._writes:
            return
        line = json.dumps({"step": step, **values}, allow_nan=False)
        with storage_errors(f"log {self.path}"), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        if self.writer is not None:
            for name, value in scalars(values):
                self.writer.add_scalar(name, value, step)
            self.writer.flush()

    def _speed(
        self, args: TrainingArguments, state: TrainerState, row: dict[str, Any]
    ) -> dict[str, float]:
        """Tokens a second since the log before, MFU, and the peak of this rank's memory."""
        if "loss" not in row or "seconds" not in row:
            return {}
        (before, then), now = self._before, row["seconds"]
        self._before = (row["step"], now)
        found: dict[str, float] = {"tokens": row["step"] * self.tokens}
        if now > then:
            found["tokens_per_second"] = (row["step"] - before) * self.tokens / (now - then)
            mfu = self.use.mfu(found["tokens_per_second"])
            found |= {} if mfu is None else {"mfu": mfu}
        if args.device.type == "cuda":
            found["memory_gib"] = torch.cuda.max_memory_allocated(args.device) / 2**30
        return found


class WatchHealth(TrainerCallback):
    """Measures the Gated KalmaNet layers every `steps` steps on the first tokens of the last micro-batch.

    Every rank does, as sharded layers need all of them; rank 0 writes its own.
    """

    def __init__(self, log: WriteLog, watch: StepWatch, steps: int, tokens: int) -> None:
        self.log, self.watch, self.steps, self.tokens = log, watch, steps, tokens

    def on_step_end(self, args, state, control, **kwargs):
        ids = self.watch.inputs.get("input_ids")
        model = decoder_of(kwargs["model"])
        if state.global_step % self.steps or ids is None or model is None:
            return
        began = time.perf_counter()
        sample = ids[:1, : self.tokens].to(args.device)
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            found = measure_health(model, sample)
        rows = [{k: v if math.isfinite(v) else None for k, v in row.items()} for row in found]
        seconds = time.perf_counter() - began
        self.log.write(state.global_step, {"health": rows, "health_seconds": seconds})


def keep_lines(path: Path, step: int) -> None:
    """Drop the lines of later steps, which a resumed run takes again, and a line that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("step", 0) <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept) if step else "")


def scalars(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """Numbers by name; those of a layer's table as in "health/lambda/layer 3"."""
    found = []
    for name, value in values.items():
        if isinstance(value, list):
            for row in value:
                rest = {k: v for k, v in row.items() if k != "layer"}
                found += [(f"{name}/{k}/layer {row['layer']}", v) for k, v in rest.items()]
        elif value is not None:
            found.append((f"{prefix}{name}", value))
    return [(name, value) for name, value in found if value is not None]


def check_tensorboard() -> None:
    """Raise `InputError` unless the package that writes TensorBoard's events is installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise InputError(
            "training.tensorboard needs the package tensorboard: pip install "
            "'gated-kalmanet[tensorboard]'; or leave it out: log.jsonl has the same figures"
        ) from error
