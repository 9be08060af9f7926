"""Text to sequences of tokens: sources -> parts -> tokenizer -> packed tokens -> sequences in order.

Names are imported at first use: processes that tokenise need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gka.caches import cache_folder
    from gka.data.packed import PackedTokens
    from gka.data.packing import Progress, make, pack
    from gka.data.sequences import HeldOutSequences, TrainingSequences
    from gka.data.splits import Holdout, Split, TokenBlocks, split, token_blocks
    from gka.data.streaming import StreamedTokens
    from gka.data.text import (
        Document,
        Encoder,
        byte_tokenizer,
        find_documents,
        load_tokenizer,
        standard_library,
        vocabulary_size,
    )

_HOME = {
    "gka.data.text": (
        "Document", "find_documents", "standard_library", "byte_tokenizer", "load_tokenizer",
        "vocabulary_size", "Encoder",
    ),
    "gka.data.packed": ("PackedTokens",),
    "gka.data.packing": ("Progress", "pack", "make"),
    "gka.data.streaming": ("StreamedTokens",),
    "gka.caches": ("cache_folder",),
    "gka.data.splits": ("Holdout", "Split", "split", "TokenBlocks", "token_blocks"),
    "gka.data.sequences": ("TrainingSequences", "HeldOutSequences"),
}  # fmt: skip
_MODULES = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Document",
    "find_documents",
    "standard_library",
    "byte_tokenizer",
    "load_tokenizer",
    "vocabulary_size",
    "Encoder",
    "PackedTokens",
    "Progress",
    "pack",
    "make",
    "StreamedTokens",
    "cache_folder",
    "Holdout",
    "TrainingSequences",
    "HeldOutSequences",
    "Split",
    "split",
    "TokenBlocks",
    "token_blocks",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
