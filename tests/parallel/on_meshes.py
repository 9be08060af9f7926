"""What the ranks of tests/parallel/test_meshes.py run: one model on several meshes, beside one process."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from gka.errors import InputError
from gka.layers import DECAY_PARAMETERS, parameter_groups
from gka.models import GKAConfig, GKAForCausalLM
from gka.parallel import (
    ContextParallel,
    Layout,
    clip_grad_norm_,
    load_state,
    make_mesh,
    materialize,
    parallelize,
    save_state,
    start,
    whole_weights,
)
from gka.parallel.pipeline import pipeline
from gka.training import RunConfig, train

ROWS, TOKENS, WORDS, STEPS = 8, 20, 40, 3
SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 16, "head_dim": 4, "num_heads": 4, "num_kv_heads": 2,
    "intermediate_size": 24, "num_iter": 3, "sliding_window": 8, "mixers": ["gka", "attention"],
}  # fmt: skip
ALL_MIXERS = ["gka", "attention", "swa", "gla", "deltanet", "gated_deltanet"]
MODELS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "mixers": {"mixers": ALL_MIXERS, "mixer_overrides": {"swa": {"use_short_conv": True}}},
    "one kv head": {"mixers": ["gka", "attention"], "num_kv_heads": 1, "sketch_dim": 2},
    "odd vocabulary": {"mixers": ["gka"], "vocab_size": 43, "tie_word_embeddings": False},
    "untied": {"mixers": ["gka"], "tie_word_embeddings": False},
    "value heads": {"mixers": ["gka"], "num_kv_heads": None, "num_v_heads": 8, "sketch_dim": 3},
    "expansion": {"mixers": ["gka"], "kv_rank": 3},
    "mixed expansion": {"mixers": ["gka"], "kv_rank": 3, "kv_mix": True},
}


def build(name: str) -> GKAForCausalLM:
    torch.manual_seed(0)
    fields: dict[str, Any] = SIZES | MODELS[name]
    model = GKAForCausalLM(GKAConfig(num_hidden_layers=len(fields["mixers"]), **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5) if parameter.ndim == 2 else None
    return model.train()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return list(torch.randint(WORDS, (STEPS, ROWS, TOKENS), generator=generator))


def whole(x: Any) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def trained(
    model: Any, layout: Layout, rank: int, optimizer: Any = None, mesh: Any = None
) -> list[dict[str, Tensor]]:
    """For each step this rank's loss, all gradients before clipping and their norm; then the weights.

    Args:
        mesh: whose ranks cp split rows.
    """
    optimizer = optimizer or torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)
    share = ROWS // layout.readers
    found = []
    for batch in batches():
        rows = batch[share * layout.reader(rank) :][:share]
        count = ROWS * (TOKENS - 1)
        call: dict[str, Any] = {"input_ids": rows, "labels": rows}
        if layout.cp > 1:
            context = ContextParallel.even(mesh["cp"], TOKENS, chunk_size=4)
            call = {name: context.shard(x) for name, x in call.items()} | {"context": context}
        loss = model(**call, num_items_in_batch=count).loss * layout.readers
        loss.backward()
        step = {f"d {n}": whole(p.grad).clone() for n, p in model.named_parameters()}
        step["norm"] = clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        found.append(step | {"loss": loss.detach()})
    found.append({n: whole(p.detach()).clone() for n, p in model.named_parameters()})
    return found


def worst(job: Any, ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> float:
    """The largest difference on any rank, relative to a tensor's largest entry, or to 0.01 if it is less."""
    errors = []
    for a, b in zip(ours, theirs, strict=True):
        if "loss" in a:
            a["loss"] = torch.tensor(sum(job.gather(float(a["loss"]))) / job.ranks)
        assert a.keys() == b.keys()
        errors += [float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp_min(1e-2)) for n in b]
    return max(job.gather(max(errors)))


def main(found: Path, cases: list[Any]) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    job = start("cpu")
    results, references = {}, {}
    for name, sizes, recompute in cases:
        if name not in references:
            references[name] = trained(build(name), Layout(), 0)
        layout, model = Layout(*sizes), build(name)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        mesh = make_mesh(layout, "cpu")
        parallelize(model, mesh)
        results[f"{name}: {layout}{' recomputed' * recompute}"] = worst(
            job, trained(model, layout, job.rank, mesh=mesh), references[name]
        )
    if job.ranks == 4:
        results["resumed"] = resumed(job, found.parent / "state")
        results["pipeline"] = pipelined(job)
        results["training"] = training(job, found.parent / "runs")
        results |= policies(job) | refused(job)
    if job.is_main:
        found.write_text(json.dumps(results))
    job.finish()


def resumed(job: Any, folder: Path) -> float:
    """Difference of a run saved after its steps on one mesh, loaded and continued on another."""
    first, second = Layout(dp_shard=4), Layout(dp_shard=2, tp=2)
    model = parallelize(build("hybrid"), make_mesh(first, "cpu"))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2)
    trained(model, first, job.rank, optimizer)
    if job.is_main:
        folder.mkdir()
    job.wait()
    save_state(folder, model, optimizer)
    with torch.device("meta"):
        other = build("hybrid")
    parallelize(other, make_mesh(second, "cpu"))
    materialize(other, "cpu", seed=1)
    fresh = torch.optim.AdamW(parameter_groups(other, 0.1), lr=1e-2)
    load_state(folder, other, fresh)
    plain = build("hybrid")
    one = torch.optim.AdamW(parameter_groups(plain, 0.1), lr=1e-2)
    trained(plain, Layout(), 0, one)
    return worst(job, trained(other, second, job.rank, fresh), trained(plain, Layout(), 0, one))


