"""The memory test: what each memory reads back, and what is measured of it."""

from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from torch.nn.functional import normalize

from gka.errors import InputError
from gka.evaluation import plots
from gka.evaluation.memories import (
    compared_memories,
    deltanet,
    exact_ridge,
    gated_kalmanet,
    linear_attention,
)
from gka.evaluation.recall import (
    MEASURES,
    RecallSettings,
    correlated_keys,
    draw_pairs,
    main_memories,
    measure,
    run_recall,
    what_was_learnt,
)
from tolerances import assert_close

EVERY_MEMORY = [linear_attention(), deltanet(1.0), gated_kalmanet(0.02, 30), exact_ridge(0.02)]


def batch(num: int, correlation: float = 0.0, dim: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = [draw_pairs(num, dim, correlation, seed) for seed in range(3)]
    return torch.stack([k for k, _ in drawn]), torch.stack([v for _, v in drawn])


def orthonormal_keys(num: int, dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(dim, num, generator=generator))[0].mT.contiguous()


def test_orthonormal_keys_are_read_exactly_or_shrunk_by_the_ridge():
    """On N <= K orthonormal keys linear attention and DeltaNet read v itself, and exact ridge reads
    v / (1 + lambda) with lambda = a sqrt(N) (claim 6 of the mathematics)."""
    k = orthonormal_keys(9, 16)[None]
    _, v = batch(9)
    v = v[:1]
    assert_close(linear_attention().recall(k, v), v, 2e-6, "linear attention")
    assert_close(deltanet(1.0).recall(k, v), v, 2e-6, "DeltaNet")
    shrunk = v / (1 + 0.05 * 9**0.5)
    assert_close(exact_ridge(0.05).recall(k, v), shrunk, 2e-6, "exact ridge")
    assert_close(gated_kalmanet(0.05, 60).recall(k, v), shrunk, 1e-5, "GKA")


def test_memories_read_what_their_formula_says():
    """Linear attention reads K^T K V, the delta rule its recursion, exact ridge numpy's solution."""
    k, v = batch(24, correlation=0.4)
    assert_close(linear_attention().recall(k, v), k @ (k.mT @ v), 2e-6, "linear attention")

    state = torch.zeros(3, 16, 16)
    for key, value in zip(k.unbind(1), v.unbind(1), strict=True):
        wrong_by = value - torch.einsum("bk,bkv->bv", key, state)
        state = state + 0.5 * key[:, :, None] * wrong_by[:, None, :]
    assert_close(deltanet(0.5).recall(k, v), k @ state, 2e-6, "delta rule")

    h = (k.mT @ k).double()
    ridge = 0.02 * torch.linalg.matrix_norm(h)[:, None, None] * torch.eye(16, dtype=torch.float64)
    expected = k.double() @ torch.linalg.solve(h + ridge, (k.mT @ v).double())
    assert_close(exact_ridge(0.02).recall(k, v), expected.float(), 1e-6, "exact ridge")


def test_gka_comes_to_exact_ridge_with_iterations():
    """More Chebyshev steps bring GKA's reading nearer to exact ridge, to float32's end."""
    k, v = batch(24, correlation=0.4)
    target = exact_ridge(0.02).recall(k, v)
    errors = [
        ((gated_kalmanet(0.02, r).recall(k, v) - target).norm() / target.norm()).item()
        for r in (3, 10, 30, 100)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 3e-3 and errors[3] < 1e-5


@pytest.mark.parametrize("memory", EVERY_MEMORY, ids=lambda memory: memory.name)
def test_reading_is_per_seed(memory):
    """Draws of different seeds share a batch and do not see each other."""
    k, v = batch(10, correlation=0.4)
    assert_close(memory.recall(k, v)[1:2], memory.recall(k[1:2], v[1:2]), 2e-6, memory.name)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_keys_have_unit_norm_and_the_correlation_asked_for(correlation):
    """Keys are unit vectors, and the mean cosine of two of them is `correlation`."""
    generator = torch.Generator().manual_seed(0)
    k = correlated_keys(400, 64, correlation, generator).double()
    assert_close(k.norm(dim=-1), torch.ones(400).double(), 1e-6, "norms")
    cosines = (k @ k.mT)[~torch.eye(400, dtype=torch.bool)]
    assert abs(cosines.mean() - correlation) < 0.03


def test_measures_know_right_from_wrong_and_scale_from_direction():
    """A scaled copy has error |s - 1| but none after rescaling; swapped values are wrong values."""
    v = normalize(torch.eye(4, 8), dim=-1)[None]
    scaled = {name: value[0] for name, value in measure(3 * v, v).items()}
    assert scaled == pytest.approx(
        {"error": 2.0, "rescaled_error": 0.0, "cosine": 1.0, "accuracy": 1.0}, abs=1e-6
    )
    swapped = {name: value[0] for name, value in measure(v[:, [1, 0, 2, 3]], v).items()}
    assert swapped["accuracy"] == swapped["cosine"] == pytest.approx(0.5)
    nothing = {name: value[0] for name, value in measure(torch.zeros_like(v), v).items()}
    assert nothing["error"] == nothing["rescaled_error"] == pytest.approx(1.0)


def test_correlated_keys_hurt_linear_attention_more_than_gka():
    """The claim the command exists to show: at N = K/2 correlation takes linear attention's error
    above 0.9 while GKA's stays below a half and equals exact ridge's."""
    settings = RecallSettings(head_dim=32, pairs=(16,), correlations=(0.0, 0.6), seeds=(0, 1, 2))
    memories = [linear_attention(), gated_kalmanet(0.02, 30), exact_ridge(0.02)]
    content = run_recall(settings, memories)
    assert content["settings"]["pairs"] == (16,)
    assert len(content["measurements"]) == 2 * 3
    error = {
        (m["memory"], m["correlation"]): median(m["rescaled_error"])
        for m in content["measurements"]
    }
    for m in content["measurements"]:
        assert all(len(m[name]) == 3 for name in MEASURES)
    linear, gka, exact = (memory.name for memory in memories)
    assert error[linear, 0.0] < 0.7 and error[linear, 0.6] > 0.9
    assert error[gka, 0.6] < 0.5
    assert error[gka, 0.6] == pytest.approx(error[exact, 0.6], rel=0.02)


def test_compared_memories_are_named_apart():
    """Every combination of ridge ratio and iterations is there, under a name of its own."""
    memories = compared_memories((0.01, 0.1), (3, 30))
    assert len({memory.name for memory in memories}) == len(memories) == 3 + 4 + 2
    described = memories[3].describe()
    assert (described["family"], described["ridge_ratio"], described["num_iter"]) == (
        "gka",
        0.01,
        3,
    )


def result(correlations: tuple[float, ...], pairs: tuple[int, ...] = (8, 16)) -> dict[str, Any]:
    settings = RecallSettings(head_dim=16, pairs=pairs, correlations=correlations, seeds=(0, 1, 2))
    return run_recall(settings, compared_memories((0.1, 0.002, 0.02), (5, 30)))


def test_the_main_memories_are_six():
    """Of any list at most six are named: the simple two, GKA near the default ridge and at both ends with
    the most steps, and the exact solution of the first."""
    described = [
        memory.describe() for memory in compared_memories((0.1, 0.002, 0.5, 0.03), (5, 30))
    ]
    assert {role: memory["name"] for role, memory in main_memories(described).items()} == {
        "linear attention": "linear attention",
        "DeltaNet": "DeltaNet beta=1",
        "GKA": "GKA a=0.03 r=30",
        "smallest ridge": "GKA a=0.002 r=30",
        "largest ridge": "GKA a=0.5 r=30",
        "exact ridge": "exact ridge a=0.03",
    }
    one = [memory.describe() for memory in compared_memories((0.1,), (30,))]
    assert list(main_memories(one)) == ["linear attention", "DeltaNet", "GKA", "exact ridge"]


def test_three_lines_say_what_was_learnt():
    """The figures of the lines are medians of the measurements, at the pairs nearest to the head size."""
    content = result((0.0, 0.9))
    first, second, third = what_was_learnt(content)
    found = {
        (m["memory"], m["correlation"]): m for m in content["measurements"] if m["pairs"] == 16
    }

    def share(memory: str, correlation: float) -> int:
        return round(100 * median(found[memory, correlation]["accuracy"]))

    for line, rho in ((first, 0.9), (second, 0.0)):
        gka, delta, linear = (
            share(name, rho) for name in ("GKA a=0.02 r=30", "DeltaNet beta=1", "linear attention")
        )
        assert line == (
            f"16 pairs, key cosine {rho:g}: GKA points to the right value in {gka} of 100,"
            f" DeltaNet in {delta}, linear attention in {linear}"
        )
    names = ("GKA a=0.02 r=30", "exact ridge a=0.02", "GKA a=0.002 r=30", "GKA a=0.1 r=30")
    near, exact, small, large = (f"{median(found[name, 0.9]['error']):.2f}" for name in names)
    assert third == (
        f"16 pairs, key cosine 0.9: GKA's relative error is {near} at ridge a = 0.02 (exact solution"
        f" {exact}), {small} at 0.002, {large} at 0.1"
    )
    starts = [line.partition(":")[0] for line in what_was_learnt(result((0.5,), (1, 16, 40)))]
    assert starts == [f"{n} pairs, key cosine 0.5" for n in (16, 40, 16)]
    assert what_was_learnt(result((0.5,), (1,)))[0].startswith("1 pair, key")


def test_the_plot_has_six_lines_named_where_they_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Both rows show the same six memories, by the relative error of the text and the share of right values,
    and name them beside their ends, none over another."""
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    content = result((0.0, 0.9), (4, 16, 40))
    plots.plot_recall(content, tmp_path / "x.png")
    figure = drawn[0]
    FigureCanvasAgg(figure).draw()
    main = main_memories(content["memories"])
    for row, measure_name in ((0, "error"), (2, "accuracy")):
        for axes, rho in zip(figure.axes[row : row + 2], (0.0, 0.9), strict=True):
            lines = [line for line in axes.lines if len(line.get_xdata()) == 3]
            assert len(lines) == 6
            for line, memory in zip(lines, main.values(), strict=True):
                expected = [
                    median(m[measure_name])
                    for m in content["measurements"]
                    if (m["memory"], m["correlation"]) == (memory["name"], rho)
                ]
                assert list(line.get_ydata()) == pytest.approx(expected)
        names = list(figure.axes[row + 1].texts)
        assert len(names) == 6 and {x.get_text() for x in names} == {
            "linear attention", "DeltaNet", "GKA, a = 0.02", "GKA, a = 0.002", "GKA, a = 0.1",
            "exact ridge, a = 0.02",
        }  # fmt: skip
        # the text alone, without the line that leads to it
        boxes = sorted((Text.get_window_extent(text) for text in names), key=lambda box: box.y0)
        assert all(a.y1 < b.y1 and a.y1 - b.y0 < 3 for a, b in pairwise(boxes))


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([0.2, 0.6], [0.2, 0.6]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.0, 0.0, 1.0], [0.0, 0.1, 1.0]),
        ([0.95, 0.97, 0.99], [0.8, 0.9, 1.0]),
        ([0.4] * 21, [i / 20 for i in range(21)]),
        ([], []),
    ],
)
def test_names_are_moved_apart(places: list[float], expected: list[float]):
    """Places keep their order and a gap of 0.1, move as little as that needs, and stay between 0 and 1."""
    assert plots.spread(places, 0.1) == pytest.approx(expected)


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"head_dim": 0}, "head_dim"),
        ({"pairs": ()}, "pairs"),
        ({"pairs": (4, 4)}, "pairs"),
        ({"pairs": (0, 4)}, "pairs"),
        ({"correlations": (1.0,)}, "correlations"),
        ({"correlations": (float("nan"),)}, "correlations"),
        ({"seeds": ()}, "seeds"),
    ],
)
def test_impossible_settings_are_refused_by_name(changed, named):
    """Settings out of range are refused when they are made, naming the field at fault."""
    with pytest.raises(InputError, match=f"^{named}"):
        RecallSettings(**changed)


@pytest.mark.parametrize(
    "ratios, iterations, named",
    [((0.0,), (30,), "ridge_ratios"), ((0.1, 0.1), (30,), "ridge_ratios"),
     ((float("nan"),), (30,), "ridge_ratios"), ((0.1,), (0,), "num_iters"), ((0.1,), (), "num_iters")],
)  # fmt: skip
def test_impossible_solvers_are_refused_by_name(ratios, iterations, named):
    """A ridge that is not positive or no iterations at all are refused, naming the argument."""
    with pytest.raises(InputError, match=f"^{named}"):
        compared_memories(ratios, iterations)
