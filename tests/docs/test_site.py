"""The site's pages, as `docs/site` prepares them for the generator, which need not be installed."""

import re
from pathlib import Path

import pytest

import navigation
import prepare
from formulas import CODE, formulas, mathml, with_mathml

PAGES = navigation.pages()
TEXTS = prepare.texts()
MARKDOWN = sorted(page for page in TEXTS if page.endswith(".md"))


def listed() -> list[str]:
    return [
        page for section in navigation.navigation() for pages in section.values() for page in pages
    ]


def without_code(text: str) -> str:
    return re.sub(CODE, "", text, flags=re.MULTILINE | re.DOTALL)


def test_navigation_lists_every_page_once():
    """Every page of docs/ is in the navigation, once, and the front page is the first."""
    assert sorted(listed()) == PAGES
    assert listed()[0] == "README.md"


def test_new_pages_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A new results page or guide joins its section, after those that docs/README.md names; any other stands
    under "More"."""
    for name in (
        "README.md",
        "results/README.md",
        "results/a.md",
        "results/b.md",
        "howto/a.md",
        "new.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# Page\n\n[b](results/b.md)\n")
    monkeypatch.setattr(navigation, "DOCS", tmp_path)
    found = {
        title: pages for section in navigation.navigation() for title, pages in section.items()
    }
    assert found["Results"] == ["results/README.md", "results/b.md", "results/a.md"]
    assert found["How to"] == ["howto/a.md"] and found["More"] == ["new.md"]


@pytest.mark.parametrize("page", MARKDOWN)
def test_pages_have_one_title(page: str):
    """A page begins with its only heading of the first level."""
    text = without_code(TEXTS[page])
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1 and text.startswith("# ")


def test_links_lead_to_pages_of_the_site():
    """Every relative link leads to a page or picture that the site has, those into the sources included."""
    files = {path.relative_to(navigation.DOCS).as_posix() for path in navigation.DOCS.rglob("*.*")}
    there = {navigation.site_path(page) for page in TEXTS} | files
    for page, text in TEXTS.items():
        for link in navigation.links(navigation.relinked(text, page)):
            assert navigation.joined(navigation.site_path(page), link) in there, f"{page}: {link}"


def test_links_are_rewritten_outside_of_code_alone():
    """A link out of docs/ leads to its page of the site; addresses, anchors and code stay as they are."""
    text = "[a](../src/gka/errors.py#x) [b](api.md) [c](https://d.e) [f](#g) `[h](../i)`\n"
    expected = text.replace("../src/gka/errors.py", "repository/src/gka/errors.py.md")
    assert navigation.relinked(text, "docs/page.md") == expected
    assert navigation.relinked("[a](docs/api.md)", "README.md") == "[a](../api.md)"


@pytest.mark.parametrize("page", MARKDOWN)
def test_formulas_are_balanced(page: str):
    """No dollar sign is left over by the formulas of a page, and their braces and \\left, \\right match."""
    assert "$" not in without_code(with_mathml(TEXTS[page], lambda latex, displayed: "")), page
    for latex, _ in formulas(TEXTS[page]):
        bare = re.sub(r"\\[{}]", "", latex)
        assert bare.count("{") == bare.count("}"), latex
        assert len(re.findall(r"\\left\b", latex)) == len(re.findall(r"\\right\b", latex)), latex


def test_formulas_become_mathml():
    """Formulas become MathML that Markdown cannot read as its own; what is no formula is refused by name."""
    pytest.importorskip("math_core", reason="pip install -e '.[docs]'")
    found = with_mathml("$a_t$ and `$b$`\n\n```math\n[c] * d \\tag{9.1}\n```\n", mathml)
    assert found.count("<math") == 2 and "`$b$`" in found and "9&#46;1" in found
    assert not re.search(r"[*_\[\]|\\]", re.sub(r"<[^>]*>|`[^`]*`", "", found))
    with pytest.raises(ValueError, match="unknwn"):
        mathml(r"\unknwn", False)


def test_front_page_gets_the_table_of_results():
    """The front page has the rows of docs/results/README.md, with links that lead from where it stands."""
    table = prepare.results_table()
    assert table.startswith("|") and "](results/convergence.md)" in table
    assert prepare.TABLE_HERE in TEXTS["docs/README.md"]
    for link in navigation.links(table):
        assert (navigation.DOCS / link).exists(), link
