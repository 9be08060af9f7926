"""Measure the Triton kernels' launch configurations on this GPU and store the fastest.

`python -m benchmarks.run tune --seconds 300` runs both passes with every solver, records every launch, and
launches each kernel alone with every candidate: numbers of warps, and for scans pipeline stages and register
limits. A candidate is rejected, with a reason, if it does not compile, spills too much, needs too much shared
memory or gives other results than the stored configuration, which is first compared with float64. Block
widths are fixed: 32 columns make triton 3.6 read past its shared memory.

A candidate that is 2 % faster replaces the entry in the chip's table (src/gka/kernels/chips), but not with
`--dry-run`. `--compile-only --arch 90` needs no GPU: it only lists the resources of candidates.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from benchmarks.host import resources
from benchmarks.op import tune_table
from benchmarks.op.tune_table import Candidate, Options
from benchmarks.registry import SOLVERS
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from gka.console import text_console
from gka.experiments.ledger import print_table
from gka.experiments.stopwatch import Stopwatch
from gka.kernels import backward, configs, forward
from gka.kernels.call import GpuCall
from gka.kernels.triton.passes import TRITON
from gka.kernels.triton.plan import SIZES, Launcher, Plan, plan_of
from gka.maths import adjoint, chunked
from gka.maths.chunked import Settings, Tokens
from gka.maths.solvers import SolverName
from gka.storage import write_json, write_text

# loops over chunks, for which pipeline stages and register limits matter
SCANS = ("moments", "reverse_u", "reverse_h")
WARPS, STAGES, CAPS = (4, 8), (1, 2, 3), (None, 168)
AGAINST_FLOAT64 = {"float32": 2e-5, "float16": 5e-3, "bfloat16": 3e-2}
HEAD = (
    "kernel", "operands", "width", "warps", "stages", "cap", "registers", "spills", "shared", "ms", "",
)  # fmt: skip
AGAINST_STORED = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 8e-3}


@dataclass(frozen=True)
class Recorded:
    """A recorded launch of a kernel, with its tensors' values before and after it."""

    name: str
    kernel: Any
    options: dict
    grid: tuple[int, ...]
    args: tuple
    before: tuple[Tensor, ...] = ()
    after: tuple[Tensor, ...] = ()
    slack: float = 0.0  # further difference of valid results, whose steps rounding decides

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(x for x in self.args if isinstance(x, Tensor))

    def restore(self) -> None:
        for x, value in zip(self.tensors, self.before, strict=True):
            x.copy_(value)


def candidates(kernel: str, exact: bool) -> list[Options]:
    """Configurations to try; float32 operands have one stage, since shared memory has no room for two."""
    stages = STAGES if kernel in SCANS and not exact else (1,)
    caps = CAPS if kernel in SCANS else (None,)
    return [
        {"num_warps": w, "num_stages": s} | ({} if cap is None else {"maxnreg": cap})
        for w, s, cap in itertools.product(WARPS, stages, caps)
    ]


