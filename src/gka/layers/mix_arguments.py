"""What a recurrent mixer's memory (`RecurrentMixer.mix`) is given beside queries, keys and values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gka.layers.padding import Padding


@dataclass(frozen=True)
class Run:
    """How a mixer's memory is to be run.

    Attributes:
        states: the cached states, none without a past.
        keep: whether the final states are wanted.
        stepwise: few tokens from a cache without gradient: token by token is cheaper than a chunk.
        cu_seqlens: bounds of packed sequences.
        cu_seqlens_cpu: their copy on the CPU.
        padding: places whose keys and log decays must be zero.
    """

    states: tuple[Tensor, ...]
    keep: bool
    stepwise: bool
    cu_seqlens: Tensor | None
    cu_seqlens_cpu: Tensor | None
    padding: Padding | None

    @property
    def in_place(self) -> bool:
        """Whether the cached states may be updated where they are, and then need not be returned.

        Tensors made in inference mode may not, outside it.
        """
        if not (self.stepwise and self.states):
            return False
        if torch.compiler.is_compiling():  # which does not know of inference mode
            return True
        return torch.is_inference_mode_enabled() or not any(s.is_inference() for s in self.states)


@dataclass(frozen=True)
class Gates:
    """What gates a mixer's memory [B,T,H], float32 or better; each None where the mixer has none.

    Attributes:
        g: log decay, zero at padding.
        beta: weight of a token's key and value, or step on its error.
        alpha: how much of the solution the readout takes.
    """

    g: Tensor | None
    beta: Tensor | None
    alpha: Tensor | None
