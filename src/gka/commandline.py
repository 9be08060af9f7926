"""What all commands share: a console that shows text as it is, and the signals that ask for a stop."""

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_OUTPUTS = (1, 2)


def text_console(**options: Any) -> "Console":
    """A rich console that takes no text for markup: `[brackets]` in a path or a name are brackets.

    Args:
        options: of `rich.console.Console`.
    """
    from rich.console import Console

    return Console(**{"markup": False, "emoji": False, **options})


def stop_signals() -> tuple[int, ...]:
    """SIGINT, SIGTERM, and SIGHUP (the terminal was closed) unless nohup has it ignored."""
    found = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        found.append(hangup)
    return tuple(found)


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
