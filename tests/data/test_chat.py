"""Conversations become packed blocks in which the assistant's tokens alone are learned."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gka.data import byte_tokenizer
from gka.data.chat import chat_blocks, read_chat
from gka.errors import InputError
from gka.models import GKAConfig, GKAForCausalLM

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    found = byte_tokenizer()
    found.chat_template = TEMPLATE
    return found


def write(file: Path, *conversations: list[tuple[str, str]]) -> str:
    lines = [
        json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]})
        for turns in conversations
    ]
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def learned(conversation: Any) -> str:
    return bytes(
        int(i) for i, on in zip(conversation.ids, conversation.learned, strict=True) if on
    ).decode()


def test_only_the_assistants_turns_are_learned(tokenizer: Any, tmp_path: Path) -> None:
    """Learned are the answers and their end marks, not questions, system prompts or role marks."""
    turns = [
        ("system", "s"),
        ("user", "hi"),
        ("assistant", "yo"),
        ("user", "2?"),
        ("assistant", "four"),
    ]
    (one,) = read_chat([write(tmp_path / "a.jsonl", turns)], tokenizer, 200)
    assert (
        bytes(one.ids.tolist())
        .decode()
        .startswith("<system>s</system><user>hi</user><assistant>yo")
    )
    assert learned(one) == "yo</assistant>four</assistant>"
    assert one.bytes == len("yo" + "four")


def test_blocks_hold_every_conversation_once(tokenizer: Any, tmp_path: Path) -> None:
    """Conversations are whole, in one block each, blocks are filled, and the rest is padding."""
    many = [[("user", "q" * i), ("assistant", f"answer {i}")] for i in range(20)]
    file = write(tmp_path / "a.jsonl", *many)
    blocks = chat_blocks([file], tokenizer, 128, 0.1)
    assert [len(part.conversations) for part in blocks] == [18, 2]
    assert len(blocks[0]) < 18
    answers = []
    for block in blocks[0]:
        ids, labels = block["input_ids"], block["labels"]
        assert ids.shape == labels.shape == (128,)
        assert bool((labels[labels != -100] == ids[labels != -100]).all())
        bounds = block["bounds"].tolist()
        assert bounds[0] == 0 and bounds[-1] == 128
        text = bytes(i for i in labels.tolist() if i != -100).decode()
        answers += re.findall(r"answer \d+", text)
    held = {learned(c)[: -len("</assistant>")] for c in blocks[1].conversations}
    assert sorted(answers) == sorted({f"answer {i}" for i in range(20)} - held)


def test_packed_conversations_do_not_see_each_other(tokenizer: Any, tmp_path: Path) -> None:
    """The loss of a packed row is that of its conversations one by one, over all learned tokens."""
    many = [[("user", "q" * i), ("assistant", "b" * (i + 3))] for i in range(8)]
    blocks, _ = chat_blocks([write(tmp_path / "a.jsonl", *many)], tokenizer, 128, 0.1)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "head_dim": 8, "num_heads": 4, "num_iter": 4}
    model = GKAForCausalLM(GKAConfig(vocab_size=257, mixers=["gka", "attention"], **sizes)).eval()
    with torch.no_grad():
        row = blocks.collate([blocks[i] for i in range(len(blocks))])
        together = model(**row).loss
        total, count = torch.zeros(()), 0
        for one in blocks.conversations:
            ids = torch.tensor(one.ids[None], dtype=torch.int64)
            labels = torch.where(torch.tensor(one.learned[None]), ids, -100)
            total += model(input_ids=ids, labels=labels).loss * one.learned[1:].sum()
            count += int(one.learned[1:].sum())
    assert count == blocks.targets
    assert together.item() == pytest.approx((total / count).item(), rel=1e-5)


def test_long_conversations_are_cut(tokenizer: Any, tmp_path: Path) -> None:
    """A conversation longer than a block is cut and counted; one without an answer within it is left out."""
    many = [
        [("user", "a"), ("assistant", "b" * 200)],
        [("user", "a" * 200), ("assistant", "b")],
        [("user", "c"), ("assistant", "d")],
    ]
    parts = chat_blocks([write(tmp_path / "a.jsonl", *many)], tokenizer, 64, 0.1)
    assert sum(len(p.conversations) for p in parts) == 2
    assert sum(p.cut for p in parts) == 1
    assert all(len(block["input_ids"]) == 64 for part in parts for block in part)


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"messages": []}', '{"messages": [{"role": "user"}]}', '{"text": "a"}']
)
def test_lines_that_are_no_conversation_are_named(
    tokenizer: Any, tmp_path: Path, line: str
) -> None:
    """The error names file and line, and what was expected there."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "x"}]}\n' + line)
    with pytest.raises(InputError, match=r"a\.jsonl, line 2 is no conversation; expected"):
        read_chat([str(file)], tokenizer, 64)


def test_templates_that_cannot_tell_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    """Without a template, or with one that rewrites earlier turns, nothing is guessed."""
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    file = write(tmp_path / "a.jsonl", turns)
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(
        InputError, match="line 1: the chat template writes earlier turns differently"
    ):
        read_chat([file], tokenizer, 64)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="tokenizer with a chat template"):
        read_chat([file], tokenizer, 64)


def test_no_answers_is_an_error(tokenizer: Any, tmp_path: Path) -> None:
    """Conversations without an assistant's turn, or a single one, cannot be learned from."""
    with pytest.raises(
        InputError, match="no conversation has an assistant's turn within 64 tokens"
    ):
        read_chat([write(tmp_path / "a.jsonl", [("user", "a")])], tokenizer, 64)
    one = write(tmp_path / "b.jsonl", [("user", "a"), ("assistant", "b")])
    with pytest.raises(InputError, match="1 usable conversations; at least two"):
        chat_blocks([one], tokenizer, 64, 0.1)
    with pytest.raises(InputError, match=r"none\.jsonl cannot be read"):
        read_chat([str(tmp_path / "none.jsonl")], tokenizer, 64)
