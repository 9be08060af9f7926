"""Complete a prompt with a trained model, as `gka generate` does."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from gka.data import vocabulary_size
from gka.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: at most this many tokens are added.
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        top_p: sample from the likeliest tokens that together have this probability.
        seed: of the random numbers.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; expected 1 or more")
        if not self.temperature >= 0:
            raise InputError(f"temperature is {self.temperature}; expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; expected above 0 and at most 1")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; expected 0 or more")


def load(folder: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Model and tokenizer saved in `folder`, or in the `model/` of a run's folder; never in part.

    Raises:
        InputError: if there is no model, or a file of it is damaged, or weights are missing or left over.
    """
    inner = folder / "model"
    folder = inner if inner.is_dir() and not (folder / "config.json").exists() else folder
    if not (folder / "config.json").is_file():
        raise InputError(f"model {folder} holds no config.json; give the folder of a saved model")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gka.models import GKAForCausalLM

    try:
        kind = GKAForCausalLM if _is_ours_to_read(folder) else AutoModelForCausalLM
        loaded: Any = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True)
        model, notes = loaded
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # parsers of three formats, each with its own exceptions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"model {folder} cannot be loaded: {reason}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if notes[what]:
            names = ", ".join(sorted(map(str, notes[what]))[:3])
            raise InputError(
                f"model {folder}: weights do not fit its config.json ({what}: {names})"
            )
    if vocabulary_size(tokenizer) > model.config.vocab_size:
        raise InputError(
            f"model {folder}: its tokenizer has {vocabulary_size(tokenizer)} ids, the model "
            f"{model.config.vocab_size}"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _is_ours_to_read(folder: Path) -> bool:
    """Whether it is one of our models or of a hybrid format; transformers runs its own models itself."""
    from gka.models.adapters import PLAIN, adapter_of

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    adapter = adapter_of(config)
    return config.get("model_type") == "gka" or not (adapter is None or adapter.name in PLAIN)


def complete(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    sampling: Sampling,
    streamer: Any = None,
) -> str:
    """The prompt's continuation, without the prompt; an empty prompt begins a document.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: text.
        sampling: how tokens are chosen.
        streamer: a transformers streamer that is given each token as it comes.
    """
    import torch
    from transformers import set_seed

    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    start = torch.tensor([ids or [tokenizer.eos_token_id]], device=model.device)
    choice: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        choice |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    set_seed(sampling.seed)
    output = model.generate(  # type: ignore[operator]
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        use_cache=True,
        streamer=streamer,
        **choice,
    )
    return str(tokenizer.decode(output[0, start.shape[1] :], skip_special_tokens=True))


def stream_to_stdout(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    sampling: Sampling,
) -> str:
    """Print prompt and continuation while it is made; the continuation is returned."""
    from transformers import TextStreamer

    print(prompt, end="", flush=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
    return complete(model, tokenizer, prompt, sampling, streamer)


def read_prompt(text: str | None, file: Path | None, stdin: BinaryIO | None = None) -> str:
    """The prompt from an argument, a UTF-8 file, or else standard input.

    Raises:
        InputError: if both are given, the file cannot be read, or the text is not UTF-8.
    """
    if text is not None and file is not None:
        raise InputError("prompt and prompt_file exclude each other; give one of them")
    if text is not None:
        try:
            # Bytes of an argument that are not UTF-8 arrive as lone surrogates.
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"prompt is not valid UTF-8 (at character {error.start})") from None
        return text
    try:
        raw = file.read_bytes() if file else (stdin or sys.stdin.buffer).read()
        return raw.decode()
    except OSError as error:
        raise InputError(f"prompt_file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        where = f"prompt_file {file}" if file else "prompt on standard input"
        raise InputError(
            f"{where} is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start})"
        ) from None
