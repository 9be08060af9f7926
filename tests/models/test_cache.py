"""GKACache: states by name, copies, rows, compiled steps, and no rolling back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from transformers import DynamicCache

from gka.models import GKACache, GKAForCausalLM, cache_tensors, fill_cache
from gka.models.cache import CACHE_NAME
from tolerances import RELATIVE, assert_close

Build = Callable[..., GKAForCausalLM]
Ids = Callable[..., Tensor]
patterns = pytest.mark.parametrize(
    "mixers", [["gka", "gka"], ["gka", "attention"], ["swa", "gka"], ["deltanet"]], ids="-".join
)


def step(model: GKAForCausalLM, tokens: Tensor, cache: GKACache) -> Tensor:
    return model(tokens, use_cache=True, **{CACHE_NAME: cache}).logits  # type: ignore[arg-type]


@torch.no_grad()
def filled(model: GKAForCausalLM, tokens: Tensor) -> GKACache:
    cache = GKACache(model.config)
    step(model, tokens, cache)
    return cache


@patterns
@torch.no_grad()
def test_tensors_make_the_cache(build: Build, ids: Ids, mixers: list[str]):
    """A new cache filled with a cache's tensors goes on exactly as it, and counts as it."""
    model, tokens = build(mixers=mixers), ids(2, 12)
    cache = filled(model, tokens[:, :9])
    tensors = {name: x.clone() for name, x in cache_tensors(cache).items()}
    again = fill_cache(GKACache(model.config), tensors, 9)
    assert again.get_seq_length() == 9
    for t in range(9, 12):
        found, expected = (step(model, tokens[:, t : t + 1], c) for c in (again, cache))
        assert torch.equal(found, expected)
    assert cache_tensors(again).keys() == tensors.keys()


def test_tensors_of_other_layers_are_refused(build: Build, ids: Ids):
    """A cache takes all tensors of its model's layers and no others."""
    model = build(mixers=["gka", "attention"])
    tensors = cache_tensors(filled(model, ids(1, 4)))
    with pytest.raises(ValueError, match=r"no place for layers\.7\.keys"):
        fill_cache(
            GKACache(model.config), {**tensors, "layers.7.keys": tensors["layers.1.keys"]}, 4
        )
    del tensors["layers.1.values"]
    with pytest.raises(ValueError, match=r"layer 1 of the model needs keys and values"):
        fill_cache(GKACache(model.config), tensors, 4)


@patterns
@torch.no_grad()
def test_rows_are_repeated_selected_and_copied(build: Build, ids: Ids, mixers: list[str]):
    """Rows of all layers' states follow the batch; a clone is independent of its original."""
    model, tokens = build(mixers=mixers), ids(3, 9)
    cache = filled(model, tokens)
    clone = cache.clone()
    cache.batch_repeat_interleave(2)
    found = step(model, torch.full((6, 1), 5), cache)
    expected = step(model, torch.full((3, 1), 5), clone).repeat_interleave(2, 0)
    assert_close(found, expected, RELATIVE[torch.float32])
    rows = torch.tensor([5, 0])
    cache.batch_select_indices(rows)
    clone.reorder_cache(torch.tensor([2, 0]))  # type: ignore[arg-type]
    next_ = torch.full((2, 1), 7)
    assert_close(step(model, next_, cache), step(model, next_, clone), RELATIVE[torch.float32])


@pytest.mark.parametrize("mixers", [["gka"], ["attention", "gka"]])
@pytest.mark.parametrize("tokens", [-1, 0, 1])
def test_crop_is_refused_and_changes_nothing(
    build: Build, ids: Ids, mixers: list[str], tokens: int
):
    """A cache with recurrent states does not roll back, not even its attention layers, and names the way."""
    model = build(mixers=mixers)
    cache = filled(model, ids(1, 6))
    before = {name: x.clone() for name, x in cache_tensors(cache).items()}
    with pytest.raises(ValueError, match=r"cannot be rolled back.*commit=False.*fork\(\)"):
        cache.crop(tokens)
    with pytest.raises(ValueError, match="cannot be rolled back"):
        cache.activate_past_recording()
    after = cache_tensors(cache)
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert cache.get_seq_length() == 6


