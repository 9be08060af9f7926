"""Tokenising in parts: rows of JSONL and Parquet, processes, restart after a kill, bad input."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gka.data import PackedTokens, byte_tokenizer, find_documents, make, pack, sources
from gka.data.packing import default_workers
from gka.errors import InputError

ROWS = ["one", "zwei", None, "", "d" * 30, "last"]
TEXTS = [text for text in ROWS if text]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LEAST_PART", 40)


def _texts(packed: PackedTokens) -> list[str]:
    """Each document's text, without its end token."""
    pairs = zip(packed.boundaries[:-1], packed.boundaries[1:], strict=True)
    return [bytes(packed.tokens[a : b - 1].tolist()).decode() for a, b in pairs]


def _write(path: Path, rows: list[Any]) -> None:
    lines = "".join(json.dumps({"id": i, "text": row}) + "\n" for i, row in enumerate(rows))
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".jsonl":
        path.write_text(lines)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        nested = [{"a": i, "b": i} for i, _ in enumerate(rows)]  # a column of two leaves before it
        table = pyarrow.table({"meta": nested, "text": pyarrow.array(rows, pyarrow.string())})
        parquet.write_table(table, path, row_group_size=2)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_each_row_is_a_document(tmp_path: Path, name: str) -> None:
    """Rows in several parts are the documents in order, once each; rows without text are counted."""
    _write(tmp_path / name, ROWS)
    packed = pack(
        find_documents([str(tmp_path / name)]), byte_tokenizer(), tmp_path / "c", column="text"
    )
    assert _texts(packed) == TEXTS
    assert packed.description["skipped"] == 2
    assert len(set(packed.keys.tolist())) == len(TEXTS)
    assert len(packed.shards) == (1 if name.endswith("gz") else 3 if name.endswith("t") else 5)


def test_lines_are_read_once_wherever_parts_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of any size, within a line or at its end, give each line to one part."""
    _write(tmp_path / "a.jsonl", TEXTS)
    files = find_documents([str(tmp_path / "a.jsonl")])
    for size in range(1, 100, 7):
        parts = sources.parts_of(files, "text", size)
        rows = [
            row for part in parts for piece in part.pieces for row in sources.rows_of(piece, "text")
        ]
        assert ["".join(pieces) for _, pieces in rows] == TEXTS


def test_without_a_column_files_are_text(tmp_path: Path) -> None:
    """column "" reads a .jsonl file as it is, one document."""
    _write(tmp_path / "a.jsonl", TEXTS)
    packed = pack(find_documents([str(tmp_path / "a.jsonl")]), byte_tokenizer(), tmp_path / "c")
    assert _texts(packed) == [(tmp_path / "a.jsonl").read_text()]


def test_bad_rows_are_named(tmp_path: Path) -> None:
    """A missing column, another type, a line that is no JSON or not UTF-8: file, place and what to do."""
    cases: dict[str, tuple[bytes, str]] = {
        "missing.jsonl": (b'{"body": "x"}\n', r"missing.jsonl.* byte 0 has no 'text'; it has body"),
        "type.jsonl": (b'{"text": 3}\n', r"type.jsonl@0: 'text' is of type int; expected a string"),
        "json.jsonl": (b'{"text": "a"}\nxx\n', r"json.jsonl, line at byte 14 is not JSON"),
        "list.jsonl": (b"[1]\n", r"is a list; expected a JSON object"),
        "utf.jsonl": (b'{"text": "\xff"}\n', r"utf.jsonl, line at byte 0 is not UTF-8"),
        "half.jsonl": (b'{"text": "\\ud800"}\n', r"half.jsonl@0 holds half of a surrogate pair"),
        "empty.jsonl": (b'{"text": ""}\n', r"no row has text"),
        "broken.jsonl.gz": (b"xx", r"broken.jsonl.gz cannot be read"),
        "bytes.txt": (b"ab\xff", r"bytes.txt is not UTF-8 \(byte 0xff at offset 2\)"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            pack(
                find_documents([str(tmp_path / name)]),
                byte_tokenizer(),
                tmp_path / "c",
                column="text",
            )
    assert not list((tmp_path / "c").iterdir())


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    """A column that is missing or no text, and a damaged file."""
    _write(tmp_path / "a.parquet", ROWS)
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    for name, column, message in (
        ("a", "body", r"a.parquet has no column 'body'; it has meta, text"),
        ("a", "meta", r"column 'meta' is struct.*expected strings"),
        ("b", "text", r"b.parquet is not readable Parquet"),
    ):
        with pytest.raises(InputError, match=message):
            files = find_documents([str(tmp_path / f"{name}.parquet")])
            pack(files, byte_tokenizer(), tmp_path / "c", column=column)


# Tokenises with two processes, and kills itself when some parts are done and others begun.
KILLED = """
import os, signal, sys
from pathlib import Path
from gka.data import find_documents, load_tokenizer, make, sources
sources.LEAST_PART = 40
def show(progress):
    if progress.done - progress.found >= 3:
        os.kill(os.getpid(), signal.SIGKILL)
