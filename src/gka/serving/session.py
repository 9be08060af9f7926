"""A text that a model reads and continues, with states that can be copied, stored and combined."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gka.errors import InputError
from gka.models import GKAForCausalLM
from gka.serving import statefile
from gka.serving.contents import Contents, combined
from gka.serving.graph import CaptureError, GraphedSteps, check_choice, why_not_graphed
from gka.serving.tokens import (
    PREFILL_CHUNK,
    Ids,
    OneAtATime,
    Sampling,
    check_chunk,
    check_model,
    chooser,
    left_padding,
    prefill,
    token_ids,
)


class GenerationSession:
    """A model and its states over several turns.

    The states contain every token that was appended or yielded, so a session can be interrupted, copied or
    stored between any two tokens. A batch has one text per row; shorter rows are padded on the left.

    Sessions of one model share only its weights and solver settings (`set_solver`), so each can run in its
    own thread. One session serves one thread at a time.

    Args:
        model: a `GKAForCausalLM`, which is neither copied nor trained.
        prefill_chunk: tokens of each row read at a time; limits memory and does not change the result.
        track_decay: keep each layer's total log decay, which `combine` needs for `how="sequence"`.
        cuda_graph: whether `generate` replays a recorded step as a CUDA graph, which saves the host the
            launches and gives the same tokens. None: if possible (`why_not_graphed`). True: or an error.

    Raises:
        InputError: `model` is not a GKA language model, `prefill_chunk` is not positive, `cuda_graph` is not
            True, False or None, or it is True and steps cannot be recorded.

    Example:
        >>> session = GenerationSession(model).append(prompt)
        >>> for token in session.generate(100, temperature=0.8):
        ...     print(token.tolist())
        >>> session.save("chat.state")
    """

    def __init__(
        self,
        model: GKAForCausalLM,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        track_decay: bool = False,
        cuda_graph: bool | None = None,
    ):
        check_model(model)
        check_chunk(prefill_chunk)
        check_choice(cuda_graph)
        self.model = model
        self.prefill_chunk = prefill_chunk
        self._attends = any(kind != "linear_attention" for kind in model.config.layer_types)
        self._contents = Contents.empty(model, track_decay)
        self._whole = True
        self._turn = OneAtATime()
        self.cuda_graph = cuda_graph
        self._graphs = GraphedSteps(model)
        if cuda_graph:
            self._graphed()

    @property
    def why_not_graphed(self) -> str | None:
        """Why the kernels of `generate` are launched one by one; None if steps are a CUDA graph."""
        if self.cuda_graph is False:
            return "the session was opened with cuda_graph=False."
        if self.tracks_decay:
            return "track_decay=True sums decays in Python at every step."
        return why_not_graphed(self.model)

    @property
    def num_tokens(self) -> int:
        """Positions read so far, padding included."""
        return self._contents.tokens

    @property
    def batch_size(self) -> int | None:
        """Number of rows B; None before the first token."""
        return self._contents.batch_size

    @property
    def logits(self) -> Tensor | None:
        """Logits of the next token [B,vocab_size]; None before the first token and after `combine`."""
        return self._contents.logits

    @property
    def tracks_decay(self) -> bool:
        """Whether total log decays are tracked."""
        return self._contents.decay is not None

    @property
    def log_decay(self) -> dict[int, Tensor]:
        """Total log decay of every layer with decay: layer index to float64 [B,H].

        Raises:
            InputError: the session was opened without `track_decay`.
        """
        if self._contents.decay is None:
            raise InputError("log_decay is not tracked: open the session with track_decay=True")
        return dict(self._contents.decay.totals)

    def append(self, tokens: Ids, attention_mask: Tensor | None = None) -> "GenerationSession":
        """Read tokens.

        Args:
            tokens: ids [B,T], or [T] for one row; B must be the same in all calls.
            attention_mask: [B,T], 1 for tokens and 0 for padding, which must be on the left.

        Returns:
            The session itself.

        Raises:
            InputError: a shape, id or mask does not fit, and the session is unchanged; or the session is in
                use or was interrupted before.
        """
        ids = token_ids(tokens, self.model, self.batch_size)
        self._feed(ids, left_padding(attention_mask, ids))
        return self

    def generate(
        self,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> Iterator[Tensor]:
        """Yield the next tokens one by one, until all rows have an end-of-text token.

        Args:
            max_new_tokens: at most this many.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: sample from this many most likely tokens; 0 means all.
            top_p: sample from the most likely tokens that together have this probability.
            seed: seed of the random numbers; None uses torch's global generator.
            eos_token_id: ids that end a text. None: the configuration's; []: none.

        Yields:
            [B] int64 on the model's device. Rows that have ended yield padding, which is masked.

        Raises:
            InputError: at the call: an option is out of range, no logits are known (nothing was read, or
                after `combine`), or `cuda_graph` is True and steps can no longer be recorded.
            RuntimeError: a step could not be recorded as a CUDA graph; the session can still be used.
        """
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        with self._turn.use():
            self._check_whole()
        if self.logits is None:
            raise InputError("there is nothing to go on from: append the beginning of a text first")
        config: Any = self.model.config
        ends = config.eos_token_id if eos_token_id is None else eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or ())
        graphed = self._graphed()
        return self._stream(chooser(sampling, self.model.device), max_new_tokens, ends, graphed)

    def fork(self, repeats: int = 1) -> "GenerationSession":
        """An independent session with the same model and states, each row `repeats` times.

        Raises:
            InputError: `repeats` is not positive.
        """
        if repeats < 1:
            raise InputError(f"repeats is {repeats}; expected 1 or more")
        with self._turn.use():
            self._check_whole()
            return self._with(self._contents.copy(repeats))

    def save(self, path: str | Path) -> None:
        """Store the session; an existing file is replaced when the new one is complete.

        Raises:
            InputError: the file cannot be written or the states are not finite; an existing file is kept.
        """
        with self._turn.use():
            self._check_whole()
            statefile.save_contents(Path(path), self.model, self._contents)

    def load(
        self, path: str | Path, *, verify: bool = True, mmap: bool = False
    ) -> "GenerationSession":
        """Replace this session's states by stored ones.

        Args:
            path: a file that `save` wrote with this model.
            verify: compare the checksum, and refuse values that are not finite.
            mmap: map the tensors into memory instead of copying them. The file must then not be changed
                during the session's life: writes into it change the states unnoticed, and a read beyond a
                new end kills the process with SIGBUS. Replacing it as `save` does (`os.replace`) is harmless.

        Returns:
            The session itself.

        Raises:
            InputError: the file is missing, cut short, damaged, of another model or does not fit this
                model; the session is unchanged.
        """
        with self._turn.use():
            self._contents = statefile.load_contents(
                Path(path), self.model, verify=verify, mmap=mmap
            )
            self._graphs.forget()
            self._whole = True
        return self

    @staticmethod
    def combine(
        sessions: Sequence["GenerationSession"], how: str = "sequence"
    ) -> "GenerationSession":
        """Combine the states of several sessions into a new session, without reading the texts again.

        Recurrent states are combined by `how`. Convolutions continue from the last session. Keys and values
        of attention layers are concatenated, with keys rotated to their new positions. The next token's
        logits are unknown, so append something before generating.

        Args:
            sessions: sessions of one model and batch size, in order.
            how: "sequence" decays each state by the total decay of the later sessions, as if read one after
                the other (sessions after the first need track_decay=True); "sum"; or "mean".

        Raises:
            InputError: fewer than two sessions, different models or batch sizes, layers that cannot be
                combined, decays that were not tracked, or `how` is unknown.
        """
        sessions = list(sessions)
        if len(sessions) < 2 or any(x.model is not sessions[0].model for x in sessions):
            raise InputError("sessions: expected two or more that share one model")
        first = sessions[0]
        with ExitStack() as stack:
            for session in {id(x): x for x in sessions}.values():
                stack.enter_context(session._turn.use())
                session._check_whole()
            contents = [session._contents for session in sessions]
            return first._with(combined(first.model, contents, how))

    def _with(self, contents: Contents) -> "GenerationSession":
        session = GenerationSession(
            self.model, prefill_chunk=self.prefill_chunk, cuda_graph=self.cuda_graph
        )
        session._contents = contents
        return session

    def _graphed(self) -> bool:
        """Whether steps are to be a CUDA graph; raises `InputError` if they must be but cannot."""
        reason = self.why_not_graphed
        if reason is None:
            self._graphs.check_weights()
            return True
        self._graphs.forget()
        if self.cuda_graph:
            raise InputError(f"cuda_graph=True: decode steps cannot be a CUDA graph: {reason}")
        return False

    @torch.no_grad()
    def _stream(
        self, choose: Callable[[Tensor], Tensor], most: int, ends: list[int], graphed: bool
    ) -> Iterator[Tensor]:
        logits = self.logits
        assert logits is not None
        done = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
        stop = torch.tensor(ends, device=logits.device)
        config: Any = self.model.config
        filler = config.pad_token_id if config.pad_token_id is not None else (ends or [0])[0]
        ended = 0
        for _ in range(most):
            assert self.logits is not None
            tokens = choose(self.logits)
            if ended:
                tokens = tokens.masked_fill(done, filler)
            self._feed(tokens[:, None], ~done[:, None] if ended else None, graphed)
            if ends:
                done = done | torch.isin(tokens, stop)
                ended = int(done.sum())  # the only wait for the device per token
            yield tokens
            if ended == len(done):
                return

    def _feed(self, tokens: Tensor, mask: Tensor | None, graphed: bool = False) -> None:
        """Read tokens [B,T] with mask [B,T], None without padding; `graphed` (T = 1): as a CUDA graph."""
        with self._turn.use():
            self._check_whole()
            self._feed_alone(tokens, mask, graphed)

    def _feed_alone(self, tokens: Tensor, mask: Tensor | None, graphed: bool) -> None:
        contents = self._contents
        covering = mask
        if self._attends and not (mask is None and contents.mask is None):
            parts = [contents.mask, mask]
            shapes = [(tokens.shape[0], contents.tokens), tokens.shape]
            ones = [tokens.new_ones(shape, dtype=torch.bool) for shape in shapes]
            covering = torch.cat(
                [one if x is None else x for x, one in zip(parts, ones, strict=True)], 1
            )
        # An error or Ctrl-C in the middle leaves some layers changed and others not.
        self._whole = False
        logits = self._read(tokens, covering, graphed)
        if mask is not None and contents.logits is not None:
            logits = logits.where(mask[:, -1:], contents.logits)
        contents.tokens += tokens.shape[1]
        contents.logits = logits
        contents.mask = covering if self._attends else None
        self._whole = True

    def _read(self, tokens: Tensor, mask: Tensor | None, graphed: bool) -> Tensor:
        contents = self._contents
        decay, cache = contents.decay, contents.cache
        if graphed and decay is None:
            try:
                return self._graphs.run(tokens, mask, cache)
            except CaptureError:
                self._whole = True  # nothing was read
                raise
        with nullcontext() if decay is None else decay.watching(cache):
            return prefill(self.model, tokens, cache, attention_mask=mask, chunk=self.prefill_chunk)

    def _check_whole(self) -> None:
        if not self._whole:
            raise InputError(
                "the session was interrupted while it read tokens, and its layers no longer agree: load a "
                "stored state, or start a new session"
            )
