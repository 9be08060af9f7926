"""The CUDA C++ kernels that scan over chunks, their blocks run by threads of the CPU (scans.cpp)."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gka.kernels import hopper
from tolerances import assert_close

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with C++20")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
HERE, HOPPER = Path(__file__).parent, Path(hopper.__file__).parent
EMULATED = {"tensor_cores", "numbers", "inputs"}  # what scans.cpp has in their stead
C = hopper.CHUNK
SUMMED = 3e-5  # weighted inputs have 16 bits, sums float32's
HALVES = 4e-4  # weighted solutions are rounded to float16, and so are their weights
STORED = 5e-4  # of states in float16, whose bounds are loose
SMALL = 2e-4  # weighted float16 inputs are multiples of 2^-24, as inputs are: here of size 1e-3


@pytest.fixture(scope="module")
def launch(tmp_path_factory) -> Callable:
    """Runs a kernel on (blocks, 2) for inputs of such K, V and dtype."""
    folder, made = tmp_path_factory.mktemp("scans"), {}

    def library(kernel: str, dims: tuple[int, int], dtype: torch.dtype) -> ctypes.CDLL:
        key = (kernel, dims, dtype)
        if key not in made:
            part = kernel.split("_")[0]
            text = hopper.source(kernel, *dims, dtype == BF16, False)
            head = text[: text.index("// Hopper's tensor cores")]
            names = [f"{p}.cuh" for p in hopper.SCAN_PARTS[part] if p not in EMULATED]
            body = "\n".join((HOPPER / name).read_text() for name in (*names, f"{part}.cu"))
            body = re.sub(r"extern __shared__.*?;", "unsigned char* raw = RAW;", body)
            source, built = folder / f"{len(made)}.h", folder / f"{len(made)}.so"
            source.write_text(body)
            source.with_suffix(".head").write_text(head)
            command = ["g++", "-std=c++20", "-O1", "-w", "-pthread", "-shared", "-fPIC"]
            command += ["-include", str(source.with_suffix(".head"))]
            command += [f'-DSOURCE="{source}"', f"-DENTRY={hopper.name_of(kernel)}"]
            command += [f"-DBLOCK_THREADS={hopper.threads_of(kernel, dims[0])}"]
            command += [f"-DSHARED_BYTES={hopper.shared_bytes(kernel, *dims)}"]
            command += [str(HERE / "scans.cpp"), "-o", str(built)]
            told = subprocess.run(command, capture_output=True, text=True)
            assert told.returncode == 0, told.stderr
            made[key] = ctypes.CDLL(str(built))
        return made[key]

    def run(kernel, dims, dtype, blocks: int, arguments: hopper.ScanArguments) -> None:
        built = library(kernel, dims, dtype)
        assert built.arguments_bytes() == ctypes.sizeof(arguments)
        built.launch(ctypes.byref(arguments), blocks)

    return run


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


CASES = {
    "one sequence": Case(),
    "packed, one empty, one of a segment": Case(lengths=(150, 0, 64, 300), boundary=True),
    "grouped heads": Case(heads=(4, 2, 1), group=(2, 2), lengths=(200,)),
    "no gates": Case(gates="", lengths=(200,), stretch=1),
    "strong decay": Case(decay=2.0, boundary=True),
    "float16": Case(dtype=F16, boundary=True),
    "float16, strong decay, large keys": Case(dtype=F16, decay=2.0, size=300.0),
    "float16, small keys": Case(dtype=F16, size=1e-3),
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
        self.g, self.alpha, self.beta = (gates[n] if n in case.gates else None for n in gates)
        self._tables()
        M, N = len(self.start), len(case.lengths)
        self.key_weight = torch.randn(T, self.count) * 0.1
        self.start_weight = torch.randn(M, self.count) * 0.1
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


SCALE = 0.3
SIDES = {"h": 0, "u": 1}


def arguments(problem: Problem) -> tuple[hopper.ScanArguments, dict[str, Tensor]]:
    """What the kernels share, and the arrays they write, NaN at first."""
    case, (K, V), S = problem.case, problem.case.dims, len(problem.segments)
    written: dict[str, Tensor] = {}
    sides = {}
    for of, width in (("h", K), ("u", V)):
        written[f"{of} sums"] = torch.full((S, problem.count, K, width), torch.nan)
        written[f"{of} decays"] = torch.full((S, problem.count), torch.nan)
        shape, blocks = (len(problem.start), problem.count), width // 64
        written[f"{of} states"] = torch.full((*shape, K, width), torch.nan, dtype=F16)
        for name in ("bounds", "norms", "wholes"):
            written[f"{of} {name}"] = torch.full((*shape, blocks), torch.nan)
        written[f"{of} last"] = torch.full((len(case.lengths), case.heads[0], K, width), torch.nan)
        sides[of] = hopper.Side()
        hopper.fill(
            sides[of],
            {
                "g": problem.g, "boundary": problem.boundary[of], "sums": written[f"{of} sums"],
                "sum_decays": written[f"{of} decays"],
                **{name: written[f"{of} {name}"] for name in ("states", "bounds", "last")},
            },
        )  # fmt: skip
    shape = (len(problem.start), problem.count)
    written["first"] = torch.full(shape, torch.nan)
    written["second"] = torch.full((*shape, V // 64), torch.nan)
    (H, HK, HV), made = case.heads, hopper.ScanArguments()
    hopper.fill(
        made,
        {
            **sides, "k": problem.k, "v": problem.v, "q": problem.q, "x": problem.x, "y": problem.y,
            "d_o": problem.do, "alpha": problem.alpha, "beta": problem.beta, "x_scale": problem.x_scale,
            "y_scale": problem.y_scale, "key_weight": problem.key_weight,
            "start_weight": problem.start_weight, "segments": problem.segments,
            "chunk_start": problem.start, "chunk_length": problem.length, "scale": SCALE, "heads": H,
            "key_heads": HK, "value_heads": HV, "first_head": problem.first,
            "group_heads": problem.count, "segment_count": S,
            "first_maxima": written["first"], "second_maxima": written["second"],
        },
    )  # fmt: skip
    return made, written


def summed(launch: Callable, direction: str, problem: Problem, made: hopper.ScanArguments) -> None:
    """Sums of segments, then what comes before each."""
    case, blocks = problem.case, len(problem.segments) * problem.count
    launch(f"sums_{direction}", case.dims, case.dtype, blocks, made)
    blocks = case.dims[0] * max(case.dims) // 512 * problem.count
    launch(f"combine_{direction}", case.dims, case.dtype, blocks, made)


@pytest.mark.parametrize("name", CASES)
def test_segments_begin_with_the_states_before_them(name: str, launch) -> None:
    """Sums of segments, put together, equal the float64 recurrence's states at the segments' starts."""
    problem = Problem(CASES[name])
    made, written = arguments(problem)
    summed(launch, "states", problem, made)
    begins = problem.segments[:, 1].long()
    some = problem.segments[:, 1] < problem.segments[:, 2]
    for of in "hu":
        for own in range(problem.count):
            starts, _ = problem.states(problem.first + own, of)
            wanted = starts[begins[some]]
            tolerance = SMALL if problem.case.size < 0.1 else SUMMED
            assert_close(written[f"{of} sums"][some, own], wanted, tolerance, of)


def stored(problem: Problem, of: str) -> tuple[Tensor, Tensor, Tensor]:
    """States at chunk starts in float64, and as the kernels store them."""
    heads = range(problem.first, problem.first + problem.count)
    starts = torch.stack([problem.states(head, of)[0] for head in heads], 1)
    bound = starts.abs().amax((-1, -2)).clamp(min=1e-20) * 1.5
    blocks = problem.case.dims[SIDES[of]] // 64
    halves = (starts / bound[..., None, None]).half()
    return starts, halves, bound.float()[..., None].expand(*bound.shape, blocks).contiguous()


def maxima(problem: Problem, x: Tensor) -> Tensor:
    """Largest magnitudes of chunks [M, heads]."""
    rows = zip(problem.start, problem.length, strict=True)
    return torch.stack([x[s : s + n].abs().amax((0, 2)).float() for s, n in rows])


def backwards(problem: Problem, made: hopper.ScanArguments) -> dict[str, Tensor]:
    """Gives the kernels the stored states, which it returns in float64 as stored."""
    H, HK, _ = problem.case.heads
    rows, found, kept = maxima(problem, problem.k), {}, problem.kept  # pointers to these are in use
    kept["key_maxima"] = rows[:, [h // (H // HK) for h in problem.own]].contiguous()
    for of, side in (("h", made.h), ("u", made.u)):
        _, halves, bounds = stored(problem, of)
        kept[of], kept[f"{of} bounds"] = halves, bounds
        hopper.fill(side, {"stored": halves, "stored_bounds": bounds})
        found[of] = halves.double() * bounds[..., :1, None].double()
    hopper.fill(made, {"key_maxima": kept["key_maxima"]})
    return found


@pytest.mark.parametrize("name", CASES)
def test_segments_end_with_the_gradients_behind_them(name: str, launch) -> None:
    """The same of E, walking backwards: from the ends of segments, with the states' own part of H's."""
    problem = Problem(CASES[name])
    made, written = arguments(problem)
    starts = backwards(problem, made)["h"]
    summed(launch, "back", problem, made)
    some = problem.segments[:, 1] < problem.segments[:, 2]
    ends = problem.segments[:, 2].long() - 1
    for of in "hu":
        for own in range(problem.count):
            found, _ = problem.ends(problem.first + own, of, starts[:, own])
            got = written[f"{of} sums"][some, own]
            assert_close(got, found[ends[some]], HALVES if of == "h" else SUMMED, of)


def halves(x: Tensor, bounds: Tensor) -> Tensor:
    """Stored states in float64; their bounds hold, and are the same for all columns."""
    assert x.isfinite().all()
    assert (x.abs() <= 1.001).all()
    assert (bounds == bounds[..., :1]).all()
    return x.double() * bounds[..., :1, None].double()


@pytest.mark.parametrize("name", CASES)
def test_states_at_chunk_starts(name: str, launch) -> None:
    """H and U at chunk starts and final, norms of H, and the largest keys and values, equal float64's."""
    problem = Problem(CASES[name])
    made, written = arguments(problem)
    hopper.fill(made.h, {"norms": written["h norms"]})
    summed(launch, "states", problem, made)
    blocks = len(problem.segments) * problem.count
    launch("scan_states", problem.case.dims, problem.case.dtype, blocks, made)
    tolerance = SMALL if problem.case.size < 0.1 else SUMMED
    for of in "hu":
        got = halves(written[f"{of} states"], written[f"{of} bounds"])
        for i, head in enumerate(problem.own):
            starts, last = problem.states(head, of)
            assert_close(got[:, i], starts, STORED, of)
            assert_close(written[f"{of} last"][:, head], last, tolerance, of)
            if of == "h":
                assert_close(written["h norms"][:, i].sum(-1), (starts**2).sum((1, 2)), STORED)
    H, HK, HV = problem.case.heads
    k, v = maxima(problem, problem.k), maxima(problem, problem.v)
    for i, head in enumerate(problem.own):
        assert (written["first"][:, i] == k[:, head // (H // HK)]).all()
        assert (written["second"][:, i] == v[:, head // (H // HV), None]).all()


@pytest.mark.parametrize("name", CASES)
def test_gradients_at_chunk_ends(name: str, launch) -> None:
    """E of H and U at chunk ends and of the initial states, and decay times <S, E>, equal float64's."""
    problem = Problem(CASES[name])
    made, written = arguments(problem)
    starts = backwards(problem, made)
    for of, side in (("h", made.h), ("u", made.u)):
        hopper.fill(side, {"wholes": written[f"{of} wholes"]})
    summed(launch, "back", problem, made)
    blocks = len(problem.segments) * problem.count
    launch("scan_back", problem.case.dims, problem.case.dtype, blocks, made)
    rows = list(zip(problem.start, problem.length, strict=True))
    for of in "hu":
        got = halves(written[f"{of} states"], written[f"{of} bounds"])
        for i, head in enumerate(problem.own):
            ends, first = problem.ends(head, of, starts[of][:, i])
            assert_close(got[:, i], ends, STORED, of)
            assert_close(written[f"{of} last"][:, head], first, HALVES if of == "h" else SUMMED, of)
            decay = problem.steps(head, of)[0]
            whole = torch.stack([decay[s : s + n].prod() for s, n in rows])
            inner = whole * (starts[of][:, i] * ends).sum((1, 2))
            assert_close(written[f"{of} wholes"][:, i].sum(-1), inner, STORED, of)
    do = maxima(problem, problem.do)
    for i, head in enumerate(problem.own):
        alpha = problem.head(problem.alpha, head, 1.0)[:, None]
        x = problem.x[:, head].double() * problem.x_scale[:, head, None].double()
        z = problem.q[:, head].double() * (1 - alpha) + alpha * x
        z = maxima(problem, z[:, None])[:, 0]
        assert (written["second"][:, i] == do[:, head, None]).all()
        assert (written["first"][:, i] >= z * 0.999).all()
        assert (written["first"][:, i] <= z * 8).all()
