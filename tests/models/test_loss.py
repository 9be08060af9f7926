"""Chunked cross-entropy: equal to the plain one, in less memory."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gka.models import loss as losses
from gka.models.loss import linear_cross_entropy, mean_loss, next_token_targets
from tolerances import RELATIVE, assert_close

V, D, N = 53, 16, 40


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and targets, a quarter of them ignored."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=rng, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, D, generator=rng, dtype=torch.float64).to(dtype)
    targets = torch.randint(V, (N,), generator=rng).masked_fill(torch.arange(N) % 4 == 1, -100)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(3.0 * loss, inputs)


@pytest.mark.parametrize("rows", [1, 7, 40, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_plain_cross_entropy(dtype: torch.dtype, rows: int):
    """Loss and both gradients are those of torch's cross_entropy, whatever the size of a chunk."""
    hidden, weight, targets = problem(dtype)
    itemsize = 8 if dtype == torch.float64 else 4
    loss = linear_cross_entropy(hidden, weight, targets, logits_bytes=rows * V * itemsize)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = F.cross_entropy(wide[0] @ wide[1].T, targets, reduction="sum")
    assert loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert_close(loss, expected, RELATIVE[dtype], "loss")
    found, wanted = gradients(loss, hidden, weight), gradients(expected, *wide)
    for name, ours, theirs in zip(("hidden", "weight"), found, wanted, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, theirs, RELATIVE[dtype], name)


class Part:
    """A thread's words of a vocabulary that several threads share."""

    def __init__(self, begin: int, barrier: Barrier, heard: list[Tensor]) -> None:
        self.begin, self.barrier, self.heard = begin, barrier, heard

    def local(self, weight: Tensor) -> Tensor:
        return weight

    def shared(self, hidden: Tensor) -> Tensor:
        return hidden  # the test adds up the gradients

    def max_(self, x: Tensor) -> Tensor:
        return x.copy_(self._all(x).amax(0))

    def sum_(self, x: Tensor) -> Tensor:
        return x.copy_(self._all(x).sum(0))

    def _all(self, x: Tensor) -> Tensor:
        self.heard.append(x.clone())
        self.barrier.wait()
        every = torch.stack(self.heard)
        if self.barrier.wait() == 0:
            self.heard.clear()
        self.barrier.wait()
        return every


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_split_vocabulary(dtype: torch.dtype, rows: int) -> None:
    """Processes that have a part of the words each get the whole loss, their rows' gradient, and terms of the
    hidden states' one."""
    hidden, weight, targets = problem(dtype)
    count, barrier, heard = 3, Barrier(3), []
    parts = [p.detach().requires_grad_() for p in weight[: V - V % count].chunk(count)]
    words = len(parts[0])
    targets = targets.where(targets < V - V % count, -100)
    size = rows * words * (8 if dtype == torch.float64 else 4)

    def call(number: int) -> tuple[Tensor, ...]:
        h, w = hidden.detach().requires_grad_(), parts[number]
        part = Part(number * words, barrier, heard)
        loss = linear_cross_entropy(h, w, targets, logits_bytes=size, vocabulary=part)
        return loss, *gradients(loss, h, w)

    with ThreadPoolExecutor(count) as threads:
        losses_, of_hidden, of_weight = zip(*threads.map(call, range(count)), strict=True)
    wide = [x.detach().double().requires_grad_() for x in (hidden, torch.cat(parts))]
    expected = F.cross_entropy(wide[0] @ wide[1].T, targets, reduction="sum")
    wanted = gradients(expected, *wide)
    for loss in losses_:
        assert_close(loss, expected, RELATIVE[dtype], "loss")
    total = torch.stack(of_hidden).double().sum(0)
    assert_close(total, wanted[0], RELATIVE[dtype], "hidden")
    assert_close(torch.cat(of_weight), wanted[1], RELATIVE[dtype], "weight")


def test_gradcheck():
    """The gradients formed in the forward pass are the loss's derivatives."""
    hidden, weight, targets = problem()
    hidden = hidden.detach()[:9].requires_grad_()

    def call(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, targets[:9], logits_bytes=4 * V * 8)

    assert torch.autograd.gradcheck(call, (hidden, weight), fast_mode=True)


def test_only_what_needs_a_gradient_gets_one():
    """A frozen head costs no [V,D] buffer; without gradients there is no graph at all."""
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight.detach(), targets)
    assert_close(
        torch.autograd.grad(loss, hidden)[0],
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden)[0],
        RELATIVE[torch.float64],
    )
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad


