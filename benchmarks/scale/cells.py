"""What `python -m benchmarks.run scale` measures: rows of cells, one a number of GPUs, and their plans.

The tokens of a GPU stay the same along a row, so a perfect machine would take the same time for every cell.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from gka.models import GKAConfig
from gka.parallel import Layout
from gka.parallel.planner import Card, Job, Plan, make_plan
from gka.training.config import RunConfig
from gka.training.recipes import read_recipe

VOCABULARY = 32000  # tokens that the recipe's tokenizer would have
TRIED = ("none", "selective", "full")
DATA, LONG, MIXED = "data", "long", "mixed"
CP_MIXED = 2  # ranks that share a sequence where dp_shard and cp are mixed
MIXED_BASE = "cp64k"
SHORT = 4  # times as many steps of DATA rows are timed, as they are short


@dataclass(frozen=True)
class Row:
    """Cells with the same tokens on every GPU.

    Attributes:
        kind: DATA shards parameters, each GPU reads sequences of its own; LONG splits one sequence among all;
            MIXED splits each sequence among CP_MIXED GPUs.
        tokens: of a GPU's part of a sequence.
        reshard: whether gathered matrices are freed until the backward pass (FSDP2's
            reshard_after_forward).
        title: for the table and the picture.
    """

    kind: str
    tokens: int
    title: str
    reshard: bool = True

    def layout(self, gpus: int) -> Layout | None:
        """The layout on that many GPUs; None where it would be that of another row."""
        if self.kind == DATA:
            return Layout(dp_shard=gpus)
        if self.kind == LONG:
            return Layout(cp=gpus)
        if gpus % CP_MIXED or gpus == CP_MIXED:
            return None
        return Layout(dp_shard=gpus // CP_MIXED, cp=CP_MIXED)


ROWS = {
    "dp": Row(DATA, 2048, "dp_shard, 2k a sequence"),
    "dp-kept": Row(DATA, 2048, "dp_shard, 2k a sequence, matrices kept", reshard=False),
    "cp64k": Row(LONG, 65536, "cp, 64k tokens a GPU"),
    "cp256k": Row(LONG, 262144, "cp, 256k tokens a GPU"),
    "mixed": Row(MIXED, 65536, f"dp_shard x cp {CP_MIXED}, 64k tokens a GPU"),
}
TINY_TOKENS = {"dp": 64, "dp-kept": 64, "cp64k": 128, "cp256k": 256, "mixed": 128}
TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16, "mixer": "gka",
    "intermediate_size": 64, "tie_word_embeddings": False,
}  # fmt: skip
TINY_VOCABULARY = 64


@dataclass(frozen=True)
class Cell:
    """A row on a number of GPUs, as its processes measure it.

    Attributes:
        row: a key of ROWS. sizes: of the layout, in the order of `gka.parallel.mesh.NAMES`.
        micro: sequences of `length` tokens that each group of ranks reads in a step.
        compiled: "layers" or "off". ways: checkpointing to try, in turn, until memory suffices.
        steps, warm_up: steps that are timed, and those before them, the first not counted.
        expected: seconds of a step by the plan.
    """

    row: str
    gpus: int
    sizes: tuple[int, ...]
    micro: int
    length: int
    reshard: bool
    compiled: str
    ways: tuple[str, ...]
    steps: int
    warm_up: int
    expected: float

    @property
    def key(self) -> str:
        return f"{self.row}/{self.gpus}"

    @property
    def layout(self) -> Layout:
        return Layout(*self.sizes)

    @property
    def tokens(self) -> int:
        """Of a step, on all GPUs."""
        return self.layout.readers * self.micro * self.length


@dataclass(frozen=True)
class Asked:
    """What was asked for.

    Attributes:
        compiled: rows whose layers are compiled. checkpoint: "auto", or one of TRIED for all rows.
        sequences: that a GPU reads in a step of a DATA row.
    """

    tiny: bool
    rows: tuple[str, ...]
    compiled: tuple[str, ...]
    checkpoint: str
    sequences: int
    steps: int
    warm_up: int

    def tokens(self, row: str) -> int:
        return TINY_TOKENS[row] if self.tiny else ROWS[row].tokens


@cache
def model_fields(tiny: bool) -> dict[str, Any]:
    """Fields of the recipe's model, or of one for a trial."""
    if tiny:
        return {"vocab_size": TINY_VOCABULARY, **TINY}
    recipe = RunConfig.from_tables(read_recipe("440m"))
    return {"vocab_size": VOCABULARY, **{k: x for k, x in recipe.model.items() if k != "start"}}


@cache
def model_config(tiny: bool) -> GKAConfig:
    return GKAConfig(**model_fields(tiny))


@cache
def planned_model(tiny: bool) -> Job:
    """Of which all planned jobs differ in batch and layout only."""
    return Job(model_config(tiny), 1, 1, 1, 1)


def job_of(cell: Cell, tiny: bool, way: str) -> Job:
    """A cell as the planner takes it."""
    layout = cell.layout
    return planned_model(tiny).changed(
        length=cell.length, micro=cell.micro, blocks=cell.micro * layout.readers, layout=layout,
        checkpointing=way,
    )  # fmt: skip


def plan_of(cell: Cell, tiny: bool, card: Card, way: str) -> Plan:
    """The planner's prediction of a cell."""
    return make_plan(job_of(cell, tiny, way), card)


def make_cell(asked: Asked, row: str, gpus: int, card: Card) -> Cell | None:
    """A row's cell on that many GPUs, with the checkpointing that one GPU needs; None if it has none."""
    kind = ROWS[row]
    layout = kind.layout(gpus)
    if layout is None:
        return None
    micro, tokens = (asked.sequences if kind.kind == DATA else 1), asked.tokens(row)
    compiled = "layers" if row in asked.compiled else "off"
    cell = Cell(
        row, gpus, layout.sizes, micro, tokens * layout.cp, kind.reshard, compiled, TRIED,
        asked.steps * (SHORT if kind.kind == DATA else 1), asked.warm_up, 0.0,
    )  # fmt: skip
    ways = (asked.checkpoint,) if asked.checkpoint != "auto" else _ways(cell, tokens, asked, card)
    seconds = plan_of(cell, asked.tiny, card, ways[0]).seconds
    return replace(cell, ways=ways, expected=0.1 if asked.tiny else seconds)


def _ways(cell: Cell, tokens: int, asked: Asked, card: Card) -> tuple[str, ...]:
    """Checkpointing to try: from the least with which the row's cell of one GPU fits, the same for all."""
    alone = replace(cell, sizes=Layout().sizes, length=tokens)
    fits = [plan_of(alone, asked.tiny, card, way).fits for way in TRIED]
    return TRIED[fits.index(True) if True in fits else len(TRIED) - 1 :]


def make_cells(asked: Asked, gpus: int, card: Card) -> list[Cell]:
    """All cells of that many GPUs, in the order of the rows that were asked for."""
    found = (make_cell(asked, row, gpus, card) for row in asked.rows)
    return [cell for cell in found if cell is not None]
