"""Conjugate gradients against the other solvers: `python -m gka.experiments.conjugate [name ...]`.

`steps`: steps and errors of solver="cg" for several keys and decays. `gradients`: weight gradients of several
Gated KalmaNet layers against those of the exact solve. Both depend only on the seed; --device cuda runs
them on a GPU, where each solver uses the backend of "auto". `cost`: processor time on the CPU.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, rms_norm, silu

from gka.experiments.ledger import Ledger, markdown_table, refusing
from gka.experiments.numerics import SEED, Table, family, relative, solve_errors, table
from gka.maths.solvers import cg
from gka.ops import chunk_gka, last_backend, solver_steps

KINDS = ("Gaussian", "SiLU", "SiLU, mean 1", "SiLU of power law")
DECAYS = (-1e-4, -2e-3, -5e-3, -2e-2, -1e-1, -5e-1, -1.2)
EXACT = 120  # Chebyshev steps that count as exact: 2 R^121 < 1e-14 at a = 0.02
SOLVERS = {
    "exact": ("chebyshev", EXACT),
    "chebyshev": ("chebyshev", 30),
    "adaptive": ("adaptive", 30),
    "cg": ("cg", 30),
}


@dataclass
class Sizes:
    """Sizes: `length` tokens, and `layers` layers of `heads` heads of dimension `dim`."""

    device: str
    length: int
    dim: int
    heads: int
    layers: int


def steps(sizes: Sizes) -> Table:
    """Steps of chunks of 64 for the error bound of 30 Chebyshev steps, float32, and errors with them."""
    rows = []
    for kind, decay in itertools.product(KINDS, DECAYS):
        torch.manual_seed(SEED)
        k, q = (
            family(name, sizes.length, sizes.dim).to(sizes.device) for name in (kind, "Gaussian")
        )
        gk = torch.full((1, sizes.length, 1), decay, device=sizes.device)
        counts = [solver_steps(k, gk, backend="torch"), solver_steps(k, gk, solver="cg", q=q)]
        adaptive, ours = (n[0, ::64, 0].double() for n in counts)
        errors = solve_errors(k, q, gk, "cg")
        means = (f"{adaptive.mean():.1f}", f"{ours.mean():.1f}", int(ours.max()))
        rows.append([kind, decay, *means, *(f"{e:.1e}" for e in errors)])
    head = ["keys", "gk", "adaptive, mean n", "cg, mean n", "max n", "A-norm", "2-norm"]
    return table(head, rows)


class Layers(nn.Module):
    """Layers x + W_o GKA(q, k, v) of RMS-normed x, with SiLU and unit norm for q and k, and alpha = 0.5."""

    def __init__(self, sizes: Sizes, decay: float) -> None:
        super().__init__()
        self.sizes, self.decay = sizes, decay
        width = sizes.heads * sizes.dim
        self.projections = nn.ParameterList(
            torch.randn(4 * width, width) * width**-0.5 for _ in range(sizes.layers)
        )

    def forward(self, x: Tensor, solve: Callable) -> Tensor:
        gate = x.new_full((*x.shape[:2], self.sizes.heads), 0.5)
        g = torch.full_like(gate, self.decay, dtype=torch.promote_types(x.dtype, torch.float32))
        for projection in self.projections:
            weights = projection.chunk(4)
            q, k, v = (rms_norm(x, x.shape[-1:], eps=1e-6) @ w.mT for w in weights[:3])
            q, k, v = (y.unflatten(-1, (self.sizes.heads, -1)) for y in (q, k, v))
            q, k = (normalize(silu(y), dim=-1) for y in (q, k))
            o, _ = solve(q, k, v, g, g, gate)
            x = x + rms_norm(o.flatten(-2), x.shape[-1:], eps=1e-6) @ weights[3].mT
        return x


@dataclass
class Counted:
    """Steps of each solve, [U,G] each."""

    counts: dict[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def counting(self) -> Iterator[None]:
        iterate = cg.iterate_

        def watched(rows: cg.Rows, counts: Tensor, stop: float, most: int) -> int:
            self.counts[id(counts)] = counts
            return iterate(rows, counts, stop, most)

        with patch.object(cg, "iterate_", watched):
            yield

    def shown(self) -> str:
        """Mean and maximum as text."""
        found = torch.cat([n.flatten() for n in self.counts.values()]).double()
        return f"{found.mean():.1f}, {int(found.max())}"


def weight_gradients(model: Layers, x: Tensor, do: Tensor, solve: Callable) -> list[Tensor]:
    """Gradients of sum(output * do) for each projection: q, k, v, o of each layer."""
    y = model(x, solve)
    found = torch.autograd.grad((y * do).sum(), list(model.parameters()))
    return [part for grad in found for part in grad.chunk(4)]


def gradients(sizes: Sizes) -> Table:
    """Relative errors of weight gradients against the exact solve in float64: largest (all together)."""
    rows = []
    for dtype, decay in itertools.product(
        (torch.float64, torch.float32, torch.bfloat16), (-2e-3, -5e-2, -0.7)
    ):
        torch.manual_seed(SEED)
        model = Layers(sizes, decay).to(sizes.device, dtype)
        x, do = torch.randn(2, 1, sizes.length, sizes.heads * sizes.dim).to(sizes.device, dtype)
        double = Layers(sizes, decay).to(sizes.device, torch.float64)
        double.load_state_dict(model.state_dict())
        exact = partial(chunk_gka, num_iter=EXACT, backend="torch")
        expected = weight_gradients(double, x.double(), do.double(), exact)
        cells, backends, counted = [], [], Counted()
        for solver, num_iter in SOLVERS.values():
            with counted.counting():
                solve = partial(chunk_gka, solver=solver, num_iter=num_iter)
                found = weight_gradients(model, x, do, solve)
            errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
            whole = relative(torch.cat(found), torch.cat(expected))
            cells.append(f"{max(errors):.1e} ({whole:.1e})")
            backends.append(last_backend())
        name = str(dtype).removeprefix("torch.")
        rows.append([name, decay, *cells, counted.shown(), ", ".join(map(str, backends))])
    return table(["dtype", "g", *SOLVERS, "cg: mean n, max n", "backends"], rows)


def cost(sizes: Sizes) -> Table:
    """Processor time of `chunk_gka` relative to 30 Chebyshev steps, median and range of 5 repeats."""
    rows = []
    shape = (1, sizes.length, sizes.heads, sizes.dim)
    for kind, decay in itertools.product(("SiLU", "SiLU, mean 1"), (-1e-3, -1e-2, -1e-1, -1.0)):
        torch.manual_seed(SEED)
        keys = [family(kind, sizes.length, sizes.dim) for _ in range(sizes.heads)]
        leaves = (torch.randn(shape), torch.cat(keys, 2), torch.randn(shape))
        leaves = tuple(x.requires_grad_() for x in leaves)
        g = torch.full(shape[:3], decay)
        _times("cg", leaves, g)
        runs = [
            {n: _times(n, leaves, g) for n in ("chebyshev", "adaptive", "cg")} for _ in range(5)
        ]
        cells = []
        for solver, part in itertools.product(("adaptive", "cg"), (0, 1)):
            ratios = sorted(run[solver][part] / run["chebyshev"][part] for run in runs)
            cells.append(f"{ratios[2]:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})")
        rows.append([kind, decay, *cells])
    head = ["adaptive, forward", "forward and backward", "cg, forward", "forward and backward"]
    return table(["keys", "g", *head], rows)


def _times(solver: str, leaves: tuple[Tensor, ...], g: Tensor) -> tuple[float, float]:
    """Seconds of processor time of a forward pass, and of forward and backward pass."""
    q, k, v = leaves
    begin = time.process_time()
    o, _ = chunk_gka(q, k, v, g, g, solver=solver, backend="torch")
    middle = time.process_time()
    torch.autograd.grad(o.square().sum(), leaves)
    return middle - begin, time.process_time() - begin


TABLES: dict[str, Callable[[Sizes], Table]] = {f.__name__: f for f in (steps, gradients, cost)}


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m gka.experiments.conjugate", description=__doc__
    )
    add = parser.add_argument
    add("tables", nargs="*", metavar="name", help=f"of {', '.join(TABLES)} (all)")
    add("--device", default="cpu", help="cpu or cuda (%(default)s)")
    add("--length", type=int, default=1024, help="tokens (%(default)s)")
    add("--dim", type=int, default=128, help="head dimension (%(default)s)")
    add("--heads", type=int, default=2, help="heads of a layer, of gradients (%(default)s)")
    add("--layers", type=int, default=5, help="layers, of gradients (%(default)s)")
    add("--output", type=Path, help="folder for conjugate.json and conjugate.md too")
    options = parser.parse_args(arguments)
    names = options.tables or list(TABLES)
    if unknown := [name for name in names if name not in TABLES]:
        raise SystemExit(f"unknown table {', '.join(unknown)}; there are {', '.join(TABLES)}.")
    numbers = {n: getattr(options, n) for n in ("length", "dim", "heads", "layers")}
    if wrong := [n for n, value in numbers.items() if value < 1]:
        raise SystemExit(f"--{wrong[0]} must be positive; got {numbers[wrong[0]]}.")
    sizes = Sizes(options.device, **numbers)
    ledger = None if options.output is None else Ledger(options.output, "conjugate")
    if ledger is not None:
        with refusing():
            ledger.begin({"seed": SEED, "torch": torch.__version__, **vars(sizes)}, False)
    pages = []
    for name in names:
        measure = partial(TABLES[name], sizes)
        found = measure() if ledger is None else ledger.cell(name, measure)
        title = (TABLES[name].__doc__ or name).strip()
        pages.append(f"{title}\n\n{markdown_table(found['head'], found['rows'])}\n")
        print(pages[-1], flush=True)
    if ledger is not None:
        ledger.report("\n".join(pages))


if __name__ == "__main__":
    main()
