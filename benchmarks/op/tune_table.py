"""A chip's stored launch configurations, updated by measurements."""

import json
from dataclasses import dataclass

from gka.kernels import configs

Options = dict[str, int]
WORTHWHILE = (
    0.98  # a candidate that takes less than this fraction of the stored one's time replaces it
)


@dataclass(frozen=True)
class Candidate:
    """A configuration to try.

    Attributes:
        registers, spills: registers and bytes of spills per thread.
        shared: bytes of shared memory per block.
        ms: sum of the median times of the kernel's recorded launches; None if not timed.
        reason: why it is rejected; None if it is not.
        stored: whether it is the one in the table.
    """

    kernel: str
    operands: str
    width: str
    options: Options
    registers: int = 0
    spills: int = 0
    shared: int = 0
    ms: float | None = None
    reason: str | None = None
    stored: bool = False


def chosen(found: list[Candidate]) -> dict[tuple[str, str, str], Candidate]:
    """For each (kernel, operands, width) the fastest if it is 2 % faster than the stored one, else that."""
    best: dict[tuple[str, str, str], Candidate] = {}
    for c in found:
        if c.stored and c.ms is not None and c.reason is None:
            best[c.kernel, c.operands, c.width] = c
    for c in found:
        key = (c.kernel, c.operands, c.width)
        if c.ms is None or c.reason is not None or c.stored or key not in best:
            continue
        held = best[key]
        held_ms = held.ms or 0.0
        if c.ms < held_ms * (WORTHWHILE if held.stored else 1.0):
            best[key] = c
    return best


def dumps(table: dict) -> str:
    """JSON with one entry per line."""

    def nested(value: dict, indent: str, depth: int) -> str:
        if depth == 0:
            return json.dumps(value)
        inner = indent + "  "
        parts = (f"{inner}{json.dumps(k)}: {nested(v, inner, depth - 1)}" for k, v in value.items())
        return "{\n" + ",\n".join(parts) + f"\n{indent}}}"

    head = {k: v for k, v in table.items() if k != "launch"}
    parts = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in head.items()]
    parts.append(f'  "launch": {nested(table["launch"], "  ", 3)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def updated(capability: tuple[int, int], found: list[Candidate], measured: dict) -> dict:
    """The chip's table, updated by measurements; starts from the nearest chip's if there is none."""
    table = json.loads(configs.table_file(capability).read_text())
    name = f"sm_{capability[0]}{capability[1]}"
    if table["chip"] != name:
        table |= {"chip": name, "measured": []}
    best = chosen(found)
    for (kernel, operands, width), c in best.items():
        table["launch"][kernel][operands][width] = c.options
    which = sorted(f"{kernel} {operands} {width}" for kernel, operands, width in best)
    if which:
        table["measured"].append(measured | {"entries": which})
    return table
