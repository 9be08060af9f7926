"""The byte tokenizer is bytes, survives saving, and any other tokenizer is loaded or refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gka.data.tokenizer import (
    END_OF_TEXT,
    Encoder,
    byte_tokenizer,
    fingerprint,
    load_tokenizer,
    vocabulary_size,
)
from gka.errors import InputError

BYTES = byte_tokenizer()


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_ids_are_the_bytes(text: str) -> None:
    """Ids are the UTF-8 bytes and decode to the text, whatever the text."""
    ids = BYTES(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


def test_end_marker_in_text_is_text() -> None:
    """Text that spells the end marker becomes its bytes; only id 256 is the marker."""
    assert BYTES(END_OF_TEXT)["input_ids"] == list(END_OF_TEXT.encode())
    assert BYTES.eos_token_id == BYTES.pad_token_id == 256
    assert len(BYTES) == 257


def test_saved_tokenizer_loads_without_this_library(tmp_path: Path) -> None:
    """AutoTokenizer loads the saved folder in a process that never imports gka, and gives the bytes."""
    BYTES.save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoTokenizer as A\n"
        f"t = A.from_pretrained({str(tmp_path)!r}, local_files_only=True)\n"
        "assert t('é\\n <|endoftext|>')['input_ids'] == list('é\\n <|endoftext|>'.encode())\n"
        "assert t.decode([195, 169, 10, 256]) == 'é\\n<|endoftext|>' and 'gka' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fingerprint_survives_saving_and_tells_tokenizers_apart(
    tmp_path: Path, word_tokenizer: Path
) -> None:
    """A saved tokenizer has the fingerprint it had; another tokenizer has another."""
    BYTES.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert fingerprint(saved) == fingerprint(BYTES)
    assert fingerprint(load_tokenizer(str(word_tokenizer))) != fingerprint(BYTES)


@settings(max_examples=25, deadline=None)
@given(st.text())
def test_fast_encoding_equals_the_tokenizer(text: str) -> None:
    """The encoder's short cut for bytes gives the tokenizer's own ids."""
    np.testing.assert_array_equal(
        Encoder(BYTES)(text), BYTES(text, add_special_tokens=False)["input_ids"]
    )


def test_other_tokenizers_encode_as_themselves(word_tokenizer: Path) -> None:
    """A Hugging Face tokenizer given by folder is used as it is."""
    encode = Encoder(load_tokenizer(str(word_tokenizer)))
    assert encode("b a b c").tolist() == [1, 0, 1, 2]
    assert encode.end == 3
    assert encode.dtype == np.uint16


def test_vocabulary_reaches_the_largest_id(word_tokenizer: Path) -> None:
    """Where ids have gaps, a model needs as many as the largest id asks for, not as there are."""
    tokenizer = AutoTokenizer.from_pretrained(word_tokenizer)
    assert vocabulary_size(tokenizer) == 4
    gaps = Tokenizer(models.WordLevel({"a": 0, "</s>": 99}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=gaps, eos_token="</s>")
    assert (len(tokenizer), vocabulary_size(tokenizer)) == (2, 100)
    assert vocabulary_size(BYTES) == 257


def test_unknown_tokenizer_is_refused(tmp_path: Path) -> None:
    """A folder without a tokenizer is refused, naming it and what can be given."""
    with pytest.raises(InputError, match=r"cannot be loaded .* give 'bytes'"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_without_end_is_refused(tmp_path: Path, word_tokenizer: Path) -> None:
    """A tokenizer without an end-of-text token cannot part documents."""
    tokenizer = AutoTokenizer.from_pretrained(word_tokenizer)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no end-of-text token"):
        load_tokenizer(str(tmp_path))
