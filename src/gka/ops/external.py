"""Kernels of installed libraries for the baselines' memories: which exist, what each can run, how to call it.

A call names a library or leaves the choice to "auto". A library that cannot run a call says why, and is
never silently replaced. The kernels take whole sequences; single tokens and short cached calls run in this
library.

| rule | memory | "auto" on a GPU takes the first that can run the call |
|---|---|---|
| gated_delta_rule | S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T | flash_qla, fla |
| delta_rule | the same without decay | flash_qla (its decay set to 1), fla |
| simple_gla | U_t = exp(g_t) U_{t-1} + k_t v_t^T, one decay per head | fla |

Both libraries' functions share these conventions with ours: [B,T,H,D], g the natural logarithm of the
decay, o_t = scale S_t^T q_t, float32 states [N,H,K,V], packed sequences as B = 1 with int64 `cu_seqlens`.
"""

import importlib
import importlib.metadata
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gka.errors import InputError
from gka.kernels.configs import capability_of
from gka.ops.dispatch import under_transform

Rule = Literal["gated_delta_rule", "delta_rule", "simple_gla"]
HALVES = (torch.bfloat16, torch.float16)
PLAIN_DELTA_RULE = (0, 5, 2)  # fla-core whose rule without decay has right gradients on Hopper
FLASH_QLA_CHIPS = ((9, 0), (10, 0), (10, 3))  # on 12.0 and 12.1 it has only the forward pass
Version = tuple[int, ...]


@dataclass(frozen=True)
class Ask:
    """The facts of a call that decide whether a kernel can run it.

    Attributes:
        dims: K and V.
        training: whether a gradient may be needed.
    """

    rule: Rule
    device: torch.device
    dtype: torch.dtype
    dims: tuple[int, int] = (128, 128)
    training: bool = True

    @property
    def chip(self) -> tuple[int, int] | None:
        """The GPU's compute capability; None if the device is not an NVIDIA GPU."""
        return capability(self.device)


@dataclass(frozen=True)
class Given:
    """A checked call.

    Attributes:
        q, k: [B,T,H,K]. v: [B,T,H,V]. Heads are not shared.
        g: log decay [B,T,H], float32; None without one. beta: write strength [B,T,H], float32.
        state: [N,H,K,V] float32 before the first token; None for zeros.
        cu_seqlens: bounds [N+1], int64, of non-empty sequences.
        scale: factor of the readout, not 0.
        final: whether the states after the last tokens are wanted.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    state: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    final: bool


@dataclass(frozen=True)
class External:
    """The kernels of one library.

    Attributes:
        name: the name that users pass.
        module: the module to import. distribution: the package to install.
        rules: the rules it implements.
        refusal: why it cannot run a call although it is installed; None if it can.
        run: o [B,T,H,V] and the final states [N,H,K,V] or None, differentiable once.
    """

    name: str
    module: str
    distribution: str
    rules: tuple[Rule, ...]
    refusal: Callable[[Ask], str | None]
    run: Callable[[Rule, Given], tuple[Tensor, Tensor | None]]


@cache
def installed(distribution: str) -> Version | None:
    """The distribution's version as numbers; None if it is not installed."""
    try:
        text = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


@cache
def loaded(module: str) -> ModuleType | str:
    """The module, or why it cannot be imported here: libraries inspect the GPU at import."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # another library may raise anything
        text = " ".join(str(error).split())[:200]
        return f"it cannot be imported: {type(error).__name__}: {text}"


def capability(device: torch.device) -> tuple[int, int] | None:
    """An NVIDIA GPU's compute capability; None for other devices."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return capability_of(device)


def _text(version: Version) -> str:
    return ".".join(map(str, version))


def _flash_qla_refusal(ask: Ask) -> str | None:
    if ask.chip not in FLASH_QLA_CHIPS:
        return f"its kernels are made for compute capability 9.0, 10.0 and 10.3; this GPU has {ask.chip}."
    if ask.dims != (128, 128):
        return f"its kernels take heads of K = V = 128; got K = {ask.dims[0]}, V = {ask.dims[1]}."
    return None


