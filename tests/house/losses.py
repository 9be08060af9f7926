"""Losses of short training runs, bit for bit: `python -m tests.house.losses`, `--json FILE` keeps them.

On the CPU, `gka train --recipe cpu` of this checkout, cut short, in float32 and in bfloat16: the loss of
every step as a hexadecimal float, and a hash of the weights at the end, which holds every gradient. With a
CUDA device also a small model by each backend that it has. One thread, fixed seeds, deterministic
algorithms: a change that is said to leave the arithmetic alone leaves these alone too.

`--compare FILE` runs, and ends with an error where a figure differs from the file's.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts

import torch
import transformers
from safetensors.torch import load_file
from tests.house.walk import command
from torch import Tensor

import gka
from gka.training import TrainingConfig

Figures = dict[str, list[str] | str]
# "precision" until it was given the name that models give it
DTYPE = next(n for n in ("dtype", "precision") if n in TrainingConfig.__dataclass_fields__)
GPU_RUNS = (("hopper", torch.bfloat16), ("triton", torch.bfloat16), ("triton", torch.float32))


def digest(weights: dict[str, Tensor]) -> str:
    """A hash of names and bits."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode())
        found.update(weights[name].detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def of_recipe(dtype: str, steps: int) -> Figures:
    """The first steps of the recipe for CPUs, as the command trains them."""
    losses: list[str] = []
    step = transformers.Trainer.training_step

    def noted(self, *args, **options):
        loss = step(self, *args, **options)
        losses.append(float(loss).hex())
        return loss

    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": steps, "warmup_steps": 4, "eval_steps": steps, "save_steps": steps}
        words = [w for k, n in settings.items() for w in ("--set", f"training.{k}={n}")]
        words += ["--set", f'training.{DTYPE}="{dtype}"', "--output", f"{folder}/run"]
        with patch.object(transformers.Trainer, "training_step", noted):
            command("train", "--recipe", "cpu", *words)
        written = Path(folder, "run").glob("**/model.safetensors")
        weights = min(written, key=lambda path: len(path.parts))  # the others are checkpoints
        return {"losses": losses, "weights": digest(load_file(weights))}


def on_gpu(backend: str, dtype: torch.dtype, steps: int) -> Figures:
    """Two layers with K = V = 128 on drawn tokens."""
    torch.manual_seed(0)
    config = gka.GKAConfig(
        vocab_size=256, hidden_size=256, head_dim=128, num_heads=2, num_hidden_layers=2
    )
    model: Any = gka.GKAForCausalLM(config)
    model = model.to("cuda", dtype)
    for module in model.modules():
        if isinstance(module, gka.GatedKalmaNet):
            module.backend = backend
    ids = torch.randint(0, 256, (steps, 2, 512), generator=torch.Generator().manual_seed(1)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in ids:
        loss = model(input_ids=batch, labels=batch).loss
        assert gka.last_backend() == backend
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss).hex())
    return {"losses": losses, "weights": digest(model.state_dict())}


def figures(steps: int) -> Iterator[tuple[str, Figures]]:
    """Every run's, by its name."""
    torch.set_num_threads(1)
    for name in ("float32", "bfloat16"):
        yield f"cpu recipe, {name}", of_recipe(name, steps)
    if not torch.cuda.is_available():
        return
    torch.use_deterministic_algorithms(True)
    for backend, dtype in GPU_RUNS:
        name = f"{torch.cuda.get_device_name()}, {backend}, {str(dtype).removeprefix('torch.')}"
        if gka.why_unavailable(backend, "cuda", dtype) is None:
            yield name, on_gpu(backend, dtype, steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--compare", type=Path, help="a file that --json wrote")
    args = parser.parse_args()
    before = json.loads(args.compare.read_text()) if args.compare else {}
    found, different = {}, []
    for name, run in figures(args.steps):
        found[name] = run
        verdict = ""
        if name in before:
            verdict = "as before" if before[name] == run else "DIFFERENT"
            different += [name] if before[name] != run else []
        print(
            f"{name}: last loss {run['losses'][-1]}, weights {run['weights']} {verdict}", flush=True
        )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
