"""`gka recall`: recall of key-value pairs from untrained memories."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gka.commands.options import at_least_one, numbers, output_folder, tell
from gka.console import status, text_console
from gka.storage import only_writer

NEXT = """Next:
  gka recall --ridge-ratios 0.002,0.02   a smaller ridge reads more exactly
  gka mqar                               the same question to trained models (about 20 minutes)"""


def recall(
    *,
    head_dim: Annotated[int, typer.Option(help="Size of keys and values, K = V.")] = 64,
    pairs: Annotated[
        str, typer.Option(help="Numbers N of pairs to write.", metavar="N,N")
    ] = "4,8,16,24,32,48,64,96,128,192,256",
    correlations: Annotated[
        str,
        typer.Option(help="Expected cosines between keys, each from 0 to below 1.", metavar="X,X"),
    ] = "0,0.5,0.9",
    ridge_ratios: Annotated[
        str, typer.Option(help="a in lambda = a |H|, for GKA and exact ridge.", metavar="X,X")
    ] = "0.005,0.02,0.1",
    num_iters: Annotated[str, typer.Option(help="Chebyshev steps of GKA.", metavar="N,N")] = "5,30",
    seeds: Annotated[int, typer.Option(help="Number of draws of keys and values.")] = 8,
    output: Annotated[Path, output_folder("Folder for recall.json and recall.png.")] = Path(
        "runs/recall"
    ),
) -> None:
    """Write N correlated key-value pairs into untrained memories and read them back; takes seconds.

    Compares linear attention, DeltaNet, Gated KalmaNet and exact ridge regression at equal head size. Lists
    are numbers separated by commas. See also `gka mqar`, which trains models.
    """
    ratios = numbers("--ridge-ratios", ridge_ratios, float)
    iterations = numbers("--num-iters", num_iters, int)
    wanted = {
        "head_dim": head_dim,
        "pairs": numbers("--pairs", pairs, int),
        "correlations": numbers("--correlations", correlations, float),
        "seeds": tuple(range(at_least_one("--seeds", seeds))),
    }
    with only_writer(output, "--output"):
        _run(wanted, ratios, iterations, output)


def _run(
    wanted: dict[str, Any], ratios: tuple[float, ...], iterations: tuple[int, ...], folder: Path
) -> None:
    from gka.evaluation.memories import compared_memories
    from gka.evaluation.plots import plot_recall
    from gka.evaluation.recall import RecallSettings, run_recall, what_was_learnt
    from gka.evaluation.results import environment, one_thread, recall_key, recall_tables
    from gka.storage import write_json

    settings, memories = RecallSettings(**wanted), compared_memories(ratios, iterations)
    console = text_console()
    with status(console, "writing and reading"), one_thread():
        content = {"environment": environment()} | run_recall(settings, memories)
        write_json(folder / "recall.json", content)
        plot_recall(content, folder / "recall.png")
    for line in what_was_learnt(content):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print()
    for table in recall_tables(content):
        console.print(table)
    console.print(recall_key(content), highlight=False, markup=False, soft_wrap=True)
    tell(console, folder, figures="recall.json", plot="recall.png")
    console.print(NEXT, highlight=False, markup=False, soft_wrap=True)
