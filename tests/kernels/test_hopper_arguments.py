"""What Python hands to the Hopper kernels is laid out as they read it."""

import ctypes
import re
from pathlib import Path

from gka.kernels import hopper

C_TYPES = {"float": ctypes.c_float, "int": ctypes.c_int}


def test_the_structure_mirrors_the_kernels() -> None:
    """`hopper.Arguments` has the fields of chunk.cuh's `Arguments`, in their order and of their types."""
    text = (Path(hopper.__file__).parent / "chunk.cuh").read_text()
    body = re.search(r"struct Arguments \{(.*?)\n\};", text, re.DOTALL)
    assert body is not None
    expected = []
    for statement in re.sub(r"//[^\n]*", "", body[1]).split(";"):
        words = statement.replace("const ", "").split(maxsplit=1)
        if statement.strip().startswith("const long long"):
            words = ["long long", statement.split("long long", 1)[1]]
        for name in words[1].split(",") if words else ():
            pointer = "*" in name
            expected.append((name.strip(" *"), ctypes.c_void_p if pointer else C_TYPES[words[0]]))
    assert hopper.Arguments._fields_ == expected
