"""Every command that writes a folder: one writer, one line about a disk that refuses, text as it is."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from calling import TINY_MODEL, Run
from gka import storage
from gka.checkpoints.open import load_model
from gka.commands import main as cli
from gka.console import text_console
from gka.data import byte_tokenizer
from gka.errors import InputError
from gka.models import GKAConfig, GKAForCausalLM
from gka.storage import only_maker, only_writer

pytestmark = pytest.mark.usefixtures("cache")
TINY = [*TINY_MODEL, "--max-steps=1"]
WRITERS = ("train", "prime", "recall", "mqar", "evaluate", "inspect", "convert")
MARKUP = "[/x] [bold]b[/bold] :smile:"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root") / MARKUP
    folder.mkdir(parents=True)
    for name in "abcdef":
        (folder / f"{name}.txt").write_text(f"to {name} or not to {name}\n" * 8)
    return folder


@pytest.fixture(scope="module")
def model(text: Path) -> Path:
    """A hybrid with its tokenizer, in a folder whose name is markup."""
    folder = text.parent / "models" / MARKUP
    sizes: dict[str, Any] = {"vocab_size": 257, "hidden_size": 16, "num_heads": 2, "head_dim": 8}
    config = GKAConfig(**sizes, mixers=["attention", "gka"], eos_token_id=256, pad_token_id=256)
    GKAForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def command(name: str, model: Path, text: Path, output: Path) -> list[str | Path]:
    """A quick use of a command that writes `output`."""
    arguments: dict[str, list[str | Path]] = {
        "train": [text, *TINY],
        "prime": [model, "--text", text, "--stage1-max-steps=0", "--stage2-max-steps=0",
                  "--sequence-length=16", "--set=data.eval_fraction=0.3"],
        "recall": ["--head-dim=8", "--pairs=4", "--correlations=0.5", "--seeds=1", "--ridge-ratios=0.02"],
        "mqar": ["--mixers=gla", "--sizes=8x8", "--learning-rates=0.01", "--seeds=1", "--max-steps=1",
                 "--processes=1"],
        "evaluate": [model, "--tasks=perplexity", "--lengths=256", "--samples=1", "--text", text],
        "inspect": [model, "--prompt=to be"],
        "convert": [model, "--to=gka"],
    }  # fmt: skip
    return [name, *arguments[name], "--output", output]


@pytest.mark.parametrize("name", WRITERS)
def test_one_writer_for_a_folder(
    gka: Run, model: Path, text: Path, tmp_path: Path, name: str
) -> None:
    """A command whose folder another process writes ends at once, with one line that names process and host;
    nothing is written, and no lock stays."""
    output = tmp_path / "out"
    with ExitStack() as stack:
        stack.enter_context((only_maker if name == "convert" else only_writer)(output))
        before = sorted(tmp_path.rglob("*"))
        status, _, errors = gka(*command(name, model, text, output))
        assert status == 2 and len(errors.splitlines()) == 1
        assert f"{output} is being written by process {os.getpid()} on host" in errors
        assert sorted(tmp_path.rglob("*")) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_disk_is_one_line(
    gka: Run, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """An empty folder that is there but cannot be written to ends a command before its work, by one line."""
    output, real = tmp_path / "out", os.open

    def refuse(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *more, **options)

    output.mkdir()
    monkeypatch.setattr(storage.os, "open", refuse)
    status, _, errors = gka(*command(name, model, text, output))
    assert (status, len(errors.splitlines())) == (2, 1)
    assert f"{output} cannot be written: Read-only file system" in errors
    assert not list(output.iterdir())


@pytest.mark.parametrize("name", WRITERS)
def test_brackets_in_paths_are_brackets(
    gka: Run, model: Path, text: Path, tmp_path: Path, name: str
) -> None:
    """Paths that look like markup of the terminal's library are shown as they are, and change nothing."""
    output = tmp_path / MARKUP / "out"
    status, shown, errors = gka(*command(name, model, text, output))
    assert (status, errors) == (0, ""), errors
    assert str(output) in shown
    assert not [path for path in output.iterdir() if path.name.startswith(".")]
    if name in ("train", "prime"):
        status, shown, _ = gka(name, "--resume", "--output", output)
        assert status == 0 and f"The run in {output} is complete" in shown


