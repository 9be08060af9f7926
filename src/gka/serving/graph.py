"""Decode steps as a CUDA graph: one launch per step instead of one per kernel.

At one token per sequence, the kernels of recurrent layers take much less time than the host needs to launch
them. Their states have a constant size and are updated in place, so a step can be recorded once and replayed.
"""

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gka.errors import InputError
from gka.layers import GatedKalmaNet
from gka.layers.recurrent_mixer import RecurrentMixer
from gka.models import GKACache, GKAForCausalLM
from gka.models.fields import has_experts
from gka.ops import available_backends, why_unavailable
from gka.serving.tokens import prefill

KERNELS = ("hopper", "triton")
# Settings of a mixer that a recording fixes and that users can change (`set_solver`).
_CONSTANTS = ("backend", "solver", "num_iter", "ridge_ratio", "scale")
_recording = threading.Lock()  # a stream takes one recording at a time


class CaptureError(RuntimeError):
    """A step could not be recorded; the states are unchanged."""


def check_choice(cuda_graph: bool | None) -> None:
    """Raise `InputError` unless it is True, False or None."""
    if cuda_graph not in (None, True, False):
        raise InputError(f"cuda_graph is {cuda_graph!r}; expected True, False or None")


def why_not_graphed(model: GKAForCausalLM) -> str | None:
    """Why the decode steps of `model` cannot be a CUDA graph; None if they can."""
    device = model.device
    if device.type != "cuda":
        return f"the model is on {device}, and CUDA graphs need an NVIDIA GPU."
    if any(x.device != device for x in model.parameters()):
        return "the model's weights lie on several devices."
    if torch.is_autocast_enabled(device.type):
        return "torch.autocast is on, and its copies of the weights are temporary: cast the model instead."
    if os.environ.get("GKA_DEBUG") == "1":
        return "GKA_DEBUG=1 checks values in every call, which a recorded step cannot do: unset it."
    return _why_not_layers(model) or _why_called(model)


def _why_not_layers(model: GKAForCausalLM) -> str | None:
    layer: Any
    asked = set()
    for index, layer in enumerate(model.model.layers):
        mixer = layer.mixer
        if not isinstance(mixer, RecurrentMixer):
            return (
                f"layer {index} is a {type(mixer).__name__}, whose keys and values grow with every "
                "token: a graph needs states of constant size."
            )
        if has_experts(model.config, index):
            return f"layer {index} has experts, and the host must read which ones a token takes."
        if isinstance(mixer, GatedKalmaNet):
            dims, dtype = (mixer.head_dim, mixer.head_v_dim), mixer.q_proj.weight.dtype
            call = (mixer.backend, mixer.solver, dims, dtype)
            reason = None if call in asked else _why_not_kernels(*call, model.device)
            if reason is not None:
                return f"layer {index}: {reason}"
            asked.add(call)
    return None


