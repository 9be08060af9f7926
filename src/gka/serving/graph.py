"""Decode steps as a CUDA graph: launched whole, where Python would launch kernel after kernel.

At one token a sequence a model of recurrent layers keeps the device busy for a small part of the time that
its host needs to launch the work. Its states have a constant size and are updated where they lie, so all
launches of one step can be recorded once and repeated.
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
# what of a mixer a recorded step has as constants, and users may set (`set_solver`)
_CONSTANTS = ("backend", "solver", "num_iter", "ridge_ratio", "scale")
_recording = threading.Lock()  # the stream of a device takes one recording at a time


class CaptureError(RuntimeError):
    """A step could not be recorded; the states are as they were."""


def check_choice(cuda_graph: bool | None) -> None:
    """Raise `InputError` unless it is True, False or None."""
    if cuda_graph not in (None, True, False):
        raise InputError(f"cuda_graph is {cuda_graph!r}; expected True, False or None")


def why_not_graphed(model: GKAForCausalLM) -> str | None:
    """Why the decode steps of `model` cannot be a CUDA graph; None if they can."""
    device = model.device
    if device.type != "cuda":
        return f"the model is on {device}, and CUDA graphs are of NVIDIA GPUs."
    if any(x.device != device for x in model.parameters()):
        return "the model's weights lie on several devices."
    if torch.is_autocast_enabled(device.type):
        return (
            "torch.autocast is on, whose copies of the weights do not last: cast the model instead."
        )
    if os.environ.get("GKA_DEBUG") == "1":
        return (
            "GKA_DEBUG=1 reads values of every call, and a graph is not read while it is recorded."
        )
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
            return f"layer {index} has experts, and the host must know which ones a token takes."
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
    """The plain forms of a step may wait for the device; the kernels never do."""
    found = available_backends(device, dtype, solver, dims, mode="step")
    name = found[0] if backend == "auto" else backend
    if name in KERNELS:
        return why_unavailable(name, device, dtype, solver, dims, mode="step")
    return f"its step would run by backend {name!r}, which is no kernel for states in place."


def _why_called(model: nn.Module) -> str | None:
    """Modules must be called at every step where someone listens to one or replaced it."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name or 'the model'} has hooks or was replaced, and is called for their sake."
    return None


def _current(device: torch.device) -> int:
    """The stream that steps are launched on."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@functools.cache
def _side_stream(device: torch.device, current: int) -> torch.cuda.Stream:
    """Steps are tried out and recorded here, so that what a library keeps for a stream is there before.

    One for each stream that steps are launched on: recordings that may run at the same time then share
    nothing, such as cuBLAS' scratch.
    """
    return torch.cuda.Stream(device)


def run_aside(call: Callable[[], Tensor], device: torch.device) -> Tensor:
    """`call` on the stream that recordings use, in order with the current one."""
    side, current = _side_stream(device, _current(device)), torch.cuda.current_stream(device)
    with _recording:
        side.wait_stream(current)
        with torch.cuda.stream(side):
            result = call()
        current.wait_stream(side)
    return result.clone()  # in memory of the current stream


def record(call: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """The launches of `call`, not run: what runs them, and where they leave the result.

    Raises:
        CaptureError: `call` does what cannot be recorded, such as waiting for the device.
    """
    graph, side = torch.cuda.CUDAGraph(), _side_stream(device, _current(device))
    try:
        # `stream` is left however the recording ends; other threads may use the device meanwhile
        with (
            _recording,
            torch.cuda.stream(side),
            torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"),
        ):
            result = call()
    except RuntimeError as error:
        # what went wrong; `error` itself may only say that the recording is void
        first = error.__context__ or error
        reason = (str(first).strip() or type(first).__name__).splitlines()[0]
        raise CaptureError(
            f"the decode step cannot be recorded as a CUDA graph: {reason} "
            "Open the session with cuda_graph=False to decode without."
        ) from error
    return graph.replay, result


def _held(cache: GKACache) -> list[dict[int, Tensor | None]]:
    """Where a cache of recurrent layers holds its states."""
    layers: list[Any] = list(cache.layers)
    return [held for layer in layers for held in (layer.conv_states, layer.recurrent_states)]


def _places(held: list[dict[int, Tensor | None]]) -> list[int | None]:
    return [None if x is None else x.data_ptr() for states in held for x in states.values()]


class _Step:
    """A recorded step on the states of one cache, with its own inputs.

    It stays true as long as everything it reads lies where it lay, on the stream it was made for: `holds`
    tells.
    """

    def __init__(self, model: GKAForCausalLM, cache: GKACache, tokens: Tensor, mask: Tensor | None):
        self.cache, self.device = cache, model.device
        self.weights = [*model.parameters(), *model.buffers()]
        self.mixers = [x for x in model.modules() if isinstance(x, RecurrentMixer)]
        with torch.inference_mode(False):  # or it could not be written to outside
            self.tokens = tokens.clone()
            self.mask = None if mask is None else mask.clone()
        self.seen = self._seen()
        self.replay, self.logits = self._record(model)

    def _record(self, model: GKAForCausalLM) -> tuple[Callable[[], None], Tensor]:
        """Nothing is read: what the host did meanwhile, counting tokens, is undone."""
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
                "the decode step cannot be recorded as a CUDA graph: it does not leave the states where they "
                "are. Open the session with cuda_graph=False to decode without."
            )
        return recorded

    def _seen(self) -> list[Any]:
        places = _places(_held(self.cache)) + [x.data_ptr() for x in self.weights]
        places.append(_current(self.device))
        return [*places, *(getattr(x, name, None) for x in self.mixers for name in _CONSTANTS)]

    def holds(self, cache: GKACache, tokens: Tensor) -> bool:
        """Whether a replay does what a call on `cache` would."""
        return (
            cache is self.cache and tokens.shape == self.tokens.shape and self._seen() == self.seen
        )

    def run(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Logits [B,V] of one step, which the next step leaves alone."""
        self.tokens.copy_(tokens)
        if self.mask is not None and mask is not None:
            self.mask.copy_(mask)
        self.replay()
        self.cache.advance(1)
        return self.logits.clone()


class GraphedSteps:
    """The decode steps of one session: the first is run as it is, the second recorded, the rest repeated.

    So nothing is read twice, and whatever is compiled or allocated at first use is there before the
    recording. A step with a mask (some rows have ended) is a recording of its own. What changes its
    place, states or weights, is recorded anew.

    Args:
        model: `why_not_graphed(model)` is None.
    """

    def __init__(self, model: GKAForCausalLM):
        self.model = model
        self._steps: dict[bool, _Step | None] = {}  # None: ready to be recorded

    def forget(self) -> None:
        """Give back the recordings and their memory."""
        self._steps.clear()

    def check_weights(self) -> None:
        """Forget recordings of parameters that were exchanged for others."""
        now = [*self.model.parameters(), *self.model.buffers()]
        for step in self._steps.values():
            if step is not None and [*map(id, step.weights)] != [*map(id, now)]:
                self.forget()
                return

    def run(self, tokens: Tensor, mask: Tensor | None, cache: GKACache) -> Tensor:
        """Read one token a row, [B,1] with mask [B,1] or None, into `cache`, which is not empty.

        Returns:
            Logits after it [B,V].

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
