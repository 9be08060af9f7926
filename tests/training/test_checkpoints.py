"""A seal tells a whole checkpoint from any other."""

from pathlib import Path

import pytest

from gka.training.checkpoints import SEAL, fault, newest, seal


def _checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(bytes(range(100)))
    (path / "state").write_bytes(b"state")
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
        ("weights", bytes(range(99)), "weights has 99 bytes, sealed with 100"),
        ("weights", bytes(100), "content of weights has changed"),
        ("weights", None, "weights is missing"),
        (SEAL, b'{"weights"', f"{SEAL} is damaged"),
        (SEAL, b'{"weights": 1}', f"{SEAL} is damaged"),
    ],
)
def test_every_damage_is_a_fault(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    """Shorter, altered, missing files and a damaged seal are each told."""
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
