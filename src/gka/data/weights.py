"""Weights of several corpora."""

from collections.abc import Sequence

from gka.errors import InputError


def check_weights(weights: Sequence[float], corpora: int) -> None:
    """Raise `InputError` unless there is a weight above 0 for each corpus, with sum 1."""
    shown = ", ".join(f"{weight:g}" for weight in weights)
    if len(weights) != corpora:
        raise InputError(
            f"weights are {shown}: {len(weights)} for {corpora} texts; give one for each"
        )
    if not all(0 < weight < float("inf") for weight in weights):
        raise InputError(f"weights are {shown}; expected numbers above 0")
    if abs(sum(weights) - 1) > 1e-6:
        normal = ",".join(f"{weight / sum(weights):.6g}" for weight in weights)
        raise InputError(
            f"weights are {shown}, with sum {sum(weights):g}; expected sum 1, such as {normal}"
        )
