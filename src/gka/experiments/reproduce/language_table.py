"""The table of `language` and the statements that make its verdict."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Literal

from gka.evaluation.plots import MIXER_STYLES
from gka.experiments.ledger import markdown_table
from gka.experiments.reproduce.experiment import Check, Found, at_least, at_most

Of = Callable[[Found], float | None]
Kind = Literal["claim", "prediction"]
LINEAR = ("gka", "gated_deltanet", "gla", "deltanet")
ATTENTION = "+attention"


def groups(results: Sequence[Found]) -> dict[tuple[str, str], list[Found]]:
    """The results of each (size, mixer), one a seed."""
    found: dict[tuple[str, str], list[Found]] = {}
    for r in sorted(results, key=lambda r: r["seed"]):
        found.setdefault((r["size"], r["mixer"]), []).append(r)
    return found


def label(mixer: str) -> str:
    """The mixer's name for people."""
    name = MIXER_STYLES[mixer.removesuffix(ATTENTION)][0]
    return f"{name} + attention" if mixer.endswith(ATTENTION) else name


def loss(result: Found, part: str, which: str = "all") -> float | None:
    """Loss of a part's slice in nats."""
    return result["loss"][part][which]["loss"]


def accuracy(result: Found, task: str, length: int) -> float | None:
    """Share of a task's answers that are right at a length, over all depths."""
    rows = [r for r in result["tasks"] if r["task"] == task and r["length"] == length]
    asked = sum(r["samples"] for r in rows)
    return sum(r["accuracy"] * r["samples"] for r in rows) / asked if asked else None


def nearest(result: Found) -> int:
    """The prompt length nearest to that of the training."""
    lengths = {r["length"] for r in result["tasks"]}
    return min(lengths, key=lambda n: abs(n - result["length"]))


def rise(result: Found) -> float:
    """Loss between 4 and 8 times the training length minus that of the length's second half."""
    rows = result["positions"]
    (home,) = (r["loss"] for r in rows if r["stop"] == result["length"])
    return rows[-1]["loss"] - home


def utility(result: Found, reset: int, which: str = "repeated") -> float | None:
    """Utility of the memory after the smallest reset of at least so many tokens."""
    rows = [r for r in result["utility"]["rows"] if r["reset"] >= reset]
    return rows[0][which] if rows else None


