"""Documents in one row: however transformers' tools tell them apart, each equals the document alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening
from transformers.masking_utils import find_packed_sequence_indices

from gka.models import GKACache, GKAForCausalLM
from gka.models.cache import CACHE_NAME
from gka.models.documents import Documents, Packing, find_documents
from tolerances import RELATIVE, assert_close

Build = Callable[..., GKAForCausalLM]
Ids = Callable[..., Tensor]

PATTERNS = {
    "gka": ["gka", "gka"],
    "hybrid": ["gka", "attention", "gka"],
    "attention": ["attention", "attention"],
    "swa": ["swa", "gka"],
    "gla": ["gla", "gla"],
    "deltanet": ["deltanet", "deltanet"],
    "gated_deltanet": ["gated_deltanet", "gated_deltanet"],
}
TOLERANCE = 20 * RELATIVE[torch.float32]  # several layers deep, different routes through the chunks
LENGTHS = [1, 6, 70, 3]
FORMS = ["cu_seqlens", "position_ids", "position_ids_start", "seq_idx", "flash_attention", "every"]
EXACT = 1e-9  # in float64


def collated(form: str, rows: list[list[int]]) -> dict[str, Any]:
    """What transformers' own collator makes of the documents, in one of its forms or ours."""
    if form == "cu_seqlens":
        bounds = torch.tensor([0, *map(len, rows)]).cumsum(0)
        batch = collated("none", rows)
        return batch | {"cu_seqlens": bounds}
    collator = DataCollatorWithFlattening(
        return_position_ids=form in ("position_ids", "position_ids_start", "every"),
        return_seq_idx=form in ("seq_idx", "every"),
        return_flash_attn_kwargs=form in ("flash_attention", "every"),
        # older versions count from 0 only
        **({"position_ids_start": 2} if form == "position_ids_start" else {}),
    )
    return dict(collator([{"input_ids": row} for row in rows], return_tensors="pt"))


def positions(*rows: list[int]) -> Tensor:
    """[B,T] of documents of these lengths, row by row."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def gradients(model: GKAForCausalLM) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def alone(model: GKAForCausalLM, documents: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits [1,T,V] of every document alone, the mean loss over all their targets, and its gradients."""
    items = sum(part.shape[1] - 1 for part in documents)
    logits, total = [], torch.zeros(())
    for part in documents:
        out = model(part, labels=part, num_items_in_batch=items, return_logits=True)
        logits.append(out.logits)
        total = total + out.loss
    total.backward()
    return torch.cat(logits, 1), total, gradients(model)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_document_equals_the_document_alone(build: Build, ids: Ids, pattern: str):
    """Every form of the collator gives logits, loss and gradients of the documents one by one."""
    model, tokens = build(mixers=PATTERNS[pattern]).double(), ids(1, sum(LENGTHS))
    documents = list(tokens.split(LENGTHS, dim=1))
    logits, loss, expected = alone(model, documents)
    rows = [part[0].tolist() for part in documents]
    for form in FORMS:
        try:
            batch = collated(form, rows)
        except TypeError:
            continue  # position_ids_start is younger than the oldest transformers supported
        assert torch.equal(batch["input_ids"], tokens)
        out = model(**batch)
        assert CACHE_NAME not in out
        out.loss.backward()
        assert_close(out.logits, logits, EXACT, f"{form}: logits")
        assert_close(out.loss, loss, EXACT, f"{form}: loss")
        for ours, theirs in zip(gradients(model), expected, strict=True):
            assert_close(ours, theirs, EXACT, f"{form}: gradient")
        items = 4 * (sum(LENGTHS) - len(LENGTHS))
        part = model(**batch, num_items_in_batch=items).loss
        assert_close(4 * part, loss, EXACT, f"{form}: loss over the items of four batches")
        # the tokens themselves as labels: what a document's first token is, nobody predicts
        assert_close(model(**batch | {"labels": tokens}).loss, loss, EXACT, f"{form}: labels")


