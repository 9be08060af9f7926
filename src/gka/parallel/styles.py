"""Tensor parallelism through transformers: the styles that `GKAConfig.base_model_tp_plan` names.

`from_pretrained(..., tp_plan="auto")` under torchrun, and accelerate, which prepares such a model, apply a
plan of styles: one style a module or parameter, by its name alone. A parameter's share depends on more than
that, on the layer's mixer and its counts of heads. So one style splits a whole layer, with `gka.parallel.
tensor`, as `parallelize` does; that of a layer's parameters only says that they have been taken care of.

`gka.discovery` registers the names when the models are imported, and loads this module when a model is split.
"""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.integrations.tensor_parallel import TensorParallelLayer

from gka.discovery import TP_LAYER, TP_PART, TP_SAME, TP_WORDS
from gka.parallel.tensor import ROWS, SAME, Share, split_layer, split_parameters
from gka.parallel.vocabulary import WholeVocabulary, split_end


class Layer(TensorParallelLayer):
    """Splits a decoder layer by heads and columns.

    Raises:
        InputError: on every rank, where heads, columns or experts cannot be split over so many.
    """

    def install_forward(self, module: Any, mesh: DeviceMesh) -> Any:
        split_layer(module, mesh)
        return module


class Words(TensorParallelLayer):
    """Splits an embedding or an output head by words, if the ranks divide the vocabulary."""

    def install_forward(self, module: Any, mesh: DeviceMesh) -> Any:
        if split_end(module, mesh):
            return _with_share(module, mesh, ROWS)
        if not isinstance(module, nn.Embedding):
            module.vocabulary = WholeVocabulary()
        return _with_share(module, mesh, SAME)


class Same(TensorParallelLayer):
    """Keeps a module whole, its parameters as DTensors: optimizers take no mixture of these and others."""

    def install_forward(self, module: Any, mesh: DeviceMesh) -> Any:
        return _with_share(module, mesh, SAME)


def _with_share(module: Any, mesh: DeviceMesh, share: Share) -> Any:
    own = dict.fromkeys((name for name, _ in module.named_parameters(recurse=False)), share)
    split_parameters(module, mesh, own)
    return module


STYLES = {TP_LAYER: Layer(), TP_PART: TensorParallelLayer(), TP_WORDS: Words(), TP_SAME: Same()}
