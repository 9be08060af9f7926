"""The sketched ops against their definition, token by token from whole moments in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gka.errors import InputError
from gka.maths.sketch import orthonormal, sketched_sequence
from gka.ops import chunk_gka, chunk_simple_gla
from gka.ops.sketch import (
    chunk_sketched_gka,
    fused_recurrent_sketched_gka,
    fused_recurrent_sketched_gka_,
)
from problems import Problem, make_problem
from tolerances import RELATIVE, assert_close

EXACT = 1e-9
STEPS = 120  # 2 R^121 < 1e-14 at a = 0.02
HEADS = (4, 2, 1)
DIMS = (10, 6)


def basis_of(dim: int = 4, heads: int = HEADS[1], key_dim: int = DIMS[0]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return orthonormal(torch.randn(heads, key_dim, dim, generator=generator, dtype=torch.float64))


def whole(p: Problem, basis: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The definition from empty states: o, H and U."""
    heads = p.q.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (p.k, p.v))
    maps = basis.repeat_interleave(heads // len(basis), 0)
    h, u = (k.new_zeros(len(k), heads, k.shape[-1], n) for n in (k.shape[-1], v.shape[-1]))
    given = (p.g, p.g if p.tied else p.gk, p.alpha, p.beta)
    settings = {"scale": 1.0, "ridge_ratio": 0.02, "num_iter": STEPS, **options}
    o, (h, u) = sketched_sequence(p.q, k, v, maps, *given, (h, u), **settings)
    return o, h, u


def ours(p: Problem, basis: Tensor, op: Any = chunk_sketched_gka, **options: Any) -> Any:
    settings = {
        "scale": 1.0,
        "num_iter": STEPS,
        "beta": p.beta,
        "output_final_state": True,
        **options,
    }
    return op(p.q, p.k, p.v, basis, p.g, p.g if p.tied else p.gk, p.alpha, **settings)


@pytest.mark.parametrize(
    ("decay", "gates"), [("tied", "ab"), ("separate", "b"), ("of U only", "a"), ("absent", "")]
)
def test_results_and_gradients_are_those_of_the_definition(decay: Any, gates: str) -> None:
    """o, the states S^T H S, S^T U and U, and all gradients, the map's among them, from all of these; chunk
    by chunk and token by token, for grouped heads."""
    p, basis = make_problem(70, HEADS, DIMS, decay=decay, gates=gates, states=False), basis_of()
    expected = p.leaves()
    map_ = basis.clone().requires_grad_()
    o, h, u = whole(expected, map_, solver="exact")
    maps = map_.repeat_interleave(2, 0)
    states = (maps.mT @ h @ maps, maps.mT @ u, *((u,) if p.alpha is not None else ()))
    weights = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        for n, x in enumerate((o, *states))
    ]

    def gradients(results: tuple[Tensor, ...], leaves: Problem, map_: Tensor) -> dict[str, Tensor]:
        total = torch.stack([(x * w).sum() for x, w in zip(results, weights, strict=True)]).sum()
        named = leaves.tensors() | {"sketch": map_}
        return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))

    wanted = gradients((o, *states), expected, map_)
    for op in (chunk_sketched_gka, fused_recurrent_sketched_gka):
        leaves, own = p.leaves(), basis.clone().requires_grad_()
        found, final = ours(leaves, own, op)
        assert len(final) == len(states)
        for x, y in zip((found, *final), (o, *states), strict=True):
            assert_close(x, y, EXACT)
        for name, x in gradients((found, *final), leaves, own).items():
            assert_close(x, wanted[name], EXACT, f"d{name}")


def test_a_learned_map_has_no_gradient_along_its_span() -> None:
    """W^T dW = 0 for the weight of an orthonormal map: only its span matters."""
    p = make_problem(40, HEADS, DIMS, states=False)
    weight = (basis_of() @ torch.randn(2, 4, 4, dtype=torch.float64)).requires_grad_()
    o, _ = ours(p, orthonormal(weight))
    (grad,) = torch.autograd.grad(o.sin().sum(), weight)
    assert grad.norm() > 1e-3
    assert (weight.mT @ grad).abs().max() < EXACT * grad.norm() * weight.norm()


def test_without_a_solve_it_is_gated_linear_attention() -> None:
    """alpha = 0 gives chunk_simple_gla, whatever the map; d = K gives chunk_gka."""
    p = make_problem(70, HEADS, DIMS, states=False)
    none = torch.zeros_like(p.g if p.g is not None else p.q)
    o = chunk_sketched_gka(p.q, p.k, p.v, basis_of(), p.g, p.g, none, beta=p.beta)[0]
    assert_close(o, chunk_simple_gla(p.q, p.k, p.v, p.g, beta=p.beta)[0], EXACT)
    o = chunk_sketched_gka(p.q, p.k, p.v, basis_of(10), p.g, p.g, p.alpha, beta=p.beta)[0]
    assert_close(o, chunk_gka(p.q, p.k, p.v, p.g, p.g, p.alpha, beta=p.beta)[0], EXACT)


