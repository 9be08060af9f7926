"""What a priming run is: four tables (data, prime, stage1, stage2), and one of the new mixers' options."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from gka.errors import InputError
from gka.training.config import DataConfig, TrainingConfig, build_table, check_known

EVERY_OTHER, RANK = "every-other", "rank"
TABLES = ("prime", "mixer", "data", "stage1", "stage2")


@dataclass(frozen=True, kw_only=True)
class PrimingDataConfig(DataConfig):
    """What to train on: text, as in `gka train`, or conversations.

    Attributes:
        chat: .jsonl files of conversations, {"messages": [{"role": ..., "content": ...}, ...]} a line,
            instead of text; the loss of stage 2 is that of the assistant's turns.
        tokenizer: "" is the teacher's own.
    """

    tokenizer: str = ""
    sequence_length: int = 512
    chat: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chat and self.text:
            raise InputError("data.chat and data.text exclude each other; give one of them")


@dataclass(frozen=True, kw_only=True)
class ReplacementConfig:
    """What is replaced, and by what.

    Attributes:
        teacher: folder of the model to begin from.
        layers: "every-other" (the first, third, ... of the attention layers), a list as in "0,2,5", or
            "rank": those whose replacement by a sliding window raises the held-out loss least.
        count: how many layers "rank" replaces; 0 is half of them.
        rank_window: tokens of that sliding window.
        rank_blocks: held-out blocks that the loss is measured on, at most.
        mixer: "gka" or "gated_deltanet".
        alpha, beta, decay: what its gates begin with (`gka.models.replacement.Start`).
    """

    teacher: str = ""
    layers: str = EVERY_OTHER
    count: int = 0
    rank_window: int = 64
    rank_blocks: int = 64
    mixer: str = "gka"
    alpha: float = 0.05
    beta: float = 0.95
    decay: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"prime.{name} is {getattr(self, name)}; expected between 0 and 1")
        if not 0 < self.decay < math.inf:
            raise InputError(f"prime.decay is {self.decay}; expected above 0")
        least = {"count": 0, "rank_window": 1, "rank_blocks": 1}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise InputError(
                    f"prime.{name} is {getattr(self, name)}; expected {number} or more"
                )
        if self.layers not in (EVERY_OTHER, RANK):
            self.listed()
        if self.count and self.layers != RANK:
            raise InputError("prime.count goes with layers = 'rank'; leave it out")

    def listed(self) -> list[int]:
        """The layers of a list.

        Raises:
            InputError: it is no list of numbers.
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
    """What both stages have in common; a pretrained model is larger than what `gka train` begins with."""

    max_steps: int = 500
    batch_size: int = 16
    eval_steps: int = 200
    save_steps: int = 200

    fewest_steps: ClassVar[int] = 0


@dataclass(frozen=True, kw_only=True)
class MatchingConfig(StageConfig):
    """Stage 1: only the new mixers learn, to give the hidden states that the attention gave.

    Attributes:
        layer_weight: of each layer's error on the teacher's own hidden states.
        end_weight: of the error of the model's last hidden states, the new mixers running one after another.
            Above 0 the whole model is differentiated, at about three times the cost.
        others: as in `TrainingConfig`; max_steps 0 leaves the stage out.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    layer_weight: float = 1.0
    end_weight: float = 0.0

    table: ClassVar[str] = "stage1"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.layer_weight >= 0, "layer_weight", "0 or more")
        self.require(self.end_weight >= 0, "end_weight", "0 or more")
        self.require(
            self.layer_weight + self.end_weight > 0, "layer_weight", "above 0, or end_weight"
        )


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig(StageConfig):
    """Stage 2: the whole hybrid goes on learning the next token.

    Attributes:
        kl_weight: of the divergence from the teacher's predictions, beside the loss; above 0 a copy of
            the teacher is kept in memory.
        lora_rank: above 0 only adapters of this rank learn (needs the package `peft`); they are merged
            into the saved model, and kept apart beside it.
        lora_alpha: their scale; 0 is twice the rank.
        others: as in `TrainingConfig`; max_steps 0 leaves the stage out.
    """

    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    kl_weight: float = 0.0
    lora_rank: int = 0
    lora_alpha: float = 0.0

    table: ClassVar[str] = "stage2"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kl_weight", "lora_rank", "lora_alpha"):
            self.require(getattr(self, name) >= 0, name, "0 or more")


@dataclass(frozen=True, kw_only=True)
class PrimeConfig:
    """A complete priming run; `mixer` holds options of the new mixers, which check their names."""

    prime: ReplacementConfig = field(default_factory=ReplacementConfig)
    mixer: Mapping[str, Any] = field(default_factory=dict)
    data: PrimingDataConfig = field(default_factory=PrimingDataConfig)
    stage1: MatchingConfig = field(default_factory=MatchingConfig)
    stage2: RecoveryConfig = field(default_factory=RecoveryConfig)

    def tables(self) -> dict[str, dict[str, Any]]:
        """The run as plain tables (what JSON and TOML hold); `from_tables` is the inverse."""
        tables = {name: dict(self.mixer) for name in TABLES}
        for name in set(TABLES) - {"mixer"}:
            tables[name] = dataclasses.asdict(getattr(self, name))
        for name in ("text", "chat"):
            tables["data"][name] = list(tables["data"][name])
        return tables

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any]) -> "PrimeConfig":
        """A run from tables, defaults where a key is absent.

        Raises:
            InputError: naming the table and key that is unknown, of the wrong type or out of range.
        """
        check_known("", tables, TABLES)
        for name, table in tables.items():
            if not isinstance(table, Mapping):
                raise InputError(f"{name} is {table!r}; expected a table")
        kinds = {
            "prime": ReplacementConfig, "data": PrimingDataConfig,
            "stage1": MatchingConfig, "stage2": RecoveryConfig,
        }  # fmt: skip
        built = {
            name: build_table(kind, name, tables.get(name, {})) for name, kind in kinds.items()
        }
        return cls(mixer=dict(tables.get("mixer", {})), **built)
