"""How far a call walks through the source: `python -m tests.house.walk`, with `--json FILE` for the figures.

A profile hook (`sys.setprofile`) sees every Python call and return. Of each walk it counts

- files: distinct files under the package whose code runs. What runs while a module is imported does not
  count, nor do kernels' sources, which no Python runs.
- returns: times that execution enters such a file, by a call into it or by a return to it, after it had
  entered that file before and left it for another. Frames of other packages between two of ours are
  looked through. Only the main thread is followed.

Walks on a GPU need none: its launches do nothing (pretend.py). "first" is a process's first call, which
compiles and looks up; "again" is the call after it. At commit 030ecda "forward, again" made 155 returns,
"input_ids on a CPU" 372 in 29 files and "gka generate" 1,251 in 50.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import gka

HOUSE = str(Path(gka.__file__).parent) + os.sep
ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
IMPORT = importlib._bootstrap._find_and_load.__code__  # pyright: ignore[reportAttributeAccessIssue]
TEXT = "Every token asks the whole past, and the past fades. " * 80
TINY = {
    "data.sequence_length": 32, "model.hidden_size": 32, "model.num_hidden_layers": 1, "model.num_heads": 2,
    "model.head_dim": 16, "training.max_steps": 3, "training.batch_size": 2, "training.warmup_steps": 1,
    "training.eval_steps": 3, "training.save_steps": 3,
}  # fmt: skip
NEW_TOKENS = 3


@dataclass
class Walk:
    """The profile hook, and what it has counted."""

    name: str
    files: set[str] = field(default_factory=set)
    returns: int = 0
    _here: str | None = None
    _imports: int = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event not in ("call", "return"):
            return
        if frame.f_code is IMPORT:
            self._imports += 1 if event == "call" else -1
        elif self._imports == 0 and frame.f_code.co_filename.startswith(HOUSE):
            self._enter(frame if event == "call" else frame.f_back)

    def _enter(self, frame: FrameType | None) -> None:
        """Execution is now in the innermost frame of ours from `frame` outwards."""
        while frame is not None and not frame.f_code.co_filename.startswith(HOUSE):
            frame = frame.f_back
        if frame is None or frame.f_code.co_filename == self._here:
            return
        self._here = frame.f_code.co_filename
        self.returns += self._here in self.files
        self.files.add(self._here)

    def during(self, call: Callable[[], Any]) -> Any:
        """The result of the call, with its walk counted."""
        sys.setprofile(self)
        try:
            return call()
        finally:
            sys.setprofile(None)

    def told(self) -> dict[str, Any]:
        names = sorted(path.removeprefix(HOUSE) for path in self.files)
        return {"walk": self.name, "files": len(names), "returns": self.returns, "names": names}


def layer_on_hopper(folder: Path) -> list[Walk]:
    """Both passes of a `GatedKalmaNet` of K = V = 128 in bfloat16, without a cache."""
    from tests.house.pretend import hopper

    layer = gka.GatedKalmaNet(hidden_size=256, head_dim=128, num_heads=2, layer_idx=0).bfloat16()
    x = torch.randn(1, 192, 256, dtype=torch.bfloat16)
    walks = []
    with hopper():
        for time in ("first", "again"):
            forward, backward = Walk(f"forward, {time}"), Walk(f"backward, {time}")
            y = forward.during(lambda: layer(x)[0])
            from gka.ops import last_backend

            assert last_backend() == "hopper", last_backend()
            total = y.float().sum()
            backward.during(total.backward)
            walks += [forward, backward]
    return walks


def layer_on_cpu(folder: Path) -> list[Walk]:
    """`input_ids` through a language model of one layer, its states kept."""
    torch.manual_seed(0)
    config = gka.GKAConfig(
        vocab_size=64, hidden_size=64, head_dim=32, num_heads=2, num_hidden_layers=1
    )
    model, ids = gka.GKAForCausalLM(config), torch.arange(16)[None]
    walk = Walk("input_ids on a CPU")
    walk.during(lambda: model(input_ids=ids, use_cache=True))
    return [walk]


def command(*arguments: str) -> None:
    """The command `gka` of this checkout, quietly."""
    module, function = PYPROJECT["project"]["scripts"]["gka"].split(":")
    sys.argv = ["gka", *arguments]
    told = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            getattr(importlib.import_module(module), function)()
        except SystemExit as end:
            if end.code:
                told.seek(0)
                raise RuntimeError(f"gka {' '.join(arguments)}\n{told.read()}") from None


def train(folder: Path) -> list[Walk]:
    """Three steps on a short text, to a saved model."""
    (folder / "text.txt").write_text(TEXT)
    settings = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    walk = Walk("gka train")
    arguments = ("train", str(folder / "text.txt"), "--output", str(folder / "run"), *settings)
    walk.during(lambda: command(*arguments))
    return [walk]


def generate(folder: Path) -> list[Walk]:
    """Three new tokens from the model that `train` makes."""
    started = [sys.executable, "-m", "tests.house.walk", "--only", "train", str(folder)]
    subprocess.run(started, check=True, stdout=subprocess.DEVNULL)
    walk = Walk("gka generate")
    options = ("--prompt", "Every", "--max-new-tokens", str(NEW_TOKENS))
    walk.during(lambda: command("generate", str(folder / "run"), *options))
    return [walk]


WALKS = {walk.__name__: walk for walk in (layer_on_hopper, layer_on_cpu, generate, train)}


def alone(name: str) -> list[dict[str, Any]]:
    """The walks of a process of their own, where nothing has been called before."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.house.walk", "--only", name, folder]
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TRITON_INTERPRET": "0"}
        env["OMP_NUM_THREADS"] = "1"
        told = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    if told.returncode:
        raise RuntimeError(f"{name}:\n{told.stderr}")
    return json.loads(told.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--files", action="store_true", help="name the files of each walk")
    parser.add_argument(
        "--only", nargs=2, metavar=("WALKS", "FOLDER"), help="of this process, as JSON"
    )
    args = parser.parse_args()
    if args.only:
        walks = WALKS[args.only[0]](Path(args.only[1]))
        print(json.dumps([walk.told() for walk in walks]))
        return
    found = [walk for name in WALKS for walk in alone(name)]
    for walk in found:
        print(
            f"{walk['walk']:<20} {walk['files']:>4} files {walk['returns']:>6} returns", flush=True
        )
        if args.files:
            print("\n".join(f"    {name}" for name in walk["names"]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