@pytest.mark.parametrize("gates", ["ab", "b"])
def test_states_go_on_where_they_ended(gates: str) -> None:
    """Split in two, packed, and a first packed sequence that starts from states: as each by itself."""
    p, basis = make_problem(100, HEADS, DIMS, gates=gates, states=False), basis_of()
    o, final = ours(p, basis)
    first, state = ours(p.tokens(0, 37), basis)
    second, end = ours(p.tokens(37, None), basis, initial_state=state)
    assert_close(torch.cat([first, second], 1), o, EXACT)
    for x, y in zip(end, final, strict=True):
        assert_close(x, y, EXACT)
    bounds = torch.tensor([0, 63, 100])
    alone = [
        ours(p.tokens(63 * i, 63 + 37 * i), basis, initial_state=s)
        for i, s in ((0, state), (1, None))
    ]
    packed, ends = ours(p, basis, cu_seqlens=bounds, initial_state=state)
    assert_close(packed, torch.cat([x for x, _ in alone], 1), EXACT)
    for n, x in enumerate(ends):
        assert_close(x, torch.cat([e[n] for _, e in alone]), EXACT)


@pytest.mark.parametrize("gates", ["ab", "b"])
def test_states_in_place(gates: str) -> None:
    """Decoding writes the states that a call with final states returns; commit=False leaves them."""
    p, basis = make_problem(40, HEADS, DIMS, gates=gates, states=False, batch=3), basis_of()
    o, final = ours(p, basis)
    _, state = ours(p.tokens(0, 38), basis)
    last = p.tokens(38, None)
    given = (last.q, last.k, last.v, basis, last.g, last.g, last.alpha)
    options: dict[str, Any] = {"scale": 1.0, "num_iter": STEPS, "beta": last.beta, "state": state}
    before = [x.clone() for x in state]
    for commit in (False, True):
        assert_close(
            fused_recurrent_sketched_gka_(*given, commit=commit, **options), o[:, 38:], EXACT
        )
        for x, y in zip(state, final if commit else before, strict=True):
            assert_close(x, y, EXACT)


def test_lower_precision_is_as_exact_as_the_plain_op() -> None:
    """float32 and bfloat16 inputs, within their tolerances of float64 on the same values."""
    p, basis = make_problem(150, HEADS, (16, 16), states=False), basis_of(8, key_dim=16)
    for dtype in (torch.float32, torch.bfloat16):
        low = p.map(lambda x, dtype=dtype: x.to(dtype))
        o, _ = ours(low, basis.to(dtype), num_iter=30)
        assert o.dtype == dtype
        exact, _, _ = whole(low.map(lambda x: x.double()), basis.to(dtype).double(), num_iter=30)
        assert_close(o, exact, RELATIVE[dtype], str(dtype))


def test_wrong_calls() -> None:
    """Each names the argument and what was expected; states in place are unchanged."""
    p, basis = make_problem(5, HEADS, DIMS, states=False), basis_of()
    q, k, v, other = p.q, p.k, p.v, p.q
    none: Any = None
    wrong: list[tuple[str, Any]] = [
        (r"sketch must be \[Hk, K, d\] = \[2, 10\]", lambda: chunk_sketched_gka(q, k, v, basis[:1])),
        ("d from 1 to 10", lambda: chunk_sketched_gka(q, k, v, basis[..., :0])),
        ("sketch must be a float tensor", lambda: chunk_sketched_gka(q, k, v, basis.long())),
        ("initial_state must hold 3 states", lambda: chunk_sketched_gka(
            q, k, v, basis, alpha=p.alpha, initial_state=(p.q, p.q))),
        ("initial_state must hold 2 states", lambda: chunk_sketched_gka(
            q, k, v, basis, initial_state=(other, other, other))),
        ("alpha must have shape", lambda: chunk_sketched_gka(q, k, v, basis, alpha=p.q)),
    ]  # fmt: skip
    for words, call in wrong:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match=r"sketch must be a torch\.Tensor"):
        chunk_sketched_gka(q, k, v, none)
    assert issubclass(InputError, ValueError)
    state = tuple(torch.ones(1, 4, *n, dtype=torch.float64) for n in ((4, 4), (4, 6), (10, 5)))
    with pytest.raises(ValueError, match="h_kv"):
        fused_recurrent_sketched_gka_(q, k, v, basis, alpha=p.alpha, state=state)
    assert all(x.eq(1).all() for x in state)
