"""Streams of keys and values whose best memory is known, and memories that read them.

v_t = W_t k_t + noise with keys of unit norm. A memory predicts W_t q for fresh queries q of the current keys'
distribution. Untrained: its rates are constants, chosen on another stream.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gka.ops.delta_rule import chunk_gated_delta_rule

STREAMS = ("stationary", "rotating keys", "drifting map")
GAMMAS = (1.0, 0.999, 0.995, 0.98, 0.95, 0.9)
BETAS = (0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
RATIOS = (1e-5, 1e-4, 1e-3, 0.005, 0.02, 0.1, 0.5)
DEFAULT_RATIO = 0.02
QUERIES = 32
DRIFT = 1e-3  # share of W's variance that a token replaces, in "drifting map"


@dataclass(frozen=True)
class Stream:
    """A batch of streams.

    Attributes:
        k: keys [B,T,K]. v: values [B,T,V], float32.
        at: numbers of tokens after which is asked.
        q: queries [B,len(at),Q,K]. y: right answers W_t q [B,len(at),Q,V].
        noise: standard deviation of the noise in v. drift: share of W's variance replaced each token.
    """

    k: Tensor
    v: Tensor
    at: tuple[int, ...]
    q: Tensor
    y: Tensor
    noise: float
    drift: float


def times(dim: int) -> tuple[int, ...]:
    """Early, middle and late: K, 5K and 33K tokens; rotating keys turned K tokens before the last two."""
    return dim, 5 * dim, 33 * dim


def draw_stream(
    kind: str, batch: int, dim: int, condition: float, noise: float, seed: int
) -> Stream:
    """A stream of a name of `STREAMS`.

    Args:
        batch, dim: B, and K = V.
        condition: of the keys' covariance before they are normalised; its eigenvalues follow a power law.
        noise: relative to the entries of W k, which have variance 1.
        seed: of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    at, drift = times(dim), DRIFT if kind == "drifting map" else 0.0

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    roots = condition ** (-0.5 * torch.linspace(0, 1, dim))

    def basis() -> Tensor:
        return roots[:, None] * torch.linalg.qr(normal(batch, dim, dim))[0]

    shape, keys, queries, values, answers = basis(), [], [], [], []
    w = normal(batch, dim, dim)  # [B,K,V]
    for t in range(at[-1]):
        if kind == "rotating keys" and t % (4 * dim) == 0 and t > 0:
            shape = basis()
        if drift:
            w = (1.0 - drift) ** 0.5 * w + drift**0.5 * normal(batch, dim, dim)
        k = normalize(normal(batch, 1, dim) @ shape, dim=-1)
        keys.append(k)
        values.append(k @ w + noise * normal(batch, 1, dim))
        if t + 1 in at:
            queries.append(normalize(normal(batch, QUERIES, dim) @ shape, dim=-1))
            answers.append(queries[-1] @ w)
    parts = torch.cat(keys, 1), torch.cat(values, 1)
    return Stream(*parts, at, torch.stack(queries, 1), torch.stack(answers, 1), noise, drift)


def moments(stream: Stream, gamma: float) -> tuple[Tensor, Tensor]:
    """H_t and U_t at each time asked, [B,len(at),K,K] and [B,len(at),K,V], float64."""
    both = torch.cat([stream.k, stream.v], -1).double()
    state = both.new_zeros(len(both), stream.k.shape[-1], both.shape[-1])
    begin, states = 0, []
    for end in stream.at:
        fade = gamma ** torch.arange(end - begin - 1, -1, -1, dtype=torch.float64)
        part = both[:, begin:end]
        write = (fade[:, None] * part[..., : stream.k.shape[-1]]).mT @ part
        state = gamma ** (end - begin) * state + write
        states.append(state)
        begin = end
    h, u = torch.stack(states, 1).split([stream.k.shape[-1], stream.v.shape[-1]], -1)
    return h, u


Readings = dict[tuple[float, ...], Tensor]
"""Predictions [B,len(at),Q,V] by a memory's constants."""


