"""Every mixer with every kind of cache: calls in pieces equal one call on the whole."""

import pytest
import torch
from torch import Tensor

from gka.layers import MIXERS, StateCache
from tolerances import RELATIVE, assert_close

EXACT = 1e-9
WINDOW = 6
ATTENTION = ("attention", "swa")


def native_cache(name: str):
    """The cache that transformers builds for a one-layer model of this mixer."""
    from transformers.cache_utils import (
        Cache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionLayer,
    )

    if name == "attention":
        return Cache(layers=[DynamicLayer()])
    if name == "swa":
        return Cache(layers=[DynamicSlidingWindowLayer(sliding_window=WINDOW)])
    return Cache(layers=[LinearAttentionLayer(number_of_states=3)])


@pytest.fixture(params=["StateCache", "transformers"])
def cache(request, name):
    return StateCache() if request.param == "StateCache" else native_cache(name)


def run(mixer, x: Tensor, cache, cuts: list[int], mask: Tensor | None = None) -> Tensor:
    """Outputs of x cut into calls at `cuts`, the mask covering all that was seen so far."""
    outputs = []
    for begin, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        seen = None if mask is None else mask[:, :end]
        output, _, same = mixer(x[:, begin:end], attention_mask=seen, past_key_values=cache)
        assert same is cache
        outputs.append(output)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("cuts", [[20], [1, 2, 3, 4, 5], [3, 25, 27], list(range(1, 34))])
@torch.no_grad()
def test_pieces_equal_the_whole(mixer, tokens, cache, cuts):
    """Prefill, chunked prefill (long and short calls) and stepwise decoding equal one call."""
    x = tokens(2, 34)
    assert_close(run(mixer, x, cache, cuts), mixer(x)[0], EXACT)


@torch.no_grad()
def test_pieces_equal_the_whole_in_float32(mixer, tokens, cache):
    """The same in float32, states and caches included."""
    mixer, x = mixer.float(), tokens(2, 34).float()
    assert_close(run(mixer, x, cache, [21, 22, 30]), mixer(x)[0], RELATIVE[torch.float32])


@pytest.mark.parametrize("cuts", [[20], [20, 21, 22, 23], [2, 3, 9]])
@torch.no_grad()
def test_left_padded_batch_decodes_like_separate_sequences(mixer, tokens, cache, cuts):
    """Prefill of a left-padded batch and decoding from its cache equal each row alone, whole; the cut
    may fall into the padding."""
    x = tokens(3, 30)
    starts = [0, 7, 15]
    mask = torch.stack([(torch.arange(30) >= start).long() for start in starts])
    output = run(mixer, x, cache, cuts, mask)
    for row, start in enumerate(starts):
        assert_close(output[row, start:], mixer(x[row : row + 1, start:])[0][0], EXACT)


# A sliding window counts positions, padding included, as its docstring says.
@pytest.mark.parametrize("name", [name for name in MIXERS if name != "swa"])
@torch.no_grad()
def test_right_padded_batch_decodes_like_separate_sequences(name, make, tokens, cache):
    """A right-padded prefill followed by decoding equals each row alone: padding between the calls
    reaches neither states nor convolutions."""
    mixer, x = make(name), tokens(2, 24)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 11:18] = 0
    output = run(mixer, x, cache, [18, 19, 20], mask)
    alone = mixer(torch.cat([x[1:, :11], x[1:, 18:]], 1))[0][0]
    assert_close(output[0], mixer(x[:1])[0][0], EXACT)
    assert_close(torch.cat([output[1, :11], output[1, 18:]]), alone, EXACT)


@torch.no_grad()
def test_reorder(mixer, tokens, cache):
    """After reorder_cache a row goes on from its new past."""
    x, step = tokens(3, 20), tokens(3, 4, seed=2)
    run(mixer, x, cache, [])
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    expected = mixer(torch.cat([x[[2, 2, 0]], step], 1))[0][:, 20:]
    assert_close(run(mixer, step, cache, [1]), expected, EXACT)


@torch.no_grad()
def test_reset(mixer, name, tokens, cache):
    """After reset there is no past."""
    if name in ATTENTION:
        cache = StateCache()  # keys of transformers' own layers are its own affair
    x = tokens(3, 20)
    run(mixer, x, cache, [])
    cache.reset()
    assert_close(run(mixer, x, cache, [7]), mixer(x)[0], EXACT)


def test_cached_calls_can_be_differentiated(mixer, tokens, cache):
    """With gradients enabled, a call's loss reaches the parameters after later calls have updated the
    cache, and equals that of the call from a constant past."""
    x = tokens(1, 12)
    first = mixer(x[:, :8], past_key_values=cache)[0]
    second = mixer(x[:, 8:], past_key_values=cache)[0]
    assert_close(torch.cat([first, second], 1), mixer(x)[0], EXACT)
    parameters = list(mixer.parameters())
    got = torch.autograd.grad(first.square().sum(), parameters, retain_graph=True)
    expected = torch.autograd.grad(mixer(x[:, :8])[0].square().sum(), parameters)
    for mine, theirs in zip(got, expected, strict=True):
        assert_close(mine, theirs, EXACT)
    later = torch.autograd.grad(second.square().sum(), parameters)
    assert all(torch.isfinite(grad).all() for grad in later)


