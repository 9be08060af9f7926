"""Builds a corpus of local text as a folder or an archive, and opens one.

    corpus.json     what it is made of, with licences, sizes and checksums
    tokenizer/      a byte-level BPE trained on a sample of it, digits one by one
    memory/ code/   the ids of the two parts, as `gka.data.packed`
    haystack/       documentation that is in neither part, for tasks that hide facts in other text

The same installed packages give the same corpus.
"""

import argparse
import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from gka.caches import cache_folder
from gka.data import find_documents, load_tokenizer
from gka.data.packed import PackedTokens
from gka.data.packing import make
from gka.data.text import END_OF_TEXT, Document, fingerprint
from gka.errors import InputError
from gka.experiments.corpora import sources
from gka.experiments.corpora.linked import folder_of, folders, linked
from gka.experiments.corpora.tasks import task_documents
from gka.storage import draft_folder, read_json, sha256_of, write_json

FORMAT = 1
MEMORY, CODE = PARTS = ("memory", "code")
DESCRIPTION, TOKENIZER, HAYSTACK = "corpus.json", "tokenizer", "haystack"
HELD_FOR_HAYSTACK = 16  # one documentation file in so many
ENOUGH = 32  # documentation files; with fewer, Python sources are the other text
Texts = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Budget:
    """How much of each kind of text: characters at most.

    Attributes:
        code: Python files, one a document.
        packages: folders of Python files, each folder one document.
        dictionaries: entries that refer to each other.
        manuals: manual pages that refer to each other.
        documentation: files of documentation.
        tasks: stated facts with questions.
        document: of a document of linked entries or of a folder.
        vocabulary: ids of the tokenizer.
        distributions: whether Python sources are also those of installed distributions.
        sample: text that the tokenizer is trained on.
    """

    code: int = 24_000_000
    packages: int = 14_000_000
    dictionaries: int = 18_000_000
    manuals: int = 5_000_000
    documentation: int = 9_000_000
    tasks: int = 5_000_000
    document: int = 160_000
    vocabulary: int = 8192
    sample: int = 10_000_000
    distributions: bool = True

    def scaled(self, factor: float) -> "Budget":
        """The same shares of fewer characters."""
        same = ("document", "vocabulary", "distributions")
        return replace(
            self, **{k: int(v * factor) for k, v in asdict(self).items() if k not in same}
        )


@dataclass(frozen=True)
class Corpus:
    """An opened corpus.

    Attributes:
        folder: where it is.
        description: content of corpus.json.
        tokenizer: its tokenizer.
        parts: ids by the names of `PARTS`.
        haystack: files of other text.
    """

    folder: Path
    description: dict[str, Any]
    tokenizer: Any
    parts: dict[str, PackedTokens]
    haystack: list[Document]

    @property
    def checksum(self) -> str:
        """SHA-256 over ids, tokenizer and haystack."""
        return self.description["sha256"]


