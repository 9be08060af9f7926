"""The computations around a recurrent mixer's memory, twice: as single torch modules and as fused kernels.

Before it: projections of q, k and v -> convolution + SiLU -> heads, unit queries and keys; and the gates.
After it: readout -> gated norm of each head. Both surrounds update the same cache alike.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gka.layers.parts.cache import read_state
from gka.layers.parts.masks import Padding
from gka.layers.parts.modules import GatedRMSNorm, RMSNorm, ShortConvolution, unit, working_dtype
from gka.ops import surround
from gka.ops.backends import check_known
from gka.ops.context import SequenceContext
from gka.ops.convolution import convolve_heads, step_heads_and_gates
from gka.ops.dispatch import under_transform
from gka.ops.external import EXTERNAL
from gka.ops.halo import halo_of
from gka.ops.split_convolution import split_convolve_heads

UNFUSED = ("torch", "reference")
OURS = (ShortConvolution, RMSNorm, GatedRMSNorm)
QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class MixCall:
    """One call of a mixer: its past and its options.

    Attributes:
        layer: the layer's part of the cache; None without a cache.
        states: the cached states of the memory, empty without a past.
        stepwise: whether the call runs token by token, which is cheaper than a chunk for few cached tokens
            without gradient.
        cu_seqlens: bounds of packed sequences.
        cu_seqlens_cpu: their copy on the CPU.
        padding: places whose keys and log decays must be zero.
        context: the rows are split over ranks; it holds the bounds then.
    """

    layer: Any
    states: tuple[Tensor, ...]
    stepwise: bool
    cu_seqlens: Tensor | None
    cu_seqlens_cpu: Tensor | None
    padding: Padding | None
    context: SequenceContext | None

    @property
    def keep(self) -> bool:
        """Whether the final states are wanted."""
        return self.layer is not None

    @property
    def lengths(self) -> Tensor | None:
        """Tokens of each row [B]; None for all of them."""
        return None if self.padding is None else self.padding.lengths

    @property
    def in_place(self) -> bool:
        """Whether the cached states may be updated in place, and then need not be returned.

        Inference-mode tensors may not be updated outside that mode.
        """
        if not (self.stepwise and self.states):
            return False
        if torch.compiler.is_compiling():  # Dynamo does not know inference mode
            return True
        return torch.is_inference_mode_enabled() or not any(s.is_inference() for s in self.states)


@dataclass(frozen=True)
class Gates:
    """The gates of a mixer's memory [B,T,H], float32 or better; None for a gate that the mixer lacks.

    Attributes:
        g: log decay, zero at padding.
        beta: weight of a token's key and value (delta rule: step size).
        alpha: share of the solution in the readout.
    """

    g: Tensor | None
    beta: Tensor | None
    alpha: Tensor | None


class Surround(Protocol):
    """An implementation of the computations around the memory of `mixer`, a `RecurrentMixer`."""

    def enter(self, mixer: Any, projected: QKV, x: Tensor, call: MixCall) -> tuple[QKV, Gates]:
        """The memory's inputs; updates the convolutions' states in `call.layer`.

        Args:
            projected: q_proj x, k_proj x and v_proj x, [B,T,channels] each.
            x: hidden states [B,T,hidden_size], tokens before padding.

        Returns:
            (unit queries [B,T,H,K], unit keys [B,T,Hk,K], zero at padding, values [B,T,Hv,V]), gates.
        """
        ...

    def leave(self, mixer: Any, o: Tensor, gate: Tensor | None) -> Tensor:
        """Norm of each head, times SiLU(gate [B,T,H*V]) if there is a gate: [B,T,H,V] -> [B,T,H*V]."""
        ...


class PlainSurround:
    """Single torch modules: on any device, in any dtype, differentiable any number of times."""

    def enter(self, mixer: Any, projected: QKV, x: Tensor, call: MixCall) -> tuple[QKV, Gates]:
        convolved = zip("qkv", self.convolve(mixer, projected, call), strict=True)
        # a learned map of key or value heads to all heads, where the mixer has one
        expanded = (getattr(mixer, f"{name}_expand", lambda x: x)(y) for name, y in convolved)
        q, k, v = _split(mixer, tuple(expanded))
        q, k = unit(q), unit(k)
        k = k if call.padding is None else call.padding.clear(k)
        return (q, k, v), self.gates(mixer, x, call.padding)

    def convolve(self, mixer: Any, projected: QKV, call: MixCall) -> QKV:
        """Convolve those of q, k and v [B,T,channels] that have a convolution; updates the layer's cache."""
        before = self._halos(mixer, projected, call)
        q, k, v = (
            self._convolve(mixer, name, y, call, before.get(name))
            for name, y in zip("qkv", projected, strict=True)
        )
        return q, k, v

    def gates(self, mixer: Any, x: Tensor, padding: Padding | None = None) -> Gates:
        """beta = sigmoid(b_proj x) + beta_eps, alpha = sigmoid(alpha_proj x),
        g = -exp(A_log) softplus(a_proj x + dt_bias)."""
        projected, dtype = _gate_projections(mixer, x), working_dtype(x)
        wide = {name: y.to(dtype) for name, y in projected.items()}
        g = mixer.log_decay(wide["a"]) if "a" in wide else None
        return Gates(
            g=g if g is None or padding is None else padding.clear(g),
            beta=torch.sigmoid(wide["b"]) + mixer.beta_eps if "b" in wide else None,
            alpha=torch.sigmoid(wide["alpha"]) if "alpha" in wide else None,
        )

    def leave(self, mixer: Any, o: Tensor, gate: Tensor | None) -> Tensor:
        if gate is None:
            return mixer.o_norm(o).flatten(-2)
        return mixer.o_norm(o, gate.unflatten(-1, (-1, mixer.head_v_dim))).flatten(-2)

    def _halos(self, mixer: Any, projected: QKV, call: MixCall) -> dict[str, Tensor]:
        """The tokens of earlier ranks that each convolution reads; none if rows are whole."""
        if call.context is None:
            return {}
        named = zip("qkv", projected, _convolutions(mixer), strict=True)
        read = {name: y for name, y, module in named if module is not None}
        found = halo_of(call.context, list(read.values()), mixer.q_conv1d.width - 1, call.lengths)
        return dict(zip(read, found, strict=True))

    def _convolve(
        self, mixer: Any, name: str, y: Tensor, call: MixCall, halo: Tensor | None
    ) -> Tensor:
        """Convolve a projection if the mixer does, and update the layer's cache."""
        convolution, layer = getattr(mixer, f"{name}_conv1d", None), call.layer
        if convolution is None:
            return y
        if halo is not None and call.context is not None:
            count = halo.shape[1]
            out = convolution(torch.cat([halo, y], 1), None, call.context.bounds(count)[0])
            return out[:, count:]
        idx = "qkv".index(name)
        state = None if layer is None else read_state(layer.conv_states, idx)
        out = convolution(y, state, call.cu_seqlens)
        if layer is not None:
            state = convolution.next_state(y, state, call.lengths)
            layer.update_conv_state(state.detach(), idx)
        return out


