"""Which backend runs is chosen, queryable and never another one in silence."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gka.ops import available_backends, backends, last_backend, why_unavailable
from gka.ops.chunk import chunk_gka, chunk_simple_gla, fused_recurrent_gka
from problems import make_problem

OPS = [chunk_gka, fused_recurrent_gka, chunk_simple_gla]
TORCH = backends.get_backend("torch")


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    p = make_problem(3, dtype=torch.float32)
    return p.q, p.k, p.v


@pytest.fixture
def register(monkeypatch) -> Callable[..., None]:
    """Registrations that end with the test."""
    monkeypatch.setattr(backends, "_BACKENDS", dict(backends._BACKENDS))
    return backends.register_backend


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_a_fast_one_and_says_which(op, inputs):
    """ "auto" on a CPU is "torch"; "reference" runs when asked for; last_backend tells."""
    op(*inputs)
    assert last_backend() == "torch" == available_backends()[0]
    op(*inputs, backend="reference")
    assert last_backend() == "reference"


def test_backward_is_noted_too(inputs):
    """last_backend is that of the most recent forward or backward."""
    q, k, v = inputs
    o, _ = chunk_gka(q.requires_grad_(), k, v)
    chunk_gka(q.detach(), k, v, backend="reference")
    o.sum().backward()
    assert last_backend() == "torch"


@pytest.mark.parametrize("op", OPS)
def test_unknown_backend(op, inputs):
    """A name that no backend has raises and lists those there are."""
    with pytest.raises(ValueError, match=r"backend must be one of auto, .*got 'cuda9'"):
        op(*inputs, backend="cuda9")
    with pytest.raises(ValueError, match="backend must be one of"):
        why_unavailable("cuda9")


def test_unavailable_backend_raises_with_its_reason(register, inputs):
    """A registered backend that cannot run is known, not available, never chosen, and says why."""
    register(
        backends.Backend("busy", TORCH.forward, TORCH.backward, lambda *_: "it is busy."),
        first=True,
    )
    assert why_unavailable("busy") == "it is busy."
    assert "busy" not in available_backends()
    with pytest.raises(RuntimeError, match=r"backend='busy' cannot run.*it is busy.*torch"):
        chunk_gka(*inputs, backend="busy")
    chunk_gka(*inputs)
    assert last_backend() == "torch"


def test_a_new_backend_slots_in(register, inputs):
    """A backend registered first is what "auto" takes where it can run, and both its directions run."""
    calls = []

    def counted(name, run):
        def call(*args):
            calls.append(name)
            return run(*args)

        return call

    register(
        backends.Backend(
            "fast",
            {mode: counted(mode, run) for mode, run in TORCH.forward.items()},
            counted("backward", TORCH.backward),
            lambda call: None if call.dtype == torch.float32 else "float32 only.",
        ),
        first=True,
    )
    q, k, v = inputs
    o, _ = chunk_gka(q.requires_grad_(), k, v)
    o.sum().backward()
    fused_recurrent_gka(q, k, v)
    assert calls == ["chunk", "backward", "recurrent"]
    assert last_backend() == "fast" == available_backends()[0]
    assert why_unavailable("fast", dtype=torch.float64) == "float32 only."
    chunk_gka(*(x.detach().double() for x in inputs))
    assert last_backend() == "torch"


def test_triton_refuses_what_it_cannot_run(inputs, monkeypatch):
    """Without a GPU or an interpreter, the GPU kernels are refused with the reason."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        RuntimeError, match=r"backend='triton' cannot run this call: .*(GPU|triton)"
    ):
        chunk_gka(*inputs, backend="triton")


def test_triton_refuses_certificates_that_fit_no_chip(monkeypatch):
    """Wide float32 keys with the adaptive solver are refused on a GPU, and told how wide is possible."""
    pytest.importorskip("triton", reason="refused for the missing package before")
    from gka.kernels import configs

    monkeypatch.setattr(configs, "why_not", lambda *_: None)

    def asked(dtype: torch.dtype, solver, key_dim: int) -> str | None:
        return why_unavailable("triton", "cuda", dtype, solver, (key_dim, 64))

    reason = asked(torch.float32, "adaptive", 128)
    assert reason is not None and "up to 64 wide" in reason
    assert asked(torch.float32, "chebyshev", 128) is None
    assert asked(torch.bfloat16, "adaptive", 128) is asked(torch.float32, "adaptive", 64) is None


def test_a_gpu_that_is_not_there_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked about a GPU where torch sees none, the kernels' backends say so, and nothing is raised."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("hopper", "triton"):
        reason = why_unavailable(name, "cuda", torch.bfloat16)
        assert reason is not None and "sees no GPU" in reason
    assert available_backends("cuda", torch.bfloat16) == ["torch", "reference"]