make(Path(sys.argv[2]), find_documents([sys.argv[1]]), load_tokenizer("bytes"), show, workers=2)
"""


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """Killed by SIGKILL twice while two processes tokenise, a run goes on: parts that were done are not
    touched, the folder appears at the end only, and holds what an undisturbed run in one process makes. No
    process is left behind."""
    text, output = tmp_path / "text", tmp_path / "out"
    text.mkdir()
    for i in range(14):
        (text / f"{i:02}").write_text(f"document {i} " * 5)
    unfinished, stamps = tmp_path / "out.unfinished", {}
    for _ in range(2):
        command = [sys.executable, "-c", KILLED, str(text), str(output)]
        assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
        assert not output.exists()
        for path, stamp in stamps.items():
            assert path.stat().st_mtime_ns == stamp
        stamps = {p: p.stat().st_mtime_ns for p in unfinished.glob("0*")}
        done = len(list(unfinished.glob("0*.json")))
        assert done >= 3
    found, before = [], {p.name: p.stat().st_mtime_ns for p in unfinished.glob("0*.tokens")}
    make(
        output,
        find_documents([str(text)]),
        byte_tokenizer(),
        lambda p: found.append((p.found, p.parts)),
    )
    assert set(found) == {(done, 14)} and done >= 6
    finished = [path.stem for path in stamps if path.suffix == ".json"]
    assert all(
        (output / f"{n}.tokens").stat().st_mtime_ns == before[f"{n}.tokens"] for n in finished
    )
    packed = PackedTokens.open(output, byte_tokenizer())
    packed.verify()
    whole = pack(find_documents([str(text)]), byte_tokenizer(), tmp_path / "cache")
    assert packed.checksum == whole.checksum
    time.sleep(0.1)
    assert not _children_at(unfinished)


def _children_at(folder: Path) -> list[str]:
    """Processes that have a file of the folder open."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            target = os.readlink(link)
        except OSError:
            continue
        found += [str(link)] if target.startswith(str(folder)) else []
    return found


def test_an_error_in_a_worker_is_the_callers(tmp_path: Path) -> None:
    """A bad file ends all processes with its message; unfinished work of other sources is not mixed in."""
    for name, content in (("a", b"x" * 50), ("b", b"\xff" * 50), ("c", b"y" * 50)):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / name).write_bytes(content)
    files, output = find_documents([str(tmp_path / "text")]), tmp_path / "out"
    with pytest.raises(InputError, match=r"text/b is not UTF-8"):
        make(output, files, byte_tokenizer(), workers=2)
    assert not output.exists()
    if (tmp_path / "out.unfinished").exists():
        with pytest.raises(InputError, match="unfinished work on another text"):
            make(output, files[:1], byte_tokenizer())


def test_processes_are_started_where_they_pay() -> None:
    """Little text, and text whose ids are bytes, is tokenised in this process."""
    assert default_workers(1 << 20, False) == default_workers(1 << 27, True) == 1
    assert default_workers(1 << 40, False) == len(os.sched_getaffinity(0))
