"""Machine code on disk: read where it is whole and its own, compiled again with a warning where it is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gka.kernels import cubins
from gka.kernels.hopper import build, nvrtc

PARTS = ("compiler 1", "--option", "source")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The cache of one test."""
    monkeypatch.setenv("GKA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GKA_COMPILE_CACHE")
    monkeypatch.setattr(cubins, "_warned", set())
    return tmp_path / "cache" / "compiled" / "cubins"


class Compiler:
    """Counts how often it is called."""

    def __init__(self, code: bytes = b"machine code") -> None:
        self.code, self.calls = code, 0

    def __call__(self) -> bytes:
        self.calls += 1
        return self.code


def test_what_was_compiled_is_read_and_not_compiled_again(folder: Path) -> None:
    """The second request reads; the file's name is the hash of everything the code depends on."""
    compiler = Compiler()
    assert [cubins.kept(PARTS, compiler) for _ in range(3)] == [b"machine code"] * 3
    assert compiler.calls == 1
    assert [p.name for p in folder.iterdir()] == [f"{cubins.key_of(PARTS).hex()}.cubin"]


def test_any_other_part_is_another_kernel() -> None:
    """A part that changes, moves or is cut elsewhere has another key."""
    others = [
        ("compiler 2", "--option", "source"), ("--option", "compiler 1", "source"),
        ("compiler 1--option", "source"), (*PARTS, ""), ("compiler 1", "--options", "ource"),
    ]  # fmt: skip
    assert len({cubins.key_of(parts) for parts in (PARTS, *others)}) == 6


@pytest.mark.parametrize("damage", ["cut", "changed", "foreign", "moved", "empty"])
def test_a_file_that_is_not_whole_is_compiled_again(folder: Path, damage: str) -> None:
    """Cut short, changed in one bit, foreign, of another key or empty: never loaded, replaced, and told."""
    cubins.kept(PARTS, Compiler())
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    if damage == "moved":
        cubins.kept(("other",), Compiler(b"other code"))
        other = folder / f"{cubins.key_of(('other',)).hex()}.cubin"
        path.write_bytes(other.read_bytes())
    else:
        damaged = {
            "cut": whole[:-3], "changed": whole[:-1] + bytes([whole[-1] ^ 1]),
            "foreign": b"\x7fELF" + whole, "empty": b"",
        }  # fmt: skip
        path.write_bytes(damaged[damage])
    compiler = Compiler()
    with pytest.warns(RuntimeWarning, match=rf"{path.name} is damaged or no file of this library"):
        assert cubins.kept(PARTS, compiler) == b"machine code"
    assert compiler.calls == 1 and path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_told_once(folder: Path) -> None:
    """Everything is compiled, nothing is kept, and one warning says so and what to do."""
    folder.parent.parent.mkdir()
    folder.parent.write_text("a file where the folder would be")
    compiler = Compiler()
    with pytest.warns(RuntimeWarning) as told:
        for parts in (PARTS, ("other",), ("third",)):
            assert cubins.kept(parts, compiler) == b"machine code"
    assert compiler.calls == 3
    texts = [str(warning.message) for warning in told]
    assert sum("are not kept" in text for text in texts) == 1
    assert any("GKA_CACHE" in text and "GKA_COMPILE_CACHE=0" in text for text in texts)


def test_it_can_be_turned_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GKA_COMPILE_CACHE=0 neither reads nor writes."""
    cubins.kept(PARTS, Compiler(b"old"))
    monkeypatch.setenv("GKA_COMPILE_CACHE", "0")
    assert cubins.kept(PARTS, Compiler(b"new")) == b"new"
    monkeypatch.delenv("GKA_COMPILE_CACHE")
    assert cubins.kept(PARTS, Compiler(b"new")) == b"old"


def test_the_size_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit the files that were used longest ago go."""
    monkeypatch.setattr(cubins, "LIMIT", 3000)
    for number in range(3):
        cubins.kept((str(number),), Compiler(bytes([65 + number]) * 800))
        path = folder / f"{cubins.key_of((str(number),)).hex()}.cubin"
        os.utime(path, (1000 + number, 1000 + number))
    cubins.kept(("0",), Compiler())  # used again, so 1 is the oldest
    cubins.kept(("new",), Compiler(b"n" * 800))
    left = {p.stem for p in folder.iterdir()}
    assert left == {cubins.key_of((part,)).hex() for part in ("0", "2", "new")}


def test_an_error_of_the_compiler_is_not_kept(folder: Path) -> None:
    """It passes, and nothing is written."""

    def fail() -> bytes:
        raise nvrtc.CompilationError("no program")

    with pytest.raises(nvrtc.CompilationError, match="no program"):
        cubins.kept(PARTS, fail)
    assert not folder.exists()


SECOND = """
from gka.kernels import cubins
from gka.kernels.hopper import build
code = build.compile_cubin(build.source("combine_states", 64, 64, True, "chebyshev"), "gka_combine")
print(len(code), dict(cubins.COUNTS))
"""


@pytest.mark.skipif(nvrtc.why_missing() is not None, reason=f"no NVRTC: {nvrtc.why_missing()}")
def test_a_second_process_reads_what_the_first_compiled() -> None:
    """A kernel of the Hopper backend is compiled by NVRTC once, and read by the next process."""
    said = [
        subprocess.run(
            [sys.executable, "-c", SECOND], check=True, capture_output=True, text=True
        ).stdout.split(" ", 1)
        for _ in range(2)
    ]
    assert said[0][0] == said[1][0]
    assert "'compiled': 1" in said[0][1] and "'read'" not in said[0][1]
    assert "'read': 1" in said[1][1] and "'compiled'" not in said[1][1]


def test_headers_and_compiler_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another header, another version of NVRTC or another option gives another key."""
    monkeypatch.setattr(nvrtc, "version", lambda: "NVRTC 13.0")
    key = lambda: cubins.key_of(build._parts("source", "name"))  # noqa: E731
    first = key()
    header = next(iter(build.headers()))
    with monkeypatch.context() as change:
        texts = {**build.headers(), header: "// changed"}
        change.setattr(build, "headers", lambda: texts)
        assert key() != first
    with monkeypatch.context() as change:
        change.setattr(nvrtc, "version", lambda: "NVRTC 13.1")
        assert key() != first
    with monkeypatch.context() as change:
        change.setattr(nvrtc, "options_for", lambda arch: (f"--gpu-architecture={arch}",))
        assert key() != first
    assert key() == first
