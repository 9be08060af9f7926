"""One priming run, from a Transformer to a trained hybrid and its report."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase, Trainer, set_seed

from gka.checkpoints.open import load_gka, model_folder
from gka.console import status
from gka.errors import InputError
from gka.models import GKAForCausalLM
from gka.models.replacement import Start, replace_attention
from gka.parallel import joined
from gka.storage import read_json, sha256_of, write_json
from gka.training import folder as files
from gka.training.loop import fit, recompute_layers, tokens_of_a_step
from gka.training.priming import report
from gka.training.priming.config import MatchingConfig, PrimeConfig, RecoveryConfig
from gka.training.priming.inputs import (
    HeldOut,
    check_layers,
    chosen_layers,
    held_out,
    open_blocks,
    open_tokenizer,
)
from gka.training.priming.matching import Matching, freeze_others
from gka.training.priming.recovery import RecoveryTrainer, check_adapters, with_adapters
from gka.training.telemetry import check_tensorboard

Probe = Callable[[str, "GKAForCausalLM", "PreTrainedTokenizerBase"], dict[str, float]]
"""Function of (phase, model, tokenizer) that measures further figures for the report."""

TEACHER, INITIAL, STAGE1, STAGE2 = "teacher", "initial", "stage1", "stage2"


@dataclass
class Job:
    """A run with its inputs, opened and checked.

    Attributes:
        config: the settings.
        output: the run's folder.
        console: where progress is shown.
        resume: whether a run in `output` is continued.
        tokenizer: the one of the settings, else the teacher's.
        blocks: training blocks and held-out blocks.
        held: the measurements on the latter.
        about: the metrics so far, as in report/report.json.
        probe: measures further figures.
    """

    config: PrimeConfig
    output: Path
    console: Console
    resume: bool
    tokenizer: PreTrainedTokenizerBase
    blocks: tuple[Any, Any]
    held: HeldOut
    about: dict[str, Any]
    probe: Probe | None

    def note(self) -> None:
        """Write `about` to report/report.json."""
        if files.is_main_process():
            write_json(self.output / files.REPORT / report.JSON, self.about)

    def measure(self, phase: str, model: GKAForCausalLM) -> None:
        """Measure a phase's model, unless `about` has its figures."""
        known = self.about["phases"]
        if phase not in known:
            with status(self.console, f"measuring: {phase}"):
                known[phase] = self.held.figures(model)
            self.note()
            self._show(phase)
        if self.probe is not None and "probe" not in known[phase]:
            known[phase]["probe"] = self.probe(phase, model, self.tokenizer)
            self.note()

    def _show(self, phase: str) -> None:
        found = self.about["phases"][phase]
        self.console.print(
            f"{phase:8} loss {found['loss']:.4f}  bits per byte {found['bits_per_byte']:.4f}",
            highlight=False,
        )


def prime(
    config: PrimeConfig,
    output: Path,
    *,
    console: Console,
    resume: bool = False,
    overwrite: bool = False,
    probe: Probe | None = None,
    picture: bool = True,
) -> dict[str, Any]:
    """Replace attention layers of a model, train the hybrid, write the run and return its metrics.

    Args:
        config: the run.
        output: folder of the run, new or empty unless `resume` or `overwrite`.
        console: where progress is shown.
        resume: continue the run in `output` where it stopped.
        overwrite: delete the run in `output` first.
        probe: measures further figures of each phase's model.
        picture: draw the report's picture (needs matplotlib).

    Raises:
        InputError: an argument cannot be used (nothing is deleted then), or a loss is not finite.
        Interrupted: after SIGINT, SIGTERM or SIGHUP, once the checkpoint is written.
        LostRank: another process of the job has ended without a word.
    """
    with (
        joined(f"Resume: gka prime --resume --output {output}"),
        files.open_output(output, console, resume=resume, overwrite=overwrite) as complete,
    ):
        if complete is not None:
            return complete
        teacher = load_teacher(config.prime.teacher)
        job = _opened(config, output, console, resume, teacher, probe)
        return _primed(job, teacher, overwrite=overwrite, picture=picture)


def _primed(job: Job, teacher: GKAForCausalLM, *, overwrite: bool, picture: bool) -> dict[str, Any]:
    """`prime`, after the folder was locked and the inputs were opened."""
    config, output, resume = job.config, job.output, job.resume
    checksums = {"tokens_sha256": _checksum(job), "teacher_sha256": teacher_checksum(config)}
    files.begin(config, output, checksums, resume=resume, overwrite=overwrite)
    job.about = _about(job)
    hybrid = _matched(job, teacher)
    if config.stage2.max_steps:
        hybrid = _recovered(job, hybrid)
    metrics = report.completed(job.about, hybrid)
    if files.is_main_process():
        files.save_model(hybrid, job.tokenizer, output / files.MODEL)
        report.write(metrics, output / files.REPORT, picture=picture)
        write_json(output / files.METRICS, metrics)  # last: it marks the run as complete
    return metrics


def load_teacher(name: str) -> GKAForCausalLM:
    """The model in a folder, of any format that `GKAForCausalLM` reads, in float32 on this process's device.

    Raises:
        InputError: there is none, or it is damaged or incomplete.
    """
    try:
        return load_gka(Path(name), dtype="float32", device=device())
    except InputError as error:
        raise InputError(f"teacher: {error}") from error


