"""Options: declared once, in one vocabulary, former names still known."""

import json
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from gka.commands import main as cli
from gka.commands import options, runs
from gka.data import byte_tokenizer
from gka.errors import InputError, RenamedWarning
from gka.models import GKAConfig
from gka.training import RunConfig, TrainingConfig, build_model
from gka.training.config import CorpusConfig, ModelSettings
from gka.training.priming import PrimeConfig
from gka.training.priming.config import KINDS
from gka.training.settings import merged, settings

COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
RUNS = {
    "train": {"data": CorpusConfig, "model": ModelSettings, "training": TrainingConfig},
    "prime": KINDS,
}


def option_names(command: str) -> set[str]:
    return {name for parameter in COMMANDS[command].params for name in parameter.opts}


def test_every_setting_is_declared() -> None:
    """Each field of a run's tables says what it is, and its default is a value that it allows."""
    for tables in RUNS.values():
        for kind in tables.values():
            defaults = kind()
            for name, setting, _ in settings(kind):
                assert setting.help.endswith("."), name
                assert setting.expected(getattr(defaults, name)) is None, name


@pytest.mark.parametrize("command", RUNS)
def test_help_pages_come_from_the_declarations(command: str) -> None:
    """A help page has the sentence and the default of each setting that is an option, and no other."""
    page = CliRunner(env={"COLUMNS": "400"}).invoke(cli.app, [command, "--help"]).output
    for table, kind in RUNS[command].items():
        for name, setting, _ in settings(kind):
            option = f"--{name.replace('_', '-')}"
            shown = f"--{table}{option[1:]}" in page or f"{option} " in page or f" {name}" in page
            assert shown == setting.option, f"{table}.{name}"
            if setting.option:
                assert setting.help in page
                value = getattr(kind, name)
                told = f"({setting.shown})" if setting.shown else str(value).removesuffix(".0")
                assert f"[default: {told}]" in page or not (setting.shown or value)


def test_a_default_that_is_given_is_given() -> None:
    """An option with the value of its default wins over a recipe, as any other does."""
    found = {}
    app = typer.Typer()

    @app.command()
    @runs.with_settings(RUNS["train"], argument="text")
    def train(given: dict[str, Any]) -> None:
        found.update(given)

    CliRunner().invoke(app, ["--batch-size", "2", "--attention-layers", "1,3", "a", "b"])
    expected = {"attention_layers": [1, 3]}
    assert found == {
        "data": {"text": ["a", "b"]}, "model": expected, "training": {"batch_size": 2}
    }  # fmt: skip


def test_one_option_for_both_stages() -> None:
    """In `gka prime` an option sets one stage, by its name, or both."""
    found = {}
    app = typer.Typer()

    @app.command()
    @runs.with_settings(KINDS, argument="teacher")
    def prime(given: dict[str, Any]) -> None:
        found.update(given)

    CliRunner().invoke(app, ["--batch-size=3", "--stage2-max-steps=4", "--end-weight=1"])
    assert found == {
        "stage1": {"batch_size": 3, "end_weight": 1.0}, "stage2": {"batch_size": 3, "max_steps": 4}
    }  # fmt: skip


def test_one_vocabulary() -> None:
    """What is the same in several commands has one name, and a command that writes a folder has -o."""
    for command in COMMANDS.keys() - {"lm-eval"}:
        names = option_names(command)
        assert "--version" in names
        assert ("-o" in names) == ("--output" in names) == (command not in ("generate", "plan"))
        former = {name for names in options._FORMER.values() for name in names}
        assert not names & (former - {"--steps"})
    for command in ("generate", "inspect"):
        wanted = {"--prompt", "-p", "--prompt-file", "--chunk", "--device", "--dtype"}
        assert wanted <= option_names(command)
    assert {"--text", "--glob", "--chunk", "--device", "--dtype"} <= option_names("evaluate")
    assert {"--text", "--glob", "--dtype"} <= option_names("prime")
    assert {"--max-steps", "--device"} <= option_names("mqar")


