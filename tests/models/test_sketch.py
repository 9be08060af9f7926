"""Sketches of trained models: bases measured from H_t, and models that solve in them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gka import GenerationSession
from gka.checkpoints.save import save_as
from gka.errors import InputError
from gka.maths.sketch import project, spectral_basis
from gka.models import GKAConfig, GKAForCausalLM
from gka.models.flops import mixer_flops
from gka.models.sketch import fix_sketch, measure_bases, measure_moments, sketched
from gka.serving import inspect_model
from gka.training.health import measure_health
from tolerances import assert_close

Build = Callable[..., GKAForCausalLM]
Ids = Callable[..., Tensor]
FIELDS: dict[str, Any] = {"mixers": ["gka", "attention", "gka"], "num_kv_heads": 2}


def test_moments_are_those_of_the_recursion(build: Build, ids: Ids) -> None:
    """The mean of H_t / |H_t| after 64, 128 and all 150 tokens, texts and query heads of each key head."""
    model, tokens = build(**FIELDS), ids(2, 150)
    seen: dict[str, Any] = {}
    layer: Any = model.model.layers[2].mixer
    plain = layer.mix

    def look(q: Tensor, k: Tensor, v: Tensor, gates: Any, call: Any) -> Any:
        seen.update(k=k.double(), g=gates.g.double(), beta=gates.beta.double())
        return plain(q, k, v, gates, call)

    layer.mix = look
    with torch.no_grad():
        model(input_ids=tokens)
    k = seen["k"].repeat_interleave(2, 2) * seen["beta"].unsqueeze(-1)
    h, found = torch.zeros(2, 4, 8, 8, dtype=torch.float64), []
    for t in range(150):
        h = seen["g"][:, t].exp()[..., None, None] * h + k[:, t, :, :, None] * k[:, t, :, None]
        if t + 1 in (64, 128, 150):
            found.append(h / h.square().sum((-2, -1), keepdim=True).sqrt())
    expected = torch.stack(found).mean((0, 1)).unflatten(0, (2, 2)).mean(1)
    moments = measure_moments(model, tokens)
    assert set(moments) == {0, 2}
    assert_close(moments[2], expected, 1e-5)
    assert_close(measure_bases(model, tokens, 3)[2], spectral_basis(moments[2], 3), 1e-12)


@torch.no_grad()
def test_a_sketch_keeps_all_other_weights(build: Build, ids: Ids) -> None:
    """At d = K the model is the same; below, it solves in the spans that it was given. A learned map that
    begins there is the same function, and so is its fixed copy."""
    model, tokens = build(**FIELDS, tie_word_embeddings=True), ids(2, 70)
    logits = model(tokens).logits
    assert_close(sketched(model, 8)(tokens).logits, logits, 2e-5)
    bases = measure_bases(model, ids(2, 150, seed=5), 3)
    fixed, random = sketched(model, 3, bases), sketched(model, 3)
    found = fixed(tokens).logits
    for index, basis in bases.items():
        mixer: Any = fixed.model.layers[index].mixer
        s = mixer.sketch_map().double()
        assert_close(s @ s.mT, basis @ basis.mT, 2e-5)
    for other in (logits, random(tokens).logits):
        assert (found - other).norm() > 1e-2 * logits.norm()
    assert fixed.lm_head.weight is fixed.model.embed_tokens.weight
    learned = sketched(fixed, 3, bases, kind="learned")
    assert learned.config.sketch == "learned" and fixed.config.sketch_dim == 3
    assert_close(learned(tokens).logits, found, 2e-5)
    assert_close(fix_sketch(learned)(tokens).logits, found, 2e-5)
    assert model.config.sketch_dim is None


@pytest.mark.parametrize("kind", ["learned", "fixed"])
def test_folders_keep_the_sketch(build: Build, ids: Ids, tmp_path: Path, kind: str) -> None:
    """Saved and loaded bit for bit, whether it is trained included; foreign formats are refused."""
    model, tokens = build(**FIELDS, sketch_dim=3, sketch=kind), ids(2, 20)
    model.save_pretrained(tmp_path / "ours")
    loaded: Any = GKAForCausalLM.from_pretrained(tmp_path / "ours")
    assert (loaded.config.sketch_dim, loaded.config.sketch) == (3, kind)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    maps = [p for n, p in loaded.named_parameters() if "sketch_map" in n]
    assert [p.requires_grad for p in maps] == [kind == "learned"] * 2
    with pytest.raises(InputError, match="cannot express sketch"):
        save_as(build(mixers=["gka"], sketch_dim=3, sketch=kind), tmp_path / "fla", format="fla")


@torch.no_grad()
def test_generation_sessions_and_measurements(build: Build, ids: Ids, tmp_path: Path) -> None:
    """`generate`, sessions and their files work; inspection and health are of the system that is solved."""
    model: Any = build(mixers=["gka", "gka"], sketch_dim=3)
    tokens = ids(2, 40)
    whole: Any = model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
    session = GenerationSession(model).append(tokens)
    session.save(tmp_path / "state")
    again = GenerationSession(model).load(tmp_path / "state")
    for one in (session, again):
        assert torch.equal(torch.stack(list(one.generate(6)), 1), whole[:, 40:])
    seen: dict[str, Any] = {}
    layer: Any = model.model.layers[0].mixer
    plain = layer.mix
    layer.mix = lambda q, k, *rest: seen.update(k=k) or plain(q, k, *rest)
    found = inspect_model(model, tokens[0], positions=1)["layers"][0]
    assert set(seen) == {"k"} and found["curves"]["error"][0][0] < found["error_bound"]
    norm = measure_health(model, tokens[:1])[0]["norm_h"]
    assert abs(norm / torch.tensor(found["curves"]["fro"][0]).mean() - 1) < 1e-4
    assert project(seen["k"], layer.sketch_map()).shape[-1] == 3


def test_flops_count_the_projection_and_the_smaller_solve() -> None:
    """At d = K without alpha only the projections are added; with alpha gla's own; they fall with d."""
    plain = mixer_flops("gka", 128, 64, 30) or 0.0
    gla = mixer_flops("gla", 128, 64) or 0.0
    assert mixer_flops("gka", 128, 64, 30, None, 128, False) == plain + 12 * 128**2
    assert mixer_flops("gka", 128, 64, 30, None, 128, True) == plain + 12 * 128**2 + gla
    counts = [mixer_flops("gka", 128, 64, 30, None, d, True) or 0.0 for d in (16, 32, 64)]
    assert counts == sorted(counts) and counts[1] < plain / 4


def test_wrong_arguments(build: Build, ids: Ids) -> None:
    """Models without Gated KalmaNet, bases of other layers and shapes, and fields out of range."""
    model, other = build(**FIELDS), build(mixers=["gla"])
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("no Gated KalmaNet layer", lambda: sketched(other, 3)),
        ("no Gated KalmaNet layer", lambda: measure_moments(other, ids(1, 5))),
        (r"expected ids \[N,T\]", lambda: measure_moments(model, ids(1, 5)[0])),
        ("no sketched layer", lambda: fix_sketch(model)),
        ("sketch_dim: expected", lambda: sketched(model, 9)),
        ("layer 1 is no Gated KalmaNet", lambda: sketched(model, 3, {1: torch.randn(2, 8, 3)})),
        ("a basis must be", lambda: sketched(model, 3, {0: torch.randn(2, 8, 2)})),
        (
            "sketch_dim: expected",
            lambda: GKAConfig(hidden_size=32, head_dim=8, num_heads=4, sketch_dim=9),
        ),
        (
            "sketch: expected one of",
            lambda: GKAConfig(hidden_size=32, num_heads=4, sketch="spectral"),
        ),
    ]
    for words, call in wrong:
        with pytest.raises(InputError, match=words):
            call()
