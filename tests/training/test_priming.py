"""A Transformer becomes a hybrid and learns back what it lost; what is reported is what is there."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from gka.data import byte_tokenizer, find_documents, pack, token_blocks
from gka.models import GKAConfig, GKAForCausalLM
from gka.models.replacement import replace_attention
from gka.training.priming import PrimeConfig, prime
from gka.training.priming.inputs import HeldOut, rank, share_recovered
from gka.training.priming.recovery import with_adapters
from gka.training.settings import merged

Tables = dict[str, dict[str, Any]]
Prime = Callable[..., dict[str, Any]]
NO_TRAINING: Tables = {"stage1": {"max_steps": 0}, "stage2": {"max_steps": 0}}


def tiny(**fields: Any) -> GKAForCausalLM:
    """An untrained Transformer of four layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "head_dim": 8, "num_heads": 4, "num_kv_heads": 2}
    settings = {"mixer": "attention", "num_hidden_layers": 4, "vocab_size": 257}
    return GKAForCausalLM(GKAConfig(**{**settings, **sizes, **fields})).eval()


def test_rise_is_that_of_a_sliding_window(
    prime_tables: Tables, teacher: Path, text: Path, tmp_path: Path
) -> None:
    """A layer's rank is the rise of the loss of a model whose layer is "swa" with the same weights."""
    model, console = GKAForCausalLM.from_pretrained(teacher), Console(quiet=True)
    packed = pack(find_documents([str(text)]), byte_tokenizer())
    held = HeldOut(token_blocks(packed, 16, 0.2)[1], 2, "float32", 1.0)
    config = PrimeConfig.from_tables(merged(prime_tables, {"prime": {"layers": "rank"}}))
    found = rank(model, held, config, tmp_path / "ranking.json", console)
    assert json.loads((tmp_path / "ranking.json").read_text()) == found
    for layer in range(4):
        fields = copy.deepcopy(model.config)
        fields.mixers = ["swa" if i == layer else "attention" for i in range(4)]
        fields.mixer, fields.sliding_window = "attention", 2
        windowed = GKAForCausalLM(fields)
        windowed.load_state_dict(model.state_dict())
        rise = held.loss(windowed) - held.loss(model)
        assert found["rise"][str(layer)] == pytest.approx(rise, abs=1e-6)
        assert abs(rise) > 1e-6


def test_ranking_chooses_and_is_used_again(run_prime: Prime, tmp_path: Path) -> None:
    """Layers with the least rise are replaced; a ranking that is in the report is not measured anew."""
    changes = {
        "prime": {"layers": "rank", "count": 3},
        "stage1": {"max_steps": 0},
        "stage2": {"max_steps": 0},
    }
    metrics = run_prime(tmp_path / "run", changes)
    file = tmp_path / "run" / "report" / "ranking.json"
    ranking = json.loads(file.read_text())
    worst = max(ranking["rise"], key=ranking["rise"].get)
    assert metrics["layers"] == [layer for layer in range(4) if layer != int(worst)]
    ranking["rise"] = {str(layer): float(layer == 1) for layer in range(4)}
    file.write_text(json.dumps(ranking))
    (tmp_path / "run" / "metrics.json").unlink()
    (tmp_path / "run" / "report" / "report.json").unlink()
    assert run_prime(tmp_path / "run", changes, resume=True)["layers"] == [0, 2, 3]


def test_stage_one_trains_the_new_mixers_alone(primed: tuple[Path, Any], teacher: Path) -> None:
    """After stage 1 the new mixers are not as they began; all else is the teacher's, bit for bit."""
    before = load_file(teacher / "model.safetensors")
    after = load_file(primed[0] / "stage1" / "model" / "model.safetensors")
    for name, value in before.items():
        if not re.search(r"layers\.[02]\.mixer", name):
            assert after[name].equal(value), name
    start = GKAForCausalLM.from_pretrained(teacher)
    replace_attention(start, [0, 2], "gka", {"num_iter": 4})
    assert not after["model.layers.0.mixer.q_proj.weight"].equal(
        start.state_dict()["model.layers.0.mixer.q_proj.weight"]
    )


