"""The command `gka`: help is fast, results are where it says, errors are one line and a status."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gka as package
from calling import TINY_MODEL, Run, call

pytestmark = pytest.mark.usefixtures("cache")
TINY = [
    *TINY_MODEL,
    "--max-steps=4",
    "--learning-rate=0.01",
    "--seed=1",
    "--set=training.save_steps=2",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name in "abcdef":
        (folder / f"{name}.txt").write_text(f"to {name} or not to {name}\n" * 2)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Folder of a run that `gka train` made."""
    output = tmp_path_factory.mktemp("runs") / "tiny"
    assert call("train", text, "-o", output, *TINY) == 0
    return output


def copy_of(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "copy"))


def test_help_loads_nothing_heavy() -> None:
    """`gka --help` and the commands' help import neither torch nor anything else that takes long."""
    code = (
        "import sys\nfrom gka.commands.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'transformers', 'accelerate', 'matplotlib', 'tokenizers'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    for command in ([], ["train"], ["generate"]):
        arguments = [sys.executable, "-c", code, *command, "--help"]
        done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stderr
        assert "Usage: " in done.stdout


def test_version_and_module(gka: Run) -> None:
    """`gka --version` names this version; `python -m gka` is the same command."""
    status, shown, _ = gka("--version")
    assert (status, shown) == (0, f"gated-kalmanet {package.__version__}\n")
    command = [sys.executable, "-m", "gka"]
    assert subprocess.check_output([*command, "--version"], text=True) == shown
    done = subprocess.run([*command, "train", "--recipe", "nope"], capture_output=True, text=True)
    assert (done.returncode, done.stderr[:12]) == (2, "gka: recipe ")


def test_help_names_every_command_and_its_options(gka: Run) -> None:
    """The commands are listed; train's help names each option with what it is for."""
    _, shown, _ = gka("--help")
    for command in ("train", "generate", "inspect", "recall", "mqar"):
        assert f" {command} " in shown
    _, shown, _ = gka("train", "--help")
    for option in ("--mixer", "--attention-layers", "--recipe", "--resume", "--overwrite", "--set"):
        assert option in shown


def test_train_says_where_everything_is(gka: Run, text: Path, tmp_path: Path) -> None:
    """The result is a table, and the places of model, figures and plot, which exist."""
    output = tmp_path / "run"
    status, shown, _ = gka("train", text, "-o", output, *TINY)
    assert status == 0
    assert "bits per byte" in shown
    assert "204 bytes in 6 documents" in shown
    assert "model: 1 gka, " in shown and f"4 steps of 2 x 16 tokens, into {output}" in shown
    for name in ("model", "metrics.json", "loss.png"):
        assert str(output / name) in shown
        assert (output / name).exists()


def test_options_reach_the_run(gka: Run, text: Path, tmp_path: Path) -> None:
    """Each option is the setting it names; --set reaches any other, and wins."""
    options = "--mixer gla --attention-layers 1 --num-hidden-layers 2 --dtype bfloat16 --glob *.txt"
    status, *_ = gka(
        "train", text, "-o", tmp_path, *TINY, *options.split(), "--set", "training.max_steps=1"
    )
    assert status == 0
    config = json.loads((tmp_path / "run.json").read_text())["config"]
    model, training, data = config["model"], config["training"], config["data"]
    assert (model["mixer"], model["attention_layers"], model["num_hidden_layers"]) == (
        "gla",
        [1],
        2,
    )
    assert (model["hidden_size"], model["num_heads"], model["head_dim"]) == (16, 2, 8)
    assert (training["max_steps"], training["batch_size"], training["seed"]) == (1, 2, 1)
    assert (training["dtype"], training["learning_rate"]) == ("bfloat16", 0.01)
    assert (data["glob"], data["sequence_length"]) == ("*.txt", 16)
    assert (data["text"], data["eval_fraction"]) == ([str(text)], 0.3)


def test_a_recipe_is_the_base_that_options_change(gka: Run, text: Path, tmp_path: Path) -> None:
    """A .toml file gives the settings; an option wins over it; the folder is named after it."""
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        f"[data]\ntext = ['{text}']\nsequence_length = 16\neval_fraction = 0.3\n"
        "[model]\nhidden_size = 16\nnum_heads = 2\nmixer = 'gla'\n[training]\nmax_steps = 9\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert gka("train", "--recipe", recipe, "--max-steps", "1")[0] == 0
    stored = json.loads((tmp_path / "runs" / "small-gla" / "run.json").read_text())["config"]
    assert (stored["training"]["max_steps"], stored["model"]["mixer"]) == (1, "gla")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train nowhere.txt", "text nowhere.txt does not exist"),
        ("train --recipe nope", "recipe 'nope' is unknown; known: 1b, 2.8b,"),
        ("train --recipe prime-cpu", "recipe 'prime-cpu' is one of gka prime"),
        ("prime none --recipe nope", "known: prime-cpu, prime-gpu;"),
        ("train --mixer rwkv", "unknown mixer 'rwkv'"),
        ("train --set model.ridge=1", "ridge"),
        ("train --set training.lr=1", "unknown key training.lr"),
        ("train --set max_steps=1", "--set 'max_steps=1': expected TABLE.KEY=VALUE"),
        ("train --attention-layers one", "attention_layers is 'one'"),
        ("train --max-steps 0", "training.max_steps is 0"),
        ("train --dtype half", "training.dtype is 'half'"),
        ("train --tokenizer ./none", "tokenizer './none' cannot be loaded"),
        ("train --resume", "holds no run to resume"),
        ("train --output /proc/none", "output /proc/none cannot be made"),
        ("generate nowhere --prompt x", "model nowhere holds no config.json"),
        ("generate . --prompt x --temperature -1", "temperature is -1"),
        ("generate . --prompt x --top-p 0", "top_p is 0"),
        ("generate . --prompt x --max-new-tokens 0", "max_new_tokens is 0"),
        ("inspect nowhere --prompt x", "model nowhere holds no config.json"),
        ("inspect . --prompt x --prompt-file y", "prompt and prompt_file exclude each other"),
        ("inspect . --prompt-file none.txt", "prompt_file none.txt cannot be read"),
        ("generate . --prompt x --top-k -2", "top_k is -2"),
        ("generate . --prompt x --chunk 0", "--chunk is 0"),
        ("generate . --prompt x --prompt-file y", "exclude each other"),
        ("generate . --prompt-file none.txt", "prompt_file none.txt cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    gka: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str
) -> None:
    """What was wrong is named on one line, without a traceback, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    status, _, errors = gka(*arguments.split())
    assert status == 2
    assert message in errors
    assert errors.startswith("gka: ")
    assert len(errors.splitlines()) == 1
    assert not list(tmp_path.rglob("run.json"))


def test_unknown_options_and_commands_are_refused(gka: Run) -> None:
    """A misspelt option or command is no silent default."""
    assert gka("train", "--max-step", "1")[0] == 2
    assert gka("trian")[0] == 2


def test_text_in_a_wrong_encoding_is_refused(gka: Run, tmp_path: Path) -> None:
    """Training text that is not UTF-8 is named with the place of the first bad byte."""
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    status, _, errors = gka("train", tmp_path / "latin.txt", "-o", tmp_path / "run")
    assert status == 2
    assert "latin.txt is not UTF-8 (byte 0xe9 at offset 1)" in errors


def test_an_existing_run_needs_a_decision(gka: Run, trained: Path, text: Path) -> None:
    """Without --resume or --overwrite a second run in a folder is refused; --resume reports it."""
    status, _, errors = gka("train", text, "-o", trained, *TINY)
    assert (status, "--resume" in errors, "--overwrite" in errors) == (2, True, True)
    status, shown, _ = gka("train", "--resume", "-o", trained)
    assert status == 0
    assert "is complete" in shown
    status, _, errors = gka("train", "--resume", "-o", trained, "--max-steps", "99")
    assert status == 2
    assert "training.max_steps is 99, but the run" in errors


def test_a_command_with_resume_can_be_repeated(gka: Run, text: Path, tmp_path: Path) -> None:
    """With settings given, --resume begins the run if there is none, and the second time reports it."""
    command = ("train", text, "-o", tmp_path / "run", "--resume", *TINY, "--max-steps=1")
    status, shown, _ = gka(*command)
    assert status == 0
    assert "yet: starting one" in shown
    before = (tmp_path / "run" / "metrics.json").stat().st_mtime_ns
    status, shown, _ = gka(*command)
    assert status == 0
    assert "is complete" in shown
    assert (tmp_path / "run" / "metrics.json").stat().st_mtime_ns == before


def test_interrupted_training_says_how_to_go_on(
    gka: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGINT ends with status 130, a checkpoint, and the command that resumes; that command works."""
    from gka.training import callbacks

    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.SealCheckpoints, "on_step_begin", interrupted)
        status, shown, _ = gka("train", text, "-o", tmp_path / "run", *TINY)
    assert status == 130
    assert "Stopped after step 1 of 4; the checkpoint is saved." in shown
    command = next(line for line in shown.splitlines() if line.startswith("Resume: gka "))
    assert gka(*command.removeprefix("Resume: gka ").split())[0] == 0
    assert (tmp_path / "run" / "model").is_dir()


