"""Where transformers' own tests of a model are, and how they are loaded without being part of ours.

`make test-transformers` gets them: ModelTesterMixin and ConfigTester come with transformers' source
distribution on PyPI. GenerationTesterMixin comes with its repository alone: point GKA_TRANSFORMERS_TESTS to a
checkout of the tag of the installed version to run it as well.
"""

import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers

VARIABLE = "GKA_TRANSFORMERS_TESTS"
_PACKAGE = "transformers_tests"


class Nothing:
    """In place of a mixin that the folder does not have."""


# Arguments that every configuration takes, in place of a table of the repository.
_COMMON = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 3,
    "architectures": ["SomeModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}
# Modules that the source distribution's own files import and that it lacks.
_STANDINS: dict[str, dict[str, Any]] = {
    "exporters.test_export": {"ExportTesterMixin": Nothing},
    "generation.test_utils": {"GenerationTesterMixin": Nothing},
    "utils.test_configuration_utils": {"config_common_kwargs": _COMMON},
}


def common_tests() -> tuple[Any, Any, Any]:
    """(ModelTesterMixin, GenerationTesterMixin or `Nothing`, ConfigTester); skips the module without them."""
    folder = Path(os.environ.get(VARIABLE, "")) / "tests"
    if not os.environ.get(VARIABLE) or not (folder / "test_modeling_common.py").is_file():
        pytest.skip(
            f"transformers' own tests are not here: run make test-transformers, or set {VARIABLE} to a "
            f"folder of transformers {transformers.__version__} with tests/test_modeling_common.py",
            allow_module_level=True,
        )
    if importlib.util.find_spec("parameterized") is None:
        pytest.skip("they need pip install parameterized", allow_module_level=True)
    package = ModuleType(_PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[_PACKAGE] = package
    for name, values in _STANDINS.items():
        if not folder.joinpath(*name.split(".")).with_suffix(".py").is_file():
            _stand_in(name, values)
    modeling = importlib.import_module(f"{_PACKAGE}.test_modeling_common")
    configuration = importlib.import_module(f"{_PACKAGE}.test_configuration_common")
    return modeling.ModelTesterMixin, modeling.GenerationTesterMixin, configuration.ConfigTester


def markers() -> set[str]:
    """pytest markers of transformers' tests; ours are strict about theirs."""
    folder = Path(os.environ.get(VARIABLE, "")) / "tests"
    files = ("test_modeling_common.py", "generation/test_utils.py", "exporters/test_export.py")
    texts = [(folder / name).read_text("utf-8") for name in files if (folder / name).is_file()]
    decorators = Path(str(transformers.__file__)).with_name("testing_utils.py").read_text("utf-8")
    return {name for text in (*texts, decorators) for name in re.findall(r"\bmark\.(\w+)", text)}


def _stand_in(name: str, values: dict[str, Any]) -> None:
    full = f"{_PACKAGE}.{name}"
    parent = full.rpartition(".")[0]
    for module in (parent, full):
        if module not in sys.modules:
            sys.modules[module] = ModuleType(module)
            sys.modules[module].__path__ = []  # pyright: ignore[reportAttributeAccessIssue]
    vars(sys.modules[full]).update(values)
