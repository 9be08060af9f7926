"""Run a call, compute its float64 answer and its conditioning, and judge every output and gradient."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fuzz import truth
from fuzz.draw import Call
from gka.maths.solvers.chebyshev import chebyshev_bound
from gka.ops import chunk_gka, chunk_simple_gla, fused_recurrent_gka, last_backend
from gka.ops.decode import advance_states_, fused_recurrent_gka_
from gka.ops.delta_rule import CHUNK_SIZE, chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from problems import Problem
from tolerances import RELATIVE

GKA_OPS = {"chunk_gka": chunk_gka, "fused_recurrent_gka": fused_recurrent_gka}
DELTA_OPS = {
    "chunk_gated_delta_rule": chunk_gated_delta_rule,
    "fused_recurrent_gated_delta_rule": fused_recurrent_gated_delta_rule,
}
# Size of the relative change of every number by which the conditioning is measured.
STEP = 1e-8
SEEDS = 1_000_003  # apart are the seeds of a call's draws
# Roundings of every number that an answer may have: 30 steps of a solve have as many, one upon another.
ROUNDINGS = 48.0
# Draws of those roundings. One is enough to find an answer right; what it finds wrong is judged by the root
# mean square of all, for where one number decides, one draw's effect may be near 0.
DRAWS = 16
# Of the largest number: beyond this the float64 answer is out of the dtype's range.
MARGIN = 1e-2


@dataclass
class Finding:
    """One output or gradient of one call.

    Attributes:
        name: "o", "h", "u", or "d" and an input.
        error: |actual - expected| over what it may be; 1 or less is right; inf where not finite.
        relative: |actual - expected| / |expected|.
    """

    name: str
    error: float
    relative: float
    dtype: str


@dataclass
class Verdict:
    """What a call came to.

    Attributes:
        status: "right", "wrong", "non-finite", "border" (a history at the threshold of the empty one, not
            compared) or "raised".
    """

    status: str = "right"
    findings: list[Finding] = field(default_factory=list)
    message: str = ""

    @property
    def worst(self) -> Finding | None:
        return max(self.findings, key=lambda f: f.error, default=None)


def upstream(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the results that every dtype holds exactly."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randint(-4, 5, x.shape, generator=generator).double() / 4
        for name, x in sorted(results.items())
    }


def with_gradients(
    run: Callable[[Problem], dict[str, Tensor]], problem: Problem, call: Call
) -> dict[str, Tensor]:
    """Results, and the gradients that the call wants, as d<name>."""
    leaves = problem.map(lambda x: x.detach())
    tensors = leaves.tensors()
    for name in call.wanted:
        tensors[name].requires_grad_()
    with torch.set_grad_enabled(bool(call.wanted)):
        results = run(leaves)
        if not call.wanted:
            return results
        used = {name: results[name] for name in call.used}
        loss = sum((x.double() * upstream(used)[name]).sum() for name, x in used.items())
    found = {f"d{name}": torch.zeros_like(tensors[name]) for name in call.wanted}
    if isinstance(loss, Tensor) and loss.requires_grad:
        grads = torch.autograd.grad(loss, [tensors[n] for n in call.wanted], allow_unused=True)
        given = zip(call.wanted, grads, strict=True)
        found |= {f"d{name}": grad for name, grad in given if grad is not None}
    if "dh0" in found:
        found["dh0"] = (found["dh0"] + found["dh0"].mT) / 2
    return {name: x.detach() for name, x in (results | found).items()}


def run_op(call: Call, p: Problem) -> dict[str, Tensor]:
    """Outputs and final states by the op itself."""
    common = {"output_final_state": True, "cu_seqlens": p.cu_seqlens, **call.settings}
    if call.is_delta:
        op = DELTA_OPS[call.op]
        o, u = op(p.q, p.k, p.v, p.g, p.beta, initial_state=p.u0, **common)
        assert u is not None
        return {"o": o, "u": u}
    common["backend"] = call.backend
    if call.op == "chunk_simple_gla":
        o, u = chunk_simple_gla(p.q, p.k, p.v, p.g, beta=p.beta, initial_state=p.u0, **common)
        assert u is not None
        return {"o": o, "u": u}
    state = None if p.h0 is None or p.u0 is None else (p.h0, p.u0)
    o, final = GKA_OPS[call.op](
        p.q, p.k, p.v, p.g, p.g if p.tied else p.gk, p.alpha, beta=p.beta, initial_state=state, **common
    )  # fmt: skip
    assert final is not None and last_backend() == call.backend
    return {"o": o, "h": final[0], "u": final[1]}


def run_in_place(call: Call, p: Problem, counts: Tensor) -> dict[str, Tensor]:
    """The ops on a pool of states: every state but the last sequence's own, which has none."""
    assert p.h0 is not None and p.u0 is not None
    batch = p.q.shape[0]
    order = torch.randperm(batch + 2, generator=torch.Generator().manual_seed(batch))[:batch]
    h = torch.full((batch + 2, *p.h0.shape[1:]), torch.nan, dtype=p.h0.dtype)
    u = torch.full((batch + 2, *p.u0.shape[1:]), torch.nan, dtype=p.u0.dtype)
    h[order], u[order] = p.h0, p.u0
    gates = {"g": p.g, "gk": p.g if p.tied else p.gk, "beta": p.beta}
    pool = {"state": (h, u), "state_indices": order, "backend": call.backend}
    results = {}
    if call.op == "advance_states_":
        advance_states_(p.k, p.v, **gates, counts=counts, **pool)
    else:
        results["o"] = fused_recurrent_gka_(
            p.q, p.k, p.v, alpha=p.alpha, **gates, **pool, **call.settings
        )
    others = torch.ones(batch + 2, dtype=torch.bool)
    others[order] = False
    assert bool(h[others].isnan().all()) and bool(u[others].isnan().all()), "another place changed"
    return results | {"h": h[order], "u": u[order]}