def test_a_second_derivative_is_refused():
    """The function is differentiable once; asking for more is an error, not a wrong number."""
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden, weight, targets)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_autocast_multiplies_in_its_dtype():
    """Under bfloat16 autocast the products are bfloat16, the sums float32, gradients in the inputs' dtype."""
    hidden, weight, targets = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    rounded = hidden.bfloat16() @ weight.bfloat16().T
    expected = F.cross_entropy(rounded.float(), targets, reduction="sum")
    assert_close(loss, expected, 1e-5, "loss")
    found, wanted = gradients(loss, hidden, weight), gradients(expected, hidden, weight)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, theirs, RELATIVE[torch.bfloat16])


def test_a_token_outside_the_vocabulary_is_an_error():
    """A label that the head cannot predict does not silently read something else."""
    hidden, weight, targets = problem()
    for wrong in (V, -1):
        with pytest.raises(RuntimeError, match=f"index {wrong} is out of bounds"):
            linear_cross_entropy(hidden, weight, targets.index_fill(0, torch.tensor([3]), wrong))


def peak_bytes(step: Callable[[], None]) -> int:
    """Most bytes allocated at one time during step(), above the start."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        step()
    results: Any = profile.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def test_needs_a_fraction_of_the_memory():
    """Of 32 MiB of logits the plain loss holds two copies; in chunks of 1 MiB, below a fifth of one."""
    tokens, vocabulary = 2048, 4096
    hidden = torch.randn(tokens, D, requires_grad=True)
    weight = torch.randn(vocabulary, D, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))

    def chunked():
        linear_cross_entropy(hidden, weight, targets, logits_bytes=2**20).backward()

    def plain():
        F.cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()

    logits = tokens * vocabulary * 4
    least, most = peak_bytes(chunked), peak_bytes(plain)
    assert most >= 2 * logits, most
    assert least <= logits / 5, least


def test_targets_are_the_next_tokens():
    """A position predicts its successor; the last of a row or of a packed sequence predicts nothing."""
    labels = torch.tensor([[1, 2, -100, 4, 5]])
    assert next_token_targets(labels).tolist() == [[2, -100, 4, 5, -100]]
    packed = next_token_targets(labels, torch.tensor([0, 2, 5]))
    assert packed.tolist() == [[2, -100, 4, 5, -100]]
    packed = next_token_targets(labels, torch.tensor([0, 1, 4, 5]))
    assert packed.tolist() == [[-100, -100, 4, -100, -100]]


def test_mean_over_targets_or_over_the_callers_count():
    """The mean is over what counts, as in torch, unless the caller says how many items a batch has."""
    hidden, weight, targets = problem()
    total = linear_cross_entropy(hidden, weight, targets)
    assert_close(
        mean_loss(total, targets, None),
        F.cross_entropy(hidden @ weight.T, targets),
        RELATIVE[torch.float64],
    )
    assert mean_loss(total, targets, 10) == total / 10
    assert mean_loss(total, targets, torch.tensor(10)) == total / 10


def test_what_is_not_finite_at_tokens_without_a_target_stays_there() -> None:
    """Padding may hold anything: loss and gradients of the other tokens and of the head are as without it."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8), torch.randn(11, 8, requires_grad=True)
    targets = torch.tensor([1, -100, 3, 4, -100, 0])
    counts = targets != -100
    hidden[~counts] = torch.tensor([[torch.nan], [torch.inf]]).expand(2, 8)
    given = hidden.clone().requires_grad_()
    loss = linear_cross_entropy(given, weight, targets)
    few = hidden[counts].clone().requires_grad_()
    expected = linear_cross_entropy(few, weight, targets[counts])
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss, (given, weight))
    few_grads = torch.autograd.grad(expected, (few, weight))
    torch.testing.assert_close(grads[0][counts], few_grads[0])
    assert not grads[0][~counts].any()
    torch.testing.assert_close(grads[1], few_grads[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_is_compiled_on_a_gpu_is_the_same(dtype: torch.dtype) -> None:
    """The form for a compiler gives loss and derivative of the other, also for tokens without a target."""
    torch.manual_seed(0)
    logits, targets = torch.randn(9, 30, dtype=dtype) * 4, torch.randint(30, (9,))
    targets[[2, 8]] = losses.IGNORE_INDEX
    counts = (targets != losses.IGNORE_INDEX).unsqueeze(-1)
    expected = losses._cross_entropy_(logits.clone(), targets, counts, True)
    compiled: Any = torch.compile(losses._cross_entropy, backend="aot_eager", fullgraph=True)
    for found, wanted in zip(compiled(logits, targets, counts, True), expected, strict=True):
        assert_close(found, wanted, RELATIVE[dtype])
    assert torch.equal(losses._cross_entropy(logits, targets, counts, False)[0], expected[0])
