"""Files appear whole or not at all, and damaged ones are refused by name."""

import json
import os
from pathlib import Path

import pytest

from gka.data import files
from gka.errors import InputError


def test_json_round_trip(tmp_path: Path) -> None:
    """What is written is read back, and no temporary file stays beside it."""
    path = tmp_path / "new" / "value.json"
    files.write_json(path, {"a": [1, 2.5, None]})
    assert files.read_json(path) == {"a": [1, 2.5, None]}
    assert [p.name for p in path.parent.iterdir()] == ["value.json"]


def test_text_is_stored_as_it_is(tmp_path: Path) -> None:
    """Text is UTF-8 with its line ends untouched, in a folder that is made for it, in place of what was."""
    path = tmp_path / "new" / "page.md"
    files.write_text(path, "old")
    files.write_text(path, "é\r\n\n")
    assert path.read_bytes() == b"\xc3\xa9\r\n\n"
    assert [p.name for p in path.parent.iterdir()] == ["page.md"]


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails before the end leaves the former content and no debris."""
    path = tmp_path / "value.json"
    files.write_json(path, {"old": 1})

    def fail(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


@pytest.mark.parametrize("content", ['{"a": 1', "[1]", "\xff"])
def test_damaged_json_is_refused_by_name(tmp_path: Path, content: str) -> None:
    """JSON that is cut short, no object, or no text is an error that names the file."""
    path = tmp_path / "value.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"value\.json"):
        files.read_json(path)


def test_missing_json_is_refused_by_name(tmp_path: Path) -> None:
    """A missing file is an InputError too, not a bare FileNotFoundError."""
    with pytest.raises(InputError, match=r"none\.json does not exist"):
        files.read_json(tmp_path / "none.json")
