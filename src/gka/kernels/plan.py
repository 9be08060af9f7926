"""What a call's launches share with every call like it: tile sizes, launch options, compiled kernels.

Made once for each kind of inputs and kept, for working it out takes the host as long as the launches.
"""

# Triton declares a launch with the kernel's device types and without its launch options.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from gka.kernels import configs

SCAN = ("H", "HK", "HV", "GK", "GV", "K", "V", "BK", "BN", "BV", "NK", "NV")
READOUT = ("H", "HK", "HV", "GK", "GV", "K", "V", "BK", "BV", "NV")
THROUGH_H = ("H", "HK", "GK", "K", "BK", "NK", "TILED")
# The compile-time sizes of every kernel, besides C, OP and PREC, which all have.
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


@dataclass(frozen=True)
class Kind:
    """Inputs that share a plan.

    Attributes:
        heads: H, HK and HV.
        dims: K and V.
        capability: the chip's; with the device for kernels belong to one.
    """

    heads: tuple[int, int, int]
    dims: tuple[int, int]
    dtype: torch.dtype
    chunk_size: int
    device: torch.device
    capability: tuple[int, int]


class Plan:
    """Tile sizes and launch options of a kind, and the kernels compiled for it so far."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.H, self.HK, self.HV = kind.heads
        self.K, self.V = kind.dims
        self.C = kind.chunk_size
        self.BK = max(16, triton.next_power_of_2(self.K))
        # 64 columns a tile: 32 make triton 3.6 read past its shared memory in through_u_kernel
        self.BV = min(64, max(16, triton.next_power_of_2(self.V)))
        self.BN = min(64, self.BK)  # columns of H a program scans
        self.NV, self.NK = triton.cdiv(self.V, self.BV), triton.cdiv(self.K, self.BN)
        self.exact = kind.dtype == torch.float32
        self.OP = tl.float32 if self.exact else tl.float16
        self.op_dtype = torch.float32 if self.exact else torch.float16
        self.tiled = (64 if self.exact else 128) < self.BK  # a K x K state outgrows shared memory
        self.PREC = "tf32x3" if self.exact else "tf32"
        self.options = {kernel: self._options(kernel) for kernel in SIZES}
        self._launchers: dict[tuple, Launcher] = {}

    def _options(self, kernel: str) -> dict[str, Any]:
        """Compile-time sizes by name, and the launch configuration."""
        sizes = {
            "H": self.H, "HK": self.HK, "HV": self.HV, "GK": self.H // self.HK, "GV": self.H // self.HV,
            "K": self.K, "V": self.V, "BK": self.BK, "BN": self.BN, "BV": self.BV, "NK": self.NK,
            "NV": self.NV, "TILED": self.tiled, "C": self.C, "OP": self.OP, "PREC": self.PREC,
        }  # fmt: skip
        chosen = {name: sizes[name] for name in (*SIZES[kernel], "C", "OP", "PREC")}
        width = max(self.BK, triton.next_power_of_2(self.V))
        return chosen | configs.config(kernel, width, self.exact, self.kind.device)

    def launcher(self, kernel, name: str, signature: tuple, **more: Any) -> "Launcher":
        """The kernel for arguments of that signature, with `more` compile-time values.

        Args:
            signature: whatever else the compiled code depends on: see `Launcher`.
        """
        key = (kernel, signature, *more.values())
        held = self._launchers.get(key)
        if held is None:
            held = self._launchers[key] = Launcher(kernel, self.options[name] | more)
        return held


class Launcher:
    """A kernel for arguments that Triton would all compile alike, which it is spared to find out.

    Triton looks at every argument of every launch: its type, whether it is None, whether a pointer
    starts at 16 bytes, whether an integer is 1 or divides by 16. This one compiles at the first launch
    and relies on later ones having the same of all that.
    """

    def __init__(self, kernel, options: dict[str, Any]) -> None:
        self.kernel, self.options = kernel, options
        self.compiled = None
        self.constants: tuple = ()

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        if self.compiled is not None:
            self.compiled[(*grid, 1, 1)](*args, *self.constants)
            return
        # None where kernels are interpreted
        self.compiled = self.kernel[grid](*args, **self.options)
        self.constants = tuple(self.options[name] for name in self.kernel.arg_names[len(args) :])


@lru_cache(maxsize=64)
def plan_of(kind: Kind) -> Plan:
    return Plan(kind)
