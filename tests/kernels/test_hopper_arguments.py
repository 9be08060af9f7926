"""What Python hands to the Hopper kernels is laid out as they read it."""

import ctypes
import re
from pathlib import Path

import pytest

from gka.kernels import hopper
from gka.kernels.hopper import arguments

TYPES = {
    "float": ctypes.c_float, "int": ctypes.c_int, "long long": ctypes.c_longlong, "Side": arguments.Side,
    "View": arguments.View,
}  # fmt: skip
POINTED = ("void", "u16")


def fields(structure: type[ctypes.Structure], file: str) -> list[tuple[str, type]]:
    """Those of the C++ structure of the same name, as ctypes has them."""
    text = (Path(hopper.__file__).parent / file).read_text()
    body = re.search(rf"struct {structure.__name__} \{{(.*?)\n\}};", text, re.DOTALL)
    assert body is not None
    found = []
    for statement in re.sub(r"//[^\n]*", "", body[1]).replace("const ", "").split(";"):
        if not statement.strip():
            continue
        kind = next(t for t in (*TYPES, *POINTED) if statement.strip().startswith(t))
        for name in statement.split(kind, 1)[1].split(","):
            field = ctypes.c_void_p if "*" in name else TYPES[kind]
            found.append((name.strip(" *\n"), field))
    return found


@pytest.mark.parametrize(
    ("structure", "file"),
    [
        (arguments.Arguments, "chunk.cuh"),
        (arguments.Side, "scan.cuh"),
        (arguments.ScanArguments, "scan.cuh"),
        (arguments.View, "decode.cu"),
        (arguments.StepArguments, "decode.cu"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_structures_mirror_the_kernels(structure: type[ctypes.Structure], file: str) -> None:
    """The fields of the structure of the same name in the kernels' source, in order and of the same types."""
    assert structure._fields_ == fields(structure, file)
