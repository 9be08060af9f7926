"""What all commands share: lines for those who see no terminal, threads that wait, answers to signals."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console
from rich.progress import Progress

from gka import console as consoles
from gka.console import counted, duration, lines, status, wait_without_spinning

LONG = """
import signal, sys, threading, time
from gka.training.callbacks import stop_on_signals
with stop_on_signals() as stop:
    print("ready", flush=True)
    if sys.argv[1] == "deaf":
        # A call into C that returns late: handlers of Python wait for it, as for a long step of torch.
        import hashlib
        hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)
    while stop.signal is None:
        time.sleep(0.01)
print("stopped", flush=True)
"""


def test_lines_go_on_where_no_terminal_moves_one() -> None:
    """A line every so often while a block runs, none after it; no line to say, or a terminal, no line."""
    said = io.StringIO()
    with lines(Console(file=said, width=80), lambda: "step [1]", seconds=0.02):
        time.sleep(0.3)
    count = said.getvalue().count("step [1]\n")
    time.sleep(0.1)
    assert 2 <= count == said.getvalue().count("step [1]\n")
    for console, line in (
        (Console(file=(empty := io.StringIO())), ""),
        (Console(file=(terminal := io.StringIO()), force_terminal=True), "x"),
        (Console(file=(quiet := io.StringIO()), quiet=True), "x"),
    ):
        with lines(console, lambda line=line: line, seconds=0.01):
            time.sleep(0.1)
    assert not (empty.getvalue() or terminal.getvalue() or quiet.getvalue())


def test_a_status_and_a_bar_become_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would move on a terminal is said in lines elsewhere: the newest text, how many are done."""
    monkeypatch.setattr(consoles, "LINE_SECONDS", 0.02)
    console = Console(file=(said := io.StringIO()), width=80)
    with status(console, "reading") as change:
        change("reading 2 of 3")
        time.sleep(0.2)
    assert "reading 2 of 3\n" in said.getvalue()
    progress = Progress(console=console)
    progress.advance(progress.add_task("", total=7), 3)
    assert counted("cells", progress)() == "cells: 3 of 7, 0 s"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000 None"), ({"GOMP_SPINCOUNT": "9"}, "9 None"), ({"OMP_WAIT_POLICY": "active"}, "None active")],
)  # fmt: skip
def test_threads_wait_without_spinning(given: dict[str, str], expected: str) -> None:
    """Commands limit the spinning of torch's threads, unless the environment has a policy of its own."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    code = (
        "import os, sys\nfrom gka.commands.main import main\n"
        "try: main(['--version'])\nexcept SystemExit: pass\n"
        f"print(*(os.environ.get(name) for name in {names}))"
    )
    clean = {name: value for name, value in os.environ.items() if name not in names}
    shown = subprocess.check_output([sys.executable, "-c", code], env=clean | given, text=True)
    assert shown.splitlines()[-1] == expected


def test_a_loaded_torch_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once torch is loaded its threads have their policy: the environment is not touched for nothing."""
    import torch  # noqa: F401

    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    wait_without_spinning()
    assert "GOMP_SPINCOUNT" not in os.environ


def started(how: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", LONG, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


def heard(child: subprocess.Popen[str]) -> str:
    """The first line with something in it of a child's errors."""
    assert child.stderr is not None
    return next(line.strip() for line in child.stderr if line.strip())


def test_a_first_interruption_is_answered_at_once() -> None:
    """Even in the midst of a call into C the answer comes at once, and a second interruption ends it."""
    child = started("deaf")
    began = time.monotonic()
    child.send_signal(signal.SIGINT)
    assert heard(child) == "finishing this step, then saving; once more: stop now"
    assert time.monotonic() - began < 5
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=6) == 128 + signal.SIGINT
    child.communicate()


def test_an_interruption_lets_the_step_end() -> None:
    """One signal: the answer, and the block ends by itself."""
    child = started("steps")
    child.send_signal(signal.SIGTERM)
    assert "finishing this step" in heard(child)
    assert child.communicate()[0] == "stopped\n" and child.returncode == 0


def test_durations_are_said_as_people_do() -> None:
    """Seconds, minutes, hours, days: two digits or so."""
    assert [duration(s) for s in (4.2, 99, 600, 9000, 400000)] == [
        "4 s", "99 s", "10 min", "2.5 h", "4.6 days",
    ]  # fmt: skip
