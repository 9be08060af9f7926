"""`hybrid`: which layers are replaced, what is measured of a model, and what the figures decide."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gka.errors import InputError
from gka.evaluation.repeats import Repeats, token_losses
from gka.experiments.reproduce import hybrid, hybrid_page, primed_models
from gka.experiments.reproduce.experiment import Options, outcome_of
from gka.experiments.reproduce.primed_measures import Measures, Text, held_out_text, memory
from gka.models import GKACache, GKAConfig, GKAForCausalLM
from gka.models.cache import cache_tensors
from gka.training.loop import Interrupted


@pytest.mark.parametrize(
    ("count", "layers"), [(1, [0]), (2, [0, 4]), (4, [0, 2, 4, 6]), (6, [0, 1, 2, 4, 5, 6])]
)
def test_alternation_spreads_the_layers(count: int, layers: list[int]) -> None:
    """Replaced layers lie evenly, the first among them; with three quarters every fourth is kept."""
    assert primed_models.alternating(8, count) == layers


def test_the_ranking_replaces_what_loses_least() -> None:
    """Layers ascend; ties go to the lower layer, by number and not by letter."""
    rise = {"0": 0.3, "2": 0.1, "10": 0.1, "11": -0.2}
    assert primed_models.ranked(rise, 2) == [2, 11]
    assert primed_models.ranked(rise, 3) == [2, 10, 11]


def test_the_transformer_is_the_first_cell_of_its_seed() -> None:
    """Then the half hybrids and the control; a size's shares and choices are its cells, each once."""
    full = hybrid.cells(hybrid.FULL, Options(device="cuda", seeds=(0, 1)))
    keys = [cell.key for cell in full]
    assert len(set(keys)) == 30 and keys[15] == "Transformer, seed 1"
    assert keys[:4] == [
        "Transformer, seed 0", "gka, 50 %, rank, seed 0", "gated_deltanet, 50 %, rank, seed 0",
        "Transformer, trained on, seed 0",
    ]  # fmt: skip
    assert sum("alternate" in key for key in keys) == 12
    assert sum(cell.seconds for cell in full[:15]) < 400


def tiny(mixers: list[str]) -> GKAForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "hidden_size": 16}
    return GKAForCausalLM(GKAConfig(vocab_size=257, mixers=mixers, **sizes)).eval()


@pytest.mark.parametrize("mixer", ["gka", "gated_deltanet", "attention"])
def test_memory_is_that_of_the_cache(mixer: str) -> None:
    """Bytes are those of the tensors a model keeps; in 16 bits the recurrent states stay in 32."""
    model = tiny([mixer, "attention"])
    cache = GKACache(model.config)
    with torch.no_grad():
        model(torch.zeros(1, 21, dtype=torch.long), use_cache=True, past_key_values=cache)
    sizes = {name: x.numel() for name, x in cache_tensors(cache).items()}
    attends = sum(n for name, n in sizes.items() if name.endswith(("keys", "values")))
    states = sum(n for name, n in sizes.items() if ".recurrent." in name)
    taps = sum(sizes.values()) - attends - states
    assert memory(model, 21, "float32") == {
        "attention": 4 * attends,
        "recurrent": 4 * (states + taps),
    }
    assert memory(model, 21, "bfloat16") == {
        "attention": 2 * attends,
        "recurrent": 4 * states + 2 * taps,
    }