@torch.no_grad()
def test_use_cache_starts_a_state_cache(mixer, tokens):
    """use_cache without a cache returns a new StateCache to go on from."""
    x = tokens(1, 12)
    first, _, cache = mixer(x[:, :8], use_cache=True)
    assert isinstance(cache, StateCache)
    second, _, _ = mixer(x[:, 8:], past_key_values=cache)
    assert_close(torch.cat([first, second], 1), mixer(x)[0], EXACT)


@torch.no_grad()
def test_a_state_cache_keeps_no_more_than_it_needs(name, make, tokens):
    """What a StateCache holds after a long prefill is of constant size for all but full attention."""
    mixer, cache = make(name), StateCache()
    mixer(tokens(1, 100), past_key_values=cache)
    mixer(tokens(1, 1), past_key_values=cache)
    state = cache.layers[0]
    held = [*state.conv_states.values(), *state.recurrent_states.values()]
    if name in ATTENTION:
        assert state.keys is not None and not held
        assert cache.get_seq_length() == 101
        assert state.keys.shape[-2] == (101 if name == "attention" else WINDOW - 1)
        return
    channels = {0: 4 * 6, 1: 2 * 6, 2: 2 * 6}
    assert {i: tuple(s.shape) for i, s in state.conv_states.items()} == {
        i: (1, n, 4) for i, n in channels.items()
    }
    assert len(state.recurrent_states) == (2 if name == "gka" else 1)
    assert all(s.shape == (1, 4, 6, 6) for s in state.recurrent_states.values())
    assert all(s.untyped_storage().nbytes() <= 8 * 4 * 6 * 10 for s in held)
    with pytest.raises(ValueError, match="layer 0 is recurrent"):
        cache.get_seq_length(0)


def test_refused_caches(name, make, tokens):
    """A cache is refused, by what is wrong with it, for packed sequences, for a mixer without
    layer_idx, and where it has no place for the layer."""
    from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

    mixer, x = make(name), tokens(1, 9)
    with pytest.raises(ValueError, match=r"packed sequences .* cannot be cached"):
        mixer(x, use_cache=True, cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="construct the mixer with layer_idx=0"):
        make(name, layer_idx=None)(x, use_cache=True)
    if name in ATTENTION:
        with pytest.raises(ValueError, match="keeps no keys"):
            mixer(x, past_key_values=Cache(layers=[LinearAttentionLayer(number_of_states=3)]))
        return
    wrong = [[], [DynamicLayer()], [LinearAttentionLayer(number_of_states=1)]]
    for layers in wrong:
        with pytest.raises(ValueError, match="number_of_conv_states = 3"):
            mixer(x, past_key_values=Cache(layers=layers))


@pytest.mark.parametrize("kind", ["attention", "swa"])
@torch.no_grad()
def test_static_cache(kind, make, tokens):
    """Attention runs from a static cache, whose places for positions to come are not seen."""
    from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer

    layer = (
        StaticLayer(max_cache_len=40)
        if kind == "attention"
        else StaticSlidingWindowLayer(max_cache_len=40, sliding_window=WINDOW)
    )
    mixer, x = make(kind), tokens(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :3] = 0
    output = run(mixer, x, Cache(layers=[layer]), [20, 21, 22, 23], mask)
    assert_close(output[0], mixer(x[:1])[0][0], EXACT)
    assert_close(output[1, 3:], mixer(x[1:, 3:])[0][0], EXACT)


@torch.no_grad()
def test_layers_share_a_cache(make, tokens):
    """A stack of different mixers decodes from one StateCache, each from its own layer."""
    stack = [
        make(kind, layer_idx=i) for i, kind in enumerate(("gka", "attention", "deltanet", "swa"))
    ]

    def forward(x: Tensor, cache: StateCache | None) -> Tensor:
        for mixer in stack:
            x = x + mixer(x, past_key_values=cache)[0]
        return x

    x, cache = tokens(2, 20), StateCache()
    pieces = [forward(x[:, a:b], cache) for a, b in ((0, 13), (13, 14), (14, 20))]
    assert_close(torch.cat(pieces, 1), forward(x, None), EXACT)
    assert len(cache.layers) == 4
    assert cache.get_seq_length(1) == cache.get_seq_length(3) == 20


@torch.no_grad()
def test_cache_from_a_model_config(make, tokens):
    """DynamicCache(config) with layer_types and number_of_conv_states serves a stack of mixers."""
    from transformers import DynamicCache, PreTrainedConfig

    config = PreTrainedConfig()
    config.num_hidden_layers = 3
    config.layer_types = ["linear_attention", "full_attention", "sliding_attention"]
    config.number_of_conv_states = 3
    config.sliding_window = WINDOW
    cache = DynamicCache(config=config)
    x = tokens(2, 20)
    for i, kind in enumerate(("gka", "attention", "swa")):
        mixer = make(kind, layer_idx=i)
        assert_close(run(mixer, x, cache, [13, 14]), mixer(x)[0], EXACT)


