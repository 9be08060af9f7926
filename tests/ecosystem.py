"""trl, peft and transformers' pipelines on tiny models: `python -m tests.ecosystem`.

Needs what its checks name (pip install trl peft datasets); what is not installed is skipped with a message.
Prints the versions and a line a check; ends with status 1 if one fails.

    python -m tests.ecosystem            # everything, pure and hybrid model
    python -m tests.ecosystem dpo lora   # the checks whose names contain one of the words
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import itertools
import logging
import math
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gka
from gka.data import byte_tokenizer

PATTERNS = {"pure": ["gka", "gka"], "hybrid": ["gka", "attention"]}
TEXTS = [
    f"the {a} {b} is {n}. " * 2 for n, (a, b) in enumerate(zip("abcdefgh", "hgfedcba", strict=True))
]
PAIRS = [
    {"prompt": f"{a}? ", "chosen": f"yes, {a} it is", "rejected": f"no {a}"} for a in "abcdefgh"
]


class Setting:
    """A saved model with its tokenizer, and a folder to work in."""

    def __init__(self, pattern: str, folder: Path):
        self.folder, self.path = folder, folder / "model"
        self.tokenizer = byte_tokenizer()
        torch.manual_seed(0)
        config = gka.GKAConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=32,
            intermediate_size=48,
            head_dim=8,
            num_heads=4,
            num_iter=8,
            mixers=PATTERNS[pattern],
            eos_token_id=self.tokenizer.eos_token_id,  # pyright: ignore
            pad_token_id=self.tokenizer.pad_token_id,  # pyright: ignore
        )
        gka.GKAForCausalLM(config).save_pretrained(self.path)
        self.tokenizer.save_pretrained(self.path)
        self.attends = "attention" in PATTERNS[pattern]

    def load(self) -> Any:
        """The model as a user opens it."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.path)

    def arguments(self, kind: Any, **options: Any) -> Any:
        """Arguments of a short training run."""
        common = {
            "output_dir": str(self.folder / "run"), "max_steps": 6, "learning_rate": 5e-3,
            "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none", "use_cpu": True,
            "save_strategy": "no", "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False,
        }  # fmt: skip
        return kind(**common | options)

    def batch(self) -> dict[str, torch.Tensor]:
        """Texts of different lengths, padded, with labels."""
        texts = [text[: 9 + 3 * n] for n, text in enumerate(TEXTS[:4])]
        batch = dict(self.tokenizer(texts, return_tensors="pt", padding=True))
        return batch | {
            "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        }


def falls(trainer: Any) -> str:
    """Train; the logged losses must be finite and the last below the first."""
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0], losses
    return f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"


def sft(s: Setting, model: Any = None, **options: Any) -> Any:
    """trl's SFTTrainer on a few texts."""
    from datasets import Dataset  # pyright: ignore
    from trl import SFTConfig, SFTTrainer  # pyright: ignore

    peft_config = options.pop("peft_config", None)
    return SFTTrainer(
        model=model or str(s.path),
        args=s.arguments(SFTConfig, **({"max_length": 64} | options)),
        train_dataset=Dataset.from_dict({"text": TEXTS * 2}),
        processing_class=s.tokenizer,
        peft_config=peft_config,
    )


def check_sft(s: Setting) -> str:
    """trl SFT from a path."""
    return falls(sft(s))


def apart(s: Setting, trainer: Any) -> str:
    """A trainer's batch of joined texts gives the loss of the texts apart, and then trains."""
    torch.manual_seed(0)
    batch = next(iter(trainer.get_train_dataloader()))
    positions = batch["position_ids"].flatten()
    starts = [*torch.nonzero(positions == 0).flatten().tolist(), positions.numel()]
    assert len(starts) > 3, starts
    model = trainer.model.eval()
    with torch.no_grad():
        joined = model(**batch).loss
        total, targets = 0.0, 0
        for begin, end in itertools.pairwise(starts):
            ids, labels = (batch[k].flatten()[None, begin:end] for k in ("input_ids", "labels"))
            count = int((labels[:, 1:] != -100).sum())
            if count:
                total += float(model(ids, labels=labels).loss) * count
                targets += count
    assert abs(float(joined) - total / targets) < 1e-4, (float(joined), total / targets)
    model.train()
    return f"{len(starts) - 1} texts in a batch as apart; {falls(trainer)}"


def check_sft_packing(s: Setting) -> str:
    """trl SFT with packing: documents do not see each other."""
    return apart(s, sft(s, packing=True))


def check_sft_padding_free(s: Setting) -> str:
    """trl SFT with padding_free: documents do not see each other."""
    return apart(s, sft(s, padding_free=True, max_length=None))


def check_sft_lora(s: Setting) -> str:
    """trl SFT with LoRA on the default targets."""
    from peft import LoraConfig  # pyright: ignore

    trainer = sft(s, peft_config=LoraConfig(task_type="CAUSAL_LM"), learning_rate=5e-2)
    return falls(trainer)


def dpo(s: Setting, **options: Any) -> Any:
    from datasets import Dataset  # pyright: ignore
    from trl import DPOConfig, DPOTrainer  # pyright: ignore

    return DPOTrainer(
        model=options.pop("model", str(s.path)),
        args=s.arguments(DPOConfig, max_length=64),
        train_dataset=Dataset.from_list(PAIRS * 2),
        processing_class=s.tokenizer,
        **options,
    )


def check_dpo(s: Setting) -> str:
    """trl DPO without ref_model, the model a path."""
    return falls(dpo(s))


def check_dpo_object(s: Setting) -> str:
    """trl DPO without ref_model, the model an object."""
    return falls(dpo(s, model=s.load()))


