"""Pretrain a Transformer, prime it into two kinds of hybrids with equal budgets, and measure every phase.

    python -m gka.experiments.chain --output results          on a GPU, about 5 minutes
    python -m gka.experiments.chain --tiny --output results   on a CPU, less than a minute

The text is the source of Python's standard library, as bytes. Budgets are in seconds, and the time of a step
gives the number of steps. chain.json in the output folder is rewritten after each result. Models and
checkpoints go to a temporary folder; --work FOLDER keeps them, with the trained hybrids in FOLDER/gka/model
and FOLDER/gated_deltanet/model for `from_pretrained`. It needs the packages of `gka train`. The plot needs
matplotlib; `--draw results` draws it later from chain.json.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gka.console import text_console
from gka.experiments import chain_measures
from gka.experiments.chain_measures import NeedleTest
from gka.experiments.ledger import Ledger, report
from gka.storage import read_json

MIXERS = ("gka", "gated_deltanet")
NEEDED = ("transformers", "accelerate", "rich", "safetensors", "tokenizers")


@dataclass(frozen=True)
class Scale:
    """Sizes and budgets.

    Attributes:
        model: fields of the Transformer's GKAConfig.
        sequence_length, batch_size: tokens per sequence, and sequences per step.
        precision: dtype of the training.
        pretraining, stage: seconds of training steps in pretraining, and in each stage.
        contexts, samples: context lengths of the needle test, and texts for each.
        eval_fraction: fraction of the text that is held out.
        limit: seconds of the whole run; stages are shortened to keep it.
    """

    model: dict[str, Any]
    sequence_length: int = 1024
    batch_size: int = 32
    precision: str = "bfloat16"
    pretraining: float = 80.0
    stage: float = 38.0
    contexts: tuple[int, ...] = (256, 1024)
    samples: int = 128
    eval_fraction: float = 0.01
    limit: float = 295.0


GPU = Scale({
    "mixer": "attention", "hidden_size": 512, "num_hidden_layers": 12, "num_heads": 8, "num_kv_heads": 4,
    "tie_word_embeddings": True,
})  # fmt: skip
TINY = Scale(
    {"mixer": "attention", "hidden_size": 64, "num_hidden_layers": 4, "num_heads": 2, "num_iter": 10},
    sequence_length=128, batch_size=4, precision="float32", pretraining=6.0, stage=2.5, contexts=(96,),
    samples=16, eval_fraction=0.0005, limit=55.0,
)  # fmt: skip


class Chain(Ledger):
    """A run of the whole chain.

    Args:
        scale: sizes and budgets.
        output: folder of chain.json, chain.md and chain.png.
        work: folder of models and checkpoints.
    """

    def __init__(self, scale: Scale, output: Path, work: Path) -> None:
        super().__init__(output, "chain")
        self.scale, self.work = scale, work
        self.found = {"hybrids": {}}

    def note(self, **figures: Any) -> None:
        """Add figures and the elapsed time, and write the JSON."""
        super().note(**figures, seconds=self.elapsed)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def autocast(self) -> Any:
        on = self.scale.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)

    def run(self) -> None:
        """Run all phases in order."""
        from gka.training.run import hardware, versions

        scale = self.scale
        self.note(versions=versions(), hardware=hardware(), scale=vars(scale))
        self.pretrain()
        steps = self.stage_steps()
        for mixer in MIXERS:
            self.prime(mixer, steps)
        self.go_on(steps["stage2"])
        self.note(complete=True)

    def pretrain(self) -> None:
        """Train the Transformer for about `scale.pretraining` seconds."""
        from gka.data import byte_tokenizer
        from gka.training import RunConfig, build_model, train

        scale = self.scale
        shape = {"tie_word_embeddings": False} | scale.model
        tables = {"data": self.data(), "model": shape, "training": self.training(1, 1e-3)}
        model: Any = build_model(RunConfig.from_tables(tables), byte_tokenizer())
        model = model.to(self.device)
        self.say(f"teacher: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
        ids = self.random_ids()
        seconds = self.time_step(lambda m=model: m(input_ids=ids, labels=ids).loss, model)
        steps = max(10, int(scale.pretraining / seconds))
        self.say(f"teacher: {1e3 * seconds:.0f} ms a step, {steps} steps")
        del model
        tables["training"] = self.training(steps, 1e-3)
        console = text_console(width=110)
        metrics = train(RunConfig.from_tables(tables), self.work / "teacher", console=console)
        kept = ("model", "data", "training", "evaluation", "curves")
        self.note(teacher={name: metrics[name] for name in kept})
        self.say(f"teacher: {metrics['evaluation']['bits_per_byte']:.4f} bits per byte")

    def stage_steps(self) -> dict[str, int]:
        """Steps of both stages, the same for all mixers; the slower mixer determines them."""
        from gka.models.replacement import replace_attention
        from gka.training.priming.matching import Matching, freeze_others
        from gka.training.priming.run import load_teacher

        slowest = {"stage1": 0.0, "stage2": 0.0}
        ids, timed = self.random_ids(), {}
        for mixer in MIXERS:
            hybrid = load_teacher(str(self.work / "teacher")).train()
            layers = list(range(0, len(hybrid.config.pattern), 2))
            attention = replace_attention(hybrid, layers, mixer)
            whole = self.time_step(lambda m=hybrid: m(input_ids=ids, labels=ids).loss, hybrid)
            freeze_others(hybrid, attention)
            matching = Matching(hybrid, attention)
            alone = self.time_step(lambda m=matching: m(ids)["loss"], matching)
            timed[mixer] = {"stage1": alone, "stage2": whole}
            slowest = {name: max(slowest[name], timed[mixer][name]) for name in slowest}
            self.say(
                f"{mixer}: {1e3 * alone:.0f} ms a step of stage 1, {1e3 * whole:.0f} of stage 2"
            )
        left = self.scale.limit - self.elapsed
        # Keep a tenth for evaluations, checkpoints and start-up.
        each = min(self.scale.stage, 0.9 * left / (2 * len(MIXERS) + 1))
        steps = {name: max(5, int(each / seconds)) for name, seconds in slowest.items()}
        self.note(seconds_a_step=timed, steps=steps)
        return steps

    def prime(self, mixer: str, steps: dict[str, int]) -> None:
        """Prime one hybrid through both stages; chain.json gets each phase's figures."""
        from gka.training.priming import PrimeConfig, prime

        folder, teacher = self.work / mixer, str(self.work / "teacher")
        config = PrimeConfig.from_tables(
            {
                # These initial gates did better in small trials on a CPU (docs/log); alpha is only GKA's.
                "prime": {"teacher": teacher, "mixer": mixer, "alpha": 0.5, "decay": 0.01},
                "data": self.data(),
                "stage1": self.training(steps["stage1"], 1e-3) | {"weight_decay": 0.0},
                "stage2": self.training(steps["stage2"], 5e-4),
            }
        )

        def probe(phase: str, model: Any, _: Any) -> dict[str, float]:
            found = self.needles(model)
            self.say(f"{mixer}, {phase}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))
            known = read_json(folder / "report" / "report.json")
            known["phases"][phase]["probe"] = found
            self.found["hybrids"][mixer] = known
            self.note()
            return found

        console = text_console(width=110)
        metrics = prime(config, folder, console=console, probe=probe, picture=False)
        self.found["hybrids"][mixer] = metrics
        self.note()

    def go_on(self, steps: int) -> None:
        """Train the control: the Transformer itself, with stage 2 of the hybrids."""
        from gka.data import byte_tokenizer, find_documents, pack, token_blocks
        from gka.training import TrainingConfig
        from gka.training.loop import fit
        from gka.training.priming.inputs import HeldOut
        from gka.training.priming.run import load_teacher

        scale, tokenizer = self.scale, byte_tokenizer()
        packed = pack(find_documents([]), tokenizer)
        blocks = token_blocks(packed, scale.sequence_length, scale.eval_fraction)
        part = blocks[1].part
        held = HeldOut(blocks[1], scale.batch_size, scale.precision, part.bytes / part.tokens)
        model, config = load_teacher(str(self.work / "teacher")), self.training(steps, 5e-4)
        folder, console = self.work / "control", text_console(width=110)
        settings = TrainingConfig(**config)
        fit(model, settings, folder, blocks, tokenizer, console=console, resume=False)
        self.note(control=held.figures(model) | {"probe": self.needles(model)})
        self.say(f"teacher trained on: {self.found['control']['bits_per_byte']:.4f} bits per byte")

    def needles(self, model: Any) -> dict[str, float]:
        """Fractions of planted characters and of whole values that are copied, for each context length."""
        from gka.data import byte_tokenizer, find_documents, pack, split

        tokenizer = byte_tokenizer()
        held = split(pack(find_documents([]), tokenizer), self.scale.eval_fraction)[1]
        filler = [int(i) for a, b in held.ranges for i in held.packed.tokens[a : b - 1]]
        model, found = model.eval(), {}
        for context in self.scale.contexts:
            test = NeedleTest.drawn(filler, context, self.scale.samples, lambda t: list(t.encode()))
            part, whole = test.run(model, self.scale.batch_size, self.autocast)
            found |= {f"copied, {context}": part, f"whole, {context}": whole}
        return found

    def data(self) -> dict[str, Any]:
        scale = self.scale
        return {"sequence_length": scale.sequence_length, "eval_fraction": scale.eval_fraction}

    def training(self, steps: int, rate: float) -> dict[str, Any]:
        return {
            "max_steps": steps, "batch_size": self.scale.batch_size, "learning_rate": rate,
            "warmup_steps": max(1, steps // 20), "weight_decay": 0.1, "precision": self.scale.precision,
            "log_steps": max(1, steps // 50), "eval_steps": max(1, -(-steps // 4)), "save_steps": steps,
        }  # fmt: skip

    def random_ids(self) -> torch.Tensor:
        shape = (self.scale.batch_size, self.scale.sequence_length)
        return torch.randint(0, 256, shape, device=self.device)

    def time_step(self, loss: Callable[[], torch.Tensor], model: torch.nn.Module) -> float:
        """Seconds of a training step: the median of six, after three in which kernels are compiled."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer, times = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0), []
        for _ in range(9):
            begin = time.perf_counter()
            with self.autocast():
                value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return statistics.median(times[3:])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The parsed command line, with `scale`."""
    parser = argparse.ArgumentParser(
        prog="python -m gka.experiments.chain", description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--output", type=Path, help="folder for chain.json, chain.md and chain.png")
    add("--tiny", action="store_true", help="a model and budgets for a CPU")
    add("--work", type=Path, help="folder for models and checkpoints; kept")
    add("--draw", type=Path, help="only write chain.md and chain.png of that folder's chain.json")
    budgets = {
        "pretraining": "seconds of pretraining, in steps", "stage": "seconds of each stage, in steps",
        "limit": "seconds of everything",
    }  # fmt: skip
    for name, what in budgets.items():
        add(f"--{name}", type=float, help=f"{what} (GPU: {getattr(GPU, name):g})")
    options = parser.parse_args(arguments)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if options.draw is None and (options.output is None or missing):
        parser.error(
            f"packages are missing: {', '.join(missing)}" if missing else "--output is missing"
        )
    if options.draw is None and not options.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here: --tiny is for a CPU")
    given = {name: getattr(options, name) for name in budgets}
    scale = TINY if options.tiny else GPU
    options.scale = replace(scale, **{name: x for name, x in given.items() if x is not None})
    return options


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run."""
    options = parse(arguments)
    if options.draw is not None:
        found = read_json(options.draw / "chain.json")
        page = chain_measures.markdown(found)
        report(options.draw / "chain", page, lambda figure: chain_measures.draw(found, figure))
        return
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        chain = Chain(options.scale, options.output, options.work or Path(temporary))
        chain.run()
        page = chain_measures.markdown(chain.found)
        print("\n" + page)
        chain.report(page, lambda figure: chain_measures.draw(chain.found, figure))
        chain.say("done")


if __name__ == "__main__":
    main()
