"""A planted value to be copied, in ordinary text: what a hybrid's memory keeps, by tokens and in one pass.

A line such as  KEY_mfqa = '83917264'  is planted somewhere in held-out text, which ends with
assert KEY_mfqa == '  and the value. Counted is which characters of the value a model thinks likeliest, given
those before, and how many values it would have written whole.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

DIGITS = 8


@dataclass(frozen=True)
class NeedleTest:
    """Texts with a value to copy, for a tokenizer whose ids are bytes.

    Attributes:
        rows: token ids [samples, context].
        places: where each value begins: the same in every row, counted from the end.
    """

    rows: torch.Tensor
    places: int

    @classmethod
    def drawn(
        cls, filler: Sequence[int], context: int, samples: int, encode: Callable[[str], list[int]]
    ) -> "NeedleTest":
        """`samples` texts of `context` tokens from `filler`, planted at all depths in turn."""
        source, rows = random.Random(context), []
        for number in range(samples):
            key = "".join(source.choices("bcdfghjklmnpqrstvwxz", k=4))
            value = "".join(source.choices("0123456789", k=DIGITS))
            needle, question = f"\nKEY_{key} = '{value}'\n", f"\nassert KEY_{key} == '"
            planted, asked, answer = encode(needle), encode(question), encode(value)
            room = context - len(planted) - len(asked) - len(answer)
            start = source.randrange(max(1, len(filler) - room))
            text = list(filler[start : start + room])
            depth = round(room * number / max(1, samples - 1))
            rows.append(text[:depth] + planted + text[depth:] + asked + answer)
        return cls(torch.tensor(rows), DIGITS)

    @torch.no_grad()
    def run(self, model: Any, batch_size: int, autocast: Callable[[], Any]) -> tuple[float, float]:
        """Share of the values' characters that are copied, and of the values that are copied whole."""
        device = next(model.parameters()).device
        right = []
        for rows in self.rows.to(device).split(batch_size):
            with autocast():
                logits = model(rows, logits_to_keep=self.places + 1, use_cache=False).logits
            right.append(logits[:, :-1].argmax(-1) == rows[:, -self.places :])
        found = torch.cat(right)
        return found.float().mean().item(), found.all(dim=1).float().mean().item()
