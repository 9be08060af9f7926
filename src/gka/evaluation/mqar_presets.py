"""Sweeps by name, as data."""

from gka.evaluation.mqar import MQARTask
from gka.evaluation.mqar_cell import Budget
from gka.evaluation.mqar_sweep import Sweep

# "gla+attention": convolutions for "attention", which has none of its own and does not learn in time.
_COMPARED = ("gka", "gla", "deltanet", "gated_deltanet", "attention", "gla+attention")


def _zoology_budget(batch_size: int, epochs: int) -> Budget:
    """Zoology's: 100,000 examples, 3000 for the test, AdamW with weight decay 0.1, stop at 99%."""
    epoch = 100_000 // batch_size
    return Budget(
        steps=epochs * epoch,
        batch_size=batch_size,
        train_examples=100_000,
        validation_examples=1000,
        test_examples=3000,
        evaluate_every=epoch,
    )


def _tasks(vocab_size: int, *pairs_and_lengths: tuple[int, int]) -> tuple[MQARTask, ...]:
    return tuple(MQARTask(vocab_size, pairs, length) for pairs, length in pairs_and_lengths)


PRESETS: dict[str, Sweep] = {
    # Minutes on two CPU cores: as many pairs as the memory has columns.
    "cpu": Sweep(
        mixers=_COMPARED,
        sizes=((16, 16),),
        mixtures=(
            (
                _tasks(128, (16, 64)),
                Budget(steps=1500, batch_size=32, train_examples=48_000),
            ),
        ),
        learning_rates=(5e-3, 1e-2, 2e-2),
        seeds=(0, 1, 2),
    ),
    # Hours on one GPU: Zoology's vocabulary, up to four times as many pairs as the memory has columns.
    "gpu": Sweep(
        mixers=_COMPARED,
        sizes=((64, 32), (64, 64)),
        mixtures=(
            (_tasks(8192, (16, 256), (32, 256), (64, 256)), _zoology_budget(256, 16)),
            (_tasks(8192, (32, 512), (64, 512), (128, 512)), _zoology_budget(128, 16)),
        ),
        learning_rates=(1e-3, 3e-3, 1e-2),
        seeds=(0, 1, 2),
    ),
    # The sizes, rates and batch sizes of figure 2 of the Zoology paper: one task a model, 64 epochs.
    "zoology": Sweep(
        mixers=_COMPARED,
        sizes=((64, 64), (128, 128), (256, 256)),
        mixtures=(
            (_tasks(8192, (4, 64)), _zoology_budget(512, 64)),
            (_tasks(8192, (8, 128)), _zoology_budget(512, 64)),
            (_tasks(8192, (16, 256)), _zoology_budget(256, 64)),
            (_tasks(8192, (64, 512)), _zoology_budget(128, 64)),
        ),
        learning_rates=(1e-4, 4.6416e-4, 2.1544e-3, 1e-2),
        seeds=(0,),
    ),
}