def training(job: Any, folder: Path) -> dict[str, Any]:
    """Curves of two runs of one global batch, with rows whole and with rows over two ranks."""
    os.environ["GKA_CACHE"] = str(folder / "cache")
    text = folder / "text"
    if job.is_main:
        text.mkdir(parents=True)
        for i in range(40):
            (text / f"{i:02}.txt").write_text(
                f"one two {i:03} three {i * 7919 % 1000:03}\n" * (1 + i % 9)
            )
    job.wait()
    usual = {
        "data": {"text": [str(text)], "sequence_length": 100, "eval_fraction": 0.2},
        "model": {"hidden_size": 16, "num_heads": 2, "num_iter": 3, "attention_layers": [1]},
    }
    found = {}
    for name, cp, batch in (("whole", 1, 1), ("split", 2, 2)):
        steps = {
            "max_steps": 3,
            "log_steps": 1,
            "eval_steps": 2,
            "save_steps": 3,
            "warmup_steps": 1,
        }
        tables = {"training": steps | {"batch_size": batch}, "parallel": {"cp": cp}}
        config = RunConfig.from_tables(usual | tables)
        found[name] = train(config, folder / name, console=Console(quiet=True))["curves"]
    too_many = RunConfig.from_tables(usual | {"parallel": {"cp": 4}})
    try:
        train(too_many, folder / "short", console=Console(quiet=True))
    except InputError as error:
        found["short"] = [str(error), (folder / "short").exists()]
    return found


def pipelined(job: Any) -> float:
    """Difference of 1F1B's loss and gradients over four stages from one process's."""

    def make() -> GKAForCausalLM:
        torch.manual_seed(0)
        fields: dict[str, Any] = SIZES | {"mixers": ["gka", "attention", "gla", "gka", "deltanet"]}
        return GKAForCausalLM(GKAConfig(num_hidden_layers=5, tie_word_embeddings=False, **fields))

    batch, plain = batches()[0], make().train()
    loss = plain(input_ids=batch, labels=batch).loss
    loss.backward()
    expected = {n: p.grad for n, p in plain.named_parameters()}
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (4,), mesh_dim_names=("pp",))
    stage, schedule = pipeline(make().train(), mesh, "cpu", microbatches=4)
    losses: list[Tensor] = []
    if stage.is_first:
        schedule.step(batch)
    elif stage.is_last:
        schedule.step(target=batch, losses=losses)
    else:
        schedule.step()
    errors = [float((p.grad - expected[n]).abs().max()) for n, p in stage.named_parameters()]  # pyright: ignore
    if losses:
        errors.append(abs(float(torch.stack(losses).mean() - loss)))
    return max(job.gather(max(errors)))


def policies(job: Any) -> dict[str, Any]:
    """Dtypes under a bfloat16 policy, and whether a start without memory gives the same on every mesh."""
    seen: dict[str, torch.dtype] = {}

    def look(module: Any, *_: Any) -> None:
        for name, parameter in module.named_parameters():
            seen[name] = parameter.dtype

    torch.set_default_dtype(torch.float32)
    model = parallelize(build("hybrid"), make_mesh(Layout(dp_shard=4), "cpu"), dtype=torch.bfloat16)
    body: Any = model.model
    layers = body.layers
    layers[0].mixer.register_forward_pre_hook(look)
    rows = batches()[0][job.rank :: 4]
    model(input_ids=rows, labels=rows).loss.backward()
    narrow = {n.rpartition(".")[2] for n, dtype in seen.items() if dtype == torch.bfloat16}
    gradients = {str(p.grad.dtype) for p in model.parameters() if p.grad is not None}
    decays = [str(seen[n]) for n in seen if n.endswith(DECAY_PARAMETERS)]
    made = []
    for sizes in ((1, 4, 1, 1), (2, 1, 1, 2)):
        with torch.device("meta"):
            empty = build("hybrid")
        parallelize(empty, make_mesh(Layout(*sizes), "cpu"))
        materialize(empty, "cpu", seed=3)
        made.append(whole_weights(empty))
    same = all(made[0][n].equal(made[1][n]) for n in made[0])
    return {
        "narrow": sorted(narrow),
        "decays": decays,
        "gradients": sorted(gradients),
        "meta": same,
    }


def refused(job: Any) -> dict[str, str]:
    """What is said to meshes that do not fit, to ranks that differ and to an error of one rank."""

    def failing() -> None:
        with job.together():
            if job.rank == 2:
                raise InputError("its disk is full")

    tried: dict[str, Any] = {
        "ranks": lambda: Layout.fitted(4, tp=3),
        "heads": lambda: parallelize(build("value heads"), make_mesh(Layout(tp=4), "cpu")),
        "uneven": lambda: parallelize(_of_six_heads(), make_mesh(Layout(tp=4), "cpu")),
        "differs": lambda: job.agree({"code": "a" if job.rank != 3 else "b"}),
        "fails": failing,
    }
    said = {}
    for name, call in tried.items():
        try:
            call()
            said[name] = ""
        except InputError as error:
            said[name] = str(error)
    assert job.any(job.rank) == 3
    every = job.gather(said)
    assert all(one == every[0] for one in every)  # all ranks end alike
    return said


def _of_six_heads() -> GKAForCausalLM:
    fields: dict[str, Any] = SIZES | {"mixers": ["gka"], "num_heads": 6, "num_kv_heads": 3}
    return GKAForCausalLM(GKAConfig(num_hidden_layers=1, **fields))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
