"""The plots show what was measured."""

import pytest

from gka.evaluation import plots

TASK = {"num_kv_pairs": 16, "input_seq_len": 64}


def row(mixer, mean, width=16, tasks=(TASK,)):
    found = {"mean": mean, "by_seed": [mean - 0.1, mean + 0.1]}
    return {
        "mixer": mixer,
        "width": width,
        "head_dim": 16,
        "tasks": list(tasks),
        "seeds": [0, 1],
        "test_accuracy": [found for _ in tasks],
        "curves": [[[100, 4.0, 0.1], [200, 3.0, mean]], [[100, 4.0, 0.2]]],
    }


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw a summary and return the figure that was saved."""
    figures = []
    save = plots.save_figure

    def keep(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "save_figure", keep)

    def draw(*rows):
        plots.plot_mqar({"summary": list(rows)}, tmp_path / "mqar.png")
        return figures[-1]

    return draw


def test_one_task_shows_every_seed_and_how_it_was_learnt(drawn):
    """For one task and size: mixers from worst to best with their means, a mark and a curve a seed."""
    final, way = drawn(row("gka", 0.9), row("gla", 0.5)).axes
    assert [label.get_text() for label in final.get_yticklabels()] == [
        "Gated linear attention  0.50",
        "Gated KalmaNet  0.90",
    ]
    marks = [line.get_xdata() for line in final.lines]
    assert [list(x) for x in marks] == [pytest.approx([0.4, 0.6]), pytest.approx([0.8, 1.0])]
    curves = [(list(line.get_xdata()), list(line.get_ydata())) for line in way.lines]
    assert curves[:2] == [([100, 200], [0.1, 0.5]), ([100], [0.2])] and len(curves) == 4


def test_a_training_that_diverged_at_once_has_no_curve(drawn):
    """An empty curve is drawn as none, not as an error."""
    diverged = row("gka", 0.0) | {"curves": [[]]}
    assert [list(line.get_xdata()) for line in drawn(diverged).axes[1].lines] == [[]]


def test_several_sizes_are_drawn_against_the_width(drawn):
    """With two widths there is one panel with a line a mixer."""
    figure = drawn(row("gka", 0.7, 16), row("gka", 0.9, 32))
    (axes,) = figure.axes
    assert list(axes.lines[0].get_xdata()) == [16, 32]
    assert list(axes.lines[0].get_ydata()) == [0.7, 0.9]


def test_a_mixture_is_drawn_against_the_pairs(drawn):
    """Models trained on several tasks are drawn over the number of pairs."""
    (axes,) = drawn(row("gka", 0.7, tasks=(TASK | {"num_kv_pairs": 4}, TASK))).axes
    assert list(axes.lines[0].get_xdata()) == [4, 16]
