"""The layer against the released one, and each of its options."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import gka.layers.gated_kalmanet as module
from gka.layers import GatedKalmaNet, StateCache
from tolerances import RELATIVE, assert_close, relative_error

FIXTURE = Path(__file__).parents[1] / "fixtures" / "official_layer_gqa_fp32.safetensors"
SIZES = {"hidden_size": 24, "num_heads": 4, "head_dim": 6}
EXACT = 1e-9


def make(**options) -> GatedKalmaNet:
    torch.manual_seed(0)
    return GatedKalmaNet(**{**SIZES, **options}).double()


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """What the layer passes to its ops, in order; the ops run all the same."""
    recorded = []
    names = ["q", "k", "v", "g", "gk", "alpha", "scale", "ridge_ratio", "num_iter"]

    def spy(name):
        op = getattr(module, name)

        def run(*args, **kwargs):
            recorded.append({"op": name, **dict(zip(names, args, strict=False)), **kwargs})
            return op(*args, **kwargs)

        return run

    for name in ("chunk_gka", "fused_recurrent_gka"):
        monkeypatch.setattr(module, name, spy(name))
    return recorded


@pytest.fixture(scope="module")
def released() -> dict[str, Tensor]:
    return load_file(FIXTURE)


@pytest.fixture(scope="module")
def ours(released) -> dict[str, Tensor]:
    """Our float32 layer's output and gradients on the released layer's parameters and input."""
    layer = GatedKalmaNet(hidden_size=128, head_dim=64, num_heads=4, num_kv_heads=2)
    parameters = {k.removeprefix("param."): v for k, v in released.items() if "param." in k}
    layer.load_state_dict(parameters, strict=True)
    x = released["input"].clone().requires_grad_()
    output = layer(x)[0]
    output.backward(released["grad_output"])
    grads = {f"grad.{k}": p.grad for k, p in layer.named_parameters()}
    return {"output": output.detach(), "grad_input": x.grad, **grads}  # pyright: ignore[reportReturnType]


def test_released_output(released, ours):
    """The output is the released layer's within 1e-2: its own TF32 products are 8.4e-3 from exact."""
    assert_close(ours["output"], released["output"], 1e-2)


def test_released_gradients(released, ours):
    """Every gradient is the released layer's within 3e-2; none is missing."""
    expected = {k: v for k, v in released.items() if k.startswith("grad.") or k == "grad_input"}
    assert set(expected) == set(ours) - {"output"}
    for key, grad in expected.items():
        assert_close(ours[key], grad, 3e-2, key)


def test_initial_parameters():
    """A_log = log U(0,16), softplus(dt_bias) log-uniform in [1e-3, 0.1]; neither decays, b and alpha
    have biases, the rest has none."""
    layer = GatedKalmaNet(hidden_size=16, num_heads=1000, head_dim=2)
    a = layer.A_log.exp()
    dt = torch.nn.functional.softplus(layer.dt_bias)
    assert 0 < a.min() < 0.5 and 15.5 < a.max() <= 16 and 7.3 < a.mean() < 8.7
    assert 0.99e-3 < dt.min() < 1.2e-3 and 0.09 < dt.max() < 0.1001
    assert abs(dt.log().mean() - torch.tensor(1e-4).log() / 2) < 0.2
    marked = {k for k, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "dt_bias"}
    assert {k for k in layer.state_dict() if k.endswith("bias")} == {
        "b_proj.bias", "alpha_proj.bias", "dt_bias",
    }  # fmt: skip


def test_grouped_heads_reach_the_op_grouped(calls, tokens):
    """Keys and values keep their own head count, gates have one per query head, and the two decays
    are one tensor."""
    make(num_kv_heads=2, expand_v=1.5)(tokens(2, 9))
    (call,) = calls
    assert call["op"] == "chunk_gka"
    assert call["q"].shape == (2, 9, 4, 6)
    assert call["k"].shape == (2, 9, 2, 6)
    assert call["v"].shape == (2, 9, 2, 9)
    assert call["gk"] is call["g"]
    assert all(call[gate].shape == (2, 9, 4) for gate in ("g", "alpha", "beta"))
    assert_close(call["k"].norm(dim=-1), torch.ones(2, 9, 2), 1e-3)


