"""The ops under torch.compile, torch.func, autocast, and what autograd may and may not ask of them."""

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend

from gka.ops import backends
from gka.ops.autograd import backward_op, forward_op
from gka.ops.chunk import chunk_gka, chunk_simple_gla, fused_recurrent_gka
from gka.ops.delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from problems import Problem, chunkwise, differentiate, make_problem, upstream
from tolerances import RELATIVE, assert_close


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def loss(q, k, v, g, alpha, beta) -> Tensor:
    o, state = chunk_gka(q, k, v, g, g, alpha, beta=beta, output_final_state=True)
    assert state is not None
    return o.square().sum() + state[0].square().sum() + state[1].sum()


def arguments(length: int, **options) -> list[Tensor]:
    p = make_problem(length, dims=(8, 6), states=False, dtype=torch.float32, **options).leaves()
    return [p.tensors()[name] for name in ("q", "k", "v", "g", "alpha", "beta")]


def grads(f, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(f(*inputs), inputs))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_without_graph_breaks(dynamic):
    """torch.compile(fullgraph=True), forward and backward, at several lengths: the same gradients."""
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (70, 33, 130):
        inputs = arguments(length)
        for x, y in zip(grads(compiled, inputs), grads(loss, inputs), strict=True):
            assert_close(x, y, RELATIVE[torch.float32])


