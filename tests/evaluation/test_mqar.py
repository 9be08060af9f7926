"""The MQAR task draws what Zoology's definition says."""

import pytest
import torch

from gka.errors import InputError
from gka.evaluation.mqar import FILLER, IGNORE, MQARTask

TASK = MQARTask(vocab_size=64, num_kv_pairs=5, input_seq_len=40, power_a=0.1)


def test_pairs_first_then_each_key_once_more_labelled_with_its_value():
    """Every example states distinct keys with values, and asks for each exactly once, at a place
    a whole number of two-token slots after the pairs, with the value as the label AT the query."""
    inputs, labels = TASK.sample(300, seed=0)
    assert inputs.shape == labels.shape == (300, 40)
    for row, answers in zip(inputs.tolist(), labels.tolist(), strict=True):
        stated = dict(zip(row[0:10:2], row[1:10:2], strict=True))
        assert len(stated) == 5, "keys repeat"
        assert len(set(stated.values())) == 5, "values repeat"
        asked = {i: value for i, value in enumerate(answers) if value != IGNORE}
        assert len(asked) == 5
        assert all(i >= 10 and i % 2 == 0 for i in asked)
        assert {row[i]: value for i, value in asked.items()} == stated
        assert all(t == FILLER for i, t in enumerate(row) if i >= 10 and i not in asked)


def test_vocabulary_is_split_between_keys_and_values():
    """Keys are 1 .. V/2 - 1, values V/2 .. V - 1, and all of both are used."""
    inputs, labels = TASK.sample(2000, seed=1)
    assert sorted(set(inputs[:, 0:10:2].flatten().tolist())) == list(range(1, 32))
    assert sorted(set(inputs[:, 1:10:2].flatten().tolist())) == list(range(32, 64))
    assert sorted(set(labels.flatten().tolist())) == [IGNORE, *range(32, 64)]


def test_first_gap_follows_the_power_law():
    """A single pair is asked for after a gap drawn from p(gap) ~ gap^(a-1)."""
    task = MQARTask(vocab_size=64, num_kv_pairs=1, input_seq_len=18, power_a=0.3)
    _, labels = task.sample(40_000, seed=2)
    slot = ((labels != IGNORE).float().argmax(1) - 2) // 2
    frequency = torch.bincount(slot, minlength=8) / 40_000
    law = torch.arange(1, 9) ** (0.3 - 1.0)
    assert torch.allclose(frequency, law / law.sum(), atol=0.01)


@pytest.mark.parametrize("power_a, early", [(0.01, True), (1.0, False)])
def test_small_power_puts_queries_early_and_one_spreads_them(power_a, early):
    """power_a = 1 is uniform (mean slot in the middle); near 0 most queries come early."""
    task = MQARTask(vocab_size=128, num_kv_pairs=4, input_seq_len=88, power_a=power_a)
    _, labels = task.sample(2000, seed=3)
    mean_slot = ((labels != IGNORE).nonzero()[:, 1].double() - 8).mean() / 2
    middle = (task.num_query_slots - 1) / 2
    assert mean_slot < 0.6 * middle if early else abs(mean_slot - middle) < 0.5


def test_random_non_queries_replace_filler_only():
    """The option changes no pair, query or label; the filler becomes tokens of the whole vocabulary."""
    noisy = MQARTask(64, 5, 40, power_a=0.1, random_non_queries=True)
    inputs, labels = noisy.sample(300, seed=0)
    plain, plain_labels = TASK.sample(300, seed=0)
    assert torch.equal(labels, plain_labels)
    kept = plain != FILLER
    assert torch.equal(inputs[kept], plain[kept])
    assert set(inputs[~kept].tolist()) == set(range(64))


def test_equal_seeds_draw_equal_examples_and_leave_the_global_generator_alone():
    """A sample is a function of task, size and seed, also across the block size, and of nothing else."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (TASK.sample(5000, seed=s)[0] for s in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"num_kv_pairs": 0}, "num_kv_pairs"),
        ({"input_seq_len": 41}, "input_seq_len"),
        ({"input_seq_len": 18}, "input_seq_len"),
        ({"vocab_size": 40}, "vocab_size"),
        ({"power_a": 0.0}, "power_a"),
        ({"power_a": float("nan")}, "power_a"),
    ],
)
def test_impossible_tasks_are_refused_by_name(changed, named):
    """A task that cannot be drawn is refused when it is made, naming the field at fault."""
    fields = {"vocab_size": 64, "num_kv_pairs": 5, "input_seq_len": 40} | changed
    with pytest.raises(InputError, match=f"^{named}"):
        MQARTask(**fields)


def test_no_examples_is_refused():
    """An empty sample is an error and not an empty tensor."""
    with pytest.raises(InputError, match="num_examples"):
        TASK.sample(0, seed=0)
