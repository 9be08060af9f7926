"""A replayed pass launches what a pass that is not recorded launches, on the tensors of its own call."""

import ctypes
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import gka.kernels.backward as backward_pass
import gka.kernels.forward as forward_pass
from gka.kernels import driver, replay
from gka.kernels.arrays import InputGradients
from gka.kernels.call import GpuCall, packed_chunks, prepared
from gka.kernels.hopper import build
from gka.kernels.hopper.passes import HOPPER
from gka.kernels.kept import kept_shape
from gka.kernels.replay import Recorder
from gka.maths.chunked import Settings, Tokens

B, T, H, K = 2, 200, 4, 64
INPUTS = Tokens._fields[:-2]
RESULTS = ("o", "x", "h", "u", "x_scale", "kept")
CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "two decays": {"gk": True},
    "no decay": {"g": False},
    "bare": {"g": False, "alpha": False, "beta": False, "states": False},
    "16-bit gates": {"gates": torch.bfloat16},
    "keys are queries": {"same": True},
    "shared heads": {"key_heads": 2, "value_heads": 1},
    "shared heads, groups": {"key_heads": 2, "value_heads": 2, "chunk_heads": 16},
    # other bounds each time, with as many chunks
    "packed": {"packed": itertools.cycle([[0, 64, 64, 300, 400], [0, 60, 60, 300, 400]])},
    "states kept": {"keep": True, "key_heads": 2},
    "states kept, packed": {
        "keep": True, "packed": itertools.cycle([[0, 64, 64, 300, 400], [0, 60, 60, 300, 400]]),
    },
}  # fmt: skip


def tokens_of(options: dict[str, Any]) -> tuple[Tokens, bool]:
    """New tensors each time, and whether one decay serves both states."""

    def gate(name: str, there: bool = True) -> Tensor | None:
        dtype = options.get("gates", torch.float32)
        return torch.rand(*rows, H).to(dtype) if options.get(name, there) else None

    bounds = torch.tensor(next(options["packed"])) if "packed" in options else None
    rows, n = ((B, T), B) if bounds is None else ((1, B * T), len(bounds) - 1)
    q, v = (torch.rand(*rows, H, K).bfloat16() for _ in range(2))
    k = q if options.get("same") else torch.rand(*rows, options.get("key_heads", H), K).bfloat16()
    v = v[:, :, : options.get("value_heads", H)].contiguous()
    h0, u0 = (torch.rand(n, H, K, K) if options.get("states", True) else None for _ in range(2))
    gk = gate("gk", there=False)
    given = Tokens(q, k, v, gate("g"), gk, gate("alpha"), gate("beta"), h0, u0, bounds)
    return given, given.g is not None and gk is None


def settings_of(tied: bool, keep: bool = False) -> Settings:
    return Settings(0.125, 0.02, 30, 64, tied, True, keep_states=keep)


Places = list[dict[int, object]]  # of each launch: what each pointer belongs to


def named(tensors: dict[str, Tensor | None]) -> dict[int, str]:
    """Names by address."""
    return {x.data_ptr(): name for name, x in tensors.items() if x is not None and x.numel()}


def within(kept: Tensor | None, offsets: list[int]) -> dict[int, str]:
    """Names by address of the sections of kept states."""
    return {} if kept is None else {kept.data_ptr() + at: f"kept + {at}" for at in offsets}


def directly(
    run: Callable, names: Callable[[], dict[int, str]]
) -> tuple[Places, list, list[bytes]]:
    """Of launches whose arguments point to tensors: their places, grids, and bytes but for pointers."""
    recorder = Recorder()
    run(recorder)
    known, places, numbers = names(), [], []
    for launch in recorder.launches:
        first = launch.arguments[0]
        if isinstance(first, ctypes.Structure):
            found = getattr(first, "tensors")  # noqa: B009
            places.append(
                {at: known.get(x.data_ptr(), x) for at, x in found.items() if x.numel() > 0}
            )
            numbers.append(without(bytes(first), found))
    grids = [x.grid for x in recorder.launches if isinstance(x.arguments[0], ctypes.Structure)]
    return places, grids, numbers


