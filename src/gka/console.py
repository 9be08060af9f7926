"""Shared by all commands: a console without markup, progress lines, threads that do not spin, and signals."""

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
"""Seconds between two progress lines if the output is no terminal."""
_OUTPUTS = (1, 2)
_SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_SPINS = "1000"


def text_console(**options: Any) -> "Console":
    """A rich console that prints text as it is, `[brackets]` of a path or a name included.

    Args:
        options: options of `rich.console.Console`.
    """
    from rich.console import Console

    return Console(**{"markup": False, "emoji": False, **options})


def wait_without_spinning() -> None:
    """Let idle threads of torch sleep soon; has no effect once torch is loaded.

    With GNU OpenMP, which torch's Linux wheels contain, a thread that waits for others spins for
    milliseconds. On a busy machine it occupies the core that the awaited thread needs, and a training step
    then takes more than ten times as long. A wait policy of the environment is kept.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _SPINNING):
        os.environ["GOMP_SPINCOUNT"] = _SPINS


@contextmanager
def lines(
    console: "Console", say: Callable[[], str], seconds: float | None = None
) -> Iterator[None]:
    """Print `say()` at intervals while the block runs, if the output is no terminal.

    Args:
        console: where to print; nothing is printed if it is a terminal or quiet.
        say: returns the line, called in another thread; "" prints nothing.
        seconds: interval (None: `LINE_SECONDS`).
    """
    if console.is_terminal or console.quiet:
        yield
        return
    over = threading.Event()

    def tell() -> None:
        with contextlib.suppress(OSError):  # the command itself reports a closed pipe
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
    """Show `text`, animated on a terminal, else by `lines`; yields a function that changes it."""
    said = text

    def change(new: str) -> None:
        nonlocal said
        said = new
        shown.update(new)

    with console.status(text) as shown, lines(console, lambda: said):
        yield change


def counted(what: str, progress: "Progress") -> Callable[[], str]:
    """A progress bar as text for `lines`: how many of `what` are done, and the time taken."""

    def say() -> str:
        task = progress.tasks[0]
        return f"{what}: {task.completed:.0f} of {task.total:.0f}, {duration(task.elapsed or 0)}"

    return say


def duration(seconds: float) -> str:
    """Seconds as text: "40 s", "12 min", "3.5 h", "2.1 days"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def stop_signals() -> tuple[int, ...]:
    """SIGINT, SIGTERM, and SIGHUP (the terminal was closed) unless it is ignored, as under nohup."""
    found = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        found.append(hangup)
    return tuple(found)


@contextmanager
def answered(numbers: Collection[int], answer: str, grace: float = 2.0) -> Iterator[None]:
    """Write `answer` to standard error at the first of some signals; end the process after a second signal.

    Python runs a signal's handler only when the running call into torch returns, which may take long. So a
    thread is woken at once. After a second signal it gives the block `grace` seconds to end, then exits.

    Args:
        numbers: signals that have Python handlers.
        answer: one line; "" for none.
        grace: seconds that the block has to end after the second signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals only in the main thread
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
        told.close()  # ends the watcher
        watcher.join()
        heard.close()


def _answer(heard: socket.socket, numbers: frozenset[int], answer: str, grace: float) -> None:
    """Read signal numbers until the other end is closed."""
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
            _write("\x1b[?25h")  # show the cursor, which an animated line hides
        os._exit(128 + found[0])


def _write(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be closed
        os.write(2, text.encode())


def terminals() -> tuple[int, ...]:
    """Those of standard output (1) and standard error (2) that are terminals."""
    return tuple(number for number in _OUTPUTS if os.isatty(number))


def leave_lost(before: tuple[int, ...]) -> None:
    """Discard output to terminals that have been closed, because every write to them fails.

    Args:
        before: `terminals()` from before they were closed.
    """
    for number in before:
        if not os.isatty(number):
            to_nowhere(number)


def to_nowhere(number: int) -> None:
    """Discard what this process writes to the open file of this number."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
