"""Configuration of a priming run: the tables prime, mixer, data, stage1 and stage2."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from gka.errors import InputError
from gka.training.config import ON, DataConfig, TrainingConfig
from gka.training.settings import Table, Tables, build_tables, check_tables, setting

EVERY_OTHER, RANK = "every-other", "rank"
TABLES = ("prime", "mixer", "data", "stage1", "stage2")


@dataclass(frozen=True, kw_only=True)
class PrimingDataConfig(DataConfig):
    """Table [data]: text, as in `gka train`, or conversations."""

    tokenizer: str = setting(
        "", "bytes, or a tokenizer's folder or name.", option=True, shown="the teacher's own"
    )
    sequence_length: int = 512
    chat: tuple[str, ...] = setting(
        (),
        'Instead of text: a .jsonl file of {"messages": [{"role": ..., "content": ...}, ...]}; stage 2 '
        "learns the assistant's turns.",
        option=True,
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chat and self.text:
            raise InputError("data.chat and data.text exclude each other; give one of them")


_GATES = "Initial value of the new layers' gate {}."


@dataclass(frozen=True, kw_only=True)
class ReplacementConfig(Table):
    """Table [prime]: the teacher, the layers to replace, and how the new mixers begin."""

    teacher: str = setting(
        "",
        "Folder of the model to start from: this library's, Qwen3, Qwen2.5, Llama, Mistral, or a hybrid with "
        "attention layers.",
        option=True,
    )
    layers: str = setting(
        EVERY_OTHER,
        "every-other (the 1st, 3rd, ... attention layer), a list from 0 as in 0,2,5, or rank: those "
        "that lose least when they see a sliding window only.",
        option=True,
    )
    count: int = setting(
        0, "How many layers rank replaces.", option=True, shown="half of them", least=0
    )
    rank_window: int = setting(64, "Tokens of rank's sliding window.", least=1)
    rank_blocks: int = setting(
        64, "Held-out blocks on which rank measures the loss, at most.", least=1
    )
    mixer: str = setting("gka", "The new layers' mixer: gka or gated_deltanet.", option=True)
    # Defaults of `gka.models.replacement.Start`.
    alpha: float = setting(0.05, _GATES.format("alpha"), above=0, below=1)
    beta: float = setting(0.95, _GATES.format("beta"), above=0, below=1)
    decay: float = setting(1e-3, "Initial value of minus the new layers' log decay.", above=0)

    table: ClassVar[str] = "prime"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers not in (EVERY_OTHER, RANK):
            self.listed()
        if self.count and self.layers != RANK:
            raise InputError("prime.count goes with layers = 'rank'; leave it out")

    def listed(self) -> list[int]:
        """The indices in `layers`.

        Raises:
            InputError: `layers` is not a list of integers.
        """
        try:
            return [int(number) for number in self.layers.split(",")]
        except ValueError:
            raise InputError(
                f"prime.layers is {self.layers!r}; expected {EVERY_OTHER}, {RANK}, or numbers and commas, "
                "as in 0,2"
            ) from None


@dataclass(frozen=True, kw_only=True)
class StageConfig(TrainingConfig):
    """Fields of both stages; their defaults suit a pretrained model, larger than that of `gka train`."""

    max_steps: int = setting(
        500, "Optimizer steps; 0 leaves the stage out.", option=True, by_table=True, least=0
    )
    batch_size: int = 16
    eval_steps: int = 200
    save_steps: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.save_async != ON, "save_async", "auto or off: stages wait for their checkpoints"
        )


@dataclass(frozen=True, kw_only=True)
class MatchingConfig(StageConfig):
    """Table [stage1]: only the new mixers are trained, to reproduce the attention's output."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    layer_weight: float = setting(
        1.0, "Weight of each layer's error on the teacher's own hidden states.", least=0
    )
    end_weight: float = setting(
        0.0,
        "Weight of the error of the model's last hidden states; above 0 a step costs about three times "
        "as much.",
        option=True,
        least=0,
    )

    table: ClassVar[str] = "stage1"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.layer_weight + self.end_weight > 0, "layer_weight", "above 0, or end_weight"
        )


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig(StageConfig):
    """Table [stage2]: the whole hybrid, or adapters in it, is trained on the next token."""

    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    kl_weight: float = setting(
        0.0,
        "Weight of the divergence from the teacher's predictions; above 0 a copy of the teacher is kept "
        "in memory.",
        option=True,
        least=0,
    )
    lora_rank: int = setting(
        0,
        "Train adapters of this rank instead of all weights (needs peft); they are merged into the saved "
        "model, and kept apart beside it.",
        option=True,
        shown="all weights",
        least=0,
    )
    lora_alpha: float = setting(0.0, "Scale of the adapters; 0 is twice the rank.", least=0)

    table: ClassVar[str] = "stage2"


KINDS = {
    "prime": ReplacementConfig, "data": PrimingDataConfig,
    "stage1": MatchingConfig, "stage2": RecoveryConfig,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PrimeConfig:
    """A complete priming run; `mixer` holds options of the new mixers, checked against the teacher."""

    prime: ReplacementConfig = field(default_factory=ReplacementConfig)
    mixer: Mapping[str, Any] = field(default_factory=dict)
    data: PrimingDataConfig = field(default_factory=PrimingDataConfig)
    stage1: MatchingConfig = field(default_factory=MatchingConfig)
    stage2: RecoveryConfig = field(default_factory=RecoveryConfig)

    def tables(self) -> Tables:
        """The run as tables of JSON and TOML values; `from_tables` is the inverse."""
        tables = {name: dict(self.mixer) for name in TABLES}
        for name in set(TABLES) - {"mixer"}:
            tables[name] = dataclasses.asdict(getattr(self, name))
        for name in ("text", "chat"):
            tables["data"][name] = list(tables["data"][name])
        return tables

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any]) -> "PrimeConfig":
        """A run from tables; absent keys have their defaults.

        Raises:
            InputError: a table or key is unknown, of the wrong type or out of range; the message names it.
        """
        if "parallel" in tables:
            raise InputError(
                "[parallel]: gka prime keeps the whole model, and the teacher, on every process and divides "
                "the batches alone (DDP); leave the table out. For a hybrid that fits no GPU prime a few "
                "layers, then train it with gka train --start FOLDER"
            )
        check_tables(tables, TABLES)
        return cls(mixer=dict(tables.get("mixer", {})), **build_tables(KINDS, tables))