def test_generate_streams_prompt_and_completion(gka: Run, trained: Path) -> None:
    """Run folder or model folder; the prompt comes first; the same seed gives the same text."""
    arguments = ("--prompt", "to a", "--max-new-tokens", "8")
    status, first, _ = gka("generate", trained, *arguments)
    assert status == 0
    assert first.startswith("to a")
    assert gka("generate", trained / "model", *arguments)[1] == first
    assert gka("generate", trained, *arguments, "--seed", "7")[1] != first


def test_temperature_zero_is_greedy(gka: Run, trained: Path) -> None:
    """Temperature 0 does not depend on the seed and takes the likeliest token each time."""
    import torch

    from gka.checkpoints.open import load_with_tokenizer

    arguments = ("--prompt", "to a", "--temperature", "0", "--max-new-tokens", "6")
    shown = {gka("generate", trained, *arguments, "--seed", seed)[1] for seed in ("1", "2")}
    model, tokenizer = load_with_tokenizer(trained)
    ids = tokenizer("to a", return_tensors="pt")["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            best = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
    assert {text.rstrip("\n") for text in shown} == {str(tokenizer.decode(ids[0])).rstrip("\n")}


def test_prompt_from_file_and_standard_input(
    gka: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same prompt gives the same text from an argument, a file and standard input; only an argument is
    printed again."""
    (tmp_path / "prompt").write_text("to é", encoding="utf-8")
    few = ("--max-new-tokens", "4")
    expected = gka("generate", trained, "--prompt", "to é", *few)[1].removeprefix("to é")
    assert gka("generate", trained, "--prompt-file", tmp_path / "prompt", *few)[1] == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("to é".encode())))
    assert gka("generate", trained, *few)[1] == expected


def test_an_empty_prompt_begins_a_document(gka: Run, trained: Path) -> None:
    """With no prompt at all the model writes from the start of a document."""
    status, shown, _ = gka("generate", trained, "--prompt", "", "--max-new-tokens", "4")
    assert status == 0
    assert shown.strip()


def test_prompt_in_a_wrong_encoding_is_refused(
    gka: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that is not UTF-8 is refused from argument, file and standard input."""
    bad = "caf\xe9".encode("latin-1")
    (tmp_path / "prompt").write_bytes(bad)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bad)))
    for arguments, message in (
        (("--prompt", os.fsdecode(bad)), "prompt is not valid UTF-8 (at character 3)"),
        (("--prompt-file", tmp_path / "prompt"), "is not UTF-8 (byte 0xe9 at offset 3)"),
        ((), "prompt on standard input is not UTF-8 (byte 0xe9 at offset 3)"),
    ):
        status, _, errors = gka("generate", trained, *arguments)
        assert (status, message in errors) == (2, True), errors


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_corrupt_models_are_refused(gka: Run, trained: Path, tmp_path: Path, name: str) -> None:
    """A model with a file cut short is refused, never run on what is left of it."""
    model = copy_of(trained / "model", tmp_path)
    content = (model / name).read_bytes()
    (model / name).write_bytes(content[: len(content) // 2])
    status, shown, errors = gka("generate", model, "--prompt", "to")
    assert (status, shown) == (2, "")
    assert "cannot be loaded" in errors
    assert len(errors.splitlines()) == 1


def test_weights_that_do_not_fit_are_refused(gka: Run, trained: Path, tmp_path: Path) -> None:
    """A weight that is missing is an error; it is not drawn at random."""
    from safetensors.torch import load_file, save_file

    model = copy_of(trained / "model", tmp_path)
    weights = load_file(model / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    status, _, errors = gka("generate", model, "--prompt", "to")
    assert status == 2
    assert "weights are missing: model.norm.weight" in errors


def test_a_tokenizer_larger_than_the_model_is_refused(
    gka: Run, trained: Path, tmp_path: Path
) -> None:
    """A tokenizer whose ids the model does not have is refused before any of them is met."""
    from transformers import AutoTokenizer

    model = copy_of(trained / "model", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(model)
    status, _, errors = gka("generate", model, "--prompt", "to")
    assert status == 2
    assert "its tokenizer has 258 ids, the model 257" in errors


def test_a_reader_that_leaves_is_no_crash(trained: Path) -> None:
    """`gka generate | head -c 1` ends quietly."""
    command = [
        sys.executable,
        "-c",
        "from gka.commands.main import main; main()",
        "generate",
        str(trained),
    ]
    child = subprocess.Popen(
        [*command, "--prompt", "to", "--max-new-tokens", "30"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.close()
    _, errors = child.communicate()
    assert errors == b""


GREEDY = ("--temperature", "0", "--max-new-tokens", "9")


def test_a_text_goes_on_from_its_state(gka: Run, trained: Path, tmp_path: Path) -> None:
    """--state makes the file and goes on from it: two runs write what one run over the whole text does,
    whatever the prefill chunks."""
    from gka import GenerationSession
    from gka.checkpoints.open import load_with_tokenizer
    from gka.serving.statefile import read_header

    state = ("--state", tmp_path / "chat.state", *GREEDY)
    runs = [("--prompt", "to a"), ("--prompt", " or", "--chunk", "1"), ("--prompt", "")]
    shown = []
    for run in runs:
        status, text, _ = gka("generate", trained, *run, *state)
        assert status == 0
        shown.append(text.rstrip("\n"))
    model, tokenizer = load_with_tokenizer(trained)
    session = GenerationSession(model)  # type: ignore[arg-type]
    for (_, prompt, *_), text in zip(runs, shown, strict=True):
        if prompt:
            session.append(tokenizer(prompt)["input_ids"])  # type: ignore[arg-type]
        new = [int(token) for token in session.generate(9)]
        assert text == (prompt + str(tokenizer.decode(new))).rstrip("\n")
    assert read_header(tmp_path / "chat.state")["tokens"] == 4 + 3 + 3 * 9


def test_a_state_can_be_kept(gka: Run, trained: Path, tmp_path: Path) -> None:
    """--save-state leaves the file of --state as it is, which must exist, and makes its own."""
    base, chat = tmp_path / "base", tmp_path / "chat"
    both = ("--state", base, "--save-state", chat, *GREEDY)
    status, _, errors = gka("generate", trained, "--prompt", "to a", *both)
    assert status == 2 and "base does not exist" in errors and not chat.exists()
    assert gka("generate", trained, "--prompt", "to a", "--save-state", base, *GREEDY)[0] == 0
    before = base.read_bytes()
    assert gka("generate", trained, "--prompt", " or", *both)[0] == 0
    assert base.read_bytes() == before and chat.read_bytes() != before


def test_damaged_states_are_refused_and_kept(gka: Run, trained: Path, tmp_path: Path) -> None:
    """A state cut short ends the command before any text, and the file is not written over."""
    path = tmp_path / "s"
    gka("generate", trained, "--prompt", "to a", "--state", path, *GREEDY)
    path.write_bytes(path.read_bytes()[:-7])
    before = path.read_bytes()
    status, shown, errors = gka("generate", trained, "--prompt", "b", "--state", path, *GREEDY)
    assert (status, shown) == (2, "") and "cut short" in errors
    assert path.read_bytes() == before


def test_solver_options_reach_the_model(
    gka: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--num-iter, --ridge-ratio and --solver change the model that writes; bad values are refused."""
    from gka.commands import generate

    seen: list[Any] = []
    monkeypatch.setattr(generate, "complete", lambda session, *_: seen.append(session.model) or "")
    options = ("--num-iter", "7", "--ridge-ratio", "0.5", "--solver", "adaptive")
    assert gka("generate", trained, "--prompt", "x", *options)[0] == 0
    mixer = seen[0].model.layers[0].mixer
    assert (mixer.num_iter, mixer.ridge_ratio, mixer.solver) == (7, 0.5, "adaptive")
    for bad in (("--num-iter", "-1"), ("--ridge-ratio", "0"), ("--solver", "magic")):
        status, _, errors = gka("generate", trained, "--prompt", "x", *bad)
        assert status == 2 and bad[0].strip("-").split("-")[-1] in errors


def test_inspect_writes_page_figures_and_table(gka: Run, trained: Path, tmp_path: Path) -> None:
    """The page and its figures are where the command says; options reach the solve; no text, no page."""
    output = tmp_path / "look"
    options = ("--output", output, "--positions", "3", "--num-iter", "11", "--chunk", "2")
    status, shown, _ = gka("inspect", trained, "--prompt", "to be or not", *options)
    assert status == 0 and "0 gka" in shown
    for name in ("inspection.html", "inspection.json"):
        assert str(output / name) in shown
    content = json.loads((output / "inspection.json").read_text())
    assert content["tokens"] == 12 and content["positions"] == [3, 7, 11]
    assert content["layers"][0]["num_iter"] == 11
    assert (output / "inspection.html").read_text().startswith("<!doctype html>")
    status, _, errors = gka("inspect", trained, "--prompt", "", "--output", tmp_path / "none")
    assert status == 2 and "the text is empty" in errors and not (tmp_path / "none").exists()


def test_inspect_refuses_models_without_a_ridge(gka: Run, trained: Path, tmp_path: Path) -> None:
    """A model of attention and gla has nothing to inspect: status 2, one line, no page; it generates."""
    from gka.models import GKAConfig, GKAForCausalLM

    model = Path(shutil.copytree(trained / "model", tmp_path / "model"))
    sizes: dict[str, Any] = {"vocab_size": 259, "hidden_size": 16, "num_heads": 2, "head_dim": 8}
    GKAForCausalLM(GKAConfig(mixers=["attention", "gla"], **sizes)).save_pretrained(model)
    status, shown, errors = gka(
        "inspect", model, "--prompt", "to be", "--output", tmp_path / "look"
    )
    assert status == 2 and shown == "" and not (tmp_path / "look").exists()
    assert "no Gated KalmaNet layer" in errors and "(its mixers: attention, gla)" in errors
    assert errors.count("\n") == 1
    assert gka("generate", model, "--prompt", "to be", "--state", tmp_path / "s", *GREEDY)[0] == 0
    assert (tmp_path / "s").exists()
