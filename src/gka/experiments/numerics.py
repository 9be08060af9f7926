"""The tables of docs/numerics.md: `python -m gka.experiments.numerics [name ...]`, minutes on one core.

Every table but `cost` depends only on the seed. Errors are against float64. Output is Markdown.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import normalize, silu

from gka.experiments.ledger import Ledger, markdown_table, refusing
from gka.maths.chunked import Chunks, Settings, Tokens
from gka.maths.ridge import Relative
from gka.maths.solvers import adaptive
from gka.maths.solvers.chebyshev import chebyshev_bound, chebyshev_solve, chebyshev_weights
from gka.maths.solvers.exact import exact_solve
from gka.ops import chunk_gka, chunk_simple_gla, solver_steps
from gka.ops.checks import check_solver
from gka.ops.reference import reference_gka

SEED = 0
Inputs = list[Tensor]
Table = dict[str, list]
"""`head`, and `rows` of cells."""


def relative(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the 2-norm."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def table(head: list[str], rows: list[list]) -> Table:
    return {"head": head, "rows": rows}


def unit_keys(kind: str, *shape: int) -> Tensor:
    """Float64 keys of unit norm: Gaussian, SiLU of Gaussian, or "aligned" (close to one direction)."""
    k = torch.randn(*shape, dtype=torch.float64)
    if kind == "SiLU":
        k = silu(k)
    if kind == "aligned":
        k = 0.2 * k + torch.randn(shape[-1], dtype=torch.float64)
    return normalize(k, dim=-1)


def tokens(length: int, heads: int, dim: int, kind: str = "SiLU") -> Inputs:
    """Float64 q, k, v, g, alpha, beta of one sequence, similar to a layer's."""
    torch.manual_seed(SEED)
    q, k = (unit_keys(kind, 1, length, heads, dim) for _ in range(2))
    v = torch.randn(1, length, heads, dim, dtype=torch.float64)
    g = -0.1 * torch.rand(1, length, heads, dtype=torch.float64)
    alpha, beta = (torch.rand(1, length, heads, dtype=torch.float64) for _ in range(2))
    return [q, k, v, g, alpha, beta]


