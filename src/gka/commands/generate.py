"""`gka generate`: complete a prompt with a saved model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gka.commands import options as opt
from gka.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gka.models import GKAForCausalLM
    from gka.serving import GenerationSession, Sampling


def generate(
    model: opt.Model,
    *,
    prompt: opt.Prompt = None,
    prompt_file: opt.PromptFile = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most likely tokens with this sum.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 0,
    state: Annotated[
        Path | None,
        typer.Option(
            help="Continue from this file if it exists, and store the states in it afterwards."
        ),
    ] = None,
    save_state: Annotated[
        Path | None,
        typer.Option(
            help="Store the states here instead; --state must exist then, and is only read."
        ),
    ] = None,
    num_iter: opt.NumIter = None,
    ridge_ratio: opt.RidgeRatio = None,
    solver: opt.Solver = None,
    device: opt.Device = None,
    dtype: opt.Dtype = "auto",
    chunk: opt.Chunk = 4096,
) -> None:
    """Complete a prompt with a trained model; the text is printed token by token.

    A prompt from --prompt is printed before it; one from a file or standard input is not. With --state, a
    text continues from run to run, and only new text is read. An interrupted run changes no stored state.
    """
    from gka.checkpoints.open import load_with_tokenizer
    from gka.serving.tokens import Sampling

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    opt.at_least_one("--chunk", chunk)
    opt.known_dtype(dtype)
    text = opt.read_prompt(prompt, prompt_file)
    opt.silence_libraries()
    loaded, tokenizer = load_with_tokenizer(model, dtype=dtype, device=opt.usable_device(device))
    loaded.set_solver(num_iter=num_iter, ridge_ratio=ridge_ratio, solver=solver)
    session = open_session(loaded, state, must_exist=save_state is not None, prefill_chunk=chunk)
    if prompt is not None:
        print(prompt, end="", flush=True)
    complete(session, tokenizer, text, sampling)
    target = save_state or state
    if target is not None:
        session.save(target)


def open_session(
    model: "GKAForCausalLM", state: Path | None, *, must_exist: bool, prefill_chunk: int
) -> "GenerationSession":
    """A session of `model` that continues from the file `state`, or a new one if there is no such file.

    Raises:
        InputError: `state` cannot be used, is missing though `must_exist`, or holds several texts.
    """
    from gka.serving.session import GenerationSession

    session = GenerationSession(model, prefill_chunk=prefill_chunk)
    if state is None or not (must_exist or state.exists()):
        return session
    session.load(state)
    if session.batch_size not in (None, 1):
        raise InputError(f"state {state} holds {session.batch_size} texts; expected one")
    return session


def complete(
    session: "GenerationSession",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    sampling: "Sampling",
) -> None:
    """Read the prompt and print its continuation token by token.

    Args:
        session: the past. If it and the prompt are empty, the end-of-text token begins a document.
        tokenizer: the model's tokenizer.
        prompt: the text to read.
        sampling: how tokens are chosen.

    Raises:
        InputError: there is no prompt, and the session has no logits to continue from.
    """
    from transformers import TextStreamer

    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"] if prompt else []
    if not ids and not session.num_tokens:
        ids = [tokenizer.eos_token_id]
    if ids:
        session.append(ids)  # pyright: ignore[reportArgumentType]
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)  # type: ignore[arg-type]
    for token in session.generate(**vars(sampling)):
        streamer.put(token.cpu())
    streamer.end()
