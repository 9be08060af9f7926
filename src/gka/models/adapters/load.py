"""Foreign folders as our models: checked in full first, then read by transformers' own loader."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from gka.errors import InputError
from gka.models.adapters import Adapter, adapter_of
from gka.models.adapters.files import check_stored
from gka.models.configuration import GKAConfig
from gka.models.foreign_code import refuse_code

if TYPE_CHECKING:
    from gka.models.decoder import GKAPreTrainedModel

_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_TIED_HEAD = r"^lm_head\.weight$"


def load_with(
    cls: type[GKAPreTrainedModel], load: Callable[..., Any], name: Any, *args: Any, **options: Any
) -> Any:
    """`from_pretrained` for a folder or hub name of any format.

    Args:
        cls: the class to load.
        load: transformers' `from_pretrained`.
        name: folder or hub name.
        args, options: as given to `from_pretrained`.

    Raises:
        InputError: a foreign checkpoint whose configuration has no meaning here, or whose weights are
            missing, left over, misshapen or damaged. Nothing is initialised in their place. Or a
            configuration that asks for code from elsewhere.
    """
    theirs = stored_config(name, options)
    refuse_code(f"model {name}", theirs or {})
    adapter = None if theirs is None else adapter_of(theirs)
    if adapter is None or theirs is None:
        return load(name, *args, **options)
    config = GKAConfig.from_dict(dict(theirs))
    folder = Path(name) / options.get("subfolder", "")
    if folder.is_dir():
        check_stored(folder, _expected(adapter, config), _allowed(adapter, config))
    wants_notes = options.pop("output_loading_info", False)
    mapping = adapter.key_mapping(config.pattern)
    model, notes = load(name, *args, key_mapping=mapping, output_loading_info=True, **options)
    _check_notes(name, notes, _allowed(adapter, config), with_head=hasattr(model, "lm_head"))
    # else transformers would save under their names, beside our configuration
    model._weight_conversions = None
    return (model, notes) if wants_notes else model


def stored_config(name: Any, options: dict[str, Any]) -> dict[str, Any] | None:
    """The config.json at hand, untranslated; None where transformers should say what is wrong.

    Args:
        name: folder or hub name.
        options: as given to `from_pretrained`.
    """
    if name is None or options.get("gguf_file") is not None:
        return None
    hub = {key: options[key] for key in _HUB if key in options}
    try:
        theirs, _ = PreTrainedConfig.get_config_dict(name, **hub)
    except (OSError, ValueError):
        return None
    return theirs


def _expected(adapter: Adapter, config: Any) -> dict[str, tuple[int, ...]]:
    """Their keys and shapes, from a model without memory."""
    from gka.models.causal_lm import GKAForCausalLM

    with torch.device("meta"):
        state = GKAForCausalLM(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in adapter.export(config, state)}


def _allowed(adapter: Adapter, config: Any) -> tuple[str, ...]:
    return (*adapter.unused, *((_TIED_HEAD,) if config.tie_word_embeddings else ()))


def _check_notes(
    name: Any, notes: dict[str, Any], allowed: tuple[str, ...], *, with_head: bool
) -> None:
    """What the loader noticed must be nothing but harmless keys, which the notes then no longer hold.

    For hub names this is the only check.
    """
    allowed = allowed if with_head else (*allowed, _TIED_HEAD)
    extra = [k for k in notes["unexpected_keys"] if not any(re.search(p, k) for p in allowed)]
    check_complete(name, notes | {"unexpected_keys": extra})
    notes["unexpected_keys"] = set()


def check_complete(name: Any, notes: dict[str, Any]) -> None:
    """Refuse what a loader has read in part.

    Args:
        name: of the model, for the message.
        notes: the loading info of `from_pretrained`.

    Raises:
        InputError: weights are missing, left over or of other shapes; the first three are named.
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
