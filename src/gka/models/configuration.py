"""GKAConfig: one configuration for a decoder of any pattern of mixers."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from gka.errors import InputError
from gka.layers.parts.heads import default_head_dim
from gka.models.checks import check_sizes, check_types
from gka.models.fields import (
    SOFTMAX_MIXERS,
    GKAFields,
    attention_heads,
    check_pattern,
    layer_types,
)

# What transformers itself writes into a config.json, or hands over when it reads one.
_WRITTEN_BY_TRANSFORMERS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation",
        "_experts_implementation_internal",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "quantization_config",
        "torch_dtype",
        "transformers_weights",
    }
)
# transformers' and peft's names of head counts; properties here.
_HEADS = ("num_attention_heads", "num_key_value_heads")
_COUNTS = ("num_heads", "num_kv_heads", "attention_num_heads", "attention_num_kv_heads")
# Read-only here because the pattern implies them; accepted in a file when they agree with it.
_DERIVED = ("layer_types", "number_of_conv_states")


def _load_ours(cls: Any, load: Callable[..., Any], name: Any, *args: Any, **options: Any) -> Any:
    return load(name, *args, **options)


@dataclass
class Reading:
    """How a folder is read; `gka.checkpoints` puts its functions here, so that other formats are read too.

    Attributes:
        translate: fields of `GKAConfig` from the fields of a config.json.
        load: (class, transformers' `from_pretrained` of it, its arguments) -> what it returns.
    """

    translate: Callable[[dict[str, Any]], dict[str, Any]] = dict
    load: Callable[..., Any] = _load_ours


READING = Reading()


class GKAConfig(GKAFields, PreTrainedConfig):
    """Configuration of `GKAModel` and `GKAForCausalLM`: a pre-norm decoder of any pattern of mixers.

    Pure Gated KalmaNet is the default; `GKAConfig(num_hidden_layers=30, attention_layers=[6, 14, 22, 29])`
    is the hybrid of arXiv 2511.21016; `GKAConfig(mixers=["gka", "swa", "deltanet"])` is any other.

    Args: the fields of `gka.models.fields.GKAFields`, each described there.

    Raises:
        InputError (a ValueError): a key is unknown (named, with the closest known one), a value is of the
            wrong type or range, the pattern is incomplete, or head counts do not divide.
    """

    auto_map: ClassVar[
        dict[str, str]
    ]  # of each configuration; read by transformers' and trl's loaders
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    def __post_init__(self, **others: Any) -> None:
        """Refuse unknown keys, fill in what follows from other fields, check the whole."""
        _refuse_unknown(others)
        _check_model_type(others.pop("model_type", self.model_type))
        check_types(self)
        self._fill_in()
        derived = {key: others.pop(key) for key in _DERIVED if key in others}
        for key in _HEADS:
            if key in others:
                self._set_heads(key, others.pop(key))
        if self.head_dim is None:
            check_types(self)  # of the counts just set
            self.head_dim = default_head_dim(self.hidden_size, self.num_heads)
        others["auto_map"] = others.get("auto_map") or {}
        super().__post_init__(**others)
        self.check()
        self._check_derived(derived)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields stored in a folder or on the hub, of any format that `READING` knows."""
        theirs, unused = super().get_config_dict(pretrained_model_name_or_path, **options)
        return READING.translate(theirs), unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """A configuration from the fields of a config.json, ours or a foreign one."""
        return super().from_dict(READING.translate(config_dict), **options)

    def to_dict(self) -> dict[str, Any]:
        """The fields for a config.json.

        Without those of `auto_map` that name a file in the folder the model came from, unless this class is
        itself from there: what is saved elsewhere does not have it.
        """
        values = super().to_dict()
        auto_map = values.pop("auto_map", None) or {}
        if self._auto_class is None:
            auto_map = {name: code for name, code in auto_map.items() if "--" in str(code)}
        return values | ({"auto_map": auto_map} if auto_map else {})

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the softmax layers, or of the recurrent ones where there are no others.

        Assigning sets `attention_num_heads` where softmax layers have a count of their own, else `num_heads`.
        """
        return attention_heads(self)[0] if self._has_softmax() else self.num_heads

    @num_attention_heads.setter
    def num_attention_heads(self, value: int) -> None:
        own = self._has_softmax() and self.attention_num_heads is not None
        setattr(self, "attention_num_heads" if own else "num_heads", value)

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads of the layers that `num_attention_heads` counts.

        Assigning sets `attention_num_kv_heads` where softmax layers have counts of their own, else
        `num_kv_heads`.
        """
        if self._has_softmax():
            return attention_heads(self)[1]
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @num_key_value_heads.setter
    def num_key_value_heads(self, value: int) -> None:
        counts = (self.attention_num_heads, self.attention_num_kv_heads)
        own = self._has_softmax() and counts != (None, None)
        setattr(self, "attention_num_kv_heads" if own else "num_kv_heads", value)

    @property
    def layer_types(self) -> list[str]:
        """What each layer keeps in a cache, in transformers' words; follows from the pattern."""
        return layer_types(self.pattern)

    @property
    def number_of_conv_states(self) -> int:
        """States a recurrent layer may keep of either kind: convolutions of q, k and v."""
        return 3

    def check(self) -> None:
        """Check the fields as they are now; models do so too, as fields may be set after construction.

        Raises:
            InputError: as the class says.
        """
        check_types(self)
        check_pattern(self)
        check_sizes(self)

    def _has_softmax(self) -> bool:
        return not set(self.pattern).isdisjoint(SOFTMAX_MIXERS)

    def _set_heads(self, key: str, value: Any) -> None:
        """A head count under transformers' name; it may stand beside ours where the two agree.

        Raises:
            InputError: they do not.
        """
        before = {name: getattr(self, name) for name in _COUNTS}
        setattr(self, key, value)
        for name, was in before.items():
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != was and was != default:
                raise InputError(
                    f"{key} = {value!r} and {name} = {was!r} are two names of one count: give one of the two"
                )

    def _fill_in(self) -> None:
        if self.num_hidden_layers is None:
            self.num_hidden_layers = 24 if self.mixers is None else len(self.mixers)
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // 96) * 32

    def _check_derived(self, given: dict[str, Any]) -> None:
        for key, value in given.items():
            if value != getattr(self, key):
                raise InputError(
                    f"{key} follows from the mixers and is {getattr(self, key)}, not {value}: leave it out"
                )


def _refuse_unknown(others: dict[str, Any]) -> None:
    """Raise for keys that neither this configuration nor transformers knows."""
    unknown = sorted(set(others) - _WRITTEN_BY_TRANSFORMERS - {*_DERIVED, *_HEADS})
    if not unknown:
        return
    known = [field.name for field in fields(GKAConfig)]
    described = []
    for key in unknown:
        close = difflib.get_close_matches(key, known, n=1)
        described.append(f"{key!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    raise InputError(f"GKAConfig does not know {', '.join(described)}")


def _check_model_type(model_type: str) -> None:
    if model_type != GKAConfig.model_type:
        raise InputError(
            f"model_type: this is the configuration of a {model_type!r} model, expected 'gka'"
        )