@torch.no_grad()
def test_compiled_decoding(make, tokens):
    """A compiled layer prefills and decodes without gradients, at lengths that differ between calls."""
    torch._dynamo.reset()
    mixer, x = make("gka"), tokens(2, 23)
    compiled = torch.compile(mixer, backend="aot_eager")
    assert_close(run(compiled, x, native_cache("gka"), [12, 22]), mixer(x)[0], EXACT)


@torch.no_grad()
def test_states_stay_where_they_are(mixer, name, tokens, cache):
    """Long and short calls update every recurrent state at its address, in either kind of cache."""
    if name in ATTENTION:
        pytest.skip("keys and values grow")
    mixer(tokens(2, 30), past_key_values=cache)
    layer = cache.layers[0]

    def places() -> list[int]:
        held = [*layer.conv_states.values(), *layer.recurrent_states.values()]
        return [x.data_ptr() for x in held if x is not None]

    before = places()
    for length in (70, 1, 5, 17):
        mixer(tokens(2, length), past_key_values=cache)
        assert len(before) == (5 if name == "gka" else 4) and places() == before


def test_states_of_inference_mode_can_be_gone_on_from(mixer, tokens):
    """A StateCache filled in inference mode is updated outside it, where its tensors cannot be written to."""
    x, cache = tokens(1, 12), StateCache()
    with torch.inference_mode():
        first = mixer(x[:, :8], past_key_values=cache)[0]
    with torch.no_grad():
        rest = [mixer(x[:, i : i + 2], past_key_values=cache)[0] for i in (8, 10)]
        assert_close(torch.cat([first, *rest], 1), mixer(x)[0], EXACT)


@torch.no_grad()
def test_another_batch_size_replaces_the_states():
    """Where a state no longer fits, the cache holds the new one."""
    cache = StateCache()
    cache.update_recurrent_state(torch.zeros(2, 3), 0)
    cache.update_recurrent_state(torch.ones(4, 3), 0)
    assert torch.equal(cache.layers[0].recurrent_states[0], torch.ones(4, 3))


def test_an_update_leaves_alone_what_autograd_keeps():
    """A state that a call's derivative needs is still there after later calls have updated the cache."""
    x, cache = torch.ones(3, requires_grad=True), StateCache()
    y = x.exp()  # whose derivative is itself
    cache.update_recurrent_state(y, 0)
    with torch.no_grad():
        cache.update_recurrent_state(torch.zeros(3), 0)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y.detach())


def held(cache) -> list[Tensor]:
    """Every tensor that the cache of one layer keeps."""
    layer = cache.layers[0]
    found = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    for states in ("conv_states", "recurrent_states"):
        found.extend(getattr(layer, states, {}).values())
    return [x for x in found if x is not None]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("cuts", [[300], [1, 2, 299], [7, 150]])
def test_a_cache_keeps_no_prompt_alive(mixer, name, tokens, cache, cuts, grad):
    """After any call a cache owns no more memory than twice what it keeps: no slice of the prompt."""
    with torch.set_grad_enabled(grad):
        x = tokens(2, 301)
        for begin, end in zip([0, *cuts], [*cuts, 301], strict=True):
            mixer(x[:, begin:end], past_key_values=cache)
            for state in held(cache):
                needed = state.numel() * state.element_size()
                assert state.untyped_storage().nbytes() <= 2 * needed, (name, end)
    if name == "swa":
        assert held(cache)[0].shape[-2] == WINDOW - 1


@torch.no_grad()
def test_another_batch_size_is_named(mixer, tokens, cache):
    """A call with other rows than the cache's is refused before anything is written, by every mixer."""
    mixer(tokens(2, 5), past_key_values=cache)
    before = [state.clone() for state in held(cache)]
    for batch, length in ((1, 1), (3, 1), (1, 30), (4, 30)):
        with pytest.raises(ValueError, match=f"holds 2 sequences, .* a batch of {batch}: "):
            mixer(tokens(batch, length), past_key_values=cache)
    for now, then in zip(held(cache), before, strict=True):
        assert torch.equal(now, then)


@torch.no_grad()
def test_the_default_device_moves_nothing(mixer, tokens):
    """Under a default device of meta, packed, padded and cached calls on the CPU give the same bits."""
    x, bounds = tokens(1, 150), torch.tensor([0, 70, 70, 149, 150])
    mask = torch.ones(1, 150, dtype=torch.long)
    mask[0, :9] = 0

    def everything() -> list[Tensor]:
        cache = StateCache()
        packed = [mixer(x, cu_seqlens=b)[0] for b in (bounds, bounds.int())]
        pieces = [mixer(part, past_key_values=cache)[0] for part in x.split([140, 9, 1], 1)]
        return [*packed, mixer(x, attention_mask=mask)[0], *pieces, *held(cache)]

    expected = everything()
    with torch.device("meta"):
        found = everything()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device.type == "cpu" and torch.equal(ours, theirs)
