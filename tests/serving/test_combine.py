"""Sessions that read their texts apart, combined."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gka import GenerationSession
from gka.errors import InputError
from gka.models import GKAForCausalLM, cache_tensors
from tolerances import assert_close

Build = Callable[..., GKAForCausalLM]
Ids = Callable[..., Tensor]


def read(model: GKAForCausalLM, tokens: Tensor, mask: Tensor | None = None) -> GenerationSession:
    return GenerationSession(model, track_decay=True, prefill_chunk=7).append(tokens, mask)


def states(session: GenerationSession) -> dict[str, Tensor]:
    return cache_tensors(session._contents.cache)


@pytest.mark.parametrize("fields", [{}, {"use_forgetting_gate_kk": False}, {"mixers": ["gla"]}])
def test_sequence_equals_one_reading(build: Build, ids: Ids, fields: dict[str, Any]):
    """In one layer without convolutions, states combined in sequence are those of one reading, to 1e-12,
    and so is the text that follows."""
    fields = {"num_hidden_layers": 1, "conv_size": 1, "use_v_conv": False, **fields}
    if "mixers" in fields:
        del fields["num_hidden_layers"]
    model = build(**fields).double()
    a, b, c = (ids(2, n, seed=n) for n in (20, 33, 9))
    apart = GenerationSession.combine([read(model, x) for x in (a, b, c)])
    together = read(model, torch.cat([a, b, c], 1))
    for name, x in states(together).items():
        if "recurrent" in name:
            assert_close(states(apart)[name], x, 1e-12, name)
    assert_close(apart.log_decay[0], together.log_decay[0], 1e-12)
    assert apart.num_tokens == 62 and apart.logits is None
    for session in (apart, together):
        session.append(ids(2, 3, seed=8))
    assert_close(apart.logits, together.logits, 1e-12)  # type: ignore[arg-type]


def test_track_decay_sums_the_layers_log_decays(build: Build, ids: Ids):
    """The totals are the sums of g over the tokens, padding left out, whatever the pieces."""
    model, mask = build(mixers=["gka", "attention", "gla"]).double(), torch.ones(2, 30).long()
    mask[1, :11] = 0
    seen: dict[int, Tensor] = {}
    for layer in (0, 2):
        mixer: Any = model.model.layers[layer].mixer
        mixer.register_forward_pre_hook(
            lambda m, args, kwargs: seen.update({m.layer_idx: m.gates(args[0]).g}),
            with_kwargs=True,
        )
    found = read(model, ids(2, 30), mask).log_decay
    with torch.no_grad():
        model(ids(2, 30), attention_mask=mask, use_cache=False)
    assert set(found) == {0, 2}
    for layer, g in seen.items():
        assert_close(found[layer], (g * mask[..., None]).sum(1), 1e-12)


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_sum_and_mean(build: Build, ids: Ids, how: str):
    """Recurrent states are summed or averaged, convolutions are the last text's; decays stay untracked."""
    model = build(mixers=["gka", "gla"])
    parts = [GenerationSession(model).append(ids(2, n, seed=n)) for n in (6, 9, 14)]
    found = GenerationSession.combine(parts, how=how)
    for name, x in states(found).items():
        each = torch.stack([states(part)[name] for part in parts])
        expected = each[-1] if "conv" in name else getattr(each, how)(0)
        assert_close(x, expected, 1e-6, name)
    assert not found.tracks_decay
    before = {name: x.clone() for name, x in states(parts[-1]).items()}
    found.append(ids(2, 3))
    assert all(torch.equal(x, before[name]) for name, x in states(parts[-1]).items())


@pytest.mark.parametrize("mixer", ["attention", "swa"])
@pytest.mark.parametrize("how", ["sequence", "sum", "mean"])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_keys_stand_in_their_places(
    build: Build, ids: Ids, mixer: str, how: str, padded: bool
):
    """A layer of attention alone, whose keys do not depend on what came before, answers after combined
    readings what it answers after one: keys are turned to the places they then have."""
    model = build(mixers=[mixer], sliding_window=20).double()
    parts = [ids(2, n, seed=n) for n in (6, 3, 14)]
    masks = [torch.ones_like(x) for x in parts]
    if padded:
        masks[0][1, :2], masks[1][0, :1], masks[2][1, :5] = 0, 0, 0
    apart = GenerationSession.combine(
        [read(model, x, m) for x, m in zip(parts, masks, strict=True)], how=how
    )
    together = read(model, parts[0], masks[0])
    for x, m in zip(parts[1:], masks[1:], strict=True):
        together.append(x, m)
    for name, x in states(together).items():
        assert states(apart)[name].shape == x.shape
    for session in (apart, together):
        session.append(ids(2, 4, seed=8))
    assert_close(apart.logits, together.logits, 1e-10)  # type: ignore[arg-type]


def test_what_cannot_be_combined_says_why(build: Build, ids: Ids):
    """Other models, batches and layers, untracked decays, unknown ways: an error that names which."""
    model, other = build(mixers=["gka"]), build(mixers=["deltanet"])
    one, two = (GenerationSession(model).append(ids(n, 4)) for n in (1, 2))
    unread = GenerationSession(model)
    deltas = [GenerationSession(other).append(ids(1, 4)) for _ in range(2)]
    combine = GenerationSession.combine
    for call, message in (
        (lambda: combine([one]), "two or more that share one model"),
        (lambda: combine([one, deltas[0]]), "share one model"),
        (lambda: combine([one, two], how="sum"), "equally many rows in each, got 1, 2"),
        (lambda: combine([one, unread], how="sum"), "got 1, nothing read"),
        (lambda: combine([one, one.fork()]), "track_decay=True"),
        (lambda: combine([one, one.fork()], how="max"), "expected one of sequence, sum, mean"),
        (lambda: combine(deltas, how="sum"), "is a DeltaNet, whose state is no decayed sum"),
        (lambda: combine([one, one.fork()], how="sum").generate(1), "append the beginning"),
    ):
        with pytest.raises(InputError, match=message):
            call()
