"""GKAForCausalLM: the decoder with an output head, a loss, and `generate`."""

from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from gka.errors import InputError
from gka.models.cache import CACHE_NAME, GKACache, one_cache
from gka.models.configuration import GKAConfig
from gka.models.context import split_targets, sum_over_ranks
from gka.models.decoder import GKAModel, GKAPreTrainedModel, refuse_attentions
from gka.models.documents import Documents, Packing, find_documents
from gka.models.loss import linear_cross_entropy, mean_loss, next_token_targets
from gka.ops.context import SequenceContext


class GKAForCausalLM(GKAPreTrainedModel, GenerationMixin):
    """Language model: `GKAModel` and a linear head, optionally tied to the embedding.

    Args:
        config: a `GKAConfig`.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    # Makes the Trainer pass num_items_in_batch, so that gradient accumulation averages over tokens.
    accepts_loss_kwargs = True
    # For `generate`: a recurrent state cannot be rolled back, which assisted decoding needs. False for a
    # model without recurrent layers.
    _is_stateful = True

    def __init__(self, config: GKAConfig):
        super().__init__(config)
        self.model = GKAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._is_stateful = "linear_attention" in config.layer_types
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        cache: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: Tensor | int | None = None,
        max_length_k: Tensor | int | None = None,
        seq_idx: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        context: SequenceContext | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, and the loss against `labels`.

        The loss does not need the logits of all tokens at once (`gka.models.loss`). So in training mode with
        labels they are not returned; in evaluation mode they are.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, cache, inputs_embeds, cu_seqlens,
                cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, seq_idx, output_hidden_states,
                output_attentions, context: as in `GKAModel.forward`.
            labels: [B,T] the tokens themselves, -100 for positions that are not predicted. Position t
                predicts label t+1; the last token of a document predicts nothing. With `context` those of
                this rank's tokens; its last token predicts the next rank's first one. The loss is then that
                of whole rows, the same on all ranks, and its gradient on each is such that their mean over
                the ranks, which FSDP and DDP form, is that of the loss.
            use_cache: return a cache. None: `config.use_cache`, but never in training mode, with labels,
                with packed sequences or under `torch.export`.
            logits_to_keep: number of last tokens whose logits are returned (0: all), or positions. Does not
                affect the loss.
            num_items_in_batch: divisor of the summed loss, instead of the number of targets.
            return_logits: whether to return logits. None: yes, except in training mode with labels.

        Returns:
            `loss` (float32), `logits` [B,T',vocab_size] in the model's dtype, `past_key_values`
            (`cache` since transformers 5.24), `hidden_states`; each None if not requested.

        Raises:
            ValueError: inputs contradict each other, or attention weights are requested.
        """
        past = one_cache(past_key_values, cache)
        if use_cache is None and labels is not None and past is None:
            use_cache = False
        packing = Packing(
            cu_seqlens, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, seq_idx, position_ids
        )  # fmt: skip
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        caching = past is not None or bool(use_cache)
        documents = find_documents(tokens, packing, attention_mask, caching, context)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            documents=documents,
            context=context,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            loss = self._loss(hidden, labels, documents, num_items_in_batch, context)
        if return_logits or (return_logits is None and (labels is None or not self.training)):
            logits = self.lm_head(_kept(hidden, logits_to_keep))
        return CausalLMOutputWithPast(
            loss=loss,  # pyright: ignore[reportArgumentType]
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
        )

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        documents: Documents,
        num_items_in_batch: Tensor | int | None,
        context: SequenceContext | None,
    ) -> Tensor:
        """Mean next-token loss. A head that adapters have changed is called as a module, on all tokens."""
        if labels.shape != hidden.shape[:2]:
            shapes = f"shape {tuple(hidden.shape[:2])}, got {tuple(labels.shape)}"
            part = "" if context is None else ": pass context.shard(labels)"
            raise InputError(f"labels must have the tokens' {shapes}{part}")
        labels = documents.row(labels.to(hidden.device))
        count = num_items_in_batch
        if context is None:
            targets = next_token_targets(labels, documents.cu_seqlens)
        else:
            targets, number = split_targets(context, labels)
            count = number if count is None else count
        targets, hidden = targets.flatten(), hidden.flatten(0, 1)
        if _is_plain(self.lm_head):
            total = linear_cross_entropy(hidden, self.lm_head.weight, targets)
        else:
            logits = self.lm_head(hidden).float()
            total = nn.functional.cross_entropy(logits, targets, reduction="sum")
        total = total if context is None else sum_over_ranks(context, total)
        return mean_loss(total, targets, count)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *others: Any, **named: Any
    ) -> None:
        """transformers' choice, with a `GKACache` as its dynamic cache."""
        given = one_cache(
            model_kwargs.pop("past_key_values", None), model_kwargs.pop("cache", None)
        )
        if given is not None:
            model_kwargs[CACHE_NAME] = given
        _check_generation(self.config, generation_config, given)
        super()._prepare_cache_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            generation_config, model_kwargs, *others, **named
        )
        if given is None and isinstance(model_kwargs.get(CACHE_NAME), DynamicCache):
            model_kwargs[CACHE_NAME] = cache = GKACache(self.config)
            if generation_config.is_assistant:
                cache.activate_past_recording()

    # `generate` inspects the signature.
    @wraps(GenerationMixin.prepare_inputs_for_generation)  # pyright: ignore[reportAttributeAccessIssue]
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """transformers' inputs of a step, with the cache under the name that every version of peft uses.

        Without a cache, peft would prepend its prompt to every new token.
        """
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # pyright: ignore
        if "cache" in inputs:
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **_: Any) -> Tensor | None:
        """The 0/1 mask itself, from which each mixer builds its own. Called by `generate`."""
        return attention_mask

    def _valid_auto_compile_criteria(self, model_kwargs: Any, generation_config: Any) -> bool:
        """False: `generate`'s mask grows with every token, and each length would compile again."""
        return False


