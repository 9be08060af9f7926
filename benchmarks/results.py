"""The folder of a benchmark's results: this process's alone until it ends."""

import atexit
from contextlib import ExitStack
from pathlib import Path

from gka.errors import InputError
from gka.storage import only_writer

_stack = ExitStack()
_owned: set[Path] = set()
atexit.register(_stack.close)


def own(folder: Path) -> None:
    """Make `folder` if it is missing, and keep other benchmarks and commands out of it.

    Raises:
        SystemExit: another process writes it, or it cannot be made.
    """
    if folder.resolve() in _owned:
        return
    try:
        _stack.enter_context(only_writer(folder, "--output"))
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    _owned.add(folder.resolve())
