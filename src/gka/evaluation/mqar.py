"""Multi-query associative recall (MQAR): the task, as Zoology defines it.

Arora, Eyuboglu et al., "Zoology: Measuring and Improving Recall in Efficient Language Models",
arXiv 2312.04927, section 4. A sequence first states key-value pairs, then repeats each key once as a
query. The gaps follow a power law, like those of repeated bigrams in text::

    vocab_size=12, num_kv_pairs=2, input_seq_len=16
    inputs   2   8   4   7 | 0   0   4   0   0   0   0   0   2   0   0   0
    labels   .   .   .   . | .   .   7   .   .   .   .   .   8   .   .   .        (. is -100)

A label stands at its query, not one token later: the model's output at the query is the answer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gka.errors import InputError

IGNORE = -100
"""The label of a position that is not a query; losses and accuracies skip it."""

FILLER = 0
"""The token of a position that belongs to no pair and is no query."""

_ROWS_AT_A_TIME = 4096  # bounds the memory of drawing keys without replacement


@dataclass(frozen=True)
class MQARTask:
    """One distribution of MQAR examples; equal tasks draw equal examples from equal seeds.

    Attributes:
        vocab_size: number of tokens: 0 is the filler, 1 .. vocab_size // 2 - 1 are keys, the rest values.
        num_kv_pairs: pairs stated and queried in each example, with distinct keys and distinct values.
        input_seq_len: tokens per example, even, at least 4 * num_kv_pairs.
        power_a: a in the law p(gap) ~ gap^(a-1), gap in slots of two tokens. 1: uniform; near 0: most
            queries come early.
        random_non_queries: replace the filler by random tokens of the whole vocabulary.

    Raises:
        InputError: a field is out of range; the message names it.
    """

    vocab_size: int = 8192
    num_kv_pairs: int = 8
    input_seq_len: int = 64
    power_a: float = 0.01
    random_non_queries: bool = False

    def __post_init__(self) -> None:
        if self.num_kv_pairs < 1:
            raise InputError(f"num_kv_pairs is {self.num_kv_pairs}; expected 1 or more")
        if self.input_seq_len % 2:
            raise InputError(f"input_seq_len is {self.input_seq_len}; expected an even number")
        if self.input_seq_len < 4 * self.num_kv_pairs:
            raise InputError(
                f"input_seq_len is {self.input_seq_len}, too short for num_kv_pairs ="
                f" {self.num_kv_pairs}; expected at least {4 * self.num_kv_pairs}:"
                " two tokens to state each pair and two to ask for it"
            )
        if self.vocab_size <= self.input_seq_len:
            raise InputError(
                f"vocab_size is {self.vocab_size}; expected more than input_seq_len ="
                f" {self.input_seq_len}, so that keys and values need not repeat"
            )
        if not 0 < self.power_a < float("inf"):
            raise InputError(f"power_a is {self.power_a}; expected a number above 0")

    @property
    def num_query_slots(self) -> int:
        """Slots of two tokens after the pairs; `num_kv_pairs` of them hold a query."""
        return (self.input_seq_len - 2 * self.num_kv_pairs) // 2

    def gap_probabilities(self) -> Tensor:
        """The power law over query slots: [num_query_slots] float64, summing to 1."""
        gap = torch.arange(1, self.num_query_slots + 1, dtype=torch.float64)
        weight = gap ** (self.power_a - 1)
        return weight / weight.sum()

    def sample(self, num_examples: int, seed: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """Draw examples; the same seed gives the same examples on every machine with such a device.

        Args:
            num_examples: number of examples, 1 or more.
            seed: of a separate generator; the global random state does not change.
            device: where they are drawn and stay. A GPU draws others than a CPU.

        Returns:
            inputs and labels, both int64 [num_examples, input_seq_len].

        Raises:
            InputError: `num_examples` < 1.
        """
        if num_examples < 1:
            raise InputError(f"num_examples is {num_examples}; expected 1 or more")
        generator = torch.Generator(device).manual_seed(seed)
        sizes = [
            min(_ROWS_AT_A_TIME, num_examples - start)
            for start in range(0, num_examples, _ROWS_AT_A_TIME)
        ]
        blocks = [self._sample_block(size, generator) for size in sizes]
        return torch.cat([b[0] for b in blocks]), torch.cat([b[1] for b in blocks])

    def _sample_block(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        half = self.vocab_size // 2
        keys = 1 + _distinct(rows, half - 1, self.num_kv_pairs, generator)
        values = half + _distinct(rows, self.vocab_size - half, self.num_kv_pairs, generator)
        law = self.gap_probabilities().to(generator.device).expand(rows, -1)
        gaps = torch.multinomial(law, self.num_kv_pairs, replacement=False, generator=generator)
        position = 2 * self.num_kv_pairs + 2 * gaps

        inputs = torch.full((rows, self.input_seq_len), FILLER, device=generator.device)
        inputs[:, 0 : 2 * self.num_kv_pairs : 2] = keys
        inputs[:, 1 : 2 * self.num_kv_pairs : 2] = values
        inputs.scatter_(1, position, keys)
        labels = torch.full_like(inputs, IGNORE).scatter_(1, position, values)
        if self.random_non_queries:
            noise = torch.randint(
                self.vocab_size, inputs.shape, generator=generator, device=generator.device
            )
            inputs = torch.where(inputs == FILLER, noise, inputs)
        return inputs, labels


def _distinct(rows: int, choices: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct numbers below `choices` in each row, in random order: int64 [rows, count]."""
    order = torch.rand(rows, choices, generator=generator, device=generator.device)
    return order.topk(count, dim=1).indices
