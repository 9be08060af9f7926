"""Fused convolutions, gates and norm compute what the torch modules compute (interpreted without a GPU)."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from gka.layers import MIXERS, build_mixer
from gka.layers.recurrent_mixer import RecurrentMixer
from gka.ops import autograd
from gka.ops.convolution import convolve_heads, step_heads_and_gates
from gka.ops.surround import gated_rms_norm, layer_gates, why_unfused
from quick import quick_first
from tolerances import RELATIVE, assert_close

pytest.importorskip("triton", reason="the kernels need the package triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = RELATIVE[torch.float32]

CASES: dict[str, dict[str, Any]] = {
    "powers of two": {},
    "grouped heads of odd sizes": {"heads": (4, 2, 1), "dims": (6, 10), "batch": 2},
    "a past": {"past": True, "batch": 2},
    "a past shorter than a segment, padding": {"past": True, "lengths": [3, 37, 0], "batch": 3},
    "packed, one sequence empty": {"bounds": [0, 1, 1, 3, 30, 37]},
    "width 1": {"width": 1, "past": True},
    "width 8, packed": {"width": 8, "bounds": [0, 5, 12, 37]},
    "width 3 with a past, small heads": {"width": 3, "past": True, "dims": (2, 1)},
    "values in two tiles, the second ragged": {"heads": (1, 1, 1), "dims": (20, 150)},
    "values not convolved": {"values": False},
    "one token": {"length": 1, "past": True},
}


def problem(
    heads=(2, 2, 2), dims=(16, 16), batch=1, length=37, width=4, past=False, lengths=None,
    bounds=None, values=True,
) -> dict[str, Any]:  # fmt: skip
    """Projections, weights and states in float64."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    channels = [h * d for h, d in zip(heads, (dims[0], dims[0], dims[1]), strict=True)]
    parts = 3 if values else 2
    return {
        "x": [randn(batch, length, c) for c in channels[:parts]],
        "w": [randn(c, 1, width) for c in channels[:parts]],
        "states": [randn(batch, c, width) if past else None for c in channels],
        "do": [randn(batch, length, c) for c in channels[:parts]],
        "lengths": None if lengths is None else torch.tensor(lengths),
        "cu_seqlens": None if bounds is None else torch.tensor(bounds),
        "head_dim": dims[0],
    }


def modules(p: dict[str, Any], x: list[Tensor], w: list[Tensor]) -> list[Tensor]:
    """The same by the layer's own modules."""
    from torch.func import functional_call

    from gka.layers import ShortConvolution
    from gka.layers.parts.modules import unit

    out = []
    for i, (y, weight) in enumerate(zip(x, w, strict=True)):
        module = ShortConvolution(weight.shape[0], weight.shape[-1])
        args = (y, p["states"][i], p["cu_seqlens"])
        y = functional_call(module, {"weight": weight}, args)
        if i < 2:
            y = unit(y.unflatten(-1, (-1, p["head_dim"]))).flatten(-2)
        if i == 1 and p["lengths"] is not None:
            places = torch.arange(y.shape[1])
            y = y.masked_fill((places >= p["lengths"][:, None])[..., None], 0)
        out.append(y)
    return out


def kernels(p: dict[str, Any], x: list[Tensor], w: list[Tensor]) -> list[Tensor]:
    def three(tensors: list) -> tuple[Any, Any, Any]:
        first, second, *third = tensors
        return first, second, third[0] if third else None

    states = [None if s is None else s.to(x[0]) for s in p["states"]]
    lengths, bounds = (None if t is None else t.to(DEVICE) for t in (p["lengths"], p["cu_seqlens"]))
    y = convolve_heads(three(x), three(w), p["head_dim"], three(states), bounds, lengths)
    return [t for t in y if t is not None]


def leaves(tensors: list[Tensor], dtype: torch.dtype, device: str) -> list[Tensor]:
    return [t.to(device, dtype).requires_grad_() for t in tensors]


