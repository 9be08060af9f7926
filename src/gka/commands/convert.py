"""`gka convert`: a checkpoint in another format."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from gka.commands.options import output_folder, silence_libraries
from gka.storage import only_maker

Source = Annotated[Path, Argument(help="Folder of a model, in any format that this library reads.")]
Target = Annotated[
    str,
    Option(
        "--to",
        metavar="FORMAT",
        help="gka, hybrid_qwen3, hybrid_qwen2, hybrid_llama, hybrid_qwen3_moe, fla, fla_gated_deltanet, "
        "qwen3, qwen2, qwen3_moe, llama or mistral.",
    ),
]
Output = Annotated[Path, output_folder("Folder to write; must be missing or empty.")]
ShardSize = Annotated[str, Option(help="Files are split above this size.")]


def convert(model: Source, to: Target, output: Output, max_shard_size: ShardSize = "5GB") -> None:
    """Rewrite a checkpoint in another format, bit for bit; tokenizer files are copied."""
    silence_libraries()
    from gka.checkpoints import save_as
    from gka.checkpoints.open import load_gka, model_folder

    folder = model_folder(model)
    loaded = load_gka(folder, device="cpu")
    with only_maker(output, "--output"):
        save_as(loaded, output, to, max_shard_size=max_shard_size, extra_files=folder)
    print(f"{output}: {to}, {sum(p.numel() for p in loaded.parameters()):,} parameters")
