"""lm-evaluation-harness with this library's models. What needs lm_eval is skipped where it is not there."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gka.commands.main import app
from gka.data import byte_tokenizer
from gka.errors import InputError
from gka.evaluation import harness
from gka.models import GKAConfig, GKAForCausalLM
from tolerances import RELATIVE

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason='lm_eval is not installed: pip install -e ".[eval]"'
)

CHOICES = [
    {"q": "import numpy as", "choices": [" np", " zzz", " q"], "gold": 0},
    {"q": "def main(self):\n    return self", "choices": [".x", " xyzzy"], "gold": 1},
    {"q": "a", "choices": [" much longer continuation than its context", " b"], "gold": 0},
]
TEXTS = [{"text": "def f(x):\n    return x + 1\n" * 3}, {"text": "import os\n"}]
PROMPTS = [{"q": "def __init__(self", "a": "x"}, {"q": "import o", "a": "s"}]
TASKS = {
    "choice": (
        CHOICES,
        "output_type: multiple_choice\ntarget_delimiter: ''\ndoc_to_text: '{{q}}'\n"
        "doc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{gold}}'\nmetric_list: [{metric: acc}]\n",
    ),
    "rolling": (
        TEXTS,
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n",
    ),
    "writing": (
        PROMPTS,
        "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "generation_kwargs: {until: ['\\n'], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n",
    ),
}


def test_without_lm_eval_the_command_says_what_to_install(monkeypatch):
    """`gka lm-eval` without lm_eval is an error that names the extra."""
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["lm-eval", "--model", "gka"])
    assert isinstance(done.exception, InputError)
    assert 'pip install -e ".[eval]"' in str(done.exception)


def test_all_arguments_are_handed_on(monkeypatch):
    """Options, --help too, go to lm_eval's own command as they stand."""
    given: list[list[str]] = []
    monkeypatch.setattr(harness, "main", lambda arguments: given.append(list(arguments)))
    line = [
        "--model",
        "gka",
        "--tasks",
        "a,b",
        "--help",
        "-x",
        "--model_args",
        "pretrained=m,chunk=8",
    ]
    done = CliRunner().invoke(app, ["lm-eval", *line])
    assert done.exit_code == 0 and given == [line]


def test_the_extra_is_declared():
    """What the error says to install exists: the extra `eval` brings lm_eval."""
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert any(entry.startswith("lm-eval") for entry in project["optional-dependencies"]["eval"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small saved model with strong opinions."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = GKAConfig(vocab_size=257, hidden_size=16, num_hidden_layers=2, num_heads=2, head_dim=8)
    config.eos_token_id = config.bos_token_id = 256
    model = GKAForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (rows, body) in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        head = f"task: local_{name}\ndataset_path: json\ntest_split: test\n"
        head += f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (folder / f"{name}.yaml").write_text(head + body)
    return folder


def log_probability(model: Any, context: str, text: str) -> float:
    """log p(text | context) from one forward pass; the end of a document stands before everything."""
    ids = list(context.encode()) or [256]
    whole = torch.tensor([[*ids, *text.encode()]])
    with torch.no_grad():
        found = model(input_ids=whole).logits[0, :-1].double().log_softmax(-1)
    start = len(ids) - 1
    return float(found[start:].gather(1, whole[0, start + 1 :, None]).sum())


@needs_lm_eval
@pytest.mark.parametrize("name", ["gka", "hf"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_command_gets_results_computed_by_hand(
    name: str, batch_size: int, model: Path, tasks: Path, tmp_path: Path
):
    """lm_eval's command with `--model gka`, and with `--model hf`, offline on tasks in files: every
    log-likelihood, every text written and every figure is that of plain forward passes, at any batch size."""
    line = ["--model", name, "--model_args", f"pretrained={model}", "--include_path", str(tasks)]
    line += ["--tasks", ",".join(f"local_{task}" for task in TASKS), "--device", "cpu"]
    line += ["--batch_size", str(batch_size), "--log_samples", "--output_path", str(tmp_path)]
    code = "import sys; from gka.commands.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "lm-eval", *line]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline})
    assert done.returncode == 0, done.stderr[-3000:]
    plain = GKAForCausalLM.from_pretrained(model).eval()

    for sample in _samples(tmp_path, "choice"):
        wanted = [log_probability(plain, sample["doc"]["q"], c) for c in sample["doc"]["choices"]]
        found = [float(response[0][0]) for response in sample["resps"]]
        assert found == pytest.approx(wanted, rel=RELATIVE[torch.float32])
        assert sample["acc"] == float(wanted.index(max(wanted)) == sample["doc"]["gold"])
    wanted = sum(log_probability(plain, "", row["text"]) for row in TEXTS)
    size = sum(len(row["text"]) for row in TEXTS)
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text())["results"]
    found = results["local_rolling"]["bits_per_byte,none"]
    assert found == pytest.approx(-wanted / size / 0.6931471805599453, rel=RELATIVE[torch.float32])
    for sample in _samples(tmp_path, "writing"):
        ids = torch.tensor([list(sample["doc"]["q"].encode())])
        made = plain.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=256)  # type: ignore[operator]
        text = byte_tokenizer().decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        assert sample["resps"][0][0] == str(text).split("\n")[0]


@needs_lm_eval
def test_texts_of_any_length_are_one_window(model: Path):
    """A model without full attention reads a document longer than its configuration's length as a whole;
    `max_length` cuts it into windows, and the memory of the vocabulary does not grow with the text."""
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    from gka.evaluation.harness_model import GKAHarnessModel

    text = "word after word " * 300
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    plain = GKAForCausalLM.from_pretrained(model).eval()
    assert len(text) > plain.config.max_position_embeddings
    whole = GKAHarnessModel(str(model), device="cpu", chunk=512)
    found = whole.loglikelihood_rolling([request], disable_tqdm=True)
    assert found == pytest.approx([log_probability(plain, "", text)], rel=RELATIVE[torch.float32])
    windows = GKAHarnessModel(str(model), device="cpu", max_length=1600)
    found = windows.loglikelihood_rolling([request], disable_tqdm=True)
    parts = [text[i : i + 1600] for i in range(0, len(text), 1600)]
    befores = ["", *(part[-1] for part in parts[:-1])]
    wanted = sum(log_probability(plain, b, p) for b, p in zip(befores, parts, strict=True))
    assert found == pytest.approx([wanted], rel=RELATIVE[torch.float32])


@needs_lm_eval
@pytest.mark.parametrize(
    "options, named",
    [
        ({"batch_size": "auto"}, "batch_size"),
        ({"max_length": 0}, "max_length"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_options_out_of_range_are_refused(model: Path, options: dict[str, Any], named: str):
    """What cannot be used is refused by name, and what is unknown too."""
    from gka.evaluation.harness_model import GKAHarnessModel

    with pytest.raises(InputError, match=named):
        GKAHarnessModel(str(model), device="cpu", **options)
    with pytest.raises(TypeError, match="chnk"):
        GKAHarnessModel(str(model), device="cpu", chnk=3)  # type: ignore[call-arg]


def _samples(output: Path, task: str) -> list[dict[str, Any]]:
    file = next(output.rglob(f"samples_local_{task}_*.jsonl"))
    return [json.loads(line) for line in file.read_text().splitlines()]
