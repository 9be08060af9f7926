"""Sweeps by name, as data."""

from gka.evaluation.mqar import MQARTask
from gka.evaluation.mqar_cell import Budget
from gka.evaluation.mqar_sweep import Sweep

_COMPARED = ("attention", "gka", "gated_deltanet", "deltanet", "gla")


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


PRESETS: dict[str, Sweep] = {
    # Minutes on two CPU cores. As many pairs as the state has columns: where memories differ.
    "cpu": Sweep(
        mixers=_COMPARED,
        widths=(16,),
        tasks=((MQARTask(256, 16, 64), Budget(steps=1000, train_examples=64_000)),),
        learning_rates=(5e-3, 1e-2, 2e-2),
        seeds=(0, 1),
    ),
    # Hours on one GPU. Zoology's vocabulary, up to twice as many pairs as the state has columns.
    "gpu": Sweep(
        mixers=_COMPARED,
        widths=(32, 64),
        tasks=(
            (MQARTask(8192, 16, 128), _zoology_budget(256, 16)),
            (MQARTask(8192, 32, 128), _zoology_budget(256, 16)),
            (MQARTask(8192, 64, 256), _zoology_budget(256, 16)),
        ),
        learning_rates=(1e-3, 3e-3, 1e-2),
        seeds=(0, 1, 2),
    ),
    # The sizes, rates and batch sizes of figure 2 of the Zoology paper (64 epochs each).
    "zoology": Sweep(
        mixers=_COMPARED,
        widths=(64, 128, 256, 512),
        tasks=(
            (MQARTask(8192, 4, 64), _zoology_budget(512, 64)),
            (MQARTask(8192, 8, 128), _zoology_budget(512, 64)),
            (MQARTask(8192, 16, 256), _zoology_budget(256, 64)),
            (MQARTask(8192, 64, 512), _zoology_budget(128, 64)),
        ),
        learning_rates=(1e-4, 4.6416e-4, 2.1544e-3, 1e-2),
        seeds=(0,),
    ),
}
