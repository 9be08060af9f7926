"""Packed tokens are the documents' tokens; they are reused, verified, and never half there."""

import json
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from gka.data import (
    Document,
    PackedTokens,
    byte_tokenizer,
    find_documents,
    load_tokenizer,
    pack,
    split,
    token_blocks,
)
from gka.data import packed as module
from gka.errors import InputError, StorageError

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
    with pytest.raises(ValueError, match="read-only"):
        packed.tokens[0] = 1


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
    first = pack(documents, byte_tokenizer(), cache, seen.append)
    again = pack(documents, byte_tokenizer(), cache, seen.append)
    assert again.folder == first.folder
    assert seen == documents
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


def test_a_full_disk_is_one_line_and_leaves_nothing(
    documents: list[Document], tmp_path: Path
) -> None:
    """No room for the tokens: an error that names the cache and says what to do, and an empty cache."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, before[1]))
    try:
        with pytest.raises(
            StorageError, match=r"packed tokens in .*cache cannot be written: .*GKA_"
        ):
            pack(documents, byte_tokenizer(), tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "cache").iterdir()) == []


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
    """A token file cut short or altered, and a description cut short or incomplete, are refused."""
    tokenizer = byte_tokenizer()
    folder = pack(documents, tokenizer, tmp_path / "cache").folder
    tokens, description = folder / module.TOKENS, folder / module.DESCRIPTION
    good = tokens.read_bytes(), description.read_bytes()
    altered = bytes([good[0][0] ^ 1]) + good[0][1:]
    parsed = json.loads(good[1])
    moved = parsed | {"documents": parsed["documents"][1:]}
    lacking = {key: value for key, value in parsed.items() if key != "sha256"}
    cases = [
        (good[0][:-2], good[1], "checksum differs"),
        (altered, good[1], "checksum differs"),
        (good[0], good[1][:-20], "not readable JSON"),
        (good[0], json.dumps(moved).encode(), "boundaries do not add up"),
        (good[0], json.dumps(lacking).encode(), "lacks sha256"),
        (good[0], json.dumps(parsed | {"format": 99}).encode(), "format is 99, expected 1"),
    ]
    for ids, text, message in cases:
        tokens.write_bytes(ids)
        description.write_bytes(text)
        with pytest.raises(InputError, match=message):
            pack(documents, tokenizer, tmp_path / "cache")


def test_other_tokenizer_is_refused(
    documents: list[Document], tmp_path: Path, word_tokenizer: Path
) -> None:
    """Tokens packed with one tokenizer do not open with another."""
    folder = pack(documents, byte_tokenizer(), tmp_path / "cache").folder
    with pytest.raises(InputError, match="packed with another tokenizer"):
        PackedTokens.open(folder, load_tokenizer(str(word_tokenizer)))


def test_losing_the_race_uses_the_winner(documents: list[Document], tmp_path: Path) -> None:
    """If another process publishes the same pack first, its copy is used and ours removed."""
    cache = tmp_path / "cache"

    def win(document: Document) -> None:
        if document is documents[-1] and not any(p.name[0] != "." for p in cache.iterdir()):
            pack(documents, byte_tokenizer(), cache)

    packed = pack(documents, byte_tokenizer(), cache, win)
    assert list(cache.iterdir()) == [packed.folder]


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
