"""Colours and markers of lines: a solver and a memory look the same in every figure."""

from gka.evaluation.plots import MIXER_STYLES

SOLVER_STYLES = {
    "gradient descent": ("#999999", "s"),
    "Nesterov": ("#CC79A7", "D"),
    "conjugate gradients": ("#D55E00", "v"),
    "guarded cg": ("#8B4513", "<"),
    "certified cg": ("#E69F00", "^"),
    "Chebyshev": ("#0072B2", "o"),
    "adaptive": ("#009E73", "P"),
    "exact": ("#000000", "X"),
}
# by name: label, colour, marker
MEMORY_STYLES = {
    "linear attention": MIXER_STYLES["gla"],
    "delta rule": MIXER_STYLES["deltanet"],
    "gated delta rule": MIXER_STYLES["gated_deltanet"],
    "GKA": MIXER_STYLES["gka"],
    "Kalman filter": ("Kalman filter", "#000000", "*"),
}
