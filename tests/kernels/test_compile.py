"""The kernels compile for chips that are not here, in the shared memory those have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need the package triton")
ROOT = Path(__file__).parents[2]
# the tightest of each chip; `python -m benchmarks.resources --shared` takes any others
CASES = [(90, 128, "bfloat16"), (89, 256, "bfloat16")]


# float32 states of wider heads outgrow these chips: gka.kernels.configs.widest
OLDER = [
    (arch, dim, dtype)
    for arch in (80, 89)
    for dim, dtype in ((64, "bfloat16"), (128, "bfloat16"), (256, "bfloat16"), (64, "float32"))
]
ALL = [*CASES, *(pytest.param(c, marks=pytest.mark.slow) for c in OLDER if c not in CASES)]


@pytest.mark.parametrize("case", ALL, ids=lambda c: f"sm_{c[0]}-{c[1]}-{c[2]}")
def test_every_kernel_fits_the_chips_shared_memory(case: tuple[int, int, str], tmp_path) -> None:
    """Both passes with either solver, compiled for an H100, A100 or RTX 40, stay within a block's limit."""
    arch, dim, dtype = map(str, case)
    command = [sys.executable, "-m", "benchmarks.resources", "--shared"]
    command += ["--arch", arch, "--dims", dim, "--dtypes", dtype]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "src")))
    env = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path)}
    env["TRITON_INTERPRET"] = "0"
    told = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    lines = [line.split() for line in told.stdout.splitlines()]
    assert {"moments_kernel", "solve_kernel", "certify_kernel", "through_h_kernel"} <= {
        line[3] for line in lines
    }
    over = [line for line in lines if int(line[4]) > int(line[5])]
    assert not over, over
