"""Shared by commands that train: options from the run's configuration, resuming and stopping."""

import contextlib
import functools
import inspect
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gka.commands.options import INTERRUPTED, numbers, output_folder, silence_libraries
from gka.console import text_console
from gka.errors import InputError
from gka.training.settings import Setting, Tables, merged, settings

if TYPE_CHECKING:
    from rich.console import Console

PANELS = {
    "prime": "What is replaced", "data": "Data", "model": "Model", "training": "Training",
    "stage1": "Stage 1", "stage2": "Stage 2", "parallel": "Parallel",
}  # fmt: skip
SHARED, RUN = "Both stages", "Run"

Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue the run in the folder from its newest complete checkpoint.",
        rich_help_panel=RUN,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Delete the run that is in the folder.", rich_help_panel=RUN),
]


def run_folder(default: str) -> Any:
    """The option `--output` of a command that trains."""
    return output_folder("Folder of the run.", rich_help_panel=RUN, show_default=default)


def any_setting(examples: str) -> Any:
    """The option `--set`."""
    return typer.Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        help=f"Any setting of a recipe, as in {examples}. Can be given several times.",
        rich_help_panel=RUN,
    )


def named_recipe(names: Iterable[str], default: str | bool = False) -> Any:
    """The option `--recipe`."""
    help = f"{', '.join(names)} or a .toml file; options override it."
    return typer.Option(help=help, rich_help_panel=RUN, show_default=default)


@dataclass(frozen=True)
class _Option:
    """An option `name` that sets the field `key` of each of `tables`."""

    name: str
    key: str
    tables: tuple[str, ...]
    setting: Setting
    type: Any
    default: Any

    def parameter(self, argument: str) -> inspect.Parameter:
        """The parameter from which typer makes the option, or the argument if `name` is `argument`."""
        kind, default = self._shown()
        often = kind == list[str] | None and self.name != argument
        said = {
            "help": self.setting.help + " Can be given several times." * often,
            "show_default": self.setting.shown or default not in (None, ""),
        }
        if self.name == argument:
            info: Any = typer.Argument(**said)
        else:
            said["metavar"] = self.setting.metavar or "|".join(self.setting.choices) or None
            said["rich_help_panel"] = PANELS[self.tables[0]] if len(self.tables) == 1 else SHARED
            info = typer.Option(f"--{self.name.replace('_', '-')}", **said)
        annotated = Annotated[kind, info]
        place = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(self.name, place, default=default, annotation=annotated)

    def _shown(self) -> tuple[Any, Any]:
        """Type and default on the command line, where a list of numbers is text such as 1,3."""
        if self.type == tuple[str, ...]:
            return list[str] | None, None
        if self.type in (list[int] | None, tuple[float, ...]):
            return str | None, None
        if self.default == "":
            return str | None, None
        whole = isinstance(self.default, float) and self.default.is_integer()
        return self.type, int(self.default) if whole else self.default  # 0 rather than 0.0

    def value(self, given: Any) -> Any:
        """The setting's value, from the option's value."""
        if self.type == list[int] | None:
            return list(numbers(self.key, given, int))
        if self.type == tuple[float, ...]:
            return list(numbers(self.key, given, float))
        return given


def with_settings(
    kinds: Mapping[str, type], *, argument: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for every setting that is declared as an option.

    The command's first argument becomes the tables of values on the command line, without defaults.

    Args:
        kinds: dataclasses of settings, by table.
        argument: the setting that is a positional argument.
    """
    options = list(_options(kinds))

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command).parameters.values())[1:]
        made = [option.parameter(argument) for option in options]
        context = inspect.Parameter(
            "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
        )

        @functools.wraps(command)
        def run(context: typer.Context, **values: Any) -> None:
            given = _given(context, options, values)
            return command(given, **{p.name: values[p.name] for p in own})

        parameters = [context, *made, *own]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _options(kinds: Mapping[str, type]) -> Iterator[_Option]:
    """The options in the order of the tables; one that sets several tables comes with the last of them."""
    found: dict[str, _Option] = {}
    tables = Counter(f.name for kind in kinds.values() for f in fields(kind))
    for table, kind in kinds.items():
        defaults = {f.name: f.default for f in fields(kind)}
        for key, setting, hint in settings(kind):
            if not setting.option:
                continue
            name = f"{table}_{key}" if setting.by_table and tables[key] > 1 else key
            before = found.pop(name).tables if name in found else ()
            found[name] = _Option(name, key, (*before, table), setting, hint, defaults[key])
    yield from found.values()


def _given(context: typer.Context, options: list[_Option], values: dict[str, Any]) -> Tables:
    """The tables of the options that the command line gives."""
    tables: Tables = {}
    for option in options:
        source = context.get_parameter_source(option.name)
        if source is not None and source.name == "COMMANDLINE":
            for table in option.tables:
                value = option.value(values[option.name])
                tables.setdefault(table, {})[option.key] = value
    return tables


def assigned(assignments: Iterable[str]) -> Tables:
    """Tables from "table.key=value"; a value that is not TOML is taken as text."""
    tables: Tables = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        table, dot, key = name.strip().partition(".")
        if not (equals and dot and key):
            raise InputError(
                f"--set {assignment!r}: expected TABLE.KEY=VALUE, as in model.num_iter=15"
            )
        parsed: Any = value.strip()
        with contextlib.suppress(tomllib.TOMLDecodeError):
            parsed = tomllib.loads(f"value = {value}")["value"]
        tables = merged(tables, {table: {key: parsed}})
    return tables


def console() -> "Console":
    """The console of a training run; only the main process prints, and transformers is silent."""
    from gka.training.folder import is_main_process

    silence_libraries()
    return text_console(quiet=not is_main_process())


def resumes(folder: Path, console: "Console", resume: bool, *, may_start: bool) -> bool:
    """Whether to resume: `resume`, but False if the folder has no run and a new one `may_start`.

    So make or a job queue can repeat one command until its run is complete.
    """
    from gka.training.folder import RUN

    if resume and may_start and not (folder / RUN).exists():
        console.print(f"no run in {folder} yet: starting one", highlight=False, soft_wrap=True)
        return False
    return resume


@contextlib.contextmanager
def stopped(command: str, folder: Path, console: "Console", steps: str) -> Iterator[None]:
    """Exit and print how to resume if a signal stops the training in the block; `steps` is as in "of 100"."""
    from gka.training.loop import Interrupted

    try:
        yield
    except Interrupted as stop:
        console.print(
            f"Stopped after step {stop.step} {steps}; the checkpoint is saved.\n"
            f"Resume: gka {command} --resume --output {folder}",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED + stop.signal) from None
