"""`gka plan`: time, memory and exchanges of a recipe's run on given GPUs, before it starts."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gka.commands import options as opt
from gka.commands import runs
from gka.console import duration, text_console
from gka.errors import InputError
from gka.training.config import RunConfig
from gka.training.recipes import read_recipe, recipe_names
from gka.training.settings import merged

if TYPE_CHECKING:
    from rich.table import Table

    from gka.parallel.planner import Job, Plan

VOCABULARY = 32000
Recipe = Annotated[
    str | None, typer.Argument(help=f"{', '.join(recipe_names('train'))} or a .toml file.")
]
_OF_RECIPE: Any = {"show_default": "the recipe's own"}


def plan(
    recipe: Recipe = None,
    *,
    gpus: Annotated[int, typer.Option(help="GPUs in all; dp-shard takes those that are left.")] = 1,
    dp_shard: Annotated[
        int | None,
        typer.Option(
            help="GPUs that share parameters and optimizer (FSDP2).",
            show_default="the recipe's own, or the rest",
        ),
    ] = None,
    dp_replicate: Annotated[
        int | None, typer.Option(help="Copies of such a group.", **_OF_RECIPE)
    ] = None,
    cp: Annotated[
        int | None, typer.Option(help="GPUs that share each sequence.", **_OF_RECIPE)
    ] = None,
    tp: Annotated[
        int | None, typer.Option(help="GPUs that share each layer's heads.", **_OF_RECIPE)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences of a forward pass on each GPU.", **_OF_RECIPE)
    ] = None,
    checkpointing: Annotated[
        str | None,
        typer.Option(help="none, selective-products, selective or full.", **_OF_RECIPE),
    ] = None,
    card: Annotated[str, typer.Option(help="h200, or a .json file of --measure.")] = "h200",
    vocab_size: Annotated[
        int, typer.Option(help="Tokens of the vocabulary, which the tokenizer will set.")
    ] = VOCABULARY,
    settings: Annotated[
        list[str] | None, runs.any_setting("model.num_iter=15 or data.sequence_length=8192")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    measure: Annotated[
        Path | None,
        typer.Option(
            help="Measure this machine's GPU (a minute) into a .json file for --card.",
            metavar="FILE",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="What --measure measures.", show_default="cuda where there is one"),
    ] = None,
) -> None:
    """Predict a run's memory, time and exchanges on given GPUs.

    The global batch is the recipe's: batch_size x gradient_accumulation sequences. Nothing is trained, and no
    GPU is needed; speeds are those measured on one card (docs/howto/plan.md).
    """
    from gka.parallel.planner import make_plan, read_card

    if measure is not None:
        _measure(measure, device)
        if recipe is None:
            return
    if recipe is None:
        raise InputError(f"recipe: give one of {', '.join(recipe_names('train'))}, or a .toml file")
    given = {"--cp": cp, "--tp": tp, "--dp-replicate": dp_replicate}
    for name, number in {"--gpus": gpus, **given}.items():
        opt.at_least_one(name, 1 if number is None else number)
    config = RunConfig.from_tables(merged(read_recipe(recipe), runs.assigned(settings or [])))
    asked = {"dp_replicate": dp_replicate, "cp": cp, "tp": tp, "dp_shard": dp_shard}
    ranks = asdict(config.parallel) | {k: n for k, n in asked.items() if n is not None}
    own = {"batch_size": batch_size, "gradient_checkpointing": checkpointing}
    job = _job(config, gpus, ranks, own, vocab_size)
    found = make_plan(job, read_card(card))
    if as_json:
        print(json.dumps({"recipe": recipe, **found.as_json()}, indent=1))
        return
    console = text_console()
    console.print(_table(recipe, found))
    for warning in found.warnings():
        console.print(f"note: {warning}", highlight=False, soft_wrap=True)


def _measure(path: Path, device: str | None) -> None:
    from gka.parallel.planner.measure import measure_card
    from gka.storage import write_json

    if path.suffix != ".json":
        raise InputError(f"--measure {path}: give a name that ends in .json, as --card takes it")
    console = text_console()
    found = measure_card(opt.usable_device(device), lambda what: console.print(f"measuring {what}"))
    write_json(path, found)
    opt.tell(console, path.parent, card=path.name)


def _job(
    config: RunConfig, gpus: int, asked: dict[str, Any], own: dict[str, Any], vocabulary: int
) -> "Job":
    from gka.models import GKAConfig
    from gka.parallel import Layout
    from gka.parallel.planner import Job
    from gka.training.config import CHECKPOINTING

    rest = asked["dp_replicate"] * asked["cp"] * asked["tp"]
    shard = asked["dp_shard"] or max(1, gpus // rest)
    layout = Layout(asked["dp_replicate"], shard, asked["cp"], asked["tp"])
    if layout.ranks != gpus:
        raise InputError(
            f"{str(layout) or '1 GPU'} are {layout.ranks} GPUs, and --gpus is {gpus}: make the product of "
            "dp-shard, dp-replicate, cp and tp the number of GPUs, or leave --dp-shard out"
        )
    training = config.training
    way = own["gradient_checkpointing"] or training.gradient_checkpointing
    if way not in CHECKPOINTING:
        raise InputError(f"--checkpointing is {way!r}; expected one of {', '.join(CHECKPOINTING)}")
    fields = {key: value for key, value in config.model.items() if key != "start"}
    try:
        model = GKAConfig(vocab_size=vocabulary, **fields)
    except (TypeError, ValueError) as error:
        raise InputError(f"[model]: {error}") from error
    blocks = training.batch_size * training.gradient_accumulation
    micro = min(own["batch_size"] or training.batch_size, max(1, blocks // layout.readers))
    return Job(
        model, config.data.sequence_length, opt.at_least_one("--batch-size", micro), blocks,
        training.max_steps, layout, training.dtype == "bfloat16", way,
        training.keep_states,
    )  # fmt: skip


def _table(recipe: str, plan: "Plan") -> "Table":
    from rich.table import Table

    job, gib = plan.job, 2**30
    held = {name: value for name, value in vars(plan.memory).items() if value}
    spent = {n: x for n, x in vars(plan.work).items() if x and n != "host"}
    moved = {name: value for name, value in vars(plan.exchange).items() if value}
    gpus = job.layout.ranks
    rows = {
        "model": f"{job.parameters:,} parameters, {job.matrices:,} of them in products",
        "GPUs": f"{gpus} x {plan.card.name}: {str(job.layout) or '1 GPU'}",
        "step": f"{job.blocks} x {job.length:,} = {job.tokens:,} tokens: {job.micro} at a time on each "
        f"group of GPUs, gradient_accumulation = {job.accumulation}, checkpointing {job.checkpointing}",
        "FLOPs": f"{plan.flops:.3g} a token, {plan.flops * job.tokens * job.steps:.3g} in all",
        "memory a GPU": f"{plan.memory.total / gib:.1f} of {plan.card.memory_gib:.0f} GiB: "
        + ", ".join(f"{name} {value / gib:.1f}" for name, value in held.items()),
        "step time": f"{plan.seconds:.3g} s: "
        + ", ".join(f"{name} {value:.3g}" for name, value in spent.items())
        + f", exchanges not hidden {plan.exposed:.3g}; host {plan.work.host:.3g} beside it",
        "speed": f"{plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.0%}",
        "exchanged a step": ", ".join(f"{n} {x / 1e9:.2f} GB" for n, x in moved.items()) or "nothing",
        "whole run": f"{job.steps:,} steps, {job.tokens * job.steps:.3g} tokens: "
        f"{duration(3600 * plan.hours)}, {plan.hours * gpus:,.0f} GPU hours",
    }  # fmt: skip
    table = Table(show_header=False, title=f"Plan of {recipe}", title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    return table