def device() -> torch.device:
    """This process's device, the one that the Trainer chooses."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def teacher_checksum(config: PrimeConfig) -> str:
    """SHA-256 over the teacher's configuration and weights."""
    folder = model_folder(Path(config.prime.teacher))
    paths = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256(" ".join(map(sha256_of, paths)).encode()).hexdigest()


def _opened(
    config: PrimeConfig,
    output: Path,
    console: Console,
    resume: bool,
    teacher: GKAForCausalLM,
    probe: Probe | None,
) -> Job:
    """Open and check all inputs, before anything is written or deleted."""
    if config.stage1.tensorboard or config.stage2.tensorboard:
        check_tensorboard()
    check_layers(config, teacher)
    check_adapters(config.stage2)
    tokenizer = open_tokenizer(config, teacher)
    blocks = open_blocks(config, tokenizer, console)
    held = held_out(config, blocks[1])
    return Job(config, output, console, resume, tokenizer, blocks, held, {}, probe)


def _checksum(job: Job) -> str:
    part = getattr(job.blocks[0], "part", None)
    if part is not None:
        return part.packed.stream_checksum()  # as in runs of earlier releases
    return f"{job.blocks[0].checksum}{job.blocks[1].checksum}"


def _about(job: Job) -> dict[str, Any]:
    """`about` of the resumed run, or a new one."""
    file = job.output / files.REPORT / report.JSON
    if job.resume and file.is_file():
        return read_json(file)
    return {"config": job.config.tables(), "phases": {}, "match": {}, "stages": {}}


def _matched(job: Job, teacher: GKAForCausalLM) -> GKAForCausalLM:
    """The hybrid after stage 1, made of the teacher in place."""
    stage, prime = job.config.stage1, job.config.prime
    if (job.output / STAGE1 / files.METRICS).is_file():
        return load_teacher(str(job.output / STAGE1 / files.MODEL))
    folder = job.output / files.REPORT
    layers = chosen_layers(job.config, teacher, job.held, folder, job.console)
    job.about |= report.description(teacher, layers, prime.mixer)
    job.measure(TEACHER, teacher)
    set_seed(stage.seed)
    start = Start(alpha=prime.alpha, beta=prime.beta, decay=prime.decay)
    attention = replace_attention(teacher, layers, prime.mixer, job.config.mixer, start)
    hybrid = teacher
    job.measure(INITIAL, hybrid)
    weights = (stage.layer_weight, stage.end_weight)
    matching = Matching(hybrid, attention, *weights, recompute=stage.gradient_checkpointing)
    if "before" not in job.about["match"]:
        job.about["match"]["before"] = job.held.match(matching, device())
        job.note()
    if not stage.max_steps:
        return hybrid
    freeze_others(hybrid, attention)
    trainer = _fit(job, STAGE1, matching)
    hybrid.requires_grad_(True)
    job.about["match"]["after"] = job.held.match(matching, device())
    _finish(job, STAGE1, stage, trainer, hybrid)
    return hybrid


def _recovered(job: Job, hybrid: GKAForCausalLM) -> GKAForCausalLM:
    """The hybrid after stage 2."""
    stage = job.config.stage2
    teacher = None
    if stage.kl_weight:
        teacher = load_teacher(job.config.prime.teacher).requires_grad_(False)
    model: Any = with_adapters(hybrid, stage) if stage.lora_rank else hybrid
    recompute_layers(model, stage.gradient_checkpointing)
    trainer = _fit(job, STAGE2, model, partial(RecoveryTrainer, teacher, stage.kl_weight), teacher)
    if stage.lora_rank:
        if files.is_main_process():
            files.save_model(model, job.tokenizer, job.output / STAGE2 / "adapter")
        model = model.merge_and_unload()
    _finish(job, STAGE2, stage, trainer, model, keep_model=False)
    return model


def _fit(job: Job, name: str, model: Any, kind: Any = None, teacher: Any = None) -> Trainer:
    stage = getattr(job.config, name)
    folder = job.output / name / files.CHECKPOINTS
    job.console.print(f"{name}: {stage.max_steps} steps", highlight=False)
    return fit(
        model, stage, folder, job.blocks, job.tokenizer, console=job.console,
        resume=job.resume and folder.is_dir(), kind=kind,
        settings={"data_collator": job.held.collate}, beside=[teacher.model] if teacher else [],
    )  # fmt: skip


def _finish(
    job: Job,
    name: str,
    stage: MatchingConfig | RecoveryConfig,
    trainer: Trainer,
    model: GKAForCausalLM,
    keep_model: bool = True,
) -> None:
    """Record a stage's curves and its model's figures; with `keep_model` save the model, too."""
    tokens = tokens_of_a_step(stage, job.config.data.sequence_length, trainer.args.world_size)
    job.about["stages"][name] = report.stage(trainer.state.log_history, tokens)
    job.about["phases"].pop(name, None)
    job.measure(name, model)
    if keep_model and files.is_main_process():
        files.save_model(model, job.tokenizer, job.output / name / files.MODEL)
        write_json(job.output / name / files.METRICS, job.about["stages"][name])