def test_a_document_is_not_reached_from_another(build: Build, ids: Ids):
    """Not one bit of a document's logits depends on the tokens of the document before it."""
    for mixers in PATTERNS.values():
        model, tokens = build(mixers=mixers), ids(1, 20)
        other = torch.cat([ids(1, 8, seed=7), tokens[:, 8:]], 1)
        assert not torch.equal(tokens[:, 7], other[:, 7])
        for options in (
            {"position_ids": positions([8, 12])},
            {"cu_seq_lens_q": torch.tensor([0, 8, 20])},
        ):
            first, second = model(tokens, **options).logits, model(other, **options).logits
            assert torch.equal(first[:, 8:], second[:, 8:])
            assert not torch.equal(first[:, :8], second[:, :8])


@pytest.mark.parametrize("pattern", ["gka", "hybrid", "swa", "gated_deltanet"])
def test_rows_of_several_documents(build: Build, ids: Ids, pattern: str):
    """In a batch, with padding between and around documents or without, each equals itself alone."""
    model, tokens = build(mixers=PATTERNS[pattern]), ids(2, 12)
    spans = [(0, 0, 5), (0, 5, 12), (1, 2, 5), (1, 7, 10)]
    marks = torch.tensor(
        [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [1, 1, 0, 1, 2, 1, 1, 0, 1, 2, 1, 1]]
    )
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, [0, 1, 5, 6, 10, 11]] = 0
    names = torch.tensor([[0] * 5 + [1] * 7, [0] * 5 + [1] * 7])
    labels = tokens.masked_fill(mask == 0, -100)
    loss = alone(model, [tokens[b : b + 1, i:j] for b, i, j in spans])[1]
    for options in ({"position_ids": marks}, {"seq_idx": names}, {"seq_idx": names[:1]}):
        out = model(
            tokens, attention_mask=mask, labels=labels, output_hidden_states=True, **options
        )
        assert out.logits.shape == (2, 12, 97)
        assert all(x.shape == (2, 12, 32) for x in out.hidden_states)
        for b, i, j in spans:
            expected = model(tokens[b : b + 1, i:j]).logits
            assert_close(out.logits[b : b + 1, i:j], expected, TOLERANCE, f"document {b, i, j}")
        assert_close(out.loss, loss, TOLERANCE, "loss")
    for options in (
        {"position_ids": positions([5, 7])},
        {"position_ids": positions([5, 7], [5, 7])},
    ):
        out = model(tokens, logits_to_keep=3, **options)
        assert_close(out.logits, model(tokens[:, 5:]).logits[:, -3:], TOLERANCE, "without padding")


def test_positions_that_do_not_start_again_mean_what_they_meant(build: Build, ids: Ids):
    """Offsets and gaps rotate, padded rows' positions (0 or 1 at padding) change nothing."""
    model, tokens = build(mixers=["gka", "attention", "swa"]), ids(2, 9)
    plain = model(tokens).logits
    for shifted in (
        torch.arange(9)[None],
        torch.arange(9).expand(2, 9),
        40 + torch.arange(9)[None],
    ):
        assert_close(model(tokens, position_ids=shifted).logits, plain, TOLERANCE)
    gap = torch.tensor([[0, 1, 2, 3, 10, 11, 12, 13, 14]])
    found = model(tokens, position_ids=gap).logits
    assert_close(found[:, :4], plain[:, :4], TOLERANCE)
    assert not torch.allclose(found[:, 4:], plain[:, 4:], atol=1e-3)
    assert find_documents(tokens, Packing(position_ids=gap)) == Documents()
    for side in ("left", "right"):
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[1, slice(0, 4) if side == "left" else slice(5, None)] = 0
        expected = model(tokens, attention_mask=mask).logits
        counted = mask.cumsum(1) - 1
        for at_padding in (0, 1, -1):
            given = counted.masked_fill(mask == 0, at_padding)
            found = model(tokens, attention_mask=mask, position_ids=given).logits
            assert torch.equal(found[mask.bool()], expected[mask.bool()])


