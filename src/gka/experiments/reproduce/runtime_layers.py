"""The layers that `runtime` times: ours, the baselines on installed kernels, flash-linear-attention's own."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gka.errors import NotAvailable
from gka.experiments import fla_mixers
from gka.layers import build_mixer
from gka.ops import last_backend, why_not_external
from gka.ops.external import EXTERNAL

GKA, BEST = "gka", "gated_deltanet"
# of `gka.ops.external`: rule of a mixer whose kernels are another library's
_RULES = {"gated_deltanet": "gated_delta_rule", "deltanet": "delta_rule", "gla": "simple_gla"}


@dataclass(frozen=True)
class Shape:
    """A layer's size and its input. `fla_mixers` reads `hidden`, `heads` and `dim`."""

    batch: int
    length: int
    heads: int
    dim: int

    @property
    def hidden(self) -> int:
        return self.heads * self.dim

    @property
    def tokens(self) -> int:
        return self.batch * self.length


@dataclass(frozen=True)
class Contender:
    """A layer.

    Attributes:
        name: in keys, tables and figures.
        mixer: a name of `gka.layers.MIXERS`, or of `fla_mixers.LAYERS`.
        options: of the mixer.
        note: what a reader must know beside its figures.
    """

    name: str
    mixer: str
    options: tuple[tuple[str, Any], ...] = ()
    note: str = ""


# at every length
MAIN = (
    Contender(GKA, "gka"),
    Contender("gka, adaptive", "gka", (("solver", "adaptive"),)),
    Contender("gka, cg", "gka", (("solver", "cg"),)),
    Contender("gka, 8 steps", "gka", (("num_iter", 8),)),
    Contender("attention", "attention"),
    Contender(BEST, "gated_deltanet"),
    Contender("deltanet", "deltanet"),
    Contender("gla", "gla"),
)
_WRONG = "on Hopper under Triton 3.4 to 3.7.0 its gradients are wrong (issue 640 there): for its time alone"
# at one length: each is tuned for minutes
PEERS = (
    Contender("fla:gated_deltanet", "fla:gated_deltanet", note=_WRONG),
    Contender("fla:mesa_net", "fla:mesa_net"),
    Contender("fla:kda", "fla:kda"),
    Contender("fla:mamba2", "fla:mamba2"),
    Contender("gated_deltanet, fla", "gated_deltanet", (("backend", "fla"),)),
)


def layer(contender: Contender, shape: Shape, device: str, dtype: torch.dtype) -> nn.Module:
    """The contender's layer with fresh weights.

    Raises:
        NotAvailable: it is not installed, or refuses this device or size; the message says why.
    """
    torch.manual_seed(0)
    if contender.mixer in fla_mixers.LAYERS:
        if torch.device(device).type != "cuda":
            raise NotAvailable("flash-linear-attention's kernels need a GPU")
        if contender.mixer == "fla:mamba2" and importlib.util.find_spec("mamba_ssm") is None:
            raise NotAvailable("its kernels are those of mamba-ssm, which is not installed")
        found = fla_mixers.FlaMixer(fla_mixers.layer(contender.mixer, shape))
    else:
        options = dict(contender.options)
        _check_kernels(contender, options.get("backend"), shape, device, dtype)
        found = build_mixer(
            contender.mixer, hidden_size=shape.hidden, num_heads=shape.heads, head_dim=shape.dim,
            **options,
        )  # fmt: skip
    return found.to(device=device, dtype=dtype)


def _check_kernels(
    contender: Contender, backend: str | None, shape: Shape, device: str, dtype: torch.dtype
) -> None:
    """Refuse a delta rule on a GPU without a library's kernels: plain torch is no contender there.

    Raises:
        NotAvailable: with the reasons of the named library, or of all of them.
    """
    rule: Any = _RULES.get(contender.mixer)
    plain = torch.device(device).type != "cuda" or rule == "simple_gla"
    if rule is None or (backend is None and plain):
        return
    names = list(EXTERNAL) if backend is None else [backend]
    dims = (shape.dim, shape.dim)
    reasons = {name: why_not_external(name, rule, device, dtype, dims) for name in names}
    if None not in reasons.values():
        raise NotAvailable("; ".join(f"{name}: {why}" for name, why in reasons.items()))


def backend_of(contender: Contender) -> str:
    """What ran the contender's latest call."""
    if contender.mixer in fla_mixers.LAYERS:
        return "flash-linear-attention"
    if contender.mixer == "attention":
        return "torch's scaled_dot_product_attention"
    return last_backend() or "none"


def forward_backward(
    mixer: nn.Module, shape: Shape, device: str, dtype: torch.dtype
) -> Callable[[], Any]:
    """A call that runs the layer on one fixed input, and returns all gradients."""
    generator = torch.Generator(device).manual_seed(1)
    size = (shape.batch, shape.length, shape.hidden)
    x, dy = (torch.randn(size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    inputs = [x.requires_grad_(), *mixer.parameters()]

    def call() -> Any:
        return torch.autograd.grad(mixer(x)[0], inputs, dy, allow_unused=True)

    return call
