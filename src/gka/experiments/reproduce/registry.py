"""The experiments by name."""

from gka.errors import InputError
from gka.experiments.reproduce.ablations import ABLATIONS
from gka.experiments.reproduce.convergence import CONVERGENCE
from gka.experiments.reproduce.experiment import Experiment
from gka.experiments.reproduce.gradients import GRADIENTS
from gka.experiments.reproduce.hybrid import HYBRID
from gka.experiments.reproduce.key_statistics import KEY_STATISTICS
from gka.experiments.reproduce.language import LANGUAGE
from gka.experiments.reproduce.mqar import MQAR
from gka.experiments.reproduce.runtime import RUNTIME
from gka.experiments.reproduce.sketching import SKETCHING
from gka.experiments.reproduce.state_precision import STATE_PRECISION

EXPERIMENTS: dict[str, Experiment] = {
    e.name: e
    for e in (
        CONVERGENCE,
        GRADIENTS,
        MQAR,
        RUNTIME,
        ABLATIONS,
        SKETCHING,
        LANGUAGE,
        HYBRID,
        STATE_PRECISION,
        KEY_STATISTICS,
    )
}


def find(name: str) -> Experiment:
    """The experiment; raises `InputError` with the names there are."""
    if name not in EXPERIMENTS:
        raise InputError(f"there is no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]
