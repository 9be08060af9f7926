"""The models of `hybrid`: a Transformer, hybrids primed from it, and controls with as many tokens.

All are made by the code of `gka train` and `gka prime`, in a folder for each seed:

    seed-0/teacher                the Transformer, kept: all hybrids begin with it
    seed-0/teacher/ranking.json   rise of its loss when one layer at a time sees a short window
    seed-0/MODEL                  a run under way; the cell deletes it once its figures are known
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gka.console import text_console
from gka.errors import InputError
from gka.storage import read_json

RANK, ALTERNATE = ("rank", "alternate")


@dataclass(frozen=True)
class Training:
    """Sizes of the models and of their trainings.

    Attributes:
        width, layers, heads, kv_heads: of the Transformer.
        length, batch: tokens of a sequence, and sequences of a step.
        dtype: of the arithmetic.
        pretraining, matching, recovery: steps of the Transformer, and of both stages of priming.
        rates: learning rates of the same.
        held_out: share of the text that is held out.
        window: tokens that a layer sees while it is ranked.
        alpha, decay: first values of the new layers' gates, as in `gka prime`'s table [prime].
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    length: int
    batch: int
    dtype: str
    pretraining: int
    matching: int
    recovery: int
    rates: tuple[float, float, float]
    held_out: float
    window: int
    alpha: float
    decay: float

    @property
    def tokens_of_a_step(self) -> int:
        return self.length * self.batch

    @property
    def extra(self) -> int:
        """Steps of both stages of priming."""
        return self.matching + self.recovery

    def model(self) -> dict[str, Any]:
        """Table [model] without the mixers."""
        return {
            "hidden_size": self.width,
            "num_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "head_dim": self.width // self.heads,
            "max_position_embeddings": self.length,
            "tie_word_embeddings": True,
        }

    def steps(self, count: int, rate: float, seed: int) -> dict[str, Any]:
        """Table of a training of `count` steps, which is saved at its end alone and never evaluated."""
        return {
            "max_steps": count, "batch_size": self.batch, "learning_rate": rate,
            "warmup_steps": max(1, count // 20), "dtype": self.dtype, "compile": "off",
            "log_steps": max(1, count // 20), "eval_steps": count + 1, "save_steps": count,
            "health_steps": 0, "seed": seed,
        }  # fmt: skip

    def data(self) -> dict[str, Any]:
        """Table [data] of both commands: the same blocks, the same held-out blocks."""
        return {"sequence_length": self.length, "eval_fraction": self.held_out}


@dataclass(frozen=True)
class Made:
    """A trained model.

    Attributes:
        model: in float32 on the device of the training.
        about: its layers, tokens, speed and losses on the way, JSON-ready.
        folder: of its run.
    """

    model: Any
    about: dict[str, Any]
    folder: Path

    def discard(self) -> None:
        """Delete its run."""
        shutil.rmtree(self.folder)


def alternating(layers: int, count: int) -> list[int]:
    """`count` of `layers` indices, spread evenly, the first layer among them."""
    return [i for i in range(layers) if -(-(i + 1) * count // layers) > -(-i * count // layers)]


def ranked(rise: Mapping[str, float], count: int) -> list[int]:
    """The `count` layers whose loss rises least, ascending."""
    best = sorted(rise, key=lambda layer: (rise[layer], int(layer)))[:count]
    return sorted(map(int, best))


class Models:
    """The models of one seed.

    Args:
        training: sizes.
        root: folder of all seeds.
        seed: of the Transformer's weights and of all orders of data.
        device: "cpu" or "cuda", as `gka reproduce` was asked for.

    Raises:
        InputError: trainings would run on another device.
    """

    def __init__(self, training: Training, root: Path, seed: int, device: str) -> None:
        from gka.training.priming.run import device as trains_on

        if trains_on().type != device.split(":")[0]:
            raise InputError(
                f"device is {device!r}, and trainings run on {trains_on().type!r} here; give that device,"
                " or hide the GPUs with CUDA_VISIBLE_DEVICES="
            )
        self.training, self.folder, self.seed = training, root / f"seed-{seed}", seed

    def teacher(self) -> Made:
        """Train the Transformer, or load it, and rank its layers."""
        from gka.training import folder as files

        t, folder = self.training, self.folder / "teacher"
        model = t.model() | {"mixer": "attention", "num_hidden_layers": t.layers}
        about = self._trained(folder, model, t.steps(t.pretraining, t.rates[0], self.seed))
        shutil.rmtree(folder / files.CHECKPOINTS, ignore_errors=True)
        return self._made(folder, about | {"layers": [], "rise": self.ranking()}, t.pretraining)

    def ranking(self) -> dict[str, float]:
        """Rise of the Transformer's held-out loss, by layer that sees a short window; kept in a file."""
        file = self._teacher() / "ranking.json"
        kept = read_json(file)["rise"] if file.is_file() else {}
        return kept if len(kept) == self.training.layers else self._ranked(file)

    def _ranked(self, file: Path) -> dict[str, float]:
        from gka.training.priming.inputs import held_out, open_blocks, open_tokenizer, rank

        config, console = self._priming("gka", [0]), _quiet()
        teacher = self._loaded(self._teacher())
        blocks = open_blocks(config, open_tokenizer(config, teacher), console)
        return rank(teacher, held_out(config, blocks[1]), config, file, console)["rise"]

    def layers(self, count: int, choice: str) -> list[int]:
        """The layers that a choice replaces."""
        if choice == ALTERNATE:
            return alternating(self.training.layers, count)
        return ranked(self.ranking(), count)

    def control(self) -> Made:
        """The Transformer trained on for as many steps as priming takes."""
        t, folder = self.training, self.folder / "control"
        model = t.model() | {"mixer": "attention", "num_hidden_layers": t.layers}
        model["start"] = str(self._teacher())
        steps = t.steps(t.extra, t.rates[2], self.seed + 1000)
        about = self._trained(folder, model, steps) | {"layers": []}
        return self._made(folder, about, t.pretraining + t.extra)

    def scratch(self, mixer: str, count: int, choice: str) -> Made:
        """A hybrid with the same layers, trained from scratch with all the tokens of a primed one."""
        t, layers = self.training, self.layers(count, choice)
        mixers = [mixer if i in layers else "attention" for i in range(t.layers)]
        folder, total = self.folder / f"scratch-{mixer}", t.pretraining + t.extra
        steps = t.steps(total, t.rates[0], self.seed)
        about = self._trained(folder, t.model() | {"mixers": mixers}, steps) | {"layers": layers}
        return self._made(folder, about, total)

    def hybrid(self, mixer: str, count: int, choice: str) -> Made:
        """The Transformer with `count` layers replaced, aligned and trained."""
        from gka.training.folder import RUN, resumed_config
        from gka.training.priming import PrimeConfig, prime

        layers = self.layers(count, choice)
        config, folder = self._priming(mixer, layers), self.folder / f"{mixer}-{count}-{choice}"
        resume = (folder / RUN).is_file()
        if resume:
            resumed_config(folder, config.tables(), PrimeConfig)
        with _keyboard():
            metrics = prime(config, folder, console=_quiet(), resume=resume, picture=False)
        phases = {name: phase["loss"] for name, phase in metrics["phases"].items()}
        speed = metrics["stages"]["stage2"]["tokens_per_second"]
        about = {"layers": layers, "phases": phases, "match": metrics["match"], "training": speed}
        t = self.training
        return self._made(folder, about, t.pretraining + t.extra)

    def _made(self, folder: Path, about: dict[str, Any], steps: int) -> Made:
        tokens = steps * self.training.tokens_of_a_step
        return Made(self._loaded(folder), about | {"tokens": tokens}, folder)

    def _trained(
        self, folder: Path, model: dict[str, Any], steps: dict[str, Any]
    ) -> dict[str, Any]:
        """Train with `gka train`'s code, or go on; returns its tokens per second."""
        from gka.training import RunConfig, train
        from gka.training.folder import RUN, resumed_config

        tables = {
            "data": self.training.data() | {"documents": "former"},
            "model": model,
            "training": steps | {"weight_decay": 0.1, "eval_steps": steps["max_steps"]},
        }
        config, resume = RunConfig.from_tables(tables), (folder / RUN).is_file()
        if resume:
            resumed_config(folder, config.tables(), RunConfig)
        with _keyboard():
            metrics = train(config, folder, console=_quiet(), resume=resume)
        return {"training": metrics["training"]["tokens_per_second"]}

    def _priming(self, mixer: str, layers: list[int]) -> Any:
        from gka.training.priming import PrimeConfig

        t = self.training
        stage1 = t.steps(t.matching, t.rates[1], self.seed + 1000)
        stage2 = t.steps(t.recovery, t.rates[2], self.seed + 2000)
        tables = {
            "prime": {
                "teacher": str(self._teacher()),
                "mixer": mixer,
                "layers": ",".join(map(str, layers)),
                "rank_window": t.window,
                "alpha": t.alpha,
                "decay": t.decay,
            },
            "data": t.data(),
            "stage1": stage1,
            "stage2": stage2,
        }
        return PrimeConfig.from_tables(tables)

    def _teacher(self) -> Path:
        """The Transformer's folder; raises `InputError` if it is not there."""
        folder = self.folder / "teacher"
        if not (folder / "metrics.json").is_file():
            raise InputError(
                f"{folder} holds no trained Transformer; its cell makes it. If the ledger has that cell,"
                " put the folder back, or give another --output"
            )
        return folder

    def _loaded(self, folder: Path) -> Any:
        from gka.training.priming.run import load_teacher

        return load_teacher(str(folder)).eval()


def _quiet() -> Any:
    return text_console(quiet=True)


@contextmanager
def _keyboard() -> Iterator[None]:
    """Let a signal that stopped a training stop the run: a ledger would note it as a failure and go on."""
    from gka.training.loop import Interrupted

    try:
        yield
    except Interrupted as stop:
        raise KeyboardInterrupt(str(stop)) from stop