def expected_in_place(
    call: Call, p: Problem, counts: Tensor, rounded: truth.Rounding
) -> dict[str, Tensor]:
    settings = _truth_settings(call, p)
    if call.op == "fused_recurrent_gka_":
        results = truth.answer(p, truth.gka_sequence, rounded, **settings)
        if not call.settings["commit"]:
            results |= _untouched(p)
        return results
    rows = []
    for b, count in enumerate(counts.clamp(0, p.q.shape[1]).tolist()):
        one = p.map(lambda x, b=b: x[b : b + 1]).tokens(0, count)
        rows.append(truth.answer(one, truth.gka_sequence, rounded, **settings))
    if not rows:
        return _untouched(p)
    return {name: torch.cat([row[name] for row in rows]) for name in ("h", "u")}


def _untouched(p: Problem) -> dict[str, Tensor]:
    assert p.h0 is not None and p.u0 is not None
    return {"h": p.h0, "u": p.u0}


def _truth_settings(call: Call, p: Problem) -> dict:
    scale = call.settings.get("scale")
    settings = {"scale": p.q.shape[-1] ** -0.5 if scale is None else scale}
    if call.is_delta:
        return settings | {"chunk_size": CHUNK_SIZE if call.op.startswith("chunk") else None}
    ridge_ratio, num_iter = call.settings.get("ridge_ratio", 1.0), call.settings.get("num_iter", 0)
    return settings | {"ridge_ratio": ridge_ratio, "num_iter": num_iter}


def expect(call: Call, p: Problem, rounded: truth.Rounding) -> dict[str, Tensor]:
    """The float64 answer."""
    if call.is_delta:
        return truth.answer(p, truth.delta_sequence, rounded, **_truth_settings(call, p))
    found = truth.answer(p, truth.gka_sequence, rounded, **_truth_settings(call, p))
    if call.op == "chunk_simple_gla":
        del found["h"]
    return found


def nudged(problem: Problem, rounded: truth.Rounding) -> Problem:
    """Every number of a float64 problem rounded; H stays symmetric."""
    changed = problem.map(rounded.change)
    return changed if changed.h0 is None else replace(changed, h0=(changed.h0 + changed.h0.mT) / 2)


def judge_call(call: Call, seed: int = 0) -> Verdict:
    """Run it and say what came of it."""
    p = call.problem
    counts = torch.tensor(
        [random.Random(seed + b).randint(-1, p.q.shape[1] + 1) for b in range(len(p.q))]
    )
    counts = counts.long()
    try:
        if call.in_place:
            with torch.no_grad():
                actual = run_in_place(call, p, counts)
        else:
            actual = with_gradients(lambda x: run_op(call, x), p, call)
    except Exception as error:
        return Verdict("raised", message=f"{type(error).__name__}: {error}")

    def double(x: Problem, rounded: truth.Rounding) -> dict[str, Tensor]:
        with truth.as_the_library(call.work, call.backend != "reference", rounded) as threshold:
            if call.in_place:
                found = expected_in_place(call, x, counts, rounded)
            else:
                found = with_gradients(lambda y: expect(call, y, rounded), x, call)
        return found | {"near": torch.tensor(threshold.near)}

    wide = p.map(lambda x: x.detach().double().clone())

    def draw(number: int) -> dict[str, Tensor]:
        rounded = truth.Rounding(
            STEP, seed + SEEDS * number, torch.finfo(call.work).smallest_normal
        )
        return double(nudged(wide, rounded), rounded)

    expected, other = double(wide, truth.EXACT), draw(0)
    if bool(expected.pop("near")) or bool(other.pop("near")):
        return Verdict("border")
    return judge_by_draws(
        lambda changes: judge(actual, expected, changes, call), expected, other, draw
    )