def without(content: bytes, pointers: dict[int, Any]) -> bytes:
    """A structure's bytes with its pointers zero."""
    cleared = bytearray(content)
    for at in pointers:
        cleared[at : at + 8] = bytes(8)
    return bytes(cleared)


def check(kept: Any, direct: Callable, replayed: Callable) -> None:
    """The launches of a second replayed call against those of a direct one."""
    places, grids, numbers = direct()
    replayed()  # records
    assert not Kernel.launched
    (recording,) = kept.held.values()
    names = replayed()
    assert [grid for grid, _ in Kernel.launched] == grids
    content = [content for _, content in Kernel.launched]
    scratch: dict[int, int] = {}
    for expected, bytes_, number in zip(places, content, numbers, strict=True):
        for at, role in expected.items():
            address = int.from_bytes(bytes_[at : at + 8], "little")
            if isinstance(role, str):
                assert names.get(address) == role, (at, role)
            else:
                known = scratch.setdefault(id(role), address)
                assert known == address, "one array lies in two places"
        assert without(bytes_[: len(number)], expected) == number
    sizes = {id(x): x.nbytes for place in places for x in place.values() if isinstance(x, Tensor)}
    ends = sorted((begin, begin + sizes[x]) for x, begin in scratch.items())
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends))
    # a forward pass that keeps its states may have no scratch
    assert not ends or ends[-1][1] - ends[0][0] <= recording.size


class Kernel:
    """A kernel whose direct launches do nothing, and whose replayed ones are noted: grid and address."""

    launched: ClassVar[list[tuple[tuple, bytes]]] = []

    def __call__(self, grid, arguments) -> None:
        pass

    def bind(self, grid) -> Callable[..., int]:
        def launch(stream, pointer, _) -> int:
            self.launched.append((grid, ctypes.string_at(pointer[0], 512)))
            return 0

        return launch

    def check_launch(self, error: int) -> None:
        raise AssertionError(error)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that run nowhere, and no recordings."""
    monkeypatch.setattr(build, "kernel_of", lambda *_: Kernel())
    monkeypatch.setattr(driver, "current_stream", lambda: ctypes.c_void_p(0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Kernel, "launched", [])
    for module in (forward_pass, backward_pass):
        monkeypatch.setattr(module, "RECORDINGS", replay.Recordings())


def tables_of(t: Tokens, tied: bool, recording: replay.Recording) -> dict[str, Tensor]:
    """The tables that a replay reads: its call's own if sequences are packed."""
    packed = None if t.cu_seqlens is None else packed_chunks(HOPPER, t, settings_of(tied))
    assert (packed is None) == (len(recording.tables) > 0)
    return dict(zip("slbm", recording.tables if packed is None else packed.tables, strict=True))