def test_crop_of_attention_alone(build: Build, ids: Ids):
    """Without recurrent layers a cache rolls back as transformers' own does."""
    model = build(mixers=["attention"])
    cache = filled(model, ids(1, 6))
    cache.crop(-2)
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize("mixers", [["gka", "attention", "swa"]], ids="-".join)
@torch.no_grad()
def test_a_decode_step_compiles_whole(build: Build, ids: Ids, mixers: list[str]):
    """One token from a cache is one graph without breaks; two compilations serve all later steps, and
    states are updated where they lie."""
    model, tokens = build(mixers=mixers), ids(1, 20)
    cache, plain = filled(model, tokens[:, :8]), filled(model, tokens[:, :8])
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    places = [x.data_ptr() for n, x in cache_tensors(cache).items() if "recurrent" in n]
    for t in range(8, 20):
        token = tokens[:, t : t + 1]
        assert_close(
            compiled(model, token, cache), step(model, token, plain), RELATIVE[torch.float32]
        )
    assert counter.frame_count <= 3
    assert places == [x.data_ptr() for n, x in cache_tensors(cache).items() if "recurrent" in n]
    torch._dynamo.reset()


def prefix(heads: int, dim: int, layers: int = 2, length: int = 3, batch: int = 2) -> DynamicCache:
    """Keys and values of every layer, as peft's prefix tuning hands them over."""
    draw = torch.Generator().manual_seed(3)
    shape = (batch, heads, length, dim)
    return DynamicCache(
        [
            (torch.randn(shape, generator=draw), torch.randn(shape, generator=draw))
            for _ in range(layers)
        ]
    )


@pytest.mark.parametrize("mixers", [["gka", "attention"], ["attention", "gla"], ["gka", "swa"]])
def test_a_prefix_enters_the_attention_layers(build: Build, ids: Ids, mixers: list[str]):
    """Keys and values given for every layer are seen by the attention layers, carry gradients, and can be
    gone on from; recurrent layers begin empty."""
    model, tokens = build(mixers=mixers), ids(2, 5)
    given = prefix(4, 8)
    index = mixers.index("attention" if "attention" in mixers else "swa")
    keys = given.layers[index].keys.requires_grad_()  # pyright: ignore
    out = model(tokens[:, :4], past_key_values=given)
    assert not torch.allclose(out.logits, model(tokens[:, :4]).logits, atol=1e-4)
    cache = getattr(out, CACHE_NAME)
    assert cache.get_seq_length() == 3 + 4
    out.logits.sum().backward()
    assert keys.grad is not None and keys.grad.abs().max() > 0
    with torch.no_grad():
        whole: Any = model(tokens, past_key_values=prefix(4, 8), attention_mask=torch.ones(2, 8))
        first = model(tokens[:, :4], past_key_values=prefix(4, 8))
        last = model(tokens[:, 4:], past_key_values=getattr(first, CACHE_NAME))
    assert_close(last.logits[:, -1], whole.logits[:, -1], RELATIVE[torch.float32])


def test_a_prefix_that_nobody_could_read_is_refused(build: Build, ids: Ids):
    """Without attention layers, or with other heads, keys and values are refused and the remedy named."""
    with pytest.raises(ValueError, match=r"no attention layer .* prompt tuning"):
        build(mixers=["gka", "gla"])(ids(2, 4), past_key_values=prefix(4, 8))
    with pytest.raises(ValueError, match="num_attention_heads=2, token_dim=16"):
        build(mixers=["gka", "attention"], num_kv_heads=2)(ids(2, 4), past_key_values=prefix(4, 8))


def test_a_cache_comes_back_unless_it_is_declined(build: Build, ids: Ids):
    """A given cache is returned, but not with use_cache=False."""
    model, tokens = build(mixers=["gka", "attention"]), ids(1, 4)
    assert CACHE_NAME in model(tokens, past_key_values=GKACache(model.config))
    assert CACHE_NAME not in model(tokens, past_key_values=GKACache(model.config), use_cache=False)


def test_steps_name_the_cache_as_peft_looks_for_it(build: Build, ids: Ids):
    """What `generate` hands to the model holds the cache as past_key_values in every version."""
    model: Any = build(mixers=["gka", "attention"])
    cache = GKACache(model.config)
    given: dict[str, Any] = {"input_ids": ids(1, 4), CACHE_NAME: cache, "use_cache": True}
    inputs = model.prepare_inputs_for_generation(**given)
    assert inputs["past_key_values"] is cache and "cache" not in inputs
