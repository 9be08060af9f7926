"""The memory's utility by token."""

from typing import Any

import pytest
import torch

from gka.errors import InputError
from gka.evaluation.context.reader import Reader
from gka.evaluation.memory_utility import memory_utility
from gka.models import GKAConfig, GKAForCausalLM


@pytest.fixture(scope="module")
def model() -> GKAForCausalLM:
    torch.manual_seed(0)
    config = GKAConfig(
        vocab_size=32,
        hidden_size=32,
        mixers=["gka", "attention"],
        num_heads=2,
        initializer_range=0.2,
    )
    return GKAForCausalLM(config).eval()


def alone(model: GKAForCausalLM, ids: list[int], at: int, n: int) -> float:
    """Loss of the token at a place, read from n tokens before it."""
    given = torch.tensor([ids[max(0, at - n) : at]])
    with torch.no_grad():
        return float(-model(given).logits[0, -1].float().log_softmax(-1)[ids[at]])


def test_it_is_the_loss_after_forgetting_minus_the_loss_with_the_past(model) -> None:
    """Each token of a span has n tokens before the span and those of the span before itself."""
    torch.manual_seed(1)
    texts = [torch.randint(0, 32, (60,)).tolist() for _ in range(2)]
    found = memory_utility(Reader(model, chunk=16), texts, 40, 60, (8, 32), span=5)
    assert found.utility.shape == (2, 2, 20)
    for row, ids in enumerate(texts):
        for at in (40, 44, 45, 59):
            whole = alone(model, ids, at, at)
            for i, n in enumerate((8, 32)):
                lost = alone(model, ids, at, n + (at - 40) % 5) - whole
                assert float(found.utility[i, row, at - 40]) == pytest.approx(lost, abs=2e-5)
            assert float(found.carried[row, at - 40]) == pytest.approx(whole, abs=2e-5)


def test_nothing_is_forgotten_by_a_reset_before_the_beginning(model) -> None:
    """For n of the text's length and more the utility is 0."""
    ids = torch.randint(0, 32, (48,), generator=torch.Generator().manual_seed(2)).tolist()
    found = memory_utility(Reader(model), [ids], 40, 48, (4, 48, 4096))
    assert float(found.utility[1:].abs().max()) < 1e-5 < float(found.utility[0].abs().max())


def test_bad_input_is_refused(model) -> None:
    """Texts that are too short, and numbers out of range."""
    reader = Reader(model)
    calls: list[tuple[Any, str]] = [
        (([[1, 2, 3]], 1, 4), "the shortest has 3 tokens"),
        (([[1] * 9], 0, 4), "1 <= start < stop"),
        (([[1] * 9], 2, 4, (0,)), "expected numbers of 1 or more"),
        (([[1] * 9], 2, 4, (2,), 0), "expected numbers of 1 or more"),
    ]
    for arguments, message in calls:
        with pytest.raises(InputError, match=message):
            memory_utility(reader, *arguments)