def test_losses_by_place_are_those_of_the_tokens() -> None:
    """The spans cover the long blocks: the training's length, to twice it, and the rest."""
    model, rng = tiny(["gka", "attention"]), np.random.default_rng(0)
    rows, long = rng.integers(0, 256, (3, 16)), rng.integers(0, 256, (2, 64))
    text = Text(rows, Repeats.of(rows, 2, []), long, long.ravel().tolist() * 4)
    measures = Measures(text, 16, 4, "float32", (100,), (1,), 3)
    found = measures.of(model)
    losses, _ = token_losses(model, long, 1)
    spans = [(0, 16), (16, 32), (32, 64)]
    assert [(p["from"], p["to"]) for p in found["positions"]] == spans
    for part, (a, b) in zip(found["positions"], spans, strict=True):
        assert part["loss"] == pytest.approx(losses[:, a : b - 1].mean(), rel=1e-4)
    loss = token_losses(model, rows, 2)[0].mean()
    assert found["slices"]["all"]["loss"] == pytest.approx(loss, rel=1e-4)
    assert found["reading"] > 0 and [x["length"] for x in found["needles"]] == [100]


def test_held_out_text_is_that_of_the_trainings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are those on which `gka prime` measures, long ones the same text; training text is seen."""
    import gka.data

    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"Text {number} says what all say. " * 30)
    documents = gka.data.find_documents([str(tmp_path)])
    monkeypatch.setattr(gka.data, "find_documents", lambda text: documents)
    held_out_text.cache_clear()
    text = held_out_text(64, 256, 0.3, 8)
    held_out_text.cache_clear()
    packed = gka.data.pack(documents, gka.data.byte_tokenizer())
    held = gka.data.token_blocks(packed, 64, 0.3)[1]
    assert len(text.rows) == len(held)
    assert np.array_equal(text.rows[-1], held[len(held) - 1]["input_ids"].numpy())
    assert np.array_equal(text.long[0], text.rows[:4].ravel())
    row = bytes(text.rows[0].tolist()).decode()
    shared = row.index("what all say") + len("what all say") - 1
    assert text.repeats.seen[0, shared] and not text.repeats.seen[0, row.index("says") - 1]


def test_missing_parts_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hybrid without its Transformer, another device than the trainings', no folder to keep models in."""
    models = primed_models.Models(hybrid.SMOKE, tmp_path, 0, "cpu")
    with pytest.raises(InputError, match="holds no trained Transformer; its cell makes it"):
        models.hybrid("gka", 1, "rank")
    with pytest.raises(InputError, match="trainings run on 'cpu' here"):
        primed_models.Models(hybrid.SMOKE, tmp_path, 0, "cuda")
    with pytest.raises(InputError, match="give a folder"):
        hybrid.measure(hybrid.SMOKE, Options(), 0, "teacher", "attention", 0, "")

    def stopped(*_: Any, **__: Any) -> None:
        raise Interrupted(3, 2)

    monkeypatch.setattr("gka.training.train", stopped)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3"):
        models.teacher()


def found(
    kind: str, mixer: str, replaced: float, choice: str, loss: float, recalled: float
) -> dict[str, Any]:
    """A cell's figures; accuracies on far bytes are a tenth below those on recalled ones."""
    accuracies = {"repeated": 0.8, "recalled": recalled, "far": recalled - 0.1}
    slices = {"all": {"tokens": 100, "loss": loss, "accuracy": 0.5}}
    slices |= {k: {"tokens": 10, "loss": loss, "accuracy": x} for k, x in accuracies.items()}
    spans = ((0, 16, 0.0), (16, 32, 0.1), (32, 64, 0.5 * (1 - replaced)))
    return {
        "kind": kind, "mixer": mixer, "replaced": replaced, "choice": choice, "seed": 0, "length": 16,
        "layers": [0], "rise": {"0": 0.1}, "slices": slices, "training": 9.0, "reading": 9.0,
        "positions": [{"from": a, "to": b, "loss": loss + x} for a, b, x in spans],
        "needles": [{"length": 16 * n, "keys": 1, "copied": 0.5, "whole": 0.1} for n in (1, 2, 4)],
        "bytes": {t: {"attention": 1 << 20, "recurrent": 1 << 19} for t in ("2048", "32768")},
    }  # fmt: skip


