"""Blocks are the split's tokens in order, and the split is by whole documents."""

from pathlib import Path

import numpy as np
import pytest

from gka.data import PackedTokens, byte_tokenizer, find_documents, pack, split, token_blocks
from gka.errors import InputError


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
