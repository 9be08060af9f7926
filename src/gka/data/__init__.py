"""Text to sequences of tokens: sources -> parts -> tokenizer -> packed tokens -> sequences in order."""

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
