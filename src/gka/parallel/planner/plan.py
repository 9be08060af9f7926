"""The plan of a run: parameters, FLOPs, memory, time, exchanges; and what would fit if it does not."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from gka.models.flops import token_flops
from gka.parallel.planner.card import Card
from gka.parallel.planner.exchange import Exchange, exchange
from gka.parallel.planner.job import Job, check
from gka.parallel.planner.memory import Memory, memory
from gka.parallel.planner.work import Work, work

GPUS_A_NODE = 8
USABLE = 0.92
"""Share of a card's memory that a run can have; the rest is the driver's, libraries' and fragmentation."""
HIDDEN = 0.7
"""Share of the device's time behind which the exchanges of data parallelism can hide."""
CHECKPOINTING = ("none", "selective-products", "selective", "full")


@dataclass(frozen=True)
class Plan:
    """A planned run; times are of one optimizer step."""

    job: Job
    card: Card
    work: Work
    memory: Memory
    exchange: Exchange

    @property
    def flops(self) -> float:
        """Model FLOPs of a token, with the mixers' own products where their number is known."""
        return token_flops(self.job.config, self.job.length, self.job.matrices).known

    @property
    def exposed(self) -> float:
        """Seconds of exchanges that do not hide behind work: all of tp and cp, the rest of dp."""
        layout, links = self.job.layout, self.card.links_gbs
        inner = "node" if layout.tp * layout.cp <= GPUS_A_NODE else "network"
        outer = "node" if layout.ranks <= GPUS_A_NODE else "network"
        data = (self.exchange.dp_shard + self.exchange.dp_replicate) / (1e9 * links[outer])
        direct = (self.exchange.tp + self.exchange.cp) / (1e9 * links[inner])
        return direct + max(0.0, data - HIDDEN * self.work.device)

    @property
    def seconds(self) -> float:
        """Of an optimizer step."""
        return self.work.seconds(self.card.gap) + self.exposed

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.job.tokens / self.seconds

    @property
    def mfu(self) -> float:
        peak = 1e12 * self.card.peak_tflops * self.job.layout.ranks
        return self.flops * self.tokens_per_second / peak

    @property
    def hours(self) -> float:
        """Of the whole run, evaluations and checkpoints left out."""
        return self.job.steps * self.seconds / 3600

    @property
    def fits(self) -> bool:
        return self.memory.total <= USABLE * self.card.memory_gib * 2**30

    def warnings(self) -> list[str]:
        """What the reader should know; what would fit if the memory does not suffice."""
        found = []
        if not self.fits:
            found.append(f"{self.memory.total / 2**30:.1f} GiB do not fit: {_advice(self)}")
        if self.work.host > self.work.device * self.card.gap:
            found.append(
                "the host is the bound: larger micro-batches, or CUDA graphs, would be faster"
            )
        if token_flops(self.job.config, self.job.length, self.job.matrices).whole is None:
            found.append(
                "the solver's steps depend on the data: times are of num_iter steps, FLOPs are 6 N"
            )
        if self.job.layout.ranks > 1 and "assumed" in self.card.source:
            found.append("the links' speed is assumed, not measured")
        return found

    def as_json(self) -> dict[str, Any]:
        """All figures, in the units that the keys name."""
        job = self.job
        return {
            "gpus": job.layout.ranks, "ranks": vars(job.layout),
            "card": self.card.name, "card_source": self.card.source,
            "parameters": job.parameters,
            "parameters_by_part": {part.part: part.parameters for part in job.table},
            "matrix_parameters": job.matrices, "tokens_per_step": job.tokens,
            "tokens": job.tokens * job.steps, "batch_size": job.micro,
            "gradient_accumulation": job.accumulation, "gradient_checkpointing": job.checkpointing,
            "flops_per_token": self.flops, "flops": self.flops * job.tokens * job.steps,
            "memory_bytes": {**asdict(self.memory), "total": self.memory.total},
            "fits": self.fits,
            "step_seconds": self.seconds,
            "work_seconds": {**asdict(self.work), "exposed_exchanges": self.exposed},
            "exchanged_bytes_per_step": {**asdict(self.exchange), "total": self.exchange.total},
            "tokens_per_second": self.tokens_per_second, "mfu": self.mfu,
            "days": self.hours / 24, "gpu_hours": self.hours * job.layout.ranks,
            "warnings": self.warnings(),
        }  # fmt: skip


def make_plan(job: Job, card: Card) -> Plan:
    """The plan of a job on cards of one kind.

    Raises:
        InputError: heads, sequences or batch cannot be shared so; the message has what fits.
    """
    check(job)
    return Plan(job, card, work(job, card), memory(job), exchange(job))


def _advice(plan: Plan) -> str:
    """The first change that fits: a smaller micro-batch, or more checkpointing, or more shards."""
    job, limit = plan.job, USABLE * plan.card.memory_gib * 2**30
    ways = CHECKPOINTING[CHECKPOINTING.index(job.checkpointing) :]
    for way in ways:
        size = job.micro
        while size >= 1:
            if memory(job.changed(micro=size, checkpointing=way)).total <= limit:
                return f"batch_size = {size} with gradient_checkpointing = {way!r} would"
            size //= 2
    for shards in (2 * job.layout.dp_shard, 8, 16, 32, 64):
        layout = replace(job.layout, dp_shard=shards)
        if memory(job.changed(micro=1, checkpointing="full", layout=layout)).total <= limit:
            return f"dp_shard = {shards} with batch_size = 1 and full checkpointing would"
    return "take more GPUs, or tp and cp"
