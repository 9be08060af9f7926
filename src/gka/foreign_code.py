"""Reading a model's folder with transformers without running code that comes with it.

A folder may name its own Python files (`auto_map`, `custom_generate`), or kernels to be downloaded
(`attn_implementation`). By default transformers asks on standard input whether to run the files, and
accepts the "y" of `yes |`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from gka.errors import InputError

_KERNELS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_KERNELS += (
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
)


def without_code(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of any `from_pretrained` with `trust_remote_code=False`.

    Raises:
        InputError: the options set `trust_remote_code`.
    """
    if options.get("trust_remote_code"):
        raise InputError(
            "trust_remote_code is set, but code that comes with a model is never run here; load it with "
            "transformers itself if you trust it"
        )
    return {**options, "trust_remote_code": False}


def read_tokenizer(name: Any, **options: Any) -> Any:
    """`AutoTokenizer.from_pretrained` without the folder's code; options and errors are the same."""
    return AutoTokenizer.from_pretrained(name, **without_code(options))


def refuse_code(what: str, config: Mapping[str, Any]) -> None:
    """Raise `InputError` if a config.json asks for kernels of the hub: a name with a slash."""
    for key in _KERNELS:
        values = config.get(key)
        for value in values.values() if isinstance(values, dict) else [values]:
            if isinstance(value, str) and "/" in value:
                raise InputError(
                    f"{what}: {key} in its config.json is {value!r}, code from elsewhere, which is never "
                    "run; leave it out"
                )


def refuse_adapter_code(folder: Path) -> None:
    """Raise `InputError` if an adapter's configuration names a module that peft would import."""
    try:
        content = json.loads((folder / "adapter_config.json").read_bytes())
    except (OSError, ValueError):
        return  # peft reports the error
    if isinstance(content, dict) and content.get("megatron_config") is not None:
        raise InputError(
            f"adapter {folder}: megatron_config in its adapter_config.json makes peft import "
            f"{content.get('megatron_core')!r}, code from elsewhere, which is never run; leave it out"
        )


def read_state(path: Path) -> Any:
    """Tensors and plain values of a file of torch.save, on the CPU; nothing in it is run.

    Raises:
        pickle.UnpicklingError: it holds something else.
    """
    return torch.load(path, map_location="cpu", weights_only=True)
