"""Packed tokens are the documents' tokens; they are reused, verified, and never half there."""

import contextlib
import hashlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gka.data import (
    Document,
    PackedTokens,
    Progress,
    byte_tokenizer,
    find_documents,
    load_tokenizer,
    make,
    pack,
    packing,
    sources,
    split,
    token_blocks,
)
from gka.data.text import fingerprint
from gka.errors import BusyError, InputError, StorageError
from gka.storage import only_maker

TEXTS = {"a.txt": "first\n", "b.txt": "zwölf\n", "c.txt": "x" * 1000}


@pytest.fixture
def documents(tmp_path: Path) -> list[Document]:
    folder = tmp_path / "text"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return find_documents([str(folder)])


def test_tokens_boundaries_and_counts(documents: list[Document], tmp_path: Path) -> None:
    """Each document is its bytes and the end token, at its boundaries, with its size in bytes."""
    packed = pack(documents, byte_tokenizer(), tmp_path / "cache")
    expected = [[*text.encode(), 256] for text in TEXTS.values()]
    for i, ids in enumerate(expected):
        low, high = packed.boundaries[i : i + 2]
        assert packed.tokens[low:high].tolist() == ids
    assert packed.tokens.dtype == np.uint16
    assert packed.bytes.tolist() == [len(text.encode()) for text in TEXTS.values()]
    assert packed.description["tokens"] == len(packed.tokens) == sum(map(len, expected))
    assert packed.tokens[-1] == 256 and not packed.shard_tokens(0).flags.writeable


