"""Open saved models of any format, complete or not at all, for `from_pretrained` and every command.

A foreign folder is first checked completely, then read by transformers' own loader.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gka.checkpoints.format import FORMATS, Format, check_stored, format_of
from gka.data.text import check_vocabulary
from gka.errors import InputError, reason_of
from gka.foreign_code import read_tokenizer, refuse_code, without_code
from gka.models.causal_lm import GKAForCausalLM
from gka.models.configuration import GKAConfig
from gka.models.decoder import GKAPreTrainedModel
from gka.models.fields import fewest_parameters

DTYPES = ("auto", "float32", "bfloat16", "float16")
_TOKENIZERS = ("tokenizer*", "vocab*")
_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_TIED_HEAD = r"^lm_head\.weight$"


def model_folder(folder: Path) -> Path:
    """`folder`, or `model/` in it if it is the folder of a run.

    Raises:
        InputError: there is no config.json.
    """
    inner = folder / "model"
    found = inner if inner.is_dir() and not (folder / "config.json").exists() else folder
    if not (found / "config.json").is_file():
        raise InputError(f"model {folder} holds no config.json; give the folder of a saved model")
    return found


def load_model(
    folder: Path, *, dtype: str = "auto", device: torch.device | str | None = None
) -> PreTrainedModel:
    """The causal language model in a folder, in evaluation mode.

    Args:
        folder: folder of a run or of a saved model: this library's, of a format in `FORMATS`, or any that
            transformers knows. If transformers has a class for it, the model has that class.
        dtype: dtype of the weights, one of `DTYPES`; "auto" keeps the stored one.
        device: None: "cuda" if available, else "cpu".

    Raises:
        InputError: there is no model, a file is damaged, or weights are missing, left over or of other
            shapes.
    """
    folder = model_folder(folder)
    return _load(_class_for(folder), folder, dtype, device)


def load_gka(
    folder: Path, *, dtype: str = "auto", device: torch.device | str | None = None
) -> GKAForCausalLM:
    """`load_model`, always as a `GKAForCausalLM`, also for models of transformers that it can express.

    Raises:
        InputError: as in `load_model`, or `GKAForCausalLM` cannot express the model.
    """
    folder = model_folder(folder)
    config = stored_config(folder, {"local_files_only": True}) or {}
    refuse_code(f"model {folder}", config)
    kind = config.get("model_type", GKAConfig.model_type)
    if format_of(config) is None and kind != GKAConfig.model_type:
        raise InputError(
            f"model {folder} is of type {kind!r}, which GKAForCausalLM cannot express; expected one of the "
            f"formats {', '.join((GKAConfig.model_type, *FORMATS))}"
        )
    return _load(GKAForCausalLM, folder, dtype, device)


def load_tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    folder = model_folder(folder)
    if not any(next(folder.glob(mark), None) for mark in _TOKENIZERS):
        raise InputError(
            f"model {folder} has no tokenizer beside it (tokenizer.json); save its tokenizer there"
        )
    try:
        return read_tokenizer(folder, local_files_only=True)
    except Exception as error:  # parsers of three formats, each with its own exceptions
        raise InputError(f"tokenizer of {folder} cannot be loaded: {reason_of(error)}") from error


def load_with_tokenizer(
    folder: Path, *, dtype: str = "auto", device: str | None = None
) -> tuple[GKAForCausalLM, PreTrainedTokenizerBase]:
    """`load_gka`, and the model's tokenizer.

    Raises:
        InputError: as in `load_gka` and `load_tokenizer_of`, or the tokenizer has more ids than the model.
    """
    tokenizer = load_tokenizer_of(folder)
    model = load_gka(folder, dtype=dtype, device=device)
    check_vocabulary(tokenizer, model, f"model {folder}")
    return model, tokenizer


def from_pretrained(name: Any, **options: Any) -> Any:
    """`load_model` for a folder or hub name, with the options of transformers' `from_pretrained`.

    Args:
        name: folder of a saved model, or a name on the hub.
        options: options of transformers' `from_pretrained`, except `output_loading_info`.

    Raises:
        InputError: as in `load_model`.
    """
    return _whole(_class_for(name, **options), name, **options)


def config_of(name: Any, **options: Any) -> Any:
    """The configuration of the model that `from_pretrained` would load, with the same options.

    Raises:
        InputError: it cannot be read.
    """
    reader = AutoConfig if _class_for(name, **options) is AutoModelForCausalLM else GKAConfig
    try:
        return reader.from_pretrained(name, **without_code(options))
    except InputError:
        raise
    except Exception as error:  # as for models
        raise InputError(f"model {name} cannot be loaded: {reason_of(error)}") from error


def _class_for(name: Any, **options: Any) -> Any:
    """The class that reads a model: `GKAForCausalLM` for our and hybrid formats, else transformers'."""
    config = stored_config(name, options)
    if config is None:
        return AutoModelForCausalLM
    refuse_code(f"model {name}", config)
    format = format_of(config)
    if config.get("model_type") == GKAConfig.model_type:
        return GKAForCausalLM
    return AutoModelForCausalLM if format is None or format.native else GKAForCausalLM


