"""`torch.compile` in training: which modules are compiled, where graphs are kept, and what a run says of it.

"layers" compiles each decoder layer by itself. Layers of one kind share a graph, so the first step compiles
one graph per kind of mixer. "model" compiles the model with its loss as one graph; its first step grows with
the number of layers. "cuda-graphs" does that and records the kernels of a step as CUDA graphs, which the host
replays with one call: for models so small that the card waits for the host. Modules are compiled in place, so
names in state dicts stay.
"""

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
import torch.compiler.config
from rich.console import Console
from torch import nn
from torch._dynamo import exc
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from gka.caches import compiled_folder
from gka.errors import InputError, reason_of
from gka.models.decoder import GKADecoderLayer
from gka.models.loss import compiled_on_gpu

AUTO, LAYERS, MODEL, CUDA_GRAPHS, OFF = "auto", "layers", "model", "cuda-graphs", "off"
GRAPHS = 64
"""Most graphs per function, kinds of mixers times shapes; torch would run others uncompiled in silence."""
OLDEST = (7, 0)  # lowest compute capability that Triton supports
_FAILURES = (exc.TorchDynamoException, exc.FailOnRecompileLimitHit)
_HOME = Path(__file__).parents[1]
_OPERATORS = ("ops/*.py", "models/loss.py")  # files that define operators
_INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"


def chosen(asked: str, device: torch.device) -> str:
    """ "layers", "model", "cuda-graphs" or "off" for a value of `TrainingConfig.compile`.

    Raises:
        InputError: CUDA graphs on another device than a GPU.
    """
    if asked == CUDA_GRAPHS and device.type != "cuda":
        raise InputError(
            f"compile is {CUDA_GRAPHS!r}, which needs an NVIDIA GPU; the device is {device}"
        )
    if asked != AUTO:
        return asked
    return OFF if why_uncompiled(device) else LAYERS


def check_graphs(gradient_accumulation: int, alone: bool) -> None:
    """Refuse what CUDA graphs cannot train: each replay overwrites what the one before has left.

    Args:
        gradient_accumulation: forward passes per optimizer step.
        alone: whether a language model is trained on its own loss.

    Raises:
        InputError: gradients or another model's outputs would have to outlast a replay.
    """
    if gradient_accumulation > 1:
        raise InputError(
            f"compile is {CUDA_GRAPHS!r} and gradient_accumulation {gradient_accumulation}: a replay "
            "overwrites the gradients of the pass before. Use gradient_accumulation 1 with a larger "
            f"batch_size, or compile {LAYERS!r}"
        )
    if not alone:
        raise InputError(
            f"compile is {CUDA_GRAPHS!r}, which gka prime does not take; use {LAYERS!r}"
        )


def why_uncompiled(device: torch.device) -> str | None:
    """Why "auto" does not compile on that device; None if it does."""
    if device.type != "cuda":
        return "the device is no GPU"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.version.cuda and torch.cuda.get_device_capability(device) < OLDEST:
        return f"torch.compile has no kernels for {torch.cuda.get_device_name(device)}"
    return None


@contextmanager
def compiled(modules: Sequence[nn.Module], how: str) -> Iterator[None]:
    """Compile the modules for the duration of the block.

    Args:
        modules: models with decoder layers, or modules whose method `blocks()` returns the parts to compile.
        how: "layers", "model", "cuda-graphs" or "off".

    Raises:
        InputError: torch.compile failed in the block, a module is compiled already, or accelerate is set to
            compile.
    """
    if how == OFF:
        yield
        return
    whole = how in (MODEL, CUDA_GRAPHS)
    parts = list(modules) if whole else [part for m in modules for part in blocks_of(m)]
    options: dict[str, Any] = {"mode": "reduce-overhead"} if how == CUDA_GRAPHS else {}
    _refuse_second(parts)
    with _settings(), compiled_on_gpu():
        restore = [_compile(part, options) for part in parts]
        try:
            yield
        except _FAILURES as error:
            inner = getattr(error, "inner_exception", error)  # a backend's own error
            raise InputError(
                f"compile is {how!r}, and torch.compile failed: {reason_of(inner)}. Train with --compile "
                "off, or set TORCH_LOGS=+dynamo,graph_breaks to see where"
            ) from error
        finally:
            for undo in restore:
                undo()


