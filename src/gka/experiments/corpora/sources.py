"""Texts of installed packages: dictionaries, manual pages, documentation, Python sources.

A package that is not installed is left out, and the corpus says which were there.
"""

import gzip
import importlib.metadata
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gka.data.text import LIBRARY_WITHOUT

LARGEST_FILE = 400_000  # characters; larger sources are tables
STANDARD_LIBRARY = "the standard library"


@dataclass(frozen=True)
class Source:
    """Text of a Debian package.

    Attributes:
        package: its name in Debian's main archive.
        licence: of the text.
        files: patterns of its files, relative to the root of the file system.
    """

    package: str
    licence: str
    files: tuple[str, ...]


DICTIONARIES = (
    Source("dict-wn", "WordNet", ("usr/share/dictd/wn.index",)),
    Source("dict-gcide", "GPL-3+", ("usr/share/dictd/gcide.index",)),
    Source("dict-foldoc", "GFDL-1.1+", ("usr/share/dictd/foldoc.index",)),
    Source("dict-jargon", "public domain", ("usr/share/dictd/jargon.index",)),
    Source("dict-devil", "public domain", ("usr/share/dictd/devil.index",)),
)
MANUALS = (
    Source("manpages", "GPL-2+ and others", ("usr/share/man/man[457]/*.gz",)),
    Source("manpages-dev", "GPL-2+ and others", ("usr/share/man/man[23]/*.gz",)),
)
TEXTS = (
    Source("perl-doc", "GPL-1+ or Artistic", ("usr/share/perl/5.*/pod/perl*.pod",)),
    Source("git-doc", "GPL-2", ("usr/share/doc/git-doc/**/*.txt",)),
    Source("python3.11-doc", "PSF-2", ("usr/share/doc/python3.11/html/_sources/**/*.txt",)),
    Source("debian-policy", "GPL-2+", ("usr/share/doc/debian-policy/*.txt.gz",)),
    Source("developers-reference", "GPL-2+", ("usr/share/developers-reference/_sources/*.txt",)),
    Source("fortunes", "public domain and others", ("usr/share/games/fortunes/*[a-z]",)),
)
DISTRIBUTIONS = {
    "torch": "BSD-3-Clause",
    "transformers": "Apache-2.0",
    "sympy": "BSD-3-Clause",
    "numpy": "BSD-3-Clause",
    "matplotlib": "PSF-2.0 based",
    "fonttools": "MIT",
    "networkx": "BSD-3-Clause",
    "hypothesis": "MPL-2.0",
    "triton": "MIT",
    "pyarrow": "Apache-2.0",
    "accelerate": "Apache-2.0",
    "pydantic": "MIT",
    "rich": "MIT",
    "setuptools": "MIT",
}


@dataclass(frozen=True)
class Entry:
    """A piece of text that others refer to.

    Attributes:
        source: package that it is from.
        name: what others call it.
        text: the text, with a line end.
        links: names of others that it mentions, in their order.
    """

    source: str
    name: str
    text: str
    links: tuple[str, ...]


def dictionary_entries(root: Path) -> Iterator[Entry]:
    """Entries of the dictionaries installed under `root`; links are their cross-references."""
    for source in DICTIONARIES:
        for index in _files(root, source):
            yield from _dictd(source.package, index)


def manual_entries(root: Path) -> Iterator[Entry]:
    """Manual pages as plain text, named "accept(2)"; links are the pages that they mention."""
    for source in MANUALS:
        for path in _files(root, source):
            text = plain_manual(_read(path) or "")
            if len(text) < 400:  # a page that only points to another
                continue
            name, section = path.name.removesuffix(".gz").rsplit(".", 1)
            links = tuple(f"{page}({n})" for page, n in _PAGE.findall(text))
            title = f"{name}({section[:1]})"
            yield Entry(source.package, title, f"{title}\n{text}", links)


def texts(root: Path) -> Iterator[Entry]:
    """Documentation files, each a text of its own."""
    for source in TEXTS:
        for path in _files(root, source):
            if text := _read(path):
                yield Entry(source.package, path.name, text, ())


def python_files(distributions: Iterable[str]) -> Iterator[Entry]:
    """Python sources of the standard library and of distributions, without tests; name: path of the file."""
    home = Path(sysconfig.get_path("stdlib"))
    yield from _sources(STANDARD_LIBRARY, home, sorted(home.rglob("*.py")))
    for name in distributions:
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        paths = [Path(str(p.locate())) for p in found.files or () if p.suffix == ".py"]
        yield from _sources(name, Path(str(found.locate_file(""))), sorted(paths))


