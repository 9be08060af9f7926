"""What a training run is: three tables (data, model, training), read from TOML, checked by name."""

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from gka.errors import InputError

PRECISIONS = ("float32", "bfloat16")
MOST = 2**31 - 1
"""The largest count that is taken."""
MOST_SEED = 2**32 - 1
"""The largest seed that all generators of random numbers take."""
Command = Literal["train", "prime"]
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
STANDARD_LIBRARY_HELD_OUT = 0.002
"""`eval_fraction` where no text is given: enough of the standard library, and quickly evaluated."""
# Decided by the tokenizer, so that model and data cannot disagree.
FROM_TOKENIZER = ("vocab_size", "eos_token_id", "pad_token_id", "bos_token_id")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on.

    Attributes:
        text: text files and folders; empty means the standard library of the running Python.
        glob: which files of a folder, such as "*.py".
        tokenizer: "bytes", or a Hugging Face tokenizer's folder or name.
        sequence_length: tokens in a block.
        eval_fraction: share of the tokens held out, by whole documents. Of the standard library
            `RunConfig.from_tables` holds out `STANDARD_LIBRARY_HELD_OUT` unless told otherwise.
        hash_sources: read all text once before each run to see whether it has changed; else names, places,
            sizes, inodes and times of modification and change tell.
    """

    text: tuple[str, ...] = ()
    glob: str = "*"
    tokenizer: str = "bytes"
    sequence_length: int = 256
    eval_fraction: float = 0.01
    hash_sources: bool = False

    def __post_init__(self) -> None:
        length = self.sequence_length
        _require(length >= 2, "data.sequence_length", length, "2 or more")
        _require(length <= MOST, "data.sequence_length", length, f"{MOST} or less")
        ok = 0 < self.eval_fraction < 1
        _require(ok, "data.eval_fraction", self.eval_fraction, "between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train: AdamW, linear warm-up then cosine to zero, gradients clipped.

    The defaults are those of the recipe cpu: some minutes on a laptop.

    Attributes:
        max_steps: optimizer steps.
        batch_size: blocks per forward pass (and device).
        gradient_accumulation: forward passes per step.
        learning_rate: the highest rate.
        warmup_steps: steps until the rate is the highest.
        weight_decay: for matrices; never for A_log, dt_bias, norms, biases and embeddings.
        max_grad_norm: gradients are scaled down to this norm; 0 does not clip.
        adam_beta2: AdamW's second decay rate.
        precision: "float32", or "bfloat16" for autocast with float32 weights.
        gradient_checkpointing: recompute layers in the backward pass to save memory.
        log_steps, eval_steps, save_steps: how often the loss is noted, evaluated, and a checkpoint kept.
        keep_checkpoints: how many; two or more, so that one is whole while the next is written.
        seed: of initial weights and data order.
    """

    max_steps: int = 1300
    batch_size: int = 2
    gradient_accumulation: int = 1
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    adam_beta2: float = 0.95
    precision: str = "float32"
    gradient_checkpointing: bool = False
    log_steps: int = 10
    eval_steps: int = 260
    save_steps: int = 260
    keep_checkpoints: int = 2
    seed: int = 0

    # The table that errors name, and whether there may be no step at all.
    table: ClassVar[str] = "training"
    fewest_steps: ClassVar[int] = 1

    def __post_init__(self) -> None:
        least = {"max_steps": self.fewest_steps, "keep_checkpoints": 2}
        counts = ("batch_size", "gradient_accumulation", "log_steps", "eval_steps", "save_steps")
        least |= dict.fromkeys(counts, 1)
        least |= dict.fromkeys(("warmup_steps", "weight_decay", "max_grad_norm", "seed"), 0)
        for name, number in least.items():
            self.require(getattr(self, name) >= number, name, f"{number} or more")
        self._check_largest()
        self.require(self.learning_rate > 0, "learning_rate", "above 0")
        self.require(0 < self.adam_beta2 < 1, "adam_beta2", "in (0, 1)")
        self.require(self.precision in PRECISIONS, "precision", " or ".join(map(repr, PRECISIONS)))

    def _check_largest(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float):
                self.require(math.isfinite(value), name, "a finite number")
            elif isinstance(value, int):
                most = MOST_SEED if name == "seed" else MOST
                self.require(value <= most, name, f"{most} or less")

    def require(self, condition: bool, name: str, expected: str) -> None:
        """Raise `InputError` about the field `name` unless `condition` holds."""
        _require(condition, f"{self.table}.{name}", getattr(self, name), expected)


