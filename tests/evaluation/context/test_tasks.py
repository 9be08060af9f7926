"""Prompts of every task: their length, what stands in them and where."""

import re

import pytest

from gka.data import find_documents
from gka.errors import InputError
from gka.evaluation.context.haystack import Haystack, Pieces
from gka.evaluation.context.tasks import TASKS, draw_sample, written

LENGTHS = (640, 777, 2048)
ONCE = ("needle", "needle-keys", "needle-only", "needle-values", "needle-queries", "questions")


@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_exactly_the_asked_tokens(task: str, haystack: Haystack):
    """Whatever the tokenizer, a prompt has exactly `length` tokens."""
    for length in LENGTHS:
        for index in range(3):
            assert len(draw_sample(task, length, 0.3, 0, index, haystack).ids) == length


def test_prompts_begin_as_the_tokenizer_begins_texts(tokenizers, haystack: Haystack):
    """A first token that the tokenizer puts before every text is before every prompt, and counted."""
    sample = draw_sample("needle", 640, 0.3, 0, 0, haystack)
    spaced = haystack.pieces.tokenizer is tokenizers["spaced"]
    begin = [tokenizers["spaced"].bos_token_id] if spaced else []
    assert haystack.pieces.start == begin
    for ids in (sample.ids, sample.bare):
        assert ids[: len(begin)] == begin
        assert haystack.pieces.decode(ids[len(begin) :]).lstrip().startswith("Remember")


@pytest.mark.parametrize("task", ONCE)
def test_answers_stand_once_in_the_prompt(task: str, haystack: Haystack):
    """Codes and last words are in the prompt exactly once, so they can only come from there."""
    for index in range(5):
        sample = draw_sample(task, 900, 0.5, 1, index, haystack)
        text = haystack.pieces.decode(sample.ids)
        for answer in sample.answers:
            assert text.lower().count(answer.lower()) == 1, (answer, text)


@pytest.mark.parametrize("task", TASKS)
def test_samples_follow_from_the_seed(task: str, byte_haystack: Haystack):
    """The same numbers give the same prompt; another seed or index another one."""
    again, other, another = (
        draw_sample(task, 700, 0.5, seed, index, byte_haystack)
        for seed, index in ((3, 1), (4, 1), (3, 2))
    )
    first = draw_sample(task, 700, 0.5, 3, 1, byte_haystack)
    assert first == again and first.ids == again.ids
    assert first.ids != other.ids and first.ids != another.ids


@pytest.mark.parametrize("task", TASKS)
def test_candidates_are_different_and_hold_the_answers(task: str, haystack: Haystack):
    """Candidates are all different, answers are among them, and at least one is none."""
    for index in range(5):
        sample = draw_sample(task, 800, 0.0, 2, index, haystack)
        assert len(set(sample.candidates)) == len(sample.candidates) > len(sample.answers)
        assert set(sample.answers) <= set(sample.candidates)


@pytest.mark.parametrize("task", ["needle", "needle-keys", "questions"])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_what_is_asked_for_stands_at_its_depth(task: str, depth: float, byte_haystack: Haystack):
    """At the line end nearest to the depth: half a longest line away at most, and exactly at the ends."""
    sample = draw_sample(task, 8192, depth, 0, 0, byte_haystack)
    assert abs(sample.depths[0] - depth) < 60 / 7000
    text = byte_haystack.pieces.decode(sample.ids)
    found = text.index(sample.answers[0]) / len(text)
    assert abs(found - depth) < 0.05
    if depth in (0.0, 1.0):
        assert sample.depths[0] == depth


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_text_of_codes_alone_has_the_asked_one_at_its_depth(
    depth: float, byte_haystack: Haystack
):
    """needle-only is codes to the last line but for less than one, and the depth moves the asked one."""
    sample = draw_sample("needle-only", 4096, depth, 0, 0, byte_haystack)
    lines = byte_haystack.pieces.decode(sample.ids).split("\n")
    stated = [i for i, line in enumerate(lines) if re.fullmatch(r"The .* has code \d{7}\.", line)]
    place = next(i for i in stated if sample.answers[0] in lines[i])
    assert abs((place - stated[0]) / (len(stated) - 1) - depth) < 0.02
    assert sum(len(lines[i]) + 1 for i in stated) > 0.94 * 4096


