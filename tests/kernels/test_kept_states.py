"""A backward pass on states that the forward pass kept gives what one that scans again gives, bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gka.errors import InputError
from gka.maths.chunked import Settings, Tokens
from gka.ops import chunk_gka
from gka.ops.autograd import forward_op

pytest.importorskip("triton", reason="the kernels need the package triton")
CHUNK = 16
CASES: dict[str, dict[str, Any]] = {
    "shared heads, states": {"key_heads": 1, "states": True},
    "packed": {"bounds": [0, 0, 7, 24], "length": 24},
    "no solve": {"num_iter": 0},
}


def inputs(
    length: int = 40, heads: int = 2, key_heads: int = 2, dims: tuple[int, int] = (16, 16),
    bounds: list[int] | None = None, states: bool = False, dtype: torch.dtype = torch.float16,
    device: str = "cpu", batch: int = 1, **options: Any,
) -> tuple[list[Tensor], dict[str, Any]]:  # fmt: skip
    """Leaves, and the call's options."""
    torch.manual_seed(0)
    shapes = [
        (batch, length, n, d) for n, d in ((heads, dims[0]), (key_heads, dims[0]), (heads, dims[1]))
    ]
    q, k, v = (torch.randn(shape) for shape in shapes)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    g, alpha, beta = torch.rand(3, batch, length, heads).unbind()
    leaves = [*(x.to(dtype) for x in (q, k, v)), -0.1 * g, alpha, beta]
    if states:
        n = batch if bounds is None else len(bounds) - 1
        h = torch.randn(n, heads, dims[0], dims[0])
        leaves += [h @ h.mT, torch.randn(n, heads, *dims)]
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device=device)
    return [x.to(device).requires_grad_() for x in leaves], {**options, "cu_seqlens": cu_seqlens}


def outcome(leaves: list[Tensor], twice: bool = False, **options: Any) -> list[Tensor]:
    """Output, final states and all gradients; the gradients once more if `twice`."""
    q, k, v, g, alpha, beta, *states = leaves
    initial: Any = tuple(states) or None
    o, final = chunk_gka(
        q, k, v, g, g, alpha, beta=beta, initial_state=initial, output_final_state=bool(states),
        **options,
    )  # fmt: skip
    outs = [o, *(final or ())]
    loss = torch.stack([y.float().square().sum() for y in outs]).sum()
    grads = list(torch.autograd.grad(loss, leaves, retain_graph=twice))
    return [*outs, *grads, *(torch.autograd.grad(loss, leaves) if twice else ())]


@pytest.mark.parametrize("name", CASES)
def test_kept_states_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, final states and gradients are those without keep_states; the backward pass does not scan, and
    can run twice on one graph."""
    leaves, options = inputs(**{"num_iter": 3, **CASES[name]})
    options |= {"backend": "triton", "chunk_size": CHUNK}
    expected = outcome(leaves, **options)
    from gka.kernels.triton.passes import TritonPasses

    scans, scan = [], TritonPasses.scan
    monkeypatch.setattr(TritonPasses, "scan", lambda *a: (scans.append(1), scan(*a))[1])
    found = outcome(leaves, twice=True, keep_states=True, **options)
    assert len(scans) == 1
    for mine, plain in zip(found[: len(expected)], expected, strict=True):
        assert torch.equal(mine, plain)
    for again, first in zip(found[len(expected) :], found[-2 * len(leaves) :], strict=False):
        assert torch.equal(again, first)


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    """Without gradients, or of inputs that need none, the operator returns no states."""
    leaves, options = inputs(num_iter=1)
    kept = []

    def noted(tokens: Tokens, settings: Settings, *rest: Any) -> Any:
        kept.append(settings.keep_states)
        return run(tokens, settings, *rest)

    from gka.ops import autograd

    run = autograd._forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd, "_forward", noted)
        call = {**options, "backend": "triton", "chunk_size": CHUNK, "keep_states": True}
        q, k, v = leaves[:3]
        with torch.no_grad():
            chunk_gka(q, k, v, **call)
        chunk_gka(q.detach(), k.detach(), v.detach(), **call)
        chunk_gka(q, k, v, **call)
    assert kept == [False, False, True]


def test_backends_that_keep_nothing_refuse() -> None:
    """keep_states needs a GPU backend, and a bool."""
    q, k, v = inputs()[0][:3]
    for backend in ("torch", "reference"):
        with pytest.raises(InputError, match=f'needs the backend "hopper".*{backend}'):
            chunk_gka(q.float(), k.float(), v.float(), keep_states=True, backend=backend)
    with pytest.raises(TypeError, match="keep_states must be True or False"):
        chunk_gka(q, k, v, keep_states=1, backend="triton")  # pyright: ignore[reportArgumentType]


def test_a_compiled_call_keeps_its_states() -> None:
    """Fake results have the shapes of real ones, packed too; compiled gradients are the uncompiled ones."""
    leaves, options = inputs(24, bounds=[0, 7, 24], num_iter=1)
    q, k, v, g, alpha, beta = (x.detach() for x in leaves)
    numbers = (1.0, 0.02, 1, CHUNK, True, False, "chebyshev", True, "chunk", "triton")
    given = (q, k, v, g, None, alpha, beta, None, None, options["cu_seqlens"], None, *numbers)
    torch.library.opcheck(forward_op, given, test_utils=("test_schema", "test_faketensor"))
    leaves, options = inputs(20, num_iter=1)
    options |= {"backend": "triton", "chunk_size": CHUNK, "keep_states": True}

    def call(*leaves: Tensor) -> Tensor:
        q, k, v, g, alpha, beta = leaves
        return chunk_gka(q, k, v, g, g, alpha, beta=beta, **options)[0]

    def grads(run: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(*leaves).float().square().sum(), leaves)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for mine, plain in zip(grads(compiled), grads(call), strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "hopper"])
@pytest.mark.parametrize("solver", ["chebyshev", "adaptive", "cg"])
def test_kept_states_change_no_bit_on_a_gpu(backend: str, solver: str) -> None:
    """At sizes of training, in segments and packed; twice, so that recorded passes are replayed."""
    sizes: dict[str, Any] = {
        "heads": 4,
        "key_heads": 4,
        "dims": (128, 128),
        "dtype": torch.bfloat16,
    }
    calls: list[dict[str, Any]] = [{"batch": 2, "states": True}, {"bounds": [0, 100, 1000, 2000]}]
    for more in calls:
        leaves, options = inputs(2000, device="cuda", **sizes, **more)
        options |= {"backend": backend, "solver": solver}
        expected = outcome(leaves, **options)
        for _ in range(2):
            found = outcome(leaves, keep_states=True, **options)
            for mine, plain in zip(found, expected, strict=True):
                assert torch.equal(mine, plain)
