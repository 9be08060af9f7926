"""GPU memory at the peak of a step, by kind. docs/howto/plan.md derives the formulas."""

from collections import Counter
from dataclasses import dataclass, fields

from gka.models.fields import SOFTMAX_MIXERS
from gka.models.flops import CHUNK, mixer_heads
from gka.parallel.planner.job import Job
from gka.parallel.planner.work import LOGITS_BYTES


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        weights: parameters. copies: those in bfloat16 under autocast, and layers gathered by FSDP2.
        gradients, optimizer: of this GPU's share of the parameters.
        activations: what the layers keep for the backward pass.
        workspace: one layer's values and gradients while its backward pass runs.
        logits: those of a piece of the tokens, and the loss's gradients.
    """

    weights: float
    copies: float
    gradients: float
    optimizer: float
    activations: float
    workspace: float
    logits: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def memory(job: Job) -> Memory:
    """Memory at the peak of a step."""
    own = job.parameters / job.layout.tp
    share, width = own / job.layout.shards, 4 if job.autocast else 2
    kept = _layers(job, job.checkpointing)
    hidden, vocab, tp = job.config.hidden_size, job.config.vocab_size, job.layout.tp
    piece = min(LOGITS_BYTES, 4.0 * job.local_tokens * vocab / tp)
    head = 4.0 * (job.local_tokens * hidden + vocab * hidden / tp)
    # Without accumulation gradients grow while activations shrink.
    gradients = width * share if job.accumulation > 1 else max(0.0, width * share - 0.7 * kept)
    return Memory(
        weights=width * share,
        copies=_copies(job, own),
        gradients=gradients,
        optimizer=2 * width * share,
        activations=kept,
        workspace=_workspace(job),
        logits=2 * piece + head,
    )


def _copies(job: Job, own: float) -> float:
    """bfloat16 copies under autocast; with shards, a layer twice and the ends in float32, gathered."""
    if job.layout.shards == 1:
        return 2.0 * own if job.autocast else 0.0
    largest = max(job.layer_parameters(mixer) for mixer in set(job.config.pattern)) / job.layout.tp
    ends = job.embedding * (1 if job.config.tie_word_embeddings else 2)
    return 2 * 2 * largest + (4 if job.autocast else 2) * ends / job.layout.tp


def _workspace(job: Job) -> float:
    """Gradients inside a layer's MLP and mixer; with checkpointing, the layer's recomputed values too."""
    tokens, tp = job.local_tokens, job.layout.tp
    mixer = job.config.pattern[0]
    heads, dim = mixer_heads(job.config, mixer)
    mlp = int(job.config.intermediate_size or 0)
    inside = 2.0 * tokens * ((3 * mlp + 2 * heads * dim) / tp + 2 * job.config.hidden_size)
    if job.checkpointing == "none":
        return inside
    return inside + tokens * _kept(job, mixer, "none")


def _layers(job: Job, how: str) -> float:
    pattern = Counter(job.config.pattern)
    return job.local_tokens * sum(n * _kept(job, mixer, how) for mixer, n in pattern.items())


def _kept(job: Job, mixer: str, how: str) -> float:
    """Bytes of a token that a layer keeps until its backward pass."""
    config, tp = job.config, job.layout.tp
    hidden, wide = config.hidden_size, 4 if job.autocast else 2
    heads, dim = mixer_heads(config, mixer)
    inner, mlp = heads * dim / tp, int(config.intermediate_size or 0) / tp
    recurrent = mixer not in SOFTMAX_MIXERS
    op = 2.0 * inner * (2 if mixer == "gka" else 1) + 4.0 * 6 * heads / tp
    if job.keep_states and mixer == "gka":  # H and U, 16-bit, of every chunk
        op += 2.0 * 2 * inner * dim / CHUNK
    start = float(wide * hidden)
    if how == "full":
        return start
    if how == "selective":
        return start + op
    products = 2.0 * ((5 if recurrent else 4) * inner + 2 * mlp) + 2.0 * hidden
    if how == "selective-products":
        return start + op + products
    # both residuals, both norms' outputs; q, k, v after convolution or rotation; gated norm; MLP
    around = float(wide * hidden + 2 * 2 * hidden)
    convolved = 2.0 * inner * (4 if recurrent else 3)
    return start + around + op + 2.0 * (4 if recurrent else 3) * inner + convolved + 2.0 * 3 * mlp
