"""The loss of combining separately read pieces of a text: `python -m gka.experiments.combining`.

MODEL is the folder of a run, as of `gka train --recipe cpu`. Pieces of --file are read in turn, and
separately with the states combined in three ways; then the same continuation is scored, in bits per token.
Compared are also reading nothing and reading only the last piece.
"""

import argparse
import statistics
from pathlib import Path

import torch
from torch import Tensor

from gka import GenerationSession
from gka.checkpoints.open import load_with_tokenizer
from gka.data import Encoder
from gka.experiments.ledger import Ledger, markdown_table, print_table
from gka.models import GKACache, GKAForCausalLM
from gka.models.cache import CACHE_NAME

WAYS = ("nothing", "last piece alone", "sequence", "sum", "mean", "read in turn")


@torch.no_grad()
def bits(session: GenerationSession, continuation: Tensor, bridge: Tensor) -> float:
    """Bits per token of `continuation` [1,T] after the session's states and `bridge` [1,S].

    The bridge is needed because a combined session has no logits; all ways get the same.
    """
    model: GKAForCausalLM = session.model
    cache = session._contents.cache if session.num_tokens else GKACache(model.config)
    tokens = torch.cat([bridge, continuation], 1)
    logits = model(tokens, use_cache=True, **{CACHE_NAME: cache}).logits  # type: ignore[arg-type]
    first = bridge.shape[1]
    losses = torch.nn.functional.cross_entropy(logits[0, first - 1 : -1].float(), continuation[0])
    return float(losses / torch.log(torch.tensor(2.0)))


def one(model: GKAForCausalLM, text: Tensor, pieces: int, length: int) -> dict[str, float]:
    """Bits per token of every way, on one text [1, (pieces + 1) * length]."""
    *parts, rest = text.split(length, 1)
    bridge, continuation = rest[:, :4], rest[:, 4:]

    def apart() -> list[GenerationSession]:
        return [GenerationSession(model, track_decay=True).append(part) for part in parts]

    sessions = {
        "nothing": GenerationSession(model),
        "last piece alone": apart()[-1],
        "read in turn": GenerationSession(model).append(text[:, : pieces * length]),
    }
    for how in ("sequence", "sum", "mean"):
        sessions[how] = GenerationSession.combine(apart(), how=how)
    return {way: bits(sessions[way], continuation, bridge) for way in WAYS}


def cell(samples: list[dict[str, float]], way: str) -> str:
    """The mean, the mean excess over reading in turn, and the standard error of the excess."""
    over = [x[way] - x["read in turn"] for x in samples]
    mean, error = (
        statistics.mean(x[way] for x in samples),
        statistics.stdev(over) / len(over) ** 0.5,
    )
    return f"{mean:.3f}  {statistics.mean(over):+.4f} ± {error:.4f}"


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m gka.experiments.combining", description=__doc__
    )
    add = parser.add_argument
    add("model", type=Path)
    add("--file", type=Path, required=True, help="text the model was not trained on")
    add("--pieces", type=int, nargs="+", default=[2, 4])
    add("--length", type=int, default=256, help="tokens of a piece")
    add("--samples", type=int, default=40)
    add("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    model, tokenizer = load_with_tokenizer(options.model)
    ids = torch.from_numpy(Encoder(tokenizer)(options.file.read_text()).astype("int64"))
    rows, ledger = [], Ledger(options.output, "combining")
    for pieces in options.pieces:
        span = (pieces + 1) * options.length
        if len(ids) < span:
            parser.error(f"--file has {len(ids)} tokens; {pieces} pieces need {span} or more")
        starts = torch.linspace(0, len(ids) - span, options.samples).long().tolist()
        found = [one(model, ids[None, s : s + span], pieces, options.length) for s in starts]
        rows.append({"pieces": pieces, "samples": found})
        ledger.note(length=options.length, rows=rows)
    title = "bits per token of a continuation, and what it has over reading in turn"
    head = ["read", *(f"{pieces} x {options.length} tokens" for pieces in options.pieces)]
    table = [[way, *(cell(row["samples"], way) for row in rows)] for way in WAYS]
    print_table(head, table, title)
    ledger.report(f"{title}\n\n{markdown_table(head, table)}\n")


if __name__ == "__main__":
    main()
