"""Trains a small model once and shows how long its heads remember: `python -m benchmarks.run heads`.

`gka train` trains the model on Python's standard library, byte by byte, into --output/run. A run that is cut
off goes on; one that is complete is left as it is. heads.json, .md and .png hold how many tokens the heads of
each layer remember. `python -m benchmarks.run op --keys trained` then measures the op on what its layers make
of text that it was not trained on.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import results
from benchmarks.op.trained import TrainedHeads, head_of_histogram, histogram
from rich.console import Console

from gka.experiments.ledger import markdown_table, own, print_table, report
from gka.training import RunConfig, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUN = "run"
# of the fields of `gka train`; K = 128 as in the models that the op is made for
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "28m": {
        "data": {"sequence_length": 4096, "eval_fraction": 0.05},
        "model": {"hidden_size": 512, "num_hidden_layers": 8, "num_heads": 4, "num_iter": 30},
        "training": {
            "max_steps": 600, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 60,
            "weight_decay": 0.1, "dtype": "bfloat16", "eval_steps": 600, "save_steps": 200,
        },
    },
    "tiny": {
        "data": {"sequence_length": 64, "eval_fraction": 0.002},
        "model": {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "num_iter": 8},
        "training": {
            "max_steps": 3, "batch_size": 2, "warmup_steps": 1, "eval_steps": 3, "save_steps": 3,
        },
    },
}  # fmt: skip


class Bench(results.Run):
    """One run of `python -m benchmarks.run heads`."""

    def run(self) -> dict[str, Any]:
        """Train where that is not done, and tell memory."""
        options = self.options
        tables = SIZES[options.size]
        if options.text:
            tables = tables | {"data": tables["data"] | {"text": list(map(str, options.text))}}
        folder = options.output / RUN
        config = RunConfig.from_tables(tables)
        metrics = train(config, folder, console=Console(), resume=(folder / "run.json").exists())
        self.found |= {key: metrics[key] for key in ("evaluation", "hardware")}
        heads = TrainedHeads(folder, self.device)
        self.note(training=metrics["training"], seconds=self.elapsed, **heads.about)
        return self.found


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Heads of each layer by the tokens that they remember, and of all."""
    import torch

    every = torch.tensor(found["memory_tokens"])
    named = [(f"layer {i}", memory) for i, memory in enumerate(every)]
    return [
        [name, *(str(count or "") for count in histogram(memory))]
        for name, memory in [*named, ("all", every.flatten())]
    ]


def write(found: dict[str, Any], folder: Path) -> None:
    """To the terminal, heads.md and heads.png."""
    head = ["tokens", *head_of_histogram()]
    table = rows(found)
    print_table(head, table)
    loss, steps = found["evaluation"]["loss"], found["training"]["steps"]
    words = (
        f"{found['parameters'] / 1e6:.1f} M parameters, {found['layers']} layers x {found['heads']} heads of "
        f"{found['dim']}, {steps} steps, held-out loss {loss:.3f} nats a token; {found['card']}. Tokens "
        "after which a head's memory has faded to 1/e, by the median of its log decay on held-out text."
    )
    page = f"{words}\n\n`{found['command']}`\n\n{markdown_table(head, table)}\n"
    report(folder / "heads", page, lambda figure: draw(found, figure))


def draw(found: dict[str, Any], figure: "Figure") -> None:
    """Every head's memory, a row a layer."""
    axis = figure.subplots()
    for layer, memory in enumerate(found["memory_tokens"]):
        axis.scatter(memory, [layer] * len(memory), color="#3b6ea5", alpha=0.7)
    axis.set(xscale="log", xlabel="tokens that a head remembers", ylabel="layer")
    axis.set_yticks(range(len(found["memory_tokens"])))
    axis.grid(alpha=0.3)
    axis.invert_yaxis()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = results.parser("heads", __doc__)
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="28m", help="tiny tries the command out (28m)")
    add("--text", type=Path, nargs="*", default=[], help="files, folders (the standard library)")
    return results.parse(parser, arguments, folders=("--text",))


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    own(options.output)
    found = Bench("heads", options).run()
    write(found, options.output)