def test_dynamic_length_does_not_recompile():
    """With dynamic=True one graph serves every length of two tokens or more."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    compiled(*arguments(70)).backward()
    graphs = counter.frame_count
    for length in (33, 130, 5):
        compiled(*arguments(length)).backward()
    assert counter.frame_count == graphs > 0


def test_the_choice_of_backend_is_not_traced(monkeypatch):
    """What a backend asks of the machine (packages, libraries, chips) never breaks a graph."""

    @torch.compiler.disable
    def refusal(call) -> str | None:
        return "not on this machine."

    absent = backends.Backend("absent", {}, None, refusal)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(backends, "_BACKENDS", {"absent": absent} | backends._BACKENDS)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    inputs = arguments(70)
    for x, y in zip(grads(compiled, inputs), grads(loss, inputs), strict=True):
        assert_close(x, y, RELATIVE[torch.float32])


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    """The default compiler, whose checks of strides and shapes are the strictest, packed and grouped."""

    def packed(cu_seqlens, q, k, v, g):
        o, state = chunk_gka(q, k, v, g, cu_seqlens=cu_seqlens, output_final_state=True, num_iter=5)
        assert state is not None
        return o.sum() + state[0].square().sum()

    p = make_problem(0, (4, 2, 1), (8, 6), states=False, lengths=[3, 0, 70], dtype=torch.float32)
    p = p.leaves()
    inputs = [p.tensors()[n] for n in ("q", "k", "v", "g")]
    expected = torch.autograd.grad(packed(p.cu_seqlens, *inputs), inputs)
    found = torch.autograd.grad(
        torch.compile(packed, fullgraph=True)(p.cu_seqlens, *inputs), inputs
    )
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, RELATIVE[torch.float32])


@pytest.mark.parametrize("op", [fused_recurrent_gka, chunk_simple_gla])
def test_other_ops_compile(op):
    """fused_recurrent_gka and chunk_simple_gla compile too, without graph breaks."""

    def f(q, k, v):
        return op(q, k, v)[0].sin()

    inputs = arguments(20)[:3]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*inputs), f(*inputs), RELATIVE[torch.float32])


DELTA = [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule]


@pytest.mark.parametrize("op", DELTA)
def test_the_delta_rule_is_one_graph_at_every_length(op):
    """Both forms of the delta rule, forward and backward, from an initial to a final state."""

    def f(q, k, v, g, beta, state):
        o, final = op(q, k, v, g, beta, None, state, True)
        return o.square().sum() + final.sin().sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    state = torch.randn(1, 2, 8, 6, requires_grad=True)
    for length in (20, 33, 70, 5):
        q, k, v, g, _, beta = arguments(length)
        inputs = [q, k, v, g, beta, state]
        for x, y in zip(grads(compiled, inputs), grads(f, inputs), strict=True):
            assert_close(x, y, RELATIVE[torch.float32])
    assert counter.frame_count == 2


@pytest.mark.parametrize("op", DELTA)
def test_the_delta_rule_in_compiled_transforms(op: Any):
    """A compiled torch.func.grad or vmap of the delta rule gives what it gives uncompiled."""
    q, k, v, *_ = (x.detach() for x in arguments(20))

    def total(q, k, v):
        found: Any = op(q, k, v)
        return found[0].square().sum()  # pyright: ignore[reportIndexIssue]

    def rows(q, k, v):
        def one(*x: Tensor) -> Any:
            return op(*(y[None] for y in x))[0]

        return torch.func.vmap(one)(q, k, v)

    for f in (torch.func.grad(total), rows):
        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        assert_close(compiled(q, k, v), f(q, k, v), RELATIVE[torch.float32])


def test_a_compiled_transform_loses_no_gradient():
    """torch.compile around torch.func.grad of chunk_gka gives the gradient, uncompiled, or is refused where
    it must compile whole; compiled inside the transform it works."""
    inputs = [x.detach() for x in arguments(20)]
    expected = torch.func.grad(loss)(*inputs)
    found = torch.compile(torch.func.grad(loss), backend="aot_eager")(*inputs)
    assert_close(found, expected, RELATIVE[torch.float32])
    torch._dynamo.reset()  # which remembers what runs uncompiled
    with pytest.raises(Unsupported, match="Observed exception"):
        torch.compile(torch.func.grad(loss), backend="aot_eager", fullgraph=True)(*inputs)
    inside = torch.func.grad(torch.compile(loss, backend="aot_eager"))(*inputs)
    assert_close(inside, expected, RELATIVE[torch.float32])


@pytest.mark.parametrize("num_iter", [0, 3])
@pytest.mark.parametrize("solver", ["chebyshev", "adaptive", "cg"])
def test_operators_keep_their_promises(num_iter, solver):
    """torch.library.opcheck: schemas, fake implementations and aliasing of gka::forward and ::backward."""
    p = make_problem(0, (4, 2, 1), (5, 3), decay="separate", lengths=[3, 0, 20])
    tensors = (p.q, p.k, p.v, p.g, p.gk, p.alpha, p.beta, p.h0, p.u0, p.cu_seqlens, p.cu_seqlens)
    numbers = (1.0, 0.02, num_iter, 16, False, True, solver, False)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward_op, (*tensors, *numbers, "chunk", "torch"), test_utils=tests)
    o, x, x_scale, h, u, kept = forward_op(*tensors, *numbers, "chunk", "torch")
    torch.library.opcheck(
        backward_op, (*tensors, x, x_scale, kept, o, h, u, *numbers, "torch"), test_utils=tests
    )
    none = (p.q, p.k, p.v, *[None] * 8)
    torch.library.opcheck(forward_op, (*none, *numbers, "recurrent", "torch"), test_utils=tests)


def test_functional_gradient():
    """torch.func.grad equals autograd."""
    inputs = arguments(30)
    expected = grads(loss, inputs)
    found = torch.func.grad(loss, argnums=tuple(range(6)))(*(x.detach() for x in inputs))
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, 1e-6)


def test_vmap():
    """vmap over any argument, with the others shared, equals a loop."""
    q, k, v, g, alpha, beta = (x.detach() for x in arguments(20))
    many = torch.stack([q, -q, 2 * q])
    values = torch.stack([v, v + 1, v.sin()])

    def f(q, v):
        o, state = chunk_gka(q, k, v, g, g, alpha, beta=beta, output_final_state=True)
        assert state is not None
        return o, *state

    cases = [((0, None), many, v), ((None, 0), q, values), ((0, 0), many, values)]
    cases.append(((0, 1), many, values.movedim(0, 1)))
    for dims, queries, vs in cases:
        found = torch.vmap(f, in_dims=dims)(queries, vs)
        for i in range(3):
            chosen = (
                many[i] if dims[0] is not None else q,
                values[i] if dims[1] is not None else v,
            )
            for x, y in zip(found, f(*chosen), strict=True):
                assert_close(x[i], y, 1e-6)


def test_gradients_of_every_sample():
    """vmap(grad): the gradient of each sample's loss, as a loop over samples gives it."""
    batch = [x.detach() for x in arguments(20, batch=3)]

    def sample_loss(*sample):
        return loss(*(x.unsqueeze(0) for x in sample))

    found = torch.vmap(torch.func.grad(sample_loss, argnums=tuple(range(6))))(*batch)
    for i in range(3):
        inputs = [x[i : i + 1].clone().requires_grad_() for x in batch]
        for x, y in zip(found, grads(loss, inputs), strict=True):
            assert_close(x[i], y[0], 1e-5)


def test_vmap_over_packed_sequences_is_refused():
    """vmap cannot fold packed sequences into a batch, and says what to do instead."""
    x = torch.randn(2, 1, 5, 1, 4)
    bounds = torch.tensor([0, 2, 5])
    with pytest.raises(RuntimeError, match="pack them all with one cu_seqlens"):
        torch.vmap(lambda q: chunk_gka(q, q, q, cu_seqlens=bounds)[0])(x)