def judge_by_draws(
    verdict_of: Callable[[dict[str, float]], Verdict], expected: dict[str, Tensor],
    first: dict[str, Tensor], draw: Callable[[int], dict[str, Tensor]],
) -> Verdict:  # fmt: skip
    """The verdict by one draw of roundings, or by all DRAWS if that one finds the call wrong.

    Args:
        verdict_of: of the sizes of the changes that roundings of one unit make.
        first, draw: the answers with the roundings drawn first, and with those of a number.
    """
    verdict = verdict_of(changes_of(expected, [first]))
    if verdict.status != "wrong" or verdict.message:
        return verdict
    others = [first, *(draw(number) for number in range(1, DRAWS))]
    return verdict_of(changes_of(expected, others))


def changes_of(expected: dict[str, Tensor], others: list[dict[str, Tensor]]) -> dict[str, float]:
    """Root mean square, over the other answers, of each result's change per unit of rounding."""
    squares = {
        name: [((other[name] - x).norm().item() / STEP) ** 2 for other in others]
        for name, x in expected.items()
    }
    return {name: (sum(found) / len(found)) ** 0.5 for name, found in squares.items()}


def judge(
    actual: dict[str, Tensor], expected: dict[str, Tensor], changes: dict[str, float], call: Call
) -> Verdict:
    """Compare name by name; `changes`: what a unit of rounding changes each by, in the 2-norm."""
    verdict = Verdict()
    if set(actual) != set(expected):
        return Verdict("wrong", message=f"got {sorted(actual)}, expected {sorted(expected)}")
    # The derivative of a decay is a sum of products of pairs; float16 operands, scaled by their largest,
    # have nothing of pairs that have faded below its smallest number.
    half = call.backend == "triton" and call.problem.q.dtype != torch.float32
    used = {name: expected[name] for name in call.used if name in expected}
    loss = sum((x * upstream(used)[name]).norm().item() for name, x in used.items())
    loss *= torch.finfo(torch.float16).smallest_normal if half else 0.0
    for name, x in actual.items():
        floor = loss if name in ("dg", "dgk") else 0.0
        found = finding(name, x, expected[name], changes[name], call, floor)
        if found is None:
            continue
        verdict.findings.append(found)
        if found.error == float("inf"):
            verdict.status = "non-finite"
        elif not found.error <= 1 and verdict.status == "right":
            verdict.status = "wrong"
    return verdict


def finding(
    name: str, x: Tensor, expected: Tensor, change: float, call: Call, floor: float = 0.0
) -> Finding | None:
    """One output's error over its tolerance; None where float64's answer is out of the dtype's range.

    `change`: its conditioning, as `judge` has it. `floor`: what an error may be whatever the answer's size.
    """
    if x.shape != expected.shape:
        return Finding(name, float("inf"), float("inf"), "shape")
    if x.numel() == 0:
        return None
    info = torch.finfo(x.dtype)
    size = expected.abs().max().item()
    if not size < MARGIN * min(info.max, torch.finfo(call.work).max):
        return None
    if not bool(x.isfinite().all()):
        return Finding(name, float("inf"), float("inf"), str(x.dtype))
    norm, error = expected.norm().item(), (x.double() - expected).norm().item()
    allowed = tolerance(x.dtype, norm, change, x.numel(), call) + floor
    return Finding(name, error / allowed, error / norm if norm > 0 else error, str(x.dtype))


def tolerance(dtype: torch.dtype, norm: float, change: float, count: int, call: Call) -> float:
    """What the error's 2-norm may be.

    The table's tolerance of the dtype, as for well conditioned answers; what rounding every number a few
    times would do; the smallest numbers of the dtype; and, for solvers whose steps are their own, twice
    the error bound that they share with num_iter steps.
    """
    info = torch.finfo(dtype)
    unit = torch.finfo(call.work).eps / 2
    relative = max(RELATIVE[dtype], RELATIVE[call.work])
    if call.backend == "triton" and call.problem.q.dtype != torch.float32:
        unit, relative = 2.0**-11, max(relative, RELATIVE[torch.float16])  # float16 operands
    if call.settings.get("solver") in ("adaptive", "cg"):
        bound = chebyshev_bound(call.settings["ridge_ratio"], call.settings["num_iter"])
        relative, unit = relative + 2 * bound, unit + 2 * bound
    smallest = max(info.smallest_normal, torch.finfo(call.work).smallest_normal)
    smallest *= max(info.eps, 1e-3) * count**0.5
    return relative * norm + ROUNDINGS * unit * change + smallest
