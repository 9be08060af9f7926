"""What the ablations add to the library's layer, against independent routes; their training and data."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from gka.experiments.reproduce import ablation_training, ablations, few_steps
from gka.experiments.reproduce.ablation_models import (
    BASE,
    CONSTANT,
    VARIANTS,
    Ridge,
    Variant,
    build,
)
from gka.experiments.reproduce.ablation_training import Budget, Trainer, seen_before
from gka.maths.solvers.exact import exact_solve
from gka.ops import chunk_gka
from tolerances import RELATIVE, assert_close

DIM = 8


def inputs(length: int) -> list[Tensor]:
    """q, k, v, g, alpha, beta in float64, one head pair, with gradients."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    q, k = (torch.nn.functional.normalize(draw(1, length, 2, DIM), dim=-1) for _ in range(2))
    g = -draw(1, length, 2).square() / 20
    alpha, beta = (draw(1, length, 2).sigmoid() for _ in range(2))
    return [x.requires_grad_() for x in (q, k, draw(1, length, 2, DIM), g, alpha, beta)]


def gradients(o: Tensor, given: list[Tensor]) -> list[Tensor]:
    """Output and gradients of a fixed sum."""
    weights = torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view_as(o)
    return [o, *torch.autograd.grad((o * weights).sum(), given)]


