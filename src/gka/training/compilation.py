"""`torch.compile` in training: what is compiled, what later processes read, and what is said about it.

"layers" compiles each decoder layer by itself. Layers of one kind share a graph, so the first step waits for
one graph a kind of mixer. "model" compiles the model with its loss as one graph: fewer kernels, and a first
step that grows with the number of layers. Modules are compiled in place: names in state dicts stay.
"""

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
import torch.compiler.config
from rich.console import Console
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from transformers import TrainerCallback

import gka
from gka.caches import compiled_folder
from gka.errors import InputError, reason_of
from gka.models.decoder import GKADecoderLayer

AUTO, LAYERS, MODEL, OFF = "auto", "layers", "model", "off"
GRAPHS = 64
"""Graphs of one layer's code at most: kinds of mixers times shapes. More is an error, as it is a mistake."""
OLDEST = (7, 0)  # capability of the first chip that torch.compile has kernels for
_FAILURES = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)
_OPERATORS = ("ops/*.py", "models/loss.py")  # where they are declared
_INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"


def chosen(asked: str, device: torch.device) -> str:
    """ "layers", "model" or "off" for a value of `TrainingConfig.compile`."""
    if asked != AUTO:
        return asked
    return OFF if why_uncompiled(device) else LAYERS


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
    """Inside, the modules run compiled; afterwards they are as before.

    Args:
        modules: models, or others with a method `blocks()` that names their parts.
        how: "layers", "model" or "off".

    Raises:
        InputError: torch.compile failed in the block, or a module is compiled already.
    """
    if how == OFF:
        yield
        return
    parts = list(modules) if how == MODEL else [part for m in modules for part in blocks_of(m)]
    _refuse_second(parts)
    with _settings():
        for part in parts:
            part.compile()
        try:
            yield
        except _FAILURES as error:
            inner = getattr(error, "inner_exception", error)  # a backend's own error
            raise InputError(
                f"compile is {how!r}, and torch.compile failed: {reason_of(inner)}. Train with --compile "
                "off, or set TORCH_LOGS=+dynamo,graph_breaks to see where"
            ) from error
        finally:
            for part in parts:
                part._compiled_call_impl = None


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What "layers" compiles of a model: its decoder layers, also inside adapters, or its own `blocks()`.

    Raises:
        InputError: there is none.
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
    """Raise `InputError` where something else compiles too: transformers, accelerate, or the caller."""
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
    """torch's settings of a compiled run: nothing falls back in silence, and all graphs are kept on disk."""
    with ExitStack() as stack:
        enter = stack.enter_context
        dynamo: Any = torch._dynamo.config
        enter(dynamo.patch(recompile_limit=GRAPHS, fail_on_recompile_limit_hit=True))
        # Keeps graphs with autograd Functions, as the ops are. Their traced code is in the key; what our
        # operators' results look like is not.
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
    before, own = os.environ.get(_INDUCTOR), default_cache_dir()  # torch writes its own there, too
    folder = graphs_folder() if before in (None, own) else None
    if folder is None:
        yield
        return
    os.environ[_INDUCTOR] = str(folder)
    try:
        yield
    finally:
        os.environ[_INDUCTOR] = own


@functools.cache
def operators_checksum() -> str:
    """SHA-256 over the files with this library's operators, which torch's keys see by name only."""
    home, digest = Path(gka.__file__).parent, hashlib.sha256()
    for path in sorted(path for pattern in _OPERATORS for path in home.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def graphs_folder() -> Path | None:
    """Where torch.compile keeps graphs and Triton kernels: inside `compiled_folder()`; None: torch's own.

    torch's own is a folder for temporary files, which does not outlive the machine.
    """
    folder = compiled_folder()
    if folder is None:
        return None
    folder /= "graphs"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


class FirstStep(TrainerCallback):
    """Says that the first step compiles, then how long it took and what it had from disk."""

    def __init__(self, console: Console, how: str) -> None:
        self.console, self.how = console, how

    def on_train_begin(self, args, state, control, **kwargs):
        self._waiting = True
        what = "each layer" if self.how == LAYERS else "the whole model"
        self._say(f"compiling {what} during the first step (--compile off: not at all)")

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
        self._say(f"first step: {seconds:.1f} s; {made} graphs compiled, {read} read from disk")

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


def graphs() -> dict[str, int]:
    """Graphs of this process that were "compiled", and those "read" from disk, forward with backward."""
    from torch._dynamo.utils import counters

    counted = counters["aot_autograd"]
    read = counted["autograd_cache_hit"]
    return {"compiled": counted["total"] - read, "read": read}
