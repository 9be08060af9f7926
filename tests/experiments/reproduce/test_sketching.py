"""Parts of `sketching`: the error that it measures, its checks and its cells."""

from typing import Any

import pytest
import torch

from gka.errors import InputError
from gka.experiments.reproduce import sketch_speed
from gka.experiments.reproduce.experiment import Options, outcome_of
from gka.experiments.reproduce.sketch_report import loss_of, table
from gka.experiments.reproduce.sketch_speed import Shape, errors, state_bytes
from gka.experiments.reproduce.sketched_models import (
    BASES,
    KEYS,
    WITH_RIDGE,
    draw_keys,
    random_basis,
    sketch_error,
)
from gka.experiments.reproduce.sketching import SKETCHING, cells, checks
from gka.maths.reference import solve_ridge
from gka.maths.sketch import spectral_basis


def test_the_error_is_that_of_a_readout_of_independent_values() -> None:
    """Over many draws of the values, |U^T (S x' - x)| / |U^T x| is the error, within 3 %."""
    generator = torch.Generator().manual_seed(0)
    k = draw_keys("SiLU", 1, 24, 6, generator)[0]
    h, q = k.mT @ k, draw_keys("SiLU", 1, 1, 6, generator)[0, 0]
    s = random_basis(h, 3, generator)
    x = solve_ridge(h, q, 0.02, 1, "exact")
    wrong = s @ solve_ridge(s.mT @ h @ s, s.mT @ q, 0.02, 1, "exact") - x
    u = k.mT @ torch.randn(24, 20_000, generator=generator, dtype=torch.float64)
    drawn = (u.mT @ wrong).norm() / (u.mT @ x).norm()
    assert abs(sketch_error(h[None], q[None], s) / float(drawn) - 1) < 0.03
    assert sketch_error(h[None], q[None], spectral_basis(h, 6)) < 1e-12
    whole = sketch_error(h[None], q[None], s, whole_ridge=True)
    assert whole != sketch_error(h[None], q[None], s)


def test_keys_are_what_their_names_say() -> None:
    """Unit norm; white keys fill all directions alike, the others do not."""
    spread = {}
    for kind in KEYS:
        k = draw_keys(kind, 4, 500, 8, torch.Generator().manual_seed(1))
        torch.testing.assert_close(k.norm(dim=-1), torch.ones(4, 500, dtype=torch.float64))
        values = torch.linalg.eigvalsh((k.mT @ k).mean(0))
        spread[kind] = float(values[-1] / values[0])
    assert spread["white"] < 1.3 < spread["SiLU"] < 10 < spread["decaying spectrum"]


def test_an_op_that_is_off_ends_its_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Correctness comes before times, and its tolerance fails the cell."""
    shape = Shape(1, 0, 2, 8, 0.0)
    found = errors(shape, 3, "cpu", 20, True)
    assert set(found) == {"o", "q", "k", "v", "g", "alpha", "beta", "sketch"}
    right = sketch_speed.chunk_sketched_gka

    def wrong(*args: Any, **options: Any) -> Any:
        o, state = right(*args, **options)
        return 1.1 * o, state

    monkeypatch.setattr(sketch_speed, "chunk_sketched_gka", wrong)
    with pytest.raises(InputError, match="off by"):
        errors(shape, 3, "cpu", 20, True)
    assert state_bytes(128, 32, False) == 4 * (32 * 32 + 32 * 128) < state_bytes(128, 32, True)


def results(learned: float, spectral: float) -> list[dict[str, Any]]:
    plain = {
        "of": "plain", "seed": 0, "dim": 32, "dims": [4, 8, 16], "loss": 2.0, "energy": [0.5, 0.8, 0.9],
        "losses": {"random": [3.0, 2.5, 2.2], "spectral": [2.5, spectral, 2.1]},
        "key errors": {b + r: [0.9, 0.5, 0.1] for b in BASES for r in WITH_RIDGE},
    }  # fmt: skip
    ways = [("learned", 4, 2.2), ("learned", 8, learned), ("fixed", 8, 2.05), ("gla", None, 2.3)]
    trained = [{"of": "trained", "how": h, "sketch": d, "seed": 0, "loss": x} for h, d, x in ways]
    return [plain, *trained]


def test_checks_compare_the_losses() -> None:
    """The claim stands or falls with the learned map's loss over plain and gla; untold ones stay open."""
    assert outcome_of(checks(results(2.03, 2.03))) == "confirmed"
    assert outcome_of(checks(results(2.2, 2.03))) == "partly"  # above 1.023 times plain, below gla
    assert outcome_of(checks(results(2.4, 2.03))) == "not"
    assert outcome_of(checks([])) == "open"
    told = {c.text: c.passed for c in checks(results(2.03, 2.06)) if c.of == "prediction"}
    assert list(told.values()) == [False, True, True, None, None, None]
    assert loss_of(results(2.03, 2.0), "learned", 8) == 2.03
    assert "| trained with a learned S | 8 | 2.0300 | 1.0150 |" in table(results(2.03, 2.0))


def test_a_gpu_measures_speed_first() -> None:
    """Its cells come before models, which fill the time that is left."""
    size = SKETCHING.sizes["quick"]
    names = [cell.key for cell in cells(size, Options("cuda", (0, 1)))]
    assert names[0].startswith("speed, plain") and names[-1].endswith("keys, seed 1")
    assert len(names) == len(set(names)) == 8 + 2 * (3 + 6)
    assert sorted(names) == sorted(cell.key for cell in cells(size, Options("cpu", (0, 1))))
