"""Problems for the scans over chunks: inputs, tables, and the recurrence in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gka.kernels.hopper.build import CHUNK as C

F64, BF16, F16 = torch.float64, torch.bfloat16, torch.float16
SCALE = 0.3  # of the readout


@dataclass(frozen=True)
class Case:
    """Packed sequences of several segments, heads of q, k and v, and the group of heads that is worked on."""

    lengths: tuple[int, ...] = (C * 5 + 17,)
    stretch: int = 2
    heads: tuple[int, int, int] = (1, 1, 1)
    group: tuple[int, int] = (0, 1)
    dims: tuple[int, int] = (64, 64)
    dtype: torch.dtype = BF16
    gates: str = "g alpha beta"
    boundary: bool = False
    decay: float = 0.02
    size: float = 1.0  # of keys
    resets: bool = False  # log decays of -inf among the others


CASES = {
    "one sequence": Case(),
    "packed, one empty, one of a segment": Case(lengths=(150, 0, 64, 300), boundary=True),
    "grouped heads": Case(heads=(4, 2, 1), group=(2, 2), lengths=(200,)),
    "no gates": Case(gates="", lengths=(200,), stretch=1),
    "strong decay": Case(decay=2.0, boundary=True),
    "hard resets": Case(boundary=True, resets=True),
    "float16": Case(dtype=F16, boundary=True),
    "float16, strong decay, large keys": Case(dtype=F16, decay=2.0, size=300.0),
    "float16, small keys": Case(dtype=F16, size=1e-3),
    "float16, small keys, decay": Case(dtype=F16, size=0.02, decay=0.2, lengths=(C * 12,)),
    "K = 128": Case(dims=(128, 64), lengths=(200,)),
    "V = 128": Case(dims=(64, 128), lengths=(200,)),
    "both 128": Case(dims=(128, 128), lengths=(150,), stretch=1, boundary=True),
}  # fmt: skip


class Problem:
    """Random inputs, and the tables of chunks and segments, as `gka.kernels.tables` makes them."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        (H, HK, HV), (K, V), T = case.heads, case.dims, sum(case.lengths)
        self.first, self.count = case.group
        self.own = range(self.first, self.first + self.count)
        self.kept: dict[str, Tensor] = {}
        self.q = torch.randn(T, H, K).to(case.dtype)
        self.k = (torch.randn(T, HK, K) * case.size).to(case.dtype)
        self.v, self.do = torch.randn(T, HV, V).to(case.dtype), torch.randn(T, H, V).to(case.dtype)
        self.x, self.y = (torch.rand(T, n, K).mul(2).sub(1).half() for n in (H, self.count))
        self.x_scale, self.y_scale = torch.rand(T, H) * 8, torch.rand(T, self.count) * 0.1
        gates = {
            "g": -torch.rand(T, H) * case.decay,
            "alpha": torch.rand(T, H),
            "beta": torch.rand(T, H),
        }
        if (
            case.resets
        ):  # one, two in a chunk, a chunk's first and last token; lowest and minus infinity
            gates["g"][[10, 20, C, 3 * C - 1]] = -torch.inf
            gates["g"][[21, 4 * C + 5]] = torch.finfo(torch.float32).min
        self.g, self.alpha, self.beta = (gates[n] if n in case.gates else None for n in gates)
        self._tables()
        M, N = len(self.start), len(case.lengths)
        less = 0.1 / min(case.size, 1.0) ** 2  # w_t goes as x_t y_t / F_t
        self.key_weight = torch.randn(T, self.count) * less
        self.start_weight = torch.randn(M, self.count) * less
        shapes = {"h": (N, H, K, K), "u": (N, H, K, V)}
        self.boundary = {
            n: torch.randn(s) * 5 if case.boundary else None for n, s in shapes.items()
        }

    def _tables(self) -> None:
        start, length, segments, token = [], [], [], 0
        for sequence, tokens in enumerate(self.case.lengths):
            first, before = len(start), len(segments)
            for at in range(0, tokens, C):
                start.append(token + at)
                length.append(min(C, tokens - at))
            end, stretch = len(start), self.case.stretch
            begins = list(range(first, end, stretch)) or [first]
            after = before + len(begins)
            segments += [(sequence, b, min(b + stretch, end), before, after) for b in begins]
            token += tokens
        self.start, self.length = torch.tensor(start), torch.tensor(length, dtype=torch.int32)
        self.segments = torch.tensor(segments, dtype=torch.int32)

    def head(self, x: Tensor | None, head: int, default: float) -> Tensor:
        """A gate of one head in float64."""
        T = sum(self.case.lengths)
        return torch.full((T,), default, dtype=F64) if x is None else x[:, head].double()

    def steps(self, head: int, of: str):
        """Per token float64: decay, what it adds to a state's E, to the state itself."""
        H, HK, HV = self.case.heads
        k, v = self.k[:, head // (H // HK)].double(), self.v[:, head // (H // HV)].double()
        x = self.x[:, head].double() * self.x_scale[:, head, None].double()
        decay = self.head(self.g, head, 0.0).exp()
        beta2 = self.head(self.beta, head, 1.0) ** 2
        alpha = self.head(self.alpha, head, 1.0)[:, None]
        added = (beta2[:, None] * k)[:, :, None] * (k if of == "h" else v)[:, None]
        if of == "u":
            z = self.q[:, head].double() * (1 - alpha) + alpha * x
            back = SCALE * z[:, :, None] * self.do[:, head].double()[:, None]
        else:
            own = head - self.first
            y = self.y[:, own].double() * self.y_scale[:, own, None].double()
            back = -y[:, :, None] * x[:, None]
        return decay, added, back

    def states(self, head: int, of: str) -> tuple[Tensor, Tensor]:
        """At chunk starts, and after each sequence."""
        decay, added, _ = self.steps(head, of)
        found, last, token = [], [], 0
        for sequence, tokens in enumerate(self.case.lengths):
            given = self.boundary[of]
            state = (
                added.new_zeros(added.shape[1:])
                if given is None
                else given[sequence, head].double()
            )
            for t in range(token, token + tokens):
                if (t - token) % C == 0:
                    found.append(state)
                state = decay[t] * state + added[t]
            last.append(state)
            token += tokens
        return torch.stack(found), torch.stack(last)

    def ends(self, head: int, of: str, starts: Tensor) -> tuple[Tensor, Tensor]:
        """E at chunk ends, and before each sequence."""
        decay, _, local = self.steps(head, of)
        own, (H, HK, _) = head - self.first, self.case.heads
        k = self.k[:, head // (H // HK)].double()
        found, first = [torch.empty(0)] * len(self.start), []
        chunk, token = len(self.start), sum(self.case.lengths)
        for sequence in reversed(range(len(self.case.lengths))):
            given = self.boundary[of]
            e = (
                local.new_zeros(local.shape[1:])
                if given is None
                else given[sequence, head].double()
            )
            for _ in range(-(-self.case.lengths[sequence] // C)):
                chunk -= 1
                found[chunk] = e
                rows = slice(token - int(self.length[chunk]), token)
                zeta = decay[rows].cumprod(0)
                e = e * zeta[-1] + (zeta[:, None, None] * local[rows]).sum(0)
                if of == "h":
                    weight = 0.5 * self.key_weight[rows, own].double()
                    e = e - (weight[:, None] * k[rows]).T @ k[rows]
                    e = e - 0.5 * float(self.start_weight[chunk, own]) * starts[chunk]
                token = rows.start
            first.insert(0, e)
        return torch.stack(found), torch.stack(first)
