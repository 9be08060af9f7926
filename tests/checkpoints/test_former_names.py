"""What moved from `gka.models` to `gka.checkpoints` is found under its former name, with one warning."""

import subprocess
import sys

import pytest


def warnings_of(code: str) -> list[str]:
    """DeprecationWarnings about our names that a fresh interpreter gives."""
    script = f"""
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {code}
print(*(str(w.message) for w in caught if "gka.checkpoints" in str(w.message)), sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "from gka.models.adapters import ADAPTERS, Adapter, adapter_of; assert 'fla' in ADAPTERS",
            "gka.models.adapters is gka.checkpoints now: ADAPTERS is FORMATS, Adapter is Format",
        ),
        (
            "from gka.models.loading import load_gka, load_model; load_gka, load_model",
            "gka.models.loading is gka.checkpoints.open now",
        ),
        ("import gka.models; gka.models.loading.load_gka", "gka.models.loading is gka.checkpoints.open now"),
        ("from gka.models import save_as; save_as", "gka.models.save_as is gka.checkpoints.save_as now"),
        (
            "from gka.models import write_auto_map; write_auto_map",
            "gka.models.write_auto_map is gka.checkpoints.write_auto_map now",
        ),
        ("from gka.checkpoints import open, save_as; open.load_gka", ""),
        ("from gka.models import GKAForCausalLM, GKAConfig; GKAConfig()", ""),
    ],
)  # fmt: skip
def test_former_names_work_and_warn_once(code: str, message: str) -> None:
    """Each former name gives the object itself and one DeprecationWarning; new names give none."""
    assert warnings_of(code) == [message]


def test_nothing_else_is_found_there() -> None:
    """A name that never was is refused."""
    import gka.models

    with pytest.raises(AttributeError, match="nonsense"):
        _ = gka.models.nonsense  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ModuleNotFoundError):
        __import__("gka.models.adapters.nonsense")
