"""What holds for every mixer: shapes, gradients, causality, padding, packing, dtypes, compilation."""

import itertools

import pytest
import torch
from torch import nn

from gka.layers import MIXERS, build_mixer
from gka.layers.recurrent_mixer import RecurrentMixer
from tolerances import RELATIVE, assert_close, relative_error

EXACT = 1e-9


def gradients(mixer: nn.Module, *losses: torch.Tensor) -> list[torch.Tensor]:
    parameters = [p for p in mixer.parameters() if p.requires_grad]
    total = torch.stack(losses).sum()
    return list(torch.autograd.grad(total, parameters))


def test_shapes_and_return_value(mixer, tokens):
    """A mixer maps [B,T,hidden] to [B,T,hidden] and returns (output, None, None) without a cache."""
    output, weights, cache = mixer(tokens(2, 17))
    assert output.shape == (2, 17, 24)
    assert output.dtype == torch.float64
    assert weights is None and cache is None


def test_every_parameter_gets_a_gradient(mixer, tokens):
    """Every parameter and the input take part: finite gradients, none of them zero."""
    x = tokens(2, 17).requires_grad_()
    output, _, _ = mixer(x)
    output.square().sum().backward()
    assert x.grad is not None and x.grad.norm() > 0
    for key, parameter in mixer.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.norm() > 0, key


def test_causal(mixer, tokens):
    """A change at token 9 leaves the outputs before it as they are, bit for bit, and changes its own."""
    x = tokens(1, 17)
    changed = x.clone()
    changed[:, 9] += 1
    before, after = mixer(x)[0], mixer(changed)[0]
    assert torch.equal(before[:, :9], after[:, :9])
    assert relative_error(after[:, 9], before[:, 9]) > 1e-3


def test_rows_are_independent(mixer, tokens):
    """A row of a batch gives what it gives alone."""
    x = tokens(3, 17)
    assert_close(mixer(x)[0][1:2], mixer(x[1:2])[0], EXACT)


@pytest.mark.parametrize("first, last", [(0, 9), (5, 17), (4, 11), (0, 1), (16, 17)])
def test_padding_has_no_influence(mixer, tokens, first, last):
    """Tokens first..last of a padded row give what they give alone, whatever the padding holds, and
    the output at padding is zero."""
    x = tokens(2, 17)
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, :first] = mask[0, last:] = 0
    x[0, :first] = float("nan")
    x[0, last:] = 1e30
    output = mixer(x, attention_mask=mask)[0]
    assert_close(output[0, first:last], mixer(x[:1, first:last])[0][0], EXACT)
    assert_close(output[1], mixer(x[1:])[0][0], EXACT)
    assert not output[0, :first].any() and not output[0, last:].any()


def test_a_row_of_padding_alone_is_harmless(mixer, tokens):
    """A row without any token gives zeros and finite gradients."""
    x = tokens(2, 9).requires_grad_()
    mask = torch.tensor([[0] * 9, [1] * 9])
    output = mixer(x, attention_mask=mask)[0]
    output.square().sum().backward()
    assert not output[0].any() and x.grad is not None and not x.grad[0].any()
    assert all(torch.isfinite(p.grad).all() for p in mixer.parameters() if p.grad is not None)


def test_padding_has_no_influence_on_gradients(mixer, tokens):
    """The parameters' gradients of a padded batch are the sum of those of its rows alone."""
    x = tokens(2, 13)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0, :4] = mask[1, 10:] = False
    batch = gradients(mixer, mixer(x, attention_mask=mask)[0].square().sum())
    alone = [mixer(row)[0].square().sum() for row in (x[:1, 4:], x[1:, :10])]
    for got, expected in zip(batch, gradients(mixer, *alone), strict=True):
        assert_close(got, expected, EXACT)


def test_packed_sequences_do_not_see_each_other(mixer, tokens):
    """Packed sequences, empty and single ones among them, give outputs and gradients of separate calls."""
    bounds = [0, 0, 1, 4, 20, 20, 90]
    x = tokens(1, 90)
    packed = mixer(x, cu_seqlens=torch.tensor(bounds))[0]
    cuts = [(a, b) for a, b in itertools.pairwise(bounds) if a < b]
    separate = [mixer(x[:, a:b])[0] for a, b in cuts]
    assert_close(packed, torch.cat(separate, 1), EXACT)
    alone = [output.square().sum() for output in separate]
    for got, expected in zip(
        gradients(mixer, packed.square().sum()), gradients(mixer, *alone), strict=True
    ):
        assert_close(got, expected, EXACT)