def bound() -> Table:
    """Table 1: the bound 2 R^(r+1)."""
    ratios = (0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
    rows = [
        [r, *(f"{chebyshev_bound(a, r):.1e}" for a in ratios)]
        for r in (1, 5, 10, 15, 20, 30, 45, 60)
    ]
    return table(["r", *(f"a = {a}" for a in ratios)], rows)


def iterate_form(apply_a: Callable, q: Tensor, fro: Tensor, ratio: float, steps: int) -> Tensor:
    """The three-term recursion in x (algorithm 1), the same polynomial as `chebyshev_solve`."""
    step = 2.0 / ((1.0 + 2.0 * ratio) * fro.unsqueeze(-1))
    before, x = torch.zeros_like(q), step * q
    for omega in chebyshev_weights(ratio, steps):
        after = x - omega * step * (apply_a(x) - q) + (omega - 1.0) * (x - before)
        before, x = x, after
    return x


def rounding(kind: str, ratio: float, steps: int, operand: torch.dtype) -> list[float]:
    """Errors of both forms in float32 with vectors rounded to `operand` in products; truncation error."""
    torch.manual_seed(SEED)
    k, q = unit_keys(kind, 64, 512, 128), unit_keys("Gaussian", 64, 128)
    h = k.transpose(-1, -2) @ k
    fro = h.square().sum((-2, -1)).sqrt()

    def product(h: Tensor, d: Tensor) -> Tensor:
        if h.dtype == torch.float32:
            d = d.to(operand).float()
        return (h @ d.unsqueeze(-1)).squeeze(-1)

    def solve(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        h_, q_, fro_ = h.to(dtype), q.to(dtype), fro.to(dtype)
        return (
            chebyshev_solve(lambda d: product(h_, d), q_, fro_, ratio, steps),
            iterate_form(
                lambda d: product(h_, d) + ratio * fro_.unsqueeze(-1) * d, q_, fro_, ratio, steps
            ),
        )

    same = solve(torch.float64)[0]
    errors = [relative(x, same) for x in solve(torch.float32)]
    return [*errors, relative(same, exact_solve(h, q, ratio * fro))]


def forms() -> Table:
    """Table 2: rounding errors of the two forms against the same polynomial in float64."""
    rows = []
    for operand in (torch.float32, torch.float16, torch.bfloat16):
        for kind in ("Gaussian", "SiLU", "aligned"):
            for ratio, steps in ((0.02, 30), (0.005, 60)):
                errors = rounding(kind, ratio, steps, operand)
                name = str(operand).removeprefix("torch.")
                rows.append([name, kind, ratio, steps, *(f"{e:.1e}" for e in errors)])
    return table(["operand", "keys", "a", "r", "residual form", "iterate form", "truncation"], rows)


def gradients(o: Tensor, do: Tensor, inputs: Inputs) -> list[Tensor]:
    return list(torch.autograd.grad((o * do).sum(), inputs))


def oracle(inputs: Inputs, do: Tensor) -> list[Tensor]:
    """Output and gradients of the exact map in float64."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v, g, alpha, beta = leaves
    o, _ = reference_gka(q, k, v, g, g, alpha, beta, scale=q.shape[-1] ** -0.5, solver="exact")
    return [o.detach(), *gradients(o, do.double(), leaves)]


def dtypes() -> Table:
    """Table 3: chunk_gka in each dtype against the oracle on the same (rounded) inputs."""
    data = tokens(512, 2, 64)
    rows = []
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for dtype, steps in itertools.product(dtypes, (30, 120)):
        gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        cast = [x.to(dtype if i < 3 else gate_dtype) for i, x in enumerate(data)]
        inputs = [x.requires_grad_() for x in cast]
        q, k, v, g, alpha, beta = inputs
        o, _ = chunk_gka(q, k, v, g, g, alpha, beta=beta, num_iter=steps)
        do = torch.randn(o.shape, generator=torch.Generator().manual_seed(SEED)).to(dtype)
        results = [o.detach(), *gradients(o, do, inputs)]
        errors = [relative(x, y) for x, y in zip(results, oracle(inputs, do), strict=True)]
        rows.append([str(dtype).removeprefix("torch."), steps, *(f"{e:.1e}" for e in errors)])
    return table(["q, k, v", "r", "o", "dq", "dk", "dv", "dg", "dalpha", "dbeta"], rows)


def convention() -> Table:
    """Table 4: the library's gradient, and autograd through the iteration, against the exact gradient."""
    rows = []
    for kind in ("Gaussian", "SiLU", "aligned"):
        inputs = [x.requires_grad_() for x in tokens(64, 2, 16, kind)]
        q, k, v, g, alpha, beta = inputs
        do = torch.randn(v.shape, dtype=torch.float64)
        exact = oracle(inputs, do)[1:]
        for steps in (5, 10, 20, 30, 60):
            ours, _ = chunk_gka(q, k, v, g, g, alpha, beta=beta, num_iter=steps)
            traced, _ = chunk_gka(
                q, k, v, g, g, alpha, beta=beta, num_iter=steps, backend="reference"
            )
            errors = []
            for o in (ours, traced):
                found = gradients(o, do, inputs)
                errors += [f"{relative(found[i], exact[i]):.1e}" for i in (1, 3)]
            rows.append([kind, steps, f"{chebyshev_bound(0.02, steps):.1e}", *errors])
    return table(["keys", "r", "2R^(r+1)", "dk", "dg", "dk, autograd", "dg, autograd"], rows)


def decay_gradient() -> Table:
    """Table 5: dg in float32 from rectangle sums, and from running sums of q.dq - k.dk."""
    rows = []
    for decay in (-0.001, -0.01, -0.1, -1.0, -5.0):
        data = tokens(4096, 2, 32)
        data[3] = torch.full_like(data[3], decay)
        do = torch.randn(data[2].shape, dtype=torch.float64)
        found = []
        for dtype in (torch.float64, torch.float32):
            inputs = [x.to(dtype).requires_grad_() for x in data[:4]]
            q, k, v, g = inputs
            found.append(gradients(chunk_simple_gla(q, k, v, g)[0], do.to(dtype), inputs))
        dq, dk, _, dg = found[1]
        differences = (data[0].float() * dq).sum(-1) - (data[1].float() * dk).sum(-1)
        running = differences.flip(1).cumsum(1).flip(1)
        errors = [relative(x, found[0][3]) for x in (dg, running)]
        rows.append([decay, *(f"{e:.1e}" for e in errors)])
    return table(["g", "rectangle sums", "running differences"], rows)


def failures() -> Table:
    """Table 6: error of x_r against the exact solution (and its bound) if the ridge needs more steps."""
    rows = []
    for ratio in (0.0001, 0.001, 0.005, 0.02):
        torch.manual_seed(SEED)
        k, q = unit_keys("SiLU", 64, 512, 128), unit_keys("SiLU", 64, 128)
        h = k.transpose(-1, -2) @ k
        fro = h.square().sum((-2, -1)).sqrt()
        exact = exact_solve(h, q, ratio * fro)
        cells = []
        for steps in (10, 30, 100):
            x = chebyshev_solve(
                lambda d, h=h: (h @ d.unsqueeze(-1)).squeeze(-1), q, fro, ratio, steps
            )
            cells.append(f"{relative(x, exact):.1e} ({chebyshev_bound(ratio, steps):.1e})")
        rows.append([ratio, f"{(1 + ratio) / ratio:.0f}", *cells])
    return table(["a", "(1+a)/a", "r = 10", "r = 30", "r = 100"], rows)


def family(kind: str, length: int, dim: int) -> Tensor:
    """Keys of unit norm, float32 [1,T,1,K], of a family of data."""
    k = torch.randn(1, length, 1, dim, dtype=torch.float64)
    if kind == "SiLU":
        k = silu(k)
    elif kind == "SiLU, mean 1":
        k = silu(k + 1.0)
    elif kind == "SiLU of power law":
        k = silu(3.0 * k * torch.arange(1, dim + 1) ** -0.5)
    elif kind == "64 clusters":
        k = torch.randn(64, dim, dtype=torch.float64)[torch.randint(64, (1, length, 1))] + 0.1 * k
    elif kind == "rank 8":
        k = k[..., :8] @ torch.randn(8, dim, dtype=torch.float64)
    elif kind == "one key":
        k = k[:, :1].expand(k.shape)
    return normalize(k, dim=-1).float()


def solve_errors(k: Tensor, q: Tensor, gk: Tensor, solver: str) -> tuple[float, float]:
    """Relative errors of x in float32: the largest of a token in the A-norm, and of all in the 2-norm."""
    settings = Settings(1.0, 0.02, 30, 64, False, True, check_solver(solver))
    chunks = Chunks(Tokens(q, k, k, None, gk, None, None, None, None, None), settings)
    largest, error, size = 0.0, 0.0, 0.0
    for rows in chunks.blocks():
        s = chunks.system(rows)
        k_, zeta = s.k.double(), s.zeta.double()[..., None, None]
        h = zeta * s.h.double().unsqueeze(2)
        h = h + torch.einsum("mhtj,mhjk,mhjl->mhtkl", s.weights.double(), k_, k_)
        lamb = 0.02 * h.square().sum((-2, -1)).sqrt()
        exact = exact_solve(h, chunks.q[rows].double(), lamb)
        e = chunks.solve(s, chunks.q[rows]).double() - exact
        norms = [
            (torch.einsum("...k,...kl,...l->...", y, h, y) + lamb * y.square().sum(-1)).sqrt()
            for y in (e, exact)
        ]
        largest = max(largest, (norms[0] / norms[1]).max().item())
        error, size = error + e.square().sum().item(), size + exact.square().sum().item()
    return largest, (error / size) ** 0.5


def steps() -> Table:
    """Table 7: steps of solver="adaptive" for the error bound of 30 steps, and errors of both solvers."""
    rows = []
    kinds = (
        "Gaussian",
        "SiLU",
        "SiLU, mean 1",
        "SiLU of power law",
        "64 clusters",
        "rank 8",
        "one key",
    )
    for kind, decay in itertools.product(kinds, (-1e-4, -1e-3, -1e-2, -1e-1, -1.0)):
        torch.manual_seed(SEED)
        k, q = family(kind, 4096, 128), family("Gaussian", 4096, 128)
        gk = torch.full((1, 4096, 1), decay)
        counts = solver_steps(k, gk)[0, ::64, 0].double()
        errors = [solve_errors(k, q, gk, solver) for solver in ("chebyshev", "adaptive")]
        cells = [f"{error:.1e}" for both in zip(*errors, strict=True) for error in both]
        rows.append([kind, decay, f"{counts.mean():.1f}", int(counts.max()), *cells])
    return table(
        ["keys", "gk", "mean n", "max n", "A-norm, plain", "adaptive", "2-norm, plain", "adaptive"],
        rows,
    )


def vectors() -> Table:
    """Table 9: mean steps of solver="adaptive" with v of S (torch) and along the mean key (Hopper).

    Then the same for keys with random signs.
    """
    rows = []
    kinds = ("Gaussian", "SiLU", "SiLU, mean 1", "SiLU of power law")
    for kind, decay in itertools.product(kinds, (-1e-3, -1e-2, -1e-1)):
        torch.manual_seed(SEED)
        k, gk = family(kind, 4096, 128), torch.full((1, 4096, 1), decay)
        signs = torch.randint(2, (1, 4096, 1, 1)) * 2 - 1
        cells = []
        for keys in (k, k * signs):
            for choice in (adaptive.leading_vector, mean_key):
                with patch.object(adaptive, "leading_vector", choice):
                    cells.append(f"{solver_steps(keys, gk)[0, ::64, 0].double().mean():.1f}")
        rows.append([kind, decay, *cells])
    return table(["keys", "gk", "v of S", "mean key", "random signs: v of S", "mean key"], rows)


def mean_key(relative: Relative) -> Tensor:
    """v [M,H,K], the unit vector along the sum of a chunk's keys."""
    return normalize(relative.k.sum(2), dim=-1).expand(*relative.h.shape[:2], -1)


def cost() -> Table:
    """Table 8: processor time of solver="adaptive" relative to "chebyshev", median and range of 5 repeats."""
    rows = []
    for kind, decay in itertools.product(("SiLU", "SiLU, mean 1"), (-1e-3, -1e-2, -1e-1)):
        torch.manual_seed(SEED)
        k, q, v = (
            torch.stack([family(name, 2048, 128)[0, :, 0] for _ in range(4)], 1)[None].float()
            for name in (kind, "Gaussian", "Gaussian")
        )
        leaves = tuple(x.requires_grad_() for x in (q, k, v))
        g = torch.full((1, 2048, 4), decay)

        def passes(solver: str, leaves=leaves, g=g) -> tuple[float, float]:
            q, k, v = leaves
            begin = time.process_time()
            o, _ = chunk_gka(q, k, v, g, g, solver=solver)
            middle = time.process_time()
            torch.autograd.grad(o.sum(), leaves)
            return middle - begin, time.process_time() - begin

        passes("adaptive")
        pairs = [(passes("adaptive"), passes("chebyshev")) for _ in range(5)]
        ratios = [sorted(a[i] / b[i] for a, b in pairs) for i in (0, 1)]
        rows.append([kind, decay, *(f"{r[2]:.2f} ({r[0]:.2f}-{r[-1]:.2f})" for r in ratios)])
    return table(["keys", "g", "forward", "forward and backward"], rows)


TABLES: dict[str, Callable[[], Table]] = {
    f.__name__: f
    for f in (bound, forms, dtypes, convention, decay_gradient, failures, steps, vectors, cost)
}


def shown(name: str, found: Table) -> str:
    """A table with its title."""
    title = (TABLES[name].__doc__ or name).strip()
    return f"{title}\n\n{markdown_table(found['head'], found['rows'])}\n"


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m gka.experiments.numerics", description=__doc__)
    add = parser.add_argument
    add("tables", nargs="*", metavar="name", help=f"of {', '.join(TABLES)} (all)")
    add("--output", type=Path, help="folder for numerics.json and numerics.md too")
    add("--resume", action="store_true", help="keep the tables that --output has already")
    options = parser.parse_args(arguments)
    names = options.tables or list(TABLES)
    if unknown := [name for name in names if name not in TABLES]:
        raise SystemExit(f"unknown table {', '.join(unknown)}; there are {', '.join(TABLES)}.")
    if options.resume and options.output is None:
        parser.error("--resume needs --output")
    ledger = None if options.output is None else Ledger(options.output, "numerics")
    if ledger is not None:
        settings: dict[str, Any] = {"seed": SEED, "torch": torch.__version__}
        with refusing():
            ledger.begin(settings, options.resume)
    pages = []
    for name in names:
        found = TABLES[name]() if ledger is None else ledger.cell(name, TABLES[name])
        pages.append(shown(name, found))
        print(pages[-1], flush=True)
    if ledger is not None:
        ledger.report("\n".join(pages))


if __name__ == "__main__":
    main()