class FusedSurround:
    """Fused kernels; `why_unfused` says why they cannot run."""

    def enter(self, mixer: Any, projected: QKV, x: Tensor, call: MixCall) -> tuple[QKV, Gates]:
        if call.stepwise and _can_step(mixer, call.layer):
            return self.step(mixer, projected, x, call)
        heads = _split(mixer, self._convolve(mixer, projected, call))
        gates = _gates_in_one_product(mixer, x)
        beta, alpha, g = surround.layer_gates(
            gates.get("b"), gates.get("alpha"), gates.get("a"), *_decay(mixer, gates),
            eps=mixer.beta_eps, lengths=call.lengths,
        )  # fmt: skip
        return heads, Gates(g, beta, alpha)

    def step(self, mixer: Any, projected: QKV, x: Tensor, call: MixCall) -> tuple[QKV, Gates]:
        """`enter` for a few tokens without gradient: one launch, which updates the cached states in place."""
        gates, conv_states = _gate_projections(mixer, x), call.layer.conv_states
        q, k, v = projected
        modules, states = _convolutions(mixer), []
        for idx, module in enumerate(modules):
            state = None if module is None else conv_states[idx]
            if state is not None and not state.is_contiguous():
                state = conv_states[idx] = state.contiguous()
            states.append(state)
        wq, wk, wv = (None if module is None else module.weight for module in modules)
        (yq, yk, yv), (beta, alpha, g) = step_heads_and_gates(
            (q, k, None if wv is None else v), (wq, wk, wv), (states[0], states[1], states[2]),
            (gates.get("b"), gates.get("alpha"), gates.get("a")), _decay(mixer, gates), mixer.head_dim,
            eps=mixer.beta_eps, lengths=call.lengths,
        )  # fmt: skip
        assert yq is not None and yk is not None
        return _split(mixer, (yq, yk, v if yv is None else yv)), Gates(g, beta, alpha)

    def leave(self, mixer: Any, o: Tensor, gate: Tensor | None) -> Tensor:
        return surround.gated_rms_norm(o, gate, mixer.o_norm.weight, mixer.o_norm.eps).flatten(-2)

    def _convolve(self, mixer: Any, projected: QKV, call: MixCall) -> QKV:
        """Run all convolutions and the unit norms of q and k, [B,T,channels] each; updates the cache."""
        modules, layer = _convolutions(mixer), call.layer
        states = [
            None if layer is None or module is None else read_state(layer.conv_states, idx)
            for idx, module in enumerate(modules)
        ]
        wq, wk, wv = (None if module is None else module.weight for module in modules)
        q, k, v = projected
        assert wq is not None and wk is not None
        inputs, weights = (q, k, None if wv is None else v), (wq, wk, wv)
        if call.context is not None:
            yq, yk, yv = split_convolve_heads(
                call.context, inputs, weights, mixer.head_dim, call.lengths
            )
        else:
            yq, yk, yv = convolve_heads(
                inputs, weights, mixer.head_dim, (states[0], states[1], states[2]), call.cu_seqlens,
                call.lengths,
            )  # fmt: skip
        if layer is not None:
            for idx, (module, y, state) in enumerate(zip(modules, projected, states, strict=True)):
                if module is not None:
                    state = module.next_state(y, state, call.lengths)
                    layer.update_conv_state(state.detach().contiguous(), idx)
        return yq, yk, v if yv is None else yv


