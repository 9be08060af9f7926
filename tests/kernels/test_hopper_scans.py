"""The CUDA C++ kernels that scan over chunks, their blocks run by threads of the CPU (scans.cpp)."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emulated import emulated
from gka.kernels.hopper import build
from gka.kernels.hopper.arguments import ScanArguments, Side, fill
from gka.kernels.hopper.build import CHUNK as C
from quick import quick_first
from scan_problems import CASES, SCALE, Case, Problem
from tolerances import assert_close

# sizes, layouts, resets and both dtypes; the other decays and sizes of keys are slow
QUICK = (
    "packed, one empty, one of a segment", "grouped heads", "no gates", "hard resets", "float16",
    "float16, strong decay, large keys", "both 128",
)  # fmt: skip

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with C++20")
BF16, F16 = torch.bfloat16, torch.float16
HERE = Path(__file__).parent
EMULATED = ("tensor_cores", "numbers", "inputs")  # what scans.cpp has in their stead
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
            place, built = folder / str(len(made)), folder / f"{len(made)}.so"
            head = build.defines(kernel, *dims, dtype == BF16, "chebyshev")
            source = emulated(place, build.file_of(kernel), head, EMULATED)
            command = ["g++", "-std=c++20", "-O1", "-w", "-pthread", "-shared", "-fPIC"]
            command += ["-include", str(place / "defines.h")]
            command += [f'-DSOURCE="{source}"', f"-DENTRY={build.name_of(kernel)}"]
            command += [f"-DBLOCK_THREADS={build.threads_of(kernel, dims[0])}"]
            command += [f"-DSHARED_BYTES={build.shared_bytes(kernel, *dims)}"]
            command += [str(HERE / "scans.cpp"), "-o", str(built)]
            told = subprocess.run(command, capture_output=True, text=True)
            assert told.returncode == 0, told.stderr
            made[key] = ctypes.CDLL(str(built))
        return made[key]

    def run(kernel, dims, dtype, blocks: int, arguments: ScanArguments) -> None:
        built = library(kernel, dims, dtype)
        assert built.arguments_bytes() == ctypes.sizeof(arguments)
        built.launch(ctypes.byref(arguments), blocks)

    return run


SIDES = {"h": 0, "u": 1}


def arguments(problem: Problem) -> tuple[ScanArguments, dict[str, Tensor]]:
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
        sides[of] = Side()
        fill(
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
    (H, HK, HV), made = case.heads, ScanArguments()
    fill(
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


def summed(launch: Callable, direction: str, problem: Problem, made: ScanArguments) -> None:
    """Sums of segments, then what comes before each."""
    case, blocks = problem.case, len(problem.segments) * problem.count
    launch(f"sums_{direction}", case.dims, case.dtype, blocks, made)
    blocks = case.dims[0] * max(case.dims) // 512 * problem.count
    launch(f"combine_{direction}", case.dims, case.dtype, blocks, made)


@pytest.mark.parametrize("name", quick_first(CASES, QUICK))
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


def backwards(problem: Problem, made: ScanArguments) -> dict[str, Tensor]:
    """Gives the kernels the stored states, which it returns in float64 as stored."""
    H, HK, _ = problem.case.heads
    rows, found, kept = maxima(problem, problem.k), {}, problem.kept  # pointers to these are in use
    kept["key_maxima"] = rows[:, [h // (H // HK) for h in problem.own]].contiguous()
    for of, side in (("h", made.h), ("u", made.u)):
        _, halves, bounds = stored(problem, of)
        kept[of], kept[f"{of} bounds"] = halves, bounds
        fill(side, {"stored": halves, "stored_bounds": bounds})
        found[of] = halves.double() * bounds[..., :1, None].double()
    fill(made, {"key_maxima": kept["key_maxima"]})
    return found


@pytest.mark.parametrize("name", quick_first(CASES, QUICK))
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


@pytest.mark.parametrize("name", quick_first(CASES, QUICK))
def test_states_at_chunk_starts(name: str, launch) -> None:
    """H and U at chunk starts and final, norms of H, and the largest keys and values, equal float64's."""
    problem = Problem(CASES[name])
    made, written = arguments(problem)
    fill(made.h, {"norms": written["h norms"]})
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


def test_keys_that_are_not_written_leave_bounds_tight(launch) -> None:
    """Large keys behind a closed write gate take no digits from the stored states."""
    problem = Problem(Case(lengths=(C * 4,), stretch=4, decay=0.002))
    assert problem.beta is not None
    problem.k[::C] *= 100
    problem.beta[::C] = 0
    made, written = arguments(problem)
    fill(made.h, {"norms": written["h norms"]})
    launch("scan_states", problem.case.dims, problem.case.dtype, 1, made)
    got = halves(written["h states"], written["h bounds"])
    assert_close(got[:, 0], problem.states(0, "h")[0], STORED, "h")


@pytest.mark.parametrize("name", quick_first(CASES, QUICK))
def test_gradients_at_chunk_ends(name: str, launch) -> None:
    """E of H and U at chunk ends and of the initial states, and decay times <S, E>, equal float64's."""
    problem = Problem(CASES[name])
    made, written = arguments(problem)
    starts = backwards(problem, made)
    for of, side in (("h", made.h), ("u", made.u)):
        fill(side, {"wholes": written[f"{of} wholes"]})
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