def test_pieces_do_not_show(
    documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading in small pieces gives the same file as reading whole documents."""
    whole = pack(documents, byte_tokenizer(), tmp_path / "cache")
    monkeypatch.setattr("gka.data.text.PIECE", 3)
    assert pack(documents, byte_tokenizer(), tmp_path / "other").checksum == whole.checksum


def test_cache_is_reused_until_a_source_changes(
    documents: list[Document], tmp_path: Path, word_tokenizer: Path
) -> None:
    """The same sources and tokenizer are tokenised once; another source or tokenizer is another pack."""
    cache, seen = tmp_path / "cache", []
    first = pack(documents, byte_tokenizer(), cache, lambda progress: seen.append(progress.done))
    assert seen[-1] == 1
    seen.clear()
    again = pack(documents, byte_tokenizer(), cache, lambda progress: seen.append(progress.done))
    assert again.folder == first.folder
    assert not seen
    other = pack(documents, load_tokenizer(str(word_tokenizer)), cache)
    documents[0].path.write_text("changed\n")
    changed = pack(find_documents([str(documents[0].path.parent)]), byte_tokenizer(), cache)
    assert len({first.folder, other.folder, changed.folder}) == 3
    assert len(list(cache.iterdir())) == 3


def test_failure_leaves_nothing(documents: list[Document], tmp_path: Path) -> None:
    """When a document cannot be read, no folder that could be taken for a pack is left."""
    documents[-1].path.write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"c\.txt is not UTF-8"):
        pack(documents, byte_tokenizer(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_one_line_and_loses_nothing(
    documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room for the tokens: an error that names the cache and says what to do. Finished parts stay, and
    with room again they are not made anew; the folder of the corpus was never there."""
    monkeypatch.setattr(sources, "LEAST_PART", 1)
    cache, before = tmp_path / "cache", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(
            StorageError, match=r"packed tokens in .*cache.* cannot .*: .*GKA_CACHE"
        ):
            pack(documents, byte_tokenizer(), cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (left,) = cache.iterdir()
    assert left.name.endswith(".unfinished") and not list(left.glob("*.draft"))
    found = []
    packed = pack(documents, byte_tokenizer(), cache, lambda progress: found.append(progress.found))
    assert set(found) == {2} and len(packed.shards) == 3
    assert [path.name for path in cache.iterdir()] == [packed.folder.name]
    assert {path.suffix for path in packed.folder.iterdir()} == {".json", ".tokens", ".index"}
    assert len(list(packed.folder.iterdir())) == 7


def test_left_overs_of_killed_packings_go(documents: list[Document], tmp_path: Path) -> None:
    """What processes killed while packing have left, of any corpus, goes with the next packing: drafts that
    nobody locks, and after a day those of older releases, which had no locks. Packed corpora stay."""
    cache, key = tmp_path / "cache", "0123456789abcdef" * 2
    gone, young = f".{key}.abcdefgh.draft", f".{key}.aaaaaaaa"
    for name in (gone, f".{key}.bbbbbbbb", young, key, ".mine.abcdefgh.draft"):
        (cache / name).mkdir(parents=True)
        (cache / name / "tokens.bin").write_bytes(b"0")
        then = time.time() - (3600 if name == young else 90_000)
        for path in (cache / name / "tokens.bin", cache / name):
            os.utime(path, (then, then))
    packed = pack(documents, byte_tokenizer(), cache)
    left = {path.name for path in cache.iterdir()}
    assert left == {packed.folder.name, young, key, ".mine.abcdefgh.draft"}


def test_damage_is_refused(documents: list[Document], tmp_path: Path) -> None:
    """Missing or cut files and an altered description are refused at once, a changed id by `verify`."""
    tokenizer = byte_tokenizer()
    packed = pack(documents, tokenizer, tmp_path / "cache")
    folder = packed.folder
    packed.verify()
    tokens, index, description = (
        folder / name for name in ("000000.tokens", "000000.index", "corpus.json")
    )
    parsed = json.loads(description.read_text())
    edited = parsed | {"shards": [parsed["shards"][0] | {"tokens": 5}]}
    cases = [
        (tokens, tokens.read_bytes()[:-2], "000000.tokens has"),
        (index, index.read_bytes()[:-8], "000000.index has"),
        (description, description.read_bytes()[:-20], "not readable JSON"),
        (description, json.dumps(edited).encode(), "facts differs"),
        (description, json.dumps(parsed | {"format": 99}).encode(), "format is 99, expected 2"),
    ]
    for path, content, message in cases:
        good = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            pack(documents, tokenizer, tmp_path / "cache")
        path.write_bytes(good)
    good = tokens.read_bytes()
    tokens.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(InputError, match=r"checksum of 000000\.tokens differs"):
        pack(documents, tokenizer, tmp_path / "cache").verify()
    index.unlink()
    with pytest.raises(InputError, match=r"000000\.index is missing"):
        pack(documents, tokenizer, tmp_path / "cache")


def _former(documents: list[Document], folder: Path) -> bytes:
    """Write the corpus as earlier releases did; the ids."""
    tokenizer, table = byte_tokenizer(), []
    ids = b""
    for document in documents:
        text = document.path.read_bytes()
        ids += np.asarray([*text, 256], np.uint16).tobytes()
        table.append({"name": document.name, "tokens": len(text) + 1, "bytes": len(text)})
    folder.mkdir(parents=True)
    (folder / "tokens.bin").write_bytes(ids)
    description = {
        "format": 1, "dtype": "uint16", "byteorder": sys.byteorder, "tokens": len(ids) // 2,
        "bytes": sum(row["bytes"] for row in table), "sha256": hashlib.sha256(ids).hexdigest(),
        "tokenizer": fingerprint(tokenizer), "vocabulary": 257, "documents": table,
    }  # fmt: skip
    (folder / "tokens.json").write_text(json.dumps(description))
    return ids


def test_a_folder_of_an_earlier_release_opens(documents: list[Document], tmp_path: Path) -> None:
    """tokens.bin with tokens.json is the same corpus as one packed now, and is still verified."""
    ids, new = (
        _former(documents, tmp_path / "old"),
        pack(documents, byte_tokenizer(), tmp_path / "cache"),
    )
    old = PackedTokens.open(tmp_path / "old", byte_tokenizer())
    assert old.tokens[:].tobytes() == ids == new.tokens[:].tobytes()
    assert old.stream_checksum() == new.stream_checksum()
    assert (old.boundaries == new.boundaries).all() and (old.keys == new.keys).all()
    assert (split(old, 0.3)[1].ranges == split(new, 0.3)[1].ranges).all()
    (tmp_path / "old" / "tokens.bin").write_bytes(ids[:-2] + b"aa")
    with pytest.raises(InputError, match="checksum differs"):
        PackedTokens.open(tmp_path / "old", byte_tokenizer())


def test_a_cache_of_an_earlier_release_is_converted(
    documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens are copied, not made again, to exactly the shards that tokenising would give."""
    monkeypatch.setattr(sources, "LEAST_PART", 20)
    expected = pack(documents, byte_tokenizer(), tmp_path / "cache")
    old = tmp_path / "other" / packing._former_key(documents, byte_tokenizer())
    _former(documents, old)
    monkeypatch.setattr(packing, "_tokenise", None)
    said = []
    packed = pack(
        documents, byte_tokenizer(), tmp_path / "other", lambda p: said.append(p.converting)
    )
    assert said == [True]
    assert packed.description == expected.description and len(packed.shards) == 2
    packed.verify()
    assert not old.exists()


def test_other_tokenizer_is_refused(
    documents: list[Document], tmp_path: Path, word_tokenizer: Path
) -> None:
    """Tokens packed with one tokenizer do not open with another."""
    folder = pack(documents, byte_tokenizer(), tmp_path / "cache").folder
    with pytest.raises(InputError, match="packed with another tokenizer"):
        PackedTokens.open(folder, load_tokenizer(str(word_tokenizer)))


def test_a_second_process_waits_and_goes_on(
    documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another process packs the same corpus a second one waits, naming it; when that one ends without
    a result, it packs itself. A folder of one's own is refused meanwhile."""
    cache = tmp_path / "cache"
    folder = cache / packing.cache_key(documents, byte_tokenizer(), "")
    said, other = [], contextlib.ExitStack()
    other.enter_context(only_maker(folder, "packed corpus"))

    def show(progress: Progress) -> None:
        said.append(progress.waiting)
        other.close()  # the other process ends

    with pytest.raises(BusyError, match=rf"is being written by process {os.getpid()}"):
        make(folder, documents, byte_tokenizer())
    monkeypatch.setattr(packing, "WAIT", 0.01)
    assert pack(documents, byte_tokenizer(), cache, show).documents == 3
    assert f"written by process {os.getpid()}" in said[0] and said[-1] == ""


def _packed(tmp_path: Path, sizes: list[int]) -> PackedTokens:
    folder = tmp_path / "text"
    folder.mkdir()
    for i, size in enumerate(sizes):
        (folder / f"{i:03}").write_text(chr(97 + i % 26) * size)
    return pack(find_documents([str(folder)]), byte_tokenizer(), tmp_path / "cache")


def test_split_is_by_document_and_complete(tmp_path: Path) -> None:
    """Every document is in one part, whole; the held-out share is about what was asked for."""
    packed = _packed(tmp_path, [100] * 50)
    train, held = split(packed, 0.1)
    rows = sorted([*map(tuple, train.ranges), *map(tuple, held.ranges)])
    assert rows == list(zip(packed.boundaries[:-1], packed.boundaries[1:], strict=True))
    assert held.tokens == 5 * 101
    assert held.bytes == 500
    assert train.bytes == 4500


def test_long_documents_do_not_become_the_evaluation(tmp_path: Path) -> None:
    """A document longer than the share is passed over; if all are, the shortest is held out."""
    _, held = split(_packed(tmp_path, [10_000, 300]), 0.01)
    assert held.bytes == 300


def test_single_document_is_cut(tmp_path: Path) -> None:
    """Of one document the last part is held out, its bytes in proportion."""
    packed = _packed(tmp_path, [999])
    train, held = split(packed, 0.1)
    assert (train.tokens, held.tokens) == (900, 100)
    assert held.ranges.tolist() == [[900, 1000]]
    assert held.bytes == pytest.approx(99.9)


@pytest.mark.parametrize("length", [2, 7, 64, 150])
def test_blocks_are_the_ranges_end_to_end(tmp_path: Path, length: int) -> None:
    """Blocks laid side by side are the split's documents laid side by side, across boundaries."""
    packed = _packed(tmp_path, [5, 30, 1, 200, 64, 63, 17, 90])
    for blocks in token_blocks(packed, length, 0.4):
        stream = np.concatenate([packed.tokens[a:b] for a, b in blocks.part.ranges])
        assert len(blocks) == len(stream) // length
        got = [blocks[i]["input_ids"] for i in range(len(blocks))]
        np.testing.assert_array_equal(np.concatenate(got), stream[: len(blocks) * length])
        assert all(blocks[i]["labels"].equal(blocks[i]["input_ids"]) for i in range(len(blocks)))
        with pytest.raises(IndexError):
            blocks[len(blocks)]


def test_corpus_shorter_than_a_block_is_refused(tmp_path: Path) -> None:
    """Either part shorter than a block is an error that names the part and the setting."""
    packed = _packed(tmp_path, [100, 20])
    with pytest.raises(InputError, match=r"evaluation part .* 21 tokens.*sequence_length = 64"):
        token_blocks(packed, 64, 0.1)
    with pytest.raises(InputError, match="training part"):
        token_blocks(packed, 512, 0.1)
