"""What is measured: this library's op, layers and models, and their peers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize, scaled_dot_product_attention, silu

from gka.errors import NotAvailable as NotAvailable
from gka.layers import GatedKalmaNet
from gka.maths.solvers import SolverName
from gka.models.flops import CHUNK, step_flops
from gka.ops import chunk_gka, why_not_external, why_unavailable
from gka.ops.external import Rule

NUM_ITER = 30
MEAN = 1.0  # mean of the Gaussians before SiLU, which gives keys a common direction
SOLVERS: tuple[SolverName, ...] = get_args(SolverName)
"""The solvers of the GPU kernels."""
Call = Callable[[], object]


@dataclass(frozen=True)
class Size:
    """B sequences of T tokens, H heads, K = V = dim."""

    batch: int
    length: int
    heads: int
    dim: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.length} x {self.heads}, D = {self.dim}"


@dataclass(frozen=True)
class Inputs:
    """q, k, v [B,T,H,D] and the output's gradient do bfloat16; g, alpha, beta [B,T,H] float32.

    beta16 is beta in bfloat16, lamb [H,D] MesaNet's ridge.
    """

    do: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    alpha: Tensor
    beta: Tensor
    beta16: Tensor
    lamb: Tensor


def features(kind: str, *shape: int, device: str) -> Tensor:
    """Unit vectors in bfloat16 of Gaussians, of their SiLU, or of the SiLU of Gaussians of mean MEAN."""
    x = torch.randn(*shape, device=device)
    if kind != "gaussian":
        x = silu(x + MEAN if kind == "silu-mean" else x)
    return normalize(x, dim=-1).bfloat16()


def make_inputs(size: Size, keys: str, device: str) -> Inputs:
    """Random inputs similar to a layer's: log decays from -1e-3 to -1e-1, with one scale per head."""
    torch.manual_seed(0)
    b, t, h, d = size.batch, size.length, size.heads, size.dim
    scale = 10.0 ** (-3 + 2 * torch.rand(h, device=device))
    g = -(scale * (0.5 + torch.rand(b, t, h, device=device))).clamp(1e-3, 1e-1)
    alpha, beta = (torch.rand(b, t, h, device=device) for _ in range(2))
    q, k = (features(keys, b, t, h, d, device=device) for _ in range(2))
    v, do = (torch.randn(b, t, h, d, device=device, dtype=torch.bfloat16) for _ in range(2))
    lamb = 0.25 + torch.rand(h, d, device=device)
    leaves = (q, k, v, g, alpha, beta, beta.bfloat16(), lamb)
    return Inputs(do, *(x.requires_grad_() for x in leaves))


def reason(error: Exception) -> str:
    """An error as text in a table."""
    text = " ".join(str(error).split()).replace("|", "/")[:300]
    return text if isinstance(error, NotAvailable) else f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class Contender:
    """One function to measure.

    Attributes:
        name: name in tables and options.
        leaves: names of its inputs, which the backward pass differentiates.
        load: imports it and returns a function from inputs to the output. Raises NotAvailable.
        flops: floating-point operations of the forward pass at a size; None if steps depend on the data.
        library: name and rule in `gka.ops.external`, which knows where it cannot run or is wrong.
        solver: backend and solver of our op, whose backend knows where it cannot run.
    """

    name: str
    leaves: tuple[str, ...]
    load: Callable[[], Callable[[Inputs], Tensor]]
    flops: Callable[[Size], float] | None = None
    library: tuple[str, Rule] | None = None
    solver: tuple[str, SolverName] | None = None

    def why_not(self, size: Size, device: str, training: bool) -> str | None:
        """The reason of `gka.ops` at a size; None for what is neither a library's nor ours."""
        dims = (size.dim, size.dim)
        if self.solver is not None:
            backend, solver = self.solver
            return why_unavailable(backend, device, torch.bfloat16, solver, dims)
        if self.library is None:
            return None
        return why_not_external(*self.library, device, dims=dims, training=training)


def passes(
    call: Callable[[Inputs], Tensor], inputs: Inputs, leaves: tuple[str, ...]
) -> dict[str, Call]:
    """A contender's two measured calls, by name."""
    tensors = [getattr(inputs, name) for name in leaves]

    def forward() -> None:
        with torch.no_grad():
            call(inputs)

    def both() -> object:
        o = call(inputs)
        return torch.autograd.grad(o, tensors, inputs.do.to(o.dtype))

    return {"forward": forward, "forward+backward": both}


def forward_flops(size: Size) -> float:
    """Operations of `chunk_gka` with K = V and 30 steps, for all tokens and heads.

    Per token and head: 30 (2 K^2 + 4 C K) for the solve; 2 K^2 + 2 K V for the update of H and U; 2 C K for
    products of keys and 2 K^2 for H_[c] k, both for F; 2 C K + 2 C V + 2 K V for the readout.
    """
    d = size.dim
    rest = 8 * d**2 + 6 * CHUNK * d
    return float(size.batch * size.length * size.heads * (NUM_ITER * step_flops(d) + rest))


def ours(solver: SolverName, backend: str, num_iter: int = NUM_ITER) -> Contender:
    def load() -> Callable[[Inputs], Tensor]:
        def call(x: Inputs) -> Tensor:
            o, _ = chunk_gka(
                x.q, x.k, x.v, x.g, x.g, x.alpha, num_iter=num_iter, beta=x.beta, backend=backend,
                solver=solver,
            )  # fmt: skip
            return o

        return call

    flops = forward_flops if solver == "chebyshev" else None
    leaves = ("q", "k", "v", "g", "alpha", "beta")
    return Contender(f"chunk_gka, {solver}", leaves, load, flops, solver=(backend, solver))


