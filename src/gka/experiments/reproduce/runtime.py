"""`gka reproduce runtime`: time of a layer's forward and backward pass beside its peers' (figure 3b)."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from gka.errors import NotAvailable, reason_of
from gka.evaluation.plots import MIXER_STYLES
from gka.experiments.ledger import markdown_table
from gka.experiments.reproduce.experiment import (
    Cell,
    Check,
    Experiment,
    Found,
    Options,
    at_least,
    at_most,
    largest,
)
from gka.experiments.reproduce.runtime_layers import (
    BEST,
    GKA,
    MAIN,
    PEERS,
    Contender,
    Shape,
    backend_of,
    forward_backward,
    layer,
)
from gka.experiments.stopwatch import ROUNDS, Stopwatch, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPARABLE = 1.5
CYCLES = 2e6  # of a GPU in a millisecond, about
CALLS = 4  # that wait in a queue together: more launches than it holds would make the host wait
_STYLES = {
    "gka, adaptive": ("GKA, adaptive", "#56B4E9", "o"),
    "gka, cg": ("GKA, conjugate gradients", "#08306B", "^"),
    "gka, 8 steps": ("GKA, 8 steps", "#999999", "o"),
    "gla": ("GLA", *MIXER_STYLES["gla"][1:]),
}


@dataclass(frozen=True)
class Size:
    """Numbers of a size.

    Attributes:
        batch, heads, dim: of the input and the layer (K = V = dim, hidden size heads dim).
        lengths: T of the main contenders, most telling first.
        peers_at: T of flash-linear-attention's own layers; None: they are left out.
        seconds: of a contender's measurement at a length, after its first calls.
    """

    batch: int
    heads: int
    dim: int
    lengths: tuple[int, ...]
    peers_at: int | None
    seconds: float


def measure(
    size: Size, length: int, contenders: Sequence[Contender], device: str
) -> dict[str, Any]:
    """Times of some layers at one length, interleaved; those that cannot run, with their reasons."""
    shape = Shape(size.batch, length, size.heads, size.dim)
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    watch, calls, rows = Stopwatch(device), {}, {}
    for contender in contenders:
        row: dict[str, Any] = {"contender": contender.name, "note": contender.note}
        rows[contender.name] = row
        try:
            mixer = layer(contender, shape, device, dtype)
            calls[contender.name] = _first(mixer, shape, contender, watch, row, device, dtype)
        except NotAvailable as error:
            row["refused"] = str(error)
        except Exception as error:  # one peer's failure is its own result
            row["failed"] = reason_of(error)
    for name, times in _interleaved(watch, calls, size.seconds).items():
        rows[name] |= times
    return {
        "length": length, "tokens": shape.tokens, "dtype": str(dtype).removeprefix("torch."),
        "rows": list(rows.values()),
    }  # fmt: skip


def _first(
    mixer: torch.nn.Module, shape: Shape, contender: Contender, watch: Stopwatch,
    row: dict[str, Any], device: str, dtype: torch.dtype,
) -> Callable[[], Any]:  # fmt: skip
    """The call, after its first runs; their seconds, what ran, parameters and peak memory into `row`."""
    call = forward_backward(mixer, shape, device, dtype)
    row["first_s"] = round(watch.once(call), 2)
    row["backend"] = backend_of(contender)
    row["parameters"] = sum(p.numel() for p in mixer.parameters())
    found = call()
    row["finite"] = all(bool(x.isfinite().all()) for x in found if x is not None)
    del found
    peak = watch.peak_bytes(call)
    row["peak_mib"] = None if peak is None else round(peak / 2**20)
    return call


def _interleaved(
    watch: Stopwatch, calls: dict[str, Callable[[], Any]], seconds: float
) -> dict[str, dict[str, Any]]:
    """Milliseconds of every call, in ROUNDS rounds of all: medians of the rounds, on device and host."""
    device: dict[str, list[float]] = {name: [] for name in calls}
    host: dict[str, list[float]] = {name: [] for name in calls}
    plans = {}
    for name, call in calls.items():
        whole = min(watch.once(call) for _ in range(2))
        began = time.perf_counter()
        call()
        launch = time.perf_counter() - began if watch.cuda else 0.0
        groups = max(1, min(8, round(seconds / ROUNDS / CALLS / max(whole, 1e-6))))
        plans[name] = (groups, int(1.5e3 * launch * CALLS * CYCLES))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            groups, head_start = plans[name]
            found = [
                watch.repeat(call, CALLS if watch.cuda else 1, head_start) for _ in range(groups)
            ]
            device[name].append(median(x for part, _ in found for x in part))
            if watch.cuda:
                host[name].append(median(x for _, part in found for x in part))
    return {
        name: {
            "ms": [round(x, 4) for x in device[name]],
            "host_ms": round(median(host[name]), 4) if host[name] else None,
        }
        for name in calls
    }


def cells(size: Size, options: Options) -> list[Cell]:
    """The main contenders at each length, then each peer beside two of them at one length."""
    found = []
    for length in size.lengths:
        run = partial(measure, size, length, MAIN, options.device)
        cost = len(MAIN) * (2.5 * size.seconds + 0.4) + 2e-4 * size.batch * length
        found.append(Cell(f"T {length}", run, cost))
    if size.peers_at is not None:
        beside = [c for c in MAIN if c.name in (GKA, BEST)]
        for peer in PEERS:
            run = partial(measure, size, size.peers_at, [*beside, peer], options.device)
            found.append(Cell(f"T {size.peers_at}, {peer.name}", run, 30.0))
    return found


def _row(found: Found, name: str) -> dict[str, Any] | None:
    return next((r for r in found["rows"] if r["contender"] == name and "ms" in r), None)


def ratio(found: Found, name: str, base: str) -> tuple[float, float, float] | None:
    """Median, least and largest over rounds of one contender's time over another's."""
    a, b = _row(found, name), _row(found, base)
    if a is None or b is None:
        return None
    return spread([x / y for x, y in zip(a["ms"], b["ms"], strict=True)])


def _ratios(results: Sequence[Found], name: str, base: str, least: int = 0) -> list[float]:
    """Median ratios of the cells that have both, from a length on."""
    found = [ratio(r, name, base) for r in results if r["length"] >= least]
    return [x[0] for x in found if x is not None]


def table(results: Sequence[Found]) -> str:
    """A table for each cell, and why some did not run."""
    dtype = results[0]["dtype"]
    told = (
        f"Forward and backward of one layer in {dtype}, all gradients: medians of {ROUNDS} interleaved rounds"
        " (least to largest). On a GPU by events, the cache emptied before each call, with a head start for"
        " the host, so that neither waits for the other; host: until the calls are queued. Ratio: to"
        f" {BEST}, round by round. Peak: memory above the layer, its input and its gradient's. First: seconds"
        " of the first call, with compiling and tuning."
    )
    if dtype == "float32":
        told += (
            " Measured on a CPU, where every layer runs as plain torch: these are times of this library's"
            " reference code, and say nothing of the layers' kernels."
        )
    ordered = sorted(results, key=lambda r: r["length"])
    return "\n\n".join([told, *(_table_of(found) for found in ordered)])


def _table_of(found: Found) -> str:
    rows, others = [], []
    for row in found["rows"]:
        name = row["contender"]
        if "ms" not in row:
            why = (
                f"refused: {row['refused']}" if "refused" in row else f"failed: {row.get('failed')}"
            )
            others.append(f"- {name}: {why}")
            continue
        middle, least, most = spread(row["ms"])
        over = ratio(found, name, BEST)
        host = "" if row["host_ms"] is None else f"{row['host_ms']:.2f}"
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:,}"
        rows.append((
            name, f"{middle:.3g} ({least:.3g}-{most:.3g})", host,
            "" if over is None else f"{over[0]:.2f} ({over[1]:.2f}-{over[2]:.2f})",
            f"{found['tokens'] / middle / 1e3:.3g}", peak, row["backend"], f"{row['first_s']:.1f}",
            "yes" if row["finite"] else "**no**",
        ))  # fmt: skip
        if row["note"]:
            others.append(f"- {name}: {row['note']}")
    head = (
        "layer", "ms", "host ms", f"over {BEST}", "million tokens/s", "peak MiB", "ran", "first s",
        "finite",
    )  # fmt: skip
    title = f"T = {found['length']:,} ({found['tokens']:,} tokens)"
    parts = [f"**{title}**", markdown_table(head, rows), "\n".join(others)]
    return "\n\n".join(part for part in parts if part)


def draw(results: Sequence[Found], figure: "Figure") -> None:
    """Time a token against length, and ratios to the best Gated DeltaNet."""
    figure.set_size_inches(13, 4.8)
    left, right = figure.subplots(1, 2)
    main = sorted((r for r in results if len(r["rows"]) == len(MAIN)), key=lambda r: r["length"])
    for contender in MAIN:
        label, color, marker = _STYLES.get(
            contender.name, MIXER_STYLES.get(contender.mixer, ("", "", ""))
        )
        found = [(r, _row(r, contender.name)) for r in main]
        have = [(r, row) for r, row in found if row is not None]
        if not have:
            continue
        at = [r["length"] for r, _ in have]
        times = [1e6 * median(row["ms"]) / r["tokens"] for r, row in have]
        left.loglog(at, times, marker=marker, color=color, ms=5, label=label)
        if contender.name not in (BEST, "attention"):
            over = [ratio(r, contender.name, BEST) for r, _ in have]
            values = [float("nan") if x is None else x[0] for x in over]
            right.semilogx(at, values, marker=marker, color=color, ms=5, label=label)
    for axes in (left, right):
        lengths = [r["length"] for r in main]
        axes.set_xticks(lengths, [f"{t // 1024}k" if t >= 1024 else str(t) for t in lengths])
        axes.minorticks_off()
        axes.set_xlabel("sequence length T")
        axes.grid(alpha=0.25)
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter("{x:,.0f}")
    left.set(ylabel="nanoseconds a token, forward and backward", title="One layer")
    right.axhline(1.0, color=MIXER_STYLES[BEST][1], lw=1.5)
    right.axhline(COMPARABLE, color="0.5", lw=0.8, ls=":")
    right.set(
        ylabel="time over Gated DeltaNet's",
        title=f"Dotted: {COMPARABLE:g}, the threshold of “comparable”",
    )
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    right.set_ylim(bottom=0)


def checks(results: Sequence[Found]) -> list[Check]:
    """That a layer costs about what Gated DeltaNet costs, and what we expect of its variants.

    Times of a CPU decide nothing: there no layer runs on its kernels.
    """
    results = [r for r in results if r["dtype"] == "bfloat16"]
    over = partial(_ratios, results, base=BEST)
    return [
        at_most("claim", "gka (30 steps) over gated_deltanet on the best kernel installed: at most"
                f" {COMPARABLE:g} at every length", largest(over(GKA)), COMPARABLE),
        at_most("claim", "gka (30 steps) over flash-linear-attention's Gated DeltaNet layer: at most"
                f" {COMPARABLE:g}", largest(_ratios(results, GKA, "fla:gated_deltanet")), COMPARABLE),
        at_most("claim", "gka (30 steps) over attention at the longest length: at most 0.5",
                _longest(results), 0.5),
        at_most("claim", "gka (30 steps), time a token at the longest length over that at a quarter of it: at"
                " most 1.2", _growth(results), 1.2),
        at_least("prediction", "gka (30 steps) over gated_deltanet from T = 4096 on: at least 1.25",
                 min(over(GKA, least=4096), default=None), 1.25),
        at_most("prediction", "the same: at most 1.8", largest(over(GKA, least=4096)), 1.8),
        at_most("prediction", "gka, cg over gated_deltanet from T = 4096 on: at most 1.5",
                largest(over("gka, cg", least=4096)), 1.5),
        at_most("prediction", "gka with 8 steps over gated_deltanet from T = 4096 on: at most 1.35",
                largest(over("gka, 8 steps", least=4096)), 1.35),
        at_least("prediction", "MesaNet's layer over gka (30 steps): at least 1.2",
                 min(_ratios(results, "fla:mesa_net", GKA), default=None), 1.2),
    ]  # fmt: skip


def _longest(results: Sequence[Found]) -> float | None:
    """gka over attention at the longest length that has both."""
    have = [(r["length"], ratio(r, GKA, "attention")) for r in results]
    return max(((t, x[0]) for t, x in have if x is not None), default=(0, None))[1]


def _growth(results: Sequence[Found]) -> float | None:
    """gka's time a token at the longest length over that at the longest of a quarter of it."""
    rows = {r["length"]: (r["tokens"], _row(r, GKA)) for r in results}
    times = {t: median(row["ms"]) / tokens for t, (tokens, row) in rows.items() if row is not None}
    longest = max(times, default=0)
    return times[longest] / times[longest // 4] if longest // 4 in times else None


RUNTIME = Experiment(
    name="runtime",
    title="time of one layer, forward and backward",
    claim="A Gated KalmaNet layer's time is comparable to Gated DeltaNet's, and linear in the length.",
    source="arXiv 2511.21016, figure 3b (8 heads of 128, batch 4); “comparable”, as we read it: at most 1.5",
    prediction="Against the best kernel a user can install (flash-qla), the layer of 30 steps takes 1.25 to"
    " 1.8 times Gated DeltaNet's from 4,096 tokens on: the memories alone are 3 times apart, but projections,"
    " convolutions and norms are the same. Conjugate gradients take at most 1.5 times, 8 steps at most 1.35."
    " Against flash-linear-attention's layer it is at most 1.5. MesaNet takes at least 1.2 times GKA's time.",
    refuted_by="ratios outside these ranges.",
    version=1,
    sizes={
        "smoke": Size(1, 1, 16, (64,), None, 0.01),
        "quick": Size(1, 2, 32, (512, 128, 256, 1024, 2048), None, 1.5),
        "full": Size(4, 8, 128, (8192, 2048, 32768, 4096, 16384, 1024), 8192, 0.6),
    },
    seeds=dict.fromkeys(("smoke", "quick", "full"), 1),
    cells=cells,
    table=table,
    draw=draw,
    checks=checks,
)  # fmt: skip
