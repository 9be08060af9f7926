"""Complete runs as small files: the package's own, by name, and anybody's, by path."""

import tomllib
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gka.errors import InputError

if TYPE_CHECKING:
    from importlib.abc import Traversable

HERE = Path("recipes")
"""Where recipes of one's own are found by name; they go before the package's."""


def recipe_names(tables: Collection[str] | None = None) -> list[str]:
    """The recipes that can be given by name: those in ./recipes and the package's own.

    Args:
        tables: the tables that a command knows; only recipes of that command are named. None: all.
    """
    return sorted(
        name for name, text in _named_recipes().items() if tables is None or _is_of(tables, text)
    )


def read_recipe(name: str, tables: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
    """The tables of a recipe: a .toml file, the name of one in ./recipes, or of one of the package's own.

    Args:
        name: which.
        tables: the tables that a command knows: the errors name the recipes of that command only.

    Raises:
        InputError: if there is no such recipe (those there are are named), it is a named one of another
            command, or it is not TOML.
    """
    if name.endswith(".toml"):
        return _parsed(f"recipe {name}", _read(Path(name)))
    named = _named_recipes()
    if name in named and (tables is None or _is_of(tables, named[name])):
        return _parsed(f"recipe {name}", named[name])
    known = ", ".join(recipe_names(tables)) or "none here"
    what = "is one of another command" if name in named else "is unknown"
    raise InputError(f"recipe {name!r} {what}; known: {known}; or give a path to a .toml file")


def _named_recipes() -> dict[str, str]:
    """Recipes by name, as text; one in ./recipes goes before one of the package."""
    own = [file for file in files("gka").joinpath("recipes").iterdir() if file.is_file()]
    found = {file.name: file for file in own} | {p.name: p for p in HERE.glob("*.toml")}
    return {
        name.removesuffix(".toml"): _read(file)
        for name, file in found.items()
        if name.endswith(".toml")
    }


def _read(file: "Traversable") -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"recipe {file}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {file} cannot be read: {error}") from None


def _parsed(what: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{what} is not valid TOML: {error}") from None


def _is_of(tables: Collection[str], text: str) -> bool:
    """Whether a recipe has no other tables; one that is not TOML counts, and is refused when it is read."""
    try:
        return set(tomllib.loads(text)) <= set(tables)
    except tomllib.TOMLDecodeError:
        return True
