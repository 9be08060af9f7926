"""Stored sessions: they go on as if never stored, and files that do not fit change nothing."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gka import GenerationSession
from gka.errors import InputError
from gka.models import GKAForCausalLM
from gka.serving import statefile

Build = Callable[..., GKAForCausalLM]
Ids = Callable[..., Tensor]
patterns = pytest.mark.parametrize(
    "mixers", [["gka", "gka"], ["gka", "attention", "swa"], ["gla", "deltanet"]], ids="-".join
)


def text(session: GenerationSession, tokens: int = 12) -> Tensor:
    return torch.stack(list(session.generate(tokens)), 1)


@patterns
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"verify": False}, {"mmap": True}], ids=str)
def test_a_stored_session_goes_on(
    build: Build,
    ids: Ids,
    tmp_path: Path,
    mixers: list[str],
    dtype: torch.dtype,
    options: dict[str, bool],
):
    """Stored and loaded by an equal model, a batch writes exactly what it would have written."""
    path, mask = tmp_path / "new" / "chat.state", torch.ones(2, 15, dtype=torch.long)
    mask[1, :6] = 0
    session = GenerationSession(build(mixers=mixers, dtype=dtype), track_decay=True)
    session.append(ids(2, 15), mask).save(path)
    again = GenerationSession(build(mixers=mixers, dtype=dtype)).load(path, **options)
    assert (again.num_tokens, again.batch_size, again.tracks_decay) == (15, 2, True)
    assert torch.equal(again.logits, session.logits)  # type: ignore[arg-type]
    for layer, total in session.log_decay.items():
        assert torch.equal(again.log_decay[layer], total)
    assert torch.equal(text(again), text(session))
    more = ids(2, 4, seed=9)
    assert torch.equal(text(again.append(more)), text(session.append(more)))
    assert [p.name for p in path.parent.iterdir()] == ["chat.state"]


def test_a_mapped_file_never_changes(build: Build, ids: Ids, tmp_path: Path):
    """Going on from a file that is mapped into memory does not write to it."""
    path, model = tmp_path / "s", build(mixers=["gka", "swa"])
    GenerationSession(model).append(ids(1, 9)).save(path)
    before = path.read_bytes()
    session = GenerationSession(model).load(path, mmap=True)
    expected = text(session)
    assert path.read_bytes() == before
    assert torch.equal(text(GenerationSession(model).load(path)), expected)


def harm(path: Path, how: str) -> None:
    """Change a file in place, as `cp` over it does, so that whoever has mapped it sees the change."""
    with path.open("r+b") as file:
        if how == "cut short":
            file.truncate(0)
            return
        size = path.stat().st_size
        file.seek(size // 2)
        file.write(bytes(size - size // 2))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("how", ["cut short", "written over"])
def test_a_loaded_session_does_not_see_its_file_change(
    build: Build, ids: Ids, tmp_path: Path, how: str, verify: bool
):
    """What was loaded is a copy: the file may then be cut short or written over."""
    path, model = tmp_path / "s", build(mixers=["gka", "attention"])
    GenerationSession(model).append(ids(1, 9)).save(path)
    expected = text(GenerationSession(model).load(path))
    session = GenerationSession(model).load(path, verify=verify)
    harm(path, how)
    assert torch.equal(text(session), expected)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the kernel's list of maps")
@pytest.mark.parametrize("verify", [True, False])
def test_a_file_is_mapped_on_request_only(build: Build, ids: Ids, tmp_path: Path, verify: bool):
    """`mmap=True` uses the file where it lies, and a file that `save` replaces stays the session's own."""
    path, model = tmp_path / "s", build(mixers=["gka"])
    first = GenerationSession(model).append(ids(1, 9))
    first.save(path)
    copied = GenerationSession(model).load(path, verify=verify)
    assert str(path) not in Path("/proc/self/maps").read_text()
    mapped = GenerationSession(model).load(path, verify=verify, mmap=True)
    assert str(path) in Path("/proc/self/maps").read_text()
    first.fork().append([1, 2, 3]).save(path)
    assert torch.equal(text(mapped), text(copied))


