"""Tokenizers of three kinds, and text to ask about."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gka.data import byte_tokenizer, find_documents
from gka.evaluation.context.haystack import Haystack, Pieces

SOURCES = sorted(Path(__file__).parents[3].glob("src/gka/maths/*.py"))


def _trained(
    pre: Any, decoder: Any, alphabet: list[str], **special: str
) -> PreTrainedTokenizerFast:
    """A BPE of 600 ids, trained on our own sources."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre, decoder
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special.values()), initial_alphabet=alphabet
    )  # type: ignore[call-arg]
    core.train_from_iterator([path.read_text() for path in SOURCES], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    """bytes; merges of bytes, as GPT-2's; words with a space put before every text and a first token, as
    Llama's."""
    letters = sorted(
        {c for path in SOURCES for c in path.read_text()} | set(map(chr, range(32, 127)))
    )
    spaced = _trained(
        pre_tokenizers.Metaspace(), decoders.Metaspace(), letters, eos_token="</s>", bos_token="<s>"
    )
    from tokenizers.processors import TemplateProcessing

    spaced.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", spaced.bos_token_id)]
    )
    return {
        "bytes": byte_tokenizer(),
        "merges": _trained(
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
            pre_tokenizers.ByteLevel.alphabet(),
            eos_token="</s>",
        ),
        "spaced": spaced,
    }


@pytest.fixture(scope="session", params=["bytes", "merges", "spaced"])
def haystack(request: pytest.FixtureRequest, tokenizers: dict[str, Any]) -> Haystack:
    """Our own sources in the tokens of each tokenizer."""
    documents = find_documents([str(path) for path in SOURCES])
    return Haystack(documents, Pieces(tokenizers[request.param]))


@pytest.fixture(scope="session")
def byte_haystack(tokenizers: dict[str, Any]) -> Haystack:
    """Our own sources as bytes."""
    return Haystack(find_documents([str(path) for path in SOURCES]), Pieces(tokenizers["bytes"]))
