"""Checkpoints that are written while training goes on, and models that are replaced."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from gka.data import byte_tokenizer
from gka.errors import InputError, StorageError
from gka.models import GKAConfig, GKAForCausalLM
from gka.models.decoder import GKAMLP
from gka.training import callbacks, priming, run
from gka.training import folder as files
from gka.training.checkpoints import SEAL, UNFINISHED

Run = Callable[..., dict[str, Any]]
Reference = tuple[Path, dict[str, Any]]
BACKGROUND = {"training": {"save_async": "on"}}


def write(monkeypatch: pytest.MonkeyPatch, step: int, before: Callable[[], None]) -> None:
    """Do something before the tensors of a step's checkpoint are written."""
    usual = dcp.FileSystemWriter.write_data

    def writing(self: Any, *arguments: Any) -> Any:
        if Path(self.path).name == f"checkpoint-{step}":
            before()
        return usual(self, *arguments)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", writing)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    usual = callbacks.Stopwatch.on_step_begin

    def begin(self: Any, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == step:
            action()
        usual(self, args, state, control, **others)

    monkeypatch.setattr(callbacks.Stopwatch, "on_step_begin", begin)


def same(metrics: dict[str, Any], output: Path, reference: Reference) -> None:
    for name in ("training", "evaluation"):
        losses = [
            [(r["step"], r["loss"]) for r in m["curves"][name]] for m in (metrics, reference[1])
        ]
        assert losses[0] == losses[1]
    ours, theirs = (load_file(p / "model" / "model.safetensors") for p in (output, reference[0]))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, run_tiny: Run) -> Reference:
    """A run of one process that writes sharded checkpoints in the background."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    return output, run_tiny(output, BACKGROUND)


def test_training_goes_on_while_a_checkpoint_is_written(
    run_tiny: Run, undisturbed: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors of checkpoint-4 are written after step 6; it is sealed, and the run ends bit for bit as one
    whose tensors were written at once."""
    reached = threading.Event()
    write(monkeypatch, 4, lambda: _assert(reached.wait(60)))
    at_step(monkeypatch, 6, reached.set)
    metrics = run_tiny(tmp_path / "run", BACKGROUND)
    same(metrics, tmp_path / "run", undisturbed)
    left = list((tmp_path / "run" / "checkpoints").iterdir())
    assert sorted(path.name for path in left) == ["checkpoint-12", "checkpoint-8"]
    assert all((path / SEAL).is_file() and not (path / UNFINISHED).exists() for path in left)


def test_a_full_disk_leaves_the_checkpoint_before(
    run_tiny: Run, undisturbed: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed write is told with folder and reason, and the checkpoint before it remains: the run goes on
    from there to the same result. One that was being written when a run ended is deleted."""
    output = tmp_path / "run"

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        write(patch, 8, full)
        told = r"checkpoint \S*checkpoint-8 cannot be written: No space left on device; .*--resume"
        with pytest.raises(StorageError, match=told):
            run_tiny(output, BACKGROUND)
    checkpoints = output / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-4"]
    half = checkpoints / "checkpoint-8"
    half.mkdir()
    (half / UNFINISHED).touch()
    metrics = run_tiny(output, BACKGROUND, resume=True)
    assert "checkpoint-8 was being written when the run ended; deleted" in metrics["shown"]
    assert "checkpoint-4" in metrics["shown"]
    same(metrics, output, undisturbed)


def _assert(fact: bool) -> None:
    assert fact


def test_settings_that_cannot_be(run_tiny: Run, tmp_path: Path) -> None:
    """gka prime, and CUDA graphs, write no checkpoint in the background; gka prime takes no [parallel]."""
    with pytest.raises(InputError, match=r"stage1\.save_async is 'on'; expected auto or off"):
        priming.PrimeConfig.from_tables({"stage1": {"save_async": "on"}})
    with pytest.raises(InputError, match="gka prime keeps the whole model"):
        priming.PrimeConfig.from_tables({"parallel": {"tp": 2}})
    with pytest.raises(InputError, match="save_async 'on': leave save_async out"):
        run_tiny(tmp_path / "run", {"training": {"save_async": "on", "compile": "cuda-graphs"}})
    assert not (tmp_path / "run").exists()


def test_tensorboard_is_missed_before_anything_is_tokenised(
    run_tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its package a run that asks for TensorBoard is refused at once."""
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(run, "open_text", lambda *_: _assert(False))
    with pytest.raises(InputError, match="tensorboard needs the package tensorboard"):
        run_tiny(tmp_path / "run", {"training": {"tensorboard": True}})
    assert not (tmp_path / "run").exists()


def test_a_saved_model_is_replaced_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that cannot be written leaves the one before; one that can replaces it."""
    sizes: dict[str, Any] = {"vocab_size": 257, "hidden_size": 16, "num_heads": 2, "head_dim": 8}
    model = GKAForCausalLM(GKAConfig(num_hidden_layers=1, **sizes))
    folder, tokenizer = tmp_path / "model", byte_tokenizer()
    files.save_model(model, tokenizer, folder)
    before = load_file(folder / "model.safetensors")
    names = {path.name for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save_pretrained", _no_space)
        with pytest.raises(StorageError, match=r"model .* cannot be written: No space"):
            files.save_model(model, tokenizer, folder)
    assert {path.name for path in folder.iterdir()} == names
    model.model.norm.weight.data.fill_(2.0)
    files.save_model(model, tokenizer, folder)
    after = load_file(folder / "model.safetensors")
    assert not after["model.norm.weight"].equal(before["model.norm.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def _no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_one_process_computes_in_the_dtype_of_the_run(
    run_tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of one process that writes sharded checkpoints multiplies in bfloat16 if it is asked to."""
    seen = set()
    usual = GKAMLP.forward

    def looked(self: Any, x: Any) -> Any:
        seen.add(self.up_proj(x).dtype)
        return usual(self, x)

    monkeypatch.setattr(GKAMLP, "forward", looked)
    run_tiny(tmp_path / "run", {"training": BACKGROUND["training"] | {"dtype": "bfloat16"}})
    assert seen == {torch.bfloat16}
