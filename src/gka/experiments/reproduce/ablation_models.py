"""The models of `ablations`: the same decoder with one property of its mixers changed."""

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gka.experiments.reproduce.differentiation import chebyshev_on, implicitly, plain_gka
from gka.layers import GatedKalmaNet
from gka.layers.parts.modules import DecayParameters
from gka.layers.parts.surround import Gates, MixCall

WORDS = 257  # bytes, and the end of a document
BASELINE = "baseline"


@dataclass(frozen=True)
class Ridge:
    """A solve that the library's op does not have, on purpose: its error bounds and the certificates of its
    solvers rest on lambda_t = a F_t, and its gradient is that of the exact solve (docs/maths.md, section 8).

    Attributes:
        ratio, constant: a and c of lambda_t = a F_t + c.
        num_iter: Chebyshev steps.
        derivative: "implicit": of the exact solve, at the computed solutions; "iteration": of the steps.
    """

    ratio: float = 0.02
    constant: float = 0.0
    num_iter: int = 30
    derivative: Literal["implicit", "iteration"] = "implicit"

    def op(self, *given: Tensor | None, beta: Tensor | None, scale: float) -> Tensor:
        """o [B,T,H,V] of q, k, v, g, gk and alpha."""
        steps = partial(chebyshev_on, num_iter=self.num_iter)
        solve = implicitly(steps) if self.derivative == "implicit" else steps
        options = {
            "ridge_ratio": self.ratio,
            "constant": self.constant,
            "beta": beta,
            "scale": scale,
        }
        return plain_gka(*given, solve=solve, **options)[0]  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Variant:
    """A model that differs from the baseline in one property.

    Attributes:
        name: in keys and tables.
        options: fields of `gka.models.GKAConfig`.
        ridge: solve with this ridge in plain torch; None: by the library's op.
        own_decay: H decays by gates of its own, which begin as copies of U's.
        repeated: whether it is near enough to the baseline to need all seeds.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    ridge: Ridge | None = None
    own_decay: bool = False
    repeated: bool = True


class OwnDecay(DecayParameters):
    """The log decay of a mixer's gates, as a module of its own: [B,T,hidden] -> [B,T,H]."""

    def __init__(self, mixer: GatedKalmaNet) -> None:
        super().__init__()
        self.a_proj = copy.deepcopy(mixer.a_proj)
        self._add_decay_parameters(mixer.num_expanded_heads)
        with torch.no_grad():
            self.A_log.copy_(mixer.A_log)
            self.dt_bias.copy_(mixer.dt_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.log_decay(self.a_proj(x).to(self.A_log.dtype))


class AblatedMixer(GatedKalmaNet):
    """`GatedKalmaNet` with another solve, or with a decay of H apart. For training on whole sequences alone.

    The library's layer has neither option: neither was worth one in the last run (docs/results/ablations.md).
    """

    other: Variant
    decay_h: OwnDecay | None
    seen: Tensor | None  # log decay of H in this call

    @classmethod
    def of(cls, mixer: GatedKalmaNet, variant: Variant) -> "AblatedMixer":
        """`mixer` itself, from now on of this class."""
        mixer.__class__ = cls
        changed: Any = mixer
        changed.other = variant
        changed.decay_h, changed.seen = OwnDecay(mixer) if variant.own_decay else None, None
        return changed

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        self.seen = None if self.decay_h is None else self.decay_h(hidden_states)
        return super().forward(hidden_states, *args, **options)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, call: MixCall
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        from gka.ops import chunk_gka

        plain = not (call.states or call.keep or call.padding or call.cu_seqlens is not None)
        assert plain, "an ablated mixer reads whole sequences of one length"
        gk = gates.g if self.decay_h is None else self.seen
        given = (q, k, v, gates.g, gk, gates.alpha)
        if self.other.ridge is not None:
            return self.other.ridge.op(*given, beta=gates.beta, scale=self.scale), ()
        o, _ = chunk_gka(
            *given, self.scale, self.ridge_ratio, self.num_iter, beta=gates.beta,
            backend=self.backend, solver=self.solver,
        )  # fmt: skip
        return o, ()


def _steps(r: int, **more: Any) -> Variant:
    return Variant(f"{r} steps", {"num_iter": r}, **more)


BASE = Variant(BASELINE)
DERIVED = Variant("3 steps, their own derivative", ridge=Ridge(num_iter=3, derivative="iteration"))
CONSTANT = Variant("constant ridge 0.25", ridge=Ridge(0.0, 0.25), repeated=False)
# the order in which they are measured
VARIANTS = (
    BASE,
    Variant("no decay", {"use_forgetting_gate": False, "use_forgetting_gate_kk": False}),
    Variant("no alpha", {"use_alpha_connection": False}),
    Variant("no beta", {"use_beta_gate": False}),
    _steps(3), DERIVED, _steps(8),
    Variant("ridge 0.1", {"ridge_ratio": 0.1}),
    Variant("ridge 0.05", {"ridge_ratio": 0.05}),
    Variant("ridge 0.01", {"ridge_ratio": 0.01}),
    Variant("no convolution", {"conv_size": 1}),
    Variant("own decay of H", own_decay=True),
    _steps(0, repeated=False), _steps(15),
    Variant("adaptive solver", {"solver": "adaptive"}),
    Variant("3 steps, ridge 0.3", {"num_iter": 3, "ridge_ratio": 0.3}, repeated=False),
    _steps(5, repeated=False), _steps(1, repeated=False),
    Variant("H without decay", {"use_forgetting_gate_kk": False}, repeated=False),
    CONSTANT,
)  # fmt: skip


def build(variant: Variant, layers: int, width: int, heads: int, length: int, seed: int) -> Any:
    """A decoder of bytes; every parameter that the baseline has begins as the baseline's of that seed."""
    from gka.models import GKAConfig, GKAForCausalLM

    def made(options: dict[str, Any]) -> Any:
        config = GKAConfig(
            vocab_size=WORDS, hidden_size=width, num_hidden_layers=layers, num_heads=heads,
            head_dim=width // heads, max_position_embeddings=length, tie_word_embeddings=True,
            use_cache=False, **options,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return GKAForCausalLM(config)

    model = made({})
    if variant.options:
        mine, base = made(variant.options), model.state_dict()
        known = mine.state_dict()
        same = {
            name: x for name, x in base.items() if name in known and x.shape == known[name].shape
        }
        mine.load_state_dict(same, strict=False)
        model = mine
    if variant.ridge is not None or variant.own_decay:
        replace(model, variant)
    return model


def replace(model: nn.Module, variant: Variant) -> None:
    """Make every GKA layer of the model the variant's."""
    for module in model.modules():
        if isinstance(module, GatedKalmaNet):
            AblatedMixer.of(module, variant)