def test_other_names_have_other_codes(byte_haystack: Haystack):
    """The names that are not asked for stand in the text with the candidates that are not answers."""
    for task in ("needle-keys", "needle-values", "needle-queries"):
        sample = draw_sample(task, 2000, 0.5, 0, 0, byte_haystack)
        text = byte_haystack.pieces.decode(sample.ids)
        assert all(text.count(f"has code {code}.") == 1 for code in sample.candidates)
        tail = text[text.index("Question") :]
        asked = {n for n in re.findall(r"The (\S+ \S+) has code", text) if n in tail}
        right = {c for n, c in re.findall(r"The (\S+ \S+) has code (\d+)", text) if n in asked}
        assert right == set(sample.answers)


def test_variables_are_handed_on_in_the_order_of_the_text(byte_haystack: Haystack):
    """Running the lines from top to bottom leaves exactly the answers with the asked number."""
    for index in range(5):
        sample = draw_sample("variables", 3000, 0.0, 0, index, byte_haystack)
        text = byte_haystack.pieces.decode(sample.ids)
        held: dict[str, str] = {}
        for name, source in re.findall(r"Set ([A-Z]{5}) to (\w+)\.", text):
            held[name] = held[source] if source.isalpha() else source
        asked = re.findall(r"are (\d+) in the end", text)[0]
        assert {name for name, value in held.items() if value == asked} == set(sample.answers)


@pytest.mark.parametrize("length", [512, 2048, 20_000])
@pytest.mark.parametrize("task", ["common-words", "frequent-words"])
def test_the_answers_are_the_words_that_come_up_most(
    task: str, length: int, byte_haystack: Haystack
):
    """Counted in the text, every answer comes up more often than every other word."""
    sample = draw_sample(task, length, 0.0, 0, 0, byte_haystack)
    text = byte_haystack.pieces.decode(sample.ids)
    words = re.findall(r"\b[a-z]{6}\b", text[text.index("\n") : text.index("Question")])
    counts = sorted({(words.count(word), word) for word in words}, reverse=True)
    number = len(sample.answers)
    assert {word for _, word in counts[:number]} == set(sample.answers)
    assert counts[number - 1][0] > counts[number][0]
    assert set(sample.candidates) <= set(words)


def replayed(text: str) -> tuple[dict[str, str], dict[str, str], dict[str, list[str]]]:
    """Where people are, who has what, and where things have been, after the facts in a text."""
    where: dict[str, str] = {}
    holder: dict[str, str] = {}
    path: dict[str, list[str]] = {}
    fact = r"(?m)^([A-Z][a-z]+) (?:went to the (\w+)|took the (\w+)|put down the (\w+))\.$"
    for person, place, taken, dropped in re.findall(fact, text):
        if place:
            where[person] = place
        elif taken:
            assert taken not in holder and path.get(taken, [where[person]])[-1] == where[person]
            holder[taken] = person
        else:
            assert holder.pop(dropped) == person
        for thing, owner in holder.items():
            if path.setdefault(thing, [where[owner]])[-1] != where[owner]:
                path[thing].append(where[owner])
    return where, holder, path


