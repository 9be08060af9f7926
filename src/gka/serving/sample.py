"""A trained model from its folder, and a prompt completed by it, as `gka generate` does."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from gka.checkpoints.open import load_gka, load_tokenizer_of
from gka.data.tokenizer import check_vocabulary
from gka.errors import InputError
from gka.models import GKAForCausalLM
from gka.serving.sampling import Sampling
from gka.serving.session import GenerationSession

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load(
    folder: Path, *, dtype: str = "auto", device: str | None = None
) -> "tuple[GKAForCausalLM, PreTrainedTokenizerBase]":
    """Model and tokenizer saved in `folder`, or in the `model/` of a run's folder.

    Args:
        folder: where they are.
        dtype: of the weights; "auto" as they are stored.
        device: where the model shall be. None: on a GPU if there is one.

    Raises:
        InputError: as `gka.checkpoints.open.load_gka`; or there is no tokenizer, or it has more ids than the
            model.
    """
    tokenizer = load_tokenizer_of(folder)
    model = load_gka(folder, dtype=dtype, device=device)
    check_vocabulary(tokenizer, model, f"model {folder}")
    return model, tokenizer


def open_session(
    model: GKAForCausalLM, state: Path | None, *, must_exist: bool, prefill_chunk: int
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
    *,
    echo: bool = True,
) -> str:
    """Print the prompt (`echo`) and the continuation while it is made, which is returned."""
    from transformers import TextStreamer

    if echo:
        print(prompt, end="", flush=True)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)  # type: ignore[arg-type]
    return complete(session, tokenizer, prompt, sampling, streamer)


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
