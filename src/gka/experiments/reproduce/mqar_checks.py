"""The statements that decide `mqar`: the paper's claim, and our predictions."""

from collections.abc import Iterable, Sequence
from typing import Literal

from gka.experiments.reproduce.experiment import Check, Found
from gka.experiments.reproduce.mqar_groups import (
    OURS,
    Groups,
    decisive,
    groups_of,
    members,
    name_of,
    settings_of,
    shown_settings,
    smallest,
)
from gka.experiments.reproduce.mqar_models import MIXERS


def checks(results: Sequence[Found]) -> list[Check]:
    """The claim and our predictions, in the settings that are shown."""
    groups = groups_of(results)
    rivals = [name for name in MIXERS if name not in (*OURS, "attention")]
    pairs = [(s, w) for s in shown_settings(groups) for w in decisive(groups, s)]
    return [
        _ahead(groups, rivals),
        _least("claim", "at decisive widths: accuracy of the better GKA less that of the best rival of fixed"
               " size, at least -0.01", [_lead(groups, s, w, OURS, rivals) for s, w in pairs], -0.01),
        Check("prediction", "attention solves every setting at width 64 and more",
              *_attention(groups)),
        _within("at decisive widths: GKA with and without gates and alpha within 0.05",
                [_lead(groups, s, w, ("gka",), ("gka_ungated",)) for s, w in pairs]),
        _within("at decisive widths: MesaNet within 0.05 of GKA",
                [_lead(groups, s, w, ("gka",), ("mesa_net",)) for s, w in pairs]),
        _least("prediction", "at equal state bytes: accuracy of Gated DeltaNet less GKA's, at least -0.05",
               _equal_leads(groups, "gated_deltanet"), -0.05),
        _half_width(groups),
    ]  # fmt: skip


def _accuracy(
    groups: Groups, setting: tuple[int, int], width: int, mixers: Iterable[str]
) -> float | None:
    """The best mean accuracy of these mixers; None if none was measured."""
    there = [g.mean for g in members(groups, setting, mixers=mixers) if g.width == width]
    return max(there, default=None)


def _lead(
    groups: Groups, setting: tuple[int, int], width: int, mixers: Iterable[str],
    others: Iterable[str],
) -> float | None:  # fmt: skip
    """Accuracy of the best of `mixers` less that of the best of `others`."""
    one, other = (_accuracy(groups, setting, width, names) for names in (mixers, others))
    return None if one is None or other is None else one - other


def _equal_leads(groups: Groups, mixer: str) -> list[float | None]:
    """Accuracy of a mixer with twice as wide values less GKA's, in the settings that are shown."""
    found: list[float | None] = []
    for setting in shown_settings(groups):
        for wide in members(groups, setting, 2, (mixer,)):
            ours = groups.get((*setting, "gka", wide.width, 1))
            found.append(None if ours is None else wide.mean - ours.mean)
    return found


def _least(
    of: Literal["claim", "prediction"], text: str, values: Sequence[float | None], limit: float
) -> Check:
    """That the smallest of the measured values is at least `limit`; undecided without any."""
    known = [x for x in values if x is not None]
    if not known:
        return Check(of, text, "not measured", None)
    return Check(of, text, f"{min(known):.3f}", min(known) >= limit)


def _within(text: str, values: Sequence[float | None]) -> Check:
    """The prediction that no measured difference is beyond 0.05."""
    known = [abs(x) for x in values if x is not None]
    if not known:
        return Check("prediction", text, "not measured", None)
    return Check("prediction", text, f"{max(known):.3f}", max(known) <= 0.05)


def _ahead(groups: Groups, rivals: Sequence[str]) -> Check:
    """That no rival of fixed size solves a setting at a smaller width than GKA."""
    text = "no rival of fixed size solves a setting that is shown at a smaller width than GKA"
    beaten, solved = [], 0
    for setting in shown_settings(groups):
        ours = [g for name in OURS if (g := smallest(groups, setting, name)) is not None]
        least = min((g.width for g in ours), default=None)
        for name in rivals:
            rival = smallest(groups, setting, name)
            solved += rival is not None or least is not None
            if rival is not None and (least is None or rival.width < least):
                beaten.append(f"{rival.label} at width {rival.width}, {name_of(setting)}")
    if not solved:
        return Check("claim", text, "nothing is solved", None)
    return Check("claim", text, "; ".join(beaten) or "none does", not beaten)


def _attention(groups: Groups) -> tuple[str, bool | None]:
    """What was found, and whether attention solves every setting from width 64 on."""
    wide = [
        g
        for s in settings_of(groups)
        for g in members(groups, s, mixers=("attention",))
        if g.width >= 64
    ]
    if not wide:
        return "not measured", None
    worst = min(wide, key=lambda g: g.mean)
    return f"{worst.mean:.3f} or more", worst.solved


def _half_width(groups: Groups) -> Check:
    """The prediction about 64 pairs in 256 tokens."""
    text = "64 pairs in 256 tokens: GKA solves them at half the width of the delta rules or less"
    setting = (256, 64)
    ours, *deltas = (smallest(groups, setting, m) for m in ("gka", "deltanet", "gated_deltanet"))
    widths = [g.width for g in deltas if g is not None]
    if setting not in shown_settings(groups) or (ours is None and not widths):
        return Check("prediction", text, "not measured", None)
    there = "not solved" if ours is None else f"width {ours.width}"
    found = f"GKA: {there}; delta rules: {min(widths, default='not solved')}"
    holds = ours is not None and (not widths or 2 * ours.width <= min(widths))
    return Check("prediction", text, found, holds)
