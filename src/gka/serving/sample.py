"""A trained model from its folder, and a prompt completed by it, as `gka generate` does."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from gka.data import vocabulary_size
from gka.errors import InputError
from gka.serving.sampling import Sampling
from gka.serving.session import GenerationSession

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def open_session(
    model: Any, state: Path | None, *, must_exist: bool, prefill_chunk: int
) -> GenerationSession:
    """A session of `model` that goes on from the file `state`, or begins if there is none.

    Raises:
        InputError: `state` cannot be used, does not exist though it must, or holds several texts.
    """
    session = GenerationSession(model, prefill_chunk=prefill_chunk)
    if state is None or not (must_exist or state.exists()):
        return session
    session.load(state)
    if session.batch_size not in (None, 1):
        raise InputError(f"state {state} holds {session.batch_size} texts; expected one")
    return session


def complete(
    session: GenerationSession,
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    sampling: Sampling,
    streamer: Any = None,
) -> str:
    """Read the prompt and write on; the new text is returned.

    Args:
        session: what was read so far. Nothing, and an empty prompt: a document begins.
        tokenizer: the model's.
        prompt: text that comes next.
        sampling: how tokens are chosen.
        streamer: a transformers streamer that is given each token as it comes.

    Raises:
        InputError: the session's past ends without known logits and there is no prompt.
    """
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"] if prompt else []
    if not ids and not session.num_tokens:
        ids = [tokenizer.eos_token_id]
    if ids:
        session.append(ids)  # pyright: ignore[reportArgumentType]
    new: list[int] = []
    for token in session.generate(
        sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
    ):
        new.append(int(token))
        if streamer is not None:
            streamer.put(token.cpu())
    if streamer is not None:
        streamer.end()
    return str(tokenizer.decode(new, skip_special_tokens=True))


def stream_to_stdout(
    session: GenerationSession,
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    sampling: Sampling,
) -> str:
    """Print prompt and continuation while it is made; the continuation is returned."""
    from transformers import TextStreamer

    print(prompt, end="", flush=True)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)  # type: ignore[arg-type]
    return complete(session, tokenizer, prompt, sampling, streamer)


def read_prompt(
    text: str | None,
    file: Path | None,
    stdin: BinaryIO | None = None,
    *,
    option: str = "prompt_file",
) -> str:
    """The prompt from an argument, a UTF-8 file (given as `option`), or else standard input.

    Raises:
        InputError: if both are given, the file cannot be read, or the text is not UTF-8.
    """
    if text is not None and file is not None:
        raise InputError(f"prompt and {option} exclude each other; give one of them")
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
        raise InputError(f"{option} {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        where = f"{option} {file}" if file else "prompt on standard input"
        raise InputError(
            f"{where} is not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start})"
        ) from None
