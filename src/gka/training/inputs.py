"""The text of a run: opened, tokenised or streamed, as training and held-out sequences."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar
from transformers import PreTrainedTokenizerBase

from gka.console import lines
from gka.data import (
    HeldOutSequences,
    Holdout,
    PackedTokens,
    StreamedTokens,
    TrainingSequences,
    find_documents,
    pack,
    token_blocks,
)
from gka.data.packed import CORPUS, FORMER_CORPUS
from gka.data.packing import Progress
from gka.training.config import APART, FORMER, CorpusConfig, DataConfig, RunConfig

Corpus = PackedTokens | StreamedTokens


@dataclass(frozen=True)
class Text:
    """A run's text.

    Attributes:
        corpora: one, or one for each weight.
        training, evaluation: data sets of sequences.
        held_out: tokens and UTF-8 bytes of the held-out documents.
        checksums: of the text, by their names in run.json.
    """

    corpora: Sequence[Corpus]
    training: Any
    evaluation: Any
    held_out: tuple[int, float]
    checksums: dict[str, str]

    def figures(self) -> dict[str, Any]:
        """The table data of metrics.json; counts are None if a corpus is streamed."""
        packed = [corpus for corpus in self.corpora if isinstance(corpus, PackedTokens)]
        known = len(packed) == len(self.corpora)
        counts = {
            key: sum(corpus.description[key] for corpus in packed) if known else None
            for key in ("bytes", "tokens")
        }
        padding = self.training.padding() if isinstance(self.training, TrainingSequences) else 0.0
        return {
            **counts,
            "sha256": "-".join(self.checksums.values()),
            "documents": sum(corpus.documents for corpus in packed) if known else None,
            "padding": padding,
            "held_out_tokens": self.held_out[0],
            "held_out_bytes": self.held_out[1],
        }


def open_text(config: RunConfig, tokenizer: PreTrainedTokenizerBase, console: Console) -> Text:
    """The text of a run; tokenises what is not in the cache, with progress.

    Raises:
        InputError: the text cannot be used, or is too short for one sequence.
        StorageError: packed tokens cannot be written.
    """
    data = config.data
    if data.documents == FORMER:
        return _former_text(data, tokenizer, console)
    texts = [(path,) for path in data.text] if data.weights else [data.text]
    corpora = [_corpus(data, text, tokenizer, console) for text in texts]
    parts = [Holdout(corpus, data.eval_fraction, data.eval_tokens) for corpus in corpora]
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    how: Any = {"apart": data.documents == APART, "pad": cast(int, pad)}
    length, weights = data.sequence_length, data.weights or (1.0,)
    training = TrainingSequences(parts, weights, length, seed=config.training.seed, **how)
    evaluation = HeldOutSequences(parts, length, **how)
    held = evaluation.tokens, evaluation.bytes
    checksum = "-".join(corpus.checksum for corpus in corpora)
    return Text(corpora, training, evaluation, held, {"corpus_sha256": checksum})


def _former_text(data: CorpusConfig, tokenizer: PreTrainedTokenizerBase, console: Console) -> Text:
    """The text of a run that began with an earlier release."""
    packed = pack_text(data, tokenizer, console)
    training, evaluation = token_blocks(packed, data.sequence_length, data.eval_fraction)
    held = evaluation.part.tokens, evaluation.part.bytes
    return Text(
        [packed], training, evaluation, held, {"tokens_sha256": packed.stream_checksum()}
    )  # fmt: skip


def _corpus(
    data: CorpusConfig, text: Sequence[str], tokenizer: PreTrainedTokenizerBase, console: Console
) -> Corpus:
    if data.stream_gb and not _packed_folder(text):
        documents = find_documents(text, data.glob, hashed=data.hash_sources)
        room = int(data.stream_gb * 2**30)
        return StreamedTokens(documents, tokenizer, room, column=data.column)
    return pack_text(data, tokenizer, console, text)


def pack_text(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    text: Sequence[str] | None = None,
) -> PackedTokens:
    """The packed tokens of a text: a folder of `gka tokenize`, or files from the cache; shows progress.

    Args:
        data: table [data].
        tokenizer: the run's.
        console: where progress is shown.
        text: files and folders; None: those of `data`.

    Raises:
        InputError: the text cannot be used.
    """
    text = data.text if text is None else text
    folder = _packed_folder(text)
    if folder is not None:
        packed = PackedTokens.open(folder, tokenizer)
    else:
        documents = find_documents(text, data.glob, hashed=data.hash_sources)
        with tokenising(console) as show:
            packed = pack(documents, tokenizer, show=show, column=data.column, workers=data.workers)
    if getattr(data, "verify", False):
        packed.verify()
    say_packed(packed, ", ".join(text) or "Python's standard library", console)
    return packed


def say_packed(packed: PackedTokens, what: str, console: Console) -> None:
    """Print the size of a packed corpus."""
    skipped = sum(shard.skipped for shard in packed.shards)
    note = f"; {skipped:,} rows without text left out" if skipped else ""
    console.print(
        f"{what}: {packed.description['bytes']:,} bytes in {packed.documents:,} documents, "
        f"{packed.description['tokens']:,} tokens{note}",
        highlight=False,
        soft_wrap=True,
    )


def _packed_folder(text: Sequence[str]) -> Path | None:
    """The folder of packed tokens that a text is; None if it is text."""
    folder = Path(text[0]) if len(text) == 1 else Path()
    names = (CORPUS, FORMER_CORPUS)
    return folder if text and any((folder / name).is_file() for name in names) else None


@contextmanager
def tokenising(console: Console) -> Iterator[Any]:
    """Show a bar of the bytes tokenised; yields the function `show` of `gka.data.pack`."""
    columns = TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn()
    bar = Bar(*columns, TimeRemainingColumn(), console=console, transient=True)
    task, last = bar.add_task("reading text", total=None), Progress()

    def show(progress: Progress) -> None:
        nonlocal last
        last = progress
        _update(bar, task, progress)

    with bar, lines(console, lambda: _line(last)):
        yield show
    if last.found:
        console.print(
            f"{last.found:,} of {last.parts:,} parts were tokenised before", highlight=False
        )


def _update(bar: Bar, task: TaskID, progress: Progress) -> None:
    what = progress.waiting or f"tokenising, part {progress.done} of {progress.parts}"
    if progress.converting:
        what = "converting the packed tokens of an earlier release"
    bar.update(task, description=what, total=progress.size or None, completed=progress.read)


def _line(progress: Progress) -> str:
    """The progress as text, for outputs that are no terminal."""
    if progress.waiting:
        return f"waiting: {progress.waiting}"
    if not progress.parts:
        return "reading text"
    return (
        f"tokenising: {progress.done} of {progress.parts} parts, {progress.read / 1e6:,.0f} of "
        f"{progress.size / 1e6:,.0f} MB"
    )