def test_every_command_tells_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`gka COMMAND --version` is `gka --version`."""
    with pytest.raises(SystemExit) as end:
        cli.main(["prime", "--version"])
    assert not end.value.code
    assert capsys.readouterr().out.startswith("gated-kalmanet ")


@pytest.mark.parametrize("command", options._FORMER)
def test_former_names_work_and_warn(command: str) -> None:
    """An option by its former name is the option of today, with one warning that names it."""
    made = COMMANDS[command]
    for former, name in options._FORMER[command].items():
        assert name in option_names(command)
        with pytest.warns(RenamedWarning, match=f"{former} is now {name}; the old name goes"):
            assert list(made._renamed([former, "x"])) == [name, "x"]
        with pytest.warns(RenamedWarning):
            assert list(made._renamed([f"{former}=x=y"])) == [f"{name}=x=y"]


def test_values_are_not_taken_for_names() -> None:
    """What follows an option that takes a value, or `--`, is left alone, whatever it is called."""
    made = COMMANDS["inspect"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for line in ("m --prompt --file", "m -- --file x", "m -p --prefill-chunk --chunk 3"):
            assert list(made._renamed(line.split())) == line.split()
    with pytest.warns(RenamedWarning):
        line = ["--version", "--file", "x"]
        assert list(made._renamed(line)) == ["--version", "--prompt-file", "x"]


def test_a_former_name_is_said_on_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line says it as it says errors, once, without a place in the code."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["inspect", "nowhere", "--prompt", "x", "--prefill-chunk", "2"])
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "gka: --prefill-chunk is now --chunk; the old name goes with the next release"
    assert len(rest) == 1 and "nowhere holds no config.json" in rest[0]


def test_former_keys_of_recipes_work_and_warn() -> None:
    """`precision` of an earlier recipe or run is `dtype`; an option of today wins over it."""
    recipe = tomllib.loads("[training]\nprecision = 'bfloat16'\n")
    with pytest.warns(RenamedWarning, match=r"training\.precision is now training\.dtype"):
        assert RunConfig.from_tables(recipe).training.dtype == "bfloat16"
    with pytest.warns(RenamedWarning):
        given = merged(recipe, {"training": {"dtype": "float32"}})
    assert RunConfig.from_tables(given).training.dtype == "float32"
    with pytest.warns(RenamedWarning, match=r"stage2\.precision"):
        PrimeConfig.from_tables(runs.assigned(["stage2.precision=bfloat16"]))


@pytest.mark.parametrize(("flag", "choice"), [("true", "full"), ("false", "none")])
def test_former_flags_work_and_warn(flag: str, choice: str) -> None:
    """`gradient_checkpointing` of an earlier recipe or run was a flag."""
    recipe = tomllib.loads(f"[training]\ngradient_checkpointing = {flag}\n")
    with pytest.warns(RenamedWarning, match=f"is '{choice}' now, in place of {flag}"):
        assert RunConfig.from_tables(recipe).training.gradient_checkpointing == choice
    with pytest.warns(RenamedWarning):
        given = PrimeConfig.from_tables(runs.assigned([f"stage1.gradient_checkpointing={flag}"]))
    assert given.stage1.gradient_checkpointing == choice


@pytest.mark.parametrize(
    ("assignment", "closest"),
    [
        ("training.max_step=1", "max_steps"),
        ("training.hidden_size=1", "model.hidden_size"),
        ("data.learning_rate=1", "training.learning_rate"),
        ("trainin.seed=1", "training"),
    ],
)
def test_unknown_keys_name_the_closest(assignment: str, closest: str) -> None:
    """A key that is misspelt, or of another table, is refused with the one that was meant."""
    with pytest.raises(InputError, match=rf"unknown key .*; known: .*\. Did you mean {closest}\?$"):
        RunConfig.from_tables(runs.assigned([assignment]))
    with pytest.raises(InputError, match=r"known: [^.]*$"):
        RunConfig.from_tables({"training": {"zzz": 1}})


def test_one_rule_for_head_dim(tmp_path: Path) -> None:
    """Where head_dim is not given it is hidden_size / num_heads, in Python and in recipes; what is stored
    has it written, and keeps it."""
    sizes: dict[str, Any] = {"hidden_size": 128, "num_heads": 4}
    built = build_model(RunConfig.from_tables({"model": sizes}), byte_tokenizer())
    assert built.config.head_dim == GKAConfig(**sizes).head_dim == 32
    assert GKAConfig(hidden_size=96, num_attention_heads=8).head_dim == 12  # pyright: ignore
    assert GKAConfig(**sizes, head_dim=128).head_dim == 128
    for head_dim in (None, 128):
        GKAConfig(**sizes, head_dim=head_dim).save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())
        assert stored["head_dim"] == (head_dim or 32)
        assert GKAConfig.from_pretrained(tmp_path).head_dim == (head_dim or 32)
    with pytest.raises(InputError, match="head_dim must be at most 256, got 512"):
        GKAConfig(hidden_size=2048, num_heads=4)
