"""The machine code of every kernel, to compare checkouts by: `python -m tests.house.sass --output DIR`.

Public calls of the op, of decoding and of a layer run on a GPU that is not there (pretend.py); what they
give to NVRTC and to Triton is compiled for sm_90 and disassembled. Of the disassembly the instructions and
their encodings count; symbols, line numbers and comments do not. DIR/kernels.txt has a line a kernel:
hash, compiler, entry point, the first call that needed it, registers. DIR/code has the instructions.

`--compare DIR DIR` tells which machine code is in one of two such folders only.
"""

import argparse
import ctypes
import hashlib
import importlib.util
import itertools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import triton
from tests.house import pretend
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import gka
from gka.storage import write_text

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
LIST = "kernels.txt"
INSTRUCTION = re.compile(r"^\s*(?:/\*[0-9a-f]{4,}\*/.*|/\* 0x[0-9a-f]{16} \*/)\s*$")
HEADS, LENGTH = 16, 2048
HOPPER_DIMS = [(64, 64), (64, 128), (128, 64), (128, 128)]
TRITON_CASES = [
    ((64, 64), torch.bfloat16), ((128, 128), torch.bfloat16), ((256, 256), torch.bfloat16),
    ((64, 64), torch.float32), ((100, 100), torch.float32),
]  # fmt: skip
SOLVERS = ("chebyshev", "adaptive", "cg")


@dataclass(frozen=True)
class Program:
    """A translation unit as it was given to NVRTC: its text, its headers by name, the compiler's flags."""

    source: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    flags: tuple[bytes, ...]


@dataclass
class Recorder:
    """What was compiled, with the call that first asked for it.

    Attributes:
        programs: of NVRTC, yet to be compiled. cubins: of Triton, with the kernel's name.
    """

    case: str = ""
    programs: dict[Program, tuple[str, str]] = field(default_factory=dict)
    cubins: dict[bytes, tuple[str, str]] = field(default_factory=dict)
    _open: list = field(default_factory=list)

    def create(self, _program, source, name, count, headers, names) -> int:
        held = tuple((names[i], headers[i]) for i in range(count))
        self._open = [source, tuple(sorted(held)), name.decode().removesuffix(".cu")]
        return 0

    def compile(self, _program, _count, flags) -> int:
        source, headers, name = self._open
        self.programs.setdefault(Program(source, headers, tuple(flags)), (name, self.case))
        return 0

    def library(self, name: str | None, *args: Any, **options: Any) -> ctypes.CDLL:
        """In place of ctypes.CDLL."""
        library = pretend.Library(name, *args, **options)
        if library.absent:
            vars(library).update(nvrtcCreateProgram=self.create, nvrtcCompileProgram=self.compile)
        return library

    def launch(
        self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any
    ) -> Any:
        """In place of JITFunction.run: compiles, and launches nothing."""
        compiled = self._triton(kernel, *args, grid=grid, warmup=True, **options)
        self.cubins.setdefault(compiled.asm["cubin"], (kernel.__name__, self.case))
        return MagicMock()

    _triton: Callable = JITFunction.run


class Chip:
    """A driver of Triton that knows its target and nothing else."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def at_once(_: Any, call: Callable, *args: Any, **options: Any) -> Future:
    """In place of an executor's submit: the case that asked is the case that is told."""
    done: Future = Future()
    done.set_result(call(*args, **options))
    return done


@contextmanager
def recording() -> Iterator[Recorder]:
    """Inside, what is launched on a Hopper GPU is recorded instead."""
    recorder = Recorder()
    triton.runtime.driver.set_active(Chip())  # pyright: ignore[reportArgumentType]
    launch = lambda kernel, *args, **options: recorder.launch(kernel, *args, **options)  # noqa: E731
    with (
        pretend.hopper(),
        patch.object(ctypes, "CDLL", recorder.library),
        patch.object(JITFunction, "run", launch),
        patch.object(ThreadPoolExecutor, "submit", at_once),
    ):
        yield recorder


def tokens(
    dims: tuple[int, int], dtype: torch.dtype, length: int, batch: int = 1
) -> dict[str, Tensor]:
    """q, k, v and gates with gradients; zeros."""
    shape = (batch, length, HEADS)
    heads = {n: torch.zeros(*shape, dims[n == "v"], dtype=dtype) for n in "qkv"}
    gates = {n: torch.zeros(shape) for n in ("g", "alpha", "beta")}
    return {name: x.requires_grad_() for name, x in (heads | gates).items()}


