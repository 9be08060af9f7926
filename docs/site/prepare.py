"""Write docs/ as a tree that a site generator reads: `python docs/site/prepare.py build`, then the generator.

The pages stay what GitHub shows. Here links out of docs/ get pages to lead to (Markdown as it is, source with
line numbers, a folder as a list), formulas become MathML, and the front page gets the table of results.
Writes build/pages and build/site.yml; the site is to be built into build/site.
"""

import json
import re
import shutil
import sys
from importlib.resources import files as resources
from pathlib import Path

from formulas import mathml, with_mathml
from navigation import (
    DOCS,
    LINK,
    ROOT,
    is_relative,
    joined,
    links,
    navigation,
    pages,
    relinked,
    site_path,
)

SITE = Path(__file__).parent
TABLE_HERE = "<!-- docs/site puts the table of results here -->"
FONT = "STIXTwoMath-Regular.ttf"
FENCE_INFO = re.compile(r"^(```\w+) (?!linenums)[^\n]*$", re.MULTILINE)  # as in `python no-run`
LANGUAGES = {".cu": "cuda", ".cuh": "cuda", ".py": "python", ".cff": "yaml"}


def texts() -> dict[str, str]:
    """All pages by their path in the repository: those of docs/, and what they and their targets link to."""
    found = {f"docs/{page}": (DOCS / page).read_text(encoding="utf-8") for page in pages()}
    waiting = list(found)
    while waiting:
        page = waiting.pop()
        for link in links(found[page]):
            path = joined(page, link)
            if path not in found and not path.startswith("docs/"):
                found[path] = shown(path)
                waiting.append(path)
    return found


def shown(path: str) -> str:
    """The page of a file or folder outside of docs/."""
    file = ROOT / path
    if file.suffix == ".md":
        return file.read_text(encoding="utf-8")
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
    if file.is_dir():
        inside = sorted(child for child in file.iterdir() if not child.name.startswith(("_", ".")))
        return head + "\n".join(f"- [{child.name}]({file.name}/{child.name})" for child in inside)
    text = file.read_text(encoding="utf-8")
    fence = "`" * (max(2, *map(len, re.findall("`+", text)), 2) + 1)
    language = LANGUAGES.get(file.suffix, file.suffix.removeprefix(".") or "text")
    return f'{head}{fence}{language} linenums="1"\n{text.rstrip()}\n{fence}\n'


def results_table() -> str:
    """The table of docs/results/README.md, with its links as seen from docs/README.md."""
    text = (DOCS / "results" / "README.md").read_text(encoding="utf-8")
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    if table is None:
        raise SystemExit("docs/results/README.md has no table for the front page")

    def one(match: re.Match[str]) -> str:
        target = match["target"]
        if target is None or not is_relative(target):
            return match[0]
        return f"]({joined('results/README.md', target)})"

    return LINK.sub(one, table[0])


def prepared(page: str, text: str) -> str:
    """A page as the generator reads it."""
    if page == "docs/README.md":
        text = text.replace(TABLE_HERE, results_table())
    try:
        text = with_mathml(text, mathml)
    except ValueError as error:
        raise SystemExit(f"{page}: {error}") from error
    return relinked(FENCE_INFO.sub(r"\1", text), page)


def main(folder: Path) -> None:
    shutil.rmtree(folder / "pages", ignore_errors=True)
    shutil.copytree(
        DOCS,
        folder / "pages",
        ignore=shutil.ignore_patterns("*.md", "*.py", "*.yml", "__pycache__"),
    )
    for page, text in texts().items():
        file = folder / "pages" / site_path(page)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(prepared(page, text), encoding="utf-8")
    font = resources("ziamath.fonts").joinpath(FONT).read_bytes()
    (folder / "pages" / "site" / FONT).write_bytes(font)
    added = {"docs_dir": "pages", "site_dir": "site", "nav": navigation()}
    lines = [f"{key}: {json.dumps(value)}" for key, value in added.items()]  # JSON is YAML
    settings = (SITE / "mkdocs.yml").read_text(encoding="utf-8")
    (folder / "site.yml").write_text(settings + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
