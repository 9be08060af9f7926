"""Check the built site: `python docs/site/check.py build/site`, with nothing but Python's own library.

Every link and anchor leads somewhere, every formula of the sources is there as MathML and none as LaTeX,
and no page loads anything from a network.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from formulas import formulas
from navigation import site_path
from prepare import texts

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src"}
LATEX = re.compile(r"\$[^$\n]+\$|\\[a-z]{2,}|\\[(\[]")


class Page(HTMLParser):
    """What a page has: ids, links, what it loads, the number of formulas, text outside of code."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.formulas, self.text = 0, ""
        self._inside: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        self.formulas += tag == "math"
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(given["href"])
        if LOADED.get(tag) in given:
            self.loaded.append(given[LOADED[tag]])
        if tag in ("code", "pre", "script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text += data


def faults(site: Path) -> list[str]:
    """What is wrong, a line each."""
    pages = {file.resolve(): Page(file) for file in sorted(site.rglob("*.html"))}
    found = []
    for file, page in pages.items():
        name = file.relative_to(site.resolve())
        if name.name == "404.html":
            continue  # it is for servers: its links begin at their root
        found += [
            f"{name}: loads {url}"
            for url in page.loaded
            if urlsplit(url).scheme not in ("", "data")
        ]
        for link in [*page.links, *page.loaded]:
            found += [f"{name}: {link} leads nowhere" for _ in range(not _leads(file, link, pages))]
        found += [f"{name}: LaTeX is left: {match[0]}" for match in LATEX.finditer(page.text)]
    for path, text in texts().items():
        file = site.resolve() / re.sub(r"README\.md$", "index.md", site_path(path))
        there = pages.get(file.with_suffix(".html"))
        wanted = len(list(formulas(text))) if path.endswith(".md") else 0
        if there is None:
            found.append(f"{path} has no page")
        elif there.formulas != wanted and path != "docs/README.md":
            found.append(f"{path}: {there.formulas} formulas on its page, {wanted} in its source")
    return found


def _leads(file: Path, link: str, pages: dict[Path, Page]) -> bool:
    """Whether a link of a page leads to a file, and its anchor to an id. Other sites are not asked."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return True
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    if target.is_dir():
        target = target / "index.html"
    anchor = unquote(parts.fragment)
    return target.is_file() and (not anchor or target not in pages or anchor in pages[target].ids)


def main(site: Path) -> None:
    found = faults(site)
    print("\n".join(found))
    if found:
        raise SystemExit(f"{len(found)} faults in {site}")
    print(
        f"{len(list(site.rglob('*.html')))} pages, every link and formula there: {site / 'index.html'}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
