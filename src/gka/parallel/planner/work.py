"""Seconds of a step on one GPU, by kind of work. docs/howto/plan.md derives the formulas."""

from collections import Counter
from dataclasses import dataclass, fields

from gka.models.fields import SOFTMAX_MIXERS
from gka.models.flops import mixer_heads
from gka.parallel.planner.card import Card
from gka.parallel.planner.job import Job

LOGITS_BYTES = 256 * 2**20  # of `gka.models.loss` on a GPU


@dataclass(frozen=True)
class Work:
    """Seconds of an optimizer step on one GPU.

    Attributes:
        products: matrix products of projections, MLPs and head.
        mixers: the sequence operators: solve, scans, attention.
        traffic: norms, convolutions, gates, activations, residuals.
        loss: softmax and cross-entropy, without the head's products.
        recomputed: what checkpointing runs again.
        casts: weights to bfloat16 and gradients back, under autocast.
        optimizer: clipping and AdamW.
        host: launching all that; it runs beside the device.
    """

    products: float
    mixers: float
    traffic: float
    loss: float
    recomputed: float
    casts: float
    optimizer: float
    host: float

    @property
    def device(self) -> float:
        """Sum of the kernels."""
        return sum(getattr(self, f.name) for f in fields(self)) - self.host

    def seconds(self, gap: float) -> float:
        """Wall time: the slower of the device, with gaps between its kernels, and the host."""
        return max(self.device * gap, self.host)


def work(job: Job, card: Card) -> Work:
    """The work of one optimizer step."""
    micro, passes = job.local_tokens, job.accumulation
    tp, hidden, vocab = job.layout.tp, job.config.hidden_size, job.config.vocab_size
    rate, traffic = card.product_rate(hidden), 1e12 * card.traffic_tbs
    layers = _layers(job, card)
    head = 6.0 * vocab * hidden * micro / tp / rate
    pieces = max(1.0, micro * vocab / tp * 4 / LOGITS_BYTES)
    loss = (16.0 * micro * vocab + 8.0 * pieces * vocab * hidden) / tp / traffic
    own = job.parameters / tp
    casts = (24.0 if passes > 1 else 12.0) * own / traffic if job.autocast else 0.0
    moved = (40.0 if job.autocast else 14.0) * own / job.layout.shards
    host = sum(
        count * card.host_ms.get(mixer, max(card.host_ms.values()))
        for mixer, count in Counter(job.config.pattern).items()
    )
    if job.layout.shards * job.layout.dp_replicate > 1:
        host += len(job.config.pattern) * card.host_ms.get("shards", 0.0)
    again = 1.0 + (0.0 if job.checkpointing == "none" else 1 / 3)
    return Work(
        products=passes * (3 * layers["products"] + head),
        mixers=passes * (layers["op"] + layers["op back"]),
        traffic=passes * 3 * layers["traffic"],
        loss=passes * loss,
        recomputed=passes * _recomputed(job, layers),
        casts=passes * casts,
        optimizer=moved / traffic,
        host=1e-3 * passes * (host * again + card.host_ms["fixed"]),
    )


def _layers(job: Job, card: Card) -> dict[str, float]:
    """Seconds of all layers' forward pass on a micro-batch; of the backward pass of the op as well."""
    found: dict[str, float] = {"products": 0.0, "op": 0.0, "op back": 0.0, "traffic": 0.0}
    tokens, tp = job.local_tokens, job.layout.tp
    for mixer, count in Counter(job.config.pattern).items():
        heads, dim = mixer_heads(job.config, mixer)
        seen = min(job.length, job.config.sliding_window * 2) if mixer == "swa" else job.length
        op = card.op_seconds(mixer, dim, seen, job.config.num_iter)
        products = 2.0 * job.layer_parameters(mixer) / card.product_rate(job.config.hidden_size)
        found["products"] += count * tokens * products / tp
        found["op"] += count * tokens * heads * op[0] / tp
        found["op back"] += count * tokens * heads * op[1] / tp
        found["traffic"] += count * tokens * layer_bytes(job, mixer) / (1e12 * card.traffic_tbs)
    return found


def _recomputed(job: Job, layers: dict[str, float]) -> float:
    parts = {
        "none": (), "selective-products": ("traffic",), "selective": ("traffic", "products"),
        "full": ("traffic", "products", "op"),
    }  # fmt: skip
    return sum(layers[part] for part in parts[job.checkpointing])


def layer_bytes(job: Job, mixer: str) -> float:
    """Bytes that a layer's forward pass reads and writes for a token, its products and op left out.

    A stream of the hidden size h: the residual, 4 bytes wide under autocast, else 2; other values have 2.
    """
    config, tp = job.config, job.layout.tp
    hidden, wide = config.hidden_size, 4 if job.autocast else 2
    heads, dim = mixer_heads(config, mixer)
    inner, mlp = heads * dim / tp, int(config.intermediate_size or 0) / tp
    norms = 2 * hidden * (wide + 2)
    residuals = 2 * hidden * (2 * wide + 2)
    activation = 2 * 3 * mlp
    if mixer in SOFTMAX_MIXERS:
        return norms + residuals + activation + 2 * 4 * inner  # rotary positions of q and k
    return (
        norms + residuals + activation + 2 * 6 * inner + 2 * 3 * inner
    )  # convolutions, gated norm