def _load(kind: Any, folder: Path, dtype: str, device: torch.device | str | None) -> Any:
    _check_amount(kind, folder)
    model = _whole(kind, folder, dtype=dtype, local_files_only=True)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def _check_amount(kind: Any, folder: Path) -> None:
    """Refuse a config.json that describes far more than the weight files hold, before the model is built."""
    stored = stored_config(folder, {"local_files_only": True}) or {}
    files = [path for end in ("safetensors", "bin") for path in folder.glob(f"*.{end}")]
    try:
        if kind is GKAForCausalLM:
            least = fewest_parameters(GKAConfig.from_dict(dict(stored)))
        else:  # every layer of any model has at least one vector
            least = int(stored["num_hidden_layers"]) * int(stored["hidden_size"])
    except InputError as error:
        raise InputError(f"model {folder}: {error}") from error
    except (KeyError, TypeError, ValueError, OverflowError):
        return  # the model's own reader explains better what is wrong
    size = sum(path.stat().st_size for path in files)
    if files and least > 4 * size:  # no format in use has fewer than two bits per number
        raise InputError(
            f"model {folder}: its config.json describes {least:.3g} numbers or more, but its weight files "
            f"have {size:,} bytes; one of them is damaged"
        )


def _whole(kind: Any, name: Any, **options: Any) -> Any:
    """A model of class `kind` with all weights from its files, none left over or initialised."""
    try:
        options = without_code(options) | {"output_loading_info": True}
        model, notes = kind.from_pretrained(name, **options)
    except Exception as error:  # parsers of three formats, each with its own exceptions
        raise InputError(f"model {name} cannot be loaded: {reason_of(error)}") from error
    check_complete(f"model {name}", notes)
    return model


def load_with(
    cls: type[GKAPreTrainedModel], load: Callable[..., Any], name: Any, *args: Any, **options: Any
) -> Any:
    """`from_pretrained` for a folder or hub name of any format.

    Args:
        cls: the class to load.
        load: transformers' `from_pretrained`.
        name: folder or hub name.
        args, options: those of `from_pretrained`.

    Raises:
        InputError: `cls` cannot express a foreign checkpoint's configuration, its weights are missing, left
            over, damaged or of other shapes, or a configuration requires code from elsewhere.
    """
    theirs = stored_config(name, options)
    refuse_code(f"model {name}", theirs or {})
    format = None if theirs is None else format_of(theirs)
    if format is None or theirs is None:
        return load(name, *args, **options)
    config = GKAConfig.from_dict(dict(theirs))
    folder = Path(name) / options.get("subfolder", "")
    if folder.is_dir():
        check_stored(folder, _expected(format, config), _allowed(format, config))
    wants_notes = options.pop("output_loading_info", False)
    mapping = format.key_mapping(config.pattern)
    model, notes = load(name, *args, key_mapping=mapping, output_loading_info=True, **options)
    _check_notes(name, notes, _allowed(format, config), with_head=hasattr(model, "lm_head"))
    # Otherwise transformers would save under their names with our configuration.
    model._weight_conversions = None
    return (model, notes) if wants_notes else model


def stored_config(name: Any, options: dict[str, Any]) -> dict[str, Any] | None:
    """The config.json, not translated; None if it is unreadable, which transformers then explains.

    Args:
        name: folder or hub name.
        options: those of `from_pretrained`.
    """
    if name is None or options.get("gguf_file") is not None:
        return None
    hub = {key: options[key] for key in _HUB if key in options}
    try:
        theirs, _ = PreTrainedConfig.get_config_dict(name, **hub)
    except (OSError, ValueError):
        return None
    return theirs


def _expected(format: Format, config: GKAConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes in the format's names, from a model on the meta device."""
    with torch.device("meta"):
        state = GKAForCausalLM(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in format.export(config, state)}


def _allowed(format: Format, config: GKAConfig) -> tuple[str, ...]:
    return (*format.unused, *((_TIED_HEAD,) if config.tie_word_embeddings else ()))


def _check_notes(
    name: Any, notes: dict[str, Any], allowed: tuple[str, ...], *, with_head: bool
) -> None:
    """Check that the loader reported only harmless keys, and remove those from the notes.

    For hub names this is the only check.
    """
    allowed = allowed if with_head else (*allowed, _TIED_HEAD)
    extra = [k for k in notes["unexpected_keys"] if not any(re.search(p, k) for p in allowed)]
    check_complete(name, notes | {"unexpected_keys": extra})
    notes["unexpected_keys"] = set()


def check_complete(name: Any, notes: dict[str, Any]) -> None:
    """Refuse a model that was not read completely.

    Args:
        name: the model's name, for the message.
        notes: the loading info of `from_pretrained`.

    Raises:
        InputError: weights are missing, left over or of other shapes; the message names the first three.
    """
    for what, key in (
        ("missing", "missing_keys"),
        ("left over", "unexpected_keys"),
        ("misshapen", "mismatched_keys"),
    ):
        names = sorted(map(str, notes[key]))
        if names:
            raise InputError(
                f"{name}: weights are {what}: {', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}; its files must hold what "
                "its config.json describes, no more and no less"
            )