def results(p: dict[str, Any], run, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Outputs and gradients of inputs and weights."""
    x, w = leaves(p["x"], dtype, device), leaves(p["w"], dtype, device)
    y = run(p, x, w)
    grads = torch.autograd.grad(y, [*x, *w], [d.to(device, dtype) for d in p["do"]])
    names = [*(f"dx{i}" for i in range(len(x))), *(f"dw{i}" for i in range(len(x)))]
    return {f"y{i}": t for i, t in enumerate(y)} | dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_convolutions_equal_the_modules(name: str) -> None:
    """Unit queries and keys, values, and the gradients of inputs and weights are the modules' in float64."""
    p = problem(**CASES[name])
    expected = results(p, modules, torch.float64, "cpu")
    actual = results(p, kernels, torch.float32, DEVICE)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(actual[key].cpu(), value, EXACT, f"{name}: {key}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convolutions_in_16_bits(dtype: torch.dtype) -> None:
    """16-bit inputs give their own dtype and the accuracy of one rounding."""
    p = problem()
    p = {key: [t.to(dtype).double() for t in p[key]] if key in "xwdo" else p[key] for key in p}
    expected = results(p, modules, torch.float64, "cpu")
    actual = results(p, kernels, dtype, DEVICE)
    for key, value in expected.items():
        assert actual[key].dtype == dtype
        assert_close(actual[key].cpu(), value, RELATIVE[dtype] / 5, key)


@pytest.mark.parametrize("length", [pytest.param(600, marks=pytest.mark.slow), 130])
def test_long_segments_give_the_same_gradients(length: int, monkeypatch) -> None:
    """However many tokens a segment has, and with sequences that begin inside them."""
    bounds: dict[str, Any] = {"bounds": [0, 2, 131, 599, 600]} if length == 600 else {"batch": 2}
    p = problem(heads=(1, 1, 1), dims=(8, 4), length=length, **bounds)
    expected = results(p, modules, torch.float64, "cpu")
    for tokens in (16, 64):
        monkeypatch.setattr("gka.kernels.surround.launch.segment_length", lambda *_, t=tokens: t)
        for key, value in results(p, kernels, torch.float32, DEVICE).items():
            assert_close(value.cpu(), expected[key], EXACT, key)


def test_a_head_of_zeros_has_finite_gradients() -> None:
    """Where a query is zero, its norm's derivative is taken as zero, as torch takes it."""
    p = problem()
    p["x"][0][:, 5:20] = 0
    expected = results(p, modules, torch.float64, "cpu")
    for key, value in results(p, kernels, torch.float32, DEVICE).items():
        assert_close(value.cpu(), expected[key], EXACT, key)


def test_packed_sequences_are_apart_even_from_infinite_neighbours() -> None:
    """What is infinite in one sequence reaches neither outputs nor input gradients of the next."""
    p = problem(bounds=[0, 10, 37])
    whole = results(p, kernels, torch.float32, DEVICE)
    for x in p["x"]:
        x[:, :10] = torch.inf
    poisoned = results(p, kernels, torch.float32, DEVICE)
    for i in range(3):
        for key in (f"y{i}", f"dx{i}"):
            assert torch.equal(poisoned[key][:, 10:], whole[key][:, 10:]), key


GATES = {
    "all": ("b", "alpha", "a"),
    "beta": ("b",),
    "alpha and g": ("alpha", "a"),
    "g": ("a",),
}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("lengths", [None, [7, 70]])
def test_gates_equal_their_definition(name: str, lengths) -> None:
    """beta, alpha, g and the gradients of pre-activations, A_log and dt_bias, in float32 of float64; tiny
    and huge pre-activations among them."""
    generator = torch.Generator().manual_seed(0)
    given = {
        key: 20 * torch.randn(2, 70, 3, generator=generator, dtype=torch.float64)
        for key in GATES[name]
    }
    if "a" in given:
        given["A_log"], given["dt_bias"] = torch.rand(2, 3, generator=generator).double().unbind()
    weights = torch.randn(3, 2, 70, 3, generator=generator, dtype=torch.float64)

    def definition(b=None, alpha=None, a=None, A_log=None, dt_bias=None):
        g = None
        if a is not None and A_log is not None and dt_bias is not None:
            g = -A_log.exp() * torch.nn.functional.softplus(a + dt_bias)
            if lengths is not None:
                outside = torch.arange(70) >= torch.tensor(lengths)[:, None]
                g = g.masked_fill(outside[..., None], 0)
        beta = None if b is None else torch.sigmoid(b) + 1e-6
        return beta, None if alpha is None else torch.sigmoid(alpha), g

    def fused(**tensors):
        return layer_gates(
            **tensors, eps=1e-6, lengths=None if lengths is None else torch.tensor(lengths, device=DEVICE)
        )  # fmt: skip

    def run(function, dtype: torch.dtype, device: str) -> list[Tensor]:
        inputs = {k: t.to(device, dtype).requires_grad_() for k, t in given.items()}
        out = [y for y in function(**inputs) if y is not None]
        do = [w.to(device, dtype) for w in weights[: len(out)]]
        return [*out, *torch.autograd.grad(out, list(inputs.values()), do)]

    expected, actual = run(definition, torch.float64, "cpu"), run(fused, torch.float32, DEVICE)
    for got, value in zip(actual, expected, strict=True):
        assert_close(got.cpu(), value, EXACT, name)


def test_small_decays_keep_their_digits() -> None:
    """softplus of very negative pre-activations is not rounded away: relative errors near float32's."""
    a = torch.linspace(-40, -5, 36, device=DEVICE).view(1, -1, 1)
    zero = torch.zeros(1, device=DEVICE)
    _, _, g = layer_gates(a=a, A_log=zero, dt_bias=zero)
    assert g is not None
    expected = -torch.log1p(a.double().exp())
    assert ((g - expected) / expected).abs().max() < 1e-6


@pytest.mark.parametrize("rate", [61.0, 88.5, 103.0])
def test_decays_where_the_rate_is_out_of_range(rate: float) -> None:
    """exp(A_log) softplus(a) is of ordinary size for a near -A_log, and so are its gradients."""
    a = torch.linspace(-6, 2, 36, dtype=torch.float64).view(1, -1, 1) - rate
    given = {"a": a, "A_log": torch.full((1,), rate), "dt_bias": torch.full((1,), 0.25)}

    def run(function, dtype: torch.dtype, device: str) -> list[Tensor]:
        inputs = {k: t.to(device, dtype).requires_grad_() for k, t in given.items()}
        g = function(**inputs)
        return [g, *torch.autograd.grad(g.sum() * 10, list(inputs.values()))]

    def definition(a, A_log, dt_bias):
        return -A_log.exp() * torch.nn.functional.softplus(a + dt_bias)

    expected = run(definition, torch.float64, "cpu")
    actual = run(lambda **inputs: layer_gates(**inputs)[2], torch.float32, DEVICE)
    for got, value in zip(actual, expected, strict=True):
        assert_close(got.cpu(), value, 2e-5)  # a itself is rounded near -100


@pytest.mark.parametrize("rate, decay", [(-torch.inf, 0.0), (torch.inf, -1e30)])
def test_an_infinite_log_rate(rate: float, decay: float) -> None:
    """exp(-inf) is no decay, exp(inf) a hard reset; gradients are zero, not NaN."""
    a = torch.randn(1, 5, 2, device=DEVICE).requires_grad_()
    A_log = torch.full((2,), rate, device=DEVICE).requires_grad_()
    g = layer_gates(a=a, A_log=A_log, dt_bias=torch.zeros(2, device=DEVICE))[2]
    assert g is not None and (g == torch.tensor(decay)).all()
    for grad in torch.autograd.grad(g.sum(), (a, A_log)):
        assert (grad == 0).all()


def test_gates_of_16_bits_are_float32() -> None:
    """16-bit pre-activations give float32 gates and 16-bit gradients."""
    b = torch.randn(1, 5, 2, device=DEVICE).bfloat16().requires_grad_()
    beta, _, _ = layer_gates(b)
    assert beta is not None and beta.dtype == torch.float32
    assert_close(beta, torch.sigmoid(b.double()), EXACT)
    beta.sum().backward()
    assert b.grad is not None and b.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dim, rows", [(16, 1), (6, 37), (128, 70), (200, 9), (1, 5)])
@pytest.mark.parametrize("gated", [True, False])
def test_norm_equals_the_module(dim: int, rows: int, gated: bool, monkeypatch) -> None:
    """Output and all gradients of the (gated) norm are the module's in float64, in one part or several."""
    from gka.layers import GatedRMSNorm, RMSNorm

    monkeypatch.setattr("gka.kernels.surround.launch.NORM_PROGRAMS", 2)
    torch.manual_seed(0)
    x, gate, do = (torch.randn(1, rows, 3, dim, dtype=torch.float64) for _ in range(3))
    weight = torch.rand(dim, dtype=torch.float64)
    norm = (GatedRMSNorm if gated else RMSNorm)(dim, eps=1e-3).double()
    norm.weight.data = weight

    def run(function, dtype: torch.dtype, device: str) -> list[Tensor]:
        inputs = leaves([x, weight, gate] if gated else [x, weight], dtype, device)
        y = function(*inputs)
        return [y, *torch.autograd.grad(y, inputs, do.to(device, dtype))]

    def module(x, weight, *gate):
        return torch.func.functional_call(norm, {"weight": weight}, (x, *gate))

    def fused(x, weight, gate=None):
        return gated_rms_norm(x, gate, weight, 1e-3)

    expected, actual = run(module, torch.float64, "cpu"), run(fused, torch.float32, DEVICE)
    for got, value in zip(actual, expected, strict=True):
        assert_close(got.cpu(), value, EXACT)


RECURRENT = [n for n, kind in MIXERS.items() if issubclass(kind, RecurrentMixer)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "values not convolved, no gates": {
        "use_v_conv": False, "use_beta_gate": False, "use_alpha_connection": False, "use_gate": False,
        "use_forgetting_gate": False,
    },
    "more value heads": {"num_kv_heads": None, "num_v_heads": 8, "expand_v": 1.5},
}  # fmt: skip


def mixer(name: str, dtype: torch.dtype, device: str, backend: str, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "layer_idx": 0}
    layer: Any = build_mixer(name, **{**sizes, **options})
    layer.backend = backend
    return layer.to(device, dtype)


def fused_mixer(name: str, monkeypatch, **options: Any) -> Any:
    """In float32, with the kernels around the op; the op itself by torch where there is no GPU."""
    if DEVICE == "cpu":
        monkeypatch.setattr("gka.layers.parts.surround.why_unfused", lambda *_: None)
    return mixer(name, torch.float32, DEVICE, "auto", **options)


def inputs(length: int = 21, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, 24, generator=generator, dtype=torch.float64)


def outcome(layer: Any, x: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """Output and gradients of input and parameters."""
    x = x.clone().requires_grad_()
    output = layer(x, **arguments)[0]
    named = dict(layer.named_parameters())
    grads = torch.autograd.grad(output.square().sum(), [x, *named.values()])
    return {"output": output, **dict(zip(["x", *named], grads, strict=True))}


def moved(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to(DEVICE) for name, t in arguments.items()}


CALLS: dict[str, dict[str, Tensor]] = {
    "batch": {},
    "padded": {"attention_mask": torch.tensor([[0] * 4 + [1] * 17, [1] * 13 + [0] * 8])},
    "packed": {"cu_seqlens": torch.tensor([0, 3, 3, 21])},
}


@pytest.mark.parametrize(
    ("name", "call"),
    quick_first(
        itertools.product(RECURRENT, CALLS),
        {*itertools.product(("gka",), CALLS), *itertools.product(RECURRENT, ("packed",))},
    ),
)
def test_every_mixer_is_the_same_with_fused_kernels(name: str, call: str, monkeypatch) -> None:
    """Output and all gradients are those of the plain mixer in float64: batches, padding, packing."""
    check_equal(name, call, monkeypatch)


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_is_the_same_with_fused_kernels(options: str, monkeypatch) -> None:
    """So are the layer's options, padded."""
    check_equal("gka", "padded", monkeypatch, **OPTIONS[options])


def check_equal(name: str, call: str, monkeypatch, **options: Any) -> None:
    x, arguments = inputs(batch=1 if call == "packed" else 2), CALLS[call]
    expected = outcome(mixer(name, torch.float64, "cpu", "torch", **options), x, **arguments)
    layer = fused_mixer(name, monkeypatch, **options)
    actual = outcome(layer, x.to(DEVICE).float(), **moved(arguments))
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(actual[key].cpu(), value, 10 * EXACT, f"{name}: {key}")


def test_only_wanted_gradients_are_formed(monkeypatch) -> None:
    """Frozen weights get none, the others what they get anyway; a call without any needs none."""
    layer, x = fused_mixer("gka", monkeypatch), inputs().to(DEVICE).float()
    every = outcome(layer, x)
    for name in ("q_conv1d.weight", "A_log", "o_norm.weight", "k_proj.weight"):
        layer.get_parameter(name).requires_grad_(False)
    layer(x)[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, every[name], EXACT, name)
        else:
            assert parameter.grad is None, name


def test_compiles_whole(monkeypatch) -> None:
    """torch.compile takes the mixer with its kernels as one graph, with the same output and gradients."""
    torch._dynamo.reset()
    layer, x = fused_mixer("gka", monkeypatch), inputs().to(DEVICE).float()
    expected = outcome(layer, x)
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    layer.forward = torch.compile(layer.forward, backend=backend, fullgraph=True)
    for key, value in outcome(layer, x).items():
        assert_close(value, expected[key], EXACT, key)


@pytest.mark.parametrize("selective", [pytest.param(False, marks=pytest.mark.slow), True])
def test_checkpointing_gives_the_same_gradients(monkeypatch, selective: bool) -> None:
    """Activation checkpointing recomputes the same, bit for bit; where it keeps the op's results, the op does
    not run again."""
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    ran, run = [], autograd._forward
    monkeypatch.setattr(autograd, "_forward", lambda *call: (ran.append(1), run(*call))[1])
    layer, x = fused_mixer("gka", monkeypatch), inputs().to(DEVICE).float()
    expected = outcome(layer, x)
    kept = [torch.ops.gka.forward.default] if selective else []
    contexts = partial(create_selective_checkpoint_contexts, kept)
    layer.forward = partial(
        checkpoint, layer.forward, use_reentrant=False, **({"context_fn": contexts} if kept else {})
    )
    actual = outcome(layer, x)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key
    assert len(ran) == (2 if selective else 3)


def test_a_second_derivative_is_refused_with_what_to_do(monkeypatch) -> None:
    """As the op's own."""
    x = torch.randn(1, 5, 8, device=DEVICE, requires_grad=True)
    y = gated_rms_norm(x, x, torch.ones(8, device=DEVICE), 1e-6)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        grad.sum().backward()


def test_shapes_that_do_not_fit_are_refused() -> None:
    """The kernels trust shapes, so the functions check them, and name what does not fit."""
    x, w, h = torch.ones(1, 5, 8), torch.ones(8, 1, 4), torch.ones(1, 5, 2)
    with pytest.raises(ValueError, match="k has 8 channels, which are no heads of 3"):
        convolve_heads((x[..., :6], x, x), (w[:6], w, w), 3)
    with pytest.raises(ValueError, match=r"the weight of v must be \[8, 1, 4\]"):
        convolve_heads((x, x, x), (w, w, w[:6]), 8)
    with pytest.raises(ValueError, match=r"the state of q must be \[1, 8, 4\]"):
        convolve_heads((x, x, None), (w, w, None), 8, (torch.ones(2, 8, 4), None, None))
    with pytest.raises(ValueError, match="a needs A_log"):
        layer_gates(a=h)
    with pytest.raises(ValueError, match=r"alpha must be \[1, 5, 2\]"):
        layer_gates(h, h[:, :3])
    with pytest.raises(ValueError, match="gate must have as many elements"):
        gated_rms_norm(x, x[:, :2], torch.ones(8), 1e-6)
    with pytest.raises(ValueError, match="updated in place"):
        states = (torch.ones(1, 8, 8)[..., :4], torch.ones(1, 8, 4), None)
        step_heads_and_gates((x, x, None), (w, w, None), states, (h, None, None), (None, None), 8)


def test_why_a_layer_runs_plain() -> None:
    """The layer tells: for a backend, a device, a dtype, a width or a module that must be called itself."""
    layer = mixer("gka", torch.float32, "cpu", "torch")
    assert 'backend="torch"' in (layer.why_unfused("cpu", torch.float32) or "")
    layer.backend = "auto"
    assert "NVIDIA GPU" in (layer.why_unfused("cpu", torch.float32) or "")
    layer.backend = "nonsense"
    with pytest.raises(ValueError, match="backend must be one of"):
        layer.why_unfused("cpu", torch.float32)
    layer.backend = "triton"
    if DEVICE == "cpu":  # interpreted on request
        assert layer.why_unfused("cpu", torch.float32) is None
        with pytest.raises(RuntimeError, match="float64"):
            layer.why_unfused("cpu", torch.float64)
        handle = layer.k_conv1d.register_forward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match="k_conv1d was replaced or has hooks"):
            layer.why_unfused("cpu", torch.float32)
        handle.remove()
        with pytest.raises(RuntimeError, match=r"transform of torch\.func"):
            torch.vmap(lambda x: x * (layer.why_unfused("cpu", torch.float32) is None))(
                torch.ones(2)
            )
    assert "conv_size" in (why_unfused(DEVICE, torch.float32, width=9) or "")
    assert "heads up to" in (why_unfused(DEVICE, torch.float32, (300, 8)) or "")


@pytest.fixture(params=["StateCache", "transformers"])
def cache(request) -> Any:
    from gka.layers import StateCache

    if request.param == "StateCache":
        return StateCache()
    caches = pytest.importorskip("transformers.cache_utils")
    return caches.Cache(layers=[caches.LinearAttentionLayer(number_of_states=3)])


def pieces(
    layer: Any, x: Tensor, cache: Any, cuts: list[int], mask: Tensor | None = None
) -> Tensor:
    """Outputs of x cut into calls, the mask covering all that was seen so far."""
    outputs = []
    for begin, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        seen = None if mask is None else mask[:, :end]
        outputs.append(layer(x[:, begin:end], attention_mask=seen, past_key_values=cache)[0])
    return torch.cat(outputs, 1)


DECODED = {
    "gka": {},
    "gated_deltanet": {},
    "gka, values not convolved, no gates": OPTIONS["values not convolved, no gates"],
    "gka, more value heads, width 1": {**OPTIONS["more value heads"], "conv_size": 1},
}


@pytest.mark.parametrize("name", DECODED)
@torch.no_grad()
def test_cached_decoding_equals_one_call(name: str, cache, monkeypatch) -> None:
    """Prefill, then tokens one by one and several at once, each through one launch that updates the
    convolutions' states where they lie, give what one call of the plain mixer gives in float64."""
    x, options, kind = inputs(30), DECODED[name], name.split(",")[0]
    expected = mixer(kind, torch.float64, "cpu", "torch", **options)(x)[0]
    layer = fused_mixer(kind, monkeypatch, **options)
    steps, x = count_steps(monkeypatch), x.to(DEVICE).float()
    first = pieces(layer, x[:, :20], cache, [])
    places = [s.data_ptr() for s in cache.layers[0].conv_states.values() if s is not None]
    rest = pieces(layer, x[:, 20:], cache, [1, 2, 5])
    assert_close(torch.cat([first, rest], 1).cpu(), expected, 10 * EXACT, name)
    assert steps == [1, 1, 3, 5]
    assert places == [s.data_ptr() for s in cache.layers[0].conv_states.values() if s is not None]


def count_steps(monkeypatch) -> list[int]:
    """Tokens of every call of the fused step from here on."""
    from gka.layers.parts.surround import FusedSurround

    steps, step = [], FusedSurround.step

    def counting(self, mixer, projected, *rest):
        steps.append(projected[0].shape[1])
        return step(self, mixer, projected, *rest)

    monkeypatch.setattr(FusedSurround, "step", counting)
    return steps


@pytest.mark.parametrize("cuts", [[12, 13, 17, 18], [3, 5]])
@torch.no_grad()
def test_padded_batches_decode_like_the_plain_mixer(cuts, cache, monkeypatch) -> None:
    """With padding before, between and behind the tokens of a cached call too."""
    x = inputs(20, batch=3)
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[0, :14] = mask[1, 15:18] = mask[2, 19:] = 0
    from gka.layers import StateCache

    expected = pieces(mixer("gka", torch.float64, "cpu", "torch"), x, StateCache(), cuts, mask)
    layer = fused_mixer("gka", monkeypatch)
    steps = count_steps(monkeypatch)
    actual = pieces(layer, x.to(DEVICE).float(), cache, cuts, mask.to(DEVICE))
    assert len(steps) == len(cuts)
    assert_close(actual.cpu(), expected, 10 * EXACT)


@torch.no_grad()
def test_a_cache_that_was_reset_starts_anew(cache, monkeypatch) -> None:
    """The first call after a reset is a prefill again, and counts as a past for the next."""
    layer, x = fused_mixer("gka", monkeypatch), inputs(9).to(DEVICE).float()
    expected = pieces(layer, x, cache, [4])
    cache.reset()
    steps = count_steps(monkeypatch)
    assert torch.equal(pieces(layer, x, cache, [4]), expected)
    assert steps == [5]


def test_a_step_with_gradient_leaves_the_cache_to_autograd(cache, monkeypatch) -> None:
    """With gradients enabled a cached call's loss reaches the parameters after later calls."""
    layer, x = fused_mixer("gka", monkeypatch), inputs(12).to(DEVICE).float()
    steps = count_steps(monkeypatch)
    first = layer(x[:, :8], past_key_values=cache)[0]
    second = layer(x[:, 8:], past_key_values=cache)[0]
    assert not steps
    assert_close(torch.cat([first, second], 1), layer(x)[0], 10 * EXACT)
    grads = torch.autograd.grad(
        first.square().sum() + second.square().sum(), list(layer.parameters())
    )
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_gates_are_one_product_unless_a_module_must_be_called(monkeypatch) -> None:
    """b_proj, alpha_proj and a_proj are one product; with a hook, or replaced, each is called."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Narrow(TorchDispatchMode):
        """Counts products with as few columns as gates."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                found.append(out.shape[-1])
            return out

    found: list[int] = []
    layer, x = fused_mixer("gka", monkeypatch, num_kv_heads=4), inputs().to(DEVICE).float()
    with Narrow():
        expected = layer(x)[0]
    assert found.count(12) == 1 and 4 not in found
    called: list[str] = []
    hook = layer.b_proj.register_forward_hook(lambda *_: called.append("b_proj"))
    found.clear()
    with Narrow():
        assert_close(layer(x)[0], expected, EXACT)
    assert called == ["b_proj"] and found.count(4) == 3 and 12 not in found
    hook.remove()
    layer.alpha_proj = torch.nn.Sequential(layer.alpha_proj, torch.nn.Identity())
    assert_close(layer(x)[0], expected, EXACT)
