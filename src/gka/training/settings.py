"""Settings: what a field of a configuration is for, which values it takes, and tables of such fields.

A field is declared once, as `name: type = setting(default, "What it is.")`. The command line, its
help pages, recipes (TOML) and the texts of errors are made from that.
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
"""The largest whole number that a setting takes, unless it says another."""
Tables = dict[str, dict[str, Any]]
_SAID = "setting"
# Keys of an earlier release; they work and warn.
_TRAINING = ("training", "stage1", "stage2")
_FORMER = {(table, "precision"): "dtype" for table in _TRAINING}
# Values of an earlier release, by the values of today; they work and warn.
_FORMER_FLAGS = {(table, "gradient_checkpointing"): ("none", "full") for table in _TRAINING}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What there is to say about a field.

    Attributes:
        help: what it is, in a sentence or a few.
        option: whether commands have an option for it; every setting can be given by `--set`.
        by_table: whether each table that has the field has an option of its own, `--TABLE-FIELD`. Otherwise
            one option sets the field in all of them.
        metavar: what a help page shows for the value; if empty, the choices or the type.
        shown: what a help page shows as the default; if empty, the default itself.
        least, most: bounds that are allowed themselves.
        above, below: bounds that are not.
        choices: the only values allowed; any if empty.
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
        """What `value` should have been; None if it is allowed."""
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
    """A field of a dataclass with a default and what there is to say about it; `more`: of `Setting`."""
    return dataclasses.field(default=default, metadata={_SAID: Setting(help, **more)})


class Table:
    """What dataclasses of settings have in common: each field is checked when an instance is made."""

    table: ClassVar[str]
    """The name of the table, in recipes and in errors."""

    def __post_init__(self) -> None:
        for name, setting, _ in settings(type(self)):
            expected = setting.expected(getattr(self, name))
            self.require(expected is None, name, expected or "")

    def require(self, condition: bool, name: str, expected: str) -> None:
        """Raise `InputError` about the field `name` unless `condition` holds."""
        require(condition, f"{self.table}.{name}", getattr(self, name), expected)


def settings(kind: type) -> Iterator[tuple[str, Setting, Any]]:
    """Name, setting and type of each field of a dataclass.

    A subclass that changes a default only keeps the setting of its base class.
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
    """An instance of each class from the table of its name; fields that are absent have their defaults.

    Args:
        kinds: classes by table.
        given: the tables; others among them are left alone.
        keys: of other tables, which an error may point to.

    Raises:
        InputError: naming the table or key that is unknown, of the wrong type or out of range.
    """
    own = {table: [name for name, *_ in settings(kind)] for table, kind in kinds.items()}
    every: dict[str, Iterable[str]] = {**own, **(keys or {})}
    return {
        table: kind(**_typed_values(kind, table, _renamed(table, given.get(table, {})), every))
        for table, kind in kinds.items()
    }


def check_tables(given: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise `InputError` for a table that is none of `names`, or is no table."""
    for table, values in given.items():
        if table not in (known := list(names)):
            raise InputError(
                f"unknown key {table}; known: {', '.join(known)}{_closest(table, known)}"
            )
        require(isinstance(values, Mapping), table, values, "a table")


def merged(*layers: Mapping[str, Mapping[str, Any]]) -> Tables:
    """Tables laid over one another, key by key; later ones win. Former names become those of today."""
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
    """The values under the names of today, and flags that have become choices."""
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
    """The choice that a flag of an earlier release stands for; other values as they are."""
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
    """Each value of a table as the type of its field; `keys` are those of all tables."""
    hints = {name: hint for name, _, hint in settings(kind)}
    for key in values:
        if key not in hints:
            elsewhere = [f"{other}.{key}" for other, names in keys.items() if key in names]
            closest = _closest(key, hints, elsewhere)
            raise InputError(f"unknown key {table}.{key}; known: {', '.join(hints)}{closest}")
    return {key: _typed(f"{table}.{key}", value, hints[key]) for key, value in values.items()}


def _closest(key: str, names: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """A question for the end of an error: the same key of another table, or the most similar of `names`."""
    found = [*elsewhere, *difflib.get_close_matches(key, list(names), n=1)]
    return f". Did you mean {found[0]}?" if found else ""


def _typed(key: str, value: Any, hint: Any) -> Any:
    """`value` as `hint`: exact, but for an int where a float is meant and a list for a tuple."""
    if isinstance(hint, types.GenericAlias):
        ok = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        require(ok, key, value, "a list of strings")
        return tuple(value)
    if hint is float and type(value) is int:
        return float(value)
    require(type(value) is hint, key, value, f"of type {hint.__name__}")
    return value