def compare(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for name, x, y in zip(("o", "q", "k", "v", "g", "alpha", "beta"), found, wanted, strict=True):
        assert_close(x, y, tolerance, name)


def solved(ridge: Ridge, length: int) -> list[Tensor]:
    given = inputs(length)
    q, k, v, g, alpha, beta = given
    return gradients(ridge.op(q, k, v, g, g, alpha, beta=beta, scale=1.0), given)


def test_a_constant_ridge_is_the_exact_one() -> None:
    """lambda_t = 0.25 with many steps: output and gradients are those of a Cholesky solve at every token."""
    given = inputs(64)
    q, k, v, g, alpha, beta = given
    k, v = beta.unsqueeze(-1) * k, beta.unsqueeze(-1) * v
    h = u = torch.zeros(1, 2, DIM, DIM, dtype=torch.float64)
    outputs = []
    for t in range(64):
        fade = g[:, t].exp()[..., None, None]
        h = fade * h + k[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
        u = fade * u + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        x = exact_solve(h, q[:, t], torch.full((1, 2), 0.25, dtype=torch.float64))
        z = q[:, t] + alpha[:, t].unsqueeze(-1) * (x - q[:, t])
        outputs.append((z.unsqueeze(-2) @ u).squeeze(-2))
    wanted = gradients(torch.stack(outputs, 1), given)
    compare(solved(Ridge(0.0, 0.25, 120), 64), wanted, RELATIVE[torch.float64])


@pytest.mark.parametrize(("kind", "backend"), [("implicit", "torch"), ("iteration", "reference")])
def test_few_steps_have_two_gradients(kind: str, backend: str) -> None:
    """Of 3 steps, the implicit gradient is the library's, the other autograd's through the reference."""
    given = inputs(64)
    q, k, v, g, alpha, beta = given
    o, _ = chunk_gka(q, k, v, g, g, alpha, 1.0, num_iter=3, beta=beta, backend=backend)
    ridge = Ridge(num_iter=3, derivative=kind)  # pyright: ignore[reportArgumentType]
    compare(solved(ridge, 64), gradients(o, given), RELATIVE[torch.float64])


def losses(variant: Variant, like: Variant) -> list[float]:
    """Loss and gradient norm of both models' same batch."""
    ids = torch.arange(128).view(2, 64) % 50
    found = []
    for one in (variant, like):
        model = build(one, 2, 32, 2, 64, 0)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
        found += [loss.item(), norms.norm().item()]
    return found


def test_layers_with_another_solve_are_the_librarys_where_it_has_the_solve() -> None:
    """The same ridge and steps: the same loss and gradient norm."""
    loss, norm, like, norm_like = losses(Variant("", ridge=Ridge()), BASE)
    assert loss == pytest.approx(like, rel=1e-5) and norm == pytest.approx(norm_like, rel=1e-3)


def test_a_decay_of_its_own_begins_as_the_shared_one() -> None:
    """Loss of the baseline before training; and its gates have gradients of their own."""
    variant = next(v for v in VARIANTS if v.own_decay)
    loss, _, like, _ = losses(variant, BASE)
    assert loss == pytest.approx(like, rel=1e-6)
    model = build(variant, 1, 32, 2, 64, 0)
    ids = torch.arange(64).view(1, 64) % 50
    model(input_ids=ids, labels=ids).loss.backward()
    mixer = model.model.layers[0].mixer
    of_h, of_u = mixer.decay_h.a_proj.weight.grad, mixer.a_proj.weight.grad
    assert of_h.norm() > 0 and not torch.allclose(of_h, of_u)


def test_variants_begin_with_the_baselines_weights() -> None:
    """Whatever a variant leaves out, the parameters that it shares are equal."""
    base = build(BASE, 1, 32, 2, 64, 3).state_dict()
    for variant in VARIANTS:
        own = build(variant, 1, 32, 2, 64, 3).state_dict()
        same = [n for n in own if n in base and own[n].shape == base[n].shape]
        assert len(same) > 10 and all(torch.equal(own[n], base[n]) for n in same), variant.name


def test_bytes_seen_before_end_a_run_of_eight() -> None:
    """The second occurrence of a run of eight bytes, from its eighth byte on."""
    ids = torch.tensor([[*range(10), 99, *range(10)], [7] * 21])
    found = seen_before(ids)
    assert found[0].nonzero().flatten().tolist() == [18, 19, 20]
    assert found[1].nonzero().flatten().tolist() == list(range(8, 21))


def test_held_out_text_is_of_other_documents() -> None:
    """Whole sequences of bytes and ends of documents, hardly any of them in both parts."""
    training, held, _ = ablation_training.corpus(64, 60)
    assert training.shape[1] == held.shape[1] == 64 and int(training.max()) == 256
    known = {tuple(row) for row in training.tolist()}
    assert sum(tuple(row) in known for row in held.tolist()) < len(held) / 10


@pytest.mark.slow
def test_training_lowers_the_loss_and_keeps_both_curves() -> None:
    """Losses and norms of every step; times of windows."""
    budget = Budget(length=64, batch=2, steps=24, rate=5e-3, held_out=32, documents=60)
    trainer = Trainer(build(BASE, 1, 32, 1, 64, 0), budget, 0, "cpu")
    before = trainer.held_out()
    found = ablation_training.train(trainer)
    assert len(found["losses"]) == len(found["norms"]) == 24 and found["diverged"] is None
    assert found["losses"][-1] < found["losses"][0] - 0.5 and found["ms"] > 0
    after = trainer.held_out()
    assert after["loss"] < before["loss"] - 0.5
    assert min(after["seen"], after["new"]) < after["loss"] < max(after["seen"], after["new"])


def test_divergence_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step from which loss or norm is not finite, and None for figures after it."""
    budget = Budget(length=64, batch=2, steps=4, rate=math.inf, held_out=2, documents=60)
    found = ablation_training.train(Trainer(build(BASE, 1, 32, 1, 64, 0), budget, 0, "cpu"))
    assert found["diverged"] == 1 and found["losses"][0] is not None and found["losses"][2] is None


def result(variant: str, seed: int, loss: float, norms: list[float | None]) -> dict:
    return {"variant": variant, "seed": seed, "loss": loss, "norms": norms}


def test_statements_compare_seed_by_seed() -> None:
    """A variant's difference is to the baseline of the same seed; a constant ridge is judged by its norms."""
    results = [
        *(result("baseline", seed, 1.0 + seed, [1.0] * 20) for seed in range(3)),
        *(result("no decay", seed, 1.04 + 1.01 * seed, [1.0] * 20) for seed in range(3)),
        *(result("8 steps", seed, 1.01 + seed, [1.0] * 20) for seed in range(2)),
        result(CONSTANT.name, 0, 1.5, [99.0, 99.0, 1.0, 40.0, *[2.0] * 16]),
    ]  # fmt: skip
    for row in results[:3]:
        row["read_with"] = {"3": row["loss"] + 1, "15": row["loss"], "30": row["loss"]}
    found = {check.text.split(":")[0]: check for check in ablations.checks(results)}
    assert found["no decay"].passed and found["no decay"].found == "0.05"
    assert found["constant ridge 0.25"].passed and found["constant ridge 0.25"].found == "20"
    assert found["no alpha"].passed is None
    assert found["8 steps in training"].passed is None  # two seeds decide nothing


def test_paths_through_h_and_u_cancel_with_an_exact_solve() -> None:
    """With 3 steps' implicit gradient less cancels than with the 3 steps' own derivative."""
    model = build(BASE, 2, 64, 2, 128, 0)
    ids = ablation_training.corpus(64, 60)[0][:2].long()
    rows = {
        (r["steps"], r["kind"]): r
        for r in few_steps.mean_paths(few_steps.memory_inputs(model, ids))
    }
    exact, few, own = rows[30, "implicit"], rows[3, "implicit"], rows[3, "iteration"]
    assert exact["both"] == pytest.approx(1, abs=0.05)
    assert min(exact["h"], exact["u"]) > 1.5 * exact["both"]
    assert few["u"] == own["u"] and few["both"] > 1.02 * own["both"]


def test_paths_are_the_librarys_gradient() -> None:
    """Both together are the gradient that `chunk_gka` gives the keys, for the same direction."""
    q, k, v, g, alpha, beta = (x.detach() for x in inputs(64))
    h, u = few_steps.paths((q, k, v, g, alpha, beta), 5, "implicit")
    k.requires_grad_()
    o, _ = chunk_gka(q, k, v, g, g, alpha, num_iter=5, beta=beta, backend="torch")
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    direction = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(0))
    wanted = torch.autograd.grad((o * direction).sum(), k)[0]
    assert_close(h + u, wanted, 1e-6, "k")