def test_autocast():
    """Under autocast the heads are taken in bfloat16 and everything inside stays float32: the output is
    that of bfloat16 heads, the gradients have the inputs' dtypes, and float64 is left alone."""
    inputs = arguments(70)
    q, k, v, g, alpha, beta = inputs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = chunk_gka(q, k, v, g, g, alpha, beta=beta, output_final_state=True)
        double = q.detach().double()
        assert chunk_gka(double, double, double)[0].dtype == torch.float64
    assert state is not None and o.dtype == torch.bfloat16 and state[0].dtype == torch.float32
    low_q, low_k, low_v = (x.bfloat16() for x in (q, k, v))
    same, _ = chunk_gka(low_q, low_k, low_v, g, g, alpha, beta=beta)
    assert torch.equal(o, same)
    found = torch.autograd.grad(o.float().square().sum(), inputs)
    expected = torch.autograd.grad(same.float().square().sum(), inputs)
    for x, y, given in zip(found, expected, inputs, strict=True):
        assert x.dtype == given.dtype
        assert_close(x, y, 1e-6)


def test_second_derivative_is_refused_by_torch_and_given_by_the_reference():
    """A gradient of the gradient raises with a word on what to do, and doing so works."""
    q, k, v, *_ = arguments(5)
    o, _ = chunk_gka(q, k, v)
    (first,) = torch.autograd.grad(o.square().sum(), [q], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        first.square().sum().backward()
    o, _ = chunk_gka(q, k, v, backend="reference")
    (first,) = torch.autograd.grad(o.square().sum(), [q], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), [k])
    assert second.abs().sum() > 0


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "gk", "alpha", "beta", "h0", "u0"])
def test_gradient_of_one_input_alone(name):
    """When only one input wants a gradient, it gets the one it gets among all."""
    problem = make_problem(70, (2, 1, 2), (8, 6), decay="separate")
    _, expected = differentiate(chunkwise, problem)
    x = problem.tensors()[name].clone().requires_grad_()
    o, h, u = chunkwise(Problem(**{**vars(problem), name: x}))
    weights = upstream((o, h, u))
    total = sum((a * b).sum() for a, b in zip((o, h, u), weights, strict=True))
    (grad,) = torch.autograd.grad(torch.as_tensor(total), [x])
    grad = (grad + grad.mT) / 2 if name == "h0" else grad
    assert_close(grad, expected[name], 1e-14)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradient_from_one_result_alone(which):
    """Only the output, only the final H, or only the final U is differentiated: as in the reference."""
    problem = make_problem(70, (2, 1, 2), (8, 6), decay="separate")

    def only(form, **settings):
        p = problem.leaves()
        names = [n for n in p.tensors() if which != 1 or n in ("k", "gk", "beta", "h0")]
        loss = (form(p, **settings)[which].cos()).sum()
        found = torch.autograd.grad(loss, [p.tensors()[n] for n in names], allow_unused=True)
        return dict(zip(names, found, strict=True))

    expected = only(chunkwise, backend="reference", num_iter=120)
    for name, grad in only(chunkwise, num_iter=120).items():
        if expected[name] is None:
            assert grad is None or (grad == 0).all()
        else:
            x, y = ((z + z.mT) / 2 if name == "h0" else z for z in (grad, expected[name]))
            assert_close(x, y, 1e-9, f"d{name}")


def test_inputs_are_left_alone_and_may_be_strided():
    """Inputs are not modified; transposed, expanded and sliced inputs give what contiguous ones give."""
    problem = make_problem(70, (2, 2, 2), (8, 8), decay="separate")
    before = {name: x.clone() for name, x in problem.tensors().items()}
    results, _ = differentiate(chunkwise, problem)
    for name, x in problem.tensors().items():
        assert torch.equal(x, before[name]), name

    def strided(x: Tensor) -> Tensor:
        wide = torch.stack([x, x + 1], -1).transpose(0, 1).contiguous().transpose(0, 1)
        return wide[..., 0]

    other = problem.map(strided)
    assert not other.q.is_contiguous()
    leaves = other.map(lambda x: x.requires_grad_())
    found = chunkwise(leaves)
    for x, y in zip(found, results, strict=True):
        assert_close(x, y, 1e-14)
    o, _ = chunk_gka(leaves.q, leaves.k, leaves.v)
    (dq,) = torch.autograd.grad(o.sum(), [leaves.q])  # an expanded upstream gradient
    q = problem.q.clone().requires_grad_()
    (same,) = torch.autograd.grad(chunk_gka(q, problem.k, problem.v)[0].sum(), [q])
    assert_close(dq, same, 1e-14)
    one_head = problem.k[:, :, :1].expand_as(problem.k)
    x, y = (chunk_gka(problem.q, k, problem.v)[0] for k in (one_head, problem.k[:, :, :1]))
    assert_close(x, y, 1e-12)


def test_no_graph_without_need():
    """Nothing is recorded for inputs that want no gradient, nor under no_grad; inference mode works."""
    q, k, v, *_ = arguments(10)
    assert not chunk_gka(q.detach(), k.detach(), v.detach())[0].requires_grad
    with torch.inference_mode():
        assert not chunk_gka(q, k, v)[0].requires_grad
