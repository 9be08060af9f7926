"""What a run found: counts, worst errors, and the calls to look at, as a table and as JSON."""

import json
import os
import platform
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fuzz.compare import Verdict
from fuzz.invalid import Refusal

FAULTS = ("wrong", "non-finite", "raised", "silent", "obscure", "unnamed")


@dataclass
class Report:
    """Collected as the run goes.

    Attributes:
        valid: calls by status.
        invalid: wrong calls by status.
        worst: by op and backend, dtype and output: (error over tolerance, relative error, call).
        faults: what was wrong, with the number that draws it again.
    """

    seed: int
    valid: Counter = field(default_factory=Counter)
    invalid: Counter = field(default_factory=Counter)
    compared: int = 0
    worst: dict[tuple[str, str, str], tuple[float, float, int]] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def add_valid(self, index: int, op: str, traits: dict[str, str], verdict: Verdict) -> None:
        self.valid[verdict.status] += 1
        self.compared += len(verdict.findings)
        group = op if traits.get("backend", "torch") == "torch" else f"{op}, {traits['backend']}"
        for found in verdict.findings:
            kind = "gradients" if found.name.startswith("d") else "output, states"
            key = (group, traits["dtype"], kind)
            self.worst[key] = max(
                self.worst.get(key, (0.0, 0.0, -1)), (found.error, found.relative, index)
            )
        if verdict.status in FAULTS:
            worst = verdict.worst
            self.faults.append({
                "call": index, "op": op, **traits, "status": verdict.status,
                "what": verdict.message or (f"{worst.name}: {worst.error:.1e} tolerances, relative "
                                            f"{worst.relative:.1e}" if worst else ""),
            })  # fmt: skip

    def add_invalid(self, index: int, refusal: Refusal) -> None:
        self.invalid[refusal.status] += 1
        if refusal.status in FAULTS:
            self.faults.append({
                "call": index, "op": refusal.what, "status": refusal.status, "what": refusal.message,
            })  # fmt: skip

    @property
    def failed(self) -> bool:
        return bool(self.faults)

    def line(self) -> str:
        """One line on where the run stands."""

        def told(counts: Counter) -> str:
            return ", ".join(f"{n} {status}" for status, n in sorted(counts.items())) or "none"

        return f"valid: {told(self.valid)}; invalid: {told(self.invalid)}; {self.seconds:.0f} s"

    def table(self) -> str:
        """Worst errors by op and dtype, Markdown."""
        rows = [
            "| op | dtype | compared | worst, in tolerances | its relative error | call |",
            "|---|---|---|---|---|---|",
        ]
        for (op, dtype, kind), (error, relative, index) in sorted(self.worst.items()):
            rows.append(f"| {op} | {dtype} | {kind} | {error:.2g} | {relative:.1e} | {index} |")
        return "\n".join(rows)

    def show(self, most: int = 20) -> str:
        """Everything for a reader."""
        faults = [
            f"  {fault['status']}: call {fault['call']}, {fault['op']}: {fault['what'][:200]}"
            for fault in self.faults[:most]
        ]
        more = [f"  ... and {len(self.faults) - most} more"] if len(self.faults) > most else []
        return "\n".join([self.table(), "", self.line(), *faults, *more])

    def write(self, path: Path) -> None:
        """All of it as JSON, written whole."""
        content = {
            "seed": self.seed, "valid": dict(self.valid), "invalid": dict(self.invalid),
            "compared": self.compared, "seconds": round(self.seconds, 1), "torch": torch.__version__,
            "machine": platform.machine(), "python": platform.python_version(), "faults": self.faults,
            "worst": [
                {"op": op, "dtype": dtype, "kind": kind, "tolerances": e, "relative": r, "call": i}
                for (op, dtype, kind), (e, r, i) in sorted(self.worst.items())
            ],
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(json.dumps(content, indent=1))
        os.replace(temporary, path)