def _fla_refusal(ask: Ask) -> str | None:
    if max(ask.dims) > 256:
        return f"its kernels take heads up to 256 wide; got K = {ask.dims[0]}, V = {ask.dims[1]}."
    return _fla_wrong_gradient(ask) if ask.training else None


def _fla_wrong_gradient(ask: Ask) -> str | None:
    """Why the installed version's gradient is wrong on Hopper, or raises there; None if it is right.

    - Gated rules, Triton 3.4.0 to 3.7.0: blocks of 64 keys in FLA's `chunk_bwd_dqkwg` give a wrong gradient
      of keys and decay (fla-org/flash-linear-attention issue 640). Up to 0.4.1 a block has at most 64 keys,
      in 0.4.2 it has 128. From 0.5 on the function raises unless TileLang computes it. TileLang does so for
      the delta rule alone: it does not take the float32 states of 0.6.0's simple_gla.
    - The rule without decay, Triton from 3.4.0 on: four warps give a wrong gradient of keys and beta
      (issue 984). 0.5.2 uses two warps; of earlier ones `_fla` runs the gated rule, with its decay set to 1.
    """
    versions: list[Version] = [installed(name) or (0,) for name in ("triton", "fla-core")]
    triton, fla = versions
    if (ask.chip or (0, 0))[0] != 9 or triton < (3, 4):
        return None
    where = f"on Hopper under Triton {_text(triton)}"
    if ask.rule == "delta_rule" and fla >= PLAIN_DELTA_RULE:
        return None
    if fla >= (0, 5):
        mended = fla >= (0, 5, 2) and triton >= (3, 7, 1)
        tiled = ask.rule == "gated_delta_rule" and installed("tilelang") is not None
        why = f"fla-core {_text(fla)} refuses this gradient {where} (flash-linear-attention issue 640)"
        cure = "Install Triton 3.7.1" + (" or tilelang." if ask.rule == "gated_delta_rule" else ".")
        return None if mended or tiled else f"{why}. {cure}"
    widest = 128 if fla >= (0, 4, 2) else 64
    block = min(max(_power_of_two(ask.dims[0]), 16), widest)
    if block != 64 or triton >= (3, 7, 1):
        return None
    return (
        f"fla-core {_text(fla)} gives wrong gradients {where} at K = {ask.dims[0]} "
        "(flash-linear-attention issue 640)."
    )


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _flash_qla(rule: Rule, x: Given) -> tuple[Tensor, Tensor | None]:
    g = torch.zeros_like(x.q[..., 0], dtype=torch.float32) if x.g is None else x.g
    return _function("flash_qla", "chunk_gated_delta_rule")(
        x.q, x.k, x.v, g, x.beta, scale=x.scale, initial_state=x.state, output_final_state=x.final,
        cu_seqlens=x.cu_seqlens,
    )  # fmt: skip


def _fla(rule: Rule, x: Given) -> tuple[Tensor, Tensor | None]:
    options = {
        "scale": x.scale, "initial_state": x.state, "output_final_state": x.final,
        "cu_seqlens": x.cu_seqlens,
    }  # fmt: skip
    op = _function(f"fla.ops.{rule}", f"chunk_{rule}")
    if rule == "delta_rule" and (installed("fla-core") or (0,)) < PLAIN_DELTA_RULE:
        return _fla(
            "gated_delta_rule", replace(x, g=torch.zeros_like(x.q[..., 0], dtype=torch.float32))
        )
    if rule == "delta_rule":
        return op(x.q, x.k, x.v, x.beta, **options)
    if rule == "simple_gla":
        return op(x.q, x.k, x.v, x.g, **options)
    return op(x.q, x.k, x.v, x.g, x.beta, **options)


def _function(module: str, name: str) -> Callable[..., Any]:
    found = loaded(module)
    if isinstance(found, str):
        raise InputError(f"{module}: {found}")
    return getattr(found, name)


