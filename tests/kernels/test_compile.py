"""The kernels compile for chips that are not here, in the shared memory those have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need the package triton")
ROOT = Path(__file__).parents[2]
# `python -m benchmarks.run resources --shared` takes any others; older chips, some of them tighter, are slow
CASES = [(90, 64, "bfloat16")]


AROUND = {
    "convolution_kernel", "convolution_backward_kernel", "gates_kernel", "gates_backward_kernel",
    "gated_norm_kernel", "gated_norm_backward_kernel", "step_kernel", "sum_places_kernel", "ends_kernel",
    "ends_backward_kernel",
}  # fmt: skip


def shared_memory(arguments: list[str], folder: Path) -> list[list[str]]:
    """The lines that `python -m benchmarks.run resources --shared` prints."""
    command = [sys.executable, "-m", "benchmarks.run", "resources", "--shared", *arguments]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "src")))
    env = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(folder)}
    env["TRITON_INTERPRET"] = "0"
    told = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    return [line.split() for line in told.stdout.splitlines()]


def assert_fit(lines: list[list[str]], names: set[str]) -> None:
    assert names <= {line[3] for line in lines}
    over = [line for line in lines if int(line[4]) > int(line[5])]
    assert not over, over


# float32 states of wider heads outgrow these chips: gka.kernels.configs.widest
OLDER = [
    (arch, dim, dtype)
    for arch in (80, 89, 90)
    for dim, dtype in ((64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (64, "float32"))
]
ALL = [*CASES, *(pytest.param(c, marks=pytest.mark.slow) for c in OLDER if c not in CASES)]


@pytest.mark.parametrize("case", ALL, ids=lambda c: f"sm_{c[0]}-{c[1]}-{c[2]}")
def test_every_kernel_fits_the_chips_shared_memory(case: tuple[int, int, str], tmp_path) -> None:
    """Both passes and a decoding step with every solver, compiled for an H100, A100 or RTX 40, stay within a
    block's limit."""
    arch, dim, dtype = map(str, case)
    lines = shared_memory(["--arch", arch, "--dims", dim, "--dtypes", dtype], tmp_path)
    names = {"moments_kernel", "solve_kernel", "certify_kernel", "through_h_kernel", "step_kernel"}
    assert_fit(lines, names)


CHIPS = [
    pytest.param((80, 128, "bfloat16"), marks=pytest.mark.slow),
    pytest.param((89, 128, "bfloat16"), marks=pytest.mark.slow),
    (90, 100, "float32"),
]


@pytest.mark.parametrize("case", CHIPS, ids=lambda c: f"sm_{c[0]}-{c[1]}-{c[2]}")
def test_what_surrounds_the_op_compiles_for_every_chip(case: tuple, tmp_path) -> None:
    """Convolutions from a past and packed, gates, norm and a decoding step; older chips are slow."""
    arch, dim, dtype = map(str, case)
    arguments = ["--around", "--arch", arch, "--dims", dim, "--dtypes", dtype]
    assert_fit(shared_memory(arguments, tmp_path), AROUND)
