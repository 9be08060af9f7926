"""The pages' Python blocks run as they stand, and the commands they show exist."""

import re
from pathlib import Path

import pytest
import typer

from docs.snippets import blocks, run
from gka.commands.main import app
from pictures import assert_drawn

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def assert_printed(printed: str, shown: str) -> None:
    """Assert that both say the same, with numbers that differ by rounding: 10 %, or 0.02."""
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown), f"printed {printed}, shown {shown}"
    for one, other in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        assert float(one) == pytest.approx(float(other), rel=0.1, abs=0.02 if "e" not in one else 0)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The Python blocks of a page, in order and in one namespace, raise nothing, print what the page says,
    and draw the pictures that it shows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GKA_CACHE", str(tmp_path / "cache"))
    for printed, shown in run(page):
        if shown is not None:
            assert_printed(printed, shown)
    if page.name == "tour.md":
        pictures = re.findall(r"\]\(images/(tour-.*)\)", page.read_text(encoding="utf-8"))
        assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted(pictures)
        assert {path.name for path in (page.parent / "images").glob("tour-*")} == set(pictures)
        for name in pictures:
            assert_drawn(tmp_path / name)


def shown_commands(page: Path) -> list[tuple[str, set[str]]]:
    """(subcommand, its long options) of every `gka ...` line in the page's shell blocks."""
    lines = [line for text in blocks(page, "bash") for line in text.splitlines()]
    return [
        (line.split()[1], set(re.findall(r"(--[a-z][a-z0-9-]*)", line)))
        for line in lines
        if line.startswith("gka ")
    ]


@pytest.mark.parametrize("page", [p for p in PAGES if shown_commands(p)], ids=name_of)
def test_shown_commands_exist(page: Path):
    """Every `gka` command of a page exists and has the options it is shown with."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, options in shown_commands(page):
        assert name in commands, f"{name_of(page)}: there is no command gka {name}"
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert options - {"--help"} <= known, (
            f"{name_of(page)}: gka {name} has no {options - known}"
        )


def anchors(page: Path) -> set[str]:
    """The anchors GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path):
    """Every relative link of a page names a file, and every anchor a heading of it."""
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: {link} does not exist"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)}: {link} has no such heading"
