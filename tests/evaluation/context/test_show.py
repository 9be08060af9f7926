"""Tables and pictures show what was measured."""

import io
from typing import Any

import pytest
from rich.console import Console

from gka.evaluation.context import show


def record(task: str, length: int, depth: float | None, **result: Any) -> dict[str, Any]:
    cell = {"model": "runs/one", "task": task, "length": length, "depth": depth}
    return {"cell": cell, "result": result}


def scores(task: str, length: int, depth: float | None, rank: float, match: float):
    return record(task, length, depth, rank=rank, match=match, chance=0.1)


def bits(length: int, *found: float):
    edges = [*[1, 64, 128, 256, 512][: len(found)], length]
    return record(
        "perplexity",
        length,
        None,
        bits_per_byte=2.5,
        edges=edges,
        bits_per_byte_by_position=list(found),
    )


RECORDS = [
    scores("needle", 256, 0.0, 0.2, 0.0),
    scores("needle", 256, 1.0, 0.6, 0.4),
    scores("facts-1", 256, None, 0.5, 0.3),
    bits(256, 3.0, 2.0, 1.0),
    scores("needle", 512, 0.0, 0.1, 0.0),
    scores("needle", 512, 1.0, 0.9, 0.8),
    scores("facts-1", 512, None, 0.7, 0.1),
    bits(512, 3.5, 2.5, 1.5, 1.25),
]


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """Draw records and return the figure that was saved."""
    figures = []
    monkeypatch.setattr(show, "save_figure", lambda drawn, path: figures.append(drawn))

    def draw(records):
        show.plot("one", records, tmp_path / "one.png")
        return figures[-1]

    return draw


def shown(axes) -> list[list[float]]:
    """What a heat map shows, row by row."""
    return axes.images[0].get_array().tolist()


def test_the_table_has_tasks_against_lengths():
    """Both scores are means over depths; perplexity is in bits per byte."""
    (table,) = show.tables(RECORDS)
    text = io.StringIO()
    Console(file=text, width=120).print(table)
    lines = [line.split() for line in text.getvalue().splitlines()]
    assert ["needle", "0.10", "0.40", "/", "0.20", "0.50", "/", "0.40"] in lines
    assert ["facts-1", "0.10", "0.50", "/", "0.30", "0.70", "/", "0.10"] in lines
    assert ["perplexity", "2.500", "2.500"] in lines


def test_the_picture_has_a_heat_map_of_length_and_depth(figure):
    """A panel for each task with depths, one for those without, one for positions; a row for each score."""
    top, spread, positions, below, spread_below, nothing = figure(RECORDS).axes
    assert shown(top) == [[0.2, 0.1], [0.6, 0.9]] and shown(below) == [[0.0, 0.0], [0.4, 0.8]]
    assert shown(spread) == [[0.5, 0.7]] and shown(spread_below) == [[0.3, 0.1]]
    assert [label.get_text() for label in top.get_xticklabels()] == ["256", "512"]
    assert [label.get_text() for label in top.get_yticklabels()] == ["0", "1"]
    assert [text.get_text() for text in top.texts] == ["0.20", "0.10", "0.60", "0.90"]
    assert "guessing: 0.10" in top.get_title() and "needle" in top.get_title()
    assert shown(positions)[:3] == [[3.0, 3.5], [2.0, 2.5], [1.0, 1.5]]
    assert shown(positions)[3][1] == 1.25 and len(positions.texts) == 7
    assert not nothing.axison


def test_perplexity_alone_is_one_panel(figure):
    """Without scores there is only the panel of positions."""
    (axes,) = figure([bits(256, 3.0, 2.0, 1.0)]).axes
    assert shown(axes) == [[3.0], [2.0], [1.0]]
