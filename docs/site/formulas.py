"""Formulas of the site: LaTeX becomes MathML while it is built, so that no script and no network is needed.

math-core translates and refuses what it does not know, which ends the build.
"""

import html
import re
from collections.abc import Callable, Iterator

from navigation import CODE

FORMULA = re.compile(
    r"^```math\n(?P<fenced>.*?)^```$|"
    rf"{CODE}|"
    r"\$\$(?P<displayed>.+?)\$\$|"
    r"(?<![\\$\w])\$(?![\s$])(?P<inline>[^$\n]+?)(?<![\s\\])\$(?!\w)",
    re.MULTILINE | re.DOTALL,
)
TEXT = re.compile(r"(?<=>)[^<>]+(?=<)")


def formulas(text: str) -> Iterator[tuple[str, bool]]:
    """LaTeX of a page's formulas, and whether each is displayed on lines of its own."""
    for match in FORMULA.finditer(text):
        latex = match["fenced"] or match["displayed"] or match["inline"]
        if latex:
            yield latex.strip(), not match["inline"]


def with_mathml(text: str, convert: Callable[[str, bool], str]) -> str:
    """A page with its formulas replaced by what `convert(latex, displayed)` makes of them."""

    def one(match: re.Match[str]) -> str:
        if match[
            "inline"
        ]:  # in a span, as Markdown takes a line that begins with <math> for a block
            return f"<span>{convert(match['inline'], False)}</span>"
        latex = match["fenced"] or match["displayed"]
        return f"\n\n<div>{convert(latex.strip(), True)}</div>\n\n" if latex else match[0]

    return FORMULA.sub(one, text)


def mathml(latex: str, displayed: bool) -> str:
    """A formula as MathML that Markdown leaves alone: its punctuation is written as entities.

    Raises:
        ValueError: no formula that math-core knows; the message says where it ends to be one.
    """
    from math_core import LatexError, LatexToMathML  # pyright: ignore[reportMissingImports]

    if "\\tag{" in latex:  # which LaTeX knows in environments that number
        latex = f"\\begin{{equation}}{latex}\\end{{equation}}"
    converter = LatexToMathML(fancy_error=False)
    try:
        found = converter.convert_with_local_state(latex, displaystyle=displayed)
    except LatexError as error:
        raise ValueError(f"{latex!r} is not understood: {error}") from error
    return TEXT.sub(lambda text: _entities(html.unescape(text[0])), found).replace("\n", " ")


def _entities(text: str) -> str:
    """Every character of ASCII that is no letter, digit or space as a character reference."""
    plain = (c.isalnum() or c == " " or ord(c) > 127 for c in text)
    return "".join(c if keep else f"&#{ord(c)};" for c, keep in zip(text, plain, strict=True))