def test_with_a_cache_positions_go_on(build: Build, ids: Ids):
    """position_ids continue a cache as before; with documents it is refused, however they are told apart."""
    model, tokens = build(mixers=["gka", "attention"]), ids(2, 12)
    expected = model(tokens).logits
    cache = GKACache(model.config)
    with torch.no_grad():
        for part in torch.arange(12)[None].split([5, 1, 1, 5], 1):
            options = {"past_key_values": cache, "position_ids": part}
            out = model(tokens[:, part[0]], **options)
            assert_close(out.logits, expected[:, part[0]], TOLERANCE)
        told: list[dict[str, Tensor]] = [
            {"position_ids": positions([5, 7])},
            {"seq_idx": torch.tensor([[0] * 5 + [1] * 7])},
        ]
        for options in told:
            for caching in ({"past_key_values": cache}, {"use_cache": True}):
                with pytest.raises(ValueError, match=f"{next(iter(options))}.* cannot be cached"):
                    model(tokens, **options, **caching)
        bounds = {"cu_seq_lens_q": torch.tensor([0, 5, 12])}
        for body in (model, model.model):
            with pytest.raises(ValueError, match=r"cu_seq_lens_q.* cannot be cached"):
                body(tokens[:1], **bounds, past_key_values=GKACache(model.config))
    assert cache.get_seq_length() == 12


def test_generate_takes_position_ids(build: Build, ids: Ids):
    """generate with left padding and its own or the caller's position_ids gives each prompt's own tokens."""
    for mixers in (["gka", "gka"], ["gka", "attention"], ["swa", "gka"]):
        model: Any = build(mixers=mixers)
        tokens = ids(2, 8)
        mask = torch.ones(2, 8, dtype=torch.long)
        mask[1, :3] = 0
        options: Any = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        single = [
            model.generate(row[None], **options)[0, -4:] for row in (tokens[0], tokens[1, 3:])
        ]
        given = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
        for more in ({}, {"position_ids": given}, {"use_cache": False}):
            found: Any = model.generate(tokens, attention_mask=mask, **options, **more)
            assert torch.equal(found[:, -4:], torch.stack(single))


def test_the_rule_is_transformers_own():
    """Packed positions and padding without a mask fall into the same documents as in transformers."""
    rows = [[3, 1, 4], [8], [1, 1, 1, 5], [7, 1]]
    for row in rows:
        for start in (0, 2):
            marks = positions(row) + start
            theirs = find_packed_sequence_indices(marks)
            ours = find_documents(torch.zeros(1, 8), Packing(position_ids=marks)).cu_seqlens
            if theirs is None:
                assert ours is None
                continue
            assert ours is not None
            counts = torch.bincount(theirs[0])
            assert ours.diff().tolist() == counts.tolist()


def test_bounds_on_the_cpu_make_nothing_wait(build: Build, ids: Ids):
    """With bounds on the CPU no value of the device is read: it holds for a device without values."""
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    flash: dict[str, Any] = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 70}
    for mixers in PATTERNS.values():
        model: Any = build(mixers=mixers).train()
        model.to("meta")
        tokens = ids(1, sum(LENGTHS)).to("meta")
        for options in (flash, {"cu_seqlens": bounds}):
            out = model(tokens, labels=tokens, **options)
            out.loss.backward()
            assert out.loss.is_meta


@pytest.mark.parametrize(
    "name", ["cu_seqlens", pytest.param("cu_seq_lens_q", marks=pytest.mark.slow)]
)
def test_one_graph_with_bounds(build: Build, ids: Ids, name: str):
    """torch.compile(fullgraph=True) takes bounds, and gives loss and gradients of the plain model."""
    model, tokens = build(mixers=["gka", "attention", "swa"], num_iter=2), ids(1, 20)
    options: Any = {"labels": tokens, name: torch.tensor([0, 8, 9, 20]), "return_logits": False}
    if name == "cu_seq_lens_q":
        options |= {"cu_seq_lens_k": options[name].clone(), "max_length_q": 11}
    plain = model(tokens, **options).loss
    plain.backward()
    expected = gradients(model)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(tokens, **options).loss
    loss.backward()
    assert_close(loss, plain, RELATIVE[torch.float32])
    for ours, theirs in zip(gradients(model), expected, strict=True):
        assert_close(ours, theirs, TOLERANCE)


