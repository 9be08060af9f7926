"""Claim: documents in a row are apart, in every form in which transformers' tools say where they begin."""

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from gka.models import GKAConfig, GKAForCausalLM

LENGTHS = [5, 17, 1, 9]
PATTERNS = {
    "gka": {},
    "hybrid": {"attention_layers": [1]},
    "gla": {"mixer": "gla"},
    "deltanet": {"mixer": "deltanet"},
    "gated_deltanet": {"mixer": "gated_deltanet"},
    "attention": {"mixer": "attention"},
    "swa": {"mixer": "swa", "sliding_window": 4},
}


def tiny(pattern: str) -> GKAForCausalLM:
    torch.manual_seed(0)
    options = {
        "hidden_size": 32,
        "head_dim": 16,
        "num_heads": 2,
        "vocab_size": 50,
        **PATTERNS[pattern],
    }
    return GKAForCausalLM(GKAConfig(num_hidden_layers=2, intermediate_size=48, **options)).double()


def documents() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(50, (n,)) for n in LENGTHS]


def bounds() -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0)


def forms() -> dict[str, dict]:
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    marks = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])[None]
    longest = {"max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}
    both = {"cu_seq_lens_q": bounds().int(), "cu_seq_lens_k": bounds().int()}
    return {
        "position_ids": {"position_ids": positions},
        "cu_seqlens": {"cu_seqlens": bounds()},
        "cu_seq_lens": both,
        "flash": {**both, **longest, "position_ids": positions},
        "seq_idx": {"seq_idx": marks.int()},
    }


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_document_is_alone(pattern):
    """Logits, loss and gradients of packed documents are those of each by itself, in every form."""
    model, parts = tiny(pattern).train(), documents()
    total = torch.zeros((), dtype=torch.float64)
    packed = torch.cat(parts)[None]
    alone, count = [], 0
    for part in parts:
        if len(part) > 1:
            out = model(part[None], labels=part[None], return_logits=True)
            total, count = total + out.loss * (len(part) - 1), count + len(part) - 1
        else:
            out = model(part[None])
        alone.append(out.logits[0])
    expected = total / count
    grads = torch.autograd.grad(expected, list(model.parameters()))
    for name, given in forms().items():
        out = model(packed, labels=packed, return_logits=True, **given)
        torch.testing.assert_close(out.logits[0], torch.cat(alone), rtol=1e-9, atol=1e-9, msg=name)
        torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=0.0)
        found = torch.autograd.grad(out.loss, list(model.parameters()))
        for one, other in zip(found, grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    "options", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}]
)
def test_flattening_collator(options):
    """transformers' DataCollatorWithFlattening: what it returns is taken as it is."""
    model = tiny("hybrid").eval()
    features = [{"input_ids": part.tolist(), "labels": part.tolist()} for part in documents()]
    batch = DataCollatorWithFlattening(**options)(features)
    out = model(**batch)
    alone = torch.cat([model(part[None]).logits[0] for part in documents()])
    torch.testing.assert_close(out.logits[0], alone, rtol=1e-9, atol=1e-9)
    targets = sum(n - 1 for n in LENGTHS)
    nats = [torch.nn.functional.cross_entropy(model(p[None]).logits[0, :-1], p[1:], reduction="sum")
            for p in documents() if len(p) > 1]  # fmt: skip
    torch.testing.assert_close(out.loss, sum(nats) / targets, rtol=1e-9, atol=0.0)


def test_rows_of_several_documents_and_padding():
    """A batch of rows, each with documents and padding behind them: each document is alone."""
    model = tiny("hybrid").eval()
    first, second, third = documents()[0], documents()[3], documents()[1]
    ids, mask = torch.zeros(2, 17, dtype=torch.long), torch.zeros(2, 17, dtype=torch.long)
    ids[0, :5], ids[0, 5:14], ids[1] = first, second, third
    mask[0, :14], mask[1] = 1, 1
    positions = torch.zeros(2, 17, dtype=torch.long)
    positions[0, :5], positions[0, 5:14], positions[1] = (torch.arange(n) for n in (5, 9, 17))
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, span, part in (
        (0, slice(0, 5), first),
        (0, slice(5, 14), second),
        (1, slice(0, 17), third),
    ):
        alone = model(part[None]).logits[0]
        torch.testing.assert_close(logits[row, span], alone, rtol=1e-9, atol=1e-9)


def test_left_padding_is_no_boundary():
    """generate()'s positions of a left-padded batch, with 0 or 1 at the padding, tell of no document."""
    model, part = tiny("hybrid").eval(), documents()[1]
    ids = torch.cat([torch.zeros(4, dtype=torch.long), part])[None]
    mask = torch.cat([torch.zeros(4), torch.ones(17)]).long()[None]
    alone = model(part[None]).logits[0]
    for fill in (0, 1):
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, fill)
        out = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
        torch.testing.assert_close(out.logits[0, 4:], alone, rtol=1e-9, atol=1e-9)


def _refused(model: GKAForCausalLM, message: str, **given) -> None:
    with pytest.raises(ValueError, match=message):
        model(torch.cat(documents())[None], **given)


def test_refusals():
    """What cannot be right is refused in one line that names the argument."""
    model = tiny("hybrid").eval()
    positions = forms()["position_ids"]["position_ids"]
    past = model(documents()[0][None], use_cache=True).past_key_values
    _refused(model, "cannot be cached", position_ids=positions, past_key_values=past)
    _refused(model, "cannot be cached", cu_seq_lens_q=bounds(), use_cache=True)
    _refused(model, "must equal", cu_seq_lens_q=bounds(), cu_seq_lens_k=bounds() + 1)
    _refused(model, "longest document", cu_seq_lens_q=bounds(), max_length_q=3)
    _refused(model, "says nothing by itself", max_length_q=3)
    _refused(model, "two names", cu_seqlens=bounds(), cu_seq_lens_q=bounds())
    _refused(model, "must start with 0", cu_seq_lens_q=bounds() + 1)
    hole = torch.ones(1, 32, dtype=torch.long)
    hole[0, 7] = 0
    _refused(model, "padding", position_ids=positions, attention_mask=hole)
    _refused(model, "exclude each other", cu_seq_lens_q=bounds(), attention_mask=hole)
    with pytest.raises(TypeError):
        model(torch.cat(documents())[None], cu_seqlens_q=bounds())
