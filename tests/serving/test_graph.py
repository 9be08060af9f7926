"""Decoding by a recorded step: when it may, and that the session around it stays right.

A recording cannot be made here: `record` is replaced by one that keeps the call and repeats it, which
writes to the same places and counts nothing on the host, as a CUDA graph does. The graph itself:
test_gpu_graph.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gka import GenerationSession
from gka.errors import InputError
from gka.models import GKAForCausalLM, cache_tensors
from gka.serving import graph

Build = Callable[..., GKAForCausalLM]
Ids = Callable[..., Tensor]

RECURRENT = ["gka", "gla", "deltanet", "gated_deltanet"]


def text(session: GenerationSession, tokens: int, **options: Any) -> Tensor:
    """The next tokens [B,tokens]."""
    return torch.stack(list(session.generate(tokens, **options)), 1)


class Recorder:
    """`record` and `run_aside` for a CPU; counts what is recorded and repeated."""

    def __init__(self) -> None:
        self.aside = self.recorded = self.repeated = 0
        self.session: Any = None

    def run_aside(self, call: Callable[[], Tensor], device: Any) -> Tensor:
        self.aside += 1
        return call()

    def record(self, call: Callable[[], Tensor], device: Any) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        cache = self.session._contents.cache
        before = [(x, x.clone()) for x in cache_tensors(cache).values()]
        result = call()
        for x, old in before:
            x.copy_(old)

        def replay() -> None:
            self.repeated += 1
            tokens = cache.get_seq_length()
            result.copy_(call())
            cache.advance(tokens - cache.get_seq_length())

        return replay, result


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(graph, "record", recorder.record)
    monkeypatch.setattr(graph, "run_aside", recorder.run_aside)
    monkeypatch.setattr("gka.serving.session.why_not_graphed", lambda model: None)
    return recorder


def pair(model: GKAForCausalLM, recorder: Recorder, prompt: Tensor, **options: Any) -> Any:
    """A recorded session and a plain one that have read the same."""
    recorded = GenerationSession(model, cuda_graph=True)
    recorder.session = recorded
    plain = GenerationSession(model, cuda_graph=False)
    return recorded.append(prompt, **options), plain.append(prompt, **options)


def assert_same(recorded: GenerationSession, plain: GenerationSession, tokens: int = 12) -> None:
    assert torch.equal(text(recorded, tokens), text(plain, tokens))
    assert torch.equal(recorded.logits, plain.logits)  # type: ignore[arg-type]
    assert recorded.num_tokens == plain.num_tokens
    assert recorded._contents.cache.get_seq_length() == plain._contents.cache.get_seq_length()


@pytest.mark.parametrize("mixer", RECURRENT)
def test_one_recording_serves_all_turns(
    build: Build, ids: Ids, recorder: Recorder, mixer: str
) -> None:
    """First step as it is, second recorded, all others repeated, also after more was read; same text."""
    recorded, plain = pair(build(mixers=[mixer, mixer]), recorder, ids(2, 30))
    assert_same(recorded, plain)
    for session in (recorded, plain):
        session.append(ids(2, 21, seed=4))
    assert_same(recorded, plain)
    assert (recorder.aside, recorder.recorded, recorder.repeated) == (1, 1, 23)


@pytest.mark.parametrize("mixer", RECURRENT)
def test_states_stay_where_they_are(build: Build, ids: Ids, mixer: str) -> None:
    """Reading long and short texts and writing leaves every state of a session at its address."""
    session = GenerationSession(build(mixers=[mixer, mixer])).append(ids(2, 30))
    places = {n: x.data_ptr() for n, x in cache_tensors(session._contents.cache).items()}
    mask = torch.ones(2, 40).long()
    mask[0, :7] = 0
    for read in (ids(2, 70), ids(2, 3), ids(2, 1)):
        session.append(read)
        text(session, 3)
    session.append(ids(2, 40), mask)
    found = {n: x.data_ptr() for n, x in cache_tensors(session._contents.cache).items()}
    assert len(places) == 2 * (5 if mixer == "gka" else 4) and found == places


def test_left_padding(build: Build, ids: Ids, recorder: Recorder) -> None:
    """Rows padded on the left are written on as without a recording."""
    mask = torch.ones(3, 12).long()
    mask[0, :5], mask[2, :9] = 0, 0
    assert_same(*pair(build(mixers=["gka", "gla"]), recorder, ids(3, 12), attention_mask=mask))
    assert recorder.recorded == 1


def test_rows_that_ended_have_a_recording_of_their_own(
    build: Build, ids: Ids, recorder: Recorder
) -> None:
    """Rows end one after the other: their states and logits stay, by one more recording, with a mask."""
    model, prompt = build(mixers=["gka", "gka"]), ids(3, 6)
    free = text(GenerationSession(model, cuda_graph=False).append(prompt), 40).tolist()
    others = [{*free[1], *free[2]}, {*free[0], *free[2]}]
    first = next(i for i in range(2, 40) if free[0][i] not in others[0])
    second = next(i for i in range(first + 3, 40) if free[1][i] not in {*others[1], *free[1][:i]})
    recorded, plain = pair(model, recorder, prompt)
    options: dict[str, Any] = {"eos_token_id": [free[0][first], free[1][second]]}
    assert torch.equal(text(recorded, 40, **options), text(plain, 40, **options))
    assert torch.equal(recorded.logits, plain.logits) and recorder.recorded == 2
    assert_same(recorded, plain)
    assert recorder.recorded == 2


def test_what_was_yielded_is_not_written_over(build: Build, ids: Ids, recorder: Recorder) -> None:
    """Logits that were taken from a session, also by a fork, are not those of a later step."""
    recorded, _ = pair(build(mixers=["gka"]), recorder, ids(1, 9))
    text(recorded, 4)
    taken, fork = recorded.logits, recorded.fork()
    before = taken.clone()
    text(recorded, 4)
    assert torch.equal(taken, before) and torch.equal(fork.logits, before)  # type: ignore[arg-type]


def test_recorded_anew_after_fork_and_load(
    build: Build, ids: Ids, recorder: Recorder, tmp_path: Any
) -> None:
    """A fork and a loaded state have states of their own: their steps are recorded on those."""
    recorded, plain = pair(build(mixers=["gka", "gla"]), recorder, ids(2, 9))
    assert_same(recorded, plain)
    plain.save(tmp_path / "state")
    fork, plain_fork = recorded.fork(), plain.fork()
    assert fork.cuda_graph is True and plain_fork.cuda_graph is False
    recorder.session = fork
    assert_same(fork, plain_fork)
    assert recorder.recorded == 2
    recorder.session = recorded
    again = [session.load(tmp_path / "state") for session in (recorded, plain)]
    assert_same(again[0], again[1])
    assert (recorder.recorded, recorder.aside) == (3, 3)


@pytest.mark.parametrize("how", ["solver", "data", "parameter", "states", "stream"])
def test_recorded_anew_when_something_moves(
    build: Build, ids: Ids, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Other weights, solver settings, places of states or streams are noticed; the text follows them."""
    model = build(mixers=["gka", "gka"])
    recorded, plain = pair(model, recorder, ids(2, 9))
    assert_same(recorded, plain)
    weight = model.lm_head.weight
    if how == "solver":
        model.set_solver(num_iter=1)
    elif how == "data":
        weight.data = weight.data.flip(0).contiguous()
    elif how == "parameter":
        model.lm_head.weight = torch.nn.Parameter(weight.detach().flip(0))
    elif how == "stream":
        monkeypatch.setattr(graph, "_current", lambda device: 1)
    else:
        layer: Any = recorded._contents.cache.layers[1]
        layer.recurrent_states[0] = layer.recurrent_states[0].clone()
    assert_same(recorded, plain)
    assert recorder.recorded == 2


