"""A sweep runs every cell once, keeps what is finished, and summarises it fairly."""

import json
from dataclasses import replace

import pytest

from gka.errors import InputError
from gka.evaluation import mqar_sweep
from gka.evaluation.mqar import MQARTask
from gka.evaluation.mqar_cell import Budget
from gka.evaluation.mqar_sweep import PRESETS, Sweep, run_sweep, summarize
from gka.evaluation.results import load_records

TINY = Sweep(
    mixers=("attention", "gla"),
    sizes=((8, 8),),
    mixtures=(
        (
            (MQARTask(vocab_size=18, num_kv_pairs=2, input_seq_len=8),),
            Budget(
                steps=3,
                batch_size=8,
                train_examples=64,
                validation_examples=16,
                test_examples=16,
                evaluate_every=3,
            ),
        ),
    ),
    learning_rates=(1e-3, 1e-2),
    seeds=(0, 1, 2),
)


@pytest.fixture
def trained(monkeypatch):
    """Cells that were trained, by a stand-in that answers at once and is interrupted at the sixth."""
    cells = []
    interruptions = [KeyboardInterrupt]

    def train(cell, device):
        if len(cells) == 5 and interruptions:
            raise interruptions.pop()
        cells.append(cell)
        score = cell.learning_rate if cell.mixer == "gla" else 1 - cell.learning_rate
        return {
            "test_accuracy": [score],
            "validation_accuracy": [score],
            "parameters": 1,
            "curve": [[3, 1.0, score]],
        }

    monkeypatch.setattr(mqar_sweep, "train_cell", train)
    return cells


def test_every_rate_once_and_the_best_for_all_seeds(tmp_path, trained):
    """The first seed is trained with every rate, the others only with the rate that is best for their
    mixer; the sweep's length is the number of trainings, and each is reported."""
    trained.extend([None] * 6)  # past the interruption
    shown = []
    content = run_sweep(TINY, tmp_path / "f.json", on_cell=lambda cell, result: shown.append(cell))
    done = [(c.mixer, c.learning_rate, c.seed) for c in trained[6:]]
    assert sorted(done) == sorted(
        [(m, rate, 0) for m in ("attention", "gla") for rate in (1e-3, 1e-2)]
        + [("attention", 1e-3, s) for s in (1, 2)]
        + [("gla", 1e-2, s) for s in (1, 2)]
    )
    assert len(TINY) == len(done) == len(shown)
    rates = {row["mixer"]: (row["learning_rate"], row["seeds"]) for row in content["summary"]}
    assert rates == {"attention": (1e-3, [0, 1, 2]), "gla": (1e-2, [0, 1, 2])}


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path, trained):
    """Cells finished before an interruption are in the file and are not trained again; at the end
    every cell has been trained exactly once."""
    file = tmp_path / "mqar.json"
    with pytest.raises(KeyboardInterrupt):
        run_sweep(TINY, file)
    assert len(load_records(file, "an MQAR sweep")) == 5
    shown = []
    content = run_sweep(TINY, file, on_cell=lambda cell, result: shown.append(cell))
    assert len(set(trained)) == len(trained) == len(TINY)
    assert set(shown) == set(trained)
    assert json.loads(file.read_text()) == json.loads(json.dumps(content))


def test_a_wider_sweep_reuses_what_it_can_and_loses_nothing(tmp_path, trained):
    """Cells are kept by all that determines them: a further seed trains only its own cells, a changed
    budget trains everything anew, and the earlier cells stay in the file."""
    file = tmp_path / "mqar.json"
    with pytest.raises(KeyboardInterrupt):
        run_sweep(TINY, file)
    run_sweep(TINY, file)
    assert len(trained) == 8
    run_sweep(replace(TINY, seeds=(0, 1, 2, 3)), file)
    assert len(trained) == 10
    tasks, budget = TINY.mixtures[0]
    longer = replace(TINY, mixtures=((tasks, replace(budget, steps=4)),))
    content = run_sweep(longer, file)
    assert len(trained) == 18 and len(content["cells"]) == 18
    assert [row["seeds"] for row in content["summary"]] == [[0, 1, 2], [0, 1, 2]]


def test_two_processes_give_what_one_gives(tmp_path):
    """Cells trained side by side have the results of cells trained one after the other."""
    sweep = replace(TINY, seeds=(0,), learning_rates=(1e-2,))
    one = run_sweep(sweep, tmp_path / "one.json")
    two = run_sweep(sweep, tmp_path / "two.json", processes=2)
    curves = [
        {str(r["cell"]): r["result"]["curve"] for r in content["cells"]} for content in (one, two)
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"cells": 3}', '{"cells": [{"cell": 1}]}'])
def test_a_foreign_or_damaged_file_is_refused_and_kept(tmp_path, content):
    """A result file that is not ours stops the sweep before training and is left as it is."""
    file = tmp_path / "mqar.json"
    file.write_text(content)
    with pytest.raises(InputError, match=r"mqar\.json"):
        run_sweep(TINY, file)
    assert file.read_text() == content


