"""Public functional calls of the layer's map."""

from gka.ops.backends import available_backends, last_backend, why_unavailable
from gka.ops.chunk import chunk_gka, chunk_simple_gla, fused_recurrent_gka
from gka.ops.combine import combine_states, mean_states, sum_states
from gka.ops.decode import advance_states_, fused_recurrent_gka_
from gka.ops.end_state import EndState, end_state
from gka.ops.external import available_external, why_not_external
from gka.ops.reference import solver_steps
from gka.ops.sketch import (
    chunk_sketched_gka,
    fused_recurrent_sketched_gka,
    fused_recurrent_sketched_gka_,
    orthonormal,
)

__all__ = [
    "chunk_gka",
    "fused_recurrent_gka",
    "fused_recurrent_gka_",
    "advance_states_",
    "chunk_simple_gla",
    "chunk_sketched_gka",
    "fused_recurrent_sketched_gka",
    "fused_recurrent_sketched_gka_",
    "orthonormal",
    "available_backends",
    "why_unavailable",
    "last_backend",
    "available_external",
    "why_not_external",
    "solver_steps",
    "end_state",
    "EndState",
    "combine_states",
    "sum_states",
    "mean_states",
]
