"""Tile sizes, launch options and compiled kernels, which calls of one kind share.

They are kept per kind of inputs: working them out takes the host as long as the launches.
"""

# Triton declares a launch with the kernel's device types and without its launch options.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

from functools import lru_cache
from typing import Any

import triton
import triton.language as tl

from gka.kernels import configs
from gka.kernels.call import Sizes

SCAN = ("H", "HK", "HV", "GK", "GV", "K", "V", "BK", "BN", "BV", "NK", "NV")
READOUT = ("H", "HK", "HV", "GK", "GV", "K", "V", "BK", "BV", "NV")
THROUGH_H = ("H", "HK", "GK", "K", "BK", "NK", "TILED")
# The compile-time sizes of every kernel, besides C, OP and PREC.
SIZES = {
    "moments": SCAN,
    "solve": THROUGH_H,
    "certify": THROUGH_H,
    "readout": READOUT,
    "readout_backward": READOUT,
    "reverse_u": ("H", "K", "V", "BK", "BV"),
    "reverse_h": ("H", "HK", "GK", "K", "BK", "BN"),
    "through_u": READOUT,
    "through_h": THROUGH_H,
}


class Plan:
    """Tile sizes and launch options of a kind of call, and the kernels compiled for it so far."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.options = {kernel: self._options(kernel) for kernel in SIZES}
        self._launchers: dict[tuple, Launcher] = {}

    def _options(self, kernel: str) -> dict[str, Any]:
        """Compile-time sizes by name, and the launch configuration."""
        of, exact = self.sizes, self.sizes.exact
        (heads, key_heads, value_heads), (key_dim, value_dim) = of.heads, of.dims
        (BK, BN, BV), (NK, NV) = of.tiles, of.blocks
        sizes = {
            "H": heads, "HK": key_heads, "HV": value_heads, "GK": heads // key_heads,
            "GV": heads // value_heads, "K": key_dim, "V": value_dim, "BK": BK, "BN": BN, "BV": BV,
            "NK": NK, "NV": NV, "C": of.chunk_size, "OP": tl.float32 if exact else tl.float16,
            "TILED": (64 if exact else 128) < BK,  # a K x K state outgrows shared memory
            "PREC": "tf32x3" if exact else "tf32",
        }  # fmt: skip
        chosen = {name: sizes[name] for name in (*SIZES[kernel], "C", "OP", "PREC")}
        width = max(BK, triton.next_power_of_2(value_dim))
        return chosen | configs.config(kernel, width, exact, of.device)

    def launcher(self, kernel, name: str, signature: tuple, **more: Any) -> "Launcher":
        """The kernel for arguments of that signature, with `more` compile-time values.

        Args:
            signature: what else the compiled code depends on (see `Launcher`).
        """
        key = (kernel, signature, *more.values())
        held = self._launchers.get(key)
        if held is None:
            held = self._launchers[key] = Launcher(kernel, self.options[name] | more)
        return held


class Launcher:
    """A kernel whose launches skip Triton's specialisation.

    At every launch Triton inspects every argument: its type, whether it is None, whether a pointer is
    aligned to 16 bytes, whether an integer is 1 or a multiple of 16. A launcher compiles at its first
    launch and relies on all of these being the same in later ones.
    """

    def __init__(self, kernel, options: dict[str, Any]) -> None:
        self.kernel, self.options = kernel, options
        self.compiled = None
        self.constants: tuple = ()

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        if self.compiled is not None:
            self.compiled[(*grid, 1, 1)](*args, *self.constants)
            return
        # None if kernels are interpreted
        self.compiled = self.kernel[grid](*args, **self.options)
        self.constants = tuple(self.options[name] for name in self.kernel.arg_names[len(args) :])


class Jitted:
    """A kernel that Triton specialises at every launch."""

    def __init__(self, kernel, options: dict[str, Any]) -> None:
        self.kernel, self.options = kernel, options

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        self.kernel[grid](*args, **self.options)


@lru_cache(maxsize=64)
def plan_of(sizes: Sizes) -> Plan:
    return Plan(sizes)
