"""What the Hopper kernels are launched on, group of heads by group: recorded, not run, so without a GPU."""

import ctypes
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gka.kernels.hopper.build import KERNELS
from gka.maths.chunked import Settings, Tokens

pytest.importorskip("triton", reason="the launcher needs the package triton")
T, HEADS, DIM, CHUNKS = 200, 6, 64, 4


def tokens(key_heads: int, h0: Tensor | None = None, u0: Tensor | None = None) -> Tokens:
    torch.manual_seed(0)
    q, do = (torch.randn(1, T, HEADS, DIM, dtype=torch.bfloat16) for _ in range(2))
    k = torch.randn(1, T, key_heads, DIM, dtype=torch.bfloat16)
    g, alpha, beta = (-torch.rand(1, T, HEADS), *torch.rand(2, 1, T, HEADS))
    return Tokens(q, k, do, g, None, alpha, beta, h0, u0, None)


def pointers(structure: ctypes.Structure) -> dict:
    """All addresses, those of structures inside too."""
    found = {}
    for name, kind in ((field[0], field[1]) for field in structure._fields_):
        value = getattr(structure, name)
        if kind is ctypes.c_void_p:
            found[name] = value
        elif isinstance(value, ctypes.Structure):
            found |= {f"{name}.{inner}": at for inner, at in pointers(value).items()}
    return found


def launches(monkeypatch, t: Tokens, solver: str, seen=lambda: None) -> list[tuple]:
    """(kernel, blocks, first head, heads, addresses) of a backward pass in groups of at most 4 heads.

    `seen` is called at every launch.
    """
    from gka.kernels import backward
    from gka.kernels.hopper import build
    from gka.kernels.hopper.passes import HOPPER

    made = []

    def kernel_of(device, kernel, *sizes) -> Callable:
        def record(blocks, given) -> None:
            seen()
            made.append((kernel, blocks, given.first_head, given.group_heads, pointers(given)))

        return record

    monkeypatch.setattr(build, "kernel_of", kernel_of)
    monkeypatch.setattr(backward, "CHUNK_HEADS", 4 * CHUNKS)
    monkeypatch.setattr(backward, "kind_of", lambda *_: None)  # nothing is replayed
    settings = Settings(1.0, 0.02, 30, 64, True, False, solver)  # pyright: ignore[reportArgumentType]
    x = torch.randn(1, T, HEADS, DIM).half()
    scale = torch.ones(1, T, HEADS)
    backward.chunk_backward(HOPPER, t, x, scale, torch.ones_like(t.q), None, None, settings)
    return made


@pytest.mark.parametrize("key_heads", [6, 3])
@pytest.mark.parametrize("solver", ["chebyshev", "adaptive", "cg"])
def test_every_group_of_heads_runs_every_kernel(monkeypatch, key_heads, solver) -> None:
    """Groups cover each head once, in blocks of chunks x heads, and share one set of addresses."""
    made = launches(monkeypatch, tokens(key_heads), solver)
    kernels = dict.fromkeys(name for name, *_ in made)
    expected = ["scan_states", "adjoint", "scan_back", "gradients"]
    assert [k for k in kernels if not k.startswith("combine")] == expected
    assert set(kernels) <= set(KERNELS)  # those that are compiled together
    for kernel in ("adjoint", "gradients"):
        groups = [(first, count) for name, _, first, count, _ in made if name == kernel]
        assert len(groups) > 1
        covered = [head for first, count in groups for head in range(first, first + count)]
        assert covered == list(range(HEADS))
        blocks = [blocks for name, blocks, *_ in made if name == kernel]
        assert blocks == [(CHUNKS * count, 1) for _, count in groups]
        places = [at for name, *_, at in made if name == kernel]
        assert all(at == places[0] for at in places)


