"""The CUDA C++ kernel that takes single tokens, its blocks run by threads of the CPU (threads.cpp)."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emulated import emulated
from gka.kernels.hopper import build as kernels
from gka.kernels.hopper.arguments import StepArguments
from gka.kernels.hopper.passes import step_arguments
from gka.maths.chunked import Settings, Tokens
from gka.maths.recurrent import States, step_
from stepping import Pool, make_pool
from tolerances import RELATIVE, assert_close

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ with C++20")
F32, BF16 = torch.float32, torch.bfloat16
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The kernel as a shared library, for q of a dtype, U stored in one, and a solver."""
    folder, made = tmp_path_factory.mktemp("threads"), {}

    def build(
        dims: tuple[int, int], dtype: torch.dtype, u_dtype: torch.dtype, solver: kernels.Solve
    ):
        key = (dims, dtype, u_dtype, solver)
        if key not in made:
            place, library = folder / str(len(made)), folder / f"{len(made)}.so"
            head = kernels.step_defines(*key)
            source = emulated(place, "decode.cu", head, ("tensor_cores", "numbers"))
            command = ["g++", "-std=c++20", "-O1", "-w", "-pthread", "-shared", "-fPIC"]
            command += ["-include", str(place / "defines.h")]
            command += [f'-DSOURCE="{source}"', str(HERE / "threads.cpp"), "-o", str(library)]
            told = subprocess.run(command, capture_output=True, text=True)
            assert told.returncode == 0, told.stderr
            made[key] = ctypes.CDLL(str(library))
        return made[key]

    return build


def run(
    library: ctypes.CDLL, pool: Pool, settings: Settings, commit: bool
) -> tuple[Tensor, Tensor]:
    """o and x; the pool's states are updated. Both results start as NaN."""
    assert library.arguments_bytes() == ctypes.sizeof(StepArguments)
    t = pool.tokens
    gates = {"g": t.get("g"), "gk": t.get("g" if pool.tied else "gk")}
    gates |= {"alpha": t.get("alpha"), "beta": t.get("beta")}
    given = {name: t[name] for name in "qkv"} | gates
    q, v = t["q"], t["v"]
    o = torch.full((*q.shape[:3], v.shape[-1]), torch.nan, dtype=q.dtype)
    x = torch.full(q.shape, torch.nan, dtype=F32)
    states = States(pool.h, pool.u, pool.indices)
    arguments = step_arguments(given, None, settings, states, commit, o, x)
    library.launch(ctypes.byref(arguments), q.shape[0] * q.shape[2])
    return o, x


# name: pool, q's dtype, U's, solver, commit
CASES = {
    "one token": ({"length": 1}, F32, F32, "chebyshev", True),
    "separate decays, grouped heads": (
        {"length": 2, "heads": (4, 2, 1), "gates": "g gk a b", "tied": False, "batch": 1},
        F32, F32, "chebyshev", True,
    ),
    "a pool with a free slot and one that is none": (
        {"length": 2, "places": [3, -1, 9], "gates": ""}, F32, F32, "chebyshev", True,
    ),
    "no commit": ({"length": 2, "batch": 1}, F32, F32, "chebyshev", False),
    "adaptive": ({"length": 2, "batch": 1, "mean": 1.0}, F32, F32, "adaptive", True),
    "adaptive, an empty history": ({"length": 1, "empty": True}, F32, F32, "adaptive", True),
    "conjugate gradients": ({"length": 2, "batch": 1}, F32, F32, "cg", True),
    "conjugate gradients, an empty history": ({"length": 1, "empty": True}, F32, F32, "cg", True),
    "U of 16 bits, one token": ({"length": 1, "batch": 1}, BF16, BF16, "adaptive", True),
    "U of 16 bits, tokens": ({"length": 3, "batch": 1}, BF16, BF16, "adaptive", True),
    "U of 16 bits, no commit": ({"length": 1, "batch": 1}, BF16, BF16, "adaptive", False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_blocks_run_by_threads_equal_the_torch_form(name: str, compiled) -> None:
    """Outputs, solutions and states of the kernel's own source equal the torch form's in float32."""
    options, dtype, u_dtype, solver, commit = CASES[name]
    empty = options.get("empty", False)
    options = {n: x for n, x in options.items() if n != "empty"}
    pool = make_pool(**{"dims": (64, 64), **options}).to("cpu", dtype, u_dtype)
    if empty:
        pool.h.zero_()
        pool.tokens["k"].zero_()
    # rounding steers conjugate gradients: two runs agree where both have converged
    num_iter = 60 if solver == "cg" else 12
    settings = Settings(0.3, 0.02, num_iter, 64, pool.tied, True, solver)
    wanted, ours = pool.fresh(), pool.fresh()
    t = wanted.tokens
    gates = (t.get("g"), None if pool.tied else t.get("gk"), t.get("alpha"), t.get("beta"))
    q, k, v = (t[n].float() for n in "qkv")
    tokens = Tokens(q, k, v, *gates, None, None, None)
    x_wanted = torch.zeros(t["q"].shape, dtype=F32)
    o_wanted = step_(tokens, settings, States(wanted.h, wanted.u, wanted.indices), commit, x_wanted)
    library = compiled((64, 64), dtype, u_dtype, solver)
    o, x = run(library, ours, settings, commit)
    assert_close(o, o_wanted, max(RELATIVE[F32], 0 if dtype == F32 else 2.0**-8), "o")
    assert_close(x, x_wanted, RELATIVE[F32], "x")
    assert_close(ours.h, wanted.h, RELATIVE[F32], "h")
    assert_close(ours.u, wanted.u, RELATIVE[F32] if u_dtype == F32 else 2.0**-8, "u")
    if not commit:
        assert torch.equal(ours.h, pool.h) and torch.equal(ours.u, pool.u)


@pytest.mark.parametrize("factor", [1e-25, 1e25])
def test_the_size_of_queries_does_not_matter(factor: float, compiled) -> None:
    """With conjugate gradients: squares of such queries leave float32's range."""
    pool = make_pool(dims=(64, 64), length=1, batch=1).to("cpu", F32, F32)
    settings = Settings(1.0, 0.02, 30, 64, pool.tied, True, "cg")
    library = compiled((64, 64), F32, F32, "cg")
    expected = run(library, pool.fresh(), settings, False)[1]
    pool.tokens["q"] = pool.tokens["q"] * factor
    x = run(library, pool, settings, False)[1]
    assert_close(x.double() / factor, expected.double(), RELATIVE[F32], "x")
