"""A session's states in a safetensors file, with a header that identifies the model, and a checksum."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from gka.errors import InputError, StorageError
from gka.layers.recurrent_mixer import RecurrentMixer
from gka.models import GKAConfig, GKAForCausalLM, state_shapes
from gka.models.fields import GKAFields
from gka.serving.contents import Contents
from gka.storage import replacing

FORMAT, VERSION = "gka-session", 1
# Fields in which the model that wrote a state and the model that reads it may differ.
_FREE = {"backend", "num_iter", "ridge_ratio", "solver", "initializer_range", "use_cache"}
_FREE |= {"max_position_embeddings", "tie_word_embeddings", "mixer", "attention_layers"}
_FREE |= {"pad_token_id", "bos_token_id", "eos_token_id"}
_MOST = 2**40  # limit of tokens and of rows: products of larger sizes overflow 64 bits
_HALF = {torch.bfloat16, torch.float16}
_SAMPLES = 64  # about so many values of each parameter enter the fingerprint of the weights


def save_contents(path: Path, model: GKAForCausalLM, contents: Contents) -> None:
    """Write `contents`; an existing file is replaced when the new one is complete.

    Raises:
        InputError: `load_contents` would refuse the states.
        StorageError: the file cannot be written.
    """
    tensors = {name: x.detach().cpu().contiguous() for name, x in contents.named().items()}
    header = _identity(model) | {
        "tokens": contents.tokens,
        "batch_size": contents.batch_size or 0,
        "tracks_decay": contents.decay is not None,
    }
    wrong = why_not(model, header, tensors) or why_not_finite(tensors)
    if wrong is not None:
        raise InputError(f"state {path} was not written: {wrong}")
    header["sha256"] = _checksum(header, tensors)
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={FORMAT: json.dumps(header)})
    except StorageError as error:
        raise StorageError(f"state {error}") from None
    except SafetensorError as error:
        raise InputError(f"state {path} cannot be written: {_reason(error)}") from None


def load_contents(
    path: Path, model: GKAForCausalLM, *, verify: bool = True, mmap: bool = False
) -> Contents:
    """Read what `save_contents` wrote for the same model.

    Args:
        path: the file.
        model: the model that wrote it, or an equal one.
        verify: compare the checksum, and refuse values that are not finite.
        mmap: on a CPU, map the tensors into memory; pages that are written to are copied. In-place changes
            of the file change the states.

    Raises:
        InputError: the file is missing, cut short, damaged, not a session's or of another model; the
            message says what differs.
    """
    header, tensors = _read(path, mmap)
    _check_identity(path, header, _identity(model))
    if verify and _checksum(header, tensors) != header.get("sha256"):
        raise InputError(f"state {path} is damaged: its content does not have its checksum")
    wrong = why_not(model, header, tensors)
    if wrong is None and verify:
        wrong = why_not_finite(tensors)
    if wrong is not None:
        raise InputError(f"state {path} does not fit the model: {wrong}")
    tensors = {name: x.to(model.device) for name, x in tensors.items()}
    return Contents.of_named(model, tensors, header["tokens"], header["tracks_decay"])


def read_header(path: Path) -> dict[str, Any]:
    """The header of a state file: version, tokens, batch_size, tracks_decay, model, dtype, weights, sha256.

    Raises:
        InputError: the file is missing, or is not a session's.
    """
    return _read(path, mmap=True)[0]


def _read(path: Path, mmap: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise InputError(
            f"state {path} does not exist" if not path.exists() else f"state {path} is not a file"
        )
    try:
        metadata, tensors = _mapped(path) if mmap else _copied(path)
        header = json.loads(metadata.get(FORMAT, "null"))
    except OSError as error:
        raise InputError(f"state {path} cannot be read: {_reason(error)}") from None
    # KeyError, RuntimeError: safetensors has dtypes and shapes that torch lacks.
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"state {path} is cut short or not a session's state: {_reason(error)}"
        ) from None
    if not isinstance(header, dict):
        raise InputError(f"state {path} is a safetensors file, but not of a session")
    if header.get("version") != VERSION:
        raise InputError(
            f"state {path} has version {header.get('version')!s:.40} of the format; this release reads "
            f"{VERSION}"
        )
    return header, tensors


def _mapped(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, framework="pt", device="cpu") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _copied(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the whole file once, so that later changes of the file have no effect."""
    content = path.read_bytes()
    tensors = load(content)
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]).get("__metadata__") or {}, tensors


def _reason(error: Exception) -> str:
    """An error as part of a one-line message."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]


def _identity(model: GKAForCausalLM) -> dict[str, Any]:
    return {
        "version": VERSION,
        "model": _layout(model.config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": fingerprint(model),
    }


def _layout(config: GKAConfig) -> dict[str, Any]:
    """The configuration's fields that determine the meaning of the states, with the pattern of mixers."""
    own = [field.name for field in fields(GKAFields) if field.name not in _FREE]
    return {name: getattr(config, name) for name in own} | {"mixers": config.pattern}


