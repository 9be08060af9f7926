"""`gka evaluate`: grids of cells over saved models, from the command line."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from gka.commands.main import app
from gka.data import byte_tokenizer
from gka.errors import InputError
from gka.evaluation.context import run
from gka.models import GKAConfig, GKAForCausalLM
from tolerances import RELATIVE

PNG = b"\x89PNG\r\n\x1a\n"
TEXT = Path(__file__).parents[3] / "src" / "gka" / "maths"
SMALL = ["--tasks", "needle,facts-5,perplexity", "--lengths", "512,640", "--depths", "0,1"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved model of this library, one of transformers, and what is no model."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    sizes: dict[str, Any] = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1}
    GKAForCausalLM(GKAConfig(**sizes, num_heads=2, head_dim=8)).save_pretrained(root / "ours")
    llama = LlamaConfig(**sizes, intermediate_size=16, num_attention_heads=2)
    LlamaForCausalLM(llama).save_pretrained(root / "llama")
    shutil.copytree(root / "ours", root / "speechless")
    byte_tokenizer().save_pretrained(root / "ours")
    byte_tokenizer().save_pretrained(root / "llama")
    (root / "run").mkdir()
    shutil.copytree(root / "ours", root / "run" / "model")
    (root / "empty").mkdir()
    return {path.name: path for path in root.iterdir()}


def evaluate(*arguments: Any):
    """The command, with few samples of our own sources."""
    fixed = ["--samples", "2", "--text", str(TEXT), "--device", "cpu"]
    line = ["evaluate", *map(str, arguments), *fixed]
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, line)


def cells(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "evaluate.json").read_text())["cells"]


def test_models_are_compared_by_one_command(folders, tmp_path):
    """A model of this library and one of transformers give a table, cells in one file and a picture each."""
    done = evaluate(folders["ours"], folders["llama"], *SMALL, "--output", tmp_path)
    assert done.exit_code == 0, done.output
    for shown in ("needle", "facts-5", "perplexity", "evaluate.json", "ours.png", "llama.png"):
        assert shown in done.output
    assert (tmp_path / "ours.png").read_bytes().startswith(PNG)
    assert (tmp_path / "llama.png").read_bytes().startswith(PNG)
    found = cells(tmp_path)
    assert len(found) == 2 * 2 * (2 + 1 + 1)
    asked = {(c["cell"]["task"], c["cell"]["length"], c["cell"]["depth"]) for c in found}
    assert ("needle", 512, 0.0) in asked and ("needle", 640, 1.0) in asked
    assert ("facts-5", 512, None) in asked and ("perplexity", 640, None) in asked
    for cell in found:
        assert len(cell["samples"]) == 2
        if cell["cell"]["task"] == "perplexity":
            assert cell["result"]["bits_per_byte"] == pytest.approx(8, abs=0.3)
        else:
            assert 0 <= cell["result"]["rank"] <= 1 and cell["result"]["chance"] in (0.1, 0.5)
            assert {"written", "answers", "match", "rank"} <= cell["samples"][0].keys()


def test_finished_cells_are_not_run_again(folders, tmp_path, monkeypatch):
    """After an interruption the same command runs only what is missing, and a larger grid only what is
    new; other models' and lengths' cells stay in the file."""
    ran: list[tuple[str, int]] = []
    real = run._run_cell

    def counting(cell, subject, grader):
        if len(ran) == 3:
            raise RuntimeError("the power went out")
        ran.append((cell.task, cell.length))
        return real(cell, subject, grader)

    monkeypatch.setattr(run, "_run_cell", counting)
    stopped = evaluate(folders["ours"], *SMALL, "--output", tmp_path)
    assert isinstance(stopped.exception, RuntimeError)
    kept = cells(tmp_path)
    assert len(kept) == 3
    ran.clear()
    monkeypatch.setattr(run, "_run_cell", lambda *given: (ran.append(given[0]), real(*given))[1])
    assert evaluate(folders["ours"], *SMALL, "--output", tmp_path).exit_code == 0
    assert len(ran) == 8 - 3 and cells(tmp_path)[:3] == kept
    ran.clear()
    done = evaluate(folders["ours"], "--tasks", "needle", "--lengths", "512,700", "--depths", "0,1",
                    "--output", tmp_path)  # fmt: skip
    assert done.exit_code == 0 and len(ran) == 2 and len(cells(tmp_path)) == 10
    assert "640" not in done.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_evaluation_says_how_to_go_on(folders, tmp_path, monkeypatch, number):
    """SIGTERM and Ctrl-C end the command with status 128 + signal, and keep what was finished."""
    real, ran = run._run_cell, []

    def stopping(*given):
        if ran:
            os.kill(os.getpid(), number)
        ran.append(given)
        return real(*given)

    monkeypatch.setattr(run, "_run_cell", stopping)
    done = evaluate(folders["ours"], *SMALL, "--output", tmp_path)
    assert done.exit_code == 128 + number, done.output
    assert "Run the same command again to go on" in done.output
    assert len(cells(tmp_path)) == 1 and not list(tmp_path.glob("*.png"))


def test_a_model_that_changed_is_asked_again(folders, tmp_path):
    """Weights saved anew under the same name do not get the old ones' results."""
    shutil.copytree(folders["ours"], tmp_path / "model")
    line = [tmp_path / "model", "--tasks", "perplexity", "--lengths", "256", "--output", tmp_path]
    assert evaluate(*line).exit_code == 0
    model = GKAForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    model.save_pretrained(tmp_path / "model")
    assert evaluate(*line).exit_code == 0
    first, second = (cell["result"]["bits_per_byte"] for cell in cells(tmp_path))
    assert first != second