PLAIN, FUSED = PlainSurround(), FusedSurround()


def why_unfused(mixer: Any, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why the mixer runs single torch modules on projections of that dtype; None if fused kernels run.

    Raises:
        RuntimeError: the mixer's backend names kernels that cannot run.
        ValueError: no backend has the name in the mixer's `backend`.
    """
    # a library has kernels only for the memory
    name = "auto" if mixer.backend in EXTERNAL else mixer.backend
    device = torch.device(device)
    check_known(name)
    if name in UNFUSED:
        return f'backend="{name}" asks for plain torch.'
    if name == "auto" and device.type != "cuda":
        return f"the kernels need an NVIDIA GPU; got {device}."
    dims = (mixer.head_dim, mixer.head_v_dim)
    reason = surround.why_unfused(device, dtype, dims, mixer.q_conv1d.width) or _why_called(mixer)
    if reason is not None and name != "auto":
        raise RuntimeError(
            f"backend={name!r} cannot run this layer's convolutions, gates and norm: {reason} "
            'backend="auto" runs what can be run by kernels, "torch" nothing.'
        )
    return reason


def _why_called(mixer: Any) -> str | None:
    """Why modules must be called: one is replaced or has hooks, or the call is transformed; None if not."""
    if under_transform():
        return "inside a transform of torch.func or torch.vmap modules are called one by one."
    if hasattr(mixer, "k_expand") or hasattr(mixer, "v_expand"):
        return "keys or values are expanded between their convolution and their norm."
    for name in ("q_conv1d", "k_conv1d", "v_conv1d", "o_norm"):
        module = getattr(mixer, name, None)
        if module is not None and not _is_untouched(module):
            return f"{name} was replaced or has hooks, and is called for their sake."
    return None


def _is_untouched(module: nn.Module, kinds: tuple[type, ...] = OURS) -> bool:
    hooks = (
        module._forward_hooks, module._forward_pre_hooks,
        module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    return type(module) in kinds and not any(hooks) and "forward" not in vars(module)


def _can_step(mixer: Any, layer: Any) -> bool:
    """Whether the layer's cache holds the states of every convolution, to be updated in place."""
    started = getattr(layer, "has_previous_state", None)  # transformers' layers start as zeros
    for idx, module in enumerate(_convolutions(mixer)):
        if module is None:
            continue
        state = layer.conv_states.get(idx)
        if state is None or state.shape[-1] != module.width or (started and not started[idx]):
            return False
    return True


def _convolutions(mixer: Any) -> list[ShortConvolution | None]:
    return [getattr(mixer, f"{name}_conv1d", None) for name in "qkv"]


def _gate_modules(mixer: Any) -> dict[str, Any]:
    named = ((name, getattr(mixer, f"{name}_proj", None)) for name in ("b", "alpha", "a"))
    return {name: projection for name, projection in named if projection is not None}


def _gate_projections(mixer: Any, x: Tensor) -> dict[str, Tensor]:
    """Outputs [B,T,H] of those of b_proj, alpha_proj and a_proj that the mixer has."""
    return {name: projection(x) for name, projection in _gate_modules(mixer).items()}


def _gates_in_one_product(mixer: Any, x: Tensor) -> dict[str, Tensor]:
    """`_gate_projections` as one product, unless modules are replaced, have hooks or unusual weights.

    A product with H columns takes as long as reading x, and its gradient of x has to be added to the others'.
    """
    modules = _gate_modules(mixer)
    plain = all(
        _is_untouched(module, (nn.Linear,)) and type(module.weight) in (Tensor, nn.Parameter)
        for module in modules.values()
    )
    if len(modules) < 2 or not plain:
        return _gate_projections(mixer, x)
    weight = torch.cat([module.weight for module in modules.values()])
    biases: Any = [module.bias for module in modules.values()]
    sizes = [module.weight.shape[0] for module in modules.values()]
    bias = None
    if any(part is not None for part in biases):
        parts = zip(biases, sizes, strict=True)
        bias = torch.cat([weight.new_zeros(n) if part is None else part for part, n in parts])
    products = nn.functional.linear(x, weight, bias).split(sizes, dim=-1)
    return dict(zip(modules, products, strict=True))


def _decay(mixer: Any, gates: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    return (mixer.A_log, mixer.dt_bias) if "a" in gates else (None, None)


def _split(mixer: Any, convolved: tuple[Tensor, ...]) -> QKV:
    """Split q, k and v [B,T,channels] into heads; q gets one head per output head."""
    dims = (mixer.head_dim, mixer.head_dim, mixer.head_v_dim)
    q, k, v = (y.unflatten(-1, (-1, dim)) for y, dim in zip(convolved, dims, strict=True))
    group = mixer.num_expanded_heads // mixer.num_heads
    return q if group == 1 else q.repeat_interleave(group, dim=2), k, v
