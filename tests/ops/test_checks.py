"""Every wrong argument is refused at the boundary, by name, with what was expected."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from gka.ops.chunk import chunk_gka, chunk_simple_gla, fused_recurrent_gka
from gka.ops.delta_rule import chunk_gated_delta_rule
from problems import make_problem


def good() -> dict[str, Any]:
    p = make_problem(6, (4, 2, 1), (8, 5), batch=2, dtype=torch.float32)
    return {"q": p.q, "k": p.k, "v": p.v, "g": p.g, "gk": p.g, "alpha": p.alpha, "beta": p.beta}


X = good()
H0, U0 = torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 5)
ONE = {name: x[:1] for name, x in X.items()}


def bounds(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def nested(x: Tensor, layout: torch.layout = torch.strided) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        return torch.nested.nested_tensor(list(x), layout=layout)


V, T = ValueError, TypeError
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": X["q"][0]}, V, r"q must have 4 dimensions \[B, T, heads, dim\]; got \[6, 4, 8\]"),
    ({"k": X["k"][0]}, V, "k must have 4 dimensions"),
    ({"v": None}, T, "v must be a torch.Tensor; got NoneType"),
    ({"q": X["q"].numpy()}, T, "q must be a torch.Tensor; got ndarray"),
    ({"q": X["q"].long()}, T, "q must be float64, float32, bfloat16 or float16; got torch.int64"),
    ({"v": X["v"].to(torch.complex64)}, T, "v must be float64"),
    ({"k": X["k"].double()}, T, "k must have q's dtype and device .*got torch.float64"),
    ({"v": X["v"].to("meta")}, T, "v must have q's dtype and device .*got .*meta"),
    ({"k": X["k"][:, :5]}, V, r"k must have q's batch and length \[2, 6, ...\]; got \[2, 5, 2, 8\]"),
    ({"v": X["v"][:1]}, V, "v must have q's batch and length"),
    ({"k": X["q"][:, :, :3]}, V, "q's 4 heads must be a multiple of k's; got 3"),
    ({"v": X["v"][:, :, :0]}, V, "q's 4 heads must be a multiple of v's; got 0"),
    ({"k": X["k"][..., :7]}, V, r"k must have q's head dimension 8; got \[2, 6, 2, 7\]"),
    ({"v": torch.zeros(2, 6, 1, 257)}, V, "v's head dimension must be between 1 and 256; got 257"),
    ({"v": torch.zeros(2, 6, 1, 0)}, V, "v's head dimension must be between 1 and 256; got 0"),
    ({"g": X["g"][..., :2]}, V, r"g must have shape \[B, T, H\] = \[2, 6, 4\]; got \[2, 6, 2\]"),
    ({"gk": X["g"].unsqueeze(-1)}, V, "gk must have shape"),
    ({"alpha": X["alpha"].long()}, T, "alpha must be a floating-point tensor; got torch.int64"),
    ({"beta": 0.5}, T, "beta must be a torch.Tensor; got float"),
    ({"beta": X["beta"].to("meta")}, T, "beta must be on cpu; got meta"),
    ({"num_iter": -1}, V, r"num_iter must be >= 0 \(0 leaves the ridge out\); got -1"),
    ({"num_iter": 3.0}, T, "num_iter must be an int; got 3.0"),
    ({"num_iter": True}, T, "num_iter must be an int; got True"),
    ({"ridge_ratio": 0.0}, V, "ridge_ratio must be > 0 and finite; got 0.0"),
    ({"ridge_ratio": -0.1}, V, "ridge_ratio must be > 0"),
    ({"ridge_ratio": float("nan")}, V, "ridge_ratio must be > 0 and finite; got nan"),
    ({"ridge_ratio": float("inf")}, V, "ridge_ratio must be > 0 and finite; got inf"),
    ({"ridge_ratio": "0.02"}, T, "ridge_ratio must be a number; got '0.02'"),
    ({"num_iter": 10**9}, V, "num_iter must be at most 10000; got 1000000000"),
    ({"ridge_ratio": 1e300}, V, "ridge_ratio must be between 1e-09 and 1e.09; got 1e.300"),
    ({"ridge_ratio": True}, T, "ridge_ratio must be a number; got True"),
    ({"scale": 1e300}, V, r"scale must be in float32's range; got 1e\+300"),
    ({"chunk_size": 10**12}, V, "chunk_size must be at most 4096; got 1000000000000"),
    ({"output_final_state": "yes"}, T, "output_final_state must be True or False; got 'yes'"),
    ({"q": X["q"].to_sparse()}, T, "q must be a dense tensor; got a sparse_coo one"),
    ({"g": X["g"].to_sparse()}, T, "g must be a dense tensor; got a sparse_coo one"),
    ({"k": X["k"].to_mkldnn()}, T, "k must be a dense tensor; got a mkldnn one"),
    ({"v": nested(X["v"])}, T, "v must be a dense tensor; got a nested one"),
    ({"beta": nested(X["beta"], torch.jagged)}, T, "beta must be a dense tensor; got a nested one"),
    ({"scale": "big"}, T, "scale must be a number; got 'big'"),
    ({"scale": float("nan")}, V, "scale must be finite; got nan"),
    ({"chunk_size": 0}, V, "chunk_size must be >= 1; got 0"),
    ({"chunk_size": 64.0}, T, "chunk_size must be an int; got 64.0"),
    ({"initial_state": H0}, T, r"initial_state must be a pair \(h_kk, h_kv\); got Tensor"),
    ({"initial_state": (H0,)}, T, "initial_state must be a pair"),
    ({"initial_state": (None, U0)}, T, r"initial_state\[0\] \(h_kk\) must be a torch.Tensor"),
    ({"initial_state": (U0, U0)}, V, r"initial_state\[0\] \(h_kk\) must have shape \[2, 4, 8, 8\]"),
    ({"initial_state": (H0, U0[:1])}, V, r"initial_state\[1\] \(h_kv\) must have shape \[2, 4, 8, 5\]"),
    ({"initial_state": (H0.double(), U0)}, T, "h_kk.* must be torch.float32 for torch.float32 inputs"),
    ({"initial_state": (H0, U0.to("meta"))}, T, "h_kv.* must be on cpu; got meta"),
    ({"cu_seqlens": bounds(0, 6)}, V, r"cu_seqlens.* come with B = 1; got B = 2"),
    ({**ONE, "cu_seqlens": [0, 6]}, T, "cu_seqlens must be a torch.Tensor; got list"),
    ({**ONE, "cu_seqlens": bounds(0)}, V, "cu_seqlens must be one-dimensional with at least 2"),
    ({**ONE, "cu_seqlens": bounds(0, 6)[None]}, V, r"cu_seqlens must be one-dimensional.*got \[1, 2\]"),
    ({**ONE, "cu_seqlens": torch.tensor([0.0, 6.0])}, T, "cu_seqlens must be int64 or int32"),
    ({**ONE, "cu_seqlens": bounds(0, 6).to("meta")}, T, "cu_seqlens must be on cpu; got meta"),
    ({**ONE, "cu_seqlens": bounds(0, 4, 3, 6)}, V, r"cu_seqlens must not decrease; got \[0, 4, 3, 6\]"),
    ({**ONE, "cu_seqlens": bounds(0, 5)}, V, r"cu_seqlens must start with 0 and end with T = 6; got 0 .. 5"),
    ({**ONE, "cu_seqlens": bounds(1, 6)}, V, "cu_seqlens must start with 0"),
    ({**ONE, "cu_seqlens": bounds(0, 2, 4, 6), "initial_state": (H0, U0)}, V,
     r"h_kk.* must have shape \[3, 4, 8, 8\]; got \[2, 4, 8, 8\]"),
    ({**ONE, "cu_seqlens_cpu": bounds(0, 6)}, V, "cu_seqlens_cpu is the CPU copy of cu_seqlens: pass"),
    ({**ONE, "cu_seqlens": bounds(0, 6), "cu_seqlens_cpu": [0, 6]}, T,
     "cu_seqlens_cpu must be a torch.Tensor; got list"),
    ({**ONE, "cu_seqlens": bounds(0, 6), "cu_seqlens_cpu": bounds(0, 6).to("meta")}, T,
     "cu_seqlens_cpu must be on the CPU; got meta"),
    ({**ONE, "cu_seqlens": bounds(0, 6), "cu_seqlens_cpu": bounds(0, 3, 6)}, V,
     r"cu_seqlens_cpu must have cu_seqlens' shape \[2\]; got \[3\]"),
    ({**ONE, "cu_seqlens": bounds(0, 6), "cu_seqlens_cpu": torch.tensor([0.0, 6.0])}, T,
     "cu_seqlens_cpu must be int64 or int32"),
    ({**ONE, "cu_seqlens": bounds(0, 6), "cu_seqlens_cpu": bounds(0, 5)}, V,
     r"cu_seqlens must start with 0 and end with T = 6; got 0 .. 5"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", range(len(WRONG)))
def test_wrong_argument_is_refused_by_name(case, backend):
    """The message names the argument, says what it must be and what came, whichever backend would run."""
    change, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        chunk_gka(**{**X, **change}, backend=backend)
    if "chunk_size" not in change:
        with pytest.raises(error, match=message):
            fused_recurrent_gka(**{**X, **change}, backend=backend)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ((H0, U0), TypeError, "initial_state must be a torch.Tensor; got tuple"),
        (U0[:1], ValueError, r"initial_state must have shape \[2, 4, 8, 5\]; got \[1, 4, 8, 5\]"),
        (U0.double(), TypeError, "initial_state must be torch.float32"),
    ],
)
def test_linear_attention_names_its_own_state(state, error, message):
    """chunk_simple_gla has one state, and its errors speak of that one."""
    with pytest.raises(error, match=message):
        chunk_simple_gla(X["q"], X["k"], X["v"], initial_state=state)


def test_unknown_arguments_are_refused():
    """No catch-all keyword swallows a typo."""
    with pytest.raises(TypeError, match="num_iters"):
        chunk_gka(X["q"], X["k"], X["v"], num_iters=3)  # pyright: ignore[reportCallIssue]


ASYMMETRIC = torch.zeros(2, 4, 8, 8)
ASYMMETRIC[..., 0, 1] = 1
BAD_VALUES = [
    ({"g": X["g"] + 1}, "g is a log decay and must be <= 0; its largest value is"),
    ({"gk": X["g"] + 1}, "gk is a log decay and must be <= 0"),
    ({"g": X["g"] * torch.nan}, "g holds NaN or infinity"),
    ({"g": torch.full_like(X["g"], -torch.inf)}, "g holds NaN or infinity"),
    ({"q": X["q"] / 0}, "q holds NaN or infinity"),
    ({"alpha": X["alpha"] * torch.nan}, "alpha holds NaN"),
    ({"initial_state": (H0 * torch.nan, U0)}, "h_kk holds NaN"),
    ({"initial_state": (ASYMMETRIC, U0)}, "h_kk must be symmetric"),
]


@pytest.mark.parametrize("case", range(len(BAD_VALUES)))
def test_values_are_checked_on_request(case, monkeypatch):
    """GKA_DEBUG=1 reads the values too, and names the tensor; without it nothing is read."""
    change, message = BAD_VALUES[case]
    monkeypatch.delenv("GKA_DEBUG", raising=False)
    chunk_gka(**{**X, **change})
    monkeypatch.setenv("GKA_DEBUG", "1")
    with pytest.raises(ValueError, match=message):
        chunk_gka(**{**X, **change})


def test_a_wrong_copy_of_the_lengths_is_found_on_request(monkeypatch):
    """GKA_DEBUG=1 compares cu_seqlens_cpu with cu_seqlens; without it cu_seqlens is not read."""
    packed = {**ONE, "cu_seqlens": bounds(0, 2, 6), "cu_seqlens_cpu": bounds(0, 3, 6)}
    chunk_gka(**packed)
    monkeypatch.setenv("GKA_DEBUG", "1")
    with pytest.raises(ValueError, match=r"must equal cu_seqlens \[0, 2, 6\]; got \[0, 3, 6\]"):
        chunk_gka(**packed)


def test_keys_too_large_for_a_backend_are_refused_on_request(monkeypatch):
    """GKA_DEBUG=1 refuses keys whose |H|^2 overflows, in backends that square it as it is."""
    large = {**X, "k": 1e10 * X["k"]}
    assert chunk_gka(**large, backend="torch")[0].isfinite().all()
    monkeypatch.setenv("GKA_DEBUG", "1")
    chunk_gka(**large, backend="torch")
    with pytest.raises(
        ValueError, match=r"k holds a key of norm 1.0e\+10: with backend='reference'"
    ):
        chunk_gka(**large, backend="reference")


def test_meta_tensors_give_shapes():
    """On the meta device the ops compute nothing and tell shapes; packed lengths must come as a CPU copy."""
    x = {name: y.to("meta") for name, y in X.items()}
    for op in (chunk_gka, fused_recurrent_gka):
        o, state = op(**x, output_final_state=True, solver="adaptive")
        assert o.device.type == "meta" and o.shape == (2, 6, 4, 5)
        assert (
            state is not None and state[0].shape == (2, 4, 8, 8) and state[1].shape == (2, 4, 8, 5)
        )
    packed = {name: y[:1] for name, y in x.items() if name in "qkv"}
    with pytest.raises(ValueError, match="cu_seqlens has no values on the meta device: pass"):
        chunk_gated_delta_rule(**packed, cu_seqlens=bounds(0, 6).to("meta"))


def test_debug_lets_good_values_pass(monkeypatch):
    """GKA_DEBUG=1 refuses nothing that is right: states as the op returns them, empty inputs, no gates."""
    monkeypatch.setenv("GKA_DEBUG", "1")
    for _ in range(20):  # a state of uninitialised memory would show sooner or later
        torch.full((2, 4, 8, 8), torch.nan)
        chunk_simple_gla(X["q"], X["k"], X["v"], X["g"], initial_state=U0)
    _, state = chunk_gka(**X, output_final_state=True)
    chunk_gka(**X, initial_state=state)
    chunk_gka(**{name: x[:, :0] for name, x in X.items()})


@pytest.mark.parametrize("op", [chunk_gka, fused_recurrent_gka])
def test_no_sequences_with_the_adaptive_solver(op):
    """Of B = 0 sequences the longest number of steps is 0."""
    x = torch.randn(0, 5, 2, 4, requires_grad=True)
    o, _ = op(x, x, x, solver="adaptive")
    o.sum().backward()
    assert o.shape == x.shape and x.grad is not None


@pytest.mark.parametrize("op", [chunk_gka, fused_recurrent_gka, chunk_simple_gla])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("shape", [(2, 0), (0, 5), (0, 0)])
def test_empty_inputs(op, backend, shape):
    """No tokens, or no sequences: empty outputs, the initial states handed on, gradients of their shapes."""
    batch, length = shape
    x = torch.randn(batch, length, 2, 4, requires_grad=True)
    h0 = torch.eye(4).expand(batch, 2, 4, 4).contiguous().requires_grad_()
    u0 = torch.randn(batch, 2, 4, 4, requires_grad=True)
    simple = op is chunk_simple_gla
    o, final = op(
        x, x, x, initial_state=u0 if simple else (h0, u0), output_final_state=True, backend=backend
    )
    assert o.shape == x.shape
    h, u = (h0, final) if simple else final
    if length == 0:
        assert torch.equal(h, h0) and torch.equal(u, u0)
    (2 * u.sum() + h.sum() + o.sum()).backward()
    assert u0.grad is not None and u0.grad.shape == u0.shape
    assert (u0.grad == 2).all() or length


@pytest.mark.parametrize("op", [chunk_gka, fused_recurrent_gka])
def test_empty_packed_sequences(op):
    """cu_seqlens of empty sequences only: their states pass through."""
    x = torch.randn(1, 0, 2, 4)
    state = (torch.eye(4).expand(3, 2, 4, 4).contiguous(), torch.randn(3, 2, 4, 4))
    o, final = op(
        x, x, x, initial_state=state, output_final_state=True, cu_seqlens=bounds(0, 0, 0, 0)
    )
    assert o.shape == (1, 0, 2, 4)
    assert torch.equal(final[0], state[0]) and torch.equal(final[1], state[1])
