"""A saved model and its tokenizer, of this library or any other causal language model."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gka.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")


def model_folder(folder: Path) -> Path:
    """`folder`, or the `model/` in it where it is a run's.

    Raises:
        InputError: there is no config.json.
    """
    inner = folder / "model"
    folder = inner if inner.is_dir() and not (folder / "config.json").exists() else folder
    if not (folder / "config.json").is_file():
        raise InputError(f"model {folder} holds no config.json; give the folder of a saved model")
    return folder


def model_fingerprint(folder: Path) -> str:
    """SHA-256 over the names, sizes and modification times of a model's files."""
    files = sorted(path for path in model_folder(folder).iterdir() if path.is_file())
    facts = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def load_tokenizer_of(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer saved beside a model.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    import gka.models  # noqa: F401  (registers the configuration)

    folder = model_folder(folder)
    if not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        raise InputError(f"model {folder} has no tokenizer beside it (tokenizer.json)")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # parsers of three formats, each with its own exceptions
        raise InputError(f"tokenizer of {folder} cannot be loaded: {_reason(error)}") from error


def load_model(folder: Path, dtype: str, device: str) -> "PreTrainedModel":
    """The model in `folder`, in evaluation mode; never in part.

    Raises:
        InputError: it cannot be loaded, or weights are missing or of other shapes.
    """
    from transformers import AutoModelForCausalLM

    import gka.models  # noqa: F401  (registers the classes with the Auto classes)

    folder = model_folder(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True
        )
    except Exception as error:  # parsers of three formats, each with its own exceptions
        raise InputError(f"model {folder} cannot be loaded: {_reason(error)}") from error
    model, notes = loaded
    for what in ("missing_keys", "mismatched_keys"):
        if notes[what]:
            names = ", ".join(sorted(map(str, notes[what]))[:3])
            raise InputError(
                f"model {folder}: weights do not fit its config.json ({what}: {names})"
            )
    return model.to(device).eval()


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
