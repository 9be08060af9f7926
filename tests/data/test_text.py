"""Documents are found, named alike everywhere, and read exactly or refused; tokenizers end and fit."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gka.data import text as corpus
from gka.data.text import (
    END_OF_TEXT,
    Encoder,
    byte_tokenizer,
    fingerprint,
    load_tokenizer,
    vocabulary_size,
)
from gka.errors import InputError


def _write(folder: Path, **files: bytes) -> None:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_folders_are_searched_and_sorted(tmp_path: Path) -> None:
    """Every file at any depth, sorted by name; hidden and empty ones left out; glob narrows."""
    _write(tmp_path, b_dot_txt=b"b", a__c_dot_py=b"c", empty_dot_txt=b"", _dot_git__x=b"x")
    root = tmp_path.name
    names = [d.name for d in corpus.find_documents([str(tmp_path)])]
    assert names == [f"{root}/a/c.py", f"{root}/b.txt"]
    assert [d.name for d in corpus.find_documents([str(tmp_path)], "*.py")] == [f"{root}/a/c.py"]


def test_a_file_reached_twice_is_one_document(tmp_path: Path) -> None:
    """A file given beside its folder is not read twice, so it cannot be in both parts of a split."""
    _write(tmp_path, a=b"a", b=b"b")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    documents = corpus.find_documents([str(tmp_path / "a"), str(tmp_path)])
    assert sorted(d.path.resolve().name for d in documents) == ["a", "b"]


def test_fingerprint_changes_with_any_source(tmp_path: Path) -> None:
    """A changed, added or removed file changes the fingerprint; nothing else does."""
    _write(tmp_path, a=b"a", b=b"b")
    first = corpus.corpus_fingerprint(corpus.find_documents([str(tmp_path)]))
    assert corpus.corpus_fingerprint(corpus.find_documents([str(tmp_path)])) == first
    (tmp_path / "a").write_bytes(b"aa")
    second = corpus.corpus_fingerprint(corpus.find_documents([str(tmp_path)]))
    (tmp_path / "b").unlink()
    third = corpus.corpus_fingerprint(corpus.find_documents([str(tmp_path)]))
    assert len({first, second, third}) == 3


@pytest.mark.parametrize("how", ["in place", "another file"])
def test_a_change_without_change_of_size_and_time_is_seen(tmp_path: Path, how: str) -> None:
    """A file that was written over, or replaced by another of the same size, and given its former time of
    modification, is another source."""
    _write(tmp_path, a=b"one", b=b"b")
    first = corpus.corpus_fingerprint(corpus.find_documents([str(tmp_path)]))
    path, before = tmp_path / "a", (tmp_path / "a").stat()
    time.sleep(0.02)  # the clock of the file system ticks
    if how == "in place":
        path.write_bytes(b"two")
    else:
        (tmp_path / "new").write_bytes(b"two")
        (tmp_path / "new").replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert corpus.corpus_fingerprint(corpus.find_documents([str(tmp_path)])) != first


def test_hashed_sources_are_their_content(tmp_path: Path) -> None:
    """With `hashed` the fingerprint follows names and content: not places and times, whatever they say."""
    (tmp_path / "a").mkdir()
    _write(tmp_path / "a", x=b"one", y=b"y")

    def found(folder: str) -> str:
        documents = corpus.find_documents([str(tmp_path / folder / "a")], hashed=True)
        return corpus.corpus_fingerprint(documents)

    first = found(".")
    shutil.copytree(tmp_path / "a", tmp_path / "copy" / "a")
    assert found("copy") == first
    (tmp_path / "copy" / "a" / "x").write_bytes(b"two")
    assert found("copy") != first


def test_a_document_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    """A document is the file that was found, or an error that names it."""
    _write(tmp_path, a=b"one")
    (document,) = corpus.find_documents([str(tmp_path)], hashed=True)
    corpus.check_unchanged(document)
    (tmp_path / "a").write_bytes(b"longer")
    with pytest.raises(InputError, match=r"a was changed while it was read; start again"):
        corpus.check_unchanged(document)


def test_missing_and_empty_corpora_are_refused(tmp_path: Path) -> None:
    """A path that is not there, an empty folder and a folder of empty files are told apart."""
    with pytest.raises(InputError, match="gone does not exist"):
        corpus.find_documents([str(tmp_path / "gone")])
    with pytest.raises(InputError, match="no files found"):
        corpus.find_documents([str(tmp_path)])
    _write(tmp_path, a=b"")
    with pytest.raises(InputError, match="only empty files found"):
        corpus.find_documents([str(tmp_path)])


def test_standard_library_is_sources_without_tests() -> None:
    """The default corpus is megabytes of Python, readable as UTF-8, without the test suites."""
    documents = corpus.standard_library()
    names = {d.name for d in documents}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any(n.startswith(("test/", "site-packages/")) or "/tests/" in n for n in names)
    assert sum(d.size for d in documents) > 5_000_000
    for document in documents:
        assert sum(len(p.encode()) for p in corpus.read_pieces(document.path)) in (
            document.size,
            document.size - 3,  # a byte-order mark is not text
        )


def test_interpreter_without_sources_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interpreter that ships no sources is refused as a default corpus."""
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(InputError, match="standard library of this Python"):
        corpus.find_documents([])


