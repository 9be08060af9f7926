"""GenerationSession: any way of reading and writing the same tokens leaves the same states."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gka import GenerationSession
from gka.errors import InputError
from gka.models import GKACache, GKAForCausalLM
from gka.models.cache import CACHE_NAME
from gka.serving import prefill
from tolerances import RELATIVE, assert_close

Build = Callable[..., GKAForCausalLM]
Ids = Callable[..., Tensor]

PATTERNS = [
    ["gka", "gka"],
    ["gka", "attention", "gka"],
    ["swa", "gka"],
    ["gla", "gated_deltanet"],
]
patterns = pytest.mark.parametrize("mixers", PATTERNS, ids="-".join)


def text(session: GenerationSession, tokens: int, **options: Any) -> Tensor:
    """The next tokens [B,tokens]."""
    return torch.stack(list(session.generate(tokens, **options)), 1)


def full(model: GKAForCausalLM, tokens: Tensor) -> Tensor:
    """Logits after the last token by one uncached pass."""
    with torch.no_grad():
        return model(tokens, use_cache=False).logits[:, -1]


@patterns
def test_splits_do_not_matter(build: Build, ids: Ids, mixers: list[str]):
    """Greedy text of 256 tokens is the same for any split of the prompt into appends and chunks."""
    model, prompt = build(mixers=mixers), ids(2, 83)
    expected = None
    for chunk, cuts in ((4096, ()), (1, ()), (7, ()), (32, (50,)), (20, (1, 2, 40, 82))):
        session = GenerationSession(model, prefill_chunk=chunk)
        for part in torch.tensor_split(prompt, cuts, 1):
            session.append(part)
        assert_close(session.logits, full(model, prompt), 20 * RELATIVE[torch.float32])  # type: ignore[arg-type]
        found = text(session, 256)
        expected = found if expected is None else expected
        assert torch.equal(found, expected), (chunk, cuts)
    assert expected is not None and len(expected.unique()) > 5
    forced = torch.cat([prompt, expected], 1)
    assert_close(session.logits, full(model, forced), 20 * RELATIVE[torch.float32])  # type: ignore[arg-type]


@patterns
def test_splits_in_bfloat16(build: Build, ids: Ids, mixers: list[str]):
    """In bfloat16 the logits after any split agree within its tolerance."""
    model, prompt = build(mixers=mixers).bfloat16(), ids(2, 60)
    whole = GenerationSession(model).append(prompt).logits
    for chunk in (1, 13, 32):
        found = GenerationSession(model, prefill_chunk=chunk).append(prompt).logits
        assert found is not None and whole is not None and found.dtype == torch.bfloat16
        assert_close(found, whole, RELATIVE[torch.bfloat16], f"chunk {chunk}")


def test_prefill_asks_for_one_position(build: Build, ids: Ids):
    """Logits are computed once and for the last position, and each piece has the size asked for."""
    model, sizes, pieces = build(mixers=["gka", "attention"]), [], []
    model.lm_head.register_forward_hook(lambda m, args, out: sizes.append(tuple(args[0].shape)))
    model.model.norm.register_forward_hook(lambda m, args, out: pieces.append(out.shape[1]))
    cache = GKACache(model.config)
    logits = prefill(model, ids(2, 25), cache, chunk=10)
    assert sizes == [(2, 1, 32)] and pieces == [10, 10, 5] and logits.shape == (2, 97)
    assert cache.get_seq_length() == 25


@patterns
def test_greedy_equals_generate(build: Build, ids: Ids, mixers: list[str]):
    """The session writes what transformers' `generate` writes from the same prompt."""
    model, prompt = build(mixers=mixers), ids(2, 9)
    expected = model.generate(  # type: ignore[operator]
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False
    )
    assert torch.equal(text(GenerationSession(model).append(prompt), 20), expected[:, 9:])


