"""A corpus of local text: readers of sources, documents that reward a memory, and the corpus as a whole."""

import gzip
import random
import re
from itertools import islice, pairwise
from pathlib import Path

import pytest

from gka.errors import InputError
from gka.experiments.corpora import sources
from gka.experiments.corpora.build import MEMORY, Budget, archive, build, open_corpus
from gka.experiments.corpora.linked import folders, linked
from gka.experiments.corpora.sources import Entry, dictionary_entries, plain_manual
from gka.experiments.corpora.tasks import codes_document, facts_document, task_documents

SMALL = Budget(60_000, 60_000, 0, 0, 0, 30_000, 8000, 300, 30_000, distributions=False)


def test_a_dictionary_is_read_by_its_index(tmp_path: Path) -> None:
    """Entries have the text that the index points to, and link to what stands in braces."""
    folder = tmp_path / "usr/share/dictd"
    folder.mkdir(parents=True)
    texts = [
        "00database\n",
        "ant\n  a small {insect} of a {red\n  colony}\n",
        "insect\n  an animal\n",
    ]
    whole = "".join(texts)
    (folder / "wn.dict.dz").write_bytes(gzip.compress(whole.encode()))
    at, lines = 0, []
    for text, name in zip(texts, ("00databaseshort", "Ant", "insect"), strict=True):
        lines.append(f"{name}\t{_base64(at)}\t{_base64(len(text))}\n")
        at += len(text)
    (folder / "wn.index").write_text("".join(lines))
    ant, insect = dictionary_entries(tmp_path)
    assert (ant.name, ant.text, ant.links) == ("ant", texts[1], ("insect", "red colony"))
    assert (insect.name, insect.links, insect.source) == ("insect", (), "dict-wn")


def _base64(number: int) -> str:
    letters = {value: letter for letter, value in sources._DIGITS.items()}
    digits = letters[number % 64]
    while number := number // 64:
        digits = letters[number % 64] + digits
    return digits


def test_a_manual_page_becomes_text() -> None:
    """Macros and fonts go, their words stay, alternating fonts leave no space."""
    page = (
        '.\\" comment\n.TH accept 2\n.SH NAME\naccept \\- take a \\fIconnection\\fP\n.PP\n'
        ".BR accept (2)\nand\n.B #include <x.h>\n.TP\n.I sockfd\n"
    )
    assert plain_manual(page) == (
        "NAME\naccept - take a connection\n\naccept(2)\nand\n#include <x.h>\n\nsockfd\n"
    )


def test_documents_follow_links() -> None:
    """What an entry mentions comes after it in the same document, and no entry comes twice."""
    entries = [Entry("s", str(i), f"<{i}>" * 10, (str((i + 1) % 40),)) for i in range(40)]
    documents = dict(linked(entries, 300, seed=0))
    found = [int(n) for text in documents.values() for n in re.findall(r"<(\d+)>(?!<)", text)]
    assert len(found) == len(set(found)) and len(found) > 30
    follows = sum(b == (a + 1) % 40 for a, b in pairwise(found))
    assert follows > len(found) / 2


def test_folders_are_documents() -> None:
    """All files of a folder, under their paths; a large folder is several documents of whole files."""
    files = [Entry("p", f"{folder}/{i}.py", "x" * 50, ()) for folder in "ab" for i in range(3)]
    documents = dict(folders(files, size=100))
    assert list(documents) == ["p a 0", "p a 1", "p b 0", "p b 1"]
    assert documents["p a 0"] == f"# a/0.py\n{'x' * 50}\n\n# a/1.py\n{'x' * 50}\n"


def test_every_code_was_stated_before_it_is_asked_for() -> None:
    """And the answer is the code that was stated."""
    lines = [f"line {i}\n" for i in range(50)]
    text = codes_document(lines, 6000, random.Random(0))
    stated = {m[1]: (m[2], m.start()) for m in re.finditer(r"The (\w+ \w+) has code (\d+)\.", text)}
    asked = list(re.finditer(r"Answer: the (\w+ \w+) has code (\d+)\.", text))
    assert len(asked) > 5
    assert all(stated[m[1]][0] == m[2] and stated[m[1]][1] < m.start() for m in asked)


def test_every_place_is_that_of_the_last_move() -> None:
    """Questions of a facts document are answered by the last move before them."""
    text = facts_document(["other text\n"], 4000, random.Random(1))
    asked = list(re.finditer(r"Answer: (\w+) is in the (\w+)\.", text))
    assert len(asked) > 5
    for m in asked:
        assert re.findall(rf"{m[1]} went to the (\w+)\.", text[: m.start()])[-1] == m[2]


def test_task_documents_are_drawn_anew() -> None:
    """The same seed gives the same documents, each with names of its own."""
    first, again = ([t for _, t in islice(task_documents(["x\n"], 2000, 5), 3)] for _ in range(2))
    assert first == again and len(set(first)) == 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory):
    return build(tmp_path_factory.mktemp("corpus") / "one", SMALL)


def test_a_corpus_is_the_same_again_and_in_an_archive(
    corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal sources give equal checksums; an archive opens to the same ids, and unpacks once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build(tmp_path / "two", SMALL).checksum == corpus.checksum
    file = archive(corpus.folder, tmp_path / "packed.tar.xz")
    unpacked = open_corpus(file)
    assert unpacked.checksum == corpus.checksum and unpacked.folder != corpus.folder
    assert list(unpacked.parts[MEMORY].tokens[:50]) == list(corpus.parts[MEMORY].tokens[:50])
    assert open_corpus(file).folder == unpacked.folder
    told = corpus.description["parts"][MEMORY]["sources"]
    assert told[sources.STANDARD_LIBRARY]["licence"] == "PSF-2.0" and told["tasks"]["documents"]


def test_digits_are_ids_of_their_own(corpus) -> None:
    """A code has as many ids as digits, so that no part of it can be guessed."""
    ids = corpus.tokenizer("code 1234567", add_special_tokens=False)["input_ids"]
    assert [corpus.tokenizer.decode([i]) for i in ids[-7:]] == list("1234567")


def test_what_is_no_corpus_is_refused(corpus, tmp_path: Path) -> None:
    """A folder without one, an existing output, a changed file."""
    with pytest.raises(InputError, match="holds no corpus"):
        open_corpus(tmp_path)
    with pytest.raises(InputError, match="exists"):
        build(corpus.folder, SMALL)
    file = next((corpus.folder / "haystack").iterdir())
    before = file.read_text()
    file.write_text(before + "more")
    try:
        with pytest.raises(InputError, match="damaged"):
            open_corpus(corpus.folder)
    finally:
        file.write_text(before)
