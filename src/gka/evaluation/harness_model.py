"""The model `gka` of lm-evaluation-harness: contexts of any length, read in chunks. Needs lm_eval."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from gka.checkpoints import open as opening
from gka.data.text import check_vocabulary
from gka.errors import InputError
from gka.evaluation.context.reader import Reader
from gka.foreign_code import refuse_adapter_code, without_code

UNLIMITED = 1 << 30
Request = tuple[
    Any, list[int], list[int]
]  # (context, continuation) as texts or None, and their ids


class _Whole:
    """Replaces `AutoModelForCausalLM`: opens every format of `gka.checkpoints.open`, or refuses it."""

    from_pretrained = staticmethod(opening.from_pretrained)


@register_model("gka")
class GKAHarnessModel(HFLM):
    """lm_eval's `hf` model with another computation of likelihoods.

    - Texts are read in chunks with a cache, and logits are formed from the first scored token on, one chunk
      at a time: memory does not grow with length times vocabulary.
    - A model of this library without full attention has no longest length: nothing is cut off or windowed
      unless `max_length` is given. Other models keep the length of their configuration.
    - With `batch_size` 1, continuations that share a context (multiple choice) share its reading.

    Args:
        pretrained: folder of a saved model or of a run of `gka train`, or a name on the Hugging Face hub.
        tokenizer: folder or name of another tokenizer.
        device: None: cuda if available.
        dtype: of the weights; "auto": as saved.
        batch_size: rows at a time, an integer.
        max_batch_size: accepted because lm_eval passes it; `batch_size` is never chosen automatically.
        max_length: longest window in tokens.
        chunk: tokens read at a time; affects memory and speed, not the result.
        revision, subfolder, peft, add_bos_token, prefix_token_id: as in `hf`.
        trust_remote_code: accepted because lm_eval passes it; code that comes with a model is never run.

    Raises:
        InputError: an argument is out of range; `trust_remote_code` is set; an existing folder holds no
            model; weights are missing or left over; or the tokenizer has more ids than the model.
    """

    AUTO_MODEL_CLASS = _Whole

    def __init__(
        self,
        pretrained: str,
        *,
        tokenizer: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        chunk: int = 2048,
        revision: str = "main",
        subfolder: str = "",
        trust_remote_code: bool = False,
        peft: str | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
    ) -> None:
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise InputError(f"batch_size is {batch_size!r}; expected a number of 1 or more")
        if max_length is not None and max_length < 1:
            raise InputError(f"max_length is {max_length}; expected 1 or more")
        trust_remote_code = without_code({"trust_remote_code": trust_remote_code})[
            "trust_remote_code"
        ]
        if peft is not None:
            refuse_adapter_code(Path(peft))
        folder = Path(pretrained)
        super().__init__(
            str(opening.model_folder(folder)) if folder.is_dir() and not subfolder else pretrained,
            backend="causal",
            tokenizer=tokenizer,
            device=device or "default",
            dtype=dtype,
            batch_size=int(batch_size),
            max_batch_size=max_batch_size,
            max_length=max_length,
            revision=revision,
            subfolder=subfolder,
            trust_remote_code=trust_remote_code,
            peft=peft,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
        )
        check_vocabulary(self.tokenizer, self.model, f"model {pretrained}")
        self.reader = Reader(self.model, chunk)

    def _get_config(self, pretrained: str, **options: Any) -> None:
        """As in `hf`, for every format of `gka.checkpoints.open`."""
        self._config = opening.config_of(pretrained, **options)

    @property
    def max_length(self) -> int:
        """Longest window in tokens."""
        layers = getattr(self.config, "layer_types", None) or ["full_attention"]
        if self._max_length or self.config.model_type != "gka" or "full_attention" in layers:
            return super().max_length
        return UNLIMITED

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(log p, whether greedy decoding gives it) of each continuation, in the order of `requests`."""
        rows = [self._window(context, text) for _, context, text in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        off = disable_tqdm or self.rank != 0
        with tqdm(total=len(rows), disable=off, desc="loglikelihoods") as bar:
            for group in _groups(rows, override_bs or int(self.batch_size)):
                shared = len(group) > 1 and len({tuple(rows[i][0]) for i in group}) == 1
                score = self._behind_one_context if shared else self._side_by_side
                for i, answer in zip(group, score([rows[i] for i in group]), strict=True):
                    found[i] = answer
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                bar.update(len(group))
        return found

    def _window(self, context: list[int], text: list[int]) -> tuple[list[int], list[int]]:
        """Context and continuation; a context that is too long is cut off on the left."""
        if len(text) > self.max_length:
            raise InputError(
                f"a continuation has {len(text)} tokens, more than max_length = {self.max_length}"
            )
        return context[-(self.max_length + 1 - len(text)) :], text

    def _side_by_side(self, rows: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        return [
            (-float(losses.double().sum()), bool(likeliest.all()))
            for losses, likeliest in self.reader.losses(rows)
        ]

    def _behind_one_context(
        self, rows: list[tuple[list[int], list[int]]]
    ) -> list[tuple[float, bool]]:
        state = self.reader.read(rows[0][0])
        return self.reader.scores(state, [text for _, text in rows])


def _groups(rows: Sequence[tuple[list[int], list[int]]], batch_size: int) -> list[list[int]]:
    """Groups of row indices to score together, longest first: memory runs out at once or not at all.

    With a batch size of 1: all short continuations of one context. Otherwise: rows of about equal length.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    if batch_size > 1:
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i in order:
        context, text = rows[i]
        alone = len(text) > len(context)  # sharing saves little; logits come in chunks
        groups.setdefault((i,) if alone else tuple(context), []).append(i)
    return list(groups.values())
