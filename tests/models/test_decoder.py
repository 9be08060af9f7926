"""The decoder: every pattern, with padding, packing, caches, checkpointing and compilation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from gka.models import GKACache, GKAForCausalLM
from gka.models.cache import CACHE_NAME
from tolerances import RELATIVE, assert_close

Build = Callable[..., GKAForCausalLM]
Ids = Callable[..., Tensor]

PATTERNS = {
    "gka": ["gka", "gka"],
    "hybrid": ["gka", "attention", "gka"],
    "attention": ["attention", "attention"],
    "swa": ["swa", "gka"],
    "gla": ["gla", "gla"],
    "deltanet": ["deltanet", "gated_deltanet"],
}
TOLERANCE = 20 * RELATIVE[torch.float32]  # several layers deep, different routes through the chunks


@pytest.fixture(params=PATTERNS)
def model(request: pytest.FixtureRequest, build: Build) -> GKAForCausalLM:
    return build(mixers=PATTERNS[request.param])


def test_names_of_the_parameters(build: Build):
    """State-dict names are those promised: released names inside mixers, the usual ones around them."""
    names = set(build(mixers=["gka"]).state_dict())
    layer = "model.layers.0."
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= names
    assert {layer + "input_layernorm.weight", layer + "post_attention_layernorm.weight"} <= names
    assert {f"{layer}mlp.{part}_proj.weight" for part in ("gate", "up", "down")} <= names
    assert {layer + "mixer.A_log", layer + "mixer.q_conv1d.weight"} <= names


def test_causality(model: GKAForCausalLM, ids: Ids):
    """A token changes nothing before it, and something after it."""
    tokens = ids(1, 20)
    changed = tokens.clone()
    changed[0, 12] = 1 + changed[0, 12] % 90
    before, after = model(tokens).logits, model(changed).logits
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 13:], after[:, 13:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_influence(model: GKAForCausalLM, ids: Ids, side: str):
    """Rows of different lengths in one padded batch give what they give alone."""
    tokens, mask = ids(2, 13), torch.ones(2, 13, dtype=torch.long)
    kept = slice(4, None) if side == "left" else slice(0, 9)
    mask[1] = 0
    mask[1, kept] = 1
    padded = model(tokens * mask, attention_mask=mask).logits
    assert torch.isfinite(padded).all()
    assert_close(padded[1:, kept], model(tokens[1:, kept]).logits, TOLERANCE, "short row")
    assert_close(padded[:1], model(tokens[:1]).logits, TOLERANCE, "long row")


def test_packed_sequences_are_separate(model: GKAForCausalLM, ids: Ids):
    """Sequences packed with cu_seqlens give the outputs, loss and gradients of separate ones."""
    lengths = [1, 6, 70, 3]
    tokens = ids(1, sum(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    packed = model(tokens, labels=tokens, cu_seqlens=bounds)
    assert CACHE_NAME not in packed
    packed.loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    model.zero_grad()
    total = torch.zeros(())
    for part in tokens.split(lengths, dim=1):
        alone = model(part, labels=part, num_items_in_batch=sum(lengths) - len(lengths))
        total = total + alone.loss
    total.backward()
    apart = torch.cat([model(part).logits for part in tokens.split(lengths, dim=1)], 1)
    assert_close(packed.logits, apart, TOLERANCE, "logits")
    assert_close(packed.loss, total, TOLERANCE, "loss")
    expected = model.model.embed_tokens.weight.grad
    assert expected is not None
    assert_close(gradient, expected, TOLERANCE, "gradient")


@pytest.mark.parametrize("kind", ["own", "dynamic", "static"])
def test_any_chunking_with_a_cache_equals_one_forward(model: GKAForCausalLM, ids: Ids, kind: str):
    """Prefill, continuation by many tokens and by one, with left padding: one forward's logits."""
    tokens, mask = ids(2, 34), torch.ones(2, 34, dtype=torch.long)
    mask[1, :5] = 0
    expected = model(tokens, attention_mask=mask, use_cache=False).logits
    cache: Any = {
        "own": lambda: None,
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=40),
    }[kind]()
    parts, start = [], 0
    with torch.no_grad():
        for size in (9, 20, 1, 1, 3):
            part = slice(start, start := start + size)
            out = model(
                tokens[:, part],
                attention_mask=mask[:, :start],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out[CACHE_NAME]
            parts.append(out.logits)
    found = torch.cat(parts, 1)
    assert_close(found[0], expected[0], TOLERANCE, "row without padding")
    assert_close(found[1, 5:], expected[1, 5:], TOLERANCE, "row with padding")
    if kind == "own":
        assert isinstance(cache, GKACache) and cache.get_seq_length() == 34
        cache.reset()
        again = model(tokens, attention_mask=mask, past_key_values=cache)
        assert_close(again.logits[1, 5:], expected[1, 5:], TOLERANCE, "after a reset")
        assert cache.get_seq_length() == 34


def test_the_cache_is_updated_in_place(build: Build, ids: Ids):
    """Recurrent states keep their addresses from step to step, as compiled decoding needs."""
    model = build(mixers=["gka", "attention"])
    with torch.no_grad():
        cache: Any = model(ids(1, 6), use_cache=True)[CACHE_NAME]
        states = [*cache.layers[0].recurrent_states.values(), *cache.layers[0].conv_states.values()]
        addresses = [state.data_ptr() for state in states if state is not None]
        before = cache.layers[0].recurrent_states[0].clone()
        model(ids(1, 1), past_key_values=cache)
    states = [*cache.layers[0].recurrent_states.values(), *cache.layers[0].conv_states.values()]
    assert len(addresses) == 5
    assert [state.data_ptr() for state in states if state is not None] == addresses
    assert not torch.equal(before, cache.layers[0].recurrent_states[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(build: Build, ids: Ids, reentrant: bool):
    """Recomputing layers in the backward pass changes no bit of loss and gradients, and does happen."""
    model = build(mixers=["gka", "attention", "gated_deltanet", "swa"]).train()
    tokens = ids(2, 20)
    calls: list[int] = []
    model.get_submodule("model.layers.0.mixer").register_forward_hook(lambda *_: calls.append(1))

    def step() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        return loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    loss, plain = step()
    assert len(calls) == 1
    # the new name appeared after transformers 5.17
    name = "activation_checkpointing_enable"
    enable: Any = getattr(model, name, model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again, checkpointed = step()
    assert len(calls) == 3
    assert torch.equal(loss, again)
    assert len(plain) == len(checkpointed) == len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_checkpointing_refuses_a_cache(build: Build, ids: Ids):
    """A layer run twice would take its tokens into a cache twice: refused, except without gradients."""
    model, tokens = build(mixers=["gka", "attention"]), ids(1, 6)
    expected = model(tokens).logits
    name = "activation_checkpointing_enable"
    getattr(model, name, model.gradient_checkpointing_enable)()
    model.train()
    for options in ({"use_cache": True}, {"past_key_values": GKACache(model.config)}):
        with pytest.raises(ValueError, match="a cache would take in the tokens twice"):
            model(tokens, **options)
    with torch.no_grad():
        cache = GKACache(model.config)
        parts = [model(part, past_key_values=cache).logits for part in tokens.split(3, 1)]
    assert_close(torch.cat(parts, 1), expected, TOLERANCE)


def test_a_cache_has_two_names(build: Build, ids: Ids):
    """`cache` and `past_key_values` are one argument in every version of transformers, given once."""
    model, tokens = build(mixers=["gka", "attention"]), ids(1, 6)
    expected = model(tokens).logits[:, 3:]
    for body in (model, model.model):
        for name in ("cache", "past_key_values"):
            cache = GKACache(model.config)
            model(tokens[:, :3], **{name: cache})
            out = body(tokens[:, 3:], **{name: cache})
            assert out[CACHE_NAME] is cache and cache.get_seq_length() == 6
            if body is model:
                assert_close(out.logits, expected, TOLERANCE, name)
        with pytest.raises(ValueError, match="two names of one argument"):
            body(tokens, cache=cache, past_key_values=cache)


def test_misspelt_arguments_are_refused(build: Build, ids: Ids):
    """No catch-all swallows a name that forward does not have."""
    model = build()
    for body in (model, model.model):
        with pytest.raises(TypeError, match="cahce"):
            body(ids(1, 3), cahce=None)


def test_compiled_model_gives_the_same(build: Build, ids: Ids):
    """torch.compile takes model and loss as one graph, forwards and backwards."""
    model = build(mixers=["gka", "attention"], num_iter=2).train()
    tokens = ids(2, 12)
    plain = model(tokens, labels=tokens).loss
    plain.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = compiled(tokens, labels=tokens).loss
    loss.backward()
    assert_close(loss, plain, RELATIVE[torch.float32])
    found = [p.grad for p in model.parameters() if p.grad is not None]
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, TOLERANCE)


def test_hidden_states_and_tuples(build: Build, ids: Ids):
    """output_hidden_states gives embeddings and every layer; return_dict=False gives a tuple."""
    model = build(mixers=["gka", "attention"])
    tokens = ids(1, 5)
    out = model(tokens, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(tokens))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert torch.equal(model(tokens, use_cache=False, return_dict=False)[0], out.logits)
    model.config.output_hidden_states = True
    assert len(model(tokens).hidden_states) == 3
    embedded = model(inputs_embeds=model.model.embed_tokens(tokens))
    assert torch.equal(embedded.logits, out.logits)


def test_a_mask_of_ones_is_no_mask(build: Build, ids: Ids):
    """A mask without padding changes no bit; attention layers insist that it covers the cached past."""
    tokens, ones = ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    for mixers in (["gka", "attention"], ["gka", "gka"]):
        model = build(mixers=mixers)
        out = model(tokens, attention_mask=ones)
        assert torch.equal(out.logits, model(tokens).logits)
        if "attention" in mixers:
            with pytest.raises(ValueError, match="must cover the 7 cached and the 7 new positions"):
                model(tokens, attention_mask=ones, past_key_values=out[CACHE_NAME])
        else:
            model(tokens, attention_mask=ones, past_key_values=out[CACHE_NAME])
            assert out[CACHE_NAME].get_seq_length() == 14


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m(), "exactly one of input_ids and inputs_embeds"),
        (lambda m, x: m(x, inputs_embeds=torch.zeros(1, 4, 32)), "exactly one"),
        (lambda m, x: m(x[0]), r"input_ids must be \[batch, tokens\]"),
        (lambda m, x: m(x[:, :0]), "at least one token"),
        (lambda m, x: m(x, labels=x[:, :3]), r"labels must have the tokens' shape \(1, 4\)"),
        (
            lambda m, x: m(x, past_key_values=((x, x),)),
            "past_key_values must be a cache of 2 layers",
        ),
        (lambda m, x: m(x, past_key_values=DynamicCache()), "must be a cache of 2 layers"),
        (lambda m, x: m(x, cu_seqlens=torch.tensor([0, 4]), use_cache=True), "cu_seqlens"),
        (lambda m, x: m(x, attention_mask=torch.ones(1, 1, 4, 4)), "attention_mask must be"),
        (
            lambda m, x: m(x, attention_mask=torch.ones(1, 3, dtype=torch.long) * 0),
            "attention_mask",
        ),
    ],
)
def test_wrong_calls_are_named(build: Build, ids: Ids, call: Any, message: str):
    """Inputs that contradict each other are refused with the argument's name."""
    with pytest.raises(ValueError, match=message):
        call(build(mixers=["gka", "attention"]), ids(1, 4))