def test_report_is_of_the_models_left_behind(
    primed: tuple[Path, Any], teacher: Path, text: Path
) -> None:
    """Losses in the report are those of the teacher and of the saved models, measured anew."""
    output, metrics = primed
    packed = pack(find_documents([str(text)]), byte_tokenizer())
    blocks = token_blocks(packed, 16, 0.2)[1]
    folders = {
        "teacher": teacher,
        "stage1": output / "stage1" / "model",
        "stage2": output / "model",
    }
    for phase, folder in folders.items():
        model = GKAForCausalLM.from_pretrained(folder)
        losses = [
            model(input_ids=b["input_ids"][None], labels=b["labels"][None]).loss for b in blocks
        ]
        loss = torch.stack(losses).mean().item()
        assert metrics["phases"][phase]["loss"] == pytest.approx(loss, rel=1e-5)
        bits = loss / 0.6931471805599453 * blocks.part.tokens / blocks.part.bytes
        assert metrics["phases"][phase]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    stored = json.loads((output / "metrics.json").read_text())
    assert stored == json.loads((output / "report" / "report.json").read_text()) == metrics
    assert metrics["model"]["mixers"] == "2 gka + 2 attention"
    assert metrics["dropped"] == ["rotary positions", "norms of queries and keys"]
    assert "after stage 2" in (output / "report" / "report.md").read_text()


@pytest.mark.parametrize("mixer", ["gka", "gated_deltanet"])
def test_both_stages_bring_the_hybrid_nearer(
    prime_tables: Tables, tmp_path: Path, mixer: str
) -> None:
    """Stage 1 lowers every layer's error, stage 2 the held-out loss, with either mixer."""
    more: Tables = {
        "stage1": {"max_steps": 40},
        "stage2": {"max_steps": 40},
        "prime": {"mixer": mixer},
    }
    tables = merged(prime_tables, more) | {"mixer": {"num_iter": 4} if mixer == "gka" else {}}
    config = PrimeConfig.from_tables(tables)
    metrics = prime(config, tmp_path / "run", console=Console(quiet=True), picture=False)
    match, phases = metrics["match"], metrics["phases"]
    assert all(match["after"][layer] < 0.8 * match["before"][layer] for layer in match["before"])
    assert phases["stage2"]["loss"] < phases["stage1"]["loss"]


def test_picture_is_drawn(primed: tuple[Path, Any], tmp_path: Path) -> None:
    """The report's picture is a PNG, also where a stage was left out."""
    from gka.training.priming import report

    report.write(primed[1], tmp_path, picture=True)
    assert (tmp_path / "priming.png").read_bytes().startswith(b"\x89PNG")
    without = {**primed[1], "stages": {}, "match": {"before": primed[1]["match"]["before"]}}
    report.write(without, tmp_path, picture=True)
    assert (tmp_path / "priming.png").read_bytes().startswith(b"\x89PNG")


def test_share_recovered() -> None:
    """0 at the start, 1 at the teacher's loss, more below it; none where nothing was lost."""
    assert share_recovered(2.0, 3.0, 3.0) == 0.0
    assert share_recovered(2.0, 3.0, 2.25) == 0.75
    assert share_recovered(2.0, 3.0, 1.0) == 2.0
    assert share_recovered(2.0, 2.0, 1.0) is None


def test_probe_figures_are_reported(run_prime: Prime, tmp_path: Path) -> None:
    """A probe sees each phase's model, and what it measures is in report and tables."""
    seen = []

    def probe(phase: str, model: GKAForCausalLM, tokenizer: Any) -> dict[str, float]:
        seen.append((phase, list(model.config.pattern)))
        assert tokenizer.eos_token_id == 256
        return {"number": float(len(seen))}

    short = {"stage1": {"max_steps": 1}, "stage2": {"max_steps": 1}}
    metrics = run_prime(tmp_path / "run", short, probe=probe)
    hybrid = ["gka", "attention", "gka", "attention"]
    assert seen == [
        ("teacher", ["attention"] * 4), ("initial", hybrid), ("stage1", hybrid), ("stage2", hybrid),
    ]  # fmt: skip
    assert metrics["phases"]["stage2"]["probe"] == {"number": 4.0}
    assert "| 4.000 |" in (tmp_path / "run" / "report" / "report.md").read_text()