def op(dims: tuple[int, int], dtype: torch.dtype, backend: str, solver: str) -> None:
    """Both passes by chunks: a long sequence; short ones with states and separate decays; packed ones."""
    options: dict[str, Any] = {"backend": backend, "solver": solver}
    key_dim, value_dim = dims
    for kind, length, batch in (("long", LENGTH, 1), ("states", 192, 2), ("packed", 256, 1)):
        given: dict[str, Any] = tokens(dims, dtype, length, batch)
        if kind == "states":
            shapes = ((batch, HEADS, key_dim, dim) for dim in (key_dim, value_dim))
            h, u = (torch.zeros(shape).requires_grad_() for shape in shapes)
            given |= {"initial_state": (h, u), "output_final_state": True}
            given["gk"] = torch.zeros(batch, length, HEADS).requires_grad_()
        else:
            given["gk"] = given["g"]
        if kind == "packed":
            given["cu_seqlens"] = torch.tensor([0, 100, 256])
        o, states = gka.chunk_gka(**given, **options)
        total = o.float().sum()
        for state in states or ():
            total = total + state.sum()
        total.backward()


def decode(
    dims: tuple[int, int], dtype: torch.dtype, backend: str, solver: str, u_dtype: torch.dtype
) -> None:
    """One and four tokens with states in place, kept or not; drafted ones committed; the functional form."""
    key_dim, value_dim = dims
    state = (
        torch.zeros(1, HEADS, key_dim, key_dim),
        torch.zeros(1, HEADS, key_dim, value_dim, dtype=u_dtype),
    )
    options: dict[str, Any] = {"backend": backend, "solver": solver}
    with torch.no_grad():
        for length, commit in itertools.product((1, 4), (True, False)):
            given = {n: x.detach() for n, x in tokens(dims, dtype, length).items()}
            gka.fused_recurrent_gka_(**given, gk=given["g"], state=state, commit=commit, **options)
        written = {n: x for n, x in given.items() if n not in ("q", "alpha")}
        counts = torch.ones(1, dtype=torch.int32)
        gka.advance_states_(**written, gk=given["g"], counts=counts, state=state, backend=backend)
        gka.fused_recurrent_gka(**given, gk=given["g"], output_final_state=True, **options)


def layer(head_dim: int, dtype: torch.dtype) -> None:
    """What surrounds the op: both passes, packed, padded, and from a cache of 1, 16 and 64 tokens."""
    mixer = gka.GatedKalmaNet(2 * head_dim, head_dim=head_dim, num_heads=2, layer_idx=0).to(dtype)
    x = torch.zeros(1, LENGTH, 2 * head_dim, dtype=dtype).requires_grad_()
    mask = torch.ones(1, LENGTH)
    mask[:, :7] = 0
    for more in ({}, {"cu_seqlens": torch.tensor([0, 100, LENGTH])}, {"attention_mask": mask}):
        mixer(x, **more)[0].float().sum().backward()
    cache = gka.StateCache()
    for length in (64, 1, 16):
        with torch.no_grad():
            mixer(x[:, :length], past_key_values=cache, use_cache=True)
    mixer(x[:, :64], past_key_values=cache, use_cache=True)[0].float().sum().backward()


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Every call, with a name."""

    def named(what: Callable, *args: Any) -> tuple[str, Callable[[], None]]:
        words = [str(a).removeprefix("torch.").replace(", ", "x").strip("()") for a in args]
        return f"{what.__name__} {' '.join(words)}", lambda: what(*args)

    for dtype, dims, solver in itertools.product(
        (torch.bfloat16, torch.float16), HOPPER_DIMS, SOLVERS
    ):
        yield named(op, dims, dtype, "hopper", solver)
        for u_dtype in (torch.float32, torch.bfloat16):
            yield named(decode, dims, dtype, "hopper", solver, u_dtype)
    for (dims, dtype), solver in itertools.product(TRITON_CASES, SOLVERS):
        if solver == "adaptive" and dtype == torch.float32 and dims[0] > 64:
            continue  # its certificate outgrows the shared memory
        yield named(op, dims, dtype, "triton", solver)
        yield named(decode, dims, dtype, "triton", solver, torch.float32)
    yield named(layer, 128, torch.bfloat16)
    yield named(layer, 100, torch.float32)


def nvrtc() -> ctypes.CDLL:
    """NVIDIA's compiler, from wherever its Python package keeps it."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else spec.submodule_search_locations or []
    found = sorted(path for folder in folders for path in Path(folder).glob("*/lib/libnvrtc.so.*"))
    if not found:
        sys.exit("NVRTC is not installed: pip install nvidia-cuda-nvrtc.")
    return ctypes.CDLL(str(found[0]))