def test_compiled_positions_are_read(build: Build, ids: Ids):
    """Compiled in more than one graph, restarted position_ids separate documents too."""
    torch.compiler.reset()
    model, tokens = build(mixers=["gka", "attention"], num_iter=2), ids(1, 12)
    options = {"position_ids": positions([5, 7]), "use_cache": False}
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        found, expected = compiled(tokens, **options).logits, model(tokens[:, 5:]).logits
    assert_close(found[:, 5:], expected, TOLERANCE)


def test_bounds_of_one_document_and_of_none(build: Build, ids: Ids):
    """A single document and empty ones between others are bounds like any."""
    model, tokens = build(mixers=["gka", "attention", "deltanet"]), ids(1, 7)
    plain = model(tokens, labels=tokens)
    for bounds in ([0, 7], [0, 0, 7], [0, 7, 7]):
        out = model(tokens, labels=tokens, cu_seq_lens_q=torch.tensor(bounds))
        assert_close(out.logits, plain.logits, TOLERANCE)
        assert_close(out.loss, plain.loss, TOLERANCE)
    assert model(tokens, position_ids=torch.arange(7)[None]).logits.equal(plain.logits)


B = torch.tensor([0, 4, 9])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cu_seq_lens_q": B, "cu_seq_lens_k": B + 1}, "cu_seq_lens_k must equal cu_seq_lens_q"),
        ({"cu_seq_lens_q": B, "cu_seq_lens_k": B[1:]}, "cu_seq_lens_k must equal cu_seq_lens_q"),
        ({"cu_seq_lens_q": B, "cu_seqlens": B}, "two names of one thing"),
        ({"cu_seq_lens_q": B[None]}, r"cu_seq_lens_q must be .*got shape \(1, 3\)"),
        ({"cu_seq_lens_q": B.float()}, "cu_seq_lens_q must be a tensor of int64 or int32"),
        ({"cu_seq_lens_q": [0, 4, 9]}, "cu_seq_lens_q must be a tensor .* got list"),
        ({"cu_seq_lens_q": B[:2]}, r"end with the row's 9 tokens, got 0 .. 4"),
        ({"cu_seqlens": B + 1}, r"cu_seqlens must start with 0 .* got 1 .. 10"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 9])}, "cu_seqlens must not decrease"),
        ({"cu_seq_lens_q": B, "max_length_q": 4}, "max_length_q is 4, .*longest document has 5"),
        ({"cu_seq_lens_q": B, "max_length_k": torch.tensor(3)}, "max_length_k is 3"),
        ({"max_length_q": 4}, "max_length_q says nothing by itself"),
        (
            {"cu_seq_lens_q": B, "attention_mask": torch.tensor([[1] * 8 + [0]])},
            "attention_mask and cu_seq_lens_q exclude each other",
        ),
        (
            {"cu_seq_lens_q": B, "attention_mask": torch.ones(1, 5).long()},
            "attention_mask and cu_seq_lens_q exclude each other",
        ),
        (
            {
                "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]),
                "attention_mask": torch.tensor([[0.0] * 8 + [-torch.inf]]),
            },
            "attention_mask must hold 0",
        ),
        ({"seq_idx": torch.zeros(9)}, r"seq_idx must be \[batch, 9\], got shape \(9,\)"),
        ({"position_ids": torch.zeros(1, 8)}, r"position_ids must be \[batch, 9\]"),
        (
            {
                "position_ids": torch.tensor([[0, 1, 0, 2, 3, 0, 1, 2, 3]]),
                "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1]]),
            },
            "padding may only stand between documents",
        ),
    ],
)
def test_wrong_documents_are_named(build: Build, ids: Ids, options: Any, message: str):
    """Bounds that do not fit, contradict each other or cut a document are refused by model and decoder."""
    model, tokens = build(mixers=["gka", "attention"]), ids(1, 9)
    for body in (model, model.model):
        with pytest.raises(ValueError, match=message):
            body(tokens, **options)


def test_bounds_need_one_row(build: Build, ids: Ids):
    """Bounds count in a single row: a batch is refused, and so is any name that forward does not have."""
    model, tokens = build(), ids(2, 9)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q needs .* batch 1, got batch 2"):
        model(tokens, cu_seq_lens_q=B)
    with pytest.raises(TypeError, match="cu_seq_len_q"):
        model(tokens, cu_seq_len_q=B)
