"""Text to blocks of tokens: corpus -> tokenizer -> packed tokens -> blocks."""

from gka.data.packed import (
    PackedTokens,
    Split,
    TokenBlocks,
    cache_folder,
    pack,
    split,
    token_blocks,
)
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
    "pack",
    "cache_folder",
    "Split",
    "split",
    "TokenBlocks",
    "token_blocks",
]