def table(results: Sequence[Found]) -> str:
    """One row a model: sizes, losses by slice, tasks, extrapolation, memory, speed."""
    rows = []
    for (size, mixer), group in groups(results).items():
        first, near = group[0], nearest(group[0])
        parts = [_spread(group, lambda r, p=p, s=s: loss(r, p, s)) for p, s in SLICES]
        tasks = [_spread(group, lambda r, t=t, n=near: accuracy(r, t, n), 2) for t in TASKS]
        states = " / ".join(f"{x / 2**20:.2f}" for x in first["state_bytes"].values())
        speed = fmean(r["training"]["tokens_per_second"] for r in group)
        name = label(mixer) + (" (large)" if size == "large" else "")
        rows.append((
            name, len(group), f"{first['training']['parameters'] / 1e6:.2f}", *parts, *tasks,
            _spread(group, rise), _spread(group, lambda r: utility(r, r["length"] // 4)),
            states, f"{speed:,.0f}", first["training"].get("kernels", "not noted"),
        ))  # fmt: skip
    head = ("model", "seeds", "M parameters", "memory", "repeated", "recalled", "far", "new", "code",
            *TASKS, "rise at 8x", "utility", "state MiB", "tokens/s", "kernels")  # fmt: skip
    return f"{_words(results[0])}\n\n{markdown_table(head, rows)}\n\n{_by_length(results)}"


SLICES = (
    ("memory", "all"), ("memory", "repeated"), ("memory", "recalled"), ("memory", "far"),
    ("memory", "new"), ("code", "all"),
)  # fmt: skip
TASKS = ("needle", "needle-keys", "needle-only", "facts-1")


def _words(first: Found) -> str:
    length, counted = first["length"], first["loss"]["memory"]
    tokens = ", ".join(f"{name} {row['tokens']:,}" for name, row in counted.items())
    return (
        f"Losses in nats a token on held-out documents, each sequence of {length} tokens read from its"
        f" beginning (tokens of the memory part: {tokens}). repeated: the trigram that ends there occurred"
        " before in the sequence; recalled: and never in the training text; far: and last"
        f" {length // 4} tokens back or more; new: it did not occur before. Tasks: share of answers that"
        f" greedy decoding gives whole, prompts of {nearest(first)} tokens. rise at 8x: loss between 4 and"
        f" 8 times {length} tokens minus that between {length // 2} and {length}. utility: loss of repeated"
        f" tokens after a reset {length // 4} or more tokens back minus that with the whole past. State of"
        f" a row after {' and '.join(first['state_bytes'])} tokens (float32 states, 16-bit keys and values)."
        " Tokens/s of training, beside other work on the machine. Mean over seeds (smallest to largest)."
    )


def _spread(group: Sequence[Found], of: Of, digits: int = 3) -> str:
    values = [x for r in group if (x := of(r)) is not None]
    if not values:
        return "none"
    middle = f"{fmean(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _by_length(results: Sequence[Found]) -> str:
    """Accuracy of every task by length, all depths together."""
    lengths = sorted({r["length"] for r in results[0]["tasks"]})
    rows = [
        (label(mixer) + (" (large)" if size == "large" else ""), task,
         *(_spread(group, lambda r, t=task, n=n: accuracy(r, t, n), 2) for n in lengths))
        for (size, mixer), group in groups(results).items()
        for task in TASKS
    ]  # fmt: skip
    head = ("model", "task", *(f"{n:,} tokens" for n in lengths))
    return f"Answers that are right, by length of the prompt:\n\n{markdown_table(head, rows)}"


def _mean(results: Sequence[Found], mixer: str, of: Of, size: str = "small") -> float | None:
    values = [of(r) for r in groups(results).get((size, mixer), [])]
    known = [x for x in values if x is not None]
    return fmean(known) if known else None


def _best(results: Sequence[Found], of: Of, others: Sequence[str]) -> str | None:
    """The mixer of `others` with the smallest mean; None if one is not measured."""
    means = {m: x for m in others if (x := _mean(results, m, of)) is not None}
    return min(means, key=lambda m: means[m]) if len(means) == len(others) else None


def _compared(
    results: Sequence[Found], text: str, one: str, other: str | None, of: Of, limit: float,
    kind: Kind = "claim", size: str = "small", most: bool = True,
) -> Check:  # fmt: skip
    """The check that the mean of one mixer minus another's, seed by seed, is at most (or least) a limit."""
    pairs = groups(results)
    theirs = {r["seed"]: of(r) for r in pairs.get((size, other or ""), [])}
    gaps = [
        mine - them
        for r in pairs.get((size, one), [])
        if (them := theirs.get(r["seed"])) is not None and (mine := of(r)) is not None
    ]
    if not gaps:
        return Check(kind, text, "not measured", None)
    mean, spread = fmean(gaps), f"by seed {min(gaps):.3f} to {max(gaps):.3f}"
    told = f"{mean:.3f} to {label(other or '')}" + (f" ({spread})" if len(gaps) > 1 else "")
    return Check(kind, text, told, mean <= limit if most else mean >= limit)


def checks(results: Sequence[Found]) -> list[Check]:
    """The claim's statements and our predictions."""
    return [*_claims(results), *_predictions(results)]


def _claims(results: Sequence[Found]) -> list[Check]:
    others, pair = LINEAR[1:], (f"gka{ATTENTION}", f"gated_deltanet{ATTENTION}")
    whole, recalled, code = (_best(results, of, others) for of in (_memory, _recalled, _code))
    found = [
        _compared(results, "memory part, all tokens: gka's loss minus that of the best other linear mixer,"
                  " at most 0 nats", "gka", whole, _memory, 0.0),
        _compared(results, "the same on recalled tokens, at most -0.01", "gka", recalled, _recalled, -0.01),
        _compared(results, "code part, all tokens: the same, at most 0", "gka", code, _code, 0.0),
        _compared(results, "needle-keys at the training length: gka's share of right answers minus"
                  " gated_deltanet's, at least 0.05", "gka", "gated_deltanet", _needles, 0.05, most=False),
        _compared(results, "memory part, hybrids: gka's loss minus gated_deltanet's, at most 0", *pair,
                  _memory, 0.0),
    ]  # fmt: skip
    if any(r["size"] == "large" for r in results):
        text = "memory part, large models: gka's loss minus gated_deltanet's, at most 0"
        found.append(_compared(results, text, "gka", "gated_deltanet", _memory, 0.0, size="large"))
    return found


def _predictions(results: Sequence[Found]) -> list[Check]:
    of: Kind = "prediction"
    near = _mean(results, "gka", _memory), _mean(results, "gated_deltanet", _memory)
    only, rises, late = (
        max((x for m in LINEAR if (x := _mean(results, m, what)) is not None), default=None)
        for what in (_only, rise, _late)
    )
    hybrids = [x for m in LINEAR if (x := _mean(results, m + ATTENTION, _only)) is not None]
    alone = _mean(results, "attention", _only)
    return [
        at_most(of, "memory part: gka and gated_deltanet differ by at most 0.02 nats",
                None if None in near else abs(near[0] - near[1]), 0.02),  # pyright: ignore
        _compared(results, "recalled tokens: gka's loss minus gla's, at most -0.02", "gka", "gla",
                  _recalled, -0.02, of),
        at_most(of, "needle-only at the training length: the best linear mixer, at most 0.5", only, 0.5),
        at_least(of, "needle-only: the worst hybrid minus attention alone, at least -0.1",
                 None if alone is None or not hybrids else min(hybrids) - alone, -0.1),
        at_least(of, "8 times the training length: attention's loss rises by at least 0.5",
                 _mean(results, "attention", rise), 0.5),
        at_most(of, "8 times the training length: linear mixers' loss rises by at most 0.05", rises, 0.05),
        at_most(of, "repeated tokens: utility after a reset of twice the training length, linear mixers, at"
                " most 0.02", late, 0.02),
    ]  # fmt: skip


def _memory(r: Found) -> float | None:
    return loss(r, "memory")


def _code(r: Found) -> float | None:
    return loss(r, "code")


def _recalled(r: Found) -> float | None:
    return loss(r, "memory", "recalled")


def _needles(r: Found) -> float | None:
    return accuracy(r, "needle-keys", nearest(r))


def _only(r: Found) -> float | None:
    return accuracy(r, "needle-only", nearest(r))


def _late(r: Found) -> float | None:
    return utility(r, 2 * r["length"])
