"""Mixers under torch.compile and torch.export: one graph for every length."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from gka.layers import MIXERS, StateCache
from gka.layers.recurrent_mixer import RecurrentMixer
from tolerances import RELATIVE, assert_close

KINDS = {
    **{name: (name, {}) for name in MIXERS},
    "adaptive": ("gka", {"solver": "adaptive"}),
    "cg": ("gka", {"solver": "cg"}),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@pytest.fixture(params=KINDS)
def kind(request, make) -> nn.Module:
    name, options = KINDS[request.param]
    return make(name, **options)


class Graphs:
    """A mixer compiled whole, and how many graphs that took (an empty one is no graph)."""

    def __init__(self, mixer: nn.Module):
        self._counter = CompileCounterWithBackend("aot_eager")
        self.mixer = torch.compile(mixer, fullgraph=True, backend=self._counter)

    def __len__(self) -> int:
        return sum(len(graph.graph.nodes) > 0 for graph in self._counter.graphs)


def outcome(call: Callable[..., Any], mixer: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    """Output and gradients of one call."""
    x = x.clone().requires_grad_()
    output = call(x, **options)[0]
    return [output, *torch.autograd.grad(output.square().sum(), [x, *mixer.parameters()])]


def assert_same(mixer: nn.Module, compiled: Graphs, x: Tensor, **options: Any) -> None:
    found = outcome(compiled.mixer, mixer, x, **options)
    for ours, plain in zip(found, outcome(mixer, mixer, x, **options), strict=True):
        assert_close(ours, plain, RELATIVE[torch.float64])


def test_one_graph_serves_every_length(kind, tokens):
    """The graph of a second length serves all lengths from 2 on, forward and backward."""
    compiled = Graphs(kind)
    for length in (20, 33, 2, 16, 17, 65):
        assert_same(kind, compiled, tokens(2, length))
    assert len(compiled) == 2


@pytest.mark.parametrize("name", ["gka", "swa", "gated_deltanet"])
def test_a_second_length_compiles_once_more(mixer, tokens):
    """The second length is the last to compile; one token has a graph of its own, as every size
    of 1 has to torch.compile."""
    compiled, counts = Graphs(mixer), []
    for length in (20, 33, 5, 65, 1):
        compiled.mixer(tokens(2, length))
        counts.append(len(compiled))
    assert counts == [1, 2, 2, 2, 3]


@pytest.mark.parametrize("name", ["gka", "swa", "gated_deltanet"])
def test_one_graph_serves_every_padding(mixer, tokens):
    """With a padding mask too."""
    compiled = Graphs(mixer)
    for length in (20, 33, 5, 65):
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, : length // 3] = mask[1, length - 1 :] = 0
        assert_same(mixer, compiled, tokens(2, length), attention_mask=mask)
    assert len(compiled) == 2


@pytest.mark.parametrize("name", ["gka", "swa", "gated_deltanet"])
def test_one_graph_serves_every_packing(mixer, tokens):
    """Two packed sequences or more, of any lengths, empty ones too; cu_seqlens_cpu passes through."""
    compiled = Graphs(mixer)
    for bounds in ([0, 7, 9, 20], [0, 3, 33], [0, 0, 5, 64, 65]):
        options = {"cu_seqlens": torch.tensor(bounds)}
        if isinstance(mixer, RecurrentMixer):  # attention reads nothing back and takes no copy
            options["cu_seqlens_cpu"] = torch.tensor(bounds)
        assert_same(mixer, compiled, tokens(1, bounds[-1]), **options)
    assert len(compiled) == 2


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet"])
def test_wrong_bounds_are_found_when_the_graph_runs(mixer, tokens):
    """A compiled delta rule refuses bounds that do not end at T, as an eager one does."""
    compiled = Graphs(mixer)
    with pytest.raises(ValueError, match="end with T = 20"):
        compiled.mixer(tokens(1, 20), cu_seqlens=torch.tensor([0, 7, 19]))


@torch.no_grad()
def test_cached_calls_keep_their_fast_path(kind, tokens):
    """From a cache a compiled mixer takes a prompt of any length and then tokens one by one as an eager
    one does: token by token, in place for GKA, and no graph for each position."""
    compiled, x = Graphs(kind), tokens(2, 40)

    def read(mixer: Any) -> Tensor:
        cache, outputs = StateCache(), []
        for begin, end in itertools.pairwise([0, 20, 21, 22, 23, 24]):
            outputs.append(mixer(x[:, begin:end], past_key_values=cache)[0])
        return torch.cat(outputs, 1)

    assert_close(read(compiled.mixer), read(kind), RELATIVE[torch.float64])
    graphs = len(compiled)
    assert graphs <= 4
    used = {str(n.target) for g in compiled._counter.graphs for n in g.graph.nodes}
    assert ("gka.step_.default" in used) == (type(kind).__name__ == "GatedKalmaNet")
    read(compiled.mixer)
    assert len(compiled) == graphs


def test_exports_for_every_length(kind, tokens):
    """torch.export with a dynamic length from 1 on: the program equals the module at every length."""
    length = Dim("T", min=1, max=4096)
    shapes = {"hidden_states": {1: length}}
    program = torch.export.export(kind, (tokens(2, 20),), dynamic_shapes=shapes).module()
    for tokens_ in (1, 5, 16, 17, 64, 65, 200):
        x = tokens(2, tokens_)
        assert_close(program(x)[0], kind(x)[0], RELATIVE[torch.float64])