def _compile(part: nn.Module, options: dict[str, Any]) -> Callable[[], None]:
    """Compile a module in place; the function that undoes it.

    Of a module whose parameters are gathered by hooks (FSDP2) only `forward` is compiled: hooks would break
    its graph.
    """
    if not isinstance(part, FSDPModule):
        part.compile(**options)
        return lambda: setattr(part, "_compiled_call_impl", None)
    former: Any = vars(part).get("forward")
    part.forward = torch.compile(part.forward, **options)

    def undo() -> None:
        if former is None:
            del part.forward
        else:
            part.forward = former

    return undo


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that "layers" compiles: decoder layers, also inside adapters, or `model.blocks()`.

    Raises:
        InputError: the model has neither.
    """
    own = getattr(model, "blocks", None)
    if inspect.ismethod(own):
        return own()
    found: list[nn.Module] = [m for m in model.modules() if isinstance(m, GKADecoderLayer)]
    if not found:
        raise InputError(
            f"compile is {LAYERS!r}, and {type(model).__name__} has no decoder layers; use {MODEL!r} or "
            f"{OFF!r}"
        )
    return found


def _refuse_second(parts: Sequence[nn.Module]) -> None:
    """Raise `InputError` if transformers, accelerate or the caller compile the model as well."""
    asked = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if asked.lower() != "no":
        raise InputError(
            f"ACCELERATE_DYNAMO_BACKEND is {asked}: accelerate (or TrainingArguments.torch_compile, which "
            "sets it) would compile the model a second time; unset it, or train with --compile off"
        )
    for part in parts:
        if part._compiled_call_impl is not None or isinstance(part, torch._dynamo.OptimizedModule):
            raise InputError(
                f"{type(part).__name__} is compiled already; pass it uncompiled, or train with --compile off"
            )


@contextmanager
def _settings() -> Iterator[None]:
    """Set torch to raise instead of falling back, and to keep all graphs on disk."""
    with ExitStack() as stack:
        enter = stack.enter_context
        dynamo: Any = torch._dynamo.config
        enter(dynamo.patch(recompile_limit=GRAPHS, fail_on_recompile_limit_hit=True))
        # Allow graphs with an autograd Function in the cache. Its traced code is part of the key; the fake
        # implementations of our operators are not, so the tag covers them.
        allowed = "autograd_cache_allow_custom_autograd_functions"
        functorch: Any = torch._functorch.config
        if hasattr(functorch, allowed):
            enter(functorch.patch(**{allowed: True}))
        compiler: Any = torch.compiler.config
        tag = f"{compiler.cache_key_tag} gka {operators_checksum()}"
        enter(compiler.patch(cache_key_tag=tag))
        enter(_kept_graphs())
        yield


@contextmanager
def _kept_graphs() -> Iterator[None]:
    """Let torch keep graphs in `graphs_folder()`, unless the environment names another folder."""
    # torch sets the variable to its default
    before, own = os.environ.get(_INDUCTOR), default_cache_dir()
    folder = graphs_folder() if before in (None, own) else None
    if folder is None:
        yield
        return
    os.environ[_INDUCTOR] = str(folder)
    try:
        yield
    finally:
        os.environ[_INDUCTOR] = own


def operators_checksum() -> str:
    """SHA-256 of the files that define operators; torch's cache keys hold an operator's name only."""
    return code_checksum(*_OPERATORS)


@functools.cache
def code_checksum(*patterns: str) -> str:
    """SHA-256 over names and contents of this package's files that match."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in _HOME.glob(pattern)):
        digest.update(path.relative_to(_HOME).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def graphs_folder() -> Path | None:
    """Folder of torch.compile's graphs and Triton kernels in `compiled_folder()`.

    None: leave it to torch, whose default is in the folder of temporary files and may not survive a restart.
    """
    folder = compiled_folder()
    if folder is None:
        return None
    folder /= "graphs"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


class FirstStep(TrainerCallback):
    """Announces compiling, then reports the first step's seconds and how many graphs came from disk."""

    def __init__(self, console: Console, how: str) -> None:
        self.console, self.how = console, how

    def on_train_begin(self, args, state, control, **kwargs):
        self._waiting = True
        what = {LAYERS: "each layer", CUDA_GRAPHS: "the whole model, as CUDA graphs,"}
        named = what.get(self.how, "the whole model")
        self._say(f"compiling {named} during the first step (--compile off: not at all)")

    def on_step_begin(self, args, state, control, **kwargs):
        if self._waiting:
            self._before, self._began = graphs(), time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if not self._waiting:
            return
        self._waiting = False
        if args.device.type == "cuda":
            torch.cuda.synchronize()  # else the clock sees only that work was queued
        seconds, now = time.perf_counter() - self._began, graphs()
        made, read = (now[key] - self._before[key] for key in ("compiled", "read"))
        noun = "graph" if made == 1 else "graphs"
        self._say(f"first step: {seconds:.1f} s; {made} {noun} compiled, {read} read from disk")

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


def graphs() -> dict[str, int]:
    """Numbers of graphs that this process "compiled" and "read" from disk; forward and backward are one."""
    from torch._dynamo.utils import counters

    counted = counters["aot_autograd"]
    read = counted["autograd_cache_hit"]
    return {"compiled": counted["total"] - read, "read": read}