def test_divergence_takes_part_in_training(
    run_prime: Prime, primed: tuple[Path, Any], tmp_path: Path
) -> None:
    """kl_weight adds to the training loss; held-out losses are the model's own."""
    metrics = run_prime(tmp_path / "run", {"stage2": {"kl_weight": 1.0}})
    with_kl, without = (
        m["stages"]["stage2"]["curves"]["training"][0] for m in (metrics, primed[1])
    )
    assert with_kl["loss"] > without["loss"] + 1e-4
    assert metrics["phases"]["stage2"]["loss"] != primed[1]["phases"]["stage2"]["loss"]


def test_conversations_prime_too(run_prime: Prime, teacher: Path, tmp_path: Path) -> None:
    """With chat data both stages run packed; the held-out loss is that of the assistant's tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    lines = [
        {
            "messages": [
                {"role": "user", "content": "q" * (i % 3)},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for i in range(20)
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    data = {"text": [], "chat": [str(file)], "tokenizer": str(tmp_path / "tokenizer")}
    changes = {
        "data": data,
        "stage1": {"max_steps": 2},
        "stage2": {"max_steps": 40, "learning_rate": 1e-2},
    }
    metrics = run_prime(tmp_path / "run", changes)
    assert metrics["phases"]["stage2"]["loss"] < 0.5 * metrics["phases"]["stage1"]["loss"]
    perplexity = metrics["phases"]["stage2"]["perplexity"]
    assert perplexity == pytest.approx(2.718281828 ** metrics["phases"]["stage2"]["loss"], rel=1e-5)


def test_adapters_alone_learn_and_are_merged(
    run_prime: Prime, primed: tuple[Path, Any], tmp_path: Path
) -> None:
    """With lora_rank the projections change by matrices of that rank, everything else stays; merged in."""
    pytest.importorskip("peft")
    metrics = run_prime(tmp_path / "run", {"stage2": {"lora_rank": 2}})
    before = load_file(tmp_path / "run" / "stage1" / "model" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed and all(re.search(r"\.[a-z]+_proj\.weight$", name) for name in changed)
    assert not {name for name in changed if re.search(r"\.(a|b|alpha)_proj\.", name)}
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-6) <= 2
    assert (tmp_path / "run" / "stage2" / "adapter" / "adapter_model.safetensors").exists()
    model = with_adapters(tiny(), PrimeConfig.from_tables({"stage2": {"lora_rank": 2}}).stage2)
    assert sum(p.requires_grad for p in model.parameters()) == 4 * 7 * 2
    assert metrics["phases"]["stage2"]["loss"] < metrics["phases"]["stage1"]["loss"]


@pytest.mark.parametrize("family", ["Qwen3", "Qwen2", "Llama", "Mistral"])
def test_transformers_own_decoders_prime(run_prime: Prime, tmp_path: Path, family: str) -> None:
    """A folder that transformers wrote is a teacher; what has no counterpart in the new layers is named."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 257}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = getattr(transformers, f"{family}Config")(
        **sizes, **heads, bos_token_id=None, eos_token_id=256, pad_token_id=256
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    short: Tables = {"stage1": {"max_steps": 1}, "stage2": {"max_steps": 1}}
    metrics = run_prime(
        tmp_path / "run", merged(short, {"prime": {"teacher": str(tmp_path / "teacher")}})
    )
    dropped = {
        "Qwen3": ["norms of queries and keys"],
        "Qwen2": ["biases"],
        "Mistral": ["sliding windows"],
    }.get(family, [])
    assert metrics["dropped"] == ["rotary positions", *dropped]
    hybrid = GKAForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert [name == "gka" for name in hybrid.config.pattern] == [True, False, True]
