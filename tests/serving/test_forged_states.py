"""State files with a valid checksum that no session wrote, and files damaged at random: one line says why."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gka import GenerationSession
from gka.errors import InputError
from gka.models import GKAForCausalLM, cache_tensors, state_shapes
from gka.serving import statefile

Build = Callable[..., GKAForCausalLM]
Ids = Callable[..., Tensor]
Tensors = dict[str, Tensor]
Header = dict[str, Any]
MIXERS = ["gka", "attention", "swa", "gla", "deltanet"]


@pytest.fixture
def model(build: Build) -> GKAForCausalLM:
    return build(mixers=MIXERS)


@pytest.fixture
def stored(model: GKAForCausalLM, ids: Ids, tmp_path: Path) -> Path:
    """The state of a padded batch that tracks decays: every kind of tensor is in it."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    GenerationSession(model, track_decay=True).append(ids(2, 9), mask).save(tmp_path / "s")
    return tmp_path / "s"


def forge(path: Path, change: Callable[[Header, Tensors], Any]) -> None:
    """Change what a file holds, and give it the checksum of that."""
    header, tensors = statefile.read_header(path), load_file(path)
    change(header, tensors)
    tensors = {name: x.clone().contiguous() for name, x in tensors.items()}
    if "sha256" in header:
        header["sha256"] = statefile._checksum(header, tensors)
    save_file(tensors, path, metadata={statefile.FORMAT: json.dumps(header)})


def refuses(model: GKAForCausalLM, path: Path, message: str, **options: bool) -> None:
    session = GenerationSession(model)
    with pytest.raises(InputError, match=message) as error:
        session.load(path, **options)
    shown = str(error.value)
    assert "\n" not in shown and str(path) in shown and len(shown) < 1500
    assert session.num_tokens == 0


def put(name: str, of: Callable[[Tensor], Tensor]) -> Callable[[Header, Tensors], Any]:
    return lambda header, tensors: tensors.update({name: of(tensors[name])})


def drop(*names: str) -> Callable[[Header, Tensors], Any]:
    return lambda header, tensors: [tensors.pop(name) for name in names]


def say(**fields: Any) -> Callable[[Header, Tensors], Any]:
    return lambda header, tensors: header.update(fields)


def filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x.index_fill(-1, torch.tensor([0]), value)