def test_a_failed_recording_leaves_the_session_whole(
    build: Build, ids: Ids, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises, never goes on by itself, counts nothing, and the states are those before the step."""
    recorded, plain = pair(build(mixers=["gka"]), recorder, ids(1, 9))

    def fail(call: Any, device: Any) -> None:
        before = [(x, x.clone()) for x in cache_tensors(recorded._contents.cache).values()]
        call()
        for x, old in before:
            x.copy_(old)
        raise graph.CaptureError("the decode step cannot be recorded")

    with monkeypatch.context() as patch:
        patch.setattr(graph, "record", fail)
        steps = recorded.generate(5)
        assert torch.equal(next(steps), next(plain.generate(1)))
        with pytest.raises(RuntimeError, match="cannot be recorded"):
            next(steps)
    assert recorded.num_tokens == 10
    assert_same(recorded, plain)


def test_states_that_move_are_not_recorded(
    build: Build, ids: Ids, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that replaces its states would be written to where nobody reads: it raises, and is restored."""
    recorded, plain = pair(build(mixers=["gla"]), recorder, ids(1, 9))
    layer: Any = recorded._contents.cache.layers[0]

    def replace(state: Tensor, state_idx: int = 0) -> Tensor:
        layer.recurrent_states[state_idx] = state
        return state

    steps = recorded.generate(5)
    assert torch.equal(next(steps), next(plain.generate(1)))
    held = layer.recurrent_states[0]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "update_recurrent_state", replace)
        with pytest.raises(RuntimeError, match="moves the states to other memory"):
            next(steps)
    assert layer.recurrent_states[0] is held
    assert_same(recorded, plain)