@patterns
def test_left_padded_rows_equal_single_ones(build: Build, ids: Ids, mixers: list[str]):
    """Rows of different lengths, in two turns, write what each writes alone.

    For a sliding window in the first turn only: it counts padding between turns as positions.
    """
    model, lengths = build(mixers=mixers), ((11, 6), (4, 2), (7, 6))
    turns = [ids(3, 11), ids(3, 6, seed=2)]
    if "swa" in mixers:
        lengths = tuple((a, 6) for a, _ in lengths)
    masks = [torch.zeros_like(turn) for turn in turns]
    for row, both in enumerate(lengths):
        for mask, n in zip(masks, both, strict=True):
            mask[row, mask.shape[1] - n :] = 1
    together = GenerationSession(model, prefill_chunk=4)
    first = []
    for turn, mask in zip(turns, masks, strict=True):
        together.append(turn, attention_mask=mask)
        first.append(text(together, 8))
    for row, both in enumerate(lengths):
        alone = GenerationSession(model)
        for turn, n, found in zip(turns, both, first, strict=True):
            alone.append(turn[row, turn.shape[1] - n :])
            assert torch.equal(text(alone, 8)[0], found[row]), row


@pytest.mark.parametrize("mixers", [["gka", "gka"], ["gka", "attention"]])
def test_rows_that_end_wait_for_the_others(build: Build, ids: Ids, mixers: list[str]):
    """A row stops at its end of text, yields padding, and its states take in nothing more."""
    prompt = ids(2, 6)
    free = text(GenerationSession(build(mixers=mixers)).append(prompt), 30)
    eos = int(free[0, 2])
    model = build(mixers=mixers, eos_token_id=eos, pad_token_id=0)
    session = GenerationSession(model).append(prompt)
    found = text(session, 30)
    ended = [int((row == eos).float().argmax()) + 1 if eos in row else 30 for row in free]
    assert ended[0] < ended[1] and (found[0, ended[0] :] == 0).all()
    assert torch.equal(found[1], free[1, : found.shape[1]])
    seen = torch.cat([prompt[:1], free[:1, : ended[0]]], 1)
    assert session.logits is not None
    assert_close(session.logits[:1], full(model, seen), 20 * RELATIVE[torch.float32])
    alone = text(GenerationSession(model).append(seen).append([5]), 5, eos_token_id=[])
    session.append([[5], [5]])
    assert torch.equal(text(session, 5, eos_token_id=[])[:1], alone)


def test_left_in_the_middle_it_goes_on(build: Build, ids: Ids):
    """Every yielded token is in the states: leaving the loop early and generating again changes nothing."""
    model, prompt = build(mixers=["gka", "swa"]), ids(1, 9)
    expected = text(GenerationSession(model).append(prompt), 12)
    session, found = GenerationSession(model).append(prompt), []
    for token in session.generate(12):
        found.append(int(token))
        if len(found) == 5:
            break
    found += [int(token) for token in session.generate(7)]
    assert found == expected[0].tolist() and session.num_tokens == 21


@patterns
def test_forks_are_independent(build: Build, ids: Ids, mixers: list[str]):
    """What a copy reads and writes leaves the original as it was, and the other way round."""
    model = build(mixers=mixers)
    session = GenerationSession(model).append(ids(2, 12))
    copy = session.fork()
    copy.append(ids(2, 5, seed=3))
    expected = text(GenerationSession(model).append(ids(2, 12)), 8)
    assert torch.equal(text(session, 8), expected)
    both = GenerationSession(model).append(torch.cat([ids(2, 12), ids(2, 5, seed=3)], 1))
    assert torch.equal(text(copy, 8), text(both, 8))


def test_forks_repeat_rows(build: Build, ids: Ids):
    """`fork(n)` has each row n times, next to each other, in states, mask, logits and decays."""
    model, mask = build(mixers=["gka", "attention", "swa"]), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    session = GenerationSession(model, track_decay=True).append(ids(2, 9), mask)
    copies = session.fork(3)
    assert copies.batch_size == 6
    assert torch.equal(copies.log_decay[0], session.log_decay[0].repeat_interleave(3, 0))
    assert torch.equal(text(copies, 6), text(session, 6).repeat_interleave(3, 0))


def test_sampling_follows_the_logits(build: Build, ids: Ids):
    """Draws have the tempered, cut and renormalised probabilities, and a seed repeats them."""
    model, n = build(mixers=["gka"]), 4000
    session = GenerationSession(model).append(ids(1, 5)).fork(n)
    options = {"temperature": 0.7, "top_k": 12, "top_p": 0.8, "seed": 3}
    assert session.logits is not None
    p = (session.logits[0].float() / 0.7).softmax(-1)
    p = torch.where(p >= p.topk(12).values[-1], p, 0)
    p = p / p.sum()
    order = p.argsort(descending=True)
    keep = order[: int((p[order].cumsum(0) < 0.8).sum()) + 1]
    expected = torch.zeros_like(p).index_copy(0, keep, p[keep] / p[keep].sum())
    drawn = next(session.fork().generate(1, **options))
    found = torch.bincount(drawn, minlength=97) / n
    assert set(drawn.tolist()) <= set(keep.tolist())
    assert (found - expected).abs().max() < 4 * (0.25 / n) ** 0.5  # four standard deviations
    assert torch.equal(drawn, next(session.fork().generate(1, **options)))


