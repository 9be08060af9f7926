"""What the ranks of tests/parallel/test_transformers.py run: a saved model, split by transformers itself.

Arguments: the file for what was found, and a folder to write to.
"""

import json
import sys
import warnings
from logging import Handler
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from gka.errors import InputError
from gka.models import GKAConfig, GKAForCausalLM
from gka.parallel import Layout, make_mesh, parallelize

TOKENS = torch.arange(44).view(2, 22) % 40
SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "head_dim": 4, "num_heads": 4, "num_kv_heads": 2,
    "intermediate_size": 24, "num_iter": 3, "sliding_window": 8,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "mixers": {"mixers": ["gka", "attention", "swa", "gla", "deltanet", "gated_deltanet"]},
    "untied": {"mixers": ["gka", "attention"], "tie_word_embeddings": False, "num_kv_heads": 1},
    "odd vocabulary": {"mixers": ["gka"], "vocab_size": 41, "kv_rank": 3},
}


def saved(name: str, folder: Path) -> GKAForCausalLM:
    """The model on this process alone; rank 0 saves it."""
    torch.manual_seed(0)
    fields = SIZES | MODELS[name]
    model = GKAForCausalLM(GKAConfig(num_hidden_layers=len(fields["mixers"]), **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5) if parameter.ndim == 2 else None
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return model


def whole(x: Any) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(model: Any) -> dict[str, Tensor]:
    loss = model.train()(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    found = {f"d {n}": whole(p.grad) for n, p in model.named_parameters()}
    model.zero_grad()
    return found | {"loss": loss.detach()}


def results(model: Any) -> dict[str, Tensor]:
    """Logits, the loss and gradients in training mode, and tokens that it generates."""
    model.eval()
    found = {"logits": model(TOKENS).logits.detach()}
    with torch.no_grad():
        scores = model(TOKENS, labels=TOKENS).loss
        options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
        tokens = model.generate(TOKENS[:, :9], **options)
    return found | {"evaluated": scores, "tokens": tokens.double()} | gradients(model)


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    errors = [
        (ours[n] - theirs[n]).abs().max() / theirs[n].abs().max().clamp_min(1) for n in theirs
    ]
    found = torch.stack(errors).max()
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def split(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return GKAForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float64)


def main(found: Path, folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    said = Said()
    logging.disable_progress_bar()
    logging.get_logger("transformers").addHandler(said)
    told: dict[str, Any] = {}
    for name in MODELS:
        plain = saved(name, folder / name)
        expected = results(plain)
        model = split(folder / name)
        told[name] = worst(results(model), expected)
        told[f"{name}: local"] = sum(p.to_local().numel() for p in model.parameters())
        told[f"{name}: all"] = plain.num_parameters()
        model.save_pretrained(folder / f"{name} again")
        again = GKAForCausalLM.from_pretrained(folder / f"{name} again", dtype=torch.float64)
        ours, theirs = again.state_dict(), plain.state_dict()
        told[f"{name}: saved"] = all(ours[n].equal(theirs[n]) for n in theirs)
    told |= by_accelerate(folder / "mixers") | refused(folder)
    mesh = make_mesh(Layout(tp=dist.get_world_size()), "cpu")
    plain = saved("mixers", folder / "whole")
    expected = results(plain)
    told["parallelize"] = worst(results(parallelize(plain, mesh)), expected)
    told["warned"] = said.lines
    if dist.get_rank() == 0:
        found.write_text(json.dumps(told))
    dist.destroy_process_group()


class Said(Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: Any) -> None:
        self.lines.append(record.getMessage())


def by_accelerate(folder: Path) -> dict[str, float]:
    """AdamW steps through accelerate beside those of one process: the largest difference of weights."""
    ranks = dist.get_world_size()
    plain = GKAForCausalLM.from_pretrained(folder, dtype=torch.float64).train()
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    # accelerate takes it on GPUs alone; what follows the check runs on CPUs as well
    ParallelismConfig._validate_accelerator = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
    accelerator = Accelerator(cpu=True, parallelism_config=ParallelismConfig(tp_size=ranks))
    model = split(folder).train()
    model, ours = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for _ in range(2):
        for one, optimizer, backward in (
            (plain, theirs, lambda loss: loss.backward()), (model, ours, accelerator.backward)
        ):  # fmt: skip
            backward(one(input_ids=TOKENS, labels=TOKENS).loss)
            torch.nn.utils.clip_grad_norm_(one.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    now = {n: whole(p.detach()) for n, p in accelerator.unwrap_model(model).named_parameters()}
    return {"accelerate": worst(now, {n: p.detach() for n, p in plain.named_parameters()})}


def refused(folder: Path) -> dict[str, str]:
    """What is said to heads that do not divide among the ranks."""
    fields: dict[str, Any] = SIZES | {"mixers": ["gka"], "num_heads": 3, "num_kv_heads": 3}
    model = GKAForCausalLM(GKAConfig(num_hidden_layers=1, **fields))
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "three")
    dist.barrier()
    try:
        split(folder / "three")
    except InputError as error:
        return {"refused": str(error)}
    return {"refused": ""}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
