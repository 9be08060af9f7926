"""Formats of stored states, and errors measured against float64."""

import pytest
import torch

from gka.experiments.reproduce import state_precision
from gka.experiments.reproduce.storage_formats import FORMATS, Format, Stored
from gka.ops import fused_recurrent_gka


def stored(kind: Format, start: torch.Tensor) -> Stored:
    return Stored(start, kind, torch.Generator().manual_seed(0))


def test_nearest_formats_are_torchs() -> None:
    """bfloat16 and float16 round as torch does; int8 within half a step of each row's largest entry."""
    torch.manual_seed(0)
    write = torch.randn(50, 4, 8) * torch.logspace(-6, 3, 50)[:, None, None]
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        state = stored(Format(name), torch.zeros_like(write))
        state.update(1.0, write)
        assert torch.equal(state.read, write.to(dtype).float())
    state = stored(Format("int8"), torch.zeros_like(write))
    state.update(1.0, write)
    step = write.abs().amax(-1, keepdim=True) / 127
    assert ((state.read - write).abs() <= 0.501 * step).all()
    assert ((state.read / step).round() - state.read / step).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["bfloat16", "float16", "int8"])
def test_stochastic_rounding_is_right_on_average(name: str) -> None:
    """Each value is one of its two neighbours, and the mean over many draws is the value itself."""
    values = torch.tensor([1.0, 0.3333, -0.7171, 0.01234])
    state = stored(Format(name, "stochastic"), torch.zeros(20000, 4))
    state.update(1.0, values.expand(20000, 4).contiguous())
    unit = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "int8": 1 / 127}[name]
    assert all(len(column.unique()) <= 2 for column in state.read.T)
    assert ((state.read.mean(0) - values).abs() < 0.02 * unit).all()
    assert ((state.read - values).abs() <= unit * 1.001).all()


def test_feedback_returns_what_rounding_lost() -> None:
    """Ten thousand writes of a hundredth: rounding to nearest stalls, feedback counts them all."""
    write = torch.full((1, 2), 0.01)
    for name in ("bfloat16", "float16", "int8"):
        plain, fed = (
            stored(Format(name, way), torch.ones(1, 2) * 50) for way in ("nearest", "feedback")
        )
        for _ in range(1000):
            plain.update(1.0, write)
            fed.update(1.0, write)
        assert (fed.read - 60).abs().max() < 0.6 and Format(name, "feedback").bytes_per_entry(
            64
        ) >= 2
        if name == "bfloat16":
            assert torch.equal(plain.read, torch.full((1, 2), 50.0))
    assert len(set(map(str, FORMATS))) == 10


def test_float32_decoding_is_that_of_the_op() -> None:
    """The readout of stored float32 states equals the op's, decayed token by token, within rounding."""
    size = state_precision.Size(40, 2, 8, 3)
    found = state_precision.measure(size, -0.001, Format("float32"), 0, "cpu")
    assert found["tokens"] == [16, 25, 40] and max(found["errors"]) < 1e-5
    k, v = (x[:40].double()[None] for x in state_precision.drawn(size, 0, 0))
    q = state_precision.queries(size, 0).double()
    g = torch.full((1, 40, 2), -0.001, dtype=torch.float64)
    for i in range(3):  # the op reads with one query a token: the last token's is ours
        asked = torch.zeros_like(k)
        asked[0, -1] = q[:, i]
        o, _ = fused_recurrent_gka(asked, k, v, g, g, scale=1.0, backend="torch")
        truth = state_precision.truth(size, float(torch.tensor(-0.001)), 0)[-1][:, i]
        torch.testing.assert_close(o[0, -1], truth, rtol=1e-5, atol=1e-7)
