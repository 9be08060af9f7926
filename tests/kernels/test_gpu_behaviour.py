"""On a GPU: what the kernels must keep beside accuracy. Scratch memory, repeatability, torch.compile, CUDA
graphs, checkpointing, strides, waiting, and tensors of more than 2^31 elements."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from gka.ops import chunk_gka, why_unavailable
from on_gpu import (
    BACKENDS,
    DEVICE,
    SETTINGS,
    assert_same_bits,
    gpu_problem,
    run,
    skip_unless_available,
    upstream,
)
from problems import Problem, chunkwise
from tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


def problem(length: int = 200, **options: Any) -> Problem:
    """One set of compiled kernels serves all tests of this file that can share it."""
    return gpu_problem(length, BF16, **{"dims": (128, 128), "batch": 2, **options})


@contextmanager
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Fresh float memory is full of NaN; yields the sizes of what was asked for."""
    sizes: list[int] = []

    def poisoning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            if x.is_floating_point() and x.device.type == DEVICE:
                x.fill_(torch.nan)
                sizes.append(x.numel())
            return x

        return call

    with monkeypatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided"):
            patch.setattr(torch, name, poisoning(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            patch.setattr(Tensor, name, poisoning(getattr(Tensor, name)))
        yield sizes


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("lengths", [None, [0, 1, 15, 64, 200, 500]], ids=["batch", "packed"])
def test_scratch_memory_is_written_before_it_is_read(settings, lengths, monkeypatch):
    """With fresh memory full of NaN, both passes give the same results, bit for bit."""
    options = {} if lengths is None else {"batch": 1, "lengths": lengths}
    inputs = problem(**options)
    expected = run(inputs, **settings)
    with poisoned(monkeypatch) as sizes:
        found = run(inputs, **settings)
    assert len(sizes) > 3
    assert_same_bits(found, expected)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_deterministic(settings):
    """The same inputs give the same outputs, states and gradients, bit for bit, also in other memory."""
    inputs = problem(1000)
    expected = run(inputs, **settings)
    keep = [torch.randn(1 << 22, device=DEVICE) for _ in range(3)]
    for _ in range(3):
        assert_same_bits(run(inputs, **settings), expected)
    del keep


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_compiled_equals_eager(settings):
    """torch.compile(fullgraph=True) gives the eager outputs and gradients, bit for bit."""
    inputs = problem()
    expected = run(inputs, **settings)
    compiled = torch.compile(chunk_gka, fullgraph=True)
    assert_same_bits(run(inputs, op=compiled, **settings), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_graph_of_the_forward_pass(backend):
    """A captured forward pass, replayed on new values, gives what an eager call gives on them."""
    inputs, others = problem(), problem(seed=1)

    def forward() -> tuple[Tensor, ...]:
        return chunkwise(inputs, backend=backend)

    skip_unless_available(inputs, backend)
    graph, outputs = capture(forward)
    expected = chunkwise(others, backend=backend)
    overwrite(inputs, others)
    graph.replay()
    for name, x, y in zip("ohu", outputs, expected, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_graph_of_a_training_step(backend):
    """Forward and backward captured together: replayed on new values, all gradients are the eager ones."""
    others = problem(seed=1)
    inputs = problem().leaves()
    weights = upstream(inputs)
    skip_unless_available(inputs, backend)

    def step() -> tuple[Tensor, ...]:
        outputs = chunkwise(inputs, backend=backend)
        return torch.autograd.grad(outputs, list(inputs.tensors().values()), weights)

    graph, grads = capture(step)
    overwrite(inputs, others)
    expected = step()
    graph.replay()
    for name, x, y in zip(inputs.tensors(), grads, expected, strict=True):
        assert torch.equal(x, y), f"d{name}"


def capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The call as a CUDA graph, after runs on a side stream, as torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs


def overwrite(inputs: Problem, others: Problem) -> None:
    """The values of others in the memory of inputs."""
    with torch.no_grad():
        for name, x in inputs.tensors().items():
            x.copy_(others.tensors()[name])


def test_checkpointing():
    """Activation checkpointing (use_reentrant=False) gives the same gradients, bit for bit."""
    inputs = problem()

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(chunk_gka, *args, use_reentrant=False, **kwargs)

    assert_same_bits(run(inputs, op=checkpointed), run(inputs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    """Inputs that are slices or transposed views give what contiguous ones give, bit for bit."""
    inputs = problem()

    def strided(x: Tensor) -> Tensor:
        wide = torch.stack([x, x + 1], -1).transpose(0, 1).contiguous().transpose(0, 1)
        return wide[..., 0]

    expected = run(inputs, backend=backend)
    views = {name: strided(x).requires_grad_() for name, x in inputs.tensors().items()}
    assert not any(x.is_contiguous() for x in views.values())
    outputs = chunkwise(replace(inputs, **views), backend=backend)
    weights = tuple(strided(w) for w in upstream(inputs))
    grads = torch.autograd.grad(outputs, list(views.values()), weights)
    found = dict(zip("ohu", outputs, strict=True))
    found |= {f"d{name}": x for name, x in zip(views, grads, strict=True)}
    found["dh0"] = (found["dh0"] + found["dh0"].mT) / 2
    assert_same_bits(found, expected)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
def test_packed_sequences_without_waiting(backend):
    """Given the CPU copy of lengths that it has not seen before, a training step never waits for the
    device; without the copy it has to."""
    first, second = [0, 1, 15, 64, 200, 500], [300, 0, 80, 100, 200, 100]
    for lengths in (first, second):
        inputs = problem(batch=1, lengths=lengths).leaves()
        skip_unless_available(inputs, backend)
        weights, tensors = upstream(inputs), list(inputs.tensors().values())
        assert inputs.cu_seqlens is not None
        copy = inputs.cu_seqlens.cpu()
        if lengths == first:  # compiles, fills the allocator's pool
            outputs = chunkwise(inputs, backend=backend, cu_seqlens_cpu=copy)
            torch.autograd.grad(outputs, tensors, weights)
        with no_waiting():
            outputs = chunkwise(inputs, backend=backend, cu_seqlens_cpu=copy)
            torch.autograd.grad(outputs, tensors, weights)
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        chunkwise(inputs, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_without_waiting(backend):
    """Sequences that are not packed never make the host wait, in neither pass."""
    inputs = problem().leaves()
    weights = upstream(inputs)
    run(inputs, weights, backend=backend)
    with no_waiting():
        outputs = chunkwise(inputs, backend=backend)
        torch.autograd.grad(outputs, list(inputs.tensors().values()), weights)


def test_a_profile_names_the_regions():
    """A profile shows gka.forward and gka.backward, with the kernels' time on the device inside them."""
    inputs = problem()
    run(inputs)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        run(inputs)
        torch.cuda.synchronize()
    for name in ("gka.forward", "gka.backward"):
        found = [event for event in trace.key_averages() if event.key == name]
        assert found and sum(event.device_time_total for event in found) > 0


LONG, LAST = 17_200 * 64, 2048
LONG_GIB = 60


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_2_to_31_elements(backend):
    """Queries, states and outputs of over 2^31 elements: the last outputs and the final states are those of a
    run over the last tokens alone, everything before being forgotten (decay e^-90)."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < LONG_GIB * 2**30:
        pytest.skip(f"needs {LONG_GIB} GiB of free GPU memory")
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=dtype)

    q = random(1, LONG, 16, 128).mul_(128**-0.5)
    k, v = normalize(random(1, LONG, 1, 128), dim=-1), random(1, LONG, 1, 128)
    g = torch.full((1, LONG, 16), -0.05, device=DEVICE)
    alpha = torch.rand(1, LONG, 16, generator=generator, device=DEVICE)
    assert q.numel() > 2**31
    reason = why_unavailable(backend, DEVICE, BF16)
    if reason is not None:
        pytest.skip(reason)
    options: dict[str, Any] = {"output_final_state": True, "backend": backend}
    o, final = chunk_gka(q, k, v, g, g, alpha, **options)
    assert final is not None
    last_o = o[:, -200:].clone()
    del o
    q, k, v, g, alpha = (x[:, -LAST:].clone() for x in (q, k, v, g, alpha))
    short_o, short = chunk_gka(q, k, v, g, g, alpha, **options)
    assert short is not None
    assert_close(last_o, short_o[:, -200:], RELATIVE[BF16], "o")
    for name, x, y in zip("hu", final, short, strict=True):
        assert_close(x, y, RELATIVE[torch.float16], name)
