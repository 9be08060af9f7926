"""Guards of a run: a step whose loss jumps or whose gradient is not finite does not change the weights.

Such a step is skipped: its gradients are dropped before the optimizer sees them, so that neither weights
nor moments change. It counts as a step all the same, so the learning rate, the order of the data and the
number of steps stay those of an undisturbed run.
"""

import math
import statistics
from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from gka.errors import InputError

WINDOW = 64
"""Losses of accepted steps, with whose median and spread a new loss is compared."""
FEWEST = 32
"""Accepted steps before which no loss counts as a spike."""
LEAST_SPREAD = 0.01
"""Lower bound of the spread, relative to the median: a flat curve has no spikes of a thousandth."""
COUNTED = 100
"""Last steps among which skipped ones are counted for `max_skipped`."""
_SIGMA = 1.4826  # standard deviations of a normal distribution in one median absolute deviation


class Guard:
    """What is known of a run's steps, and the verdict on each. Without torch's state, so any loop can use it.

    Args:
        threshold: spreads above the median from which a loss is a spike; 0: none is.
        most: skipped steps among the last `COUNTED` after which the run ends.
    """

    def __init__(self, threshold: float, most: int) -> None:
        self.threshold, self.most = threshold, most
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.skipped: list[int] = []

    def judge(self, step: int, loss: float, norm: float) -> str | None:
        """Why step `step` is to be skipped; None if it is accepted.

        Args:
            step: its number, from 1.
            loss: its mean loss. norm: the 2-norm of its gradient, before clipping.

        Raises:
            InputError: too many of the last steps were skipped.
        """
        reason = self._reason(loss, norm)
        if reason is None:
            self.losses.append(loss)
            return None
        self.skipped.append(step)
        recent = sum(step - number < COUNTED for number in self.skipped)
        if recent > self.most:
            raise InputError(
                f"step {step}: {reason}; {recent} of the last {min(step, COUNTED)} steps were skipped, more "
                f"than training.max_skipped = {self.most}: the run diverged; lower learning_rate or raise "
                "warmup_steps, or raise spike_threshold if the data changed and the losses are right. "
                "Checkpoints are kept"
            )
        return reason

    def _reason(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient's norm is {norm}"
        if not self.threshold or len(self.losses) < FEWEST:
            return None
        middle = statistics.median(self.losses)
        spread = _SIGMA * statistics.median(abs(x - middle) for x in self.losses)
        limit = middle + self.threshold * max(spread, LEAST_SPREAD * abs(middle))
        if loss <= limit:
            return None
        last = f"median of the last {len(self.losses)}: {middle:.4g}"
        return f"the loss is {loss:.4g}, above {limit:.4g} ({last})"

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON values."""
        return {"losses": list(self.losses), "skipped": list(self.skipped)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.losses = deque(map(float, state["losses"]), maxlen=WINDOW)
        self.skipped = [int(step) for step in state["skipped"]]


class StepWatch:
    """The current step's loss and gradient norm, which the Trainer notes and callbacks read.

    Attributes:
        norm: the gradient's norm before clipping, if the Trainer has computed it.
        inputs: the last micro-batch.
    """

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.finite: Tensor | None = None
        self.norm: Any = None
        self.inputs: dict[str, Any] = {}

    def add(self, loss: Tensor) -> Tensor:
        """Note a micro-batch's loss; returns it, or the last finite one if it is not finite.

        The logged mean is thus of finite losses; the step itself is skipped and reported. Nothing waits for
        the device.
        """
        self.loss = loss if self.loss is None else self.loss + loss
        before = torch.zeros_like(loss) if self.finite is None else self.finite
        self.finite = torch.where(loss.isfinite(), loss, before)
        return self.finite

    def take(self, parameters: list[Tensor]) -> tuple[float, float]:
        """Loss and norm of the step, the mean over all ranks; the next step begins. Waits for the device."""
        loss, norm = self.loss, self.norm
        self.loss = self.norm = None
        gradients = [p.grad for p in parameters if p.grad is not None]
        if norm is None:
            norm = torch.nn.utils.get_total_norm(gradients)
        norm = torch.as_tensor(getattr(norm, "full_tensor", lambda: norm)())
        assert loss is not None
        both = torch.stack([loss.double(), norm.to(loss.device).double()])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(both)  # so that every rank comes to the same verdict
            both /= dist.get_world_size()
        values = both.tolist()
        return values[0], values[1]


class SkipBadSteps(TrainerCallback, ExportableState):
    """Drops the gradients of steps that `guard` rejects, counts and reports them, and ends a diverged run.

    After a skipped step no checkpoint is written until a step is accepted: the weights themselves may be
    what is wrong.
    """

    def __init__(self, guard: Guard, watch: StepWatch, console: Console) -> None:
        self.guard, self.watch, self.console = guard, watch, console
        self._owed = False  # a checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        kept: Any = state.stateful_callbacks or {}
        found = kept.get(type(self).__name__, {}).get("attributes")
        if state.global_step and found:
            self.guard.load(found["guard"])
            if found["finite"] is not None:
                self.watch.finite = torch.tensor(found["finite"], device=args.device)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        groups = kwargs["optimizer"].param_groups
        parameters = [p for group in groups for p in group["params"]]
        step = state.global_step + 1
        reason = self.guard.judge(step, *self.watch.take(parameters))
        if reason is None:
            return
        for parameter in parameters:
            parameter.grad = None
        if state.is_world_process_zero:
            count = len(self.guard.skipped)
            text = f"step {step} skipped: {reason} ({count} so far)"
            self.console.print(text, highlight=False, soft_wrap=True)

    def on_step_end(self, args, state, control, **kwargs):
        wanted, self._owed = control.should_save or self._owed, False
        rejected = state.global_step in self.guard.skipped[-1:]
        if wanted and rejected and state.global_step < state.max_steps:
            control.should_save, self._owed = False, True
        elif wanted:
            control.should_save = True
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        row = state.log_history[-1]
        if "loss" not in row:
            return
        row["skipped"] = len(self.guard.skipped)
        if not math.isfinite(row.get("grad_norm", 0.0)):
            row.pop("grad_norm")  # of a skipped step; JSON has no NaN

    def state(self) -> dict[str, Any]:
        """For the Trainer's checkpoints."""
        finite = None if self.watch.finite is None else float(self.watch.finite)
        return {"args": {}, "attributes": {"guard": self.guard.state(), "finite": finite}}