@contextmanager
def recording(run: bool) -> Iterator[list[Recorded]]:
    """In the block, list launches; with `run`, also make them and keep their tensors before and after."""
    found: list[Recorded] = []
    named = Plan.launcher

    def launcher(self: Plan, kernel, name: str, signature: tuple, **more: Any) -> Callable:
        made = named(self, kernel, name, signature, **more)

        def call(grid: tuple[int, ...], *args: Any) -> None:
            one = Recorded(name, kernel, dict(made.options), grid, args)
            if run:
                before = tuple(x.clone() for x in one.tensors)
                made(grid, *args)
                one = replace(one, before=before, after=tuple(x.clone() for x in one.tensors))
            found.append(one)

        return call

    def zeros(self: GpuCall, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(
            shape, device=self.t.q.device, dtype=dtype
        )  # so that everything that is compared is defined

    with patch.object(Plan, "launcher", launcher), patch.object(GpuCall, "empty", zeros):
        yield found


def tokens_of(dim: int, dtype: torch.dtype, heads: int, length: int, device: str) -> Tokens:
    """One sequence with values similar to a layer's: keys with a common direction, slow decays."""
    torch.manual_seed(0)
    shape = (1, length, heads, dim)
    q, k = (torch.nn.functional.silu(torch.randn(shape) + 0.5) for _ in range(2))
    q, k = (torch.nn.functional.normalize(x, dim=-1).to(device, dtype) for x in (q, k))
    g, alpha, beta = (x.to(device) for x in torch.rand(3, 1, length, heads).unbind())
    v = torch.randn(shape).to(device, dtype)
    return Tokens(q, k, v, -(10.0 ** (-3 + 2 * g)), None, alpha, beta, None, None, None)


def settings_of(solver: SolverName) -> Settings:
    return Settings(1.0, 0.02, 30, 64, tied=True, with_h=False, solver=solver)


def passes(tokens: Tokens, solver: SolverName) -> dict[str, Tensor]:
    """o, and the gradients of q, k, v if v is the gradient of o."""
    settings = settings_of(solver)
    out = forward.chunk_forward(TRITON, tokens, settings)
    grads = backward.chunk_backward(
        TRITON, tokens, out.x, out.x_scale, tokens.v, None, None, settings
    )
    return {"o": out.o, "q": grads.q, "k": grads.k, "v": grads.v}


def error(x: Tensor, y: Tensor) -> float:
    """|x - y| / |y|; infinite if that is NaN."""
    norm = y.double().norm().item()
    found = (x.double() - y.double()).norm().item() / (norm or 1.0)
    return found if found == found else float("inf")


def check_against_float64(dim: int, dtype: torch.dtype, solver: SolverName) -> None:
    """Raise RuntimeError if the stored configurations give wrong results."""
    tokens = tokens_of(dim, dtype, 2, 200, "cuda")
    found = passes(tokens, solver)
    wide = {n: x.double() for n, x in vars(tokens).items() if isinstance(x, Tensor)}
    exact, settings = tokens._replace(**wide), settings_of("chebyshev")
    out = chunked.chunk_forward(exact, settings)
    grads = adjoint.chunk_backward(exact, out.x, exact.v, None, None, settings)
    limit = max(AGAINST_FLOAT64[str(dtype)[6:]], 0.0 if solver == "chebyshev" else 1e-3)
    for name, value in {"o": out.o, "q": grads.q, "k": grads.k, "v": grads.v}.items():
        if not error(found[name], value) <= limit:
            raise RuntimeError(
                f"{dtype} K = V = {dim}, {solver}: {name} is {error(found[name], value):.1e} from float64, "
                f"more than {limit:.0e}; nothing is tuned on wrong results (make test-gpu tells more)."
            )


class Trial:
    """The candidates of one kernel for one dtype and head width."""

    def __init__(
        self, launches: list[Recorded], dtype: str, dim: int, limits: tuple[int, int]
    ) -> None:
        self.launches, self.dtype, self.dim = launches, dtype, dim
        self.spill_limit, self.shared_limit = limits
        self.kernel, exact = launches[0].name, dtype == "float32"
        width = configs.bucket(dim)
        names = ("num_warps", "num_stages", "maxnreg")
        held = {n: launches[0].options[n] for n in names if n in launches[0].options}
        tried = [held, *(o for o in candidates(self.kernel, exact) if o != held)]
        self.candidates = [
            Candidate(self.kernel, configs.operands(exact), width, o, stored=o == held)
            for o in tried
        ]

    def launchers(self, options: Options) -> list[Launcher]:
        """Launchers of all recorded launches, with these options instead of the stored ones."""
        names = ("num_warps", "num_stages", "maxnreg")
        sizes = [{n: x for n, x in one.options.items() if n not in names} for one in self.launches]
        return [
            Launcher(one.kernel, s | options) for one, s in zip(self.launches, sizes, strict=True)
        ]

    def compiled(self, c: Candidate, arch: int) -> Candidate:
        """The candidate with its resources on a chip, the maximum over its launches; needs no GPU."""
        used = []
        for one, made in zip(self.launches, self.launchers(c.options), strict=True):
            made(one.grid, *one.args)
            assert made.compiled is not None
            used.append(resources.usage(self.kernel, made.compiled, arch))
        return self._judged(c, [(u.registers, u.spills, u.shared) for u in used])

    def measured(self, c: Candidate, watch: Stopwatch, repeats: int) -> Candidate:
        """The candidate, compared with the stored configuration's results and timed."""
        used, total = [], 0.0
        for one, made in zip(self.launches, self.launchers(c.options), strict=True):
            one.restore()
            made(one.grid, *one.args)
            allowed = AGAINST_STORED[self.dtype] + one.slack
            for x, value in zip(one.tensors, one.after, strict=True):
                if x.is_floating_point() and not error(x, value) <= allowed:
                    return replace(c, reason=f"wrong by {error(x, value):.1e}")
            kernel: Any = made.compiled
            used.append((kernel.n_regs, 4 * kernel.n_spills, kernel.metadata.shared))
            one.restore()
            times, _ = watch.repeat(lambda made=made, one=one: made(one.grid, *one.args), repeats)
            one.restore()
            total += statistics.median(times)
        return replace(self._judged(c, used), ms=total)

    def _judged(self, c: Candidate, used: list[tuple[int, int, int]]) -> Candidate:
        registers, spills, shared = (max(column) for column in zip(*used, strict=True))
        c, reason = replace(c, registers=registers, spills=spills, shared=shared), None
        if shared > self.shared_limit:
            reason = f"{shared} bytes of shared memory, more than {self.shared_limit}"
        elif spills > self.spill_limit and not c.stored:
            reason = f"spills {spills} bytes, more than {self.spill_limit}"
        return replace(c, reason=reason)


def tried(call: Callable[[], Candidate], c: Candidate) -> Candidate:
    """The result of `call`, or the candidate with Triton's reason for refusing it."""
    try:
        return call()
    except (triton.TritonError, triton.OutOfResources, RuntimeError) as refusal:
        return replace(c, reason=str(refusal).strip().splitlines()[0][:90])


def trials(args: argparse.Namespace, dtype: str, dim: int) -> list[Trial]:
    """One trial per kernel, of its launches in both passes with every solver."""
    device, kind = "cpu" if args.compile_only else "cuda", getattr(torch, dtype)
    found: list[Recorded] = []
    for solver in SOLVERS:
        plan_of.cache_clear()
        if not args.compile_only:
            check_against_float64(dim, kind, solver)
        with recording(run=not args.compile_only) as launches:
            passes(tokens_of(dim, kind, args.heads, args.length, device), solver)
        names = args.kernels if solver == "chebyshev" else {"solve", "certify"} & set(args.kernels)
        slack = 1e-3 if solver == "cg" else 0.0  # twice the error bound at 30 steps, and some room
        found += [replace(one, slack=slack) for one in launches if one.name in names]
    limits = (args.spill_limit, shared_limit(args.arch))
    order = dict.fromkeys(one.name for one in found)
    return [Trial([x for x in found if x.name == name], dtype, dim, limits) for name in order]


def shared_limit(arch: int) -> int:
    """Bytes of shared memory that a block can have: on this GPU if there is one, else on the chip."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    return resources.SHARED_LIMITS[arch]


def search(args: argparse.Namespace, console: Console) -> list[Candidate]:
    """Try all candidates until the time is up."""
    begin, found = time.perf_counter(), []
    watch = None if args.compile_only else Stopwatch("cuda")
    with Progress(console=console, transient=True) as progress:
        for dtype, dim in itertools.product(args.dtypes, args.dims):
            if dim > configs.widest(dtype == "float32", torch.device("cuda")):
                console.print(f"{dtype} {dim}: wider than this chip's shared memory allows.")
                continue
            for trial in trials(args, dtype, dim):
                task = progress.add_task(
                    f"{trial.kernel} {dtype} {dim}", total=len(trial.candidates)
                )
                for c in trial.candidates:
                    if time.perf_counter() - begin > args.seconds:
                        console.print(
                            f"{args.seconds:g} s are over; {trial.kernel} and later kernels stay unchanged."
                        )
                        return found
                    if watch is None:
                        found.append(tried(lambda c=c, t=trial: t.compiled(c, args.arch), c))
                    else:
                        found.append(
                            tried(lambda c=c, t=trial: t.measured(c, watch, args.repeats), c)
                        )
                    progress.advance(task)
    return found


def report(found: list[Candidate]) -> None:
    """Print one line per candidate, with stored and chosen ones marked."""
    best, rows = set(map(id, tune_table.chosen(found).values())), []
    for c in found:
        mark = "stored" * c.stored + (", chosen" if id(c) in best else "")
        rows.append([
            c.kernel, c.operands, c.width, c.options["num_warps"], c.options["num_stages"],
            c.options.get("maxnreg", ""), c.registers, c.spills, c.shared,
            "" if c.ms is None else f"{c.ms:.4f}", c.reason or mark.lstrip(", "),
        ])  # fmt: skip
    print_table(HEAD, rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run tune", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--kernels", nargs="+", choices=SIZES, default=list(SIZES), metavar="KERNEL"
    )
    parser.add_argument("--dims", nargs="+", type=int, default=list(configs.WIDTHS), help="K = V")
    parser.add_argument(
        "--dtypes", nargs="+", choices=AGAINST_FLOAT64, default=["bfloat16", "float32"]
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="stop after this time")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--spill-limit", type=int, default=1536, help="bytes a thread")
    parser.add_argument("--output", type=Path, default=Path("runs/tune/tune.json"))
    parser.add_argument("--dry-run", action="store_true", help="leave the chip's table as it is")
    parser.add_argument(
        "--compile-only", action="store_true", help="no GPU: registers, spills, shared memory"
    )
    parser.add_argument(
        "--arch", type=int, choices=resources.SHARED_LIMITS, help="chip for --compile-only"
    )
    args = parser.parse_args(arguments)
    if args.compile_only != (args.arch is not None):
        parser.error("--compile-only and --arch go together: which chip to compile for.")
    if not args.compile_only and not torch.cuda.is_available():
        parser.error("no NVIDIA GPU here; --compile-only --arch 90 lists what candidates take.")
    return args


def made_on(args: argparse.Namespace) -> dict[str, Any]:
    """Hardware, versions and sizes of the measurements."""
    chip = f"sm_{args.arch}, compiled only" if args.compile_only else torch.cuda.get_device_name()
    return {
        "gpu": chip, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
        "triton": triton.__version__, "heads": args.heads, "length": args.length,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    args, console = parse(arguments), text_console()
    chip = resources.compiling_only(args.arch) if args.compile_only else nullcontext()
    with chip:
        found = search(args, console)
    report(found)
    told = {"made": made_on(args), "candidates": [asdict(c) for c in found]}
    write_json(args.output, told)
    console.print(f"all candidates: {args.output}")
    if args.dry_run or args.compile_only:
        return
    capability = torch.cuda.get_device_capability()
    path = configs.CHIPS / f"sm_{capability[0]}{capability[1]}.json"
    write_text(path, tune_table.dumps(tune_table.updated(capability, found, made_on(args))))
    console.print(f"stored: {path}")
