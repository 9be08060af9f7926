"""Tokenizers: bytes by default, or any Hugging Face tokenizer by folder or name."""

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from gka.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BYTES = "bytes"
END_OF_TEXT = "<|endoftext|>"


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer whose id b is the byte b of UTF-8, and whose id 256 ends a document.

    It is a byte-level BPE without merges, hence a plain `tokenizer.json`: a saved model's folder loads
    with `AutoTokenizer` anywhere, without this library and without a network.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_printable_bytes())}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        # Text that happens to spell the end marker is text, not the marker.
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer called `name`: "bytes", a folder, or a name on the Hugging Face hub.

    Raises:
        InputError: if it cannot be loaded, or has no end-of-text token to part documents with.
    """
    if name == BYTES:
        return byte_tokenizer()
    from gka.foreign_code import read_tokenizer

    try:
        tokenizer = read_tokenizer(name)
    except Exception as error:  # the loaders raise whatever their parsers do
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"tokenizer {name!r} cannot be loaded ({reason}); give 'bytes', a folder with a saved "
            "tokenizer, or a name on the Hugging Face hub"
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer {name!r} has no end-of-text token (eos_token), which parts the documents"
        )
    return tokenizer


def fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of all that decides which ids a text becomes; equal before and after saving."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    body = core.to_str() if core is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    special = json.dumps(
        [tokenizer.eos_token_id, bool(getattr(tokenizer, "split_special_tokens", False))]
    )
    return hashlib.sha256(f"{body}\n{special}".encode()).hexdigest()


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """How many ids a model needs: one more than the largest, which a count misses where ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", model: Any, name: str) -> None:
    """Raise `InputError` if the tokenizer has ids for which the model called `name` has no embedding."""
    ids, known = vocabulary_size(tokenizer), model.get_input_embeddings().num_embeddings
    if ids > known:
        raise InputError(
            f"{name}: its tokenizer has {ids} ids, the model {known}; give it the model's own"
        )


class Encoder:
    """Text to ids, without special tokens; about 100 times faster where the ids are the bytes."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.end = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
        self.dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 1 << 16 else np.uint32)
        self._is_bytes = fingerprint(tokenizer) == fingerprint(byte_tokenizer())

    def __call__(self, text: str) -> np.ndarray:
        """Ids of `text`, of shape [tokens] and type `self.dtype`."""
        if self._is_bytes:
            return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)
        # A corpus is longer than any model: no warning about the tokenizer's nominal length.
        ids = self.tokenizer(
            text, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return np.asarray(ids, self.dtype)


def _printable_bytes() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (the GPT-2 convention)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]