H, LOGITS = "layers.0.recurrent.0", "logits"
FORGED: dict[str, tuple[Callable[[Header, Tensors], Any], str]] = {
    "a layer is missing": (drop("layers.3.recurrent.0"), "needs layers.3.recurrent.0, which"),
    "a convolution is missing": (drop("layers.0.conv.1"), "needs layers.0.conv.1"),
    "keys are missing": (drop("layers.1.keys"), "needs layers.1.keys"),
    "a decay is missing": (drop("log_decay.3"), "needs log_decay.3"),
    "everything is missing": (
        lambda header, tensors: tensors.clear() or tensors.update(x=torch.zeros(1)),
        "and [0-9]+ more, which the file lacks",
    ),
    "a layer too many": (
        lambda header, tensors: tensors.update({"layers.9.keys": tensors["layers.1.keys"]}),
        "no place for layers.9.keys",
    ),
    "a convolution too many": (
        lambda header, tensors: tensors.update({"layers.0.conv.7": tensors["layers.0.conv.0"]}),
        "no place for layers.0.conv.7",
    ),
    "a name that is no number": (
        lambda header, tensors: tensors.update({"log_decay.x": tensors["log_decay.0"]}),
        "no place for log_decay.x",
    ),
    "a state is transposed": (
        put("layers.2.keys", lambda x: x.mT), r"layers.2.keys has shape \(2, 4, 8, 4\); expected"),
    "a state of other heads": (put(H, lambda x: x[:, :2]), r"has shape \(2, 2, 8, 8\); expected"),
    "a state of other rows": (put(H, lambda x: x[:1]), r"expected \(2, 4, 8, 8\)"),
    "a state without dimensions": (put(H, lambda x: x.sum()), r"has shape \(\); expected"),
    "an empty state": (put(H, lambda x: x[:0]), r"has shape \(0, 4, 8, 8\)"),
    "keys of other length": (put("layers.1.keys", lambda x: x[..., 1:, :]), "layers.1.keys has shape"),
    "logits of another vocabulary": (put(LOGITS, lambda x: x[:, :-1]), r"logits has shape \(2, 96\)"),
    "a mask of other length": (put("mask", lambda x: x[:, 1:]), r"mask has shape \(2, 8\)"),
    "a mask of numbers": (put("mask", lambda x: x.long()), "mask is int64; expected bool"),
    "a state in bfloat16": (put(H, lambda x: x.bfloat16()), f"{H} is bfloat16; expected float32"),
    "a state of whole numbers": (put(H, lambda x: x.long()), "is int64; expected float32"),
    "a complex state": (put(H, lambda x: x.to(torch.complex64)), "is complex64; expected float32"),
    "keys in float64": (
        put("layers.1.keys", lambda x: x.double()),
        "is float64; expected bfloat16 or float16 or float32",
    ),
    "decays in float32": (put("log_decay.0", lambda x: x.float()), "log_decay.0 is float32"),
    "NaN": (put(H, filled(float("nan"))), f"{H} holds numbers that are not finite"),
    "infinity": (put("layers.1.values", filled(float("inf"))), "layers.1.values holds numbers"),
    "NaN logits": (put(LOGITS, filled(float("nan"))), "logits holds numbers that are not finite"),
    "more tokens than keys": (say(tokens=10), "has shape .* expected"),
    "no tokens": (say(tokens=0), "0 tokens in 2 rows"),
    "no tokens in no rows": (say(tokens=0, batch_size=0), "no place for layers.0.conv.0"),
    "fewer than no tokens": (say(tokens=-1), "tokens is -1; expected a whole number"),
    "endless tokens": (say(tokens=10**30), "tokens is 10000"),
    "tokens as text": (say(tokens="9"), "tokens is '9'"),
    "tokens as true": (say(tokens=True), "tokens is True"),
    "tokens as nothing": (say(tokens=None), "tokens is None"),
    "half a token": (say(tokens=9.5), "tokens is 9.5"),
    "tokens unsaid": (lambda header, tensors: header.pop("tokens"), "tokens is None"),
    "other rows": (say(batch_size=3), r"has shape \(2, .* expected \(3, "),
    "rows as a list": (say(batch_size=[2]), r"batch_size is \[2\]"),
    "decays that are not said": (say(tracks_decay=False), "no place for log_decay.0, log_decay.3"),
    "decays as text": (say(tracks_decay="no"), "tracks_decay is 'no'"),
    "no checksum": (lambda header, tensors: header.pop("sha256"), "is damaged"),
    "another model": (
        lambda header, tensors: header["model"].update(num_heads="x" * 10**6), "of another model: num"),
    "a model that is a list": (say(model=[1]), "of another model"),
    "a model that is text": (say(model="gka"), "of another model"),
    "no model": (say(model=None), "of another model"),
    "a dtype that is a list": (say(dtype=["float32"]), "of a model in"),
    "other weights": (say(weights=None), "other weights"),
    "another version": (say(version="x" * 10**6), "has version xxx"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
@pytest.mark.parametrize("mmap", [False, True])
def test_forged_states_are_refused(model: GKAForCausalLM, stored: Path, case: str, mmap: bool):
    """What no session of the model would hold is refused when it is loaded, by name, on one line."""
    change, message = FORGED[case]
    forge(stored, change)
    refuses(model, stored, message, mmap=mmap)


@pytest.mark.parametrize(
    "text", ["[1]", "7", "null", "[" * 100_000, "{", "NaN", "9" * 5000], ids=lambda x: x[:5]
)
def test_headers_that_are_none_are_refused(model: GKAForCausalLM, stored: Path, text: str):
    """A header that is no JSON object, or cannot be read at all, is told as such."""
    save_file(load_file(stored), stored, metadata={statefile.FORMAT: text})
    refuses(model, stored, "not of a session|not a session's state")


def test_a_folder_is_refused(model: GKAForCausalLM, tmp_path: Path):
    """A folder in the place of the file is told from a file that is not there."""
    refuses(model, tmp_path, "is not a file")


def damage(content: bytes, draw: random.Random) -> bytes:
    """A file with one to three changes of bytes, anywhere or in its header."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(
            draw.choice((8, 400, int.from_bytes(content[:8], "little"), len(content)))
        )
        place = min(place, len(changed) - 1)
        kind = draw.randrange(5)
        if kind == 0:
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[place] = draw.choice(b'0123456789"[]{}:,')
        elif kind == 2:
            del changed[place : place + draw.choice((1, 8, 1000))]
        elif kind == 3:
            changed[place:place] = draw.randbytes(draw.choice((1, 8, 1000)))
        else:
            changed[place : place + 8] = draw.randbytes(8)
        changed = changed or bytearray(1)
    return bytes(changed)


@pytest.mark.parametrize("options", [{}, {"verify": False}, {"mmap": True}], ids=str)
def test_damaged_files_never_surprise(
    model: GKAForCausalLM, stored: Path, options: dict[str, bool]
):
    """150 files with random damage: each is refused on one line, or (unverified) loads and can be used;
    verified, none loads as another state."""
    draw, content = random.Random(0), stored.read_bytes()
    loaded = 0
    for _ in range(150):
        stored.write_bytes(damage(content, draw))
        session = GenerationSession(model)
        try:
            session.load(stored, **options)
        except InputError as error:
            assert "\n" not in str(error) and str(stored) in str(error)
            continue
        loaded += 1
        assert stored.read_bytes() == content or options == {"verify": False}
        try:
            session.append([[1, 2], [3, 4]])
            list(session.generate(2, temperature=1.0, seed=0))
        except InputError as error:
            assert "not finite" in str(error)
    assert loaded < 150


def mutate(header: Header, tensors: Tensors, draw: random.Random) -> None:
    """Something of a state that is not what it was."""
    name = draw.choice(sorted(tensors))
    other = draw.choice(sorted(tensors))
    x = tensors[name]
    odd = [None, True, -1, 0, 1, 2**70, 1e300, "9", [], {}, [2], "x" * 500]
    kinds: list[Callable[[], Any]] = [
        lambda: tensors.update(
            {name: x.to(draw.choice((torch.float16, torch.int8, torch.float64)))}
        ),
        lambda: tensors.update({name: x.flatten()[: draw.randrange(x.numel())].clone()}),
        lambda: tensors.update({name: x[None]}),
        lambda: tensors.update({name: x.transpose(0, -1)}),
        lambda: tensors.update({name: torch.cat([x, x], draw.randrange(x.dim()))}),
        lambda: tensors.pop(name),
        lambda: tensors.update({name + draw.choice(("0", ".1", "x")): tensors.pop(name)}),
        lambda: tensors.update({name: tensors[other], other: x}),
        lambda: tensors.update({name: (x.double() * draw.choice((-1, 0, 1e4, 1e30))).to(x.dtype)}),
        lambda: tensors.update({name: filled(float("nan"))(x.float()).to(x.dtype)}),
        lambda: header.pop(draw.choice(sorted(header))),
        lambda: header.update({draw.choice(sorted(header)): draw.choice(odd)}),
        lambda: (
            header["model"].update({draw.choice(sorted(header["model"])): draw.choice(odd)})
            if isinstance(header.get("model"), dict)
            else None
        ),
    ]
    draw.choice(kinds)()


def test_mutated_states_never_surprise(model: GKAForCausalLM, stored: Path):
    """300 states changed at random, with a valid checksum: each is refused on one line when it is loaded, or
    can be read and written on from, or says that its numbers lead nowhere."""
    draw, content = random.Random(1), stored.read_bytes()
    refused = used = 0
    for _ in range(300):
        stored.write_bytes(content)
        forge(stored, lambda h, t: [mutate(h, t, draw) for _ in range(draw.randint(1, 2)) if t])
        session = GenerationSession(model)
        try:
            session.load(stored)
        except InputError as error:
            assert "\n" not in str(error) and str(stored) in str(error)
            refused += 1
            continue
        try:
            session.append([[1, 2], [3, 4]])
            assert len(list(session.generate(2, temperature=1.0, seed=0))) == 2
            used += 1
        except InputError as error:
            assert "not finite" in str(error)
    assert refused > 150 and used > 10


SIZES: list[dict[str, Any]] = [
    {"mixers": [*MIXERS, "gated_deltanet"]},
    {"mixers": ["gka", "attention"], "num_kv_heads": 2, "expand_v": 2.0, "use_v_conv": False},
    {"mixers": ["gka", "gla", "swa"], "conv_size": 1, "use_forgetting_gate": False},
    {"mixers": ["gka", "swa"], "num_kv_heads": 2, "kv_rank": 3, "sliding_window": 2},
]


@pytest.mark.parametrize("fields", SIZES)
@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_state_shapes_are_the_models_own(
    build: Build, ids: Ids, tmp_path: Path, fields: dict[str, Any], tokens: int
):
    """`state_shapes` says what reading makes, for every mixer, head count, width and window, and what is
    stored loads again, after `combine` too."""
    model = build(**fields)
    session = GenerationSession(model, track_decay=True).append(ids(2, tokens))
    found = cache_tensors(session._contents.cache)
    assert state_shapes(model, 2, tokens) == {name: tuple(x.shape) for name, x in found.items()}
    sessions = [session, GenerationSession(model).append(ids(2, tokens)), GenerationSession(model)]
    if not {"deltanet", "gated_deltanet"} & set(fields["mixers"]):
        sessions.append(GenerationSession.combine([session, session.fork()]))
    for one in sessions:
        one.save(tmp_path / "s")
        assert GenerationSession(model).load(tmp_path / "s").num_tokens == one.num_tokens


def test_autocast_states_can_be_stored(build: Build, ids: Ids, tmp_path: Path):
    """Under torch.autocast convolutions, keys and logits are bfloat16 in a float32 model; they load."""
    model = build(mixers=["gka", "attention"])
    with torch.autocast("cpu", torch.bfloat16):
        session = GenerationSession(model).append(ids(1, 7))
        session.save(tmp_path / "s")
        expected = session.append([5, 6]).logits
        again = GenerationSession(model).load(tmp_path / "s").append([5, 6])
    assert torch.equal(again.logits, expected)  # type: ignore[arg-type]