def test_size_does_not_grow_with_the_context(build: Build, ids: Ids, tmp_path: Path):
    """Without attention a state file has the same size whatever was read, padding included."""
    model, sizes = build(mixers=["gka", "gla"]), set()
    for length in (10, 2000):
        mask = torch.ones(1, length, dtype=torch.long)
        mask[0, :5] = 0
        session = GenerationSession(model).append(ids(1, length), mask)
        session.save(tmp_path / "s")
        sizes.add((tmp_path / "s").stat().st_size // 100)
    assert len(sizes) == 1


def test_a_failed_save_keeps_the_old_file(
    build: Build, ids: Ids, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A save that fails before its end is an error, leaves the former file whole, and no debris."""
    path, session = tmp_path / "s", GenerationSession(build()).append(ids(1, 5))
    session.save(path)
    before = path.read_bytes()

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match=rf"^state {path} cannot be written: No space left"):
        session.append([3]).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_full_disk_keeps_the_old_file(build: Build, ids: Ids, tmp_path: Path):
    """Where the new states do not fit, one line names the file, the former one stays, without debris."""
    resource = pytest.importorskip("resource", reason="limits of POSIX")
    path, session = tmp_path / "s", GenerationSession(build()).append(ids(1, 5))
    session.save(path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(
            InputError, match=r"^state .*/s cannot be written: .*too large"
        ) as error:
            session.append([3]).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["s"]


def test_states_that_are_no_numbers_are_not_stored(build: Build, ids: Ids, tmp_path: Path):
    """A session that has met NaN does not replace a good file."""
    path, session = tmp_path / "s", GenerationSession(build()).append(ids(1, 5))
    session.save(path)
    before = path.read_bytes()
    cache: Any = session._contents.cache
    cache.layers[1].recurrent_states[0][0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"not written: layers.1.recurrent.0 holds .* not finite"):
        session.save(path)
    assert path.read_bytes() == before


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"num_heads": 2}, "of another model: num_heads 4 not 2"),
    "head size": ({"head_dim": 16}, "head_dim 8 not 16"),
    "layers": ({"mixers": ["gka"]}, r"num_hidden_layers 2 not 1.*mixers \['gka', 'gka'\]"),
    "mixers": ({"mixers": ["gka", "gla"]}, "mixers"),
    "gate": ({"use_beta_gate": False}, "use_beta_gate True not False"),
    "weights": ({"seed": 1}, "same sizes but other weights"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_states_of_another_model_are_refused(build: Build, ids: Ids, tmp_path: Path, case: str):
    """The header tells which model a state is of; the session that was to load it goes on unharmed."""
    GenerationSession(build(mixers=["gka", "gka"])).append(ids(1, 9)).save(tmp_path / "s")
    fields, message = OTHERS[case]
    refuses(build(**{"mixers": ["gka", "gka"], **fields}), ids, tmp_path / "s", message)


def test_states_in_another_dtype_are_refused(build: Build, ids: Ids, tmp_path: Path):
    """A state of a model in bfloat16 is not used in float32."""
    GenerationSession(build().bfloat16()).append(ids(1, 9)).save(tmp_path / "s")
    refuses(build(), ids, tmp_path / "s", "in bfloat16, this one is in float32")


def refuses(model: GKAForCausalLM, ids: Ids, path: Path, message: str, **options: Any) -> None:
    session = GenerationSession(model).append(ids(1, 6))
    with pytest.raises(InputError, match=message):
        session.load(path, **options)
    assert torch.equal(text(session), text(GenerationSession(model).append(ids(1, 6))))


def test_solver_may_differ(build: Build, ids: Ids, tmp_path: Path):
    """Steps, ridge, solver and backend are the user's choice: a state can be used under others."""
    GenerationSession(build()).append(ids(1, 9)).save(tmp_path / "s")
    model = build(num_iter=3, ridge_ratio=0.1, backend="torch", solver="adaptive")
    assert GenerationSession(model).load(tmp_path / "s").num_tokens == 9


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("verify", [True, False])
def test_truncated_files_are_refused(
    build: Build, ids: Ids, tmp_path: Path, kept: float, verify: bool
):
    """A file cut short anywhere is told from a whole one, without the checksum too."""
    path, model = tmp_path / "s", build()
    GenerationSession(model).append(ids(1, 9)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    refuses(model, ids, path, "cut short or not a session", verify=verify)


def test_corrupted_files_are_refused(build: Build, ids: Ids, tmp_path: Path):
    """One changed bit in any tensor, or a changed header, breaks the checksum."""
    path, model = tmp_path / "s", build()
    GenerationSession(model).append(ids(1, 9)).save(path)
    content = path.read_bytes()
    for place in (-1, -len(content) // 3):
        changed = bytearray(content)
        changed[place] ^= 4
        path.write_bytes(bytes(changed))
        refuses(model, ids, path, "is damaged")
    path.write_bytes(content.replace(rb"\"tokens\": 9", rb"\"tokens\": 8"))
    assert path.read_bytes() != content
    refuses(model, ids, path, "is damaged")


def test_foreign_files_are_refused(build: Build, ids: Ids, tmp_path: Path):
    """No file, other tensors, a later format: each says which it is."""
    path, model = tmp_path / "s", build()
    refuses(model, ids, path, "does not exist")
    save_file({"x": torch.zeros(2)}, path)
    refuses(model, ids, path, "but not of a session")
    save_file({"x": torch.zeros(2)}, path, metadata={statefile.FORMAT: '{"version": 2}'})
    refuses(model, ids, path, "version 2 of the format; this release reads 1")


def test_header_can_be_read_alone(build: Build, ids: Ids, tmp_path: Path):
    """What a file is of can be asked without a model."""
    GenerationSession(build()).append(ids(2, 9)).save(tmp_path / "s")
    header = statefile.read_header(tmp_path / "s")
    assert (header["tokens"], header["batch_size"], header["dtype"]) == (9, 2, "float32")
    assert header["model"]["mixers"] == ["gka", "gka"]
