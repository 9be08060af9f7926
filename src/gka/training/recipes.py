"""Recipes: complete runs as TOML files, which come with the package or lie in ./recipes."""

import tomllib
from pathlib import Path
from typing import Literal

from gka.errors import InputError
from gka.training.settings import Tables

Command = Literal["train", "prime"]
RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def read_recipe(name: str, command: Command = "train") -> Tables:
    """The tables of a .toml file, or of the recipe called `name` in ./recipes or in the package.

    Raises:
        InputError: there is no such file, no such recipe of `command`, or it is not valid TOML.
    """
    path = Path(name) if name.endswith(".toml") else _named_recipe(name, command)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"recipe {name}: there is no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} is not valid TOML: {error}") from None


def recipe_names(command: Command) -> list[str]:
    """Sorted names of a command's recipes in ./recipes and in the package."""
    return sorted(name for name, path in _recipes().items() if _is_for(path) == command)


def _recipes() -> dict[str, Path]:
    """Path of every recipe by name; ./recipes takes precedence over the package."""
    folders = [RECIPES, Path("recipes")]
    return {path.stem: path for folder in folders for path in folder.glob("*.toml")}


def _named_recipe(name: str, command: Command) -> Path:
    found = _recipes()
    if name in found and _is_for(found[name]) != command:
        raise InputError(
            f"recipe {name!r} is one of gka {_is_for(found[name])}; run it with that command"
        )
    if name not in found:
        raise InputError(
            f"recipe {name!r} is unknown; known: {', '.join(recipe_names(command)) or 'none here'}; "
            "or give a path to a .toml file"
        )
    return found[name]


def _is_for(recipe: Path) -> Command:
    """The command of a recipe: "prime" if it has a table [prime], else "train"."""
    try:
        tables = tomllib.loads(recipe.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return "train"  # `read_recipe` reports the fault
    return "prime" if "prime" in tables else "train"
