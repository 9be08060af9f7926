"""Loss and gradients' norm of a first step on every layout of n ranks, beside those of one rank.

The model is that of the cells, so that the check compiles no kernels of its own; layers run uncompiled.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from benchmarks.scale.cells import CP_MIXED, model_config
from benchmarks.scale.step import build, make_step, mean_over_ranks, random_rows

from gka.parallel import Job, Layout

ROWS, LENGTH = 8, 1024
BOUNDS = {"float32": (1e-5, 1e-3), "bfloat16": (2e-3, 3e-2)}
"""Largest relative differences of loss and norm: rounding of that type's products, in another order."""


def layouts(ranks: int) -> list[Layout]:
    """Those of the rows on that many ranks."""
    if ranks == 1:
        return []
    found = [Layout(dp_shard=ranks), Layout(cp=ranks)]
    if ranks % CP_MIXED == 0 and ranks > CP_MIXED:
        found.append(Layout(dp_shard=ranks // CP_MIXED, cp=CP_MIXED))
    return found


def first_step(job: Job, layout: Layout, name: str, tiny: bool) -> list[float]:
    """Loss and norm of the batch of ROWS rows, which all layouts share."""
    config, dtype = model_config(tiny), torch.bfloat16 if name == "bfloat16" else None
    rows = random_rows((ROWS, LENGTH // 4 if tiny else LENGTH), config.vocab_size, 1, job)
    each = ROWS // layout.readers
    at = layout.reader(job.rank) * each if layout.ranks > 1 else 0
    model = build(config, layout, job, dtype)
    step = make_step(model, layout, job, rows[at : at + each], cast=dtype is not None)
    return [mean_over_ranks(job, x) for x in step()]


def check(job: Job, names: Sequence[str], tiny: bool) -> dict[str, Any]:
    """Relative differences to one rank, by layout and type of products, and whether all are within BOUNDS."""
    found, good, began = [], True, time.perf_counter()

    def tell(text: str) -> None:
        if job.is_main:
            print(f"  check: {text} after {time.perf_counter() - began:.1f} s", flush=True)

    for name in names:
        one = first_step(job, Layout(), name, tiny)
        tell(f"one GPU, {name}")
        for layout in layouts(job.ranks):
            many = first_step(job, layout, name, tiny)
            tell(f"{layout}, {name}")
            apart = [abs(a - b) / abs(b) for a, b in zip(many, one, strict=True)]
            equal = all(x <= bound for x, bound in zip(apart, BOUNDS[name], strict=True))
            good &= equal
            found.append({
                "layout": str(layout), "dtype": name, "loss": many[0], "loss_of_one": one[0],
                "loss_apart": apart[0], "norm_apart": apart[1], "equal": equal,
            })  # fmt: skip
    return {"status": "ok" if good else "failed", "layouts": found}