def _check_generation(config: GKAConfig, generation_config: Any, given: Any) -> None:
    """Raise `ValueError` for caches that cannot hold or count the layers' states, and for other options that
    the model does not support."""
    refuse_attentions(generation_config.output_attentions)
    kind = generation_config.cache_implementation
    if kind not in (None, "dynamic", "static"):
        raise ValueError(
            f"cache_implementation: {kind!r} cannot hold recurrent states; leave it out, or use 'static'"
        )
    if generation_config.compile_config is not None:
        raise ValueError("compile_config: generate does not compile this model; leave it out")
    if any(kind != "linear_attention" for kind in config.layer_types):
        return
    if kind == "static":
        raise ValueError(
            "cache_implementation: 'static' needs an attention layer, and this model has none; leave it "
            "out: recurrent states have a constant size anyway"
        )
    if given is not None and not isinstance(given, GKACache):
        raise ValueError(
            f"past_key_values: no attention layer counts the tokens of this {type(given).__name__}; "
            "pass a gka.models.GKACache(model.config), which counts by itself"
        )


def _kept(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, int):
        return hidden[:, -logits_to_keep:] if logits_to_keep else hidden
    return hidden[:, logits_to_keep]


def _is_plain(head: nn.Module) -> bool:
    """Whether head(x) is exactly x @ head.weight.T."""
    hooked = head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
    return type(head) is nn.Linear and head.bias is None and not hooked


@dataclass(frozen=True)
class ParameterCount:
    """One line of a model's parameter table.

    Attributes:
        part: "embedding", "mixer: gka" (one line per kind of mixer), "mlp", "norms", "output head".
        modules: number of modules of this part.
        parameters: numbers in all of them together; a tied head has those of the embedding.
    """

    part: str
    modules: int
    parameters: int


def count_parameters(model: GKAModel | GKAForCausalLM) -> list[ParameterCount]:
    """All parameters of a `GKAModel` or `GKAForCausalLM` by part.

    Args:
        model: the model; it may be on the meta device.
    """
    body = model.model if isinstance(model, GKAForCausalLM) else model
    parts: list[tuple[str, Any]] = [("embedding", body.embed_tokens)]
    for name, layer in zip(body.config.pattern, body.layers, strict=True):
        parts += [(f"mixer: {name}", layer.mixer), ("mlp", layer.mlp)]
        parts += [("norms", layer.input_layernorm), ("norms", layer.post_attention_layernorm)]
    parts.append(("norms", body.norm))
    if isinstance(model, GKAForCausalLM):
        parts.append(("output head", model.lm_head))
    seen: set[int] = set()
    table: dict[str, list[int]] = {}
    for part, module in parts:
        new = [p for p in module.parameters() if id(p) not in seen]
        seen |= {id(p) for p in new}
        table.setdefault(part, []).append(sum(p.numel() for p in new))
    return [ParameterCount(part, len(counts), sum(counts)) for part, counts in table.items()]
