"""The options of `gka prime`, as types: each is what typer shows and reads."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from gka.training.config import PRECISIONS, recipe_names
from gka.training.priming.config import (
    MatchingConfig,
    PrimingDataConfig,
    RecoveryConfig,
    ReplacementConfig,
)

_DATA, _REPLACED, _ONE, _TWO, _RUN = "Data", "What is replaced", "Stage 1", "Stage 2", "Run"

Teacher = Annotated[
    str | None,
    Argument(
        help="Folder of the model to begin from: ours, Qwen3, Qwen2.5, Llama, Mistral, or a hybrid "
        "with attention layers."
    ),
]

Layers = Annotated[
    str | None,
    Option(
        help="every-other (the default: 1st, 3rd, ... attention layer), a list from 0 as in 0,2,5, or "
        "rank: those that lose least when they see a sliding window only.",
        rich_help_panel=_REPLACED,
    ),
]
Count = Annotated[
    int | None,
    Option(help="How many layers rank replaces (half of them).", rich_help_panel=_REPLACED),
]
Mixer = Annotated[
    str | None,
    Option(
        help=f"What they become: gka or gated_deltanet ({ReplacementConfig.mixer}).",
        rich_help_panel=_REPLACED,
    ),
]

Data = Annotated[
    list[str] | None,
    Option(
        "--data",
        metavar="PATH",
        help="A text file or folder (UTF-8), as often as there are. Without any: Python's standard library.",
        rich_help_panel=_DATA,
    ),
]
Chat = Annotated[
    list[str] | None,
    Option(
        metavar="FILE",
        help='Instead: a .jsonl file of {"messages": [{"role": ..., "content": ...}, ...]}; stage 2 learns '
        "the assistant's turns.",
        rich_help_panel=_DATA,
    ),
]
Glob = Annotated[
    str | None, Option(help='Which files of folders, such as "*.py".', rich_help_panel=_DATA)
]
Tokenizer = Annotated[
    str | None,
    Option(
        help="bytes, or a tokenizer's folder or name (the teacher's own).", rich_help_panel=_DATA
    ),
]
SequenceLength = Annotated[
    int | None,
    Option(help=f"Tokens in a block ({PrimingDataConfig.sequence_length}).", rich_help_panel=_DATA),
]

Stage1Steps = Annotated[
    int | None,
    Option(
        help=f"Optimizer steps; 0 leaves the stage out ({MatchingConfig.max_steps}).",
        rich_help_panel=_ONE,
    ),
]
Stage1Tokens = Annotated[
    int | None,
    Option(help="Instead of steps: tokens to read, rounded up to steps.", rich_help_panel=_ONE),
]
Stage1LearningRate = Annotated[
    float | None,
    Option(help=f"Highest learning rate ({MatchingConfig.learning_rate}).", rich_help_panel=_ONE),
]
EndWeight = Annotated[
    float | None,
    Option(
        help=f"Weight of the match at the model's end ({MatchingConfig.end_weight:g}).",
        rich_help_panel=_ONE,
    ),
]

Stage2Steps = Annotated[
    int | None,
    Option(
        help=f"Optimizer steps; 0 leaves the stage out ({RecoveryConfig.max_steps}).",
        rich_help_panel=_TWO,
    ),
]
Stage2Tokens = Annotated[
    int | None,
    Option(help="Instead of steps: tokens to read, rounded up to steps.", rich_help_panel=_TWO),
]
Stage2LearningRate = Annotated[
    float | None,
    Option(help=f"Highest learning rate ({RecoveryConfig.learning_rate}).", rich_help_panel=_TWO),
]
KlWeight = Annotated[
    float | None,
    Option(
        help=f"Weight of the divergence from the teacher's predictions ({RecoveryConfig.kl_weight:g}).",
        rich_help_panel=_TWO,
    ),
]
LoraRank = Annotated[
    int | None,
    Option(
        help="Train adapters of this rank instead of all weights (needs peft).",
        rich_help_panel=_TWO,
    ),
]

BatchSize = Annotated[
    int | None,
    Option(
        help=f"Blocks in a forward pass, both stages ({MatchingConfig.batch_size}).",
        rich_help_panel=_RUN,
    ),
]
Precision = Annotated[
    str | None, Option(help=f"{' or '.join(PRECISIONS)}, both stages.", rich_help_panel=_RUN)
]
Seed = Annotated[
    int | None, Option(help="Of the data order, both stages (0).", rich_help_panel=_RUN)
]
Output = Annotated[
    Path | None,
    Option("--output", "-o", help="Folder of the run (runs/prime-MIXER).", rich_help_panel=_RUN),
]
Recipe = Annotated[
    str | None,
    Option(
        help=f"{', '.join(recipe_names('prime'))} or a .toml file; options win over it.",
        rich_help_panel=_RUN,
    ),
]
Settings = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        help="Any setting of a recipe: mixer.num_iter=15, stage1.save_steps=50, prime.rank_window=128, ...",
        rich_help_panel=_RUN,
    ),
]
Resume = Annotated[
    bool,
    Option("--resume", help="Go on where the run in the folder stopped.", rich_help_panel=_RUN),
]
