"""Language models with any pattern of mixers, as Hugging Face classes.

After `import gka`, transformers' Auto classes know model_type "gka" (`gka.discovery`). They then import this
module, which registers the classes.
"""

import warnings
from importlib import import_module
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from gka.models.cache import GKACache, cache_tensors, fill_cache, state_shapes
from gka.models.causal_lm import GKAForCausalLM, ParameterCount, count_parameters
from gka.models.configuration import GKAConfig
from gka.models.decoder import GKAModel, GKAPreTrainedModel
from gka.models.recomputation import keep_states, selective_checkpointing
from gka.models.sketch import fix_sketch, measure_bases, measure_moments, sketched
from gka.models.solver import set_solver, solver_settings

AutoConfig.register(GKAConfig.model_type, GKAConfig, exist_ok=True)
AutoModel.register(GKAConfig, GKAModel, exist_ok=True)
AutoModelForCausalLM.register(GKAConfig, GKAForCausalLM, exist_ok=True)
# Pipelines and Trainer look up the task of a class in these tables, by name.
MODEL_MAPPING_NAMES[GKAConfig.model_type] = GKAModel.__name__
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GKAConfig.model_type] = GKAForCausalLM.__name__

__all__ = [
    "GKAConfig",
    "GKAModel",
    "GKAForCausalLM",
    "GKAPreTrainedModel",
    "GKACache",
    "cache_tensors",
    "fill_cache",
    "state_shapes",
    "sketched",
    "measure_bases",
    "measure_moments",
    "fix_sketch",
    "set_solver",
    "solver_settings",
    "selective_checkpointing",
    "keep_states",
    "ParameterCount",
    "count_parameters",
]

_MOVED = ("save_as", "write_auto_map")


def __getattr__(name: str) -> Any:
    """Names that have moved to `gka.checkpoints`, for one release."""
    if name in ("adapters", "loading"):
        return import_module(f"gka.models.{name}")
    if name not in _MOVED:
        raise AttributeError(f"module 'gka.models' has no attribute {name!r}")
    warnings.warn(
        f"gka.models.{name} is gka.checkpoints.{name} now", DeprecationWarning, stacklevel=2
    )
    # Stored, because `from ... import` looks the name up twice.
    globals()[name] = getattr(import_module("gka.checkpoints"), name)
    return globals()[name]