def linear_attention(stream: Stream) -> Readings:
    """o = U^T q, by (gamma,)."""
    return {(gamma,): stream.q.double() @ moments(stream, gamma)[1] for gamma in GAMMAS}


def ridge(stream: Stream, ratios: tuple[float, ...] = RATIOS) -> Readings:
    """o = U^T (H + a |H| I)^-1 q, solved exactly, by (gamma, a)."""
    found: Readings = {}
    for gamma in GAMMAS:
        h, u = moments(stream, gamma)
        fro = h.square().sum((-2, -1)).sqrt()
        for a in ratios:
            eye = torch.eye(h.shape[-1], dtype=h.dtype)
            inverse = torch.cholesky_inverse(
                torch.linalg.cholesky(h + (a * fro)[..., None, None] * eye)
            )
            found[gamma, a] = stream.q.double() @ (inverse @ u)
    return found


def delta_rule(stream: Stream, gammas: tuple[float, ...] = GAMMAS) -> Readings:
    """The (gated) delta rule, by (gamma, beta): a head of the library's op for each."""
    grid = list(itertools.product(gammas, BETAS))
    gate = torch.tensor(grid)
    state, begin, states = None, 0, []
    for end in stream.at:
        k, v = (x[:, begin:end].unsqueeze(2) for x in (stream.k, stream.v))
        q = k.expand(-1, -1, len(grid), -1)
        g, beta = (x.expand(*q.shape[:3]).contiguous() for x in (gate[:, 0].log(), gate[:, 1]))
        _, state = chunk_gated_delta_rule(
            q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True
        )
        states.append(state)
        begin = end
    whole = torch.stack(states, 1)  # [B,len(at),G,K,V]
    return {which: stream.q.double() @ whole[:, :, i].double() for i, which in enumerate(grid)}


def kalman_filter(stream: Stream) -> Tensor:
    """The exact posterior mean of W given noise and drift, which no other memory is told."""
    k, v = stream.k.double(), stream.v.double()
    batch, dim = k.shape[0], k.shape[-1]
    covariance = torch.eye(dim, dtype=torch.float64).repeat(batch, 1, 1)
    mean, found = k.new_zeros(batch, dim, v.shape[-1]), []
    keep = 1.0 - stream.drift
    for t in range(stream.at[-1]):
        covariance = keep * covariance
        covariance.diagonal(dim1=1, dim2=2).add_(stream.drift)
        mean = keep**0.5 * mean
        k_t, v_t = k[:, t].unsqueeze(-1), v[:, t].unsqueeze(1)
        along = covariance @ k_t
        gain = along / (k_t.mT @ along + stream.noise**2)
        mean = mean + gain @ (v_t - k_t.mT @ mean)
        covariance = covariance - gain @ along.mT
        if t + 1 in stream.at:
            found.append(stream.q[:, len(found)].double() @ mean)
    return torch.stack(found, 1)


def error(o: Tensor, y: Tensor, scale: Tensor | None = None) -> Tensor:
    """|c o - W q| / |W q| over batch and queries, by time [len(at)]; scale c [len(at)], None: 1."""
    o = o if scale is None else scale[:, None, None] * o
    return ((o - y).square().sum((0, 2, 3)) / y.double().square().sum((0, 2, 3))).sqrt()


def best_scale(o: Tensor, y: Tensor) -> Tensor:
    """The factor of o by time that leaves the least error, as a layer's output norm could."""
    return (o * y).sum((0, 2, 3)) / o.square().sum((0, 2, 3)).clamp_min(1e-300)


def tuned(
    choices: Readings, other: Stream, readings: Readings, stream: Stream
) -> tuple[tuple[float, ...], Tensor]:
    """The constants and scales that are best on `other` (geometric mean over times), errors on `stream`."""
    scales = {which: best_scale(o, other.y) for which, o in choices.items()}
    means = {w: error(o, other.y, scales[w]).log().mean().item() for w, o in choices.items()}
    best = min((w for w in means if means[w] == means[w]), key=lambda w: means[w])
    return best, error(readings[best], stream.y, scales[best])
