"""A benchmark's run: options that all benchmarks share, the machine, and the results so far."""

import argparse
import datetime
import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gka.experiments.ledger import Ledger
from gka.experiments.stopwatch import Stopwatch

UNTOLD = ("--output", "--update", "--commit")  # left out of the reported command
TRIAL = "CPU, for a trial of the command: these times mean nothing"


class Run(Ledger):
    """Options, stopwatch and the figures so far, which begin with command, date, commit, versions and device.

    Args:
        name: the benchmark's name.
        options: from `parse`.
        on_cpu: name of a CPU in results.
    """

    def __init__(self, name: str, options: argparse.Namespace, on_cpu: str = TRIAL) -> None:
        super().__init__(options.output, name)
        self.options, self.device, self.on_cpu = options, options.device, on_cpu
        self.watch = Stopwatch(options.device)
        self.found |= {
            "command": options.command, "date": datetime.date.today().isoformat(),
            "commit": options.commit or commit(), "versions": versions(), "card": self.card(),
        }  # fmt: skip

    def card(self) -> Any:
        """The device's name."""
        return torch.cuda.get_device_name() if self.watch.cuda else self.on_cpu


def parser(
    name: str, description: str | None, device: str | None = "cuda"
) -> argparse.ArgumentParser:
    """A parser with the options that benchmarks share; without --device if `device` is None."""
    found = argparse.ArgumentParser(
        prog=f"python -m benchmarks.run {name}", description=description, allow_abbrev=False,
        formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    add = found.add_argument
    add("--output", type=Path, default=Path("runs") / f"bench-{name}", help="folder of the results")
    if device is None:
        found.set_defaults(device="cpu")
    else:
        add("--device", default=device, help=f"(default: {device}); cpu tries the command out")
    add("--commit", help="commit to report (default: from git)")
    return found


def parse(
    made: argparse.ArgumentParser, arguments: list[str] | None, folders: tuple[str, ...] = ()
) -> argparse.Namespace:
    """The options and the typed command, with only the last part of values of the options `folders`."""
    words = sys.argv[1:] if arguments is None else arguments
    options = made.parse_args(words)
    options.command = command(made.prog, words, folders)
    return options


def command(program: str, words: list[str], folders: tuple[str, ...] = ()) -> str:
    """The typed command without paths of this machine."""
    kept, option = [program], ""
    for word in words:
        if word.startswith("--"):
            option = word.partition("=")[0]
        if option not in UNTOLD:
            kept.append(name_of(Path(word)) if option in folders and word != option else word)
    return " ".join(kept)


def name_of(folder: Path) -> str:
    """Name of a model's folder (of its run's folder, if it is called "model"), or of a file."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def commit() -> str | None:
    """The commit of the working tree, with "+" if tracked files have changed; None outside a repository."""
    try:
        found, changed = (
            subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout
            for words in (
                ("rev-parse", "--short", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.strip() + ("+" if changed.strip() else "")


def versions() -> dict[str, str | None]:
    """Versions of torch, CUDA and packages with kernels; None for one that is not installed."""
    found: dict[str, str | None] = {"torch": torch.__version__, "CUDA": torch.version.cuda}
    for name in ("triton", "flash-linear-attention", "flash-qla"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
