"""A seal tells a whole checkpoint from any other."""

import json
from pathlib import Path

import pytest

from gka.training.checkpoints import SEAL, clear_cut_short, fault, newest, seal

WEIGHTS = "model.safetensors"
NAMES = (WEIGHTS, "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def _checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / WEIGHTS).write_bytes(bytes(range(100)))
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (path / name).write_bytes(b"state")
    return path


def test_sealed_is_whole(tmp_path: Path) -> None:
    """A sealed checkpoint has no fault; an unsealed one was cut short."""
    path = _checkpoint(tmp_path, 1)
    assert fault(path) == "it was cut short while being written"
    seal(path)
    assert fault(path) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (WEIGHTS, bytes(range(99)), f"{WEIGHTS} has 99 bytes, sealed with 100"),
        (WEIGHTS, bytes(100), f"content of {WEIGHTS} has changed"),
        (WEIGHTS, None, f"{WEIGHTS} is missing"),
        ("more.bin", b"", "more.bin is not among what was sealed"),
        (SEAL, b'{"weights"', f"{SEAL} is damaged"),
        (SEAL, json.dumps(dict.fromkeys(NAMES, 1)).encode(), f"{SEAL} is damaged"),
        (
            SEAL,
            b"{}",
            f"{SEAL} does not name trainer_state.json, optimizer.pt",
        ),
        (
            SEAL,
            b'{"trainer_state.json": 1, "scheduler.pt": 1, "a.bin": 1}',
            "name optimizer.pt, rng_st",
        ),
        (SEAL, json.dumps(dict.fromkeys((*NAMES, "../a"), 1)).encode(), "names '../a'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_damage_is_a_fault(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    """Shorter, altered, missing and added files, and a seal that is damaged, empty or short of a needed file,
    are each told."""
    path = _checkpoint(tmp_path, 1)
    seal(path)
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content)
    assert message in str(fault(path))


def test_newest_is_by_number_and_whole(tmp_path: Path) -> None:
    """checkpoint-10 is newer than checkpoint-9; damaged newer ones are set aside and told."""
    for step in (9, 10):
        seal(_checkpoint(tmp_path, step))
    said: list[str] = []
    assert newest(tmp_path, said.append) == tmp_path / "checkpoint-10"
    for _ in range(2):  # the second one finds the name of the first taken
        _checkpoint(tmp_path, 11)
        assert newest(tmp_path, said.append) == tmp_path / "checkpoint-10"
    names = sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("damaged"))
    assert names == ["damaged-checkpoint-11", "damaged-checkpoint-11-2"]
    assert len(said) == 2
    assert "cut short" in said[0]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    """An empty or missing folder has no newest checkpoint."""
    assert newest(tmp_path, print) is None
    assert newest(tmp_path / "missing", print) is None


def test_what_was_cut_short_goes_when_it_is_there_again(tmp_path: Path) -> None:
    """What a killed save left is deleted once a whole checkpoint of that step or a later one is there; not
    before that, not what had been sealed, and nothing of another name."""
    aside = {"cut": "damaged-checkpoint-4", "later": "damaged-checkpoint-12"}
    aside |= {"again": "damaged-checkpoint-4-2", "whole": "damaged-checkpoint-3"}
    for name in (*aside.values(), "damaged-checkpoint-4-old", "checkpoint-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / WEIGHTS).write_bytes(b"")
    (tmp_path / aside["whole"] / SEAL).write_text("{}")
    _checkpoint(tmp_path, 8)
    clear_cut_short(tmp_path, 8)
    assert (tmp_path / aside["cut"]).exists()
    seal(tmp_path / "checkpoint-8")
    clear_cut_short(tmp_path, 8)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {
        "checkpoint-2", "checkpoint-8", aside["later"], aside["whole"], "damaged-checkpoint-4-old",
    }  # fmt: skip
