"""A conversation with a model whose memory has a constant size: kept, copied, stored, combined."""

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
    """A model and its states across turns.

    Every token that was appended or yielded is in the states, so a session can be left, copied or
    stored at any time. A batch has one text a row; its rows are padded on the left where they differ.

    Sessions of one model share its weights and its solver settings (`set_solver`), and nothing that reading
    changes: each may run in a thread of its own. One session serves one thread at a time.

    Args:
        model: a `GKAForCausalLM`; used as it is, not copied, and not trained.
        prefill_chunk: tokens of each row that are read at a time; bounds memory, changes no result.
        track_decay: keep each layer's total log decay, which `combine` needs for `how="sequence"`.
        cuda_graph: whether `generate` repeats a recorded step, which spares the host the launches; the
            tokens are the same. None: where it can (`why_not_graphed`). True: always, or an error.

    Raises:
        InputError: `model` is no GKA language model, `prefill_chunk` is not positive, or steps cannot be
            recorded though `cuda_graph` is True.

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
        """Why the steps of `generate` are launched one by one; None where they are a CUDA graph."""
        if self.cuda_graph is False:
            return "the session was opened with cuda_graph=False."
        if self.tracks_decay:
            return "track_decay=True adds up decays beside the model, at every step."
        return why_not_graphed(self.model)

    @property
    def num_tokens(self) -> int:
        """Positions read so far, each row's padding included."""
        return self._contents.tokens

    @property
    def batch_size(self) -> int | None:
        """Rows; None before the first token."""
        return self._contents.batch_size

    @property
    def logits(self) -> Tensor | None:
        """Logits of the next token [B,vocab_size]; None before the first token and after `combine`."""
        return self._contents.logits

    @property
    def tracks_decay(self) -> bool:
        """Whether total log decays are kept."""
        return self._contents.decay is not None

    @property
    def log_decay(self) -> dict[int, Tensor]:
        """Total log decay since the start of every layer that decays: layer index to float64 [B,H].

        Raises:
            InputError: the session does not track it.
        """
        if self._contents.decay is None:
            raise InputError("log_decay is not tracked: open the session with track_decay=True")
        return dict(self._contents.decay.totals)

    def append(self, tokens: Ids, attention_mask: Tensor | None = None) -> "GenerationSession":
        """Read tokens.

        Args:
            tokens: [B,T] ids, or those of one row [T]; the batch of the first call is that of all.
            attention_mask: [B,T], 1 for tokens and 0 for padding, which must be on the left.

        Returns:
            The session itself.

        Raises:
            InputError: a shape, id or mask that does not fit; the session is as it was.
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
        """Yield the next tokens one by one, until all rows have met an end-of-text token.

        Args:
            max_new_tokens: at most this many.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: sample from this many likeliest tokens; 0 from all.
            top_p: sample from the likeliest tokens that together have this probability.
            seed: of the random numbers; None goes on with torch's own.
            eos_token_id: what ends a text. None: the configuration's, if it has one; [] for nothing.

        Yields:
            [B] int64 on the model's device. Rows that have ended yield padding, which is not read.

        Raises:
            InputError: an option is out of range, no token was read before, or the steps can no longer be
                a CUDA graph though `cuda_graph` is True; at the call.
            RuntimeError: a step could not be recorded as a CUDA graph; the session is whole.
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
        """An independent session with the same model and past, each row `repeats` times.

        Raises:
            InputError: `repeats` is not positive.
        """
        if repeats < 1:
            raise InputError(f"repeats is {repeats}; expected 1 or more")
        with self._turn.use():
            self._check_whole()
            return self._with(self._contents.copy(repeats))

    def save(self, path: str | Path) -> None:
        """Store the session; a file that is there is replaced once the new one is whole.

        Raises:
            InputError: the file cannot be written, or the states are no numbers; a file that is there stays.
        """
        with self._turn.use():
            self._check_whole()
            statefile.save_contents(Path(path), self.model, self._contents)

    def load(
        self, path: str | Path, *, verify: bool = True, mmap: bool = False
    ) -> "GenerationSession":
        """Take up a stored session in place of this one's past.

        Args:
            path: what `save` wrote, with this model.
            verify: compare the checksum, and refuse numbers that are not finite.
            mmap: use the tensors where they lie in the file, mapped into memory, instead of a copy. The file
                must then stay as it is while the session lives: what is written into it changes the states,
                unnoticed, and where it is cut short the process ends by SIGBUS. A file that is replaced
                as `save` does it (`os.replace`) is no harm.

        Returns:
            The session itself.

        Raises:
            InputError: the file is absent, cut short, damaged or of another model, or holds what no
                session of this model would; the session is as it was.
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
        """One session that knows what several have read, each from the start, without reading again.

        Recurrent states are combined as `how` says; convolutions go on from the last session; keys and
        values of attention layers stand one after the other, turned to the positions they then have.
        The next token's logits are not known: append something before generating.

        Args:
            sessions: of one model and batch size, in their order.
            how: "sequence", each state faded by the decay of those after it, as if read in turn
                (sessions opened with track_decay=True); "sum", the plain sum; "mean", the mean.

        Raises:
            InputError: fewer than two sessions, models, batches or layers that cannot be combined, or
                decays that were not tracked.
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
        """Whether steps are to be a CUDA graph; raises `InputError` where they must be and cannot."""
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
                ended = int(done.sum())  # the one wait for the device a token
            yield tokens
            if ended == len(done):
                return

    def _feed(self, tokens: Tensor, mask: Tensor | None, graphed: bool = False) -> None:
        """Read [B,T] tokens; mask [B,T] is None without padding. `graphed`: T = 1, as a CUDA graph."""
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
        # what is interrupted half-way, by an error or Ctrl-C, has changed some layers and not others
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