def test_packed_sequences_need_not_wait_for_the_device(mixer, tokens, monkeypatch):
    """With cu_seqlens_cpu a recurrent mixer never reads cu_seqlens back, and gives the same result."""
    if not isinstance(mixer, RecurrentMixer):
        pytest.skip("attention reads nothing back and takes no copy")
    bounds, x = torch.tensor([0, 0, 1, 4, 20, 20, 90]), tokens(1, 90)
    expected = mixer(x, cu_seqlens=bounds)[0]
    copy, read = bounds.clone(), torch.Tensor.tolist
    places = []

    def tolist(self):
        places.append(self.data_ptr())
        return read(self)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    assert torch.equal(mixer(x, cu_seqlens=bounds, cu_seqlens_cpu=copy)[0], expected)
    assert copy.data_ptr() in places and bounds.data_ptr() not in places


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(name, make, tokens, dtype):
    """In a narrower dtype the output has that dtype and stays near the float64 output."""
    mixer = make(name)
    x = tokens(2, 70)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(parameter.to(dtype))  # the same weights in both
        expected = mixer(x.to(dtype).double())[0]
        output = mixer.to(dtype)(x.to(dtype))[0]
    assert output.dtype == dtype
    assert_close(output, expected, RELATIVE[dtype])


def test_autocast(mixer, tokens):
    """Under bfloat16 autocast float32 parameters train: output near float32's, finite gradients."""
    mixer, x = mixer.float(), tokens(2, 70).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = mixer(x)[0]
    assert output.dtype == torch.bfloat16
    assert_close(output, mixer(x)[0], RELATIVE[torch.bfloat16])
    grads = gradients(mixer, output.float().square().sum())
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("name", ["gka", "attention", "gated_deltanet"])
def test_compiles_whole(mixer, tokens):
    """torch.compile takes the mixer as one graph, with the same output and gradients."""
    torch._dynamo.reset()
    x = tokens(1, 20)
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    output, expected = compiled(x)[0], mixer(x)[0]
    assert_close(output, expected, RELATIVE[torch.float64])
    for got, grad in zip(
        gradients(mixer, output.square().sum()),
        gradients(mixer, expected.square().sum()),
        strict=True,
    ):
        assert_close(got, grad, RELATIVE[torch.float64])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"attention_mask": torch.full((2, 9), 0.5)}, "attention_mask must hold 0 .* and 1"),
        ({"attention_mask": torch.ones(2, 1, 9, 9).bool()}, "attention_mask must be"),
        ({"attention_mask": torch.ones(2, 8).bool()}, "attention_mask must cover .* 9 tokens"),
        ({"attention_mask": torch.ones(3, 9).bool()}, "attention_mask must cover the batch of 2"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens needs .* batch 1, got batch 2"),
        (
            {"cu_seqlens": torch.tensor([0, 9]), "attention_mask": torch.ones(2, 9).bool()},
            "exclude each other",
        ),
    ],
)
def test_calls_that_do_not_fit(mixer, tokens, arguments, message):
    """A call that does not fit is refused by a message that names the argument."""
    with pytest.raises(ValueError, match=message):
        mixer(tokens(2, 9), **arguments)


def test_hidden_states_of_a_wrong_rank_are_refused(mixer, tokens):
    """[T,hidden] and an empty sequence are refused."""
    for x in (tokens(1, 9)[0], tokens(1, 9)[:, :0]):
        with pytest.raises(ValueError, match="hidden_states must be"):
            mixer(x)


def test_registry_names_what_is_unknown():
    """build_mixer refuses an unknown mixer or option by name and says what there is."""
    with pytest.raises(ValueError, match=r"unknown mixer 'mamba'.*gka, attention"):
        build_mixer("mamba")
    with pytest.raises(ValueError, match=r"'attention' has no option num_iter; it has hidden_size"):
        build_mixer("attention", hidden_size=8, num_heads=2, num_iter=3)
    assert list(MIXERS) == ["gka", "attention", "swa", "gla", "deltanet", "gated_deltanet"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_kv_heads": 3}, "num_heads = 4 must be a multiple of num_kv_heads = 3"),
        ({"num_heads": 0, "num_kv_heads": None}, "num_heads must be a positive integer, got 0"),
        ({"head_dim": -2}, "head_dim must be a positive integer"),
        ({"hidden_size": 2.5}, "hidden_size must be a positive integer"),
    ],
)
def test_sizes_that_do_not_fit(name, make, options, message):
    """A mixer refuses sizes that do not fit when it is constructed."""
    with pytest.raises(ValueError, match=message):
        make(name, **options)
