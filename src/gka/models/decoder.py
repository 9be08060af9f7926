"""GKAModel: embedding, decoder layers with any mixer, final norm."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from gka.layers import DECAY_PARAMETERS, RMSNorm
from gka.layers.parts.heads import ZeroLinear
from gka.layers.parts.masks import token_mask
from gka.models.cache import CACHE_NAME, GKACache, one_cache, with_prefix
from gka.models.configuration import READING, GKAConfig
from gka.models.context import split_arguments
from gka.models.documents import Documents, Packing, find_documents
from gka.models.fields import build_experts, build_mixer, has_experts
from gka.models.solver import set_solver
from gka.ops.context import SequenceContext


class GKAMLP(nn.Module):
    """SwiGLU: down(act(gate(x)) * up(x))."""

    def __init__(self, config: GKAConfig):
        super().__init__()
        width = int(config.intermediate_size or 0)
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class GKADecoderLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GKAConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = build_mixer(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = build_experts(config) if has_experts(config, layer_idx) else GKAMLP(config)

    def forward(self, hidden_states: Tensor, past: Cache | None, **call: Any) -> Tensor:
        # Named `past`, because transformers removes a cache under its own names from checkpointed layers;
        # the names, and whether it does, depend on the version.
        mixed, _, _ = self.mixer(self.input_layernorm(hidden_states), past_key_values=past, **call)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class GKAPreTrainedModel(PreTrainedModel):
    """Common base of the models: loading, initialisation, devices."""

    config: GKAConfig
    config_class = GKAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["GKADecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = [
        "past_key_values", "cache", "past", "cu_seqlens_cpu",
    ]  # fmt: skip
    _supports_sdpa = True
    # The layers keep these in float32; transformers' loader must know.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = list(DECAY_PARAMETERS)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """transformers' `from_pretrained` for our folders and for foreign ones that `gka.checkpoints` knows.

        An incomplete foreign checkpoint is refused; see `gka.checkpoints.open.load_with`.
        """
        load = super().from_pretrained
        return READING.load(cls, load, pretrained_model_name_or_path, *args, **options)

    def _init_weights(self, module: nn.Module) -> None:
        init_module(module, std=self.config.initializer_range)

    def set_solver(
        self,
        *,
        num_iter: int | None = None,
        ridge_ratio: float | None = None,
        solver: str | None = None,
    ) -> None:
        """Change steps, ridge or solver of every GKA layer, by `gka.models.set_solver`."""
        set_solver(self, num_iter=num_iter, ridge_ratio=ridge_ratio, solver=solver)


class GKAModel(GKAPreTrainedModel):
    """Decoder without an output head.

    Args:
        config: a `GKAConfig`; checked again here.
    """

    def __init__(self, config: GKAConfig):
        config.check()
        super().__init__(config)
        # No padding_idx: padding does not affect other tokens, and a pad token that is also the end-of-text
        # token must be trained.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            GKADecoderLayer(config, layer) for layer in range(int(config.num_hidden_layers or 0))
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        *,
        cache: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: Tensor | int | None = None,
        max_length_k: Tensor | int | None = None,
        seq_idx: Tensor | None = None,
        documents: Documents | None = None,
        context: SequenceContext | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states of every token.

        Args:
            input_ids: [B,T] token ids; or `inputs_embeds` [B,T,hidden_size] instead.
            attention_mask: [B,T] of 0/1 in any dtype, 1 for tokens, padding at either end. With a cache it
                covers the past as well, [B,T_past+T] (a model without attention layers needs only the last
                T).
            position_ids: [B,T] or [1,T] rotary positions. None: counted from the mask, packing and cache.
                A position that is not above the previous token's in its row begins a new document, and
                documents do not see each other. Checking this reads a GPU once per call of more than one
                token (and torch.compile breaks its graph), unless an argument below says where documents
                begin.
            past_key_values: a `GKACache`, or another transformers cache built from the configuration; or keys
                and values for every layer, from peft's prefix tuning (`cache.with_prefix`).
            cache: past_key_values under its name since transformers 5.24.
            use_cache: return a cache. None: `config.use_cache`, but never in training mode, with packed
                sequences or under `torch.export`. A given cache is always updated, and returned unless this
                is False.
            cu_seqlens: [N+1] bounds of sequences packed into one row (B = 1), without a cache. Bounds on a
                GPU are read once per call; with bounds on the CPU nothing waits.
            output_hidden_states: return the embeddings and every layer's output (the last after the norm).
                None: `config.output_hidden_states`.
            cu_seq_lens_q, cu_seq_lens_k: cu_seqlens under transformers' names; equal if both are given.
            max_length_q, max_length_k: tokens of the longest document, or more; only with cu_seq_lens_q.
            seq_idx: [B,T] or [1,T], the same number throughout a document.
            documents: the result of `gka.models.documents.find_documents`, which replaces all of these.
            output_attentions: None or False, which trl's trainers and peft's wrappers pass.
            context: a `gka.parallel.ContextParallel`: the tokens are this rank's part of rows that are split
                over ranks, all of which make the call. It holds bounds and mask, and counts positions; not
                with a cache. Results are of this rank's tokens.

        Returns:
            `last_hidden_state` [B,T,hidden_size], `past_key_values` (`cache` since transformers 5.24),
            `hidden_states`.

        Raises:
            ValueError: inputs contradict each other, the mask holds other numbers than 0 and 1, or attention
                weights are requested; the message names them.
        """
        asked = self.config.output_attentions if output_attentions is None else output_attentions
        refuse_attentions(asked)
        past = with_prefix(self.config, one_cache(past_key_values, cache))
        _check_inputs(self.config, input_ids, inputs_embeds, past)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if documents is None:
            packing = Packing(
                cu_seqlens, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, seq_idx, position_ids
            )  # fmt: skip
            tokens = input_ids if inputs_embeds is None else inputs_embeds
            caching = past is not None or bool(use_cache)
            documents = find_documents(tokens, packing, attention_mask, caching, context)
        returns_cache = use_cache is not False
        if use_cache is None:
            exported = torch.compiler.is_exporting()  # an exported program returns only tensors
            wanted = self.config.use_cache and not self.training and not documents.packed
            use_cache = wanted and not exported and context is None
        self._check_recomputation(past, use_cache)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        # If rows have several documents, runs of padding are documents too.
        attention_mask = (
            None if documents.packed else _without_trivial(attention_mask, past, hidden_states)
        )
        hidden_states = documents.row(hidden_states)
        position_ids = None if position_ids is None else documents.row(position_ids)
        if use_cache and past is None:
            past = GKACache(self.config)
        split = {} if context is None else split_arguments(context, self.layers)
        every: list[Tensor] = []
        for layer in self.layers:
            if output_hidden_states:
                every.append(documents.rows(hidden_states))
            hidden_states = layer(
                hidden_states,
                past=past,
                attention_mask=attention_mask,
                use_cache=use_cache,
                cu_seqlens=documents.cu_seqlens,
                cu_seqlens_cpu=documents.cu_seqlens_cpu,
                position_ids=position_ids,
                **split,
            )
        hidden_states = documents.rows(self.norm(hidden_states))
        if isinstance(past, GKACache):
            past.advance(hidden_states.shape[1])
        every.append(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            hidden_states=tuple(every) if output_hidden_states else None,
            **{CACHE_NAME: past if returns_cache else None},  # pyright: ignore[reportArgumentType]
        )

    def _check_recomputation(self, past: Any, use_cache: bool) -> None:
        """Raise `ValueError` if gradient checkpointing would run layers twice on one cache."""
        checkpointed = self.training and any(
            getattr(x, "gradient_checkpointing", False) for x in self.layers
        )
        if checkpointed and torch.is_grad_enabled() and (use_cache or past is not None):
            raise ValueError(
                "gradient checkpointing runs every layer twice, and a cache would take in the tokens twice: "
                "leave out use_cache and past_key_values, or checkpointing"
            )


