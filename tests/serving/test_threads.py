"""Sessions of one model in several threads: each computes what it computes alone."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from gka import GenerationSession
from gka.errors import InputError
from gka.models import GKACache, GKAForCausalLM
from gka.serving import graph, inspect_model

Build = Callable[..., GKAForCausalLM]
Ids = Callable[..., Tensor]

MIXERS = ["gka", "attention", "gla", "swa", "gated_deltanet"]


class Together:
    """Makes threads meet before each of a model's layers, so that all read at once."""

    def __init__(self, model: GKAForCausalLM, threads: int):
        self.barrier = threading.Barrier(threads, timeout=30)
        self.met = 0
        self.hooks = [x.register_forward_pre_hook(self._meet) for x in model.model.layers]

    def _meet(self, *_: Any) -> None:
        if self.barrier.wait() == 0:  # one of those that met
            self.met += 1

    def run(self, calls: list[Callable[[], Any]]) -> list[Any]:
        try:
            with ThreadPoolExecutor(len(calls)) as pool:
                found = [pool.submit(call) for call in calls]
                return [x.result() for x in found]
        finally:
            for hook in self.hooks:
                hook.remove()


def told(model: GKAForCausalLM, prompt: Tensor, **options: Any) -> dict[str, Any]:
    """All that a session says after reading and writing."""
    session = GenerationSession(model, prefill_chunk=11, **options).append(prompt)
    text = torch.stack(list(session.generate(6, temperature=0.9, seed=3)), 1)
    decay = session.log_decay if session.tracks_decay else {}
    return {"text": text, "logits": session.logits} | {f"decay {i}": x for i, x in decay.items()}


def assert_equal(found: dict[str, Any], alone: dict[str, Any]) -> None:
    assert set(found) == set(alone)
    for name, x in alone.items():
        assert torch.equal(found[name], x), name


def test_sessions_track_their_own_decay(build: Build, ids: Ids):
    """Three sessions in step, two of which track decays, say bit for bit what each says alone."""
    model = build(mixers=MIXERS)
    prompts = [(ids(2, 22, seed=n), {"track_decay": n < 2}) for n in range(3)]
    alone = [told(model, x, **options) for x, options in prompts]
    assert "decay 0" in alone[0] and "decay 0" not in alone[2]
    together = Together(model, 3)
    found = together.run([lambda x=x, o=o: told(model, x, **o) for x, o in prompts])
    assert together.met == (2 + 6) * len(MIXERS)
    for one, other in zip(found, alone, strict=True):
        assert_equal(one, other)


def test_inspection_sees_its_own_text(build: Build, ids: Ids):
    """A text is inspected beside another inspection and a session: all three are as they are alone."""
    model, texts = build(mixers=["gka", "gka"]), [ids(1, 20, seed=n) for n in range(3)]
    alone = [inspect_model(model, x, positions=5) for x in texts[:2]]
    expected = GenerationSession(model).append(texts[2]).logits
    calls: list[Callable[[], Any]] = [
        lambda x=x: inspect_model(model, x, positions=5) for x in texts[:2]
    ]
    calls.append(lambda: GenerationSession(model).append(texts[2]).logits)
    found = Together(model, 3).run(calls)
    assert found[:2] == alone and torch.equal(found[2], expected)  # type: ignore[arg-type]


def test_tracking_leaves_the_model_alone(build: Build, ids: Ids):
    """While decays are tracked no module of the model has a hook or an attribute that it has not always."""
    model = build(mixers=["gka", "gla"])
    mixers: list[Any] = [layer.mixer for layer in model.model.layers]
    before, seen = [set(vars(x)) for x in mixers], []

    def look(*_: Any) -> None:
        seen.append(all(not x._forward_pre_hooks and not x._forward_hooks for x in mixers))
        seen.append([set(vars(x)) for x in mixers] == before)

    model.model.norm.register_forward_hook(look)
    GenerationSession(model, track_decay=True).append(ids(1, 5))
    inspect_model(model, ids(1, 5), positions=2)
    assert seen == [True] * 4


def test_recorded_steps_are_a_sessions_own(build: Build, ids: Ids, monkeypatch: pytest.MonkeyPatch):
    """Two sessions in step, each with its own recording of the step, write what each writes alone.

    As in test_graph.py a recording is the call itself, repeated.
    """
    counted = []

    def record(call: Callable[[], Tensor], device: Any) -> tuple[Callable[[], None], Tensor]:
        counted.append(threading.get_ident())
        held = [cell.cell_contents for cell in call.__closure__ or ()]
        cache = next(x for x in held if isinstance(x, GKACache))
        logits = torch.zeros(2, 97)

        def replay() -> None:
            logits.copy_(call())
            cache.advance(-1)  # whoever replays counts the token

        return replay, logits

    model, prompts = build(mixers=["gka", "gla"]), [ids(2, 9, seed=n) for n in range(2)]
    alone = [told(model, x, cuda_graph=False) for x in prompts]
    monkeypatch.setattr(graph, "record", record)
    monkeypatch.setattr(graph, "run_aside", lambda call, device: call())
    monkeypatch.setattr("gka.serving.session.why_not_graphed", lambda model: None)
    found = Together(model, 2).run([lambda x=x: told(model, x, cuda_graph=True) for x in prompts])
    assert len(counted) == len(set(counted)) == 2
    for one, other in zip(found, alone, strict=True):
        assert_equal(one, other)


def test_forks_share_no_memory(build: Build, ids: Ids):
    """No tensor of a fork lies where one of its parent's lies."""
    session = GenerationSession(build(mixers=MIXERS), track_decay=True)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    session.append(ids(2, 8), mask)
    for repeats in (1, 2):
        both = [x._contents.named() for x in (session, session.fork(repeats))]
        assert set(both[0]) == set(both[1]) >= {"logits", "mask", "log_decay.0"}
        places = [{x.untyped_storage().data_ptr() for x in named.values()} for named in both]
        assert not places[0] & places[1]


def test_a_session_serves_one_thread_at_a_time(build: Build, ids: Ids, tmp_path: Any):
    """While a session reads, all that another thread asks of it is refused, and it goes on unharmed."""
    model = build(mixers=["gka", "attention"])
    session, other = (GenerationSession(model).append(ids(1, 6)) for _ in range(2))
    expected = GenerationSession(model).append(ids(1, 6)).append(ids(1, 5, seed=2)).logits
    errors: list[str] = []

    def intrude(*_: Any) -> None:
        def ask() -> None:
            for use in (
                lambda: session.append([1]), lambda: list(session.generate(1)), session.fork,
                lambda: session.save(tmp_path / "s"), lambda: session.load(tmp_path / "s"),
                lambda: GenerationSession.combine([other, session], how="sum"),
            ):  # fmt: skip
                with pytest.raises(InputError, match="in use by another thread") as refused:
                    use()
                errors.append(str(refused.value))

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    hook = model.model.layers[1].register_forward_pre_hook(intrude)
    session.append(ids(1, 5, seed=2))
    hook.remove()
    assert len(errors) == 6 and torch.equal(session.logits, expected)  # type: ignore[arg-type]
    other.append([1])  # was let go again


def test_a_session_can_be_copied(build: Build, ids: Ids):
    """`copy.deepcopy` gives a session, with a model, of its own."""
    session = GenerationSession(build(mixers=["gka"])).append(ids(1, 6))
    again = copy.deepcopy(session)
    assert torch.equal(*(torch.stack(list(x.generate(5)), 1) for x in (session, again)))
