"""Settings: meaning and allowed values of configuration fields, and tables of such fields.

A field is declared once, as `name: type = setting(default, "What it is.")`. Command-line options,
help pages, TOML recipes and error messages derive from this declaration.
"""

import dataclasses
import difflib
import math
import types
import typing
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from gka.errors import InputError, RenamedWarning

MOST = 2**31 - 1
"""Largest integer that a setting takes, unless its `most` is another."""
Tables = dict[str, dict[str, Any]]
_SAID = "setting"
# Keys and values of earlier releases still work, with a warning.
_TRAINING = ("training", "stage1", "stage2")
_FORMER = {(table, "precision"): "dtype" for table in _TRAINING}
_FORMER_FLAGS = {(table, "gradient_checkpointing"): ("none", "full") for table in _TRAINING}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Declaration of a field.

    Attributes:
        help: the field's meaning, in one sentence or a few.
        option: whether commands have an option for it; `--set` takes every setting.
        by_table: whether each of several tables with the field has its own option, `--TABLE-FIELD`.
            Otherwise one option sets the field in all of them.
        metavar: placeholder of the value on help pages; empty: the choices or the type.
        shown: the default as help pages show it; empty: the default itself.
        least, most: inclusive bounds.
        above, below: exclusive bounds.
        choices: allowed values; empty: any.
    """

    help: str
    _: dataclasses.KW_ONLY
    option: bool = False
    by_table: bool = False
    metavar: str = ""
    shown: str = ""
    least: float = -math.inf
    most: float = MOST
    above: float = -math.inf
    below: float = math.inf
    choices: tuple[str, ...] = ()

    def expected(self, value: Any) -> str | None:
        """The allowed values in words; None if `value` is one of them."""
        if self.choices and value not in self.choices:
            return " or ".join(map(repr, self.choices))
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if self.below < math.inf and not self.above < value < self.below:
            return f"between {self.above:g} and {self.below:g}"
        if self.above > -math.inf and not value > self.above:
            return f"above {self.above:g}"
        if not value >= self.least:
            return f"{self.least:g} or more" if self.least > -math.inf else "a finite number"
        if isinstance(value, float):
            return None if math.isfinite(value) else "a finite number"
        return None if value <= self.most else f"{self.most} or less"


def setting(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field with a default and a `Setting`; `more`: further attributes of the `Setting`."""
    return dataclasses.field(default=default, metadata={_SAID: Setting(help, **more)})


class Table:
    """Base of dataclasses of settings: every field of a new instance is checked."""

    table: ClassVar[str]
    """Name of the table in recipes and error messages."""

    def __post_init__(self) -> None:
        for name, setting, _ in settings(type(self)):
            expected = setting.expected(getattr(self, name))
            self.require(expected is None, name, expected or "")

    def require(self, condition: bool, name: str, expected: str) -> None:
        """Raise `InputError` about the field `name` unless `condition` holds."""
        require(condition, f"{self.table}.{name}", getattr(self, name), expected)


def settings(kind: type) -> Iterator[tuple[str, Setting, Any]]:
    """Name, setting and type of each field of a dataclass.

    A subclass that changes only a default keeps its base class's setting.
    """
    hints = typing.get_type_hints(kind)
    bases = [vars(base).get("__dataclass_fields__", {}) for base in kind.__mro__]
    for name in (field.name for field in dataclasses.fields(kind)):
        said = (fields[name].metadata for fields in bases if name in fields)
        yield name, next(found[_SAID] for found in said if _SAID in found), hints[name]