DELTA: tuple[Rule, ...] = ("gated_delta_rule", "delta_rule")
# In the order of preference of "auto".
EXTERNAL = {
    x.name: x
    for x in (
        External("flash_qla", "flash_qla", "flash-qla", DELTA, _flash_qla_refusal, _flash_qla),
        External("fla", "fla.ops", "fla-core", get_args(Rule), _fla_refusal, _fla),
    )
}


def why_not_external(
    name: str,
    rule: Rule,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    dims: tuple[int, int] = (128, 128),
    training: bool = True,
) -> str | None:
    """Why the library's kernels cannot run a rule on such inputs; None if they can.

    Args:
        name: "flash_qla" or "fla".
        rule: "gated_delta_rule", "delta_rule" or "simple_gla".
        dims: K and V.
        training: whether a gradient is needed too.

    Raises:
        InputError (a ValueError): there is no such library or rule.
    """
    if name not in EXTERNAL:
        raise InputError(f"external kernels are {', '.join(EXTERNAL)}; got {name!r}.")
    if rule not in get_args(Rule):
        raise InputError(f"rule must be one of {', '.join(get_args(Rule))}; got {rule!r}.")
    return _why_not(name, Ask(rule, torch.device(device), dtype, dims, training))


def available_external(
    rule: Rule,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    dims: tuple[int, int] = (128, 128),
    training: bool = True,
) -> list[str]:
    """Libraries whose kernels can run a rule on such inputs, in the order of "auto".

    Raises:
        InputError (a ValueError): there is no such rule.
    """
    return [x for x in EXTERNAL if why_not_external(x, rule, device, dtype, dims, training) is None]


@cache
def _why_not(name: str, ask: Ask) -> str | None:
    """Why the library cannot run the call. Cheap reasons come first; it is imported only for a GPU."""
    library = EXTERNAL[name]
    if ask.rule not in library.rules:
        return f"it has no {ask.rule}, only {', '.join(library.rules)}."
    if ask.chip is None:
        return f"its kernels need an NVIDIA GPU; got {ask.device}."
    if ask.dtype not in HALVES:
        return f"its kernels take bfloat16 and float16; got {ask.dtype}."
    if installed(library.distribution) is None:
        return f"the package {library.distribution} is not installed."
    reason = library.refusal(ask)
    if reason is not None:
        return reason
    found = loaded(library.module)
    return found if isinstance(found, str) else None


def check_name(name: str, others: tuple[str, ...]) -> None:
    """Refuse a backend that is neither external nor one of `others`.

    Raises:
        InputError (a ValueError): the name is neither.
    """
    known = (*EXTERNAL, *(x for x in others if x not in EXTERNAL))
    if name not in known:
        raise InputError(f"backend must be one of {', '.join(known)}; got {name!r}.")


def resolve_external(
    name: str, rule: Rule, q: Tensor, v: Tensor, *rest: Tensor | None
) -> str | None:
    """The library for a call, with "auto" resolved; None if no library runs it.

    A constant to torch.compile.

    Args:
        rest: the other tensors that may need a gradient.

    Raises:
        InputError (a ValueError): the named library cannot run the call; the message says why.
    """
    if name != "auto" and name not in EXTERNAL:
        return None
    wanted = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, v, *rest)
    )
    if under_transform():
        if name != "auto":
            raise InputError(f"backend={name!r}: its kernels know no transform of torch.func.")
        return None
    key_dim, value_dim = operator.index(q.shape[-1]), operator.index(v.shape[-1])
    return _resolve(name, rule, q.device, q.dtype, key_dim, value_dim, wanted)


@torch.compiler.assume_constant_result
def _resolve(
    name: str,
    rule: Rule,
    device: torch.device,
    dtype: torch.dtype,
    key_dim: int,
    value_dim: int,
    training: bool,
) -> str | None:
    ask = Ask(rule, device, dtype, (key_dim, value_dim), training)
    if name == "auto":
        return next((x for x in EXTERNAL if _why_not(x, ask) is None), None)
    reason = _why_not(name, ask)
    if reason is not None:
        raise InputError(f"backend={name!r} cannot run this call of the {rule}: {reason}")
    return name