def _why_not_kernels(
    backend: str, solver: Any, dims: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why a layer's step is not run by kernels, in words, or None. Other forms may wait for the device."""
    found = available_backends(device, dtype, solver, dims, mode="step")
    name = found[0] if backend == "auto" else backend
    if name in KERNELS:
        return why_unavailable(name, device, dtype, solver, dims, mode="step")
    return (
        f"its step would run on backend {name!r}, which has no kernel that updates states in place."
    )


def _why_called(model: nn.Module) -> str | None:
    """Why a replay would skip Python code that must run: hooks of a module, or a replaced `forward`."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name or 'the model'} has hooks or was replaced, so every step must call it."
    return None


def _current(device: torch.device) -> int:
    """Handle of the current stream, which launches the steps."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@functools.cache
def _side_stream(device: torch.device, current: int) -> torch.cuda.Stream:
    """The stream of first runs and recordings, so that data that libraries keep for a stream exists before.

    There is one per current stream: graphs that run at the same time must not share cuBLAS' workspace.
    """
    return torch.cuda.Stream(device)


def run_aside(call: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Run `call` on the recording stream, ordered with the current stream."""
    side, current = _side_stream(device, _current(device)), torch.cuda.current_stream(device)
    with _recording:
        side.wait_stream(current)
        with torch.cuda.stream(side):
            result = call()
        current.wait_stream(side)
    return result.clone()  # memory that belongs to the current stream


def record(call: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Record the launches of `call` without running them: (function that runs them, their result).

    Raises:
        CaptureError: `call` does something that cannot be recorded, such as waiting for the device.
    """
    graph, side = torch.cuda.CUDAGraph(), _side_stream(device, _current(device))
    try:
        # `stream` is restored even if the recording fails; other threads may use the device meanwhile.
        with (
            _recording,
            torch.cuda.stream(side),
            torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"),
        ):
            result = call()
    except RuntimeError as error:
        # The cause: `error` itself may only say that the recording is invalid.
        first = error.__context__ or error
        reason = (str(first).strip() or type(first).__name__).splitlines()[0]
        raise CaptureError(
            f"the decode step cannot be recorded as a CUDA graph: {reason} "
            "Open the session with cuda_graph=False to decode without."
        ) from error
    return graph.replay, result


def _held(cache: GKACache) -> list[dict[int, Tensor | None]]:
    """The dictionaries of states of a cache of recurrent layers."""
    layers: list[Any] = list(cache.layers)
    return [held for layer in layers for held in (layer.conv_states, layer.recurrent_states)]


def _places(held: list[dict[int, Tensor | None]]) -> list[int | None]:
    return [None if x is None else x.data_ptr() for states in held for x in states.values()]


class _Step:
    """A recorded step on the states of one cache, with its own input tensors.

    It is valid while `holds`: all that it reads has the same addresses, settings and stream.
    """

    def __init__(self, model: GKAForCausalLM, cache: GKACache, tokens: Tensor, mask: Tensor | None):
        self.cache, self.device = cache, model.device
        self.weights = [*model.parameters(), *model.buffers()]
        self.mixers = [x for x in model.modules() if isinstance(x, RecurrentMixer)]
        with torch.inference_mode(False):  # so that they can be written outside inference mode
            self.tokens = tokens.clone()
            self.mask = None if mask is None else mask.clone()
        self.seen = self._seen()
        self.replay, self.logits = self._record(model)

    def _record(self, model: GKAForCausalLM) -> tuple[Callable[[], None], Tensor]:
        """Record a step; undo what the host changed meanwhile, such as the number of tokens."""
        cache, tokens = self.cache, self.cache.get_seq_length()
        before = [dict(states) for states in _held(cache)]
        try:
            recorded = record(
                lambda: prefill(model, self.tokens, cache, attention_mask=self.mask), self.device
            )
            moved = self._seen() != self.seen
        finally:
            cache.advance(tokens - cache.get_seq_length())
            for states, old in zip(_held(cache), before, strict=True):
                states.update(old)
        if moved:
            raise CaptureError(
                "the decode step cannot be recorded as a CUDA graph: it moves the states to other memory. "
                "Open the session with cuda_graph=False to decode without."
            )
        return recorded

    def _seen(self) -> list[Any]:
        places = _places(_held(self.cache)) + [x.data_ptr() for x in self.weights]
        places.append(_current(self.device))
        return [*places, *(getattr(x, name, None) for x in self.mixers for name in _CONSTANTS)]

    def holds(self, cache: GKACache, tokens: Tensor) -> bool:
        """Whether a replay is equivalent to a call on `cache`."""
        return (
            cache is self.cache and tokens.shape == self.tokens.shape and self._seen() == self.seen
        )

    def run(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Run one step; the logits [B,vocab_size] are a copy, which the next step does not overwrite."""
        self.tokens.copy_(tokens)
        if self.mask is not None and mask is not None:
            self.mask.copy_(mask)
        self.replay()
        self.cache.advance(1)
        return self.logits.clone()


class GraphedSteps:
    """Decode steps of one session: the first runs plainly, the second is recorded, others are replayed.

    So no token is read twice, and compilation and allocation of a first use precede the recording. Steps
    with a mask (some rows have ended) have their own recording. Moved states or weights need a new one.

    Args:
        model: a model for which `why_not_graphed` is None.
    """

    def __init__(self, model: GKAForCausalLM):
        self.model = model
        self._steps: dict[bool, _Step | None] = {}  # with a mask or not; None: to be recorded next

    def forget(self) -> None:
        """Release the recordings and their memory."""
        self._steps.clear()

    def check_weights(self) -> None:
        """Forget the recordings if a parameter or buffer was replaced by another tensor."""
        now = [*self.model.parameters(), *self.model.buffers()]
        for step in self._steps.values():
            if step is not None and [*map(id, step.weights)] != [*map(id, now)]:
                self.forget()
                return

    def run(self, tokens: Tensor, mask: Tensor | None, cache: GKACache) -> Tensor:
        """Read one token per row, [B,1] with mask [B,1] or None, into `cache`, which is not empty.

        Returns:
            The logits after it [B,vocab_size].

        Raises:
            CaptureError: the step cannot be recorded; nothing was read.
        """
        masked = mask is not None
        step = self._steps.get(masked)
        if step is not None and not step.holds(cache, tokens):
            self.forget()
            step = None
        if step is None and masked not in self._steps:
            logits = run_aside(
                lambda: prefill(self.model, tokens, cache, attention_mask=mask), self.model.device
            )
            self._steps[masked] = None
            return logits
        if step is None:
            step = self._steps[masked] = _Step(self.model, cache, tokens, mask)
        return step.run(tokens, mask)
