"""The experiments by name."""

from gka.errors import InputError
from gka.experiments.reproduce.convergence import CONVERGENCE
from gka.experiments.reproduce.experiment import Experiment
from gka.experiments.reproduce.gradients import GRADIENTS
from gka.experiments.reproduce.hybrid import HYBRID
from gka.experiments.reproduce.key_statistics import KEY_STATISTICS
from gka.experiments.reproduce.language import LANGUAGE
from gka.experiments.reproduce.mqar import MQAR
from gka.experiments.reproduce.state_precision import STATE_PRECISION

EXPERIMENTS: dict[str, Experiment] = {
    e.name: e
    for e in (CONVERGENCE, GRADIENTS, MQAR, STATE_PRECISION, KEY_STATISTICS, HYBRID, LANGUAGE)
}


def find(name: str) -> Experiment:
    """The experiment; raises `InputError` with the names there are."""
    if name not in EXPERIMENTS:
        raise InputError(f"there is no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]
