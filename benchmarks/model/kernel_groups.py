"""Kernels of a training step in groups, by their names: ours one by one, all others by what they do."""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.op.profile import Kernel

import gka

SOURCES = Path(gka.__file__).parent / "kernels"
# first match wins; a product that a compiler has fused is a product
GROUPS = (
    ("optimizer", re.compile(r"multi_tensor_apply|adam", re.I)),
    ("matrix products", re.compile(r"gemm|cutlass|nvjet|cublas|splitK|triton_tem_|aten::(add|b)?mm$", re.I)),
    ("attention", re.compile(r"flash_fwd|flash_bwd|fmha|sdpa|mha_|scaled_dot_product", re.I)),
    ("compiled, fused", re.compile(r"^triton_(poi|per|red|for|unk)_|^cpp_fused|^graph_\d+_cpp_fused")),
    ("copies and fills", re.compile(r"^Mem(cpy|set)|copy|FillFunctor|fill_|zero_|aten::cat$|CatArray", re.I)),
    ("other kernels of torch", re.compile(r"at::native|at_cuda|aten::|cub::|thrust::")),
)  # fmt: skip
REST = "kernels of other libraries"


@cache
def our_names() -> frozenset[str]:
    """Names of our kernels, as their sources define them."""
    found = set()
    for path in SOURCES.rglob("*.py"):
        found |= set(re.findall(r"^def (\w+_kernel)\(", path.read_text("utf-8"), re.M))
    for path in SOURCES.rglob("*.cu"):
        found |= set(re.findall(r"\b(gka_\w+)\(", path.read_text("utf-8")))
    return frozenset(found)


def group_of(name: str) -> str:
    """Our kernel's own name, operators of ours on a CPU included; else the group of a kernel.

    Kernels of torch end with arguments and template parameters, ours do not.
    """
    plain = name.split("(")[0].split("<")[0].split()[-1] if name.strip() else name
    if plain in our_names() or plain.startswith("gka::"):
        return plain
    return next((group for group, pattern in GROUPS if pattern.search(name)), REST)


def grouped(found: Iterable[Kernel]) -> list[dict[str, Any]]:
    """Milliseconds, share of all kernels' time, and launches of a step, by group; the longest first."""
    groups: dict[str, list[Kernel]] = {}
    for kernel in found:
        groups.setdefault(group_of(kernel.name), []).append(kernel)
    whole = sum(kernel.us for members in groups.values() for kernel in members)
    rows = [
        {
            "group": group,
            "ms": sum(kernel.us for kernel in members) / 1e3,
            "share": sum(kernel.us for kernel in members) / whole,
            "launches": sum(kernel.launches for kernel in members),
        }
        for group, members in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])