def test_nothing_is_kept_for_gradients(build: Build, ids: Ids):
    """Reading and writing builds no graph, and the model's mode stays."""
    model = build(mixers=["gka"]).train()
    session = GenerationSession(model).append(ids(1, 5))
    assert len(text(session, 3)[0]) == 3
    assert session.logits is not None and not session.logits.requires_grad and model.training


def test_an_interrupted_session_says_so(build: Build, ids: Ids, tmp_path: Any):
    """After an error between two layers a session refuses to go on; loading a state makes it whole."""
    model = build(mixers=["gka", "gka"])
    session = GenerationSession(model).append(ids(1, 5))
    session.save(tmp_path / "s")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        session.append(ids(1, 5))
    hook.remove()
    for use in (lambda: session.append([1]), session.fork, lambda: session.save(tmp_path / "s")):
        with pytest.raises(InputError, match="was interrupted"):
            use()
    expected = text(GenerationSession(model).append(ids(1, 5)), 4)
    assert torch.equal(text(session.load(tmp_path / "s"), 4), expected)


BAD: list[tuple[Callable[[GenerationSession], Any], str]] = [
    (lambda s: s.append([]), "at least one"),
    (lambda s: s.append(torch.tensor([[1.5]])), "whole numbers"),
    (lambda s: s.append("text"), "expected token ids"),  # type: ignore[arg-type]
    (lambda s: s.append([97]), r"ids must be in 0..96, got 97..97"),
    (lambda s: s.append([-1]), r"got -1..-1"),
    (lambda s: s.append([[1], [2]]), "the session has 1 rows, got 2"),
    (
        lambda s: s.append([[1, 2]], torch.ones(1, 3).long()),
        "expected 0 and 1 of the tokens' shape",
    ),
    (lambda s: s.append([[1, 2]], torch.tensor([[1, 0]])), "pad on the left"),
    (lambda s: s.generate(0), "max_new_tokens is 0"),
    (lambda s: s.generate(1, temperature=-1), "temperature is -1"),
    (lambda s: s.generate(1, top_p=0), "top_p is 0"),
    (lambda s: s.generate(1, top_k=-1), "top_k is -1"),
    (lambda s: s.fork(0), "repeats is 0"),
    (lambda s: s.log_decay, "track_decay=True"),
    (lambda s: GenerationSession(s.model, prefill_chunk=0), "prefill_chunk is 0"),
    (lambda s: GenerationSession(s.model).generate(1), "append the beginning"),
    (lambda s: GenerationSession(torch.nn.Linear(1, 1)), "expected a GKAForCausalLM"),  # type: ignore[arg-type]
    (
        lambda s: prefill(s.model, torch.zeros(1, 0).long(), GKACache(s.model.config)),
        "at least one",
    ),
]


@pytest.mark.parametrize(("use", "message"), BAD)
def test_bad_input_changes_nothing(build: Build, ids: Ids, use: Callable[..., Any], message: str):
    """A call that cannot be answered says why, and the session goes on as if it had not been made."""
    model = build(mixers=["gka", "attention"])
    session = GenerationSession(model).append(ids(1, 5))
    with pytest.raises(InputError, match=message):
        use(session)
    assert torch.equal(text(session, 4), text(GenerationSession(model).append(ids(1, 5)), 4))


def test_cache_name_is_the_installed_one(build: Build, ids: Ids):
    """The cache that prefill fills is the one that a forward call then reads, under its present name."""
    model, cache = build(mixers=["gka"]), GKACache(build(mixers=["gka"]).config)
    prefill(model, ids(1, 6)[:, :5], cache)
    with torch.no_grad():
        found = model(ids(1, 6)[:, 5:], **{CACHE_NAME: cache}).logits[:, -1]
    assert_close(found, full(model, ids(1, 6)), RELATIVE[torch.float32])
