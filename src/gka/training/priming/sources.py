"""What a priming run reads: the tokenizer, and blocks of text or of conversations."""

from typing import TYPE_CHECKING, Any

from gka.data import load_tokenizer, token_blocks, vocabulary_size
from gka.data.chat import chat_blocks
from gka.errors import InputError
from gka.training.priming.config import PrimeConfig

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from gka.models import GKAForCausalLM
    from gka.training.priming.measure import HeldOut


def open_tokenizer(config: PrimeConfig, teacher: "GKAForCausalLM") -> "PreTrainedTokenizerBase":
    """The tokenizer that the run names, else the one in the teacher's folder.

    Raises:
        InputError: there is none, or it has more ids than the teacher has embeddings.
    """
    name = config.data.tokenizer or str(_tokenizer_folder(config.prime.teacher))
    tokenizer = load_tokenizer(name)
    size, known = vocabulary_size(tokenizer), teacher.config.vocab_size
    if size > known:
        raise InputError(
            f"tokenizer {name!r} has {size} ids, the teacher {known}; it must be the teacher's own"
        )
    return tokenizer


def _tokenizer_folder(teacher: str) -> "Path":
    from pathlib import Path

    from gka.checkpoints.open import model_folder

    folder = model_folder(Path(teacher))
    marks = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((folder / mark).is_file() for mark in marks):
        raise InputError(
            f"teacher {teacher!r} holds no tokenizer; name its tokenizer with --tokenizer (bytes, a folder, "
            "or a name on the Hugging Face hub)"
        )
    return folder


def open_blocks(
    config: PrimeConfig, tokenizer: "PreTrainedTokenizerBase", console: "Console"
) -> tuple[Any, Any]:
    """Blocks to train on, and held-out ones.

    Raises:
        InputError: as the readers of text and conversations, and if there is less than one block of either.
    """
    from gka.training.run import pack_text

    data = config.data
    if not data.chat:
        packed = pack_text(data, tokenizer, console)
        return token_blocks(packed, data.sequence_length, data.eval_fraction)
    blocks = chat_blocks(data.chat, tokenizer, data.sequence_length, data.eval_fraction)
    count = sum(len(part.conversations) for part in blocks)
    cut = sum(part.cut for part in blocks)
    note = f", {cut} cut to {data.sequence_length} tokens" if cut else ""
    console.print(f"{count} conversations in {len(blocks[0])} blocks{note}", highlight=False)
    return blocks


def held_out(config: PrimeConfig, blocks: Any) -> "HeldOut":
    """How the held-out blocks are measured: in the batches and dtype of stage 2."""
    from gka.training.priming.measure import HeldOut

    size, targets = (
        (blocks.bytes, blocks.targets)
        if config.data.chat
        else (blocks.part.bytes, blocks.part.tokens)
    )
    per_target = size / targets
    return HeldOut(blocks, config.stage2.batch_size, config.stage2.dtype, per_target)
