"""One training of a sweep: what it optimises, measures and reports."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from gka.errors import InputError
from gka.evaluation import mqar_cell
from gka.evaluation.mqar import IGNORE, MQARTask
from gka.evaluation.mqar_cell import Budget, Cell, accuracy, build_model, query_loss, train_cell

TASK = MQARTask(vocab_size=18, num_kv_pairs=2, input_seq_len=8)
BUDGET = Budget(
    steps=60,
    batch_size=32,
    train_examples=1000,
    validation_examples=100,
    test_examples=100,
    evaluate_every=30,
)
CELL = Cell("attention", 16, 8, (TASK,), 1e-2, 0, BUDGET)


def test_loss_and_accuracy_read_the_query_positions_unshifted():
    """Both look at the logits AT the labelled positions and at no others."""
    torch.manual_seed(0)
    model = build_model(CELL)
    inputs, labels = TASK.sample(600, seed=0)
    with torch.no_grad():
        logits = model(input_ids=inputs).logits
        expected = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        assert query_loss(model, inputs, labels).item() == pytest.approx(expected.item(), rel=1e-4)
    asked = labels != IGNORE
    right = (logits.argmax(-1) == labels)[asked].double().mean().item()
    assert accuracy(model, inputs, labels) == pytest.approx(right)


def test_training_beats_guessing_and_reports_where_it_ended():
    """Sixty steps lift the accuracy above what guessing among the stated values gives at the start,
    and the curve's last row is the step and validation accuracy reported."""
    result = train_cell(replace(CELL, budget=replace(BUDGET, steps=150)))
    assert result["test_accuracy"][0] > 0.4  # guessing a value of the vocabulary: 1/9
    assert result["curve"][-1][0] == result["steps"]
    assert [result["curve"][-1][2]] == result["validation_accuracy"]
    assert not result["diverged"]
    assert result["parameters"] == sum(p.numel() for p in build_model(CELL).parameters())


def test_equal_cells_give_equal_results_and_seeds_differ():
    """A cell determines its result to the last bit, whatever the global random state is; another
    seed gives another training."""
    torch.manual_seed(1)
    first = train_cell(CELL)
    torch.manual_seed(2)
    again = train_cell(CELL)
    other = train_cell(replace(CELL, seed=1))
    assert first["curve"] == again["curve"]
    assert first["test_accuracy"] == again["test_accuracy"]
    assert first["curve"] != other["curve"]


def test_training_stops_once_good_enough():
    """With stop_accuracy reached at the first look, training ends there."""
    result = train_cell(replace(CELL, budget=replace(BUDGET, stop_accuracy=0.0)))
    assert result["steps"] == 30


def test_divergence_is_reported_as_such():
    """A loss that is no longer finite ends the training and counts as accuracy 0."""
    result = train_cell(replace(CELL, learning_rate=1e30))
    assert result["diverged"]
    assert result["test_accuracy"] == result["validation_accuracy"] == [0.0]


def test_a_mixture_is_trained_in_turn_and_tested_task_by_task():
    """With two tasks every second batch comes from each, and each has an accuracy of its own."""
    other = MQARTask(vocab_size=18, num_kv_pairs=4, input_seq_len=16)
    one = train_cell(CELL)
    both = train_cell(replace(CELL, tasks=(TASK, other)))
    assert len(both["test_accuracy"]) == len(both["validation_accuracy"]) == 2
    mean = sum(both["validation_accuracy"]) / 2
    assert both["curve"][-1][2] == pytest.approx(mean)
    assert both["curve"] != one["curve"]
    order = [task for task, _ in mqar_cell._batches(2, BUDGET, 0)]
    assert order == [0, 1] * 30


def test_batches_are_whole_and_walk_through_shuffled_epochs():
    """An epoch holds every example once except what is left over of a whole batch; the next is in
    another order."""
    budget = replace(BUDGET, steps=62)
    rows = [rows for _, rows in mqar_cell._batches(1, budget, 0)]
    assert {len(r) for r in rows} == {32}
    first, second = torch.cat(rows[:31]), torch.cat(rows[31:])
    assert len(set(first.tolist())) == len(set(second.tolist())) == 31 * 32
    assert not torch.equal(first, second)


def test_the_learning_rate_rises_and_falls():
    """Linear warm-up to the peak, then a cosine to zero at the last step."""
    factors = [mqar_cell.learning_rate_factor(step, BUDGET) for step in range(61)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert factors[60] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("mixer", ["gka", "gla", "deltanet", "gated_deltanet", "swa", "gka+swa"])
def test_every_mixer_trains(mixer):
    """Each mixer goes through the same training, alone or one a layer."""
    budget = replace(BUDGET, steps=2, evaluate_every=2)
    result = train_cell(replace(CELL, mixer=mixer, budget=budget))
    assert result["steps"] == 2 and not result["diverged"]


def test_two_mixers_take_a_layer_each():
    """ "gla+attention" is gated linear attention first and attention second; one name fills both."""
    pattern = build_model(replace(CELL, mixer="gla+attention")).config.pattern
    assert pattern == ["gla", "attention"]
    assert build_model(CELL).config.pattern == ["attention", "attention"]


def test_validation_and_test_sets_are_the_same_for_every_seed_and_apart_from_training():
    """Mixers and seeds are judged on one test set that no training or validation set shares a seed with."""
    assert mqar_cell._VALIDATION_SEED != mqar_cell._TEST_SEED
    assert min(mqar_cell._VALIDATION_SEED, mqar_cell._TEST_SEED) >= 1_000_000


@pytest.mark.parametrize(
    "changed, named",
    [({"steps": 0}, "steps"), ({"batch_size": 0}, "batch_size"), ({"train_examples": 8}, "train_")],
)
def test_impossible_budgets_are_refused_by_name(changed, named):
    """A budget that trains nothing is refused when it is made."""
    with pytest.raises(InputError, match=f"^{named}"):
        replace(BUDGET, **changed)
