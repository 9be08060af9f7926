"""The options of `gka train`, as types: each is what typer shows and reads."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from gka.training.config import (
    MODEL_DEFAULTS,
    PRECISIONS,
    DataConfig,
    TrainingConfig,
    recipe_names,
)

_DATA, _MODEL, _TRAINING, _RUN = "Data", "Model", "Training", "Run"

Text = Annotated[
    list[str] | None,
    Argument(help="Text files and folders (UTF-8). Without any: Python's standard library."),
]
Glob = Annotated[
    str | None, Option(help='Which files of folders, such as "*.py".', rich_help_panel=_DATA)
]
Tokenizer = Annotated[
    str | None,
    Option(help="bytes, or a Hugging Face tokenizer's folder or name.", rich_help_panel=_DATA),
]
SequenceLength = Annotated[
    int | None,
    Option(help=f"Tokens in a block ({DataConfig.sequence_length}).", rich_help_panel=_DATA),
]

Mixer = Annotated[
    str | None,
    Option(
        help="gka (the default), attention, swa, gla, deltanet or gated_deltanet.",
        rich_help_panel=_MODEL,
    ),
]
AttentionLayers = Annotated[
    str | None,
    Option(help="Layers, from 0, with attention instead: 1,3.", rich_help_panel=_MODEL),
]
HiddenSize = Annotated[
    int | None,
    Option(help=f"Width of the model ({MODEL_DEFAULTS['hidden_size']}).", rich_help_panel=_MODEL),
]
NumLayers = Annotated[
    int | None,
    Option(help=f"Layers ({MODEL_DEFAULTS['num_hidden_layers']}).", rich_help_panel=_MODEL),
]
NumHeads = Annotated[
    int | None,
    Option(help=f"Heads of a layer ({MODEL_DEFAULTS['num_heads']}).", rich_help_panel=_MODEL),
]

MaxSteps = Annotated[
    int | None,
    Option(help=f"Optimizer steps ({TrainingConfig.max_steps}).", rich_help_panel=_TRAINING),
]
BatchSize = Annotated[
    int | None,
    Option(
        help=f"Blocks in a forward pass ({TrainingConfig.batch_size}).", rich_help_panel=_TRAINING
    ),
]
LearningRate = Annotated[
    float | None,
    Option(
        help=f"Highest learning rate ({TrainingConfig.learning_rate}).", rich_help_panel=_TRAINING
    ),
]
Precision = Annotated[
    str | None, Option(help=f"{' or '.join(PRECISIONS)}.", rich_help_panel=_TRAINING)
]
Seed = Annotated[
    int | None,
    Option(
        help=f"Of initial weights and data order ({TrainingConfig.seed}).",
        rich_help_panel=_TRAINING,
    ),
]

Output = Annotated[
    Path | None,
    Option("--output", "-o", help="Folder of the run (runs/RECIPE-MIXER).", rich_help_panel=_RUN),
]
Recipe = Annotated[
    str | None,
    Option(
        help=f"{', '.join(recipe_names('train'))} or a .toml file; options win over it (cpu).",
        rich_help_panel=_RUN,
    ),
]
Settings = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        help="Any setting of a recipe: model.ridge_ratio=0.05, training.save_steps=50, ...",
        rich_help_panel=_RUN,
    ),
]
Resume = Annotated[
    bool,
    Option(
        "--resume",
        help="Go on from the newest whole checkpoint of the run in the folder.",
        rich_help_panel=_RUN,
    ),
]
Overwrite = Annotated[
    bool,
    Option("--overwrite", help="Delete the run that is in the folder.", rich_help_panel=_RUN),
]
