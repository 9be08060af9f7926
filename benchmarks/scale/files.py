"""The files by which the processes of a launch tell the launcher what they found, and where they are."""

import time
from pathlib import Path
from typing import Any

from gka.storage import read_json, write_json

BEGUN, MEMORY = "begun.json", "memory"


class Folder:
    """A launch's folder, which ranks write and the launcher reads.

    Args:
        path: an existing folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, key: str, found: dict[str, Any]) -> None:
        """Keep a cell's figures until the launcher takes them."""
        write_json(self.path / f"cell-{_name(key)}.json", {"key": key, "found": found})

    def take(self) -> dict[str, dict[str, Any]]:
        """Figures that were written since; their files are removed."""
        taken = {}
        for file in sorted(self.path.glob("cell-*.json")):
            cell = read_json(file)
            taken[cell["key"]] = cell["found"]
            file.unlink()
        return taken

    def begin(self, key: str) -> None:
        """Say which cell is measured from now on."""
        write_json(self.path / BEGUN, {"key": key, "time": time.time()})

    def begun(self) -> tuple[str, float] | None:
        """The cell that is being measured, and since when."""
        file = self.path / BEGUN
        if not file.exists():
            return None
        found = read_json(file)
        return found["key"], found["time"]

    def note_memory(self, key: str, rank: int, way: str, message: str) -> None:
        """Say that this rank's memory does not suffice."""
        told = {"key": key, "way": way, "message": message, "time": time.time()}
        write_json(self.path / f"{MEMORY}-{_name(key)}-{rank}.json", told)

    def forget_memory(self, key: str, rank: int) -> None:
        """All ranks have heard of it."""
        (self.path / f"{MEMORY}-{_name(key)}-{rank}.json").unlink(missing_ok=True)

    def memory(self) -> dict[str, Any] | None:
        """The first rank's word that others have not heard yet."""
        told = []
        for file in self.path.glob(f"{MEMORY}-*.json"):
            try:
                told.append(read_json(file))
            except FileNotFoundError:  # all have heard it meanwhile
                continue
        return min(told, key=lambda word: word["time"], default=None)

    def clear(self) -> None:
        """Remove what an ended launch has left, but for figures."""
        for file in self.path.glob(f"{MEMORY}-*.json"):
            file.unlink()
        (self.path / BEGUN).unlink(missing_ok=True)


def _name(key: str) -> str:
    return key.replace("/", "-")
