"""Layers of flash-linear-attention in the place of a decoder's mixers, for comparison alone.

The decoder around them stays ours: norms, MLPs, head, loss. Sizes are those of our mixers as far as a layer
has them: heads, K = V, short convolutions of four inputs, an output gate where it has one. Numbers of
parameters differ where a layer has gates of its own, and are reported.
"""

import importlib
import inspect
from typing import Any, Protocol

from torch import Tensor, nn

from gka.errors import NotAvailable

# our name -> class in fla.layers, and options that differ from its defaults
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "fla:gated_deltanet": ("GatedDeltaNet", {"expand_v": 1.0}),
    "fla:deltanet": ("DeltaNet", {"use_gate": True}),
    "fla:gla": ("GatedLinearAttention", {"expand_k": 1.0, "use_short_conv": True}),
    "fla:kda": ("KimiDeltaAttention", {"expand_v": 1.0}),
    "fla:mesa_net": ("MesaNet", {"use_output_gate": True}),
    "fla:mamba2": ("Mamba2", {"expand": 2}),
    "fla:mamba3": ("Mamba3", {"expand": 2}),
    "fla:comba": ("Comba", {"expand_v": 1.0}),
    "fla:gated_deltaproduct": ("GatedDeltaProduct", {"expand_v": 1.0}),
    "fla:gdn2": ("GatedDeltaNet2", {"expand_v": 1.0}),
}


class LayerSize(Protocol):
    """What a layer is built for: width of the hidden states, heads, and K = V = dim of a head."""

    @property
    def hidden(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def dim(self) -> int: ...


class FlaMixer(nn.Module):
    """A layer of theirs, called as a mixer of ours: whole sequences of one length, no cache, no padding."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
    ) -> tuple[Tensor, None, Any]:
        """hidden_states [B,T,hidden] -> (output, None, None).

        Raises:
            ValueError: padding, a cache or packed sequences, which this comparison has no use for.
        """
        if any(x is not None for x in (attention_mask, past_key_values, cu_seqlens)):
            raise ValueError("a layer of flash-linear-attention stands here for speed alone")
        return self.layer(hidden_states)[0], None, None


def options(kind: type, size: LayerSize, own: dict[str, Any]) -> dict[str, Any]:
    """Constructor options that the class has, of our sizes and of its own.

    Mamba's heads are the inner width over a head's: `expand` times as many as ours.
    """
    expand = own.get("expand", 1)
    wanted = {
        "hidden_size": size.hidden, "head_dim": size.dim, "num_heads": size.heads * expand,
        "mode": "chunk", "layer_idx": 0, **own,
    }  # fmt: skip
    known = inspect.signature(kind).parameters
    return {name: value for name, value in wanted.items() if name in known}


def layer(name: str, size: LayerSize) -> nn.Module:
    """One of the installed version's layers, by a name of `LAYERS`.

    Raises:
        NotAvailable: it is not installed, has no such layer, or refuses to be built.
    """
    kind, own = LAYERS[name]
    try:
        module = importlib.import_module("fla.layers")
    except ImportError as error:
        raise NotAvailable(f"flash-linear-attention cannot be imported: {error}") from error
    found = getattr(module, kind, None)
    if found is None:
        raise NotAvailable(f"the installed flash-linear-attention has no layer {kind}.")
    try:
        return found(**options(found, size, own))
    except Exception as error:
        raise NotAvailable(
            f"{kind} refuses to be built: {type(error).__name__}: {error}"
        ) from error


def replace_mixers(model: Any, name: str, size: LayerSize) -> None:
    """Put a layer of theirs into every layer of a decoder."""
    for block in model.model.layers:
        block.mixer = FlaMixer(layer(name, size))
