"""The chain's needle test counts what it says, and its tables and picture follow from its JSON alone."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gka.errors import InputError
from gka.experiments import chain, chain_measures
from gka.storage import write_json


class Copier(torch.nn.Module):
    """Knows the planted values: says each digit that follows, but for the last `wrong` of every value."""

    def __init__(self, rows: torch.Tensor, wrong: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.wrong = wrong

    def forward(self, rows: torch.Tensor, logits_to_keep: int, use_cache: bool) -> Any:
        said = rows[:, -logits_to_keep:].roll(-1, dims=1)
        said[:, said.shape[1] - 1 - self.wrong :] = 0
        return SimpleNamespace(logits=torch.nn.functional.one_hot(said, 256).float())


def test_needles_are_planted_and_asked_for() -> None:
    """Texts have the length asked for, hold a key and value once, and ask for the value at their end."""
    filler = list(b"x" * 500)
    test = chain_measures.NeedleTest.drawn(filler, 120, 9, lambda text: list(text.encode()))
    assert test.rows.shape == (9, 120)
    depths = []
    for row in test.rows:
        text = bytes(row.tolist()).decode()
        assert text.count(text[-chain_measures.DIGITS :]) == 2
        key = text[text.index("KEY_") : text.index(" = ")]
        assert text[: -chain_measures.DIGITS].endswith(f"\nassert {key} == '")
        depths.append(text.index("KEY_"))
    assert depths == sorted(set(depths))


def test_further_keys_are_planted_beside() -> None:
    """Each text holds all keys, of which its end asks for the first; texts without room are refused."""
    filler = list(b"x" * 500)
    test = chain_measures.NeedleTest.drawn(filler, 240, 5, lambda text: list(text.encode()), 4)
    assert test.rows.shape == (5, 240)
    for row in test.rows:
        text = bytes(row.tolist()).decode()
        assert text.count(" = '") == 4 and text.count(text[-chain_measures.DIGITS :]) == 2
        assert len(text.replace("x", "")) <= 4 * 23 + 29
    for context in (100, 900):  # no room for the lines; not enough filler
        with pytest.raises(InputError, match=f"a text of {context} tokens with 4 keys"):
            chain_measures.NeedleTest.drawn(filler, context, 2, lambda t: list(t.encode()), 4)


@pytest.mark.parametrize(("wrong", "part", "whole"), [(0, 1.0, 1.0), (2, 0.75, 0.0), (8, 0.0, 0.0)])
def test_copied_values_are_counted(wrong: int, part: float, whole: float) -> None:
    """A model that copies all but some characters has that share of them, and no value whole."""
    test = chain_measures.NeedleTest.drawn(
        list(b"y" * 300), 100, 5, lambda text: list(text.encode())
    )
    found = test.run(Copier(test.rows, wrong), 2, lambda: torch.autocast("cpu", enabled=False))
    assert found == (part, whole)


def test_report_follows_from_the_figures(tmp_path: Path) -> None:
    """Table and picture are made of chain.json; the teacher has one row, the control its own."""
    figures = {
        "loss": 1.0, "perplexity": 2.7183, "bits_per_byte": 1.4427, "recovered": 0.5,
        "probe": {"copied, 96": 0.25, "whole, 96": 0.125},
    }  # fmt: skip
    curve = {
        "curves": {
            "training": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}],
            "evaluation": [],
        }
    }
    stage = curve | {"seconds": 2.0, "tokens_per_second": 10.0}
    hybrid = {
        "phases": dict.fromkeys(("teacher", "initial", "stage1", "stage2"), figures),
        "stages": {"stage1": stage, "stage2": stage},
    }
    found = {
        "teacher": {
            "model": {"parameters": 1e6},
            "training": {"steps": 3, "tokens": 9, "seconds": 1.0},
        },
        "hybrids": {"gka": hybrid, "gated_deltanet": hybrid},
        "control": figures,
        "steps": {"stage1": 5, "stage2": 4},
    }
    write_json(tmp_path / "chain.json", found)
    chain.main(["--draw", str(tmp_path)])
    lines = (tmp_path / "chain.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and "---" not in line]
    assert len(rows) == 1 + 1 + 3 + 3 + 1
    assert (
        rows[3]
        == "| Gated KalmaNet | after stage 1 | 1.0000 | 2.718 | 1.4427 | 50.0% | 0.250 | 0.125 |"
    )
    assert (tmp_path / "chain.png").read_bytes().startswith(b"\x89PNG")
