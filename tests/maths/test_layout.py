"""Chunks hold every token once, in order, and never two sequences."""

import pytest
import torch

from gka.maths.layout import chunk_layout


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 24])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_join_inverts_cut(length, batch):
    """join(cut(x)) = x for equally long sequences; the places past a sequence's end hold zeros."""
    x = torch.arange(1.0, batch * length * 2 + 1).view(batch, length, 2)
    layout = chunk_layout(batch, length, 8)
    cut = layout.cut(x)
    assert cut.shape == (layout.num_chunks, 8, 2)
    assert torch.equal(layout.join(cut), x)
    assert cut.sum() == x.sum()
    assert layout.num_sequences == batch


@pytest.mark.parametrize("lengths", [[0], [5], [0, 1, 15, 8, 0], [8, 16], [3, 0, 0, 9]])
def test_packed_sequences_get_chunks_of_their_own(lengths):
    """Each sequence begins a chunk; an empty one owns none; join(cut(x)) = x."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    total = sum(lengths)
    x = torch.arange(1.0, total + 1).view(1, total, 1)
    layout = chunk_layout(1, total, 8, bounds)
    cut = layout.cut(x)
    assert torch.equal(layout.join(cut), x)
    assert layout.num_sequences == len(lengths)
    for n, length in enumerate(lengths):
        chunks = cut[layout.offsets[n] : layout.offsets[n + 1]].flatten()
        assert torch.equal(chunks[:length], x[0, bounds[n] : bounds[n + 1], 0])
        assert (chunks[length:] == 0).all()
        assert len(chunks) - length < 8 or length == 0


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, [20, 0, 5, 30]])
def test_steps_visit_each_chunk_after_the_one_before_it(lengths, reverse):
    """Every chunk is visited once, and along each sequence in order (in reverse order if reversed)."""
    bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    layout = chunk_layout(*((2, 20) if lengths is None else (1, 55)), 8, bounds)
    chunks, sequences = torch.arange(layout.num_chunks), torch.arange(layout.num_sequences)
    visited: dict[int, list[int]] = {n: [] for n in range(layout.num_sequences)}
    for who, rows in layout.steps(torch.device("cpu"), reverse):
        for n, row in zip(sequences[who].tolist(), chunks[rows].tolist(), strict=True):
            visited[n].append(row)
    for n, rows in visited.items():
        expected = list(range(layout.offsets[n], layout.offsets[n + 1]))
        assert rows == (expected[::-1] if reverse else expected)


def test_blocks_cover_all_chunks_once():
    """blocks(n) are slices of at most n chunks that together are all of them, in order."""
    layout = chunk_layout(1, 8 * 10, 8)
    slices = list(layout.blocks(4))
    assert [(s.start, s.stop) for s in slices] == [(0, 4), (4, 8), (8, 10)]