def test_sequences_in_segments_are_summed_first(monkeypatch) -> None:
    """Sums of segments, what comes before each, the scan: of both states, from the same addresses."""
    from gka.kernels import tables

    monkeypatch.setattr(tables, "segment_length", lambda *_: 2)
    made = launches(monkeypatch, tokens(6), "chebyshev")
    for direction in ("states", "back"):
        of = [launch for launch in made if launch[0].endswith(f"_{direction}")]
        assert of
        names = [f"{part}_{direction}" for part in ("sums", "combine", "scan")]
        assert [name for name, *_ in of] == names * (len(of) // 3)
        assert {name for name, *_ in of} <= set(KERNELS)
        for name, blocks, _, count, at in of:
            entries = DIM * DIM // 512
            assert blocks == ((entries if name.startswith("combine") else CHUNKS // 2) * count, 2)
            for field in ("h.sums", "u.sums", "h.sum_decays", "u.sum_decays", "segments"):
                assert at[field] == of[0][-1][field] is not None, field


def test_kernels_read_what_the_ones_before_wrote(monkeypatch) -> None:
    """y and its numbers go from adjoint to scan and gradients, states to both, E from scan to gradients."""
    at = {name: found for name, *_, found in launches(monkeypatch, tokens(6), "chebyshev")}
    adjoint, scan, gradients, states = (
        at[name] for name in ("adjoint", "scan_back", "gradients", "scan_states")
    )
    for name in ("y", "y_scale", "key_weight", "x", "x_scale", "d_o"):
        assert adjoint[name] == scan[name] == gradients[name] is not None, name
    for name in ("w", "start_u", "start_h"):
        assert adjoint[name] == gradients[name] is not None, name
    assert adjoint["start_weight"] == scan["start_weight"] is not None
    for side in "hu":
        assert scan[f"{side}.stored"] == states[f"{side}.states"] == adjoint[f"{side}_start"]
        assert (
            scan[f"{side}.stored_bounds"] == states[f"{side}.bounds"] == adjoint[f"{side}_scales"]
        )
        assert gradients[f"{side}_ends"] == scan[f"{side}.states"]
        assert gradients[f"{side}_end_scales"] == scan[f"{side}.bounds"]
        assert gradients[f"{side}_wholes"] == scan[f"{side}.wholes"]
    assert adjoint["h_norms"] == gradients["h_norms"] == states["h.norms"] is not None
    assert states["u.norms"] is None  # nobody reads them
    assert scan["u.states"] == states["u.states"]  # E of U takes the place of U
    assert scan["h.states"] != states["h.states"]  # but H is read again
    assert scan["h.bounds"] != scan["u.bounds"] != states["u.bounds"]
    assert scan["key_maxima"] == states["first_maxima"] == gradients["k_maxima"]
    assert scan["first_maxima"] == gradients["z_maxima"] != gradients["k_maxima"]


def test_kernels_read_what_the_forward_pass_has_kept(monkeypatch) -> None:
    """With kept states the backward pass launches no scan over them; its kernels point to where the forward
    pass's scan wrote, whatever the size of a group, and E of U goes elsewhere."""
    from gka.kernels import backward, forward
    from gka.kernels.hopper import build
    from gka.kernels.hopper.passes import HOPPER

    made: list[tuple[str, dict]] = []
    monkeypatch.setattr(
        build,
        "kernel_of",
        lambda _, name, *__: lambda _, given: made.append((name, pointers(given))),
    )
    for module in (forward, backward):
        monkeypatch.setattr(module, "kind_of", lambda *_: None)  # nothing is replayed
    monkeypatch.setattr(backward, "CHUNK_HEADS", 4 * CHUNKS)
    t, settings = tokens(3), Settings(1.0, 0.02, 30, 64, True, False, keep_states=True)
    out = forward.chunk_forward(HOPPER, t, settings)
    given = (t, out.x, out.x_scale, torch.ones_like(t.q), None, None, settings, out.kept)
    backward.chunk_backward(HOPPER, *given)
    names = ["scan_states", "forward", "adjoint", "scan_back", "gradients"]
    assert [name for name, _ in made if not name.startswith(("sums", "combine"))] == names
    at = dict(made)
    states, adjoint, back, last = (at[name] for name in (names[0], *names[2:]))
    assert out.kept is not None
    begin, end = out.kept.data_ptr(), out.kept.data_ptr() + out.kept.nbytes
    for side in "hu":
        assert begin <= states[f"{side}.states"] < end
        assert not begin <= back[f"{side}.states"] < end
        assert states[f"{side}.states"] == adjoint[f"{side}_start"] == back[f"{side}.stored"]
        assert (
            states[f"{side}.bounds"] == adjoint[f"{side}_scales"] == back[f"{side}.stored_bounds"]
        )
    assert states["h.norms"] == adjoint["h_norms"] == last["h_norms"]
    assert states["first_maxima"] == back["key_maxima"] == last["k_maxima"]
    assert states["second_maxima"] == last["v_maxima"]


def test_initial_states_are_made_float32_once_and_held(monkeypatch) -> None:
    """Every group reads the same initial states, alive at every launch; nothing else is made of them."""
    from gka.kernels import call

    states = (torch.randn(1, HEADS, DIM, DIM).half(), torch.randn(1, HEADS, DIM, DIM).half())
    measure, made, alive = call.boundary, [], []

    def measured(state: Tensor | None, largest: bool) -> tuple[Tensor | None, Tensor | None]:
        found = measure(state, largest)
        made.extend(weakref.ref(x) for x in found if x is not None)
        return found

    monkeypatch.setattr(call, "boundary", measured)
    seen = lambda: alive.append([x() is not None for x in made])  # noqa: E731
    launches(monkeypatch, tokens(6, *states), "chebyshev", seen)
    assert len(alive) > 2 and all(found == [True] * 2 for found in alive)
