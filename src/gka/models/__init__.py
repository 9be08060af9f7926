"""Language models with any pattern of mixers, as Hugging Face classes.

Importing this module registers them, so `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know
model_type "gka".
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gka.models.adapters.auto import register
from gka.models.adapters.save import save_as
from gka.models.cache import GKACache
from gka.models.causal_lm import GKAForCausalLM
from gka.models.configuration import GKAConfig
from gka.models.decoder import GKAModel, GKAPreTrainedModel
from gka.models.solver import set_solver, solver_settings
from gka.models.states import cache_tensors, fill_cache, state_shapes
from gka.models.summary import ParameterCount, count_parameters

AutoConfig.register(GKAConfig.model_type, GKAConfig, exist_ok=True)
AutoModel.register(GKAConfig, GKAModel, exist_ok=True)
AutoModelForCausalLM.register(GKAConfig, GKAForCausalLM, exist_ok=True)

register()

__all__ = [
    "GKAConfig",
    "GKAModel",
    "GKAForCausalLM",
    "GKAPreTrainedModel",
    "GKACache",
    "save_as",
    "cache_tensors",
    "fill_cache",
    "state_shapes",
    "set_solver",
    "solver_settings",
    "ParameterCount",
    "count_parameters",
]