def _check_inputs(config: GKAConfig, input_ids: Any, inputs_embeds: Any, cache: Any) -> None:
    """Raise `ValueError` for wrong calls that the mixers would not notice, or not explain well."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if input_ids is not None and input_ids.dim() != 2:
        raise ValueError(f"input_ids must be [batch, tokens], got shape {tuple(input_ids.shape)}")
    if cache is not None and len(getattr(cache, "layers", ())) != config.num_hidden_layers:
        raise ValueError(
            f"past_key_values must be a cache of {config.num_hidden_layers} layers, got {cache!r}: "
            "leave it out, or use gka.models.GKACache(model.config)"
        )


def refuse_attentions(output_attentions: Any) -> None:
    """Raise `ValueError` if attention weights are requested."""
    if output_attentions:
        raise ValueError("output_attentions: this model forms no attention weights; leave it out")


def _without_trivial(attention_mask: Any, cache: Any, tokens: Tensor) -> Any:
    """The mask, or None if it covers all tokens and has no padding.

    One check here saves every layer the work for padding. Other masks are checked by the mixers.
    """
    if attention_mask is None:
        return None
    attention_mask = token_mask(attention_mask)
    if torch.compiler.is_compiling() or not (cache is None or isinstance(cache, GKACache)):
        return attention_mask
    past = 0 if cache is None else cache.get_seq_length()
    if attention_mask.shape != (tokens.shape[0], past + tokens.shape[1]):
        return attention_mask
    return None if attention_mask.all() else attention_mask


@torch.no_grad()
def init_module(module: nn.Module, *, std: float) -> None:
    """Initialise the module's own parameters, except those that a checkpoint has just filled.

    Matrices, embeddings and experts are normal with standard deviation `std`, biases zero. Everything else
    (decay rates, convolutions, norms) has its own `reset_parameters`.

    transformers calls this after construction and, when loading, for parameters that a checkpoint lacks.
    Values from the constructor are lost by then, because models are constructed without memory.
    """
    if isinstance(module, nn.Linear | nn.Embedding) and not isinstance(module, ZeroLinear):
        initialization.normal_(module.weight, mean=0.0, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            initialization.zeros_(module.bias)
        return
    if getattr(module, "starts_normal", False):
        for parameter in module.parameters(recurse=False):
            initialization.normal_(parameter, mean=0.0, std=std)
        return
    own: Any = list(module.parameters(recurse=False))
    filled = [(p, p.clone()) for p in own if getattr(p, "_is_hf_initialized", False)]
    if len(filled) == len(own):
        return
    if not callable(reset := getattr(module, "reset_parameters", None)):
        raise NotImplementedError(
            f"{type(module).__name__} has parameters but no reset_parameters()"
        )
    reset()
    for parameter, value in filled:
        parameter.copy_(value)
