"""Trainer callbacks: seals of checkpoints, interruptions, time, progress, a check for NaN."""

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from gka.console import answered, duration, leave_lost, stop_signals, terminals
from gka.errors import InputError
from gka.parallel import current
from gka.training.checkpoints import SEAL, seal_together
from gka.training.folder import is_main_process
from gka.training.saving import BackgroundSaves


class Stop:
    """A request to stop, recorded by a signal handler and met at the end of a step."""

    signal: int | None = None


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turn SIGINT, SIGTERM and SIGHUP into requests to stop, each acknowledged at once with a message.

    The same signal a second time has its former effect.
    """
    stop, former, shown = Stop(), {}, terminals()

    def note(number: int, _frame: Any) -> None:
        stop.signal = number
        leave_lost(shown)
        signal.signal(number, former[number])

    if threading.current_thread() is threading.main_thread():
        for number in stop_signals():
            former[number] = signal.signal(number, note)
    answer = "finishing this step, then saving; once more: stop now" if is_main_process() else ""
    try:
        with answered(former, answer):
            yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class StopWhenAsked(TrainerCallback):
    """Ends training after the step in which a stop was requested, with a checkpoint."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop

    def on_step_end(self, args, state, control, **kwargs):
        # a signal to any rank stops all of them after the same step
        self.stop.signal = current().any(self.stop.signal or 0) or None
        if self.stop.signal is not None:
            control.should_save = control.should_training_stop = True
        return control


class SealCheckpoints(TrainerCallback):
    """Seals each checkpoint, and logs the loss at its step, so that a resumed run logs the same losses.

    Args:
        saves: write and seal checkpoints in the background. None: they are written when `on_save` is called.
    """

    def __init__(self, saves: BackgroundSaves | None = None) -> None:
        self.saves = saves

    def on_step_end(self, args, state, control, **kwargs):
        if self.saves is not None:
            self.saves.check()
        if control.should_save:
            control.should_log = True
            # A checkpoint that is about to be overwritten is no longer whole.
            self._folder(args, state).joinpath(SEAL).unlink(missing_ok=True)
        return control

    def on_save(self, args, state, control, **kwargs):
        folder = self._folder(args, state)
        if self.saves is None:
            seal_together(folder, current())
        else:
            self.saves.begin(folder)

    def on_train_end(self, args, state, control, **kwargs):
        if self.saves is not None:
            self.saves.finish()

    @staticmethod
    def _folder(args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


class Stopwatch(TrainerCallback):
    """Adds "seconds", the time spent in training steps, to each logged loss; a resumed run adds to it."""

    seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.seconds = max((row.get("seconds", 0.0) for row in state.log_history), default=0.0)

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda" and control.should_log:
            torch.cuda.synchronize()  # else only the launches are timed
        self.seconds += time.perf_counter() - self._began

    def on_log(self, args, state, control, **kwargs):
        if "loss" in state.log_history[-1]:
            state.log_history[-1]["seconds"] = self.seconds


class RefuseNaN(TrainerCallback):
    """Ends a run whose loss is not finite, before a checkpoint of it is written."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "eval_loss"):
            if not math.isfinite((logs or {}).get(name, 0.0)):
                raise InputError(
                    f"{name} is {logs and logs[name]} at step {state.global_step}: the run diverged; "
                    "lower learning_rate or raise warmup_steps"
                )


class ProgressBar(TrainerCallback):
    """A progress line that moves, and a line that stays for each evaluation."""

    def __init__(self, console: Console, tokens_per_step: int) -> None:
        self.console, self.tokens_per_step = console, tokens_per_step
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._state: TrainerState | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._first, self._began, self._loss = state.global_step, time.perf_counter(), math.nan
        self._state = state if state.is_world_process_zero else None
        self.task = self.progress.add_task(
            "training", total=state.max_steps, completed=state.global_step, loss=""
        )
        if state.is_world_process_zero:
            self.progress.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self._loss = logs["loss"]
            steps = state.global_step - self._first
            rate = steps * self.tokens_per_step / (time.perf_counter() - self._began)
            self.progress.update(self.task, loss=f"loss {self._loss:.3f}  {rate:,.0f} tokens/s")
        if logs and "eval_loss" in logs and state.is_world_process_zero:
            self.progress.console.print(
                f"step {state.global_step:>6}  loss {self._loss:.3f}  "
                f"held out {logs['eval_loss']:.3f}",
                highlight=False,
            )

    def line(self) -> str:
        """The progress as text, for outputs that are no terminal; "" before training and on other ranks."""
        state = self._state
        if state is None:
            return ""
        spent, steps = time.perf_counter() - self._began, state.global_step - self._first
        said = f"step {state.global_step:>6} of {state.max_steps}"
        if not math.isnan(self._loss):
            said += f"  loss {self._loss:.3f}"
        if not steps:
            return f"{said}  after {duration(spent)}"
        left = (state.max_steps - state.global_step) * spent / steps
        return (
            f"{said}  {steps * self.tokens_per_step / spent:,.0f} tokens/s  {duration(left)} left"
        )

    def close(self) -> None:
        """Remove the moving line."""
        self.progress.stop()


class Estimate(TrainerCallback):
    """Prints, after a few steps, the expected time of the run and its memory; nothing if it is short.

    The first step is not timed: it also compiles and allocates. An evaluated block counts as a third of a
    trained one, as it has no backward pass.
    """

    SECONDS, STEPS = 2.0, 20  # timed: whichever comes first
    SHORT = 10.0  # seconds; a shorter run has no estimate

    def __init__(self, console: Console, evaluated_blocks: float) -> None:
        self.console, self.evaluated_blocks = console, evaluated_blocks

    def on_train_begin(self, args, state, control, **kwargs):
        self._first, self._said = state.global_step + 1, not state.is_world_process_zero

    def on_step_end(self, args, state, control, **kwargs):
        if self._said:
            return
        if args.device.type == "cuda":
            torch.cuda.synchronize()  # else only the launches are timed
        steps, now = state.global_step - self._first, time.perf_counter()
        if steps == 0:
            self._began = now
        elif now - self._began >= self.SECONDS or steps == self.STEPS:
            self._said = True
            self._say(args, state, (now - self._began) / steps)

    def _say(self, args: TrainingArguments, state: TrainerState, seconds: float) -> None:
        left, every = state.max_steps - state.global_step, int(args.eval_steps or state.max_steps)
        evaluations = state.max_steps // every - state.global_step // every
        trained = args.per_device_train_batch_size * args.gradient_accumulation_steps
        total = seconds * (left + evaluations * self.evaluated_blocks / trained / 3)
        if total < self.SHORT:
            return
        self.console.print(
            f"about {duration(total)}: {left:,} more steps of {seconds:.2g} s, {evaluations} evaluations; "
            f"{memory(args.device)}; Ctrl-C saves and stops",
            highlight=False,
            soft_wrap=True,
        )


def memory(device: torch.device) -> str:
    """Peak memory of this process so far, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_reserved(device) / 2**30:.1f} GiB of GPU memory"
    try:
        import resource
    except ImportError:  # Windows
        return "memory unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{used / 2**30:.1f} GiB of memory"
