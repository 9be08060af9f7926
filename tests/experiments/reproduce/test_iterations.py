"""The iterations whose residuals `convergence` compares, and the systems that it draws."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gka.experiments.numerics import family
from gka.experiments.reproduce import trained
from gka.experiments.reproduce.iterations import METHODS, Ridge, residuals, rounded
from gka.maths.solvers.adaptive import Adaptive
from gka.maths.solvers.chebyshev import Chebyshev, chebyshev_error
from gka.models import GKAConfig, GKAForCausalLM
from gka.serving.inspection import inspect_model

A = 0.02


@pytest.fixture(scope="module")
def systems() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    k, q = (family("SiLU", 4 * 64, 16).view(4, 64, 16).double() for _ in range(2))
    return trained.sampled(q, k, torch.full((4, 64), -0.01, dtype=torch.float64), 3)


def test_sampled_states_are_those_of_the_recursion(systems: tuple[Tensor, Tensor]) -> None:
    """H_t = gamma H_{t-1} + k k^T at evenly spaced tokens, the last among them, with their queries."""
    torch.manual_seed(0)
    k, q = (family("SiLU", 4 * 64, 16).view(4, 64, 16).double() for _ in range(2))
    state, wanted = torch.zeros(4, 16, 16, dtype=torch.float64), []
    for t in range(64):
        state = 0.99004983374916811 * state + k[:, t, :, None] * k[:, t, None]
        if t in (21, 42, 63):
            wanted.append(state)
    h, queries = systems
    torch.testing.assert_close(h, torch.stack(wanted, 1).flatten(0, 1))
    torch.testing.assert_close(queries, q[:, [21, 42, 63]].flatten(0, 1))


def test_tf32_and_bfloat16_round_to_nearest_even() -> None:
    """TF32 keeps 10 bits of the mantissa; ties go to the even neighbour."""
    unit = 2.0**-10
    x = torch.tensor([1 + unit / 2, 1 + 1.5 * unit, 1 + 0.51 * unit, -1 - 0.49 * unit, 0.0, 3e38])
    wanted = torch.tensor([1.0, 1 + 2 * unit, 1 + unit, -1.0, 0.0])
    assert torch.equal(rounded(x, "TF32")[:5], wanted)
    assert torch.equal(rounded(x, "bfloat16")[:5], x.bfloat16().float()[:5])
    assert torch.equal(rounded(x, "float32"), x)
    normal = torch.randn(1000)
    assert ((rounded(normal, "TF32") / normal - 1).abs() <= 2.0**-11).all()


def test_every_method_converges_to_the_ridge_solution(systems: tuple[Tensor, Tensor]) -> None:
    """In float64, slowest gradient descent, fastest conjugate gradients; Chebyshev within its bound."""
    h, q = systems
    ridge = Ridge.of(h, q, A, "float64")
    found = {m: residuals(h, q, ridge, m, 60).amax(1) for m in METHODS}
    assert all(len(curve) == 61 for curve in found.values())
    kappa = (1 + A) / A
    for n in (10, 30, 60):
        assert found["Chebyshev"][n] <= chebyshev_error(A, n) * 1.0001
        assert found["gradient descent"][n] <= ((kappa - 1) / (kappa + 1)) ** n
        assert found["conjugate gradients"][n] < found["Chebyshev"][n]
        assert found["Chebyshev"][n] < found["Nesterov"][n] < 1
    assert found["conjugate gradients"][-1] < 1e-12


def test_chebyshev_and_adaptive_are_the_librarys(systems: tuple[Tensor, Tensor]) -> None:
    """Their last iterates are those of the solvers that models use."""
    h, q = systems
    ridge = Ridge.of(h, q, A, "float64")
    for name, solver in (("Chebyshev", Chebyshev), ("adaptive", Adaptive)):
        x = list(METHODS[name](ridge, 30))[-1][:, 0]
        torch.testing.assert_close(x, solver(A, 30).solve_state(h[:, None], q[:, None]))


def test_bfloat16_operands_leave_a_floor(systems: tuple[Tensor, Tensor]) -> None:
    """No method gets below the rounding of H, by a factor of hundreds above float32."""
    h, q = systems
    coarse, fine = (Ridge.of(h, q, A, p) for p in ("bfloat16", "float32"))
    for method in ("conjugate gradients", "Chebyshev"):
        floors = [residuals(h, q, r, method, 60)[-1].median() for r in (coarse, fine)]
        assert 1e-4 < floors[0] < 0.05 and floors[0] > 300 * floors[1]


def test_systems_of_a_model_are_those_that_inspect_measures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """H_t of every layer and head, with beta and decay: |H_t| as `inspect_model` finds it."""
    torch.manual_seed(0)
    shape: Any = {"vocab_size": 20, "hidden_size": 16, "num_heads": 2, "num_hidden_layers": 2}
    model = GKAForCausalLM(GKAConfig(head_dim=8, **shape)).eval()
    ids = torch.randint(20, (24,))
    monkeypatch.setattr(trained, "held_out_ids", lambda folder, most: (model, ids[:most]))
    h, q = trained.trained_systems(Path("run"), 24, 3)
    assert h.shape == (12, 8, 8) and q.shape == (12, 8)
    curves = [layer["curves"] for layer in inspect_model(model, ids, positions=3)["layers"]]
    wanted = [
        curve["fro"][place][head] for curve in curves for head in (0, 1) for place in range(3)
    ]
    found = h.square().sum((-2, -1)).sqrt()
    torch.testing.assert_close(found, torch.tensor(wanted).double(), rtol=1e-5, atol=1e-7)
