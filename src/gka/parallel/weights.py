"""First weights of a model that was made and parallelised without memory.

`without_memory` makes a model whose weights are, bit for bit, those of one made with memory from the same
generator; `materialize` gives any model on the meta device weights of a seed of its own.
"""

import contextlib
import copy
import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from gka.models.decoder import GKAPreTrainedModel, init_module, initialised_by
from gka.parallel.state import spread

Model = TypeVar("Model", bound=GKAPreTrainedModel)


class _Memory:
    """Returns freed memory to the system now and then.

    glibc keeps what was freed, and small allocations split it, so that the next matrix does not fit there:
    without this the process grows as if the model were made with memory.
    """

    MOST = 2**26  # bytes that wait for their return

    def __init__(self) -> None:
        self._freed = 0

    def free(self, parameters: Iterable[Tensor]) -> None:
        """Take note that so much is free."""
        self._freed += sum(p.numel() * p.element_size() for p in parameters)
        if self._freed > self.MOST:
            self._freed = 0
            with contextlib.suppress(OSError, AttributeError):  # another C library
                ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class _Draw:
    """The initialisation of a module's own parameters, and the generator's state before it."""

    module: nn.Module
    own: dict[str, nn.Parameter]
    std: float
    state: Tensor


class FirstWeights:
    """The first weights of a model that was made by `without_memory`."""

    def __init__(self) -> None:
        self._draws: list[_Draw] = []
        self.memory = _Memory()

    @torch.no_grad()
    def fill(self, model: nn.Module, device: torch.device | str) -> None:
        """Give memory and the weights to the model, parallelised or not; every rank calls it.

        One module's whole parameters exist at a time, on the CPU of each rank.
        """
        stored = {n: b.clone() for n, b in model.named_buffers() if not b.is_meta}
        model.to_empty(device=device)
        for name, buffer in model.named_buffers():
            if name in stored:
                buffer.copy_(stored[name])
        with torch.random.fork_rng(devices=[]):
            for draw in self._draws:
                torch.set_rng_state(draw.state)
                for name, value in _drawn(draw.module, draw.own, draw.std).items():
                    target: Any = draw.module._parameters[name]
                    target.copy_(spread(value, target))
                self.memory.free(draw.own.values())

    @torch.no_grad()
    def note(self, module: nn.Module, *, std: float) -> None:
        """Draw a module's weights without keeping them, in place of `init_module`."""
        own: dict[str, Any] = dict(module.named_parameters(recurse=False))
        if own:
            self._draws.append(_Draw(module, own, std, torch.get_rng_state()))
            _drawn(module, own, std)
            self.memory.free(own.values())

    def drop_replaced(self) -> None:
        """Forget what was drawn for parameters that another one has replaced since: tied ones."""
        self._draws = [
            draw
            for draw in self._draws
            if all(draw.module._parameters[name] is p for name, p in draw.own.items())
        ]


def without_memory(make: Callable[[], Model]) -> tuple[Model, FirstWeights]:
    """A model on the meta device, and the weights that it would have with memory.

    Every number is drawn that `make` draws, in the same order, so the weights and the generator's state
    afterwards are those of `make()`. At no time more than one module has memory.

    Args:
        make: makes a `GKAModel` or `GKAForCausalLM` on the CPU.
    """
    first = FirstWeights()

    def without_values(_: nn.Module, __: str, module: nn.Module | None) -> None:
        if module is not None:
            first.memory.free(_emptied(module))

    hook = register_module_module_registration_hook(without_values)
    try:
        with initialised_by(first.note):
            model = make()
    finally:
        hook.remove()
    first.drop_replaced()
    return model, first


def _emptied(module: nn.Module) -> list[Tensor]:
    """Move a module that has just been made to the meta device; what it had, on that device."""
    found = []
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                empty = torch.empty_like(parameter, device="meta")
                setattr(part, key, nn.Parameter(empty, parameter.requires_grad))
                found.append(empty)
    return found


@torch.no_grad()
def materialize(model: Any, device: torch.device | str, seed: int = 0) -> None:
    """Give memory and first weights to a model that was parallelised on the meta device.

    One module's whole parameters exist at a time, on the CPU of each rank, and every rank draws the same
    numbers: the weights depend on the seed alone, not on the mesh. They are distributed as, but not equal to,
    those of a model made with memory; `without_memory` gives equal ones.

    Args:
        model: a `GKAModel` or `GKAForCausalLM` after `parallelize`.
        device: of this rank.
        seed: of the weights. The process's own generator is left as it was.
    """
    model.to_empty(device=device)
    done: set[int] = set()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            own = {n: p for n, p in module.named_parameters(recurse=False) if id(p) not in done}
            done |= {id(p) for p in own.values()}
            if own:
                for name, value in _drawn(module, own, model.config.initializer_range).items():
                    own[name].copy_(spread(value, own[name]))


def _drawn(module: nn.Module, own: dict[str, Any], std: float) -> dict[str, Tensor]:
    """Whole first values of a module's own parameters."""
    whole = copy.copy(module)
    drawn = {n: nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for n, p in own.items()}
    whole._parameters = {**module._parameters, **drawn}
    init_module(whole, std=std)
    return {name: value.detach() for name, value in drawn.items()}
