"""CUDA C++ sources as a CPU's compiler takes them: copies in a folder, some headers left to a stand-in."""

import re
from pathlib import Path

from gka.kernels.hopper import build

SHARED = re.compile(
    r"extern __shared__.*?;"
)  # the block's shared memory, which the stand-in has as RAW


def emulated(folder: Path, file: str, defines: str, stood_in: tuple[str, ...]) -> Path:
    """`file` and its headers in `folder`, those of `stood_in` empty, and `defines` as defines.h."""
    folder.mkdir()
    (folder / "defines.h").write_text(defines)
    for name, text in build.headers().items():
        kept = "" if name.removesuffix(".cuh") in stood_in else text
        (folder / name).write_text(f"#pragma once\n{kept}")
    source = folder / file
    text, count = SHARED.subn("unsigned char* raw = RAW;", (build.FOLDER / file).read_text())
    assert count <= 1
    source.write_text(text)
    return source
