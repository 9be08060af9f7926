"""The site's pages and their order. New files in docs/results, docs/howto and docs/log are found."""

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
REPOSITORY = "repository/"  # where the site keeps pages of files outside of docs/
# section: its pages and folders; in a folder the order of docs/README.md, then by name
SECTIONS = {
    "Start": ("README.md", "tour.md"),
    "Results": ("results",),
    "How to": ("howto",),
    "Background": ("maths.md", "numerics.md", "performance.md"),
    "Reference": ("api.md", "dependencies.md"),
    "Log": ("log",),
}
CODE = r"^(?P<fence>```+).*?^(?P=fence)|`[^`\n]+`"
LINK = re.compile(rf"{CODE}|\]\((?P<target>[^)\s]+)\)", re.MULTILINE | re.DOTALL)


def pages() -> list[str]:
    """All Markdown files of docs/, relative to it."""
    return sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def links(text: str) -> list[str]:
    """Relative targets of a page's links and pictures, without anchors; those in code are left out."""
    found = (match["target"] for match in LINK.finditer(text))
    targets = (target.partition("#")[0] for target in found if target and is_relative(target))
    return [target for target in targets if target]


def is_relative(target: str) -> bool:
    return "://" not in target and not target.startswith("mailto:")


def navigation() -> list[dict[str, list[str]]]:
    """Sections and their pages: a folder's README.md first; pages of no section in "More"."""
    order = links((DOCS / "README.md").read_text(encoding="utf-8"))

    def place(page: str) -> tuple[bool, int, str]:
        known = order.index(page) if page in order else len(order)
        return not page.endswith("README.md"), known, page

    left, sections = pages(), []
    for title, names in SECTIONS.items():
        inside = [page for page in left if page in names or page.split("/")[0] in names]
        sections.append({title: sorted(inside, key=place)})
        left = [page for page in left if page not in inside]
    return sections + ([{"More": left}] if left else [])


def site_path(path: str) -> str:
    """Where the site keeps a file of the repository: its page's Markdown, or a picture of docs/ as it is."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return REPOSITORY + (path if path.endswith(".md") else f"{path}.md")


def joined(page: str, link: str) -> str:
    """The file that a link of a page leads to, both as paths of the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def relinked(text: str, page: str) -> str:
    """The text of a file of the repository with its links leading to pages of the site."""
    folder = posixpath.dirname(site_path(page)) or "."

    def one(match: re.Match[str]) -> str:
        target = match["target"]
        if target is None or not is_relative(target) or target.startswith("#"):
            return match[0]
        path, hash_, anchor = target.partition("#")
        return f"]({posixpath.relpath(site_path(joined(page, path)), folder)}{hash_}{anchor})"

    return LINK.sub(one, text)