def inputs(tokens: Tokens) -> dict[str, Tensor | None]:
    return dict(zip(INPUTS, prepared(tokens, float_gates=True).inputs, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_forward_pass_is_replayed_on_new_tensors(case: str, made: None) -> None:
    """Each pointer leads to the same input, result or array of scratch as without a recording."""
    options, keep = CASES[case], "keep" in CASES[case]
    held: list[Any] = []
    offsets: list[int] = []

    def direct():
        tokens, tied = tokens_of(options)
        call = GpuCall(HOPPER, prepared(tokens, True), settings_of(tied, keep))
        tables = dict(zip("slbm", call.chunks.tables, strict=True))
        results: list[Any] = []

        def run(execute: Recorder) -> None:
            results.extend(forward_pass._run(HOPPER, call, execute))

        held.append((tokens, call))
        t = dict(zip(INPUTS, call.t.inputs, strict=True))

        def names() -> dict[int, str]:
            offsets[:] = [offset for _, _, offset in call.views]
            outs = dict(zip(RESULTS, results, strict=True))
            return named(t | tables | outs) | within(results[-1], offsets)

        return directly(run, names)

    def replayed():
        tokens, tied = tokens_of(options)
        t = prepared(tokens, True)
        out = forward_pass.chunk_forward(HOPPER, t, settings_of(tied, keep))
        (recording,) = forward_pass.RECORDINGS.held.values()
        tables = tables_of(t, tied, recording)
        held.append((t, out))
        outs = {n: getattr(out, n) for n in RESULTS}
        names = named(dict(zip(INPUTS, t.inputs, strict=True)) | tables | outs)
        return names | within(out.kept, offsets)

    check(forward_pass.RECORDINGS, direct, replayed)
    assert len(offsets) == (7 if keep else 0)


@pytest.mark.parametrize("case", CASES)
def test_a_backward_pass_is_replayed_on_new_tensors(
    case: str, made: None, monkeypatch: Any
) -> None:
    """As of the forward pass; heads that share are added up in between, from the replay's own scratch."""
    options, keep = CASES[case], "keep" in CASES[case]
    offsets: list[int] = []
    if "chunk_heads" in options:
        monkeypatch.setattr(backward_pass, "CHUNK_HEADS", options["chunk_heads"])
    after_names = ("x", "x_scale", "do", "dh", "du", "kept")
    held: list[Any] = []

    def after(t: Tokens, tied: bool) -> tuple[Tensor | None, ...]:
        n = B if t.cu_seqlens is None else len(t.cu_seqlens) - 1
        ends = [torch.rand(n, H, K, K) for _ in range(2)]
        rows = t.q.shape[:3]
        return (
            torch.rand(t.q.shape).half(),
            torch.rand(rows),
            torch.rand(t.q.shape).bfloat16(),
            *ends,
            torch.zeros(kept_shape(t, settings_of(tied)), dtype=torch.uint8) if keep else None,
        )

    def direct():
        tokens, tied = tokens_of(options)
        call = GpuCall(HOPPER, prepared(tokens, True), settings_of(tied, keep))
        rest = after(tokens, tied)
        results: list[Any] = []
        held.append((tokens, call, rest))

        def run(execute: Recorder) -> None:
            results.extend(backward_pass._run(HOPPER, call, rest, execute))

        def names() -> dict[int, str]:
            t = dict(zip(INPUTS, call.t.inputs, strict=True))
            outs = dict(zip(InputGradients._fields, results, strict=True))
            tables = dict(zip("slbm", call.chunks.tables, strict=True))
            offsets[:] = [offset for _, _, offset in call.views]
            found = named(t | dict(zip(after_names, rest, strict=True)) | outs | tables)
            return found | within(rest[-1], offsets)

        return directly(run, names)

    def replayed():
        tokens, tied = tokens_of(options)
        t, rest, found = prepared(tokens, True), after(tokens, tied), []
        collect = backward_pass._collect
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                backward_pass, "_collect", lambda *a: (found.append(a[-1]), collect(*a))[1]
            )
            x, x_scale, do, dh, du, kept = rest
            assert do is not None
            out = backward_pass.chunk_backward(
                HOPPER, t, x, x_scale, do, dh, du, settings_of(tied, keep), kept
            )
        (recording,) = backward_pass.RECORDINGS.held.values()
        held.append((t, rest, out, found))
        tables = tables_of(t, tied, recording)
        outs = dict(zip(InputGradients._fields, found[0], strict=True))
        t = dict(zip(INPUTS, t.inputs, strict=True))
        names = named(t | dict(zip(after_names, rest, strict=True)) | outs | tables)
        return names | within(rest[-1], offsets)

    check(backward_pass.RECORDINGS, direct, replayed)
    assert len(offsets) == (7 if keep else 0)


def test_shared_heads_are_added_up_from_scratch(made: None, monkeypatch: Any) -> None:
    """What a function of torch reads between launches lies in the replay's scratch."""
    tokens, tied = tokens_of(CASES["shared heads"])
    x, scale, do = (
        torch.rand(B, T, H, K).half(),
        torch.rand(B, T, H),
        torch.rand(B, T, H, K).bfloat16(),
    )
    run = lambda: backward_pass.chunk_backward(  # noqa: E731
        HOPPER, tokens, x, scale, do, None, None, settings_of(tied)
    )
    run()
    empty = torch.empty
    ones = lambda *a, **o: empty(*a, **o).fill_(1)  # noqa: E731
    monkeypatch.setattr(torch, "empty", ones)
    grads = run()
    assert torch.equal(grads.k, torch.full_like(grads.k, 2.0))
    assert torch.equal(grads.v, torch.full_like(grads.v, 4.0))


def test_a_call_of_another_kind_is_recorded_by_itself(made: None, monkeypatch: Any) -> None:
    """Lengths, gates and settings tell kinds apart; what was recorded first is dropped first."""
    monkeypatch.setattr(replay, "KINDS", 2)
    run = forward_pass.chunk_forward
    for name in ("all", "bare", "two decays", "bare"):
        tokens, tied = tokens_of(CASES[name])
        run(HOPPER, tokens, settings_of(tied))
    assert len(forward_pass.RECORDINGS.held) == 2
    tokens, tied = tokens_of(CASES["bare"])
    cut = {n: getattr(tokens, n)[:, :100].contiguous() for n in "qkv"}
    shorter = tokens._replace(**cut)
    assert replay.kind_of(HOPPER, tokens, settings_of(tied), None) != replay.kind_of(
        HOPPER, shorter, settings_of(tied), None
    )


def test_a_graph_keeps_what_it_reads(made: None, monkeypatch: Any) -> None:
    """Captured, a recorded call is replayed and its tables stay; one that is not recorded is not kept."""
    tokens, tied = tokens_of(CASES["all"])
    run = lambda: forward_pass.chunk_forward(HOPPER, tokens, settings_of(tied))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    run()
    assert not forward_pass.RECORDINGS.held
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    run()
    assert not forward_pass.RECORDINGS.captured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = len(Kernel.launched)
    run()
    assert len(Kernel.launched) > before
    assert forward_pass.RECORDINGS.captured == set(forward_pass.RECORDINGS.held.values())


def test_a_recording_holds_no_tensor_of_the_call_it_was_made_of(made: None) -> None:
    """But its tables: inputs, gradients and scratch go, those that torch's functions were called on too."""
    tokens, tied = tokens_of(CASES["shared heads"])
    x, scale, do = (
        torch.rand(B, T, H, K).half(),
        torch.rand(B, T, H),
        torch.rand(B, T, H, K).bfloat16(),
    )
    seen: list[weakref.ref] = []
    add_up = backward_pass._add_up

    def watched(_, grad: Tensor, part: Tensor, *rest: int) -> None:
        seen.extend((weakref.ref(grad), weakref.ref(part)))
        add_up(_, grad, part, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward_pass, "_add_up", watched)
        backward_pass.chunk_backward(HOPPER, tokens, x, scale, do, None, None, settings_of(tied))
    assert backward_pass.RECORDINGS.held
    gc.collect()
    assert len(seen) == 4
    assert all(ref() is None for ref in seen)


def test_packed_calls_share_their_tables(made: None) -> None:
    """A model's layers have the same bounds: tables are made once for all of them. Too many groups of heads
    for one go are not recorded."""
    options = {"packed": itertools.repeat([0, 10, 250, 400])}
    (first, tied), (second, _) = tokens_of(options), tokens_of(options)
    settings = settings_of(tied)
    tables = packed_chunks(HOPPER, first, settings)
    assert packed_chunks(HOPPER, second, settings) is tables
    other, _ = tokens_of({"packed": itertools.repeat([0, 11, 250, 400])})
    assert packed_chunks(HOPPER, other, settings) is not tables
    x, scale = torch.rand(first.q.shape).half(), torch.rand(first.q.shape[:3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward_pass, "CHUNK_HEADS", 2 * tables.num_chunks)
        backward_pass.chunk_backward(HOPPER, first, x, scale, first.q, None, None, settings)
        assert not backward_pass.RECORDINGS.held
    backward_pass.chunk_backward(HOPPER, first, x, scale, first.q, None, None, settings)
    assert len(backward_pass.RECORDINGS.held) == 1