def build_tables(
    kinds: Mapping[str, type[Table]],
    given: Mapping[str, Any],
    keys: Mapping[str, Iterable[str]] | None = None,
) -> dict[str, Any]:
    """An instance of each class from its table; absent fields have their defaults.

    Args:
        kinds: classes by table name.
        given: the tables; those without a class are ignored.
        keys: keys of other tables, which an error message may suggest.

    Raises:
        InputError: a key is unknown, of the wrong type or out of range; the message names it.
    """
    own = {table: [name for name, *_ in settings(kind)] for table, kind in kinds.items()}
    every: dict[str, Iterable[str]] = {**own, **(keys or {})}
    return {
        table: kind(**_typed_values(kind, table, _renamed(table, given.get(table, {})), every))
        for table, kind in kinds.items()
    }


def check_tables(given: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise `InputError` for a table whose name is not in `names`, or a value that is not a table."""
    for table, values in given.items():
        if table not in (known := list(names)):
            raise InputError(
                f"unknown key {table}; known: {', '.join(known)}{_closest(table, known)}"
            )
        require(isinstance(values, Mapping), table, values, "a table")


def merged(*layers: Mapping[str, Mapping[str, Any]]) -> Tables:
    """Tables merged key by key; later layers win. Keys of earlier releases are renamed."""
    result: Tables = {}
    for layer in layers:
        for table, values in layer.items():
            require(isinstance(values, Mapping), table, values, "a table")
            result.setdefault(table, {}).update(_renamed(table, values))
    return result


def require(condition: bool, key: str, value: Any, expected: str) -> None:
    """Raise `InputError` about `key`, which has `value`, unless `condition` holds."""
    if not condition:
        raise InputError(f"{key} is {value!r}; expected {expected}")


def _renamed(table: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values under their current names; flags that have become choices as choices."""
    for key in values:
        if (table, key) in _FORMER:
            new = _FORMER[table, key]
            warnings.warn(
                f"{table}.{key} is now {table}.{new}; the old name goes with the next release",
                RenamedWarning,
                stacklevel=2,
            )
    named = {_FORMER.get((table, key), key): value for key, value in values.items()}
    return {key: _former_flag(table, key, value) for key, value in named.items()}


def _former_flag(table: str, key: str, value: Any) -> Any:
    """The choice that replaces a flag of an earlier release; other values unchanged."""
    if (table, key) not in _FORMER_FLAGS or not isinstance(value, bool):
        return value
    choice = _FORMER_FLAGS[table, key][value]
    warnings.warn(
        f"{table}.{key} is {choice!r} now, in place of {str(value).lower()}, which goes with the next "
        "release",
        RenamedWarning,
        stacklevel=2,
    )
    return choice


def _typed_values(
    kind: type, table: str, values: Mapping[str, Any], keys: Mapping[str, Iterable[str]]
) -> dict[str, Any]:
    """Each value of a table in its field's type; `keys` of all tables serve for suggestions."""
    hints = {name: hint for name, _, hint in settings(kind)}
    for key in values:
        if key not in hints:
            elsewhere = [f"{other}.{key}" for other, names in keys.items() if key in names]
            closest = _closest(key, hints, elsewhere)
            raise InputError(f"unknown key {table}.{key}; known: {', '.join(hints)}{closest}")
    return {key: _typed(f"{table}.{key}", value, hints[key]) for key, value in values.items()}


def _closest(key: str, names: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """A suggestion that ends an error message: the key in another table, or the most similar of `names`."""
    found = [*elsewhere, *difflib.get_close_matches(key, list(names), n=1)]
    return f". Did you mean {found[0]}?" if found else ""


def _typed(key: str, value: Any, hint: Any) -> Any:
    """`value` if it has the type `hint`; an int also becomes a float, a list of strings a tuple."""
    if hint == tuple[float, ...]:
        ok = isinstance(value, list | tuple) and all(type(item) in (int, float) for item in value)
        require(ok, key, value, "a list of numbers")
        return tuple(float(item) for item in value)
    if isinstance(hint, types.GenericAlias):
        ok = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        require(ok, key, value, "a list of strings")
        return tuple(value)
    if hint is float and type(value) is int:
        return float(value)
    require(type(value) is hint, key, value, f"of type {hint.__name__}")
    return value