def test_a_run_is_found_by_its_folder(folders, tmp_path):
    """The folder of a run of `gka train` will do, with a chunk that does not change the result."""
    results = []
    for i, chunk in enumerate(("16", "2048")):
        output = tmp_path / str(i)
        line = ["--tasks", "perplexity,needle", "--lengths", "300", "--depths", "0.5"]
        done = evaluate(folders["run"], *line, "--chunk", chunk, "--output", output)
        assert done.exit_code == 0, done.output
        results.append([cell["result"] for cell in cells(output)])
    for one, other in zip(*results, strict=True):
        shared = one.keys() & {"bits_per_byte", "rank", "match"}
        assert shared
        for name in shared:
            assert one[name] == pytest.approx(other[name], rel=RELATIVE[torch.float32])


@pytest.mark.parametrize(
    "changed, named",
    [
        (["--tasks", "needle,haystack"], "tasks holds 'haystack'"),
        (["--tasks", "needle,needle"], "tasks is"),
        (["--lengths", "255"], "lengths holds 255"),
        (["--lengths", "4k"], "--lengths"),
        (
            ["--lengths", "256", "--tasks", "needle,facts-3"],
            "task facts-3: length 256 is too short",
        ),
        (["--depths", "0,2"], "depths"),
        (["--samples", "0"], "samples is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--dtype", "int8"], "--dtype"),
        (["--chunk", "0"], "--chunk"),
        (["--device", "tpu9"], "--device"),
        (["--text", "nowhere"], "nowhere"),
    ],
)
def test_bad_options_are_refused_by_name(folders, changed, named, tmp_path):
    """An option out of range, or a length too short for a task, ends the command before any model is
    loaded, with an error that names it."""
    line = ["--lengths", "512", "--output", tmp_path / "unused"]
    arguments = ["evaluate", str(folders["ours"]), *map(str, line), "--samples", "1", *changed]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, InputError), done.output
    assert named in str(done.exception)
    assert not (tmp_path / "unused" / "evaluate.json").exists()


@pytest.mark.parametrize(
    "folder, named",
    [("empty", "holds no config.json"), ("speechless", "has no tokenizer beside it")],
)
def test_folders_without_a_model_or_tokenizer_are_refused(folders, folder, named, tmp_path):
    """What is missing in a folder is said."""
    done = evaluate(folders[folder], *SMALL, "--output", tmp_path)
    assert isinstance(done.exception, InputError) and named in str(done.exception)


def test_the_same_folder_twice_is_refused(folders, tmp_path):
    """Two columns of one model would only look like a comparison."""
    done = evaluate(folders["ours"], folders["ours"], *SMALL, "--output", tmp_path)
    assert isinstance(done.exception, InputError) and "twice" in str(done.exception)


def test_empty_text_is_refused(folders, tmp_path):
    """Text without a word in it is an error."""
    (tmp_path / "blank.txt").write_text("\n\n  \n")
    line = ["evaluate", str(folders["ours"]), "--text", str(tmp_path / "blank.txt")]
    done = CliRunner().invoke(app, [*line, *SMALL, "--output", str(tmp_path / "out")])
    assert isinstance(done.exception, InputError) and "text" in str(done.exception)


def test_a_file_of_something_else_is_left_alone(folders, tmp_path):
    """An evaluate.json that is not ours is refused, not overwritten."""
    (tmp_path / "evaluate.json").write_text('{"cells": [1]}')
    done = evaluate(folders["ours"], *SMALL, "--output", tmp_path)
    assert isinstance(done.exception, InputError) and "does not hold" in str(done.exception)
    assert (tmp_path / "evaluate.json").read_text() == '{"cells": [1]}'


def test_weights_that_do_not_fit_are_refused(folders, tmp_path):
    """A model is never evaluated with weights that were made up."""
    shutil.copytree(folders["ours"], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["num_hidden_layers"], config["layer_types"] = 2, None
    config.pop("layer_types")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    done = evaluate(tmp_path / "model", *SMALL, "--output", tmp_path / "out")
    assert isinstance(done.exception, InputError) and "weights are missing" in str(done.exception)