def test_more_value_heads_than_query_heads(calls, tokens):
    """With num_v_heads = 8 for 4 query heads, consecutive value heads share a query and a key, and each
    has its own gates: the layer equals one of 8 heads whose query and key weights are repeated."""
    layer, x = make(num_v_heads=8), tokens(2, 30)
    full = make(num_heads=8)
    state = layer.state_dict()
    for name in ("q", "k"):
        for key in (f"{name}_proj.weight", f"{name}_conv1d.weight"):
            state[key] = state[key].unflatten(0, (4, 6)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    assert_close(layer(x)[0], full(x)[0], EXACT)
    assert calls[0]["q"].shape[2] == 8 and calls[0]["k"].shape[2] == 4
    assert calls[0]["v"].shape[2] == calls[0]["beta"].shape[2] == 8


def test_grouped_equals_repeated(tokens):
    """Two shared key and value heads equal four heads with repeated weights."""
    layer, full, x = make(num_kv_heads=2), make(), tokens(2, 30)
    state = layer.state_dict()
    for name in ("k", "v"):
        for key in (f"{name}_proj.weight", f"{name}_conv1d.weight"):
            state[key] = state[key].unflatten(0, (2, 6)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    assert_close(layer(x)[0], full(x)[0], EXACT)


OPTIONS = {
    "use_beta_gate": ("b_proj.weight", "b_proj.bias"),
    "use_alpha_connection": ("alpha_proj.weight", "alpha_proj.bias"),
    "use_v_conv": ("v_conv1d.weight",),
    "use_forgetting_gate": ("A_log", "dt_bias", "a_proj.weight"),
    "use_forgetting_gate_kk": (),
    "use_gate": ("g_proj.weight",),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_have_their_parameters_and_effect(option, tokens):
    """Each option off takes exactly its parameters away and changes the output."""
    on, off, x = make(), make(**{option: False}), tokens(2, 30)
    assert set(on.state_dict()) - set(off.state_dict()) == set(OPTIONS[option])
    off.load_state_dict(on.state_dict(), strict=False)
    assert relative_error(off(x)[0], on(x)[0]) > 1e-3


@pytest.mark.parametrize(
    "option, changes",
    [
        ("use_beta_gate", {"b_proj.weight": 0.0, "b_proj.bias": 60.0}),
        ("use_alpha_connection", {"alpha_proj.weight": 0.0, "alpha_proj.bias": 60.0}),
        ("use_forgetting_gate", {"A_log": -torch.inf}),
    ],
)
def test_a_gate_left_out_is_a_gate_wide_open(option, changes, tokens):
    """Without a gate the layer is the one whose gate is 1 everywhere (beta: 1 + 1e-6)."""
    on, off, x = make(), make(**{option: False}), tokens(2, 30)
    state = on.state_dict()
    for key, value in changes.items():
        state[key].fill_(value)
    off.load_state_dict({k: v for k, v in state.items() if k in off.state_dict()})
    assert_close(off(x)[0], on(x)[0], 1e-5 if option == "use_beta_gate" else EXACT)


def test_options_of_the_op(calls, tokens):
    """gla_rescale, ridge_ratio, num_iter, use_forgetting_gate_kk and backend reach the op."""
    options = {"ridge_ratio": 0.1, "num_iter": 7, "backend": "reference"}
    make(gla_rescale=False, use_forgetting_gate_kk=False, **options)(tokens(1, 5))
    make()(tokens(1, 5))
    other, default = calls
    assert {key: other[key] for key in options} == options
    assert other["scale"] == 1.0 and default["scale"] == pytest.approx(6**-0.5)
    assert other["gk"] is None and other["g"] is not None
    assert (default["ridge_ratio"], default["num_iter"], default["backend"]) == (0.02, 30, "auto")


@pytest.mark.parametrize("conv_size", [1, 2, 7])
def test_conv_size_sets_how_far_convolutions_see(conv_size, tokens):
    """Without memory (num_iter = 0 and an infinite decay) a token sees conv_size inputs, no more."""
    layer, x = make(conv_size=conv_size, num_iter=0), tokens(1, 12)
    with torch.no_grad():
        layer.A_log.fill_(50.0)
    changed = x.clone()
    changed[:, 3] += 1
    difference = (layer(changed)[0] - layer(x)[0]).norm(dim=-1)[0]
    assert bool((difference[3 : 3 + conv_size] > 1e-6).all())
    assert difference[:3].max() == 0 and difference[3 + conv_size :].max() < 1e-12


def test_few_cached_tokens_run_token_by_token(calls, tokens):
    """fused_recurrent_gka serves cached calls of up to 16 tokens without gradient, chunk_gka all others."""
    layer = make(layer_idx=0)
    with torch.no_grad():
        for length, op in (
            (17, "chunk_gka"),
            (16, "fused_recurrent_gka"),
            (1, "fused_recurrent_gka"),
        ):
            layer(tokens(1, length), past_key_values=StateCache())
            assert calls.pop()["op"] == op
        layer(tokens(1, 1))
        assert calls.pop()["op"] == "chunk_gka"
    layer(tokens(1, 1), past_key_values=StateCache())
    assert calls.pop()["op"] == "chunk_gka"


def test_states_are_float32_for_narrow_inputs(tokens):
    """A bfloat16 layer keeps float32 memory between calls, and bfloat16 convolution inputs."""
    layer, cache = make(layer_idx=0).bfloat16(), StateCache()
    with torch.no_grad():
        layer(tokens(1, 20).bfloat16(), past_key_values=cache)
    state = cache.layers[0]
    assert {s.dtype for s in state.recurrent_states.values()} == {torch.float32}
    assert {s.dtype for s in state.conv_states.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_kv_heads": 2, "num_v_heads": 8}, "exclude each other, got 2 and 8"),
        ({"num_kv_heads": 3}, "num_heads = 4 must be a multiple of num_kv_heads = 3"),
        ({"num_v_heads": 6}, "num_v_heads = 6 must be a multiple of num_heads = 4"),
        ({"expand_v": 1.1}, r"expand_v \* head_dim must be a positive integer, got 1.1 \* 6"),
        ({"expand_v": 0.0}, r"expand_v \* head_dim must be a positive integer"),
        ({"num_iter": -1}, "num_iter must be 0 or more, got -1"),
        ({"ridge_ratio": 0.0}, "ridge_ratio must be above 0, got 0.0"),
        ({"ridge_ratio": float("nan")}, "ridge_ratio must be above 0"),
        ({"conv_size": 0}, "conv_size must be a positive integer, got 0"),
        ({"head_dim": 300}, "head_dim must be at most 256, got 300: take more heads"),
        ({"head_dim": 200, "expand_v": 2.0}, r"expand_v \* head_dim must be at most 256, got 400"),
        ({"num_iter": 10**9}, "num_iter must be at most 10000"),
        ({"ridge_ratio": 1e300}, "ridge_ratio must be between"),
        ({"norm_eps": float("nan")}, "norm_eps must be 0 or more, got nan"),
        ({"layer_idx": -1}, "layer_idx must be None or 0, 1, ..., got -1"),
    ],
)
def test_options_that_do_not_fit(options, message):
    """Options that do not fit are refused by name when the layer is constructed."""
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_unknown_options_are_refused():
    """A misspelt option is an error, not ignored; an unknown backend names those there are."""
    with pytest.raises(TypeError, match="ridge_strength"):
        GatedKalmaNet(ridge_strength=0.02)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="backend must be one of auto"):
        make(backend="cuda")


@pytest.mark.parametrize("kind", ["StateCache", "transformers"])
def test_decoding_updates_the_caches_own_memory(kind, tokens):
    """Cached tokens leave the states where they are, in either kind of cache, and change them."""
    cache: Any = StateCache()
    if kind == "transformers":
        from transformers.cache_utils import Cache, LinearAttentionLayer

        cache = Cache(layers=[LinearAttentionLayer(number_of_states=3)])
    layer, x = make(layer_idx=0), tokens(2, 24)
    with torch.no_grad():
        layer(x[:, :20], past_key_values=cache)
        states = [cache.layers[0].recurrent_states[i] for i in range(2)]
        places, before = [s.data_ptr() for s in states], [s.clone() for s in states]
        layer(x[:, 20:], past_key_values=cache)
    for i, (place, old) in enumerate(zip(places, before, strict=True)):
        now = cache.layers[0].recurrent_states[i]
        assert now.data_ptr() == place and not torch.equal(now, old)


def test_a_cache_made_in_inference_mode_goes_on_outside(tokens):
    """States of a prefill in inference mode, which may not change outside it, are replaced instead."""
    layer, x, cache = make(layer_idx=0), tokens(1, 24), StateCache()
    with torch.inference_mode():
        layer(x[:, :20], past_key_values=cache)
    with torch.no_grad():
        last = layer(x[:, 20:], past_key_values=cache)[0]
        assert_close(last, layer(x)[0][:, 20:], RELATIVE[torch.float64])
