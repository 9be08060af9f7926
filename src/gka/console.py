"""What all commands share: a console that shows text as it is, lines that show that work goes on, threads
that wait without spinning, and the signals that ask for a stop."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

LINE_SECONDS = 10.0
"""Between two lines that show that work goes on, where no terminal shows a moving one."""
_OUTPUTS = (1, 2)
_SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_SPINS = "1000"


def text_console(**options: Any) -> "Console":
    """A rich console that takes no text for markup: `[brackets]` in a path or a name are brackets.

    Args:
        options: of `rich.console.Console`.
    """
    from rich.console import Console

    return Console(**{"markup": False, "emoji": False, **options})


def wait_without_spinning() -> None:
    """Let torch's threads sleep soon after they have nothing to do; has no effect once torch is loaded.

    GNU OpenMP, which torch's wheels for Linux bring, lets a thread that waits for the others spin for
    milliseconds. On a busy machine it spins on the core that the awaited thread needs: a training step then
    takes ten times its time and more. A wait policy given in the environment is kept.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _SPINNING):
        os.environ["GOMP_SPINCOUNT"] = _SPINS


@contextmanager
def lines(
    console: "Console", say: Callable[[], str], seconds: float | None = None
) -> Iterator[None]:
    """Print `say()` now and then while the block runs, unless a terminal shows a moving line.

    Args:
        console: printed to; nothing if it is a terminal, or quiet.
        say: what there is to say now, called in another thread; "" says nothing.
        seconds: between two lines (`LINE_SECONDS`).
    """
    if console.is_terminal or console.quiet:
        yield
        return
    over = threading.Event()

    def tell() -> None:
        with contextlib.suppress(OSError):  # a reader that left; the command itself will notice
            while not over.wait(LINE_SECONDS if seconds is None else seconds):
                if line := say():
                    console.print(line, markup=False, highlight=False, soft_wrap=True)

    teller = threading.Thread(target=tell, name="gka-lines", daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


@contextmanager
def status(console: "Console", text: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done, moving on a terminal, else as `lines`; yields what changes the text."""
    said = text

    def change(new: str) -> None:
        nonlocal said
        said = new
        shown.update(new)

    with console.status(text) as shown, lines(console, lambda: said):
        yield change


def counted(what: str, progress: "Progress") -> Callable[[], str]:
    """A bar as text, for `lines`: how many of `what` are done, and since when."""

    def say() -> str:
        task = progress.tasks[0]
        return f"{what}: {task.completed:.0f} of {task.total:.0f}, {duration(task.elapsed or 0)}"

    return say


def duration(seconds: float) -> str:
    """Seconds as people say them: "40 s", "12 min", "3.5 h", "2.1 days"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def stop_signals() -> tuple[int, ...]:
    """SIGINT, SIGTERM, and SIGHUP (the terminal was closed) unless nohup has it ignored."""
    found = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        found.append(hangup)
    return tuple(found)


@contextmanager
def answered(numbers: Collection[int], answer: str, grace: float = 2.0) -> Iterator[None]:
    """Write `answer` to standard errors as soon as one of some signals arrives; end the process at a second.

    Python runs a signal's handler only once a call into torch returns, which may be a long step: here the
    system tells a thread. It leaves the second signal to its handler for a while, then exits in its place.

    Args:
        numbers: signals that have Python handlers.
        answer: one line.
        grace: seconds that the block has to end after the second signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # no handler of this thread's own could be answered
        return
    heard, told = socket.socketpair()
    told.setblocking(False)
    former = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(
        target=_answer, args=(heard, frozenset(numbers), answer, grace), daemon=True
    )
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(former)
        told.close()  # which ends the watcher
        watcher.join()
        heard.close()


def _answer(heard: socket.socket, numbers: frozenset[int], answer: str, grace: float) -> None:
    """Read numbers of signals until the other end is closed."""
    asked = False
    while found := heard.recv(1):
        if found[0] not in numbers:
            continue
        if not asked:
            asked = True
            if answer:
                _write(f"\n{answer}\n")
            continue
        heard.settimeout(grace)
        with contextlib.suppress(TimeoutError):
            while heard.recv(64):
                pass
            return
        if terminals():
            _write("\x1b[?25h")  # a moving line hides the cursor
        os._exit(128 + found[0])


def _write(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that is gone
        os.write(2, text.encode())


def terminals() -> tuple[int, ...]:
    """Which of standard output and errors are a terminal."""
    return tuple(number for number in _OUTPUTS if os.isatty(number))


def leave_lost(before: tuple[int, ...]) -> None:
    """Send to nowhere what would go to terminals that are closed, where every write is an error.

    Args:
        before: `terminals()` when they were still there.
    """
    for number in before:
        if not os.isatty(number):
            to_nowhere(number)


def to_nowhere(number: int) -> None:
    """Let an open file of this process, by its number, swallow what is written to it."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
