"""The Gated KalmaNet layer (arXiv 2511.21016): ridge regression over the whole faded past."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from gka.layers.parts.heads import split_heads
from gka.layers.parts.sketch import Sketch, SketchKind, check_sketch
from gka.layers.parts.surround import Gates, MixCall
from gka.layers.recurrent_mixer import RecurrentMixer
from gka.maths.sketch import project
from gka.ops import chunk_gka, fused_recurrent_gka, fused_recurrent_gka_
from gka.ops.backends import check_known
from gka.ops.checks import check_flags, check_numbers, check_solver
from gka.ops.sketch import (
    chunk_sketched_gka,
    fused_recurrent_sketched_gka,
    fused_recurrent_sketched_gka_,
)


class GatedKalmaNet(RecurrentMixer):
    """Gated KalmaNet, with the parameter names of the released models.

    q, k, v are short convolutions + SiLU of linear maps of the hidden states; q and k have unit norm;
    beta = sigmoid(b_proj) + 1e-6, alpha = sigmoid(alpha_proj) and
    g = -exp(A_log) softplus(a_proj + dt_bias) gate `chunk_gka`; its readout goes through a gated
    RMSNorm and o_proj. Cached calls of up to `recurrent_mixer.DECODE_TOKENS` tokens without gradient run
    the same map token by token (`fused_recurrent_gka_`), in place if the cache holds states; all other
    calls run `chunk_gka`.

    Args:
        hidden_size: width of the hidden states.
        expand_v: value head dim V over head_dim; V must be an integer, at most 256.
        head_dim: K, of queries and keys, at most 256, the ops' limit in every backend.
        num_heads: query heads.
        num_v_heads: value heads, a multiple of num_heads (more value than key heads). None: as many as keys.
        num_kv_heads: key and value heads, a divisor of num_heads (grouped heads). None: num_heads.
            Not together with num_v_heads.
        num_k_heads: key heads, if their number differs from that of value heads (num_v_heads; None: as many
            as keys). Each count must divide the largest of the three. Not together with num_kv_heads.
        kv_rank: rank of the learned maps that expand key and value heads to all heads. None: heads are
            shared.
        kv_mix: whether a learned matrix replaces the repetition of heads, to which these maps are added.
        use_beta_gate: whether beta scales k and v.
        use_alpha_connection: whether alpha mixes the solution with the query; else it is used alone.
        use_v_conv: whether values are convolved; if not, they are v_proj's output.
        use_forgetting_gate: whether the memory decays.
        use_forgetting_gate_kk: whether H decays with the same gate as U; else H does not decay.
        gla_rescale: whether the readout is scaled by head_dim^-1/2.
        ridge_ratio: a > 0 of lambda_t = a |H_t|_F.
        num_iter: Chebyshev iterations >= 0; 0 is gated linear attention.
        use_gate: whether the output norm is gated.
        conv_size: inputs a short convolution sees.
        layer_idx: the layer's place in a cache.
        norm_eps: epsilon of the output norm.
        backend: of the ops and of the modules around them: "auto", or one of `gka.ops.available_backends`;
            "torch" and "reference" run plain torch throughout.
        solver: of the ops: "chebyshev", or "adaptive" or "cg" for fewer steps with the same error bound.
        sketch_dim: d, in whose dimensions the ridge system is solved (`chunk_sketched_gka`). None: in all K.
        sketch: "learned", a map that is trained with the layer, or "fixed", random until `sketch_map.load`
            sets a measured basis (`gka.models.sketched`).

    Attributes:
        keep_states: whether calls with gradient keep the states at chunk starts for the backward pass, as in
            `chunk_gka`; False at first (`gka.models.keep_states`).

    Raises:
        ValueError: sizes or options that do not fit; the message names which.
    """

    num_states = 2  # h_kk, h_kv; a sketched layer with alpha has h_kv of whole keys, too
    beta_eps = 1e-6

    sketch_map: Sketch  # with sketch_dim

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 1.0,
        head_dim: int = 128,
        num_heads: int = 16,
        num_v_heads: int | None = None,
        num_kv_heads: int | None = None,
        use_beta_gate: bool = True,
        use_alpha_connection: bool = True,
        use_v_conv: bool = True,
        use_forgetting_gate: bool = True,
        use_forgetting_gate_kk: bool = True,
        gla_rescale: bool = True,
        ridge_ratio: float = 0.02,
        num_iter: int = 30,
        use_gate: bool = True,
        conv_size: int = 4,
        layer_idx: int | None = None,
        norm_eps: float = 1e-6,
        backend: str = "auto",
        solver: str = "chebyshev",
        num_k_heads: int | None = None,
        kv_rank: int | None = None,
        kv_mix: bool = False,
        sketch_dim: int | None = None,
        sketch: SketchKind = "learned",
    ):
        if isinstance(num_iter, int) and num_iter < 0:
            raise ValueError(f"num_iter must be 0 or more, got {num_iter}")
        if isinstance(ridge_ratio, int | float) and not ridge_ratio > 0:
            raise ValueError(f"ridge_ratio must be above 0, got {ridge_ratio}")
        check_numbers(ridge_ratio, num_iter, chunk_size=1)
        check_flags(
            use_beta_gate=use_beta_gate, use_alpha_connection=use_alpha_connection,
            use_forgetting_gate_kk=use_forgetting_gate_kk, gla_rescale=gla_rescale, kv_mix=kv_mix,
        )  # fmt: skip
        super().__init__(
            hidden_size, **split_heads(num_heads, num_kv_heads, num_v_heads, num_k_heads),
            expand_v=expand_v, head_dim=head_dim, use_v_conv=use_v_conv,
            use_forgetting_gate=use_forgetting_gate, use_gate=use_gate, conv_size=conv_size,
            layer_idx=layer_idx, norm_eps=norm_eps,
        )  # fmt: skip
        self.use_beta_gate = use_beta_gate
        self.use_alpha_connection = use_alpha_connection
        self.use_forgetting_gate_kk = use_forgetting_gate_kk
        self.scale = head_dim**-0.5 if gla_rescale else 1.0
        self.ridge_ratio = ridge_ratio
        self.num_iter = num_iter
        check_known(backend)
        self.backend = backend
        self.solver = check_solver(solver)
        self.keep_states = False
        if kv_mix and kv_rank is None:
            raise ValueError("kv_mix is a part of the learned expansion: it needs kv_rank")
        if kv_rank is not None:
            self._add_expansions(kv_rank, kv_mix)
        self.sketch_dim = sketch_dim
        check_sketch(sketch_dim, sketch, head_dim)
        if sketch_dim is not None:
            keys = self.num_k_heads if kv_rank is None else self.num_expanded_heads
            self.sketch_map = Sketch(keys, head_dim, sketch_dim, sketch)
            self.num_states = 3 if use_alpha_connection else 2
        if use_beta_gate:
            self.b_proj = nn.Linear(hidden_size, self.num_expanded_heads)
        if use_alpha_connection:
            self.alpha_proj = nn.Linear(hidden_size, self.num_expanded_heads)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Gates, call: MixCall
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        # gk is g, the same tensor: this tells the op that one decay serves both states
        gk = gates.g if self.use_forgetting_gate_kk else None
        chunk, recurrent, in_place = self._ops()
        maps = () if self.sketch_dim is None else (self.sketch_map(),)
        given: tuple[Any, ...] = (
            q, k, v, *maps, gates.g, gk, gates.alpha, self.scale, self.ridge_ratio, self.num_iter,
        )  # fmt: skip
        if call.in_place and self.backend != "reference":  # which has no ops in place
            o = in_place(
                *given, state=call.states, beta=gates.beta, backend=self.backend, solver=self.solver
            )
            return o, ()
        chunks = partial(chunk, context=call.context, keep_states=self.keep_states)
        op = recurrent if call.stepwise else chunks
        o, states = op(
            *given, initial_state=call.states or None, output_final_state=call.keep,
            cu_seqlens=call.cu_seqlens, beta=gates.beta, backend=self.backend, solver=self.solver,
            cu_seqlens_cpu=call.cu_seqlens_cpu,
        )  # fmt: skip
        return o, states or ()

    def _ops(self) -> tuple[Any, Any, Any]:
        """Chunk by chunk, token by token, and in place."""
        if self.sketch_dim is None:
            return chunk_gka, fused_recurrent_gka, fused_recurrent_gka_
        return chunk_sketched_gka, fused_recurrent_sketched_gka, fused_recurrent_sketched_gka_

    def as_solved(self, x: Tensor) -> Tensor:
        """Queries or keys [B,T,heads,K] as the ridge system has them: S^T x [B,T,heads,d] if sketched."""
        return x if self.sketch_dim is None else project(x, self.sketch_map().to(x.dtype))

    @property
    def state_shapes(self) -> list[tuple[int, ...]]:
        heads, k, v = self.num_expanded_heads, self.head_dim, self.head_v_dim
        inside = k if self.sketch_dim is None else self.sketch_dim
        shapes = [(heads, inside, inside), (heads, inside, v), (heads, k, v)]
        return shapes[: self.num_states]