@pytest.mark.parametrize("index", range(12))
def test_facts_make_the_answer(index: int, byte_haystack: Haystack):
    """Replaying what a text says gives the answer of each task of facts, and is possible at every step."""
    texts, answers = {}, {}
    for number in range(1, 6):
        sample = draw_sample(f"facts-{number}", 3000, 0.0, 5, index, byte_haystack)
        texts[number], answers[number] = byte_haystack.pieces.decode(sample.ids), sample.answers[0]

    def asked(number: int, pattern: str) -> str:
        return re.findall(pattern, texts[number])[0]

    where, _, _ = replayed(texts[1])
    assert where[asked(1, r"where is (\w+) now")] == answers[1]
    _, _, path = replayed(texts[2])
    assert path[asked(2, r"where is the (\w+) now")][-1] == answers[2]
    _, _, path = replayed(texts[3])
    thing, place = re.findall(r"where was the (\w+) before it came to the (\w+)\?", texts[3])[0]
    assert path[thing].count(place) == 1
    assert path[thing][path[thing].index(place) - 1] == answers[3]
    _, holder, _ = replayed(texts[4])
    owner = asked(4, r"things does (\w+) have")
    count = sum(person == owner for person in holder.values())
    assert ("nothing", "one", "two", "three")[count] == answers[4]
    where, _, _ = replayed(texts[5])
    person, place = re.findall(r"is (\w+) in the (\w+) now, yes", texts[5])[0]
    assert ("yes" if where[person] == place else "no") == answers[5]


def test_yes_and_no_are_both_right_at_times(byte_haystack: Haystack):
    """The answers of facts-5 do not favour one of the two, nor those of facts-4 one of the four."""
    for task, least in (("facts-5", 0.3), ("facts-4", 0.1)):
        found = [draw_sample(task, 1000, 0.0, 0, i, byte_haystack).answers[0] for i in range(60)]
        assert all(found.count(answer) / 60 > least for answer in set(found))
        assert len(set(found)) == (2 if task == "facts-5" else 4)


@pytest.mark.parametrize("task", ["needle-queries", "variables", "facts-3"])
def test_a_length_that_is_too_short_is_refused_with_the_needed_one(
    task: str, byte_haystack: Haystack
):
    """The error names the task and how many tokens it takes, and so many are enough."""
    with pytest.raises(InputError, match=rf"task {task}: length 256 .* takes (\d+) tokens") as info:
        draw_sample(task, 256, 0.0, 0, 0, byte_haystack)
    needed = int(re.findall(r"takes (\d+) tokens", str(info.value))[0])
    assert needed > 256


def test_the_shortest_prompts_fit_into_256_bytes(byte_haystack: Haystack):
    """Three kinds of needle and both kinds of counting work from 256 tokens on, bytes too."""
    for task in ("needle", "needle-keys", "needle-only", "common-words", "frequent-words"):
        assert len(draw_sample(task, 256, 0.5, 0, 0, byte_haystack).ids) == 256


def test_text_without_lines_is_refused(tmp_path, tokenizers):
    """A file of blank lines is an error that says so, not an endless search."""
    (tmp_path / "blank.txt").write_text("\n \n\n")
    empty = Haystack(find_documents([str(tmp_path)]), Pieces(tokenizers["bytes"]))
    for task in ("needle", "questions"):
        with pytest.raises(InputError, match="text"):
            draw_sample(task, 400, 0.0, 0, 0, empty)


def test_short_text_is_read_again(tmp_path, tokenizers):
    """Text shorter than the prompt is repeated; long lines are cut into several."""
    (tmp_path / "short.txt").write_text("word " * 300)
    short = Haystack(find_documents([str(tmp_path)]), Pieces(tokenizers["bytes"]))
    sample = draw_sample("needle", 5000, 0.5, 0, 0, short)
    text = short.pieces.decode(sample.ids)
    assert len(sample.ids) == 5000 and max(map(len, text.split("\n"))) <= 400


def test_pieces_join_into_the_text_itself(haystack: Haystack):
    """Pieces encoded one by one decode, joined, to their joined texts: no space is put between them."""
    texts = ["def f(x):\n", "    return x\n", written("rusty falcon", "1234567"), "end"]
    joined = [i for ids in haystack.pieces.encode(texts) for i in ids]
    # a decoder that drops the first space of a text is given a line first
    before = haystack.pieces.newline
    decoded = haystack.pieces.decode(before + joined)
    assert decoded.lstrip("\n") == "".join(texts)
