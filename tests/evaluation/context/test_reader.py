"""Models read in chunks, rank continuations and write."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gka.errors import InputError
from gka.evaluation.context import reader as module
from gka.evaluation.context.reader import Reader
from gka.models import GKAConfig, GKAForCausalLM
from tolerances import RELATIVE, assert_close

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}


def small(kind: str):
    """An untrained model of wide logits, so that wrong tokens or states would show."""
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(**SIZES, intermediate_size=32, num_attention_heads=2)
        model = LlamaForCausalLM(config)
    else:
        layers = [1] if kind == "hybrid" else []
        model = GKAForCausalLM(
            GKAConfig(**SIZES, num_heads=2, head_dim=16, attention_layers=layers)
        )
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model.eval()


@pytest.fixture(scope="module", params=["gka", "hybrid", "llama"])
def model(request):
    return small(request.param)


PROMPT = torch.randint(0, 50, (37,), generator=torch.Generator().manual_seed(1)).tolist()


def by_hand(model, ids: list[int]) -> torch.Tensor:
    """log p of every token but the first, from one forward pass over everything."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("chunk", [1, 7, 36, 100])
def test_losses_are_those_of_one_pass(model, chunk):
    """Read in chunks of any size, every token's loss is that of reading all at once."""
    losses = Reader(model, chunk).token_losses(PROMPT)
    assert_close(-losses, by_hand(model, PROMPT), RELATIVE[torch.float32])


@pytest.mark.parametrize("chunk", [5, 100])
def test_rows_side_by_side_are_scored_as_alone(model, chunk):
    """Contexts and continuations of different lengths in one batch do not touch each other."""
    rows = [(PROMPT[:20], PROMPT[20:30]), (PROMPT[:3], PROMPT[3:5]), (PROMPT[:1], PROMPT[1:])]
    for (context, text), (losses, likeliest) in zip(
        rows, Reader(model, chunk).losses(rows), strict=True
    ):
        wanted = by_hand(model, context + text)[-len(text) :]
        assert_close(-losses, wanted, RELATIVE[torch.float32])
        logits = model(input_ids=torch.tensor([context + text])).logits[0, -len(text) - 1 : -1]
        assert likeliest.tolist() == (logits.argmax(-1) == torch.tensor(text)).tolist()


@pytest.mark.parametrize("room", [1, 1 << 30])
def test_continuations_share_a_prompt(model, room, monkeypatch):
    """Continuations of different lengths get their own log-likelihoods behind one reading of the prompt,
    whether their copies of its cache fit side by side or only one by one, and leave the state as it was."""
    monkeypatch.setattr(module, "ROOM", room)
    reader = Reader(model, 10)
    state = reader.read(PROMPT)
    texts = [[3], [4, 5, 6], [7, 8], [4, 5, 9, 1]]
    for _ in range(2):
        found = reader.log_likelihoods(state, texts)
        wanted = [float(by_hand(model, PROMPT + text)[-len(text) :].sum()) for text in texts]
        assert found == pytest.approx(wanted, rel=RELATIVE[torch.float32])


def test_writing_is_greedy_decoding(model):
    """What is written is the likeliest token after all before it, and `scores` knows that; an end stops."""
    reader = Reader(model, 10)
    written = reader.write(reader.read(PROMPT), 8, ())
    ids = list(PROMPT)
    for token in written:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert ids[-1] == token
    other = [*written[:3], (written[3] + 1) % 50]
    greedy = [g for _, g in reader.scores(reader.read(PROMPT), [written, other, written[:1]])]
    assert greedy == [True, False, True]
    end = written[4]
    stopped = reader.write(reader.read(PROMPT), 8, (end,))
    assert stopped == written[: written.index(end)]


def test_logits_are_made_only_where_they_are_wanted(monkeypatch):
    """Reading a long prompt keeps one row of logits a chunk, so memory does not grow with length times
    vocabulary."""
    model = small("gka")
    sizes = []
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: (sizes.append(x.shape[1]), head(x))[1])
    Reader(model, 10).read(PROMPT)
    assert sizes == [1, 1, 1, 1]
    sizes.clear()
    Reader(model, 10).losses([(PROMPT[:30], PROMPT[30:])])
    assert sizes == [1, 1, 1, 7]


def test_a_model_without_a_cache_is_refused(model):
    """A model that returns no cache cannot read in chunks: an error, not a wrong number."""

    class Forgetful(torch.nn.Module):
        config, device = model.config, torch.device("cpu")

        def forward(self, **named):
            named.pop("use_cache")
            return type("Output", (), {"logits": torch.zeros(1, 1, 50)})

    with pytest.raises(InputError, match="keeps no cache"):
        Reader(Forgetful(), 10).read(PROMPT)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="chunk is 0"):
        Reader(model, 0)
