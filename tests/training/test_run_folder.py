"""The folder of a run: one writer, settings as they were, and nothing lost on a full disk."""

import json
import os
import pickle
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from gka.checkpoints import save_as
from gka.checkpoints.open import load_gka
from gka.data.text import byte_tokenizer
from gka.errors import InputError, StorageError
from gka.storage import only_writer
from gka.training import RunConfig
from gka.training import folder as files
from gka.training.checkpoints import SEAL, fault, seal
from gka.training.priming import PrimeConfig

Run = Callable[..., dict[str, Any]]
Reference = tuple[Path, dict[str, Any]]
WEIGHTS = "model.safetensors"


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes; Python ignores SIGXFSZ, so that it is an error as of a disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def unfinished(reference: Reference, tmp_path: Path) -> Path:
    """The undisturbed run without its results: checkpoints 8 and 12."""
    output = Path(shutil.copytree(reference[0], tmp_path / "run"))
    shutil.rmtree(output / "model")
    (output / "metrics.json").unlink()
    return output


def same_model(output: Path, reference: Reference) -> bool:
    ours, theirs = (load_file(p / "model" / WEIGHTS) for p in (output, reference[0]))
    return all(ours[name].equal(theirs[name]) for name in theirs)


def test_a_second_run_is_refused(
    run_tiny: Run, run_prime: Run, reference: Reference, tmp_path: Path
) -> None:
    """While a process writes a run, `train` and `prime` refuse its folder, new or to be resumed; nothing in
    it changes."""
    output = unfinished(reference, tmp_path)
    for folder, options in ((tmp_path / "new", {}), (output, {"resume": True})):
        with only_writer(folder):
            before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
            for run in (run_tiny, run_prime) if not options else (run_tiny,):
                with pytest.raises(InputError, match=f"written by process {os.getpid()} on host"):
                    run(folder, **options)
            assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("table", "key", "value", "message"),
    [
        ("training", "learning_rate", 0.02, "its settings have changed since the run began"),
        ("training", "max_steps", 13, "its settings have changed since the run began"),
        ("model", "hidden_size", 24, "its settings have changed since the run began"),
        ("model", "num_iter", 1e9, "its settings have changed since the run began"),
        ("training", "learning_rate", "high", "training.learning_rate is 'high'; expected of type"),
        (
            "training",
            "learning_rate",
            float("inf"),
            "training.learning_rate is inf; expected a finite",
        ),
        ("training", "seed", 10**20, "expected 4294967295 or less"),
        ("training", "batch_size", 0, "training.batch_size is 0; expected 1 or more"),
        ("training", "lr", 1, "unknown key training.lr"),
        ("data", "text", 3, "data.text is 3; expected a list of strings"),
        ("data", "sequence_length", None, "data.sequence_length is None; expected of type int"),
        ("data", None, 3, "data is 3; expected a table"),
        ("more", None, {}, "is of another command: its tables are"),
    ],
)
def test_settings_edited_by_hand_are_not_believed(
    reference: Reference, tmp_path: Path, table: str, key: str | None, value: Any, message: str
) -> None:
    """Any setting that is not as it was written, of another type or out of range is one line that names
    run.json or the setting."""
    output = Path(shutil.copytree(reference[0], tmp_path / "run"))
    content = json.loads((output / "run.json").read_text())
    if key is None:
        content["config"][table] = value
    else:
        content["config"][table][key] = value
    (output / "run.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        files.resumed_config(output, {}, RunConfig)
    assert len(str(caught.value).splitlines()) == 1


def test_sources_may_move(reference: Reference, text: Path, tmp_path: Path) -> None:
    """The place of the text may be edited in run.json: what lies there has a checksum of its own."""
    output = Path(shutil.copytree(reference[0], tmp_path / "run"))
    content = json.loads((output / "run.json").read_text())
    content["config"]["data"]["text"] = [str(shutil.copytree(text, tmp_path / "moved"))]
    (output / "run.json").write_text(json.dumps(content))
    assert files.resumed_config(output, {}, RunConfig).data.text == (str(tmp_path / "moved"),)


def test_settings_of_a_priming_run_are_not_believed_either(
    primed: Reference, tmp_path: Path
) -> None:
    """The same holds for `gka prime`, the new mixers' options among them."""
    output = tmp_path / "run"
    output.mkdir()
    for table, key, value in (("mixer", "num_iter", 5), ("stage2", "learning_rate", 1.0)):
        content = json.loads((primed[0] / "run.json").read_text())
        content["config"][table][key] = value
        (output / "run.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match="its settings have changed since the run began"):
            files.resumed_config(output, {}, PrimeConfig)


def test_a_model_that_does_not_fit_its_checkpoint(
    run_tiny: Run, reference: Reference, tmp_path: Path
) -> None:
    """Settings of a run without their checksum (of an older release) that do not fit the checkpoint are one
    line that names it."""
    output = unfinished(reference, tmp_path)
    content = json.loads((output / "run.json").read_text())
    del content["config_sha256"]
    (output / "run.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"checkpoint-12 cannot be loaded: .* does not fit"):
        run_tiny(output, {"model": {"hidden_size": 24}}, resume=True)


@pytest.mark.parametrize("name", [WEIGHTS, "optimizer.pt", "scheduler.pt", SEAL])
def test_a_full_disk_in_a_checkpoint_loses_nothing(
    run_tiny: Run,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Whichever file the disk has no room for, the run ends with one line that names the checkpoint, of which
    nothing is left; the ones before are whole, and resuming from them gives the same model."""
    output, save = tmp_path / "run", Trainer._save_checkpoint
    size = (reference[0] / "checkpoints" / "checkpoint-12" / name).stat().st_size

    def full(self: Any, model: Any, trial: Any) -> None:
        with files_up_to(size - 1 if self.state.global_step == 8 else resource.RLIM_INFINITY):
            save(self, model, trial)

    def full_seal(folder: Path, parts: Any = None) -> None:
        with files_up_to(size - 1 if folder.name == "checkpoint-8" else resource.RLIM_INFINITY):
            seal(folder, parts)

    with monkeypatch.context() as patch:
        if name == SEAL:
            patch.setattr("gka.training.checkpoints.seal", full_seal)
        else:
            patch.setattr(Trainer, "_save_checkpoint", full)
        with pytest.raises(StorageError, match=r"checkpoint-8.* cannot be written: ") as caught:
            run_tiny(output)
    assert len(str(caught.value).splitlines()) == 1
    assert fault(output / "checkpoints" / "checkpoint-4") is None
    assert (output / "checkpoints" / "checkpoint-8").exists() == (name == SEAL)
    run_tiny(output, resume=True)
    assert same_model(output, reference)
    left = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert left == ["checkpoint-12", "checkpoint-8"]


def test_a_full_disk_at_the_end_loses_nothing(
    run_tiny: Run, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room for the final model, or for a converted one: one line that names it, nothing half-written, and
    the checkpoints are there to go on from."""
    output = unfinished(reference, tmp_path)
    save = files.save_model

    def full(model: Any, tokenizer: Any, folder: Path) -> None:
        with files_up_to(1000):
            save(model, tokenizer, folder)

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_model", full)
        with pytest.raises(
            StorageError, match=rf"model {output}/model cannot be written: .*--resume"
        ):
            run_tiny(output, resume=True)
    assert {p.name for p in output.iterdir()} == {
        "checkpoints",
        "log.jsonl",
        "loss.png",
        "run.json",
    }
    run_tiny(output, resume=True)
    assert same_model(output, reference)
    model = load_gka(output)
    for format in ("gka", "fla"):
        target = tmp_path / "converted" / "model"
        with (
            files_up_to(10_000),
            pytest.raises(StorageError, match=f"model {target} cannot be writ"),
        ):
            save_as(model, target, format)
        assert not list(target.parent.iterdir())


class Payload:
    """Makes a file where it is unpickled by a reader that runs what it reads."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_payloads_in_sealed_checkpoints_are_one_line(
    run_tiny: Run, reference: Reference, tmp_path: Path, name: str
) -> None:
    """A file of a checkpoint that holds code, sealed again by who put it there, is refused and never run."""
    output, mark = unfinished(reference, tmp_path), tmp_path / "ran"
    shutil.rmtree(
        output / "checkpoints" / "checkpoint-12"
    )  # the one after its last step is not loaded whole
    checkpoint = output / "checkpoints" / "checkpoint-8"
    torch.save({"state": Payload(mark)}, checkpoint / name)
    seal(checkpoint)
    with pytest.raises(
        InputError, match=r"checkpoint-8 cannot be loaded: .*none of their code was run"
    ):
        run_tiny(output, resume=True)
    assert not mark.exists()
    assert pickle.loads(pickle.dumps(Payload(mark))) is None and mark.exists()  # it would have run


@pytest.mark.parametrize("content", [b"{}", b'{"global_step": "x"}', b"[1", b"{" * 100000])
def test_states_of_the_trainer_that_make_no_sense_are_one_line(
    run_tiny: Run, reference: Reference, tmp_path: Path, content: bytes
) -> None:
    """A trainer_state.json that was altered and sealed again is refused by the checkpoint's name."""
    output = unfinished(reference, tmp_path)
    checkpoint = output / "checkpoints" / "checkpoint-12"
    (checkpoint / "trainer_state.json").write_bytes(content)
    seal(checkpoint)
    with pytest.raises(InputError, match=r"checkpoint-12 cannot be loaded: "):
        run_tiny(output, resume=True)


def test_metrics_that_lack_figures_are_refused(reference: Reference, tmp_path: Path) -> None:
    """The account of a complete run is shown whole or refused by its name."""
    from gka.training import run

    with pytest.raises(
        InputError, match=r"metrics\.json does not hold the metrics of a complete run"
    ):
        files.drawn(run.table, {"model": {}}, tmp_path)
    assert files.drawn(run.table, reference[1], tmp_path).row_count == 7


def test_a_model_larger_than_the_memory_is_refused(tmp_path: Path) -> None:
    """Weights that this machine cannot hold are refused before they are made."""
    from gka.training.run import build_model

    model = {"hidden_size": 1 << 20, "num_hidden_layers": 10_000, "num_heads": 16}
    config = RunConfig.from_tables({"model": {**model, "head_dim": 64}})
    with pytest.raises(InputError, match=r"\[model\]: .* parameters or more take .* GiB"):
        build_model(config, byte_tokenizer())
