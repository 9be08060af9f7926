"""Python blocks of a page, and what they print.

`python -m tests.docs.snippets docs/tour.md --output docs/images` runs them in order and draws
their pictures into a folder.
"""

import argparse
import io
import os
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import torch

BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """The page's blocks of a language, but for those marked `no-run`."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [text for name, info, text in found if name == language and "no-run" not in info]


def run(page: Path) -> Iterator[tuple[str, str | None]]:
    """Run the Python blocks in one namespace; yields what each printed, and the output block after it."""
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "snippet"}
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    for number, (language, info, text) in enumerate(found):
        if language != "python" or "no-run" in info:
            continue
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(text, f"{page.name}, block {number}", "exec"), namespace)
        after = found[number + 1] if number + 1 < len(found) else ("", "", "")
        shown = after[2] if after[:2] == ("text", " output") else None
        yield printed.getvalue(), shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    page = options.page.resolve()
    os.chdir(options.output)
    for printed, _ in run(page):
        print(printed, end="")


if __name__ == "__main__":
    main()
