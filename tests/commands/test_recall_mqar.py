"""`gka recall` and `gka mqar` from the command line."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import typer
from typer.testing import CliRunner

from gka.commands.mqar import mqar
from gka.commands.recall import recall
from gka.errors import InputError

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(recall)
app.command()(mqar)

PNG = b"\x89PNG\r\n\x1a\n"
TINY_RECALL = (
    "recall --head-dim 8 --pairs 4,8 --correlations 0.5 --ridge-ratios 0.02 --num-iters 30"
)
TINY_MQAR = "mqar --mixers gla,attention --sizes 8x8 --learning-rates 0.01 --seeds 1 --max-steps 1"


def run(line: str, *more: str):
    return CliRunner(env={"COLUMNS": "100"}).invoke(app, [*line.split(), *more])


def test_recall_leaves_a_table_figures_and_a_plot(tmp_path):
    """One command prints what was learnt, the table, its key and what to try next, and writes recall.json
    and recall.png where it says."""
    done = run(TINY_RECALL + " --seeds 2", "--output", str(tmp_path / "new"))
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].startswith("8 pairs, key cosine 0.5: GKA points to the right value in ")
    assert (
        lines[1].startswith("8 pairs, key cosine 0.5: GKA's relative error is ") and lines[2] == ""
    )
    assert "GKA a=0.02 r=30" in done.output and "recall.png" in done.output
    assert "A cell: relative error |o - v| / |v|" in done.output and "gka mqar" in lines[-1]
    content = json.loads((tmp_path / "new" / "recall.json").read_text())
    assert content["settings"]["head_dim"] == 8 and content["settings"]["pairs"] == [4, 8]
    assert {m["memory"] for m in content["measurements"]} >= {"linear attention", "DeltaNet beta=1"}
    assert (tmp_path / "new" / "recall.png").read_bytes().startswith(PNG)


def test_mqar_trains_reports_and_does_not_train_twice(tmp_path):
    """The command writes mqar.json and mqar.png, and a second run finds its cells finished."""
    output = ("--output", str(tmp_path))
    first = run(TINY_MQAR, *output)
    assert first.exit_code == 0, first.output
    assert "mqar.json" in first.output and "attention" in first.output
    assert (tmp_path / "mqar.png").read_bytes().startswith(PNG)
    content = json.loads((tmp_path / "mqar.json").read_text())
    assert [row["mixer"] for row in content["summary"]] == ["gla", "attention"]
    again = run(TINY_MQAR, *output)
    assert again.exit_code == 0
    assert json.loads((tmp_path / "mqar.json").read_text())["cells"] == content["cells"]


@pytest.mark.skipif(os.name != "posix", reason="signals and process groups of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_sweep_leaves_no_process_behind(number, tmp_path):
    """SIGTERM, SIGHUP and Ctrl-C, also where a shell has switched that off, end the trainings
    of every process, with status 128 + signal and word of how to go on."""
    line = (
        "mqar --mixers gla,deltanet --sizes 8x8 --learning-rates 0.01 --seeds 1 --max-steps 1000000"
        " --processes 2 --output"
    )
    code = "from gka.commands.main import main; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, *line.split(), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        deadline = time.monotonic() + 120
        while _group_size(child.pid) < 4:  # the command, two trainings, their resource tracker
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        child.send_signal(number)
        output, _ = child.communicate(timeout=60)
        assert child.returncode == 128 + number
        assert "Run the same command again to go on" in output
        deadline = time.monotonic() + 30
        while _group_size(child.pid) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert _group_size(child.pid) == 0
    finally:
        if _group_size(child.pid):
            os.killpg(child.pid, signal.SIGKILL)


def _group_size(group: int) -> int:
    """Processes alive in a process group."""
    table = subprocess.run(
        ["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split() for line in table.splitlines()]
    return sum(int(pgid) == group and not stat.startswith("Z") for pgid, stat in rows)


@pytest.mark.parametrize(
    "line, named",
    [
        ("recall --pairs 4,x", "--pairs"),
        ("recall --pairs 4.5", "--pairs"),
        ("recall --correlations 1", "correlations"),
        ("recall --ridge-ratios 0", "ridge_ratios"),
        ("recall --num-iters 0", "num_iters"),
        ("recall --seeds 0", "--seeds"),
        ("recall --head-dim 0", "head_dim"),
        ("mqar --preset huge", "--preset"),
        ("mqar --mixers gka,mamba", "mamba"),
        ("mqar --max-steps 0", "--max-steps"),
        ("mqar --processes 0", "--processes"),
        ("mqar --device tpu9", "--device"),
        ("mqar --learning-rates fast", "--learning-rates"),
        ("mqar --sizes 16", "--sizes"),
        ("mqar --sizes 16x0", "sizes"),
    ],
)
def test_bad_options_are_refused_by_name(line, named, tmp_path):
    """An option out of range ends the command with an error that names it, before any work."""
    done = run(line, "--output", str(tmp_path / "unused"))
    assert isinstance(done.exception, InputError)
    assert named in str(done.exception)
    assert not (tmp_path / "unused" / "mqar.json").exists()


def test_an_output_that_cannot_be_a_folder_is_refused(tmp_path):
    """A file in the way of the output folder is an error at once."""
    (tmp_path / "file").write_text("here first")
    done = run(TINY_RECALL, "--output", str(tmp_path / "file"))
    assert isinstance(done.exception, InputError) and "--output" in str(done.exception)


def test_importing_the_commands_is_light():
    """The command line can register the commands without transformers, matplotlib or rich."""
    code = (
        "import sys, gka.commands.mqar, gka.commands.recall;"
        "print([m for m in ('transformers', 'matplotlib', 'rich', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
