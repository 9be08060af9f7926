"""The most memory that a piece of work holds at a time, beyond what the process held before.

Linux keeps the largest resident size a process has had (VmHWM), and sets it back to the present one when
"5" is written to /proc/self/clear_refs. Without that the figure would say little: importing torch alone
takes more at its height than many a measured pass. Elsewhere, and where a container forbids the reset,
nothing is measured.
"""

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def peak_added(work: Callable[[], object]) -> float | None:
    """MiB by which the resident size rises at its highest while `work` runs; None where it cannot be told.

    Memory that earlier work has freed is given back to the system first, as far as the allocator does
    that, so that reusing it counts as well.
    """
    gc.collect()
    with suppress(OSError, AttributeError):  # the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _RESET.write_text("5")
        before = _highest_kib()
    except OSError:
        return None
    work()
    return (_highest_kib() - before) / 1024


def _highest_kib() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} has no VmHWM")
