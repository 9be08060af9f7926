"""What a recipe leaves to its user: text, tokenizer, and the model to start from."""

from dataclasses import fields
from pathlib import Path

from gka.checkpoints.open import load_gka
from gka.errors import InputError
from gka.models import GKAForCausalLM
from gka.models.fields import GKAFields
from gka.training.config import YOURS, RunConfig

FREE = {
    "backend", "solver", "num_iter", "ridge_ratio", "sliding_window", "rope_theta", "rope_options",
    "use_cache", "initializer_range", "max_position_embeddings", "pad_token_id", "bos_token_id",
    "eos_token_id", "mixer", "mixers", "attention_layers",
}  # fmt: skip
"""Fields that may differ: none changes a weight's shape or meaning. The mixers are compared by layer."""


def check_given(config: RunConfig) -> None:
    """Raise `InputError` if a run needs text, tokenizer or a model of one's own, and one is not given."""
    data, start = config.data, config.model.get("start")
    if start == YOURS and not Path(YOURS).exists():
        raise InputError(
            "model.start: the recipe goes on with a model that it does not bring; give --start FOLDER, as "
            "in --start runs/2.8b-gka"
        )
    if data.without_text != "error":
        return
    missing = [] if data.text else ["text (PATH ...)"]
    missing += ["a tokenizer (--tokenizer NAME)"] if data.tokenizer == "bytes" else []
    if missing:
        raise InputError(
            f"the recipe comes without text and tokenizer; missing: {' and '.join(missing)}. "
            "For example: gka train CORPUS/ --tokenizer FOLDER-OR-NAME --recipe ...; a trial on the standard "
            "library, byte by byte: --set data.without_text=standard-library"
        )


def start_from(model: GKAForCausalLM, folder: str) -> None:
    """Give `model` the weights in `folder`, of a run or of a saved model.

    Raises:
        InputError: there is no such model, or it has other sizes or mixers; the message names which.
    """
    found = load_gka(Path(folder), dtype="float32", device="cpu")
    ours, theirs = model.config, found.config
    if ours.pattern != theirs.pattern:
        raise InputError(
            f"model.start {folder} has the mixers {', '.join(theirs.pattern)}; expected "
            f"{', '.join(ours.pattern)}"
        )
    for name in (field.name for field in fields(GKAFields)):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if name not in FREE and mine != other:
            raise InputError(
                f"model.start {folder} has {name} = {other!r}, and this run {mine!r}; set model.{name}, or "
                "give the tokenizer of that model if it is the vocabulary"
            )
    model.load_state_dict(found.state_dict())
