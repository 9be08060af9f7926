"""The recurrent mixers' convolutions, gates and norm by fused kernels: when, and how they are called."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gka.layers.cache import read_state
from gka.layers.convolution import ShortConvolution
from gka.layers.norms import GatedRMSNorm, RMSNorm
from gka.layers.padding import Padding
from gka.ops import why_unavailable
from gka.ops.autograd import under_transform
from gka.ops.convolution import convolve_heads, step_heads_and_gates
from gka.ops.surround import gated_rms_norm, layer_gates, why_unfused

if TYPE_CHECKING:
    from gka.layers.recurrent import RecurrentMixer

PLAIN = ("torch", "reference")
OURS = (ShortConvolution, RMSNorm, GatedRMSNorm)


def why_plain(
    mixer: "RecurrentMixer", device: torch.device | str, dtype: torch.dtype
) -> str | None:
    """Why the mixer runs its modules one by one on projections of that dtype; None if kernels do.

    Raises:
        RuntimeError: the mixer's backend asks for kernels by name, and they cannot run.
        ValueError: no backend has the mixer's `backend` as its name.
    """
    name, device = mixer.backend, torch.device(device)
    why_unavailable(name)  # refuses unknown names
    if name in PLAIN:
        return f'backend="{name}" asks for plain torch.'
    if name == "auto" and device.type != "cuda":
        return f"the kernels need an NVIDIA GPU; got {device}."
    dims = (mixer.head_dim, mixer.head_v_dim)
    reason = why_unfused(device, dtype, dims, mixer.q_conv1d.width) or _why_called(mixer)
    if reason is not None and name != "auto":
        raise RuntimeError(
            f"backend={name!r} cannot run this layer's convolutions, gates and norm: {reason} "
            'backend="auto" runs what can be run by kernels, "torch" nothing.'
        )
    return reason


def _why_called(mixer: "RecurrentMixer") -> str | None:
    """Modules must be called themselves: someone replaced one or listens to it, or transforms the call."""
    if under_transform():
        return "inside a transform of torch.func or torch.vmap modules are called one by one."
    if hasattr(mixer, "k_expand") or hasattr(mixer, "v_expand"):
        return "keys or values are expanded between their convolution and their norm."
    for name in ("q_conv1d", "k_conv1d", "v_conv1d", "o_norm"):
        module = getattr(mixer, name, None)
        if module is not None and not _is_plain(module):
            return f"{name} was replaced or has hooks, and is called for their sake."
    return None


def _is_plain(module: nn.Module) -> bool:
    hooks = (
        module._forward_hooks, module._forward_pre_hooks,
        module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    return type(module) in OURS and not any(hooks) and "forward" not in vars(module)


def heads(
    mixer: "RecurrentMixer",
    inputs: tuple[Tensor, Tensor, Tensor],
    layer: Any,
    padding: Padding | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve the projections of q, k and v (updating the layer's cache): [B,T,heads,...] each."""
    modules = [getattr(mixer, f"{name}_conv1d", None) for name in "qkv"]
    lengths = None if padding is None else padding.lengths
    states = [
        None if layer is None or module is None else read_state(layer.conv_states, idx)
        for idx, module in enumerate(modules)
    ]
    wq, wk, wv = (None if module is None else module.weight for module in modules)
    q, k, v = inputs
    assert wq is not None and wk is not None
    yq, yk, yv = convolve_heads(
        (q, k, None if wv is None else v), (wq, wk, wv), mixer.head_dim,
        (states[0], states[1], states[2]), cu_seqlens, lengths,
    )  # fmt: skip
    if layer is not None:
        for idx, (module, x, state) in enumerate(zip(modules, inputs, states, strict=True)):
            if module is not None:
                state = module.next_state(x, state, lengths)
                layer.update_conv_state(state.detach().contiguous(), idx)
    return yq, yk, v if yv is None else yv


def gates(
    mixer: "RecurrentMixer", projected: dict[str, Tensor], padding: Padding | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """beta, alpha and g of their projections by name, each None without its own."""
    decay = (mixer.A_log, mixer.dt_bias) if "a" in projected else (None, None)
    return layer_gates(
        projected.get("b"), projected.get("alpha"), projected.get("a"), *decay,
        eps=mixer.beta_eps, lengths=None if padding is None else padding.lengths,
    )  # fmt: skip


def can_step(mixer: "RecurrentMixer", layer: Any) -> bool:
    """Whether the layer's cache holds the states of every convolution, to be updated in place."""
    started = getattr(layer, "has_previous_state", None)  # transformers' layers keep zeros before
    for idx, name in enumerate("qkv"):
        module = getattr(mixer, f"{name}_conv1d", None)
        if module is None:
            continue
        state = layer.conv_states.get(idx)
        if state is None or state.shape[-1] != module.width or (started and not started[idx]):
            return False
    return True


def step(
    mixer: "RecurrentMixer",
    inputs: tuple[Tensor, Tensor, Tensor],
    projected: dict[str, Tensor],
    layer: Any,
    padding: Padding | None,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """`heads` and `gates` of a few tokens without gradient; the cache's states are updated in place."""
    modules = [getattr(mixer, f"{name}_conv1d", None) for name in "qkv"]
    states = []
    for idx, module in enumerate(modules):
        state = None if module is None else layer.conv_states[idx]
        if state is not None and not state.is_contiguous():
            state = layer.conv_states[idx] = state.contiguous()
        states.append(state)
    wq, wk, wv = (None if module is None else module.weight for module in modules)
    q, k, v = inputs
    decay = (mixer.A_log, mixer.dt_bias) if "a" in projected else (None, None)
    (yq, yk, yv), found = step_heads_and_gates(
        (q, k, None if wv is None else v), (wq, wk, wv), (states[0], states[1], states[2]),
        (projected.get("b"), projected.get("alpha"), projected.get("a")), decay, mixer.head_dim,
        eps=mixer.beta_eps, lengths=None if padding is None else padding.lengths,
    )  # fmt: skip
    assert yq is not None and yk is not None
    return (yq, yk, v if yv is None else yv), found


def readout(mixer: "RecurrentMixer", o: Tensor, gate: Tensor | None) -> Tensor:
    """The norm of each head [B,T,H,V], gated if there is a gate."""
    return gated_rms_norm(o, gate, mixer.o_norm.weight, mixer.o_norm.eps)
