"""What a training run is: three tables (data, model, training), read from TOML, checked by name."""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from gka.errors import InputError
from gka.training.settings import Setting, Table, Tables, build_tables, check_tables, require

DTYPES = ("float32", "bfloat16")
MOST_SEED = 2**32 - 1
"""The largest seed that all generators of random numbers take."""
Command = Literal["train", "prime"]
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
STANDARD_LIBRARY_HELD_OUT = 0.002
"""`eval_fraction` where no text is given: enough of the standard library, and quickly evaluated."""
# Decided by the tokenizer, so that model and data cannot disagree.
FROM_TOKENIZER = ("vocab_size", "eos_token_id", "pad_token_id", "bos_token_id")
_MATRICES = "For matrices; never for A_log, dt_bias, norms, biases and embeddings."


@dataclass(frozen=True, kw_only=True)
class DataConfig(Table):
    """What to train on."""

    text: Annotated[
        tuple[str, ...],
        Setting(
            "Text files and folders (UTF-8).",
            option=True,
            metavar="PATH",
            default="Python's standard library",
        ),
    ] = ()
    glob: Annotated[str, Setting('Which files of folders, such as "*.py".', option=True)] = "*"
    tokenizer: Annotated[
        str, Setting("bytes, or a Hugging Face tokenizer's folder or name.", option=True)
    ] = "bytes"
    sequence_length: Annotated[int, Setting("Tokens in a block.", option=True, least=2)] = 256
    # `RunConfig.from_tables` holds out less of the standard library, `STANDARD_LIBRARY_HELD_OUT`.
    eval_fraction: Annotated[
        float,
        Setting("Share of the tokens held out, by whole documents.", above=0, below=1),
    ] = 0.01
    hash_sources: Annotated[
        bool,
        Setting(
            "Read all text once before each run to see whether it has changed; else names, places, sizes, "
            "inodes and times of modification and change tell."
        ),
    ] = False

    table: ClassVar[str] = "data"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Those fields of `gka.models.GKAConfig` that `gka train` has an option or another default for.

    The defaults give a model that two processor cores train in minutes.
    """

    mixer: Annotated[
        str,
        Setting("gka, attention, swa, gla, deltanet or gated_deltanet.", option=True),
    ] = "gka"
    attention_layers: Annotated[
        list[int] | None,
        Setting("Layers, from 0, with attention instead, as in 1,3.", option=True, metavar="N,N"),
    ] = None
    hidden_size: Annotated[int, Setting("Width of the model.", option=True)] = 128
    num_hidden_layers: Annotated[int, Setting("Layers.", option=True)] = 2
    num_heads: Annotated[
        int, Setting("Heads of a layer, each hidden_size / num_heads wide.", option=True)
    ] = 4
    tie_word_embeddings: Annotated[
        bool, Setting("One matrix for the embedding and the output.")
    ] = True


MODEL_DEFAULTS = {f.name: f.default for f in fields(ModelSettings) if f.default is not None}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Table):
    """How to train: AdamW, linear warm-up then cosine to zero, gradients clipped.

    The defaults are those of the recipe cpu: some minutes on a laptop.
    """

    max_steps: Annotated[int, Setting("Optimizer steps.", option=True, by_table=True, least=1)] = (
        1300
    )
    batch_size: Annotated[
        int, Setting("Blocks in a forward pass, of each device.", option=True, least=1)
    ] = 2
    gradient_accumulation: Annotated[int, Setting("Forward passes in a step.", least=1)] = 1
    learning_rate: Annotated[
        float, Setting("Highest learning rate.", option=True, by_table=True, above=0)
    ] = 4e-3
    warmup_steps: Annotated[int, Setting("Steps until the rate is the highest.", least=0)] = 50
    weight_decay: Annotated[float, Setting(_MATRICES, least=0)] = 0.01
    max_grad_norm: Annotated[
        float, Setting("Gradients are scaled down to this norm; 0 does not clip.", least=0)
    ] = 1.0
    adam_beta2: Annotated[float, Setting("AdamW's second decay rate.", above=0, below=1)] = 0.95
    dtype: Annotated[
        str,
        Setting("Of the computation (autocast); weights are float32.", option=True, choices=DTYPES),
    ] = "float32"
    gradient_checkpointing: Annotated[
        bool, Setting("Recompute layers in the backward pass to save memory.")
    ] = False
    log_steps: Annotated[int, Setting("Steps between two notes of the loss.", least=1)] = 10
    eval_steps: Annotated[int, Setting("Steps between two evaluations.", least=1)] = 260
    save_steps: Annotated[int, Setting("Steps between two checkpoints.", least=1)] = 260
    # One is whole while the next is written.
    keep_checkpoints: Annotated[int, Setting("Checkpoints that are kept.", least=2)] = 2
    seed: Annotated[
        int,
        Setting("Of initial weights and data order.", option=True, least=0, most=MOST_SEED),
    ] = 0

    table: ClassVar[str] = "training"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A complete run. `model` holds fields of `gka.models.GKAConfig`, which checks their names."""

    data: DataConfig = field(default_factory=DataConfig)
    model: Mapping[str, Any] = field(default_factory=lambda: dict(MODEL_DEFAULTS))
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def tables(self) -> Tables:
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
        check_tables(tables, ("data", "model", "training"))
        data = dict(tables.get("data", {}))
        if not data.get("text"):
            data.setdefault("eval_fraction", STANDARD_LIBRARY_HELD_OUT)
        kinds = {"data": DataConfig, "training": TrainingConfig}
        keys = {"model": [setting.name for setting in fields(ModelSettings)]}
        built = build_tables(kinds, {**tables, "data": data}, keys)
        return cls(model=_complete(tables.get("model", {})), **built)


def read_recipe(name: str, command: Command = "train") -> Tables:
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


def _complete(given: Mapping[str, Any]) -> dict[str, Any]:
    """The [model] table with defaults for what is not given and does not follow from it."""
    for key in FROM_TOKENIZER:
        require(key not in given, f"model.{key}", given.get(key), "absent: the tokenizer sets it")
    if "mixers" in given and "mixer" in given:
        raise InputError("model.mixer and model.mixers both name mixers; give one of them")
    model = {**MODEL_DEFAULTS, **given}
    if "mixers" in given:  # they name the mixer of every layer, and so how many there are
        model = {
            k: v for k, v in model.items() if k in given or k not in ("mixer", "num_hidden_layers")
        }
    width, heads = model["hidden_size"], model["num_heads"]
    if "head_dim" not in model and isinstance(heads, int) and isinstance(width, int) and heads > 0:
        from gka.layers.heads import default_head_dim  # loads torch

        model["head_dim"] = default_head_dim(width, heads)
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