def load_flash_qla() -> Callable[[Inputs], Tensor]:
    from flash_qla import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]

    return lambda x: chunk_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta)[0]


def load_delta_rule() -> Callable[[Inputs], Tensor]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]

    return lambda x: chunk_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta16)[0]


def load_simple_gla() -> Callable[[Inputs], Tensor]:
    from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]

    return lambda x: chunk_simple_gla(x.q, x.k, x.v, x.g)[0]


def load_mesa_net() -> Callable[[Inputs], Tensor]:
    from fla.ops.mesa_net import chunk_mesa_net  # pyright: ignore[reportMissingImports]

    return lambda x: chunk_mesa_net(x.q, x.k, x.v, x.g, x.beta, x.lamb, max_CG_iteration=NUM_ITER)[
        0
    ]


def load_attention() -> Callable[[Inputs], Tensor]:
    def call(x: Inputs) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return call


BASELINES = ("flash_qla", "gated_delta_rule")
"""Denominators of ratios: at each size the first of these that was measured."""
BASELINE_LAYER = "fla.layers.GatedDeltaNet"

PEERS = {
    peer.name: peer
    for peer in (
        Contender(
            "flash_qla", ("q", "k", "v", "g", "beta"), load_flash_qla,
            library=("flash_qla", "gated_delta_rule"),
        ),
        Contender(
            "gated_delta_rule", ("q", "k", "v", "g", "beta16"), load_delta_rule,
            library=("fla", "gated_delta_rule"),
        ),
        Contender(
            "simple_gla", ("q", "k", "v", "g"), load_simple_gla, library=("fla", "simple_gla")
        ),
        Contender("sdpa", ("q", "k", "v"), load_attention),
        Contender("mesa_net", ("q", "k", "v", "g", "beta", "lamb"), load_mesa_net),
    )
}  # fmt: skip
PACKAGES = {
    "flash_qla": "flash_qla", "gated_delta_rule": "fla", "simple_gla": "fla", "mesa_net": "fla",
}  # fmt: skip
"""Peers whose kernels are compiled or tuned at a first call, with their packages."""


@dataclass(frozen=True)
class LayerSize:
    """One sequence through one layer."""

    hidden: int
    heads: int
    dim: int
    length: int

    def __str__(self) -> str:
        return f"hidden {self.hidden}, {self.heads} heads of {self.dim}, 1 x {self.length}"


Build = Callable[[LayerSize], nn.Module]


def hidden_states(size: LayerSize, device: str) -> Tensor:
    """Gaussian hidden states, bfloat16 [1,T,hidden]."""
    return torch.randn(1, size.length, size.hidden, device=device, dtype=torch.bfloat16)


def layer_passes(layer: nn.Module, size: LayerSize, device: str) -> dict[str, Call]:
    """A layer's two measured calls, by name; gradients are of the input and all parameters."""
    x, do = hidden_states(size, device).requires_grad_(), hidden_states(size, device)
    layer.train()
    wanted = [x, *layer.parameters()]

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    return {
        "forward": forward,
        "forward+backward": lambda: torch.autograd.grad(layer(x)[0], wanted, do),
    }


class PlainKalmaNet(GatedKalmaNet):
    """The layer with torch's modules around the op, even if they could be fused."""

    def why_unfused(self, device: torch.device | str, dtype: torch.dtype) -> str | None:
        return "it is measured beside the fused kernels."


def our_layer(size: LayerSize, solver: str, backend: str, fused: bool = True) -> nn.Module:
    kind = GatedKalmaNet if fused else PlainKalmaNet
    return kind(
        size.hidden, head_dim=size.dim, num_heads=size.heads, num_iter=NUM_ITER, backend=backend,
        solver=solver,
    )  # fmt: skip


def peer_layer(size: LayerSize) -> nn.Module:
    """FLA's Gated DeltaNet layer with values as wide as keys, as in ours; its default is twice as wide."""
    from fla.layers import GatedDeltaNet  # pyright: ignore[reportMissingImports]

    return GatedDeltaNet(
        hidden_size=size.hidden, expand_v=1.0, head_dim=size.dim, num_heads=size.heads, mode="chunk"
    )


def layers(backend: str, peers: bool) -> dict[str, Build]:
    """Builders of layers by name."""
    found: dict[str, Build] = {}
    if peers:
        found[BASELINE_LAYER] = peer_layer
    for solver in SOLVERS:
        found[f"GatedKalmaNet, {solver}"] = lambda size, s=solver: our_layer(size, s, backend)
    return found


def profiled_layers(backend: str, peers: bool) -> dict[str, Build]:
    """Builders of `layers`, and of our layer with torch's modules around the op."""
    plain = f"GatedKalmaNet, {SOLVERS[0]}, torch's modules around the op"
    return layers(backend, peers) | {
        plain: lambda size: our_layer(size, SOLVERS[0], backend, fused=False)
    }


MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 32},
    "small": {"hidden_size": 256, "num_hidden_layers": 4, "num_heads": 4, "head_dim": 64},
    "medium": {"hidden_size": 1024, "num_hidden_layers": 24, "num_heads": 8, "head_dim": 128},
    "2.8b": {"hidden_size": 2560, "num_hidden_layers": 32, "num_heads": 20, "head_dim": 128},
}


def model(size: str, dtype: torch.dtype, device: str, mixers: list[str] | None) -> Any:
    """A GKAForCausalLM with random weights, in evaluation mode."""
    from gka.models import GKAConfig, GKAForCausalLM

    torch.manual_seed(0)
    fields = dict(MODELS[size])
    if mixers is not None:
        fields |= {"mixers": mixers, "num_hidden_layers": len(mixers)}
    with torch.device(device):
        made: Any = GKAForCausalLM(GKAConfig(vocab_size=32000, **fields))
    return made.to(dtype).eval()
