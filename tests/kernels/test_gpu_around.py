"""On a GPU: what the layer's fused kernels must keep beside accuracy. Repeatability, scratch memory, CUDA
graphs, autocast, and tensors of more than 2^31 elements."""

import pytest
import torch
from torch import Tensor

from gka.layers import GatedKalmaNet
from gka.models.loss import IGNORE_INDEX, compiled_on_gpu, linear_cross_entropy
from gka.ops.convolution import convolve_heads, step_heads_and_gates
from gka.ops.surround import gated_rms_norm
from tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
DEVICE = "cuda"


def make_layer(dtype: torch.dtype) -> GatedKalmaNet:
    torch.manual_seed(0)
    return GatedKalmaNet(256, head_dim=128, num_heads=2, layer_idx=0).to(DEVICE, dtype)


def tokens(length: int = 300, dtype: torch.dtype = BF16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, 256, generator=generator).to(DEVICE, dtype)


def outcome(layer: GatedKalmaNet, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of input and parameters."""
    x = x.clone().requires_grad_()
    output = layer(x)[0]
    named = dict(layer.named_parameters())
    grads = torch.autograd.grad(output.float().square().sum(), [x, *named.values()])
    return {"output": output, **dict(zip(["x", *named], grads, strict=True))}


def test_deterministic_with_scratch_memory_full_of_nan(monkeypatch):
    """The same inputs give the same outputs and gradients, bit for bit, whatever fresh memory holds."""
    layer, x = make_layer(BF16), tokens()
    assert layer.why_unfused(DEVICE, BF16) is None
    expected = outcome(layer, x)

    def poisoned(make):
        def call(*args, **kwargs):
            y = make(*args, **kwargs)
            return y.fill_(torch.nan) if y.is_floating_point() else y

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for key, value in outcome(layer, x).items():
        assert torch.equal(value, expected[key]), key


def test_16_bits_are_as_accurate_as_plain_modules(monkeypatch):
    """Errors of the output and of every gradient against float64 are at most those of plain torch modules
    and a half, on the same rounded weights. A gradient of few numbers may have the error of its own rounding,
    which either way can be lucky to miss."""
    layer, x = make_layer(BF16), tokens()
    exact = make_layer(torch.float64)
    exact.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
    expected, mine = outcome(exact, x.double()), outcome(layer, x)
    monkeypatch.setattr("gka.layers.parts.surround.why_unfused", lambda *_: "for comparison")
    plain = outcome(layer, x)
    for key, value in expected.items():
        scale = value.double().norm()
        errors = [(y[key].double() - value).norm() / scale for y in (mine, plain)]
        rounding = torch.finfo(BF16).eps / 2 if value.numel() < 8 else 0.0
        allowed = max(1.5 * errors[1] + RELATIVE[torch.float32], rounding)
        assert errors[0] <= allowed, (key, errors)


def test_autocast_gives_the_dtypes_of_plain_modules(monkeypatch):
    """Under autocast float32 parameters train: output in its dtype, gradients float32, as without kernels."""
    layer, x = make_layer(torch.float32), tokens(dtype=torch.float32)
    with torch.autocast(DEVICE, dtype=BF16):
        mine = outcome(layer, x)
        monkeypatch.setattr("gka.layers.parts.surround.why_unfused", lambda *_: "for comparison")
        plain = outcome(layer, x)
    assert mine["output"].dtype == BF16
    for key, value in plain.items():
        assert mine[key].dtype == value.dtype, key
        assert_close(mine[key], value, RELATIVE[BF16], key)


def test_vmap_runs_the_modules():
    """Under torch.vmap the layer gives what it gives for each part."""
    layer, x = make_layer(torch.float32), tokens(dtype=torch.float32).unflatten(1, (2, 150))
    with torch.no_grad():
        mapped = torch.vmap(lambda y: layer(y)[0])(x)
        assert_close(mapped, torch.stack([layer(y)[0] for y in x]), RELATIVE[torch.float32])


def test_captured_in_a_cuda_graph():
    """Convolutions and norm, forward and backward, replay from a graph to the same bits."""
    q = torch.randn(1, 512, 256, device=DEVICE, dtype=BF16, requires_grad=True)
    w = torch.randn(256, 1, 4, device=DEVICE, requires_grad=True)
    weight = torch.rand(64, device=DEVICE, requires_grad=True)

    def call() -> tuple[Tensor, ...]:
        y, gate, v = convolve_heads((q, q, q), (w, w, w), 64)
        assert v is not None
        o = gated_rms_norm(y.unflatten(-1, (4, 64)), gate, weight, 1e-6)
        return torch.autograd.grad([o, v], [q, w, weight], [torch.ones_like(o), q.detach()])

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            expected = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = call()
    graph.replay()
    torch.cuda.synchronize()
    for got, value in zip(found, expected, strict=True):
        assert torch.equal(got, value)


def test_a_captured_step_updates_the_same_memory():
    """Replaying a graph of one decoding step moves the convolutions' states on where they lie."""
    x = torch.randn(2, 1, 256, device=DEVICE, dtype=BF16)
    w = torch.randn(256, 1, 4, device=DEVICE, dtype=BF16)
    states = [torch.zeros(2, 256, 4, device=DEVICE, dtype=BF16) for _ in range(3)]
    none = (None, None, None)

    def call():
        three = (states[0], states[1], states[2])
        return step_heads_and_gates((x, x, x), (w, w, w), three, none, (None, None), 64)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (_, _, v), _ = call()
    for state in states:
        state.zero_()
    inputs = torch.randn(6, 2, 1, 256, device=DEVICE, dtype=BF16)
    for token in inputs:
        x.copy_(token)
        graph.replay()
    torch.cuda.synchronize()
    seen = inputs[-4:, :, 0].permute(1, 2, 0)
    for state in states:
        assert torch.equal(state, seen)
    expected = torch.nn.functional.silu((seen.double() * w[:, 0].double()).sum(-1))
    assert v is not None
    assert_close(v[:, 0], expected, RELATIVE[BF16])


def test_more_than_2_to_the_31_elements():
    """At the end of a sequence of more than 2^31 elements outputs and input gradients are right."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB")
    length, channels, last = 2**20 + 300, 2048, 200
    q = torch.randn(1, length, channels, device=DEVICE, dtype=BF16, requires_grad=True)
    k = torch.zeros(1, length, 128, device=DEVICE, dtype=BF16)
    wq = torch.randn(channels, 1, 4, device=DEVICE, dtype=BF16)

    def run(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        y, _, _ = convolve_heads((q, k, None), (wq, wq[:128], None), 128)
        norm = gated_rms_norm(y.unflatten(-1, (16, 128)), q.detach(), wq[:128, 0, 0], 1e-6)
        (grad,) = torch.autograd.grad(norm, q, torch.ones_like(norm))
        return norm.flatten(-2)[:, -last:].clone(), grad[:, -last:].clone()

    tail = q[:, -2 * last :].detach().clone().requires_grad_()
    for got, expected in zip(run(q, k), run(tail, k[:, -2 * last :]), strict=True):
        assert torch.equal(got, expected)


def test_a_loss_compiled_on_the_gpu_is_the_loss():
    """Loss and gradients of several chunks, the last one ragged, compiled between their products."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 128, device=DEVICE, dtype=BF16) for n in (700, 1000))
    targets = torch.randint(1000, (700,), device=DEVICE)
    targets[::7] = IGNORE_INDEX

    def outcome() -> list[Tensor]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(h, w, targets, logits_bytes=256 * 1000 * 4)
        return [loss.detach(), *torch.autograd.grad(loss, (h, w))]

    expected = outcome()
    with compiled_on_gpu():
        found = outcome()
    for mine, plain in zip(found, expected, strict=True):
        assert_close(mine, plain, RELATIVE[BF16])
