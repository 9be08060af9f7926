"""The command `gka convert`: a checkpoint from one format into another."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from gka.errors import InputError

Source = Annotated[Path, Argument(help="Folder of a model, in any format that this library reads.")]
Target = Annotated[
    str,
    Option(
        "--to",
        help="gka, hybrid_qwen3, hybrid_qwen2, hybrid_llama, hybrid_qwen3_moe, fla, fla_gated_deltanet, "
        "qwen3, qwen2, qwen3_moe, llama or mistral.",
    ),
]
Output = Annotated[Path, Option("--output", "-o", help="Folder to write; must not hold anything.")]
ShardSize = Annotated[str, Option(help="Files are split above this size.")]


def convert(folder: Source, to: Target, output: Output, max_shard_size: ShardSize = "5GB") -> None:
    """Rewrite a checkpoint in another format, bit for bit; tokenizer files are copied."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    from gka.models import GKAForCausalLM, save_as

    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json; give the folder of a saved model")
    try:
        model, notes = GKAForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except InputError:
        raise
    except Exception as error:  # parsers of three formats, each with its own exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{folder} cannot be loaded: {reason}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if notes[what]:
            named = ", ".join(sorted(map(str, notes[what]))[:3])
            raise InputError(f"{folder}: weights do not fit its config.json ({what}: {named})")
    save_as(model, output, to, max_shard_size=max_shard_size, extra_files=folder)
    print(f"{output}: {to}, {sum(p.numel() for p in model.parameters()):,} parameters")