def check_dpo_lora(s: Setting) -> str:
    """trl DPO with LoRA and without ref_model."""
    from peft import LoraConfig  # pyright: ignore

    return falls(dpo(s, peft_config=LoraConfig(task_type="CAUSAL_LM")))


def adapt(s: Setting, config: Any) -> str:
    """Train an adapter by hand, generate, save, load again: the same logits."""
    from peft import AutoPeftModelForCausalLM, get_peft_model  # pyright: ignore

    torch.manual_seed(1)
    model, batch = get_peft_model(s.load(), config).train(), s.batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(12):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0], losses
    model.eval()
    inputs = {key: batch[key][:, :9] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        again = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
        assert out.equal(again), "generate with a cache and without differ"
        logits = model(**batch).logits
        model.save_pretrained(s.folder / "adapter")
        loaded = AutoPeftModelForCausalLM.from_pretrained(s.folder / "adapter").eval()
        assert torch.allclose(loaded(**batch).logits, logits, atol=1e-5)
    return f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, generates, loads again"


def check_lora(s: Setting) -> str:
    """peft LoRA without target_modules, merged to the same logits."""
    from peft import LoraConfig, get_peft_model  # pyright: ignore

    said = adapt(s, LoraConfig(task_type="CAUSAL_LM"))
    model = get_peft_model(
        s.load(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    ).eval()
    targets = sorted(
        {n.split(".lora_A")[0].split(".")[-1] for n, _ in model.named_parameters() if "lora_A" in n}
    )
    batch = s.batch()
    with torch.no_grad():
        before = model(**batch).logits
        assert torch.allclose(model.merge_and_unload()(**batch).logits, before, atol=1e-4)
    return f"{said}, on {', '.join(targets)}"


def check_lora_all_linear(s: Setting) -> str:
    """peft LoRA with target_modules="all-linear"."""
    from peft import LoraConfig  # pyright: ignore

    return adapt(s, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))


def check_ia3(s: Setting) -> str:
    """peft IA3 without target_modules."""
    from peft import IA3Config  # pyright: ignore

    return adapt(s, IA3Config(task_type="CAUSAL_LM"))


def check_prompt_tuning(s: Setting) -> str:
    """peft prompt tuning: learned vectors before the text."""
    from peft import PromptTuningConfig  # pyright: ignore

    return adapt(s, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))


def check_p_tuning(s: Setting) -> str:
    """peft p-tuning: the vectors come from a small network."""
    from peft import PromptEncoderConfig  # pyright: ignore

    options: dict[str, Any] = {"num_virtual_tokens": 5, "encoder_hidden_size": 16}
    return adapt(s, PromptEncoderConfig(task_type="CAUSAL_LM", **options))


def check_prefix_tuning(s: Setting) -> str:
    """peft prefix tuning: keys and values for attention layers; refused where there are none."""
    from peft import PrefixTuningConfig, get_peft_model  # pyright: ignore

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    if s.attends:
        return adapt(s, config)
    try:
        get_peft_model(s.load(), config)(**s.batch())
    except ValueError as error:
        assert "no attention layer" in str(error), error
        return f"refused: {error}"
    raise AssertionError(
        "a prefix of keys and values was accepted by a model without attention layers"
    )


def check_feature_extraction(s: Setting) -> str:
    """peft's FEATURE_EXTRACTION wrapper around GKAModel."""
    from peft import LoraConfig, get_peft_model  # pyright: ignore

    model = get_peft_model(s.load().model, LoraConfig(task_type="FEATURE_EXTRACTION"))
    batch = s.batch()
    hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert hidden.last_hidden_state.isfinite().all()
    return f"{tuple(hidden.last_hidden_state.shape)}"


def check_pipeline(s: Setting) -> str:
    """transformers' text-generation pipeline, a batch of two."""
    from transformers import pipeline

    writer: Any = pipeline("text-generation", model=str(s.path), tokenizer=s.tokenizer)
    found = writer(["the a", "the b h"], max_new_tokens=4, batch_size=2)
    assert len(found) == 2
    return "two texts at once"


NEEDS = {"sft": ("trl", "datasets"), "dpo": ("trl", "datasets"), "pipeline": ()}


def missing(name: str) -> list[str]:
    """Packages that the check needs and this environment lacks."""
    needed = set(NEEDS.get(name.split("_")[0], ("peft",)))
    if "lora" in name:
        needed.add("peft")
    return sorted(package for package in needed if importlib.util.find_spec(package) is None)


def run(name: str, check: Callable[[Setting], str], pattern: str) -> bool:
    """One check, said on one line; whether it did not fail."""
    title = f"{name.replace('_', ' '):<20} {pattern:<8}"
    if lacking := missing(name):
        print(f"{title} skipped: pip install {' '.join(lacking)}")
        return True
    quiet = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                said = check(Setting(pattern, Path(folder)))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            print(f"{title} FAILED: {type(error).__name__}: {lines[0]}")
            if "-v" in sys.argv:
                traceback.print_exc()
            return False
    print(f"{title} {said}", flush=True)
    return True


def main(words: list[str]) -> int:
    """Run the checks whose names contain one of the words, on each pattern."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for package in ("torch", "transformers", "trl", "peft", "accelerate", "datasets"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            print(f"{package} {importlib.metadata.version(package)}", end="  ")
    print()
    checks = {n.removeprefix("check_"): f for n, f in globals().items() if n.startswith("check_")}
    chosen = {n: f for n, f in checks.items() if not words or any(word in n for word in words)}
    good = [run(name, check, pattern) for name, check in chosen.items() for pattern in PATTERNS]
    print(f"{sum(good)} of {len(good)} did not fail")
    return 0 if all(good) and good else 1


if __name__ == "__main__":
    sys.exit(main([word for word in sys.argv[1:] if word != "-v"]))
