"""`gka convert`, and `gka generate` on foreign folders; what loading one costs in memory."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import foreign
from calling import Run
from gka.data.text import byte_tokenizer

BYTES = 257


@pytest.fixture(params=["hybrid", "fla", "fla_gated_deltanet"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A foreign checkpoint over bytes, with its tokenizer."""
    monkeypatch.setattr(foreign, "VOCABULARY", BYTES)
    if request.param == "hybrid":
        config = foreign.hybrid_config("qwen3", "*-GKA-GDN-SWA", dtype="bfloat16")
        weights = foreign.hybrid_weights(config, torch.bfloat16)
    else:
        kind = "gka" if request.param == "fla" else "gated_deltanet"
        config = foreign.fla_config(kind, [1], dtype="bfloat16")
        weights = {name: value.bfloat16() for name, value in foreign.fla_weights(config).items()}
    foreign.write(tmp_path / request.param, config, weights, shards=2)
    byte_tokenizer().save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_there_and_back(gka: Run, folder: Path):
    """A bfloat16 checkpoint converted to our format and back is bit for bit what it was; its tokenizer
    comes along, and all three complete a prompt alike."""
    home = "hybrid_qwen3" if folder.name == "hybrid" else folder.name
    ours, back = folder.parent / "ours", folder.parent / "back"
    assert gka("convert", folder, "--to", "gka", "-o", ours)[0] == 0
    status, out, _ = gka(
        "convert", ours, "--to", home, "--output", back, "--max-shard-size", "20KB"
    )
    assert status == 0 and home in out and "parameters" in out
    before, after = stored(folder), stored(back)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype and torch.equal(after[name], value), name
    assert (back / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    arguments = ["--prompt", "to be", "--max-new-tokens", "8", "--temperature", "0"]
    texts = [gka("generate", x, *arguments) for x in (folder, ours, back)]
    assert texts[0][0] == 0 and texts[0][1].startswith("to be") and len(texts[0][1]) > 6
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("command", ["convert", "generate"])
def test_a_damaged_folder_is_one_line(gka: Run, folder: Path, command: str):
    """A cut shard ends either command with status 2 and its name, and nothing is written."""
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])
    output = folder.parent / "out"
    options = {"convert": ["--to", "gka", "-o", output], "generate": ["--prompt", "x"]}[command]
    status, _, err = gka(command, folder, *options)
    assert status == 2 and file.name in err and len(err.strip().splitlines()) == 1
    assert not output.exists()


def test_weights_missing_from_our_own_format_are_not_made_up(gka: Run, folder: Path):
    """`from_pretrained` fills gaps of our own format with new weights; `gka convert` refuses them."""
    ours = folder.parent / "ours"
    assert gka("convert", folder, "--to", "gka", "-o", ours)[0] == 0
    file = ours / "model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if not k.endswith("2.mixer.q_proj.weight")}
    assert len(kept) + 1 == len(load_file(file))
    from safetensors.torch import save_file

    save_file(kept, file, metadata={"format": "pt"})
    status, _, err = gka("convert", ours, "--to", "gka", "-o", folder.parent / "again")
    assert status == 2 and "weights are missing: model.layers.2.mixer.q_proj.weight" in err


def test_evaluate_reads_every_format(gka: Run, folder: Path):
    """`gka evaluate` asks a foreign checkpoint as it is."""
    line = ["--tasks", "perplexity", "--lengths", "256", "--samples", "1", "--text", __file__]
    status, _, err = gka(
        "evaluate", folder, *line, "--device", "cpu", "--output", folder.parent / "out"
    )
    assert status == 0, err
    assert (folder.parent / "out" / "evaluate.json").is_file()


def test_a_plain_transformer_is_continued_and_converted(gka: Run, tmp_path: Path):
    """A folder of transformers' own Llama completes a prompt, token for token as transformers does, and is
    converted from the folder of a run as from its own; without a GKA layer there is nothing to inspect."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": BYTES, "hidden_size": 16, "intermediate_size": 24}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, eos_token_id=256)
    model: Any = LlamaForCausalLM(config).eval()
    folder = tmp_path / "run" / "model"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    prompt = torch.tensor([list(b"to be")])
    made = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=256)
    line = ["--prompt", "to be", "--max-new-tokens", "8", "--temperature", "0"]
    status, out, err = gka("generate", folder, *line)
    assert status == 0, err
    assert out == str(byte_tokenizer().decode(made[0])) + "\n"
    status, _, err = gka("inspect", folder, "--prompt", "to be", "-o", tmp_path / "seen")
    assert status == 2 and "attention" in err
    assert gka("convert", tmp_path / "run", "--to", "llama", "-o", tmp_path / "copy")[0] == 0
    assert stored(tmp_path / "copy").keys() == stored(folder).keys()


def test_unusable_arguments(gka: Run, tmp_path: Path):
    """An unknown format, and a folder without a model, are refused in one line."""
    config = foreign.hybrid_config("qwen3", "GKA")
    foreign.write(tmp_path / "a", config, foreign.hybrid_weights(config))
    status, _, err = gka("convert", tmp_path / "a", "--to", "gguf", "-o", tmp_path / "b")
    assert status == 2 and "format 'gguf' is unknown; choose gka, hybrid_qwen3" in err
    status, _, err = gka("convert", tmp_path, "--to", "gka", "-o", tmp_path / "b")
    assert status == 2 and "holds no config.json" in err


MEASURE = """
import re, sys, torch
from gka.models import GKAForCausalLM

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

GKAForCausalLM.from_pretrained(sys.argv[1])  # what the libraries need by themselves
before = peak()
model = GKAForCausalLM.from_pretrained(sys.argv[2]).eval()
with torch.no_grad():
    model(torch.arange(8)[None])
for parameter in model.parameters():
    parameter.sum()  # every page is read
print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_memory_of_the_weights_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Loading 200 MB in three shards and reading all of it adds less than 1.5 times that at the peak."""
    config = foreign.hybrid_config("qwen3", "*-GKA")
    small = foreign.write(tmp_path / "small", config, foreign.hybrid_weights(config))
    monkeypatch.setattr(foreign, "WIDTH", 1024)
    monkeypatch.setattr(foreign, "VOCABULARY", 24576)
    config = foreign.hybrid_config("qwen3", "*-GKA")
    large = foreign.write(tmp_path / "large", config, foreign.hybrid_weights(config), shards=3)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large)],
        capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    added, weights = map(int, run.stdout.split())
    assert weights > 190e6
    assert 0.5 < added / weights < 1.5