@pytest.fixture
def results() -> list[dict[str, Any]]:
    """Figures with which every statement holds."""
    cells = [
        found("teacher", "attention", 0.0, "", 1.05, 0.79),
        found("control", "attention", 0.0, "", 1.0, 0.8),
    ]
    for mixer, recalled in (("gka", 0.79), ("gated_deltanet", 0.76)):
        for replaced in (0.25, 0.5, 0.75):
            for choice, more in (("rank", 0.0), ("alternate", 0.01)):
                loss = 1.0 + 0.02 * replaced + more
                cells.append(found("hybrid", mixer, replaced, choice, loss, recalled))
        cells.append(found("scratch", mixer, 0.5, "rank", 1.0, 0.8))
    return cells


def changed(
    results: list[dict[str, Any]], where: Callable[[dict[str, Any]], bool], loss: float
) -> list[dict[str, Any]]:
    """The figures with another loss in some cells."""
    return [
        found(r["kind"], r["mixer"], r["replaced"], r["choice"], loss, 0.5) if where(r) else r
        for r in results
    ]


def test_figures_decide_the_statements(results: list[dict[str, Any]]) -> None:
    """All hold; each fails when its cells say otherwise, and is open while one is missing."""
    checks = hybrid.checks(results)
    assert outcome_of(checks) == "confirmed" == outcome_of(checks, "prediction")
    assert checks[0].found == "0.03" and len(checks) == 10

    def half(r: dict[str, Any]) -> bool:
        return (r["mixer"], r["replaced"], r["choice"], r["kind"]) == ("gka", 0.5, "rank", "hybrid")

    worse = hybrid.checks(changed(results, half, 1.2))
    passed = [c.passed for c in worse]
    assert passed == [False, False, True, False, False, False, False, True, True, True]
    alike = hybrid.checks(changed(results, lambda r: r["replaced"] == 0.75, 1.0))
    assert [c.passed for c in alike][7:9] == [False, True]
    behind = hybrid.checks(changed(results, lambda r: r["replaced"] == 0.75, 1.6))
    assert [c.passed for c in behind][7:9] == [True, False]
    saved = hybrid.checks(changed(results, lambda r: r["kind"] == "scratch", 1.1))
    assert [c.passed for c in saved][9] is False

    missing = hybrid.checks([r for r in results if not half(r)])
    assert [c.passed for c in missing] == [
        None,
        None,
        True,
        None,
        None,
        None,
        None,
        True,
        True,
        None,
    ]


def test_page_and_picture_show_every_model(results: list[dict[str, Any]]) -> None:
    """A row for each model with its layers; the picture has lines by mixer and choice in their colours."""
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    from gka.evaluation.plots import MIXER_STYLES

    page = hybrid_page.table(results)
    rows = [line for line in page.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(results)
    assert "| Gated KalmaNet | 50%, rank | 1.0100 | 0.800 | 0.790 | 0.690 | 0.50 |" in page
    assert "| 1.5 / 1.5 |" in page and "75% by rank, seed 0: layers 0." in page
    figure = Figure()
    hybrid_page.draw(results, figure)
    losses = figure.axes[0]
    drawn = {line.get_label(): line for line in losses.lines}
    for mixer in hybrid.MIXERS:
        label, color, _ = MIXER_STYLES[mixer]
        line = drawn[f"{label}, by rank"]
        assert to_hex(str(line.get_color())).upper() == color
        assert np.asarray(line.get_xdata()).tolist() == [0, 25, 50, 75]
        assert np.asarray(line.get_ydata()) == pytest.approx([1.0, 1.005, 1.01, 1.015])
    assert "Transformer before" in drawn
    hybrid_page.draw(results[:1], Figure())  # nothing but the Transformer is measured yet


def test_sizes_replace_whole_layers() -> None:
    """A quarter of the layers is a whole number in every size, and the smoke size is the quick one's form."""
    for size in hybrid.HYBRID.sizes.values():
        assert all(size.layers * q % 4 == 0 for q in (*size.ranked, *size.alternated))
    assert replace(hybrid.FULL, length=64).lengths == (32, 64, 128, 256)
