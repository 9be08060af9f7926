"""`gka generate`: a prompt completed by a saved model."""

from pathlib import Path
from typing import Annotated

import typer

from gka.commands import options as opt


def generate(
    model: opt.Model,
    *,
    prompt: opt.Prompt = None,
    prompt_file: opt.PromptFile = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample from so many likeliest; 0 from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from this much probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    state: Annotated[
        Path | None,
        typer.Option(
            help="Go on from this file if it exists, and store the states in it afterwards."
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
    """Complete a prompt with a trained model; the text appears as it is made.

    The text of --prompt is shown before it; that of a file or of standard input, which may be a book, is not.
    With --state a text goes on from run to run: only what is new is read. An interrupted run leaves the
    stored states as they were.
    """
    from gka.serving import sample
    from gka.serving.sampling import Sampling

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    opt.at_least_one("--chunk", chunk)
    opt.known_dtype(dtype)
    text = sample.read_prompt(prompt, prompt_file)
    opt.silence_libraries()
    loaded, tokenizer = sample.load(model, dtype=dtype, device=opt.usable_device(device))
    loaded.set_solver(num_iter=num_iter, ridge_ratio=ridge_ratio, solver=solver)
    session = sample.open_session(
        loaded, state, must_exist=save_state is not None, prefill_chunk=chunk
    )
    sample.stream_to_stdout(session, tokenizer, text, sampling, echo=prompt is not None)
    target = save_state or state
    if target is not None:
        session.save(target)