def test_pieces_are_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces end with lines, keep line ends of every kind, and join to the file's text."""
    monkeypatch.setattr(corpus, "PIECE", 5)
    text = "äöü\r\none line\n\nlonger than a piece\rlast"
    (tmp_path / "t").write_bytes(text.encode())
    pieces = list(corpus.read_pieces(tmp_path / "t"))
    assert "".join(pieces) == text
    assert len(pieces) > 2
    assert all(piece[-1] in "\r\n" for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b"first\nsecond \xe9t\xe9\n", "byte 0xe9 at offset 13"),
        ("utf-16".encode("utf-16"), "byte 0xff at offset 0"),
        (b"cut \xc3", "byte 0xc3 at offset 4"),
    ],
)
def test_wrong_encoding_is_refused_with_its_place(
    tmp_path: Path, content: bytes, where: str
) -> None:
    """Latin-1, UTF-16 and a cut-off character are refused with the file and the offending byte."""
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(InputError, match=rf"bad\.txt is not UTF-8 \({where}\)"):
        list(corpus.read_pieces(tmp_path / "bad.txt"))


def test_names_do_not_depend_on_the_place(tmp_path: Path) -> None:
    """The same folder elsewhere gives the same names (so the same held-out documents)."""
    _write(tmp_path / "one" / "text", a=b"a", b__c=b"c")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    names = [
        [d.name for d in corpus.find_documents([str(tmp_path / place / "text")])]
        for place in ("one", "two")
    ]
    assert names[0] == names[1]


BYTES = byte_tokenizer()


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_ids_are_the_bytes(text: str) -> None:
    """Ids are the UTF-8 bytes and decode to the text, whatever the text."""
    ids = BYTES(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


def test_end_marker_in_text_is_text() -> None:
    """Text that spells the end marker becomes its bytes; only id 256 is the marker."""
    assert BYTES(END_OF_TEXT)["input_ids"] == list(END_OF_TEXT.encode())
    assert BYTES.eos_token_id == BYTES.pad_token_id == 256
    assert len(BYTES) == 257


def test_saved_tokenizer_loads_without_this_library(tmp_path: Path) -> None:
    """AutoTokenizer loads the saved folder in a process that never imports gka, and gives the bytes."""
    BYTES.save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoTokenizer as A\n"
        f"t = A.from_pretrained({str(tmp_path)!r}, local_files_only=True)\n"
        "assert t('é\\n <|endoftext|>')['input_ids'] == list('é\\n <|endoftext|>'.encode())\n"
        "assert t.decode([195, 169, 10, 256]) == 'é\\n<|endoftext|>' and 'gka' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fingerprint_survives_saving_and_tells_tokenizers_apart(
    tmp_path: Path, word_tokenizer: Path
) -> None:
    """A saved tokenizer has the fingerprint it had; another tokenizer has another."""
    BYTES.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert fingerprint(saved) == fingerprint(BYTES)
    assert fingerprint(load_tokenizer(str(word_tokenizer))) != fingerprint(BYTES)


@settings(max_examples=25, deadline=None)
@given(st.text())
def test_fast_encoding_equals_the_tokenizer(text: str) -> None:
    """The encoder's short cut for bytes gives the tokenizer's own ids."""
    np.testing.assert_array_equal(
        Encoder(BYTES)(text), BYTES(text, add_special_tokens=False)["input_ids"]
    )


def test_other_tokenizers_encode_as_themselves(word_tokenizer: Path) -> None:
    """A Hugging Face tokenizer given by folder is used as it is."""
    encode = Encoder(load_tokenizer(str(word_tokenizer)))
    assert encode("b a b c").tolist() == [1, 0, 1, 2]
    assert encode.end == 3
    assert encode.dtype == np.uint16


def test_vocabulary_reaches_the_largest_id(word_tokenizer: Path) -> None:
    """Where ids have gaps, a model needs as many as the largest id asks for, not as there are."""
    tokenizer = AutoTokenizer.from_pretrained(word_tokenizer)
    assert vocabulary_size(tokenizer) == 4
    gaps = Tokenizer(models.WordLevel({"a": 0, "</s>": 99}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=gaps, eos_token="</s>")
    assert (len(tokenizer), vocabulary_size(tokenizer)) == (2, 100)
    assert vocabulary_size(BYTES) == 257


def test_unknown_tokenizer_is_refused(tmp_path: Path) -> None:
    """A folder without a tokenizer is refused, naming it and what can be given."""
    with pytest.raises(InputError, match=r"cannot be loaded .* give 'bytes'"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_without_end_is_refused(tmp_path: Path, word_tokenizer: Path) -> None:
    """A tokenizer without an end-of-text token cannot part documents."""
    tokenizer = AutoTokenizer.from_pretrained(word_tokenizer)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path))
