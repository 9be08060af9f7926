"""A model as stages of a pipeline, for torch.distributed.pipelining."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from gka.errors import InputError
from gka.models import GKAForCausalLM
from gka.models.loss import linear_cross_entropy, mean_loss, next_token_targets


class Stage(nn.Module):
    """Consecutive layers of a `GKAForCausalLM`; the first stage embeds, the last one normalises.

    Names of parameters are the model's own, so that stages save and load parts of its state dict. It takes
    whole rows without padding, packing or cache.

    Args:
        model: the model; its layers outside the stage are dropped from it.
        stage, stages: which of how many. The last ones have one layer less if layers do not divide.

    Raises:
        InputError: fewer layers than stages, or tied embeddings, which two stages would train apart.
    """

    def __init__(self, model: GKAForCausalLM, stage: int, stages: int) -> None:
        super().__init__()
        count = len(model.model.layers)
        if not 0 < stages <= count:
            raise InputError(f"{stages} stages cannot share {count} layers: take {count} or fewer")
        if stages > 1 and model.config.tie_word_embeddings:
            raise InputError(
                "tie_word_embeddings: the first and the last stage of a pipeline would each train a copy of "
                "the shared matrix; make the model with tie_word_embeddings=False"
            )
        self.is_first, self.is_last = stage == 0, stage == stages - 1
        most, more = divmod(count, stages)
        start = stage * most + min(stage, more)
        self.layers_of_stage = range(start, start + most + (stage < more))
        body: Any = model.model
        kept = {str(i): layer for i, layer in enumerate(body.layers) if i in self.layers_of_stage}
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict(kept)
        if self.is_first:
            self.model.embed_tokens = body.embed_tokens
        if self.is_last:
            self.model.norm = body.norm
            self.lm_head = model.lm_head

    def forward(self, x: Tensor) -> Tensor:
        """Ids [B,T] (first stage) or hidden states [B,T,D] -> hidden states, normalised by the last."""
        body: Any = self.model
        if self.is_first:
            x = body.embed_tokens(x)
        for layer in body.layers.values():
            x = layer(x, past=None)
        return body.norm(x) if self.is_last else x

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The last stage's mean next-token loss over labels [B,T]."""
        targets = next_token_targets(labels).flatten()
        total = linear_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, targets)
        return mean_loss(total, targets, None)


def pipeline(
    model: GKAForCausalLM, mesh: DeviceMesh, device: torch.device | str, microbatches: int
) -> tuple[Stage, Schedule1F1B]:
    """This rank's stage of a model, and the 1F1B schedule that trains it.

    The schedule's `step(ids)` on the first rank, `step(target=labels, losses=found)` on the last and `step()`
    on the others run one batch forward and backward; gradients are means over its micro-batches, whose losses
    the last rank finds in the list. Micro-batches are parts of a batch's rows, with as many targets each.

    Args:
        model: the same whole model on every rank.
        mesh: one dimension, a rank a stage.
        device: of this rank.
        microbatches: parts of a batch; at least as many as stages.

    Raises:
        InputError: layers or micro-batches are fewer than stages, or embeddings are tied.
    """
    stage, stages = mesh.get_local_rank(), mesh.size()
    if microbatches < stages:
        raise InputError(
            f"1F1B keeps {stages} stages busy with {stages} micro-batches or more; got {microbatches}"
        )
    module = Stage(model, stage, stages).to(device)
    part = PipelineStage(module, stage, stages, torch.device(device), group=mesh.get_group())
    # The last rank calls the loss; on the others it says that there is a backward pass.
    return module, Schedule1F1B(part, microbatches, loss_fn=module.loss)