REASONS: list[tuple[dict[str, Any], str]] = [
    ({"mixers": ["gla", "attention"]}, "layer 1 is a SoftmaxAttention, whose keys and values grow"),
    ({"mixers": ["swa", "gka"]}, "layer 0 is a SlidingWindowAttention, whose keys"),
    ({"mixers": ["gla", "gka"], "backend": "torch"}, "layer 1: its step would run on backend 'torch'"),
    ({"mixers": ["gla", "gka"]}, "layer 1: its step would run on backend 'torch'"),
    (
        {
            "mixers": ["gla", "gla"],
            "moe": {
                "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
                "norm_topk_prob": True, "layers": [1],
            },
        },
        "layer 1 has experts",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "reason"), REASONS)
def test_layers_that_cannot(
    build: Build, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], reason: str
) -> None:
    """A layer that grows, waits for the device or has no kernel is named."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert reason in (graph._why_not_layers(build(**fields)) or "")


def test_layers_that_can(build: Build) -> None:
    """Recurrent mixers whose states keep their places need no more."""
    assert graph._why_not_layers(build(mixers=["gla", "deltanet", "gated_deltanet"])) is None


def test_modules_that_are_listened_to(build: Build) -> None:
    """A hook would run once in a recording: it is a reason not to make one."""
    model = build(mixers=["gla"])
    assert graph._why_called(model) is None
    hook = model.model.norm.register_forward_hook(lambda *_: None)
    assert "model.norm has hooks" in (graph._why_called(model) or "")
    hook.remove()
    model.lm_head.forward = model.lm_head.forward
    assert "lm_head has hooks or was replaced" in (graph._why_called(model) or "")


def test_the_reason_is_told_and_true_insists(build: Build, ids: Ids, recorder: Recorder) -> None:
    """None and False decode without a recording and say why; True raises with the reason."""
    model = build(mixers=["gla"])
    off = GenerationSession(model, cuda_graph=False).append(ids(1, 4))
    tracking = GenerationSession(model, track_decay=True).append(ids(1, 4))
    assert "cuda_graph=False" in (off.why_not_graphed or "")
    assert "track_decay=True" in (tracking.why_not_graphed or "")
    assert torch.equal(text(off, 5), text(tracking, 5)) and recorder.aside == 0
    insisting = GenerationSession(model, cuda_graph=True).append(ids(1, 4))
    assert insisting.why_not_graphed is None
    insisting._contents = tracking._contents
    with pytest.raises(InputError, match=r"cuda_graph=True: .* track_decay=True"):
        insisting.generate(1)


def test_a_cpu_has_no_graphs(build: Build, ids: Ids) -> None:
    """On a CPU the default decodes as it is; True is refused when the session is opened."""
    model = build(mixers=["gla"])
    session = GenerationSession(model).append(ids(1, 4))
    assert "the model is on cpu" in (session.why_not_graphed or "")
    assert text(session, 3).shape == (1, 3)
    with pytest.raises(InputError, match=r"cuda_graph=True: .* the model is on cpu"):
        GenerationSession(model, cuda_graph=True)
    with pytest.raises(InputError, match="cuda_graph is 'yes'; expected True, False or None"):
        GenerationSession(model, cuda_graph="yes")  # type: ignore[arg-type]
