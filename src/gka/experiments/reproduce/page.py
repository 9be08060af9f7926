"""An experiment's results as a page of Markdown."""

from collections.abc import Sequence
from typing import Any

from gka.experiments.ledger import markdown_table
from gka.experiments.reproduce.experiment import Check, Experiment, Found

_PREDICTION = {"confirmed": "held", "partly": "partly held", "not": "refuted", "open": "open"}


def page_of(
    experiment: Experiment,
    ledger: dict[str, Any],
    results: Sequence[Found],
    checks: Sequence[Check],
) -> str:
    """Claim, verdict, checks, table, and how it was measured."""
    verdict = ledger["verdict"]
    parts = [
        f"# {experiment.name}: {experiment.title}",
        f"**Claim** ({experiment.source}): {experiment.claim}",
        f"**Verdict: {verdict['claim']}.** Our prediction: {_PREDICTION[verdict['prediction']]}."
        + ("" if ledger["complete"] else " Not finished: the statements are of the cells so far."),
        _checks(checks),
        f"Prediction, written before the run: {ledger['prediction']}\n\n"
        f"It would be refuted by: {ledger['refuted_by']}",
        f"![{experiment.title}]({experiment.name}.png)" if results else "",
        experiment.table(results) if results else "No cell is measured yet.",
        _failures(ledger),
        _measured(ledger),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _checks(checks: Sequence[Check]) -> str:
    marks = {True: "yes", False: "**no**", None: "open"}
    rows = [(c.of, c.text, c.found, marks[c.passed]) for c in checks]
    return markdown_table(("of", "statement", "measured", "holds"), rows)


def _failures(ledger: dict[str, Any]) -> str:
    """Cells that failed, or nothing."""
    failed = {k: r["reason"] for k, r in ledger["cells"].items() if r["state"] == "failed"}
    if not failed:
        return ""
    lines = [f"- {key}: {reason}" for key, reason in failed.items()]
    return "Cells that failed; the next run tries them again:\n\n" + "\n".join(lines)


def _measured(ledger: dict[str, Any]) -> str:
    """Commands, dates, hardware, versions, seeds and time."""
    settings, lines = ledger["settings"], []
    for run in ledger.get("runs", []):
        machine, versions = run["hardware"], run["environment"]
        gpus = f", {', '.join(machine['gpus'])}" if machine["gpus"] else ""
        lines.append(
            f"- `{run['command']}`, {run['began']}, seeds {', '.join(map(str, run['seeds']))},"
            f" {machine['processor']}{gpus}, {machine['threads']} threads,"
            f" torch {versions['torch']}, Python {versions['python']}"
        )
    spent = sum(record["seconds"] for record in ledger["cells"].values())
    numbers = ", ".join(f"{name} {value}" for name, value in settings["numbers"].items())
    return (
        f"Measured: size {settings['size']} ({numbers}), version {settings['version']} of the"
        f" experiment, device {settings['device']}, {len(ledger['cells'])} cells in"
        f" {spent / 60:.1f} minutes.\n\n" + "\n".join(dict.fromkeys(lines))
    )