def compiled(program: Program, library: ctypes.CDLL) -> bytes:
    """The cubin."""

    def listed(texts: list[bytes]) -> Any:
        return (ctypes.c_char_p * len(texts))(*texts)

    handle, size = ctypes.c_void_p(), ctypes.c_size_t()
    names, texts = ([pair[i] for pair in program.headers] for i in range(2))
    library.nvrtcCreateProgram(
        ctypes.byref(handle), program.source, b"kernel.cu", len(names), listed(texts), listed(names)
    )
    flags = list(program.flags)
    if library.nvrtcCompileProgram(handle, len(flags), listed(flags)):
        raise RuntimeError("NVRTC refused a kernel: its own test shows the log.")
    library.nvrtcGetCUBINSize(handle, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(handle, buffer)
    library.nvrtcDestroyProgram(ctypes.byref(handle))
    return buffer.raw


def _dump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOL), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def machine_code(cubin: bytes) -> str:
    """Instructions and encodings, and nothing that depends on a name or a line number."""
    lines = _dump(cubin, "--dump-sass").splitlines()
    kept = (" ".join(line.split()) for line in lines if INSTRUCTION.match(line))
    return "\n".join(kept) + "\n"


def resources(cubin: bytes) -> str:
    """Registers, stack and shared memory of the entry points."""
    return " ".join(re.findall(r"(?:REG|STACK|SHARED):\d+", _dump(cubin, "--dump-resource-usage")))


def record(wanted: str) -> Recorder:
    with recording() as recorder:
        for name, call in cases():
            if wanted not in name:
                continue
            recorder.case = name
            call()
            print(
                f"{name}: {len(recorder.programs)} + {len(recorder.cubins)}",
                file=sys.stderr,
                flush=True,
            )
    return recorder


def write(folder: Path, wanted: str) -> None:
    """Record and compile; kernels.txt comes last, so that a folder with it is finished."""
    (folder / LIST).unlink(missing_ok=True)
    recorder, library = record(wanted), nvrtc()
    if not recorder.case:
        sys.exit(
            f"--only {wanted}: no call has this in its name, as in 'op 64x64 bfloat16 hopper'."
        )
    with ThreadPoolExecutor(2) as pool:
        cubins = pool.map(lambda program: compiled(program, library), recorder.programs)
        kernels = [
            ("cuda", *told, cubin)
            for told, cubin in zip(recorder.programs.values(), cubins, strict=True)
        ]
    kernels += [("triton", *told, cubin) for cubin, told in recorder.cubins.items()]
    (folder / "code").mkdir(parents=True, exist_ok=True)
    lines = {}
    for compiler, name, case, cubin in kernels:
        code = machine_code(cubin)
        key = hashlib.sha256(code.encode()).hexdigest()[:16]
        (folder / "code" / f"{key}.txt").write_text(code)
        lines.setdefault(
            (compiler, name, key), f"{key} {compiler} {name} | {case} | {resources(cubin)}"
        )
    write_text(folder / LIST, "\n".join(lines.values()) + "\n")
    print(f"{len(lines)} kernels in {folder / LIST}")


def kernels_of(folder: Path) -> list[str]:
    """The lines of a finished folder's kernels.txt; exits with a message if there is none."""
    file = folder / LIST
    if not file.is_file():
        sys.exit(
            f"{folder}: expected a finished folder of --output, but it has no {LIST} (still being written, "
            "or interrupted); write it again with --output"
        )
    return file.read_text().splitlines()


def compare(before: Path, after: Path) -> bool:
    """Print what is in one only; whether there is nothing."""
    texts = [kernels_of(folder) for folder in (before, after)]
    hashes = [Counter(line.split()[0] for line in text) for text in texts]
    same = True
    for folder, text, other in zip((before, after), texts, reversed(hashes), strict=True):
        alone = [line for line in text if line.split()[0] not in other]
        same = same and not alone
        print(f"{folder}: {len(text)} kernels, {len(alone)} of them here only")
        print("".join(f"  {line}\n" for line in alone), end="")
    return same


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder to write")
    parser.add_argument(
        "--only", default="", metavar="WORD", help="calls with this in their name: hopper"
    )
    parser.add_argument("--compare", type=Path, nargs=2, metavar="DIR")
    args = parser.parse_args()
    if args.compare:
        sys.exit(0 if compare(*args.compare) else 1)
    if not TOOL.exists():
        sys.exit(f"Nothing to disassemble with: this build of triton has no {TOOL.name}.")
    if args.output is None:
        parser.error("--output or --compare is needed.")
    write(args.output, args.only)


if __name__ == "__main__":
    main()
