"""A call passes through few files, and comes back to few that it has left; no GPU is needed to count."""

import pytest

pytest.importorskip("triton", reason="the walk goes to its launches")
from house.walk import alone

# files, and returns up to the next five, that each walk may have: python -m tests.house.walk tells today's
LIMITS = {
    "forward, first": (28, 195),
    "backward, first": (17, 205),
    "forward, again": (20, 80),
    "backward, again": (12, 48),
    "input_ids on a CPU": (30, 395),
}


@pytest.mark.parametrize("name", ["layer_on_hopper", "layer_on_cpu"])
def test_walks_stay_short(name: str) -> None:
    """Of a layer on Hopper, whose kernels are reached, and of a model on the CPU."""
    for walk in alone(name):
        files, returns = LIMITS[walk["walk"]]
        assert walk["files"] <= files, walk
        assert walk["returns"] <= returns, walk