def test_brackets_in_errors_are_brackets(gka: Run, tmp_path: Path) -> None:
    """So are those in what is refused, whoever refuses it."""
    for arguments in (
        ("generate", tmp_path / MARKUP, "--prompt=x"),
        ("train", tmp_path / MARKUP),
        ("train", "--recipe", MARKUP),
        (MARKUP,),
        ("train", f"--{MARKUP}"),
    ):
        status, _, errors = gka(*arguments)
        assert status == 2 and MARKUP in errors and "Traceback" not in errors


def test_consoles_show_text_as_it_is() -> None:
    """The commands' console prints strings, cells, titles and captions without reading them as markup."""
    from rich.table import Table

    shown = io.StringIO()
    console = text_console(file=shown, width=200)
    table = Table(title=MARKUP, caption=MARKUP)
    table.add_column(MARKUP)
    table.add_row(MARKUP)
    console.print(MARKUP, table)
    assert shown.getvalue().count(MARKUP) == 5
    assert isinstance(console, Console)


def test_no_command_makes_another_console() -> None:
    """There is one place where consoles of commands are made."""
    source = Path(cli.__file__).parents[1]
    makers = [path for path in source.rglob("*.py") if " Console(" in path.read_text("utf-8")]
    assert [path.name for path in makers] == ["console.py"]


@pytest.mark.parametrize(
    "arguments",
    [
        "train --seed SEED", "prime MODEL --seed SEED", "generate MODEL --prompt x --seed SEED",
        "evaluate MODEL --seed SEED", "recall --seeds SEED", "mqar --seeds SEED", "mqar --max-steps SEED",
        "train --max-steps SEED", "generate MODEL --prompt x --num-iter SEED",
        "generate MODEL --prompt x --ridge-ratio 1e300", "generate MODEL --prompt x --temperature 1e-300",
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_one_line(
    gka: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    """Seeds and other numbers beyond what the generators and loops take are refused before any work."""
    monkeypatch.chdir(tmp_path)
    words = [str(model) if word == "MODEL" else word for word in arguments.split()]
    status, shown, errors = gka(*(word.replace("SEED", "99999999999999999999") for word in words))
    assert (status, shown, len(errors.splitlines())) == (2, "", 1)
    assert errors.startswith("gka: ") and not list(tmp_path.rglob("run.json"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_iter", 10**9), ("num_hidden_layers", 10**7), ("num_hidden_layers", 9999),
        ("hidden_size", 1 << 20), ("intermediate_size", 1 << 22), ("vocab_size", 1 << 26),
        ("num_heads", 1 << 16), ("norm_eps", 1e300), ("ridge_ratio", float("nan")),
        ("rope_theta", float("inf")), ("expand_v", 1e300), ("head_dim", 1 << 16),
    ],
)  # fmt: skip
def test_configurations_with_absurd_numbers_are_one_line(
    gka: Run, model: Path, tmp_path: Path, field: str, value: Any
) -> None:
    """A config.json that describes what no weight file holds, or cannot be computed, is refused at once."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    if field == "num_hidden_layers":
        config["mixers"] = None
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    for arguments in (
        ["generate", folder, "--prompt=x"],
        ["convert", folder, "-o", tmp_path / "o"],
    ):
        status, shown, errors = gka(*arguments, *(["--to=gka"] if "-o" in arguments else []))
        assert (status, shown, len(errors.splitlines())) == (2, "", 1), errors
        assert f"model {folder}" in errors
    with pytest.raises(InputError, match="model "):  # of `gka evaluate`
        load_model(folder)


def test_a_full_disk_behind_the_output_is_one_line() -> None:
    """Where standard output cannot take what is written, the command says so and ends with 2."""
    with open("/dev/full", "w") as full:
        code = "from gka.commands.main import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, "--help"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr == "gka: the output cannot be used: No space left on device\n"
