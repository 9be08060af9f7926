"""A model on a mesh computes what one process does: losses, every gradient, weights after three steps."""

import json
from pathlib import Path
from typing import Any

import pytest

from gka.errors import InputError
from gka.parallel import Layout
from parallel.jobs import run_ranks

# dp_replicate, dp_shard, cp, tp; whether layers are recomputed
QUICK = [
    ("hybrid", (1, 2, 1, 2), True),
    ("one kv head", (1, 1, 1, 4), False),
    ("hybrid", (1, 2, 2, 1), True),
    ("hybrid", (1, 1, 2, 2), False),
]
LONG = [
    *(("mixers", sizes, False) for sizes in (
        (1, 4, 1, 1), (4, 1, 1, 1), (2, 2, 1, 1), (1, 1, 1, 4), (1, 2, 1, 2), (2, 1, 1, 2),
        (1, 1, 4, 1), (1, 2, 2, 1), (2, 1, 2, 1), (1, 1, 2, 2),
    )),
    *((name, (1, 1, 1, 4), False) for name in ("hybrid", "value heads", "expansion")),
    ("mixed expansion", (1, 2, 1, 2), False),
    ("mixers", (1, 4, 1, 1), True),
]  # fmt: skip


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four processes found, on two meshes and without."""
    found = tmp_path_factory.mktemp("mesh") / "found.json"
    return run_ranks("on_meshes.py", 4, str(found), json.dumps(QUICK))


def test_meshes_equal_one_process(quick: dict[str, Any]) -> None:
    """Heads over ranks, with shards of parameters and recomputed layers or with fewer key heads than ranks:
    float64 losses, gradients and weights are one process's within 1e-10."""
    assert quick["hybrid: dp_shard 2 x tp 2 recomputed"] < 1e-10
    assert quick["one kv head: tp 4"] < 1e-10


def test_rows_over_ranks_equal_one_process(quick: dict[str, Any]) -> None:
    """Parts of rows, with shards of parameters and recomputed layers or with split heads: float64 losses,
    gradients and weights of three steps are one process's within 1e-12."""
    assert quick["hybrid: dp_shard 2 x cp 2 recomputed"] < 1e-12
    assert quick["hybrid: cp 2 x tp 2"] < 1e-12


def test_a_run_continues_on_another_mesh(quick: dict[str, Any]) -> None:
    """Saved on four shards, loaded on two shards of two ranks with split heads: the same steps follow."""
    assert quick["resumed"] < 1e-10


def test_pipeline_equals_one_process(quick: dict[str, Any]) -> None:
    """Four stages under 1F1B have one process's loss and gradients."""
    assert quick["pipeline"] < 1e-12


def test_only_matrices_are_gathered_in_bfloat16(quick: dict[str, Any]) -> None:
    """Under a bfloat16 policy decay rates, norms and convolutions stay float32, and so do all gradients."""
    assert quick["narrow"] == ["weight"]
    assert quick["decays"] == ["torch.float32", "torch.float32"]
    assert quick["gradients"] == ["torch.float32"]


def test_a_start_without_memory_does_not_depend_on_the_mesh(quick: dict[str, Any]) -> None:
    """A model made on the meta device gets the same weights on every mesh."""
    assert quick["meta"]


def test_errors_name_the_fault_and_end_every_rank(quick: dict[str, Any]) -> None:
    """Meshes that do not fit, a rank that differs and an error of one rank: one message on all ranks."""
    assert "need a multiple of 3 ranks, and the job has 4" in quick["ranks"]
    assert quick["heads"] == ""  # four query heads, eight of values
    assert "layer 0 cannot be split: 6 heads do not divide among tp = 4 ranks" in quick["uneven"]
    assert "rank 3 has another code than rank 0 (b, not a)" in quick["differs"]
    assert quick["fails"] == "rank 2: its disk is full"


def test_ranks_count_through_the_mesh() -> None:
    """Ranks that share rows are neighbours; dp_shard takes what the other numbers leave."""
    layout = Layout.fitted(8, tp=2)
    assert layout == Layout(dp_shard=4, tp=2)
    assert [layout.reader(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(InputError, match="dp_shard = 3 need 6 ranks, and the job has 8"):
        Layout.fitted(8, dp_shard=3, tp=2)


@pytest.mark.slow
def test_every_mixer_on_every_mesh(tmp_path: Path) -> None:
    """All mixers and forms of heads on meshes of four and of two processes equal one process."""
    cases = [
        (name, sizes, again) for name, sizes, again in [*LONG, ("hybrid", (1, 4, 1, 1), False)]
    ]
    four = run_ranks("on_meshes.py", 4, str(tmp_path / "four.json"), json.dumps(cases))
    pairs = [("mixers", sizes, False) for sizes in ((1, 1, 1, 2), (1, 2, 1, 1), (2, 1, 1, 1))]
    two = run_ranks("on_meshes.py", 2, str(tmp_path / "two.json"), json.dumps(pairs))
    errors = {n: e for n, e in (four | two).items() if ":" in n}
    assert len(errors) == 19
    assert all(error < 1e-10 for error in errors.values()), errors
