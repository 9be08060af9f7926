"""Which cases of a test run everywhere, and which with `pytest -m slow` alone."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick_first(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """The cases as parameters, those that are not among the quick ones marked slow."""
    found = list(cases)
    assert all(case in found for case in quick), "a quick case is none of the test's"

    def parameter(case: Any) -> Any:
        values = case if isinstance(case, tuple) else (case,)
        return pytest.param(*values, marks=() if case in quick else pytest.mark.slow)

    return [parameter(case) for case in found]
