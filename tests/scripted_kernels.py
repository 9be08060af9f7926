"""Libraries that are not there: modules with the signatures of flash-qla's and flash-linear-attention's
functions, which read token by token in float64 and insist on what those libraries insist on.

The signatures are those of flash-qla 0.1.3 and fla-core 0.4.1 and 0.6.0.
"""

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gka.ops import external

CHUNK = 64
HOPPER, AMPERE = (9, 0), (8, 0)
VERSIONS = {"flash-qla": (0, 1, 3), "fla-core": (0, 6, 0), "triton": (3, 7, 1)}


def recurrence(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens):
    """The memory by its definition; beta None adds, else it is the delta rule."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    assert q.shape == k.shape and q.shape[:3] == v.shape[:3], "all heads are there"
    assert isinstance(scale, float) and scale != 0  # flash-qla takes 0 for the default
    batch, length, heads, _ = q.shape
    bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    if cu_seqlens is not None:
        assert batch == 1 and cu_seqlens.dtype == torch.int64
        assert all(a < b for a, b in itertools.pairwise(bounds)), "no empty sequence"
    sequences = batch if cu_seqlens is None else len(bounds) - 1
    state = torch.zeros(sequences, heads, q.shape[3], v.shape[3], dtype=torch.float64)
    if initial_state is not None:
        assert initial_state.dtype == torch.float32 and initial_state.shape == state.shape
        state = initial_state.double()
    outputs, finals = [], []
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        s = state if cu_seqlens is None else state[n : n + 1]
        for t in range(begin, end):
            qt, kt, vt = (x[:, t].double() for x in (q, k, v))
            if g is not None:
                s = s * g[:, t].double().exp()[..., None, None]
            if beta is not None:
                read = torch.einsum("bhk,bhkv->bhv", kt, s)
                vt = beta[:, t].double()[..., None] * (vt - read)
            s = s + kt[..., None] * vt[..., None, :]
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", qt, s))
        finals.append(s)
    o = torch.stack(outputs, 1).to(q.dtype)
    return o, torch.cat(finals).float() if output_final_state else None


def flash_qla() -> ModuleType:
    """flash_qla, its function and the pair of passes it is made of."""

    def check(q, v, g, beta):
        assert q.shape[-1] == v.shape[-1] == 128
        assert g.dtype == torch.float32 and beta.dtype == torch.float32

    def chunk_gated_delta_rule(
        q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=False, cu_seqlens=None,
    ):  # fmt: skip
        check(q, v, g, beta)
        return recurrence(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens)

    def starts(g, cu_seqlens):
        """Whether a token begins a chunk [T]."""
        bounds = [0, g.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        found = torch.zeros(g.shape[1], dtype=torch.bool)
        for a, b in itertools.pairwise(bounds):
            found[a:b:CHUNK] = True
        return found

    def chunk_gated_delta_rule_fwd(
        q, k, v, g, beta, scale=None, initial_state=None, cu_seqlens=None, output_final_state=True,
        output_h=False, auto_cp=True, enable_fwd_cp_cache=False, is_train=None,
    ):  # fmt: skip
        check(q, v, g, beta)
        assert is_train and not torch.is_grad_enabled()
        o, state = recurrence(
            q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens
        )
        sums, total = [], torch.zeros_like(g[:, 0])
        for t, first in enumerate(starts(g, cu_seqlens).tolist()):
            total = g[:, t] if first else total + g[:, t]
            sums.append(total)
        inverse = k.new_zeros(*q.shape[:3], CHUNK)
        return torch.stack(sums, 1), inverse, o, None, state, None

    def chunk_gated_delta_rule_bwd(
        q, k, v, g, beta, A, do, dht=None, scale=None, initial_state=None, cu_seqlens=None,
    ):  # fmt: skip
        before = torch.cat([torch.zeros_like(g[:, :1]), g[:, :-1]], 1)
        before[:, starts(g, cu_seqlens)] = 0
        given = (q, k, v, g - before, beta, initial_state)
        with torch.enable_grad():
            leaves = [None if x is None else x.detach().requires_grad_() for x in given]
            q, k, v, g, beta, state = leaves
            results: Any = recurrence(q, k, v, g, beta, scale, state, dht is not None, cu_seqlens)
            grads = (do,) if dht is None else (do, dht)
            wanted = [x for x in leaves if x is not None]
            found = torch.autograd.grad(results[: len(grads)], wanted, grads, allow_unused=True)
        dq, dk, dv, dg, dbeta, *dstate = found
        return dq, dk, dv, dbeta, dg, dstate[0] if dstate else None

    module = ModuleType("flash_qla")
    vars(module).update(locals() | {"module": None})
    return module


def fla() -> dict[str, ModuleType]:
    """fla.ops and its three functions."""

    def chunk_gated_delta_rule(
        q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=False, cu_seqlens=None,
    ):  # fmt: skip
        return recurrence(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens)

    def chunk_delta_rule(
        q, k, v, beta, scale=None, initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=False, cu_seqlens=None,
    ):  # fmt: skip
        return recurrence(q, k, v, None, beta, scale, initial_state, output_final_state, cu_seqlens)

    def chunk_simple_gla(
        q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False,
        cu_seqlens=None,
    ):  # fmt: skip
        return recurrence(q, k, v, g, None, scale, initial_state, output_final_state, cu_seqlens)

    modules = {"fla.ops": ModuleType("fla.ops")}
    for function in (chunk_gated_delta_rule, chunk_delta_rule, chunk_simple_gla):
        name = f"fla.ops.{function.__name__.removeprefix('chunk_')}"
        modules[name] = ModuleType(name)
        setattr(modules[name], function.__name__, function)
    return modules


def forget() -> None:
    """What was asked of the machine before."""
    for known in (external.loaded, external._why_not):
        known.cache_clear()


@contextmanager
def libraries(
    versions: dict[str, tuple[int, ...]] | None = None, chip: tuple[int, int] = HOPPER
) -> Iterator[SimpleNamespace]:
    """Inside, these distributions are installed, and every device is a GPU of that compute capability."""
    there = VERSIONS if versions is None else versions
    modules = {"flash_qla": flash_qla(), **fla(), "fla": ModuleType("fla")}
    # not patch.dict, which would also take away what torch imports inside
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    forget()
    try:
        with (
            patch.object(external, "installed", there.get),
            patch.object(external, "capability", lambda device: chip),
        ):
            yield SimpleNamespace(**{name.replace(".", "_"): m for name, m in modules.items()})
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
        forget()


def draw(length: int = 70, heads: int = 2, kv_heads: int = 2, dim: int = 128) -> dict[str, Tensor]:
    """Heads in bfloat16, gates in float32, as a layer makes them; one sequence."""
    torch.manual_seed(0)
    q = torch.nn.functional.normalize(torch.randn(1, length, heads, dim), dim=-1)
    k = torch.nn.functional.normalize(torch.randn(1, length, kv_heads, dim), dim=-1)
    v = torch.randn(1, length, kv_heads, dim)
    g, beta = torch.rand(2, 1, length, heads)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    return {"q": q, "k": k, "v": v, "g": -0.2 * g, "beta": beta}
