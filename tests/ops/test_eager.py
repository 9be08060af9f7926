"""Calls where autograd alone looks on take a short way, which changes nothing but the host's time."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gka.ops import chunk, chunk_gka, dispatch, fused_recurrent_gka
from gka.ops.autograd import GKAEager
from gka.ops.backends import get_backend, register_backend
from gka.ops.dispatch import is_eager


def any_of(x: Any) -> Any:
    """x, of which no type is known."""
    return x


def inputs(seed: int = 0, heads: int = 2) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=random)  # noqa: E731
    given: dict[str, Any] = {n: draw(2, 40, heads, 8) for n in "qkv"}
    given |= {"g": -draw(2, 40, heads), "alpha": draw(2, 40, heads), "beta": draw(2, 40, heads)}
    return {name: x.requires_grad_() for name, x in given.items()}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The short way, on a CPU too; counts how often it is taken."""
    taken: list[int] = []
    apply = GKAEager.apply

    def counted(*args: Any) -> Any:
        taken.append(1)
        return apply(*args)

    monkeypatch.setattr(dispatch, "is_eager", lambda q: True)
    monkeypatch.setattr(chunk.GKAEager, "apply", counted)
    monkeypatch.setattr(dispatch, "KNOWN", {})
    return taken


def results(op, **options: Any) -> dict[str, Tensor]:
    """Output, states and gradients."""
    given = inputs()
    states = tuple(torch.rand(2, 2, 8, 8).mul_(0).requires_grad_() for _ in range(2))
    o, final = op(**given, gk=given["g"], initial_state=states, output_final_state=True, **options)
    loss = o.square().sum() + sum(s.sum() for s in final)
    wanted = {**given, "h0": states[0], "u0": states[1]}
    grads = torch.autograd.grad(loss, list(wanted.values()))
    return {"o": o, "h": final[0], "u": final[1]} | dict(zip(wanted, grads, strict=True))


@pytest.mark.parametrize("op", [chunk_gka, fused_recurrent_gka])
def test_results_are_those_of_the_operators(op, short: list[int], monkeypatch: Any) -> None:
    """Bit for bit, the second time too, when nothing is checked any more."""
    first, second = results(op), results(op)
    assert len(short) == 2
    monkeypatch.setattr(dispatch, "is_eager", is_eager)
    expected = results(op)
    assert len(short) == 2
    for key, value in expected.items():
        assert torch.equal(first[key], value), key
        assert torch.equal(second[key], value), key


def test_a_call_of_another_kind_is_checked(short: list[int]) -> None:
    """A known call does not let pass what differs from it: a shape, a dtype, a flag that is no flag."""
    given = inputs()
    for _ in range(2):
        chunk_gka(**given)
    with pytest.raises(ValueError, match="g must have shape"):
        chunk_gka(**given | {"g": given["g"][:, :-1]})
    with pytest.raises(TypeError, match="floating-point"):
        chunk_gka(**given | {"beta": given["beta"].long()})
    with pytest.raises(TypeError, match="True or False"):
        chunk_gka(**given, output_final_state=any_of(0))
    chunk_gka(**given, num_iter=1)
    with pytest.raises(TypeError, match="num_iter must be an int"):
        chunk_gka(**given, num_iter=True)
    with pytest.raises(TypeError, match="dense"):
        chunk_gka(**given | {"v": given["v"].detach().to_sparse()})


def test_a_backend_registered_later_is_seen(short: list[int], monkeypatch: Any) -> None:
    """The choice is made again."""
    given = inputs()
    chunk_gka(**given)
    calls: list[int] = []
    from dataclasses import replace

    from gka.ops import backends

    torch_backend = get_backend("torch")

    def forward(tokens, settings):
        calls.append(1)
        return torch_backend.forward["chunk"](tokens, settings)

    monkeypatch.setattr(backends, "_BACKENDS", dict(backends._BACKENDS))
    mine = replace(torch_backend, name="mine", forward={**torch_backend.forward, "chunk": forward})
    register_backend(mine, first=True)
    chunk_gka(**given)
    assert calls


def test_debug_checks_values_every_time(short: list[int], monkeypatch: Any) -> None:
    """GKA_DEBUG=1 reads the values of known calls too."""
    given = inputs()
    chunk_gka(**given)
    monkeypatch.setenv("GKA_DEBUG", "1")
    with pytest.raises(ValueError, match="log decay"):
        chunk_gka(**given | {"g": -given["g"]})


def test_a_second_derivative_is_refused(short: list[int]) -> None:
    """As by the operators."""
    given = inputs()
    o, _ = chunk_gka(**given)
    (grad,) = torch.autograd.grad(o.sum(), given["q"], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference" for second derivatives'):
        grad.sum().backward()


def test_checkpointing_may_mix_both_ways(short: list[int], monkeypatch: Any) -> None:
    """Both save the same tensors: a recomputation may take the other way."""
    given = inputs()
    expected = torch.autograd.grad(chunk_gka(**given)[0].sum(), list(given.values()))
    o = checkpoint(lambda: chunk_gka(**given)[0], use_reentrant=False)
    monkeypatch.setattr(dispatch, "is_eager", is_eager)
    actual = torch.autograd.grad(o.sum(), list(given.values()))
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_what_looks_on_takes_the_operators() -> None:
    """Transforms, dispatch modes and tensors that are not on a GPU."""
    from torch.utils.flop_counter import FlopCounterMode

    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    assert is_eager(on_gpu)
    assert not is_eager(inputs()["q"])
    selective = create_selective_checkpoint_contexts([torch.ops.gka.forward.default])
    for mode in (FlopCounterMode(display=False), *selective):
        with mode:
            assert not is_eager(on_gpu)
    seen: list[bool] = []
    torch.vmap(lambda x: (seen.append(is_eager(on_gpu)), x)[1])(torch.ones(2))
    assert seen == [False]
