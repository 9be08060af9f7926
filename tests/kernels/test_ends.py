"""The kernels of end states compute what `maths.ends` computes (interpreted without a GPU)."""

from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from gka.ops import end_state
from problems import Problem, make_problem
from tolerances import RELATIVE, assert_close

pytest.importorskip("triton", reason="the kernels need the package triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CASES: dict[str, dict[str, Any]] = {
    "tied": {"length": 150, "decay": "tied", "batch": 2},
    "separate, grouped, odd sizes": {
        "length": 128, "heads": (4, 1, 2), "dims": (20, 40), "decay": "separate",
    },
    "no decay, no gate": {"length": 70, "decay": "absent", "gates": ""},
    "of H only": {"length": 70, "heads": (2, 2, 1), "decay": "of H only"},
    "packed": {"length": 0, "decay": "separate", "lengths": [0, 1, 150, 63, 0]},
    "no tokens": {"length": 0, "batch": 2},
    "packed, all empty": {"length": 0, "decay": "separate", "lengths": [0, 0]},
    "blocks of columns": {"length": 64, "heads": (1, 1, 1), "dims": (80, 130)},
}  # fmt: skip


def results(p: Any) -> dict[str, Tensor]:
    """Totals, states and all gradients."""
    gk = p.g if p.tied else p.gk
    totals, h, u, _ = end_state(p.k, p.v, p.g, gk, p.beta, p.cu_seqlens, num_heads=p.q.shape[2])
    given = {"h": h, "u": u, "total g": totals.g, "total gk": totals.gk}
    found = {name: x for name, x in given.items() if x is not None}
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64, device=h.device)
    for x in found.values():
        weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        loss = loss + (x.double() * weight.to(x.device)).sum()
    names = [n for n in ("k", "v", "g", "gk", "beta") if getattr(p, n) is not None]
    grads = torch.autograd.grad(loss, [getattr(p, n) for n in names])
    return found | {f"d{n}": x for n, x in zip(names, grads, strict=True)}


def cast(p: Problem, dtype: torch.dtype, device: str) -> Problem:
    """Heads in the dtype, gates in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    tensors = {
        n: x.to(device, dtype if n in ("q", "k", "v") else wide) for n, x in p.tensors().items()
    }
    bounds = None if p.cu_seqlens is None else p.cu_seqlens.to(device)
    return replace(p, **tensors, cu_seqlens=bounds).leaves()


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch):
    """Let the kernels run wherever Triton or its interpreter does."""
    module = import_module("gka.ops.end_state")

    def switch() -> None:
        monkeypatch.setattr(module, "why_not_kernels", lambda inputs: None)

    return switch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_torch_form(name: str, dtype: torch.dtype, by_kernels) -> None:
    """Totals, H, U and every gradient are those of the float64 form on the same inputs."""
    if dtype == torch.bfloat16 and name not in ("tied", "packed"):
        pytest.skip("one dtype is enough for shapes")
    p = cast(make_problem(**CASES[name], states=False), dtype, DEVICE)
    expected = results(cast(p, torch.float64, "cpu"))
    by_kernels()
    actual = results(p)
    assert actual.keys() == expected.keys()
    for key, x in expected.items():
        close = RELATIVE[torch.float32] if dtype == torch.float32 else 4e-3
        assert_close(actual[key].cpu(), x, close, key)


def test_chunks_that_have_faded_are_not_read(by_kernels) -> None:
    """Tokens before a decay of e^-200 have no part in the states and zero gradients, even if they are NaN."""
    by_kernels()
    p: Any = cast(make_problem(192, states=False), torch.float32, DEVICE)
    g, k = p.g.detach().clone(), p.k.detach().clone()
    g[:, 70:80] = -20.0
    k[:, :64] = torch.nan
    k.requires_grad_()
    _, h, u, _ = end_state(k, p.v, g, g, p.beta)
    (h.sum() + u.sum()).backward()
    assert bool(h.isfinite().all()) and bool(u.isfinite().all())
    assert k.grad is not None and not k.grad[:, :64].any() and bool(k.grad.isfinite().all())
