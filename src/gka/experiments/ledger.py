"""An experiment's results in a folder: figures as JSON, a table as Markdown, a plot.

The JSON is rewritten after each result, so that an interrupted run leaves its results. This needs only torch:
without rich, tables are plain text, and without matplotlib there is no plot.
"""

import atexit
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gka.console import text_console
from gka.errors import InputError
from gka.storage import only_writer, read_json, write_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Sequence[object]
Draw = Callable[["Figure"], object]
_stack = ExitStack()
_owned: set[Path] = set()
atexit.register(_stack.close)


class Ledger:
    """Figures of one run.

    Args:
        locked: whether the caller holds the folder's lock. If not, this process locks it until it ends.

    Attributes:
        folder: the folder of the files.
        name: file name without suffix.
        found: content of NAME.json.
    """

    def __init__(self, folder: Path, name: str, locked: bool = False) -> None:
        if not locked:
            own(folder)
        self.folder, self.name, self.began = folder, name, time.perf_counter()
        self.found: dict[str, Any] = {}

    @property
    def elapsed(self) -> float:
        """Seconds since the ledger was opened."""
        return time.perf_counter() - self.began

    def say(self, text: str) -> None:
        """Print a line with the elapsed time."""
        print(f"[{self.elapsed:6.1f} s] {text}", flush=True)

    def note(self, **figures: Any) -> None:
        """Add figures, and write the JSON."""
        self.found |= figures
        write_json(self.folder / f"{self.name}.json", self.found)

    def begin(self, settings: Mapping[str, Any], resume: bool) -> None:
        """Begin with these settings; `resume` keeps the figures of an earlier run with the same settings.

        Raises:
            InputError: the earlier run had other settings, or its file is damaged.
        """
        path = self.folder / f"{self.name}.json"
        stored = json.loads(json.dumps(dict(settings)))  # tuples are lists there
        self.found = read_json(path) if resume and path.exists() else {"settings": stored}
        if differs := _differences(self.found.get("settings"), stored):
            raise InputError(
                f"{path} has figures of other settings ({differs}); give another --output"
            )

    def cell(self, key: str, measure: Callable[[], Any]) -> Any:
        """The figure `key`, measured and written unless it is known."""
        cells = self.found.setdefault("cells", {})
        if key not in cells:
            cells[key] = measure()
            self.note()
        return cells[key]

    def attempt(self, key: str, measure: Callable[[], Any], **more: Any) -> dict[str, Any]:
        """Measure the figure `key` and write a record of it, also if it fails.

        Returns:
            {"state": "done", "result", "seconds"} or {"state": "failed", "reason", "seconds"}, with `more`.
        """
        return self.write(key, record_of(measure) | more)

    def keep(self, key: str, found: Any, seconds: float, **more: Any) -> dict[str, Any]:
        """Write the record of `attempt`: of figures, or of the exception in their place."""
        return self.write(key, _record(found, seconds) | more)

    def write(self, key: str, record: dict[str, Any]) -> dict[str, Any]:
        """Write a record that another process or `record_of` has made, and return it."""
        self.found.setdefault("cells", {})[key] = record
        self.note()
        return record

    def report(self, page: str, draw: Draw | None = None) -> None:
        """Write NAME.md and, with matplotlib, NAME.png, and print where."""
        report(self.folder / self.name, page, draw)


def record_of(measure: Callable[[], Any]) -> dict[str, Any]:
    """What `measure` returns or why it fails, and its seconds; see `Ledger.attempt`."""
    began = time.perf_counter()
    try:
        found = measure()
    except Exception as error:
        found = error
    return _record(found, time.perf_counter() - began)


def _record(found: Any, seconds: float) -> dict[str, Any]:
    """The record of figures, or of the exception in their place."""
    if isinstance(found, Exception):
        reason = (str(found).splitlines() or [""])[0]
        record = {"state": "failed", "reason": f"{type(found).__name__}: {reason}"}
    else:
        record = {"state": "done", "result": found}
    return record | {"seconds": round(seconds, 3)}


def _differences(there: Any, here: dict[str, Any]) -> str:
    """Which settings differ, in words; empty if none does."""
    if not isinstance(there, dict):
        return "none are noted there"
    return ", ".join(
        f"{name}: {there.get(name, 'none')} there, {here.get(name, 'none')} here"
        for name in {**there, **here}
        if there.get(name) != here.get(name) or (name in there) != (name in here)
    )


def report(base: Path, page: str, draw: Draw | None = None) -> None:
    """Write `base`.md and, with matplotlib, `base`.png, and print where."""
    files = [base.with_name(f"{base.name}{ending}") for ending in (".md", ".png")]
    write_text(files[0], page)
    if draw is not None and not picture(files[1], draw):
        print("no picture: matplotlib is not installed; it can be drawn elsewhere from the JSON")
    print(f"Written to {base.parent}")


def own(folder: Path) -> None:
    """Create `folder` if it is missing, and lock it until the process ends.

    Raises:
        SystemExit: another process writes it, or it cannot be created.
    """
    if folder.resolve() not in _owned:
        with refusing():
            _stack.enter_context(only_writer(folder, "--output"))
        _owned.add(folder.resolve())


@contextmanager
def refusing() -> Iterator[None]:
    """Turn an `InputError` into an exit with a one-line message."""
    try:
        yield
    except InputError as error:
        raise SystemExit(f"error: {error}") from None


def markdown_table(head: Row, rows: Sequence[Row]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def print_table(head: Row, rows: Sequence[Row], title: str | None = None) -> None:
    """Print a table, with rich if it is installed."""
    lines = [[str(cell) for cell in line] for line in (head, *rows)]
    if importlib.util.find_spec("rich"):
        from rich.table import Table

        table = Table(title=title)
        for name, *cells in zip(*lines, strict=True):
            numbers = all(cell[:1].isdigit() for cell in cells if cell)
            table.add_column(name, justify="right" if numbers else "left", overflow="fold")
        for line in lines[1:]:
            table.add_row(*line)
        text_console(width=None if os.isatty(1) else 200).print(table)
        return
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in [[title], *lines] if title else lines:
        print("  ".join(x.ljust(n) for x, n in zip(line, widths, strict=False)).rstrip())


def picture(path: Path, draw: Draw, dpi: int = 110) -> bool:
    """Write the plot of `draw` as PNG; returns False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    from gka.evaluation.plots import save_figure

    figure = Figure(layout="constrained")
    draw(figure)
    save_figure(figure, path, dpi)
    return True
