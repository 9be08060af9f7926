"""`gka tokenize`: text to a folder of packed tokens, in parallel, going on where a killed run stopped."""

from pathlib import Path
from typing import Annotated

import typer

from gka.commands import runs
from gka.commands.options import output_folder
from gka.errors import InputError
from gka.training.config import DataConfig
from gka.training.settings import settings

_HELP = {name: setting.help for name, setting, _ in settings(DataConfig)}

Paths = Annotated[
    list[str] | None,
    typer.Argument(
        help=_HELP["text"], metavar="[PATH]...", show_default="Python's standard library"
    ),
]
Output = Annotated[Path, output_folder("Folder of the packed tokens; it appears when all is done.")]
Tokenizer = Annotated[str, typer.Option(help=_HELP["tokenizer"])]
Glob = Annotated[str, typer.Option(help=_HELP["glob"])]
Column = Annotated[str, typer.Option(help=_HELP["column"])]
Workers = Annotated[int, typer.Option(help=_HELP["workers"], show_default="one a core")]
Verify = Annotated[bool, typer.Option("--verify", help="Compare the folder with its checksums.")]


def tokenize(
    text: Paths = None,
    *,
    output: Output,
    tokenizer: Tokenizer = "bytes",
    glob: Glob = "*",
    column: Column = "text",
    workers: Workers = 0,
    verify: Verify = False,
) -> None:
    """Pack text into a folder of tokens, which `gka train FOLDER` takes in place of text.

    A killed or interrupted command goes on when it is given again: finished parts are not made anew.
    """
    if workers < 0:
        raise InputError(f"workers is {workers}; expected 0 (one a core) or more")
    from gka.data import PackedTokens, find_documents, load_tokenizer, make
    from gka.storage import is_empty
    from gka.training.inputs import say_packed, tokenising

    console, loaded = runs.console(), load_tokenizer(tokenizer)
    if output.is_dir() and is_empty(output):
        output.rmdir()
    if not output.exists():
        documents = find_documents(text or [], glob)
        with tokenising(console) as show:
            make(output, documents, loaded, show, column=column, workers=workers)
    packed = PackedTokens.open(output, loaded)
    if verify:
        packed.verify()
    say_packed(packed, str(output), console)