# A model that two processor cores train in minutes; any field of GKAConfig can be given beside or instead.
MODEL_DEFAULTS = {
    "mixer": "gka",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A complete run. `model` holds fields of `gka.models.GKAConfig`, which checks their names."""

    data: DataConfig = field(default_factory=DataConfig)
    model: Mapping[str, Any] = field(default_factory=lambda: dict(MODEL_DEFAULTS))
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def tables(self) -> dict[str, dict[str, Any]]:
        """The run as plain tables (what JSON and TOML hold); `from_tables` is the inverse."""
        data = dataclasses.asdict(self.data)
        data["text"] = list(self.data.text)
        return {
            "data": data,
            "model": dict(self.model),
            "training": dataclasses.asdict(self.training),
        }

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any]) -> "RunConfig":
        """A run from tables, defaults where a key is absent.

        Raises:
            InputError: naming the table and key that is unknown, of the wrong type or out of range.
        """
        check_known("", tables, ("data", "model", "training"))
        for name, table in tables.items():
            _require(isinstance(table, Mapping), name, table, "a table")
        model = _complete(tables.get("model", {}))
        data = dict(tables.get("data", {}))
        if not data.get("text"):
            data.setdefault("eval_fraction", STANDARD_LIBRARY_HELD_OUT)
        return cls(
            data=build_table(DataConfig, "data", data),
            model=model,
            training=build_table(TrainingConfig, "training", tables.get("training", {})),
        )


def read_recipe(name: str, command: Command = "train") -> dict[str, dict[str, Any]]:
    """The tables of a recipe: a .toml file, or the name of one in ./recipes or in the package.

    Raises:
        InputError: if `command` has no such recipe (those it has are named) or it is not TOML.
    """
    path = Path(name) if name.endswith(".toml") else _named_recipe(name, command)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"recipe {name}: there is no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} is not valid TOML: {error}") from None


def merged(*layers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tables laid over one another, key by key; later ones win."""
    result: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for table, values in layer.items():
            _require(isinstance(values, Mapping), table, values, "a table")
            result.setdefault(table, {}).update(values)
    return result


def _complete(given: Mapping[str, Any]) -> dict[str, Any]:
    """The [model] table with defaults for what is not given and does not follow from it."""
    for key in FROM_TOKENIZER:
        _require(key not in given, f"model.{key}", given.get(key), "absent: the tokenizer sets it")
    if "mixers" in given and "mixer" in given:
        raise InputError("model.mixer and model.mixers both name mixers; give one of them")
    model = {**MODEL_DEFAULTS, **given}
    if "mixers" in given:  # they name the mixer of every layer, and so how many there are
        model = {
            k: v for k, v in model.items() if k in given or k not in ("mixer", "num_hidden_layers")
        }
    width, heads = model["hidden_size"], model["num_heads"]
    if "head_dim" not in model and isinstance(heads, int) and isinstance(width, int) and heads > 0:
        model["head_dim"] = width // heads
    return model


def recipe_names(command: Command) -> list[str]:
    """The recipes of a command that can be given by name: those in ./recipes and in the package."""
    return sorted(name for name, path in _recipes().items() if _is_for(path) == command)


def _recipes() -> dict[str, Path]:
    """Every recipe by name; one in ./recipes goes before one in the package."""
    folders = [RECIPES, Path("recipes")]
    return {path.stem: path for folder in folders for path in folder.glob("*.toml")}


def _named_recipe(name: str, command: Command) -> Path:
    found = _recipes()
    if name in found and _is_for(found[name]) != command:
        raise InputError(f"recipe {name!r} is one of gka {_is_for(found[name])}")
    if name not in found:
        raise InputError(
            f"recipe {name!r} is unknown; known: {', '.join(recipe_names(command)) or 'none here'}; "
            "or give a path to a .toml file"
        )
    return found[name]


def _is_for(recipe: Path) -> Command:
    """The command that a recipe is for: those with a table [prime] prime."""
    try:
        tables = tomllib.loads(recipe.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return "train"  # what is wrong with it is said when it is read
    return "prime" if "prime" in tables else "train"


def build_table(kind: type, table: str, values: Mapping[str, Any]) -> Any:
    """A settings class from a table of its fields.

    Raises:
        InputError: naming the key that is unknown, of the wrong type or out of range.
    """
    every = typing.get_type_hints(kind)
    hints = {field.name: every[field.name] for field in dataclasses.fields(kind)}
    check_known(f"{table}.", values, tuple(hints))
    return kind(**{key: _typed(f"{table}.{key}", v, hints[key]) for key, v in values.items()})


def check_known(prefix: str, given: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Raise `InputError` for a key that is none of `names`."""
    for key in given:
        if key not in names:
            raise InputError(f"unknown key {prefix}{key}; known: {', '.join(names)}")


def _typed(key: str, value: Any, hint: Any) -> Any:
    """`value` as `hint`: exact, but for an int where a float is meant and a list for a tuple."""
    if isinstance(hint, types.GenericAlias):
        ok = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        _require(ok, key, value, "a list of strings")
        return tuple(value)
    if hint is float and type(value) is int:
        return float(value)
    _require(type(value) is hint, key, value, f"of type {hint.__name__}")
    return value


def _require(condition: bool, key: str, value: Any, expected: str) -> None:
    if not condition:
        raise InputError(f"{key} is {value!r}; expected {expected}")
