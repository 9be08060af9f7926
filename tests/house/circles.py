"""Circles of imports between modules, with the lines that close them: `python -m tests.house.circles`."""

import sys
from dataclasses import dataclass
from pathlib import Path

import grimp
from grimp import ImportGraph

ROOT = Path(__file__).parents[2]
PACKAGES = ("gka", "benchmarks")


@dataclass(frozen=True)
class Circle:
    """Modules that all reach each other by imports.

    Attributes:
        lines: "importer:line -> imported" of every import between two of them.
    """

    modules: tuple[str, ...]
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join((" <-> ".join(self.modules), *(f"    {line}" for line in self.lines)))


def reach(graph: ImportGraph, start: str, backwards: bool = False) -> set[str]:
    """The modules on chains of imports from `start`; backwards: on chains to it."""
    near = (
        graph.find_modules_that_directly_import
        if backwards
        else graph.find_modules_directly_imported_by
    )
    seen, ahead = {start}, [start]
    while ahead:
        new = near(ahead.pop()) - seen
        seen |= new
        ahead += new
    return seen


def circle_of(graph: ImportGraph, modules: set[str]) -> Circle:
    lines = []
    for importer in sorted(modules):
        for imported in sorted(graph.find_modules_directly_imported_by(importer) & modules):
            details = graph.get_import_details(importer=importer, imported=imported)
            numbers = sorted({d["line_number"] for d in details})
            lines += [f"{importer}:{number} -> {imported}" for number in numbers]
    return Circle(tuple(sorted(modules)), tuple(lines))


def circles(package: str) -> list[Circle]:
    """Those of a package that can be imported, largest first.

    Imports inside functions and under TYPE_CHECKING count. A package's __init__ is a module like another:
    `from package import name` is an import of it where `name` is defined or imported there, and of
    `package.name` alone where that is a module. That Python runs a package before its modules does not
    count, or every package that gathers its modules' names would be a circle.
    """
    graph = grimp.build_graph(package, cache_dir=None, exclude_type_checking_imports=False)
    found, left = [], set(graph.modules)
    while left:
        start = left.pop()
        strong = reach(graph, start) & reach(graph, start, backwards=True)
        left -= strong
        if len(strong) > 1:
            found.append(circle_of(graph, strong))
    return sorted(found, key=lambda c: (-len(c.modules), c.modules))


def main() -> None:
    sys.path.insert(0, str(ROOT))
    found = [circle for package in PACKAGES for circle in circles(package)]
    print("\n\n".join(map(str, found)) or "no circles")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
