"""Code that lies in a folder is never run, whatever standard input answers."""

import ast
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, dynamic_module_utils

from gka.commands import main as cli
from gka.data import byte_tokenizer
from gka.errors import InputError
from gka.foreign_code import read_tokenizer, refuse_adapter_code, without_code
from gka.models import GKAConfig, GKAForCausalLM

PLANT = """
open({mark!r}, "w").close()
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class Config(PretrainedConfig): model_type = "planted"
class Tokenizer(PreTrainedTokenizerFast): pass
class Model: pass
def generate(model, *args, **kwargs): return None
"""
TINY = ["--sequence-length=16", "--batch-size=2", "--max-steps=1", "--set=data.eval_fraction=0.3"]
TINY += ["--hidden-size=16", "--num-hidden-layers=1", "--num-heads=2", "--set=model.num_iter=3"]


class Pickled:
    """Makes the mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small hybrid and its tokenizer, with nothing planted."""
    folder = tmp_path_factory.mktemp("clean") / "model"
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 257, "hidden_size": 16, "num_heads": 2, "head_dim": 8}
    config = GKAConfig(**sizes, mixers=["attention", "gka"], eos_token_id=256, pad_token_id=256)
    GKAForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def planted(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to plant something in; standard input says yes to everything."""
    monkeypatch.setenv("GKA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"y\n" * 1000)))
    folder = Path(shutil.copytree(clean, tmp_path / "planted"))
    code = PLANT.format(mark=str(tmp_path / "ran"))
    for name in ("planted.py", "custom_generate/generate.py", "modeling.py", "configuration.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    return folder


def edit(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | fields))


def plant_tokenizer(folder: Path, mark: Path) -> None:
    auto = {"AutoTokenizer": ["planted.Tokenizer", "planted.Tokenizer"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="Planted", auto_map=auto)


def plant_known_tokenizer(folder: Path, mark: Path) -> None:
    auto = {"AutoTokenizer": [None, "planted.Tokenizer"]}
    edit(folder / "tokenizer_config.json", auto_map=auto)


def plant_config(folder: Path, mark: Path) -> None:
    auto = dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), "planted.Model")
    auto |= {"AutoConfig": "planted.Config", "AutoTokenizer": "planted.Tokenizer"}
    edit(folder / "config.json", auto_map=auto)


def plant_unknown_model(folder: Path, mark: Path) -> None:
    plant_config(folder, mark)
    edit(folder / "config.json", model_type="planted")


def plant_kernels(folder: Path, mark: Path) -> None:
    edit(folder / "config.json", attn_implementation="planted/kernels")


def plant_generation(folder: Path, mark: Path) -> None:
    edit(folder / "generation_config.json", custom_generate="planted", trust_remote_code=True)


def plant_adapter(folder: Path, mark: Path) -> None:
    auto = {"base_model_class": "Model", "parent_library": "planted"}
    values = {"peft_type": "LORA", "auto_mapping": auto, "base_model_name_or_path": str(folder)}
    values |= {"megatron_core": "planted", "megatron_config": {}, "target_modules": ["q_proj"]}
    edit(folder / "adapter_config.json", **values)
    torch.save({"weights": Pickled(mark)}, folder / "adapter_model.bin")


def plant_weights(folder: Path, mark: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, "more": Pickled(mark)}, folder / "pytorch_model.bin")


def plant_template(folder: Path, mark: Path) -> None:
    reach = "''.__class__.__mro__[1].__subclasses__()"
    template = f"{{% for c in {reach} %}}{{% if c.__name__ == '_wrap_close' %}}"
    template += (
        f"{{{{ c.__init__.__globals__['system']('mkdir {mark}') }}}}{{% endif %}}{{% endfor %}}"
    )
    (folder / "chat_template.jinja").write_text(template)


Plant = Callable[[Path, Path], None]
HARMLESS = (plant_known_tokenizer, plant_config, plant_generation, plant_adapter, plant_template)
PLANTS: dict[str, tuple[Plant, ...]] = {
    "harmless": HARMLESS,  # the folder works without them
    "tokenizer": (plant_tokenizer,),
    "model": (plant_unknown_model,),
    "kernels": (plant_kernels,),
    "weights": (plant_weights,),
}


def commands(model: Path, folder: Path) -> list[list[str | Path]]:
    """Every command that opens a folder, with all folders that it opens planted."""
    text, chat, state = folder / "text", folder / "chat.jsonl", folder / "state"
    text.mkdir()
    for name in "abcdef":
        (text / f"{name}.py").write_text(f"import os\nos.mkdir({str(folder / 'ran')!r})\n" * 3)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat.write_text(3 * (json.dumps({"messages": turns}) + "\n"))
    torch.save(Pickled(folder / "ran"), state)
    few = ["--max-new-tokens=2", "--prompt=to"]
    one = ["--set=stage1.max_steps=0", "--set=stage2.max_steps=0", "--set=stage1.batch_size=2"]
    one += ["--set=stage2.batch_size=2", "--sequence-length=16", "--set=data.eval_fraction=0.3"]
    asked = ["--lengths=256", "--tasks=perplexity", "--samples=1"]
    return [
        ["generate", model, *few],
        ["generate", model, *few, "--state", state],
        ["inspect", model, "--prompt=to be", "--output", folder / "look"],
        ["convert", model, "--to=gka", "--output", folder / "converted"],
        ["evaluate", model, *asked, "--text", text, "--output", folder / "asked"],
        ["train", text, "--tokenizer", model, "--output", folder / "run", *TINY],
        ["prime", model, "--text", text, "--tokenizer", model, *one, "-o", folder / "primed"],
        ["prime", model, "--chat", chat, *one, "-o", folder / "chatted"],
    ]


@pytest.mark.parametrize("kind", PLANTS)
def test_nothing_planted_runs(
    planted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    """Python files, pickles, templates and kernels in the folders of models, tokenizers, adapters, states and
    text are not run by any command: it works without them or says on one line why not."""
    for plant in PLANTS[kind]:
        plant(planted, tmp_path / "ran")
    for arguments in commands(planted, tmp_path):
        if arguments[0] == "train" and kind in ("model", "kernels", "weights"):
            continue  # it opens the tokenizer alone
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        errors = capfd.readouterr().err
        assert not (tmp_path / "ran").exists(), arguments
        assert end.value.code in (0, 2), (arguments, errors)
        lines = [line for line in errors.splitlines() if line.startswith("gka: ")]
        assert (len(lines) == 1) == (end.value.code == 2), (arguments, errors)
        assert "Traceback" not in errors


def test_what_is_planted_would_run(planted: Path, tmp_path: Path) -> None:
    """The planted files are live: readers that trust them run them."""
    plant_tokenizer(planted, tmp_path / "ran")
    plant_unknown_model(planted, tmp_path / "ran")
    for reader in (AutoTokenizer, AutoConfig):
        with pytest.raises(Exception):  # noqa: B017  (whatever it makes of the rest)
            reader.from_pretrained(planted, trust_remote_code=True)
            raise RuntimeError
        assert (tmp_path / "ran").exists()
        (tmp_path / "ran").unlink()
        for name in [n for n in sys.modules if n.startswith("transformers_modules")]:
            del sys.modules[name]
    plant_weights(planted, tmp_path / "ran")
    with pytest.raises(Exception):  # noqa: B017
        torch.load(planted / "pytorch_model.bin", weights_only=False)
        raise RuntimeError
    assert (tmp_path / "ran").exists()


def test_yes_on_standard_input_is_no_answer(planted: Path, tmp_path: Path) -> None:
    """`yes | gka generate`: the tokenizer's file is not run, and the command ends at once, with one line."""
    plant_tokenizer(planted, tmp_path / "ran")
    code = "from gka.commands.main import main; main()"
    command = [sys.executable, "-c", code, "generate", str(planted), "--prompt=x"]
    command += ["--max-new-tokens=2"]
    done = subprocess.run(command, input="y\n" * 1000, capture_output=True, text=True, timeout=60)
    assert not (tmp_path / "ran").exists()
    assert done.returncode in (0, 2) and len(done.stderr.splitlines()) <= 1, done.stderr


def test_trust_is_refused_rather_than_ignored(clean: Path) -> None:
    """Who asks for `trust_remote_code` is told that it is never given; every reader gets False."""
    assert without_code({"revision": "main"}) == {"revision": "main", "trust_remote_code": False}
    with pytest.raises(
        InputError, match="trust_remote_code is set, but code that comes with a model"
    ):
        read_tokenizer(clean, trust_remote_code=True)
    from gka.checkpoints.open import config_of, from_pretrained

    for reader in (config_of, from_pretrained):
        with pytest.raises(InputError, match="trust_remote_code is set"):
            reader(clean, trust_remote_code=True)


def test_adapters_import_no_module(planted: Path, tmp_path: Path) -> None:
    """An adapter whose configuration names a module to import (peft's megatron_core) is refused."""
    plant_adapter(planted, tmp_path / "ran")
    with pytest.raises(InputError, match=r"megatron_config .* 'planted', code from elsewhere"):
        refuse_adapter_code(planted)
    edit(planted / "adapter_config.json", megatron_config=None)
    refuse_adapter_code(planted)


def code_of(path: Path) -> str:
    """The statements of a file, without docstrings, which may show a user what to call."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


def test_one_way_to_read_folders() -> None:
    """No file of the package reads a folder by an Auto class but through the helper."""
    source = Path(cli.__file__).parents[1]
    readers = ("AutoTokenizer.from_pretrained", "AutoConfig.from_pretrained", "PeftModel.from_")
    readers += ("AutoModelForCausalLM.from_pretrained", "load_dataset(", "trust_remote_code=True")
    readers += ("torch.load(", "pickle.load")
    found = [
        path.relative_to(source).as_posix()
        for path in sorted(source.rglob("*.py"))
        if any(reader in code_of(path) for reader in readers)
    ]
    # workers.py unpickles what its own processes say over pipes, no file
    assert found == ["data/workers.py", "foreign_code.py"]