def build(folder: Path, budget: Budget, root: Path = Path("/")) -> Corpus:
    """Make a corpus from the packages that are installed here.

    Args:
        folder: where it is written; new.
        budget: how much of what.
        root: where Debian packages lie, unpacked.

    Raises:
        InputError: `folder` exists.
    """
    if folder.exists():
        raise InputError(f"{folder} exists; give a new folder, or open that one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    parts, haystack = _parts(budget, root)
    with draft_folder(folder) as draft:
        (draft / HAYSTACK).mkdir(parents=True)
        for number, text in enumerate(haystack):
            (draft / HAYSTACK / f"{number:04}.txt").write_text(text)
        files = {name: draft / f"{name}.jsonl" for name in PARTS}
        counts = {name: _write(file, parts[name]) for name, file in files.items()}
        tokenizer = _train(files.values(), budget)
        tokenizer.save_pretrained(draft / TOKENIZER)
        for name, file in files.items():
            make(draft / name, find_documents([str(file)]), tokenizer, column="text")
            file.unlink()
            for lock in draft.glob("*.lock"):
                lock.unlink()
        write_json(draft / DESCRIPTION, _description(draft, budget, counts, tokenizer))
        draft.rename(folder)
    return open_corpus(folder)


def open_corpus(path: Path) -> Corpus:
    """The corpus in a folder or in an archive, which is unpacked into the cache once.

    Raises:
        InputError: there is none, or it is of another format or damaged.
    """
    folder = _unpacked(path) if path.is_file() else path
    if not (folder / DESCRIPTION).is_file():
        raise InputError(
            f"{path} holds no corpus; expected a folder with {DESCRIPTION} or an archive of one"
        )
    description = read_json(folder / DESCRIPTION)
    if description.get("format") != FORMAT:
        raise InputError(
            f"{path} has format {description.get('format')}; expected {FORMAT}: build it again"
        )
    tokenizer = load_tokenizer(str(folder / TOKENIZER))
    parts = {name: PackedTokens.open(folder / name, tokenizer) for name in PARTS}
    for part in parts.values():
        part.verify()
    haystack = find_documents([str(folder / HAYSTACK)])
    corpus = Corpus(folder, description, tokenizer, parts, haystack)
    if _checksum(folder, tokenizer) != corpus.checksum:
        raise InputError(f"the corpus in {folder} is damaged: its checksum differs; build it again")
    return corpus


def archive(folder: Path, file: Path) -> Path:
    """Pack a corpus into `file`, .tar.xz, to carry it to a machine that has not its sources."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
        return info

    with tarfile.open(file, "w:xz", preset=6) as packed:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                packed.add(path, path.relative_to(folder), filter=plain)
    return file


def _unpacked(file: Path) -> Path:
    folder = cache_folder() / "corpora" / sha256_of(file)[:32]
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with draft_folder(folder) as draft, tarfile.open(file) as packed:
            packed.extractall(draft, filter="data")
            if not folder.exists():  # another process may have been faster
                draft.rename(folder)
    except tarfile.TarError as error:
        raise InputError(f"{file} is no archive of a corpus: {error}") from None
    return folder


def _parts(budget: Budget, root: Path) -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """Documents (name, text) of each part, and the haystack's texts."""
    files = list(sources.python_files(sources.DISTRIBUTIONS if budget.distributions else ()))
    texts = list(sources.texts(root)) if budget.documentation else []
    manuals = list(sources.manual_entries(root)) if budget.manuals else []
    entries = list(sources.dictionary_entries(root)) if budget.dictionaries else []
    filler = _shuffled(texts if len(texts) >= ENOUGH else files)
    held = filler[: max(1, min(200, len(filler) // HELD_FOR_HAYSTACK))]
    names = {f.name for f in held}
    files, texts = ([f for f in kind if f.name not in names] for kind in (files, texts))
    lines, size = _lines(filler[len(held) :][:200]), budget.document
    whole = {folder_of(f) for f in files if _number(f"{f.source} {folder_of(f)}") % 3 == 0}
    together = folders([f for f in files if folder_of(f) in whole], size)
    memory = [
        _until(budget.dictionaries, linked(entries, size, seed=0)),
        _until(budget.manuals, linked(manuals, size, seed=1)),
        _until(budget.packages, sorted(together, key=lambda d: _number(d[0]))),
        _until(budget.documentation, _named(_shuffled(texts))),
        _until(budget.tasks, task_documents(lines, size // 8, seed=2)),
    ]
    code = _until(budget.code, _named(_shuffled([f for f in files if folder_of(f) not in whole])))
    documents = {MEMORY: [d for kind in memory for d in kind], CODE: list(code)}
    return documents, [f.text for f in held]


def _lines(entries: Sequence[sources.Entry]) -> list[str]:
    """Lines that are not blank, with their ends."""
    return [line for e in entries for line in e.text.splitlines(True) if line.strip()]


def _named(entries: Iterable[sources.Entry]) -> Texts:
    return ((f"{e.source} {e.name}", e.text) for e in entries)


def _until(most: int, documents: Iterable[tuple[str, str]]) -> Texts:
    """Documents up to `most` characters in total."""
    held = 0
    for name, text in documents:
        if held >= most:
            return
        held += len(text)
        yield name, text


def _shuffled(entries: Sequence[sources.Entry]) -> list[sources.Entry]:
    return sorted(entries, key=lambda e: _number(f"{e.source} {e.name}"))


def _number(name: str) -> int:
    """A number of a name that is the same everywhere."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="replace")).digest()[:8], "big")


def _write(file: Path, documents: Sequence[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Write documents as JSON lines; documents and characters by package."""
    counts: dict[str, dict[str, int]] = {}
    known = sorted(sources.licences(), key=len, reverse=True)
    with file.open("w") as out:
        for name, text in documents:
            out.write(json.dumps({"text": text}) + "\n")
            source = next((s for s in known if name.startswith(s)), name.split("-")[0])
            row = counts.setdefault(source, {"documents": 0, "characters": 0})
            row["documents"] += 1
            row["characters"] += len(text)
    return counts


def _train(files: Iterable[Path], budget: Budget) -> Any:
    """A byte-level BPE tokenizer of a sample of the documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])  # fmt: skip
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=budget.vocabulary, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    core.train_from_iterator(_sample(files, budget.sample), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT,
        split_special_tokens=True, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _sample(files: Iterable[Path], most: int) -> Iterator[str]:
    """Beginnings of randomly chosen documents, `most` characters in total."""
    rows = [line for file in files for line in file.read_text().splitlines()]
    Random(0).shuffle(rows)
    held = 0
    for row in rows:
        text = json.loads(row)["text"][:20_000]
        held += len(text)
        yield text
        if held >= most:
            return


def _description(folder: Path, budget: Budget, counts: Any, tokenizer: Any) -> dict[str, Any]:
    """The content of corpus.json."""
    licences = sources.licences() | {"tasks": "made here"}
    described = {
        name: {
            "tokens": PackedTokens.open(folder / name, tokenizer).description["tokens"],
            "sources": {
                s: row | {"licence": licences.get(s, "")} for s, row in counts[name].items()
            },
        }
        for name in PARTS
    }
    checksum = _checksum(folder, tokenizer)
    return {"format": FORMAT, "budget": asdict(budget), "parts": described, "sha256": checksum}


def _checksum(folder: Path, tokenizer: Any) -> str:
    parts = [PackedTokens.open(folder / name, tokenizer).checksum for name in PARTS]
    texts = [sha256_of(file) for file in sorted((folder / HAYSTACK).iterdir())]
    facts = json.dumps([*parts, fingerprint(tokenizer), *texts])
    return hashlib.sha256(facts.encode()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    """Build a corpus, say what is in it, and pack it if asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the corpus; new")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where Debian packages lie")
    parser.add_argument("--share", type=float, default=1.0, help="of the text of the full corpus")
    parser.add_argument("--archive", type=Path, help="also pack it into this .tar.xz")
    given = parser.parse_args(arguments)
    budget = Budget().scaled(given.share)
    corpus = build(given.output, budget, given.root)
    for name, part in corpus.description["parts"].items():
        print(f"{name}: {part['tokens']:,} tokens")
        for source, row in islice(part["sources"].items(), 100):
            sizes = f"{row['documents']:,} documents, {row['characters']:,} characters"
            print(f"  {source}: {sizes}, {row['licence']}")
    print(f"SHA-256 {corpus.checksum}")
    if given.archive:
        size = archive(given.output, given.archive).stat().st_size
        print(f"{given.archive}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