def record(rate, seed, validation, test, mixer="gka"):
    cell = {"mixer": mixer, "width": 8, "head_dim": 4, "tasks": ["a", "b"], "seed": seed}
    result = {"validation_accuracy": validation, "test_accuracy": test, "parameters": 10}
    result["curve"] = [[1, seed, rate]]
    return {"cell": cell | {"learning_rate": rate}, "result": result}


def test_the_rate_is_chosen_on_validation_and_the_test_reported():
    """The best rate is that of the first seed's highest mean validation accuracy over tasks, even
    where another's test accuracy is higher; mean and spread per task are over that rate's seeds."""
    records = [
        record(0.1, 0, [0.9, 0.7], [0.5, 0.2]),
        record(0.2, 0, [0.9, 0.6], [0.99, 0.99]),
        record(0.1, 0, [0.3, 0.3], [0.4, 0.3], mixer="gla"),
        record(0.1, 1, [0.1, 0.1], [0.7, 0.2]),
    ]
    gka, gla = summarize(records)
    assert (gka["mixer"], gka["learning_rate"], gka["seeds"]) == ("gka", 0.1, [0, 1])
    assert gka["validation_by_rate"] == pytest.approx({"0.1": 0.8, "0.2": 0.75})
    first, second = gka["test_accuracy"]
    assert first["mean"] == pytest.approx(0.6)
    assert (first["min"], first["max"], first["by_seed"]) == (0.5, 0.7, [0.5, 0.7])
    assert first["stdev"] == pytest.approx(0.1 * 2**0.5)
    assert (second["mean"], second["stdev"]) == (0.2, 0.0)
    assert gla["test_accuracy"][0]["stdev"] is None
    assert gka["curves"] == [[[1, 0, 0.1]], [[1, 1, 0.1]]]


@pytest.mark.parametrize(
    "best, test, at_edge",
    [(0.1, 0.5, True), (0.2, 0.5, False), (0.4, 0.5, True), (0.4, 0.995, False)],
)
def test_a_best_rate_at_the_edge_is_told(best, test, at_edge):
    """Where the best of three rates is the lowest or highest, and the task not solved, it says so."""
    records = [record(rate, 0, [0.9 if rate == best else 0.1], [test]) for rate in (0.1, 0.2, 0.4)]
    assert summarize(records)[0]["at_edge"] is at_edge


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"mixers": ("gka", "mamba")}, "mixers holds 'mamba'"),
        ({"mixers": ("gka+mamba",)}, "mixers holds 'gka.mamba'"),
        ({"mixers": ("gka+gla+gla",)}, "mixers holds 'gka.gla.gla'"),
        ({"mixers": ()}, "mixers"),
        ({"sizes": ((8, 0),)}, "sizes"),
        ({"learning_rates": (0.0,)}, "learning_rates"),
        ({"learning_rates": (1e-3, 1e-3)}, "learning_rates"),
        ({"seeds": (-1,)}, "seeds"),
        ({"mixtures": ()}, "mixtures"),
        ({"mixtures": (((), TINY.mixtures[0][1]),)}, "mixtures"),
    ],
)
def test_impossible_sweeps_are_refused_by_name(changed, named):
    """A sweep that names an unknown mixer or nothing to do is refused before any training."""
    with pytest.raises(InputError, match=f"^{named}"):
        replace(TINY, **changed)


def test_no_process_is_refused(tmp_path):
    """Zero processes is an error."""
    with pytest.raises(InputError, match="processes"):
        run_sweep(TINY, tmp_path / "mqar.json", processes=0)


def test_presets_compare_gka_with_linear_mixers_and_attention():
    """Every preset holds the comparison the command is for, with a grid of rates to choose from."""
    for preset in PRESETS.values():
        assert {"gka", "attention", "gla", "deltanet", "gated_deltanet"} <= set(preset.mixers)
        assert len(preset.learning_rates) >= 3
    sizes = {
        (task.vocab_size, task.num_kv_pairs, task.input_seq_len)
        for tasks, _ in PRESETS["zoology"].mixtures
        for task in tasks
    }
    assert sizes == {(8192, 4, 64), (8192, 8, 128), (8192, 16, 256), (8192, 64, 512)}
