"""Conversations as packed blocks of tokens, with the loss on the assistant's turns only.

A file has one conversation per line: {"messages": [{"role": "user", "content": "..."}, ...]}. The tokenizer's
chat template renders it. Whole conversations share a block and do not see each other.
"""

import hashlib
import heapq
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from gka.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class Conversation:
    """A conversation as tokens.

    Attributes:
        ids: int32 [tokens].
        learned: bool [tokens], True for the assistant's tokens.
        bytes: UTF-8 bytes of the assistant's turns.
    """

    ids: np.ndarray
    learned: np.ndarray
    bytes: int


class ChatBlocks(Dataset):
    """Blocks of `length` tokens: whole conversations, then padding.

    Each item is {"input_ids", "labels", "bounds"}, all int64. `input_ids` and `labels` are [length]; labels
    are the ids of the assistant's tokens and -100 elsewhere. `bounds` starts with 0 and has the end of each
    conversation, and of the padding if there is any. Longer conversations are cut to `length`. `collate`
    packs several blocks into one row.

    Args:
        conversations: from `read_chat`.
        length: tokens per block.
        pad: id of the padding.
    """

    def __init__(self, conversations: Sequence[Conversation], length: int, pad: int) -> None:
        self.length, self.pad = length, pad
        self.cut = sum(len(c.ids) > length for c in conversations)
        self.bytes = float(sum(c.bytes for c in conversations))
        self.conversations = conversations
        self.packs = _packs([min(len(c.ids), length) for c in conversations], length)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = np.full(self.length, self.pad, np.int64)
        labels = np.full(self.length, IGNORED, np.int64)
        bounds = [0]
        for number in self.packs[index]:
            one, start = self.conversations[number], bounds[-1]
            end = start + min(len(one.ids), self.length)
            ids[start:end] = one.ids[: end - start]
            labels[start:end] = np.where(one.learned, one.ids, IGNORED)[: end - start]
            labels[start] = IGNORED  # no token of this conversation comes before it
            bounds.append(end)
        if bounds[-1] < self.length:
            bounds.append(self.length)
        return {
            "input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels),
            "bounds": torch.tensor(bounds),
        }  # fmt: skip

    @staticmethod
    def collate(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Pack all blocks into one row: `input_ids` and `labels` [1,T], `cu_seqlens` [N+1], all int64."""
        row = {name: torch.cat([i[name] for i in items])[None] for name in ("input_ids", "labels")}
        length = len(items[0]["input_ids"])
        bounds = [item["bounds"][1:] + number * length for number, item in enumerate(items)]
        return row | {"cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), *bounds])}

    @property
    def targets(self) -> int:
        """Number of tokens with a label."""
        return sum(int(c.learned[1 : self.length].sum()) for c in self.conversations)

    @property
    def checksum(self) -> str:
        """SHA-256 of all `ids` and `learned`."""
        digest = hashlib.sha256()
        for one in self.conversations:
            digest.update(one.ids.tobytes() + one.learned.tobytes())
        return digest.hexdigest()


def chat_blocks(
    files: Sequence[str], tokenizer: "PreTrainedTokenizerBase", length: int, eval_fraction: float
) -> tuple[ChatBlocks, ChatBlocks]:
    """Training and held-out blocks of the conversations of `files`; whole conversations are held out.

    A hash of the conversations' tokens chooses them, so the choice is the same on every machine.

    Raises:
        InputError: as `read_chat`, or fewer than two usable conversations.
    """
    found = read_chat(files, tokenizer, length)
    order = sorted(range(len(found)), key=lambda i: hashlib.sha256(found[i].ids.tobytes()).digest())
    held = set(order[: max(1, round(eval_fraction * len(found)))])
    if len(held) >= len(found):
        raise InputError(
            f"chat {', '.join(files)}: {len(found)} usable conversations; at least two are needed, one of "
            "them held out"
        )
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    parts = ([c for i, c in enumerate(found) if (i in held) == chosen] for chosen in (False, True))
    training, evaluation = (ChatBlocks(part, length, int(pad)) for part in parts)  # type: ignore[arg-type]
    return training, evaluation


def read_chat(
    files: Sequence[str], tokenizer: "PreTrainedTokenizerBase", length: int
) -> list[Conversation]:
    """The conversations of .jsonl files as tokens, if they have a label in the first `length` tokens.

    Raises:
        InputError: the tokenizer is slow or has no chat template, the template does not separate turns, a
            file cannot be read, a line is no conversation (file and line are named) or none is usable.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "chat needs a tokenizer with a chat template (chat_template.jinja, or in tokenizer_config.json)"
        )
    if not tokenizer.is_fast:
        raise InputError(
            "chat needs a fast tokenizer (tokenizer.json), which knows where a token began"
        )
    found = [
        _encode(tokenizer, messages, place) for name in files for place, messages in _lines(name)
    ]
    usable = [c for c in found if c.learned[1:length].any()]
    if not usable:
        raise InputError(
            f"chat {', '.join(files)}: no conversation has an assistant's turn within {length} tokens"
        )
    return usable


def _lines(name: str) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """(place for messages of errors, conversation) of every line that is not empty."""
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"chat {name} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{name}, line {number}", _messages(line, f"{name}, line {number}")


def _messages(line: str, place: str) -> list[dict[str, str]]:
    expected = 'expected {"messages": [{"role": "user", "content": "..."}, ...]}'
    try:
        messages = json.loads(line)["messages"]
        ok = bool(messages) and all(
            isinstance(m["role"], str) and isinstance(m["content"], str) for m in messages
        )
    except (ValueError, KeyError, TypeError):
        ok, messages = False, []
    if not ok:
        raise InputError(f"chat {place} is no conversation; {expected}")
    return messages


def _encode(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]], place: str
) -> Conversation:
    size = sum(len(m["content"].encode()) for m in messages if m["role"] == "assistant")
    text, spans = _spans(tokenizer, messages, place)
    encoded: Any = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    ids = np.asarray(encoded["input_ids"], np.int32)
    begins = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)[:, 0]
    learned = np.zeros(len(ids), bool)
    for start, end in spans:
        learned |= (begins >= start) & (begins < end)
    return Conversation(ids, learned, size)


def _spans(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]], place: str
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and the character ranges of the assistant's turns, end markers included.

    A turn begins after the template's generation prompt and ends where the conversation up to it ends.
    """

    def written(count: int, prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=prompt
            )
        )

    try:
        text = written(len(messages), False)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        parts = [(written(i, True) if i else "", written(i + 1, False)) for i in turns]
    except Exception as error:  # a template can raise any exception
        raise InputError(f"chat {place}: the chat template refuses it: {error}") from error
    for before, upto in parts:
        if not (text.startswith(upto) and upto.startswith(before)):
            raise InputError(
                f"chat {place}: the chat template writes earlier turns differently once others follow, so it "
                "does not say which tokens are the assistant's; use a template that only appends"
            )
    return text, [(len(before), len(upto)) for before, upto in parts]


def _packs(sizes: list[int], length: int) -> list[list[int]]:
    """Conversations of each block: longest first, each into the block with the most room."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (-room left, block)
    for number in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if room and -room[0][0] >= sizes[number]:
            left, block = heapq.heappop(room)
        else:
            left, block = -length, len(packs)
            packs.append([])
        packs[block].append(number)
        heapq.heappush(room, (left + sizes[number], block))
    return packs
