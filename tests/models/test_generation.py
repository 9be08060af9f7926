"""generate: with a cache, in batches, with beams, it is what uncached forward passes give."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from gka.models import GKACache, GKAForCausalLM
from gka.models.cache import CACHE_NAME
from tolerances import RELATIVE, assert_close

Build = Callable[..., GKAForCausalLM]
Ids = Callable[..., Tensor]

PATTERNS = [
    ["gka", "gka"],
    ["gka", "attention", "gka"],
    ["attention", "swa"],
    ["swa", "gla"],
    ["deltanet", "gated_deltanet"],
]
HYBRID = ["gka", "attention"]
NEW = 8


@pytest.fixture(params=PATTERNS, ids="-".join)
def model(request: pytest.FixtureRequest, build: Build) -> GKAForCausalLM:
    return build(mixers=request.param)


def padded_batch(ids: Ids) -> tuple[Tensor, Tensor]:
    """Three prompts of lengths 11, 7 and 2, padded on the left."""
    tokens, mask = ids(3, 11), torch.ones(3, 11, dtype=torch.long)
    mask[1, :4] = 0
    mask[2, :9] = 0
    return tokens * mask, mask


def generate(model: Any, tokens: Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    options.setdefault("attention_mask", torch.ones_like(tokens))
    return model.generate(tokens, **options)


def test_greedy_equals_uncached_forwards(model: GKAForCausalLM, ids: Ids):
    """Greedy decoding with the cache picks what full forward passes pick, with the same scores."""
    tokens = ids(2, 9)
    out = generate(model, tokens, return_dict_in_generate=True, output_logits=True)
    for step in range(NEW):
        seen = out.sequences[:, : 9 + step]
        logits = model(seen, use_cache=False).logits[:, -1]
        assert_close(out.logits[step], logits, 20 * RELATIVE[torch.float32], f"step {step}")
        picked = logits.gather(1, out.sequences[:, 9 + step, None])[:, 0]
        assert (logits.amax(-1) - picked).max() < 1e-5


def test_left_padded_batch_equals_single_prompts(model: GKAForCausalLM, ids: Ids):
    """Prompts of different lengths generate in one padded batch what they generate alone."""
    tokens, mask = padded_batch(ids)
    together = generate(model, tokens, attention_mask=mask)
    for row, (prompt, is_token) in enumerate(zip(tokens, mask, strict=True)):
        alone = generate(model, prompt[is_token.bool()][None])
        assert torch.equal(together[row, -NEW:], alone[0, -NEW:]), row


def test_beams_equal_beams_without_a_cache(model: GKAForCausalLM, ids: Ids):
    """Beam search reorders every layer's states: the same beams and scores as without a cache."""
    tokens, mask = padded_batch(ids)
    options: dict[str, Any] = {
        "attention_mask": mask,
        "num_beams": 3,
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    cached = generate(model, tokens, **options)
    uncached = generate(model, tokens, **options, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_close(cached.sequences_scores, uncached.sequences_scores, 1e-4)


def test_sampling_equals_sampling_without_a_cache(build: Build, ids: Ids):
    """With the same seed the cache changes no sampled token."""
    model, (tokens, mask) = build(mixers=HYBRID), padded_batch(ids)
    options = {"attention_mask": mask, "do_sample": True, "temperature": 0.7, "top_k": 20}
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(generate(model, tokens, **options, use_cache=use_cache))
    assert torch.equal(*found)


# transformers asks for the newer name once it has it
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("mixers", [["gka", "gka"], HYBRID])
def test_a_conversation_goes_on_from_its_cache(
    build: Build, ids: Ids, mixers: list[str], name: str
):
    """A second generate call with the cache of the first equals one over the whole text."""
    model, tokens = build(mixers=mixers), ids(2, 6)
    cache = GKACache(model.config)
    first = generate(model, tokens, **{name: cache})
    longer = torch.cat([first, ids(2, 3, seed=5)], 1)
    found = generate(model, longer, **{name: cache})
    assert torch.equal(found, generate(model, longer))
    assert cache.get_seq_length() == found.shape[1] - 1


def test_stops_at_the_end_of_text(build: Build, ids: Ids):
    """Rows that have met eos are padded while others go on."""
    tokens = ids(2, 6)
    free = generate(build(), tokens)
    eos = int(free[0, 8])
    stopped = generate(build(eos_token_id=eos), tokens)
    assert (stopped[0, 9:] == 0).all() and stopped[0, 8] == eos
    until = (free[1, 6:] == eos).long().cumsum(0).eq(0).sum() + 6
    assert torch.equal(stopped[1, :until], free[1, :until])


def test_checkpointed_models_generate_while_training(build: Build, ids: Ids):
    """Samples taken in the middle of training, checkpointing on, are those of evaluation mode."""
    model, tokens = build(mixers=HYBRID), ids(2, 6)
    expected = generate(model, tokens)
    name = "activation_checkpointing_enable"
    getattr(model, name, model.gradient_checkpointing_enable)()
    assert torch.equal(generate(model.train(), tokens), expected)


def test_chunked_prefill_equals_one_prefill(build: Build, ids: Ids):
    """prefill_chunk_size changes memory, not tokens."""
    model, tokens = build(mixers=HYBRID), ids(2, 17)
    assert torch.equal(generate(model, tokens, prefill_chunk_size=5), generate(model, tokens))


@pytest.mark.parametrize("mixers", [HYBRID, ["swa", "gka"], ["attention", "swa"]])
def test_static_cache(build: Build, ids: Ids, mixers: list[str]):
    """A static cache, where transformers can make one, generates the same, padding included."""
    model, (tokens, mask) = build(mixers=mixers), padded_batch(ids)
    static = generate(model, tokens, attention_mask=mask, cache_implementation="static")
    assert torch.equal(static, generate(model, tokens, attention_mask=mask))


@pytest.mark.parametrize(
    ("mixers", "options", "message"),
    [
        (["gka"], {"cache_implementation": "static"}, "needs an attention layer"),
        (
            ["gka"],
            {"cache_implementation": "quantized"},
            "'quantized' cannot hold recurrent states",
        ),
        (HYBRID, {"cache_implementation": "offloaded"}, "'offloaded' cannot hold"),
        (["gka"], {CACHE_NAME: DynamicCache}, "pass a gka.models.GKACache"),
        (HYBRID, {"assistant_model": HYBRID}, "assisted generation is not supported with stateful"),
        (["attention"], {"assistant_model": ["gka"]}, "recurrent states cannot be rolled back"),
        (["attention"], {"assistant_model": HYBRID}, "recurrent states cannot be rolled back"),
        (HYBRID, {"output_attentions": True}, "no attention weights"),
        (HYBRID, {"cahce": 1}, "not used by the model"),
    ],
)
def test_what_cannot_work_says_so(
    build: Build, ids: Ids, mixers: list[str], options: dict[str, Any], message: str
):
    """Caches that cannot hold the states, and decoding that would roll them back, are refused."""
    model = build(mixers=mixers)
    if CACHE_NAME in options:
        options = {CACHE_NAME: DynamicCache(config=model.config)}
    if "assistant_model" in options:
        options = {"assistant_model": build(mixers=options["assistant_model"])}
    with pytest.raises(ValueError, match=message):
        generate(model, ids(1, 4), **options)


@pytest.mark.parametrize("mixer", ["attention", "swa"])
def test_attention_only_models_can_be_assisted(build: Build, ids: Ids, mixer: str):
    """Without recurrent layers a draft model may speed up decoding, and changes nothing."""
    model, tokens = build(mixers=[mixer, "attention"]), ids(1, 6)
    draft = build(mixers=[mixer], seed=4)
    assert torch.equal(generate(model, tokens, assistant_model=draft), generate(model, tokens))


def test_logits_to_keep(build: Build, ids: Ids):
    """Only the logits asked for are computed: the last n, or those at given positions."""
    model, tokens = build(mixers=HYBRID), ids(2, 9)
    full = model(tokens).logits
    assert_close(model(tokens, logits_to_keep=2).logits, full[:, -2:], RELATIVE[torch.float32])
    chosen = torch.tensor([0, 5])
    assert_close(
        model(tokens, logits_to_keep=chosen).logits, full[:, chosen], RELATIVE[torch.float32]
    )
    with_loss = model(tokens, labels=tokens, logits_to_keep=1)
    assert with_loss.logits.shape[1] == 1
    assert torch.equal(with_loss.loss, model(tokens, labels=tokens).loss)
