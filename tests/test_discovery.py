"""transformers' Auto classes and peft know the models after `import gka`, which loads neither."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import gka
from gka import discovery
from gka.checkpoints import write_auto_map
from gka.checkpoints.formats import hybrid
from gka.errors import InputError
from gka.models import GKAConfig, GKAForCausalLM

RELEASED = Path(__file__).parent / "fixtures" / "official_hybrid_qwen3_tiny"
TINY: dict[str, Any] = {"vocab_size": 31, "hidden_size": 16, "head_dim": 8, "num_heads": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved hybrid of two layers."""
    GKAForCausalLM(GKAConfig(**TINY, mixers=["gka", "attention"])).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def printed(code: str, folder: Path, **environment: str) -> str:
    """What a fresh interpreter prints, in which FOLDER is the model's."""
    script = f"FOLDER, HYBRID = {str(folder)!r}, {str(RELEASED)!r}\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOAD = """
print('gka.models' in sys.modules)
print(AutoConfig.from_pretrained(HYBRID).pattern)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
print(type(model).__module__, type(model).__name__, type(AutoConfig.from_pretrained(FOLDER)).__name__)
"""
FOUND = (
    "False\n['attention', 'gka', 'attention', 'gka']\ngka.models.causal_lm GKAForCausalLM GKAConfig"
)


@pytest.mark.parametrize(
    "first",
    [
        "import sys, gka\nprint('transformers' in sys.modules)",
        "import sys, transformers.models.auto.modeling_auto, gka\nprint(False)",
    ],
    ids=["before transformers", "after transformers"],
)
def test_auto_classes_open_our_folders(folder: Path, first: str) -> None:
    """After `import gka` alone, on either side of transformers, Auto classes find the classes; gka.models
    is loaded only then."""
    code = f"{first}\nfrom transformers import AutoConfig, AutoModelForCausalLM\n{LOAD}"
    assert printed(code, folder) == f"False\n{FOUND}"


def test_remote_code_is_a_file_of_names(folder: Path) -> None:
    """With `write_auto_map` and permission the folder opens without `import gka`, also after it was saved
    again; without permission it does not."""
    write_auto_map(folder)
    code = """
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=False)
except ValueError as error:
    print('trust_remote_code' in str(error))
for name in (FOLDER, FOLDER + '-again'):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    model.save_pretrained(FOLDER + '-again')
import gka
print(isinstance(model, gka.GKAForCausalLM), isinstance(model.config, gka.GKAConfig))
"""
    found = printed(code, folder, HF_MODULES_CACHE=str(folder.parent / "modules"))
    assert found == "True\nTrue True"


def test_known_models_run_no_code_of_a_folder(folder: Path, tmp_path: Path) -> None:
    """After `import gka` the file is not run, even with permission, and what is saved does not name it."""
    write_auto_map(folder)
    (folder / "gka_auto.py").write_text("raise SystemExit('run')")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model) is GKAForCausalLM
    model.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert model.config.auto_map["AutoConfig"] == "gka_auto.GKAConfig"


def test_an_auto_map_needs_a_model_of_ours(tmp_path: Path) -> None:
    """A folder without config.json, or of another type, is refused and left as it was."""
    with pytest.raises(InputError, match="cannot be read"):
        write_auto_map(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="of type 'gka', got 'llama'"):
        write_auto_map(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_all_types_are_announced() -> None:
    """The types known without loading the models are theirs and the released hybrids'."""
    released = {format.model_type for format in hybrid.FORMATS}
    assert {GKAConfig.model_type, *released} == set(discovery.MODEL_TYPES)
    for model_type in discovery.MODEL_TYPES:
        assert issubclass(CONFIG_MAPPING[model_type], GKAConfig)


def test_announcing_twice_changes_nothing() -> None:
    """One finder is installed, however often the module is loaded."""
    before = list(sys.meta_path)
    discovery.announce()
    assert sys.meta_path == before and gka.__name__ == "gka"


def test_adapters_default_to_a_llamas_maps(tmp_path: Path, folder: Path) -> None:
    """peft's tables of default targets get the entry of a Llama, whose names our maps have; in a fresh
    process as soon as peft's module is loaded, whose loader stays its own."""
    tables = ModuleType("constants")
    tables.A_TARGET_MODULES_MAPPING = {"llama": ["q_proj"]}  # pyright: ignore[reportAttributeAccessIssue]
    tables.OTHER_MAPPING = {"llama": 1}  # pyright: ignore[reportAttributeAccessIssue]
    discovery._tell_peft(tables)
    assert (
        tables.A_TARGET_MODULES_MAPPING["gka"] == ["q_proj"] and "gka" not in tables.OTHER_MAPPING
    )
    package = tmp_path / "stand-in" / "peft" / "utils"
    package.mkdir(parents=True)
    for path in (package.parent / "__init__.py", package / "__init__.py"):
        path.write_text("")
    (package / "constants.py").write_text("A_TARGET_MODULES_MAPPING = {'llama': ['v_proj']}")
    code = """
import gka, inspect
from peft.utils import constants
print(constants.A_TARGET_MODULES_MAPPING['gka'], type(constants.__spec__.loader).__name__)
print(inspect.getsource(constants))
"""
    path = os.pathsep.join([str(package.parents[1]), os.environ.get("PYTHONPATH", "")])
    lines = printed(code, folder, PYTHONPATH=path).splitlines()
    assert lines[0] == "['v_proj'] SourceFileLoader" and "llama" in lines[1]
