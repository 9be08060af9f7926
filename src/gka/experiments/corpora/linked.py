"""Documents of entries that refer to each other, so that what was said comes up again."""

from collections import deque
from collections.abc import Iterator, Sequence
from random import Random

from gka.experiments.corpora.sources import Entry


def linked(entries: Sequence[Entry], size: int, seed: int) -> Iterator[tuple[str, str]]:
    """(name, text) of documents of about `size` characters, in random order; no entry comes twice.

    A document begins with a random entry, goes on with those that it mentions, then with those that these
    mention, breadth first, and begins anew where nothing is left.
    """
    by_name: dict[str, list[int]] = {}
    for i, entry in enumerate(entries):
        by_name.setdefault(entry.name, []).append(i)
    order = list(range(len(entries)))
    Random(seed).shuffle(order)
    used = [False] * len(entries)
    walk: deque[int] = deque()
    parts: list[str] = []
    held = number = 0
    for start in order:
        walk.append(start)
        while walk:
            i = walk.popleft()
            if used[i]:
                continue
            used[i] = True
            parts.append(entries[i].text)
            held += len(entries[i].text)
            walk.extend(
                j for link in entries[i].links for j in by_name.get(link, ()) if not used[j]
            )
            if held >= size:
                yield f"{entries[start].source}-{number:06}", "\n".join(parts)
                parts, held, number = [], 0, number + 1
                walk.clear()
    if held > size // 4:
        yield f"{entries[order[-1]].source}-{number:06}", "\n".join(parts)


def folders(files: Sequence[Entry], size: int) -> Iterator[tuple[str, str]]:
    """(name, text) of documents that hold the sources of one folder each, every file under its path.

    A folder of more than `size` characters becomes several documents; files are not cut.
    """
    groups: dict[str, list[Entry]] = {}
    for file in files:
        groups.setdefault(f"{file.source} {folder_of(file)}", []).append(file)
    for name, group in sorted(groups.items()):
        parts: list[str] = []
        held = number = 0
        for file in group:
            parts.append(f"# {file.name}\n{file.text.rstrip()}\n")
            held += len(file.text)
            if held >= size:
                yield f"{name} {number}", "\n".join(parts)
                parts, held, number = [], 0, number + 1
        if parts:
            yield f"{name} {number}", "\n".join(parts)


def folder_of(file: Entry) -> str:
    """Path of the folder of a source file."""
    return file.name.rpartition("/")[0]