def licences() -> dict[str, str]:
    """Licence of every source by package."""
    debian = {s.package: s.licence for s in (*DICTIONARIES, *MANUALS, *TEXTS)}
    return debian | DISTRIBUTIONS | {STANDARD_LIBRARY: "PSF-2.0"}


def _sources(package: str, home: Path, paths: Sequence[Path]) -> Iterator[Entry]:
    for path in paths:
        name = path.relative_to(home) if path.is_relative_to(home) else Path(path.name)
        if not LIBRARY_WITHOUT.isdisjoint(name.parts) or any(p.startswith(".") for p in name.parts):
            continue
        text = _read(path) or ""
        if 200 <= len(text) <= LARGEST_FILE:
            yield Entry(package, name.as_posix(), text, ())


def _files(root: Path, source: Source) -> list[Path]:
    found = (path for pattern in source.files for path in root.glob(pattern))
    return sorted(path for path in found if path.is_file())


def _read(path: Path) -> str | None:
    """A text file, compressed or not; None if it is not UTF-8 or cannot be read."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        return content.decode().replace("\r\n", "\n")
    except (OSError, ValueError):
        return None


_DIGITS = {
    c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}
_CROSS = re.compile(r"\{([^{}]{2,60})\}")
_PAGE = re.compile(r"\b([a-z][\w.+-]+)\s?\((\d)\w*\)")


def _dictd(package: str, index: Path) -> Iterator[Entry]:
    """Entries of a dictionary in dictd's format: a gzipped text, and an index of base-64 numbers."""
    whole = gzip.decompress(index.with_suffix(".dict.dz").read_bytes())
    seen: set[int] = set()
    for line in index.read_text(errors="replace").splitlines():
        name, at, length = line.split("\t")[:3]
        start = _number(at)
        if name.startswith("00database") or start in seen:
            continue
        seen.add(start)
        text = whole[start : start + _number(length)].decode(errors="replace").rstrip() + "\n"
        links = (" ".join(link.split()).lower() for link in _CROSS.findall(text))
        yield Entry(package, name.lower(), text, tuple(dict.fromkeys(links)))


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = 64 * value + _DIGITS[digit]
    return value


_DROPPED = re.compile(
    r'^[.\'](\\"|\\"|ie|if|el|de|ds|nr|so|tr|hy|ad|in|ta|TS|TE|UE|PD|nh|ft|ps|vs|ne|ll).*$'
)
_BREAK = re.compile(r"^\.(PP|LP|P|TP|IP|HP|sp|br|nf|fi|RS|RE|EX|EE|TQ)\b.*$")
_FONT = re.compile(r"\\f(\[\w*\]|\(\w\w|\w)|\\s[+-]?\d|\\[&:/,)]")
_LETTERS = {
    r"\-": "-", r"\(aq": "'", r"\(dq": '"', r"\(bu": "*", r"\(em": "--", r"\(en": "-", r"\(ti": "~",
    r"\(ha": "^", r"\[aq]": "'", r"\[dq]": '"', r"\(co": "(c)", r"\(<=": "<=", r"\(>=": ">=", r"\ ": " ",
    r"\e": "\\", r"\(rs": "\\", r"\(lq": '"', r"\(rq": '"', r"\[ti]": "~", r"\[ha]": "^", r"\~": " ",
}  # fmt: skip


def plain_manual(page: str) -> str:
    """A manual page's text without its macros; tables and figures keep their raw form."""
    lines: list[str] = []
    for line in page.splitlines():
        if _DROPPED.match(line) or line.startswith((".TH", '."', "'\\\"")):
            continue
        if _BREAK.match(line):
            line = ""
        elif line.startswith((".SH", ".SS")):
            line = f"\n{_joined(line[3:], False)}"
        elif match := re.match(r"^\.(BR|RB|BI|IB|IR|RI|B|I|SM|SB)\b(.*)$", line):
            line = _joined(match[2], len(match[1]) == 2)
        elif line.startswith("."):
            line = _joined(line[3:], False)
        line = _FONT.sub("", line)
        for mark, letter in _LETTERS.items():
            line = line.replace(mark, letter)
        if line.strip() or (lines and lines[-1].strip()):
            lines.append(line.rstrip())
    return "\n".join(lines).strip() + "\n"


def _joined(arguments: str, touching: bool) -> str:
    """The words of a macro line; fonts that alternate leave no space between them."""
    words = re.findall(r'"([^"]*)"|(\S+)', arguments)
    return ("" if touching else " ").join(a or b for a, b in words)