def _check_identity(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise `InputError` if the file is of another model."""
    theirs, ours = found.get("model"), expected["model"]
    theirs = theirs if isinstance(theirs, dict) else {}
    differing = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
    if differing:
        shown = ", ".join(
            f"{n:.40} {theirs.get(n)!r:.200} not {ours.get(n)!r:.200}" for n in differing[:4]
        )
        raise InputError(f"state {path} is of another model: {shown}")
    if found.get("dtype") != expected["dtype"]:
        raise InputError(
            f"state {path} is of a model in {found.get('dtype')!s:.40}, this one is in "
            f"{expected['dtype']}: load the model with dtype=torch.{found.get('dtype')!s:.40}"
        )
    if found.get("weights") != expected["weights"]:
        raise InputError(
            f"state {path} is of a model with the same sizes but other weights (another training, or "
            "a later step of it): use the model that wrote it"
        )


@torch.no_grad()
def fingerprint(model: GKAForCausalLM) -> str:
    """SHA-256 over some values of every parameter: cheap, and different for differently trained weights."""
    digest = hashlib.sha256()
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        flat = parameter.detach().flatten()
        by_dtype.setdefault(flat.dtype, []).append(flat[:: max(1, len(flat) // _SAMPLES)])
    for parts in by_dtype.values():  # one transfer from the device per dtype
        digest.update(_bytes(torch.cat(parts).cpu()))
    return digest.hexdigest()


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the header, without the checksum itself, and all tensors."""
    plain = {name: value for name, value in header.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}\n".encode())
        digest.update(_bytes(x))
    return digest.hexdigest()


def _bytes(x: Tensor) -> Any:
    """The bytes of a tensor on the CPU, as a buffer."""
    return x.contiguous().flatten().view(torch.uint8).numpy()


def why_not(
    model: GKAForCausalLM, header: dict[str, Any], tensors: dict[str, Tensor]
) -> str | None:
    """Why tensors cannot be the states of `model`, by names, shapes and dtypes; None if they can.

    Args:
        model: the model.
        header: has `tokens`, `batch_size` (0 before the first token) and `tracks_decay`.
        tensors: tensors with the names of `Contents.named`.
    """
    for name in ("tokens", "batch_size"):
        count = header.get(name)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < _MOST:
            return f"{name} is {count!r:.40}; expected a whole number from 0 on"
    tokens, rows, tracked = header["tokens"], header["batch_size"], header.get("tracks_decay")
    if not isinstance(tracked, bool):
        return f"tracks_decay is {tracked!r:.40}; expected true or false"
    if (tokens == 0) != (rows == 0):
        return f"{tokens} tokens in {rows} rows"
    needed, optional = _shapes(model, rows, tokens, tracked)
    missing = [name for name in needed if name not in tensors]
    if missing:
        return f"it needs {_some(missing)}, which the file lacks"
    surplus = [name for name in tensors if name not in needed and name not in optional]
    if surplus:
        return f"it has no place for {_some(surplus)}"
    for name, x in tensors.items():
        shape, dtypes = (needed | optional)[name], _dtypes(name, model.dtype)
        if tuple(x.shape) != shape:
            return f"{name} has shape {tuple(x.shape)}; expected {shape}"
        if x.dtype not in dtypes:
            shown = " or ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
            return f"{name} is {str(x.dtype).removeprefix('torch.')}; expected {shown}"
    return None


def why_not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Says which tensor has NaN or infinity; None if none has."""
    for name, x in tensors.items():
        if not bool(x.isfinite().all()):
            return f"{name} holds numbers that are not finite"
    return None


def _shapes(
    model: GKAForCausalLM, rows: int, tokens: int, tracked: bool
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The shapes of required tensors, and of optional ones."""
    if tokens == 0:
        return {}, {}
    needed, optional = (
        state_shapes(model, rows, tokens),
        {"logits": (rows, model.config.vocab_size)},
    )
    mixers = [layer.mixer for layer in model.model.layers]
    if not all(isinstance(mixer, RecurrentMixer) for mixer in mixers):
        optional["mask"] = (rows, tokens)
    for index, mixer in enumerate(mixers):
        if tracked and isinstance(mixer, RecurrentMixer) and mixer.use_forgetting_gate:
            needed[f"log_decay.{index}"] = (rows, mixer.num_expanded_heads)
    return needed, optional


def _dtypes(name: str, dtype: torch.dtype) -> set[torch.dtype]:
    """The dtypes that a tensor may have; convolutions, keys and logits can have autocast's dtype."""
    if name == "mask":
        return {torch.bool}
    if name.startswith("log_decay."):
        return {torch.float64}
    if ".recurrent." in name:
        return {torch.float64 if dtype == torch.float64 else torch.float32}
    return {dtype} if dtype in _HALF else {dtype} | _HALF


def _some(names: list[str]) -> str:
    shown = ", ".join(f"{name:.40}" for name in sorted(names)[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
