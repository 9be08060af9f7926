"""GKAConfig: one configuration for a decoder of any pattern of mixers, and the checks of its values.

Each error names the field and the expected value.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_args

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from gka.discovery import TP_LAYER, TP_SAME, TP_WORDS
from gka.errors import InputError
from gka.layers.parts.heads import check_head_dims, default_head_dim, split_heads, value_dim
from gka.maths.solvers import SolverName
from gka.models.fields import (
    SOFTMAX_MIXERS,
    GKAFields,
    attention_heads,
    check_maps,
    check_parts,
    check_pattern,
    layer_types,
    mixer_values,
)
from gka.ops.backends import known_backends
from gka.ops.checks import check_numbers

# Keys that transformers itself writes into a config.json, or passes when it reads one.
_WRITTEN_BY_TRANSFORMERS = frozenset(
    str.split(
        "_attn_implementation _attn_implementation_internal _commit_hash _experts_implementation"
        " _experts_implementation_internal _name_or_path attn_implementation auto_map"
        " experts_implementation model_type name_or_path num_labels output_attentions"
        " quantization_config torch_dtype transformers_weights"
    )
)
# transformers' and peft's names of head counts; properties here.
_HEADS = ("num_attention_heads", "num_key_value_heads")
_COUNTS = ("num_heads", "num_kv_heads", "attention_num_heads", "attention_num_kv_heads")
# Read-only, because the pattern implies them; accepted in a file if they agree with it.
_DERIVED = ("layer_types", "number_of_conv_states")


def _load_ours(cls: Any, load: Callable[..., Any], name: Any, *args: Any, **options: Any) -> Any:
    return load(name, *args, **options)


@dataclass
class Reading:
    """How a folder is read. `gka.checkpoints` replaces the functions, so that other formats are read too.

    Attributes:
        translate: returns the fields of `GKAConfig` for the fields of a config.json.
        load: (class, transformers' `from_pretrained` of it, its arguments) -> the result of that.
    """

    translate: Callable[[dict[str, Any]], dict[str, Any]] = dict
    load: Callable[..., Any] = _load_ours


READING = Reading()


class GKAConfig(GKAFields, PreTrainedConfig):
    """Configuration of `GKAModel` and `GKAForCausalLM`: a pre-norm decoder of any pattern of mixers.

    Pure Gated KalmaNet is the default; `GKAConfig(num_hidden_layers=30, attention_layers=[6, 14, 22, 29])`
    is the hybrid of arXiv 2511.21016; `GKAConfig(mixers=["gka", "swa", "deltanet"])` names every layer.

    Args: the fields of `gka.models.fields.GKAFields`, described there.

    Raises:
        InputError (a ValueError): a key is unknown (named, with the closest known one), a value has the
            wrong type or range, the pattern is incomplete, or head counts do not divide.
    """

    # Set on instances; transformers' and trl's loaders read it.
    auto_map: ClassVar[dict[str, str]]
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "embed_tokens": TP_WORDS, "layers.*": TP_LAYER, "norm": TP_SAME,
    }  # fmt: skip

    def __post_init__(self, **others: Any) -> None:
        """Refuse unknown keys, fill in defaults that depend on other fields, check all fields."""
        _refuse_unknown(others)
        _check_model_type(others.pop("model_type", self.model_type))
        check_types(self)
        self._fill_in()
        derived = {key: others.pop(key) for key in _DERIVED if key in others}
        for key in _HEADS:
            if key in others:
                self._set_heads(key, others.pop(key))
        if self.head_dim is None:
            check_types(self)  # again, for the counts just set
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

        Entries of `auto_map` that name a file in the model's original folder are left out, because a copy
        saved elsewhere lacks the file; they stay if this class itself comes from that folder.
        """
        values = super().to_dict()
        auto_map = values.pop("auto_map", None) or {}
        if self._auto_class is None:
            auto_map = {name: code for name, code in auto_map.items() if "--" in str(code)}
        return values | ({"auto_map": auto_map} if auto_map else {})

    @property
    def num_attention_heads(self) -> int:
        """Query heads of the softmax layers, or of the recurrent ones if there are no softmax layers.

        Assigning sets `attention_num_heads` if softmax layers have their own count, else `num_heads`.
        """
        return attention_heads(self)[0] if self._has_softmax() else self.num_heads

    @num_attention_heads.setter
    def num_attention_heads(self, value: int) -> None:
        own = self._has_softmax() and self.attention_num_heads is not None
        setattr(self, "attention_num_heads" if own else "num_heads", value)

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads of the layers that `num_attention_heads` counts.

        Assigning sets `attention_num_kv_heads` if softmax layers have their own counts, else
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
        """The kind of cache of each layer, in transformers' terms; derived from the pattern."""
        return layer_types(self.pattern)

    @property
    def number_of_conv_states(self) -> int:
        """Most states of one kind in a recurrent layer: the convolutions of q, k and v."""
        return 3

    def check(self) -> None:
        """Check the current fields. Models call it too, because fields may be set after construction.

        Raises:
            InputError: see the class.
        """
        check_types(self)
        check_pattern(self)
        check_sizes(self)

    def _has_softmax(self) -> bool:
        return not set(self.pattern).isdisjoint(SOFTMAX_MIXERS)

    def _set_heads(self, key: str, value: Any) -> None:
        """Set a head count under transformers' name. Ours may be given as well if the two agree.

        Raises:
            InputError: they do not agree.
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
    """Raise `InputError` for keys that neither this configuration nor transformers knows."""
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


_AT_LEAST_ZERO = ("num_iter", "initializer_range")
# Far above every existing model. A file with more is damaged, or made to exhaust memory.
MOST_SOLVER_STEPS = 10_000
_MOST = {
    "num_hidden_layers": 10_000,
    "num_iter": MOST_SOLVER_STEPS,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "vocab_size": 1 << 26,
    "expand_v": 1024.0,
    "ridge_ratio": 1e6,
    "norm_eps": 1.0,
    "initializer_range": 1e3,
    "sliding_window": 1 << 62,
    "max_position_embeddings": 1 << 62,
}
_MOST_INT, _MOST_FLOAT = 1 << 16, 1e30
_MOST_LISTED = _MOST["num_hidden_layers"]
_WITHOUT_RANGE = ("pad_token_id", "bos_token_id", "eos_token_id", "attention_layers")


def check_types(config: GKAFields) -> None:
    """Check that every field of this package has its declared type and, if a number, a valid range."""
    for field in fields(GKAFields):
        value, allowed = getattr(config, field.name), get_args(field.type) or (field.type,)
        if not any(_is(value, kind) for kind in allowed):
            expected = " or ".join("None" if k is type(None) else _name(k) for k in allowed)
            raise InputError(f"{field.name}: expected {expected}, got {value!r}")
        if field.name not in _WITHOUT_RANGE:
            check_range(field.name, value)
        if isinstance(value, list | tuple) and len(value) > _MOST_LISTED:
            raise InputError(
                f"{field.name}: expected at most {_MOST_LISTED} entries, got {len(value)}"
            )


def check_sizes(config: GKAFields) -> None:
    """Check that head counts divide, value heads have an integer size, and transformers' names exist."""
    if config.hidden_act not in ACT2FN:
        raise InputError(f"hidden_act: transformers has no activation called {config.hidden_act!r}")
    if config.backend not in known_backends():
        raise InputError(
            f"backend: expected one of {', '.join(known_backends())}, got {config.backend!r}"
        )
    if config.solver not in get_args(SolverName):
        raise InputError(
            f"solver: expected one of {', '.join(get_args(SolverName))}, got {config.solver!r}"
        )
    check_parts(config)
    _check_tables(config)
    if any(name not in SOFTMAX_MIXERS for name in config.pattern):
        _check_recurrent(config)
    if any(name in SOFTMAX_MIXERS for name in config.pattern):
        _check_softmax(config)
    if "swa" in config.pattern and config.sliding_window < 2:
        raise InputError(f"sliding_window: expected 2 or more tokens, got {config.sliding_window}")


def _check_tables(config: GKAFields) -> None:
    """Check the numbers in `mixer_overrides` and `moe` like fields."""
    for mixer, options in (config.mixer_overrides or {}).items():
        for name, value in options.items():
            if name not in _WITHOUT_RANGE:
                check_range(name, value, f"mixer_overrides[{mixer!r}][{name!r}]")
    for name, value in (config.moe or {}).items():
        check_range(name, value, f"moe[{name!r}]")


def _check_recurrent(config: GKAFields) -> None:
    try:
        split_heads(config.num_heads, config.num_kv_heads, config.num_v_heads, config.num_k_heads)
        for name in sorted(set(config.pattern) - set(SOFTMAX_MIXERS)):
            values = mixer_values(config, name)
            check_head_dims(values["head_dim"], value_dim(values["head_dim"], values["expand_v"]))
        check_numbers(config.ridge_ratio, config.num_iter, chunk_size=1)
        check_maps(config)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def _check_softmax(config: GKAFields) -> None:
    heads, kv_heads, head_dim = attention_heads(config)
    if heads % kv_heads:
        raise InputError(
            f"attention_num_kv_heads: {kv_heads} does not divide the {heads} attention heads"
        )
    if head_dim % 2:
        raise InputError(f"attention_head_dim: rotary positions need an even size, got {head_dim}")


def _is(value: Any, kind: Any) -> bool:
    """Like isinstance, but a bool is no number, an int is a float, and items of list[...] are checked."""
    inner = get_args(kind)
    if inner:
        return isinstance(value, list | tuple) and all(_is(item, inner[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _name(kind: Any) -> str:
    return f"a list of {get_args(kind)[0].__name__}" if get_args(kind) else kind.__name__


def check_range(name: str, value: Any, argument: str | None = None) -> None:
    """Raise `InputError` about `argument` if a number is out of the range of the field `name`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    argument = argument or name
    least = "0 or more" if name in _AT_LEAST_ZERO else "more than 0"
    fits = value >= 0 if name in _AT_LEAST_ZERO else value > 0
    if not (fits and (isinstance(value, int) or math.isfinite(value))):
        raise InputError(f"{argument}: expected {least}, got {value}")
    most = _MOST.get(name, _MOST_INT if isinstance(value, int) else _MOST_FLOAT)
    if value > most:
        raise InputError(f"{argument}: expected at most {most:g}, got {value:.6g}")
