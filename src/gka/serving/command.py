"""`gka generate`: options to calls. Heavy imports come last."""

import sys
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[Path, typer.Argument(help="Folder of a run or of a saved model.")]
Prompt = Annotated[str | None, typer.Option("--prompt", "-p", help="Text.")]
NumIter = Annotated[
    int | None,
    typer.Option(help="Solver steps in place of the model's own; 0 leaves the ridge out."),
]
RidgeRatio = Annotated[
    float | None, typer.Option(help="a in lambda = a |H|, in place of the model's own.")
]
SolverName = Annotated[
    str | None, typer.Option("--solver", help="chebyshev, or adaptive: fewer steps, same bound.")
]
PrefillChunk = Annotated[
    int, typer.Option(help="Prompt tokens read at a time; fewer take less memory, same result.")
]


def generate(
    model: Model,
    *,
    prompt: Prompt = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="A UTF-8 file with the prompt, not printed. [default: standard input]"),
    ] = None,
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
    prefill_chunk: PrefillChunk = 4096,
    num_iter: NumIter = None,
    ridge_ratio: RidgeRatio = None,
    solver: SolverName = None,
) -> None:
    """Complete a prompt with a trained model; the text appears as it is made.

    The text of --prompt is shown before it; that of a file or of standard input, which may be a book, is not.
    With --state a text goes on from run to run: only what is new is read. An interrupted run leaves the
    stored states as they were.
    """
    from gka.serving import sample
    from gka.serving.reading import check_chunk
    from gka.serving.sampling import Sampling

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    check_chunk(prefill_chunk)
    text = sample.read_prompt(prompt, prompt_file)
    silence_libraries()
    loaded, tokenizer = sample.load(model)
    loaded.set_solver(num_iter=num_iter, ridge_ratio=ridge_ratio, solver=solver)
    session = sample.open_session(
        loaded, state, must_exist=save_state is not None, prefill_chunk=prefill_chunk
    )
    sample.stream_to_stdout(session, tokenizer, text, sampling, echo=prompt is not None)
    target = save_state or state
    if target is not None:
        session.save(target)


def silence_libraries() -> None:
    """Transformers' own bars and warnings would break into the commands' output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
