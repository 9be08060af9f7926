"""Lines of files and functions: `python -m tests.house.sizes` prints what is over the limits."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("src/gka", "benchmarks")
FILE_LINES, FUNCTION_LINES = 350, 40


def files() -> Iterator[tuple[str, str]]:
    """Path from the root, and text."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text()


def is_device_code(function: ast.AST) -> bool:
    """Whether Triton compiles it."""
    decorators = getattr(function, "decorator_list", [])
    return any("jit" in ast.unparse(decorator) for decorator in decorators)


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the function after its signature and its docstring, which may be as long as they need."""
    first = function.body[0]
    told = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    body = function.body[1:] if told else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0  # pyright: ignore[reportOptionalOperand]


def functions(text: str) -> Iterator[tuple[str, int]]:
    """Qualified name and lines of every function, those inside others too; device code is left out."""

    def inside(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if not named:
                yield from inside(child, prefix)
                continue
            if is_device_code(child):
                continue
            name = f"{prefix}{child.name}"
            if not isinstance(child, ast.ClassDef):
                yield name, body_lines(child)
            yield from inside(child, f"{name}.")

    yield from inside(ast.parse(text), "")


def large() -> dict[str, int]:
    """What is over its limit: lines by "path" or "path: function"."""
    found = {}
    for path, text in files():
        if text.count("\n") > FILE_LINES:
            found[path] = text.count("\n")
        for name, lines in functions(text):
            if lines > FUNCTION_LINES:
                found[f"{path}: {name}"] = lines
    return found


def main() -> None:
    for name, lines in large().items():
        print(f'    "{name}": {lines},')
    lengths = sorted(lines for _, text in files() for _, lines in functions(text))
    texts = [text for path, text in files() if path.startswith("src/")]
    print(f"{len(texts)} files of src, {sum(text.count(chr(10)) for text in texts)} lines")
    print(f"{len(lengths)} functions, median {lengths[len(lengths) // 2]} lines")


if __name__ == "__main__":
    main()
