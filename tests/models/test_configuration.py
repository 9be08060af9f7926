"""GKAConfig: patterns, derived values, refusals, round trips."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig

from gka.errors import InputError
from gka.layers import MIXERS
from gka.models import GKAConfig, GKAForCausalLM


def mixers_of(config: GKAConfig) -> list[Any]:
    """The mixers of a model with this configuration."""
    return [layer.get_submodule("mixer") for layer in GKAForCausalLM(config).model.layers]


def test_the_papers_hybrid_takes_one_line():
    """26 Gated KalmaNet layers and attention at 6, 14, 22, 29 are one argument."""
    config = GKAConfig(num_hidden_layers=30, attention_layers=[6, 14, 22, 29])
    assert [i for i, name in enumerate(config.pattern) if name == "attention"] == [6, 14, 22, 29]
    assert config.pattern.count("gka") == 26
    assert config.layer_types.count("linear_attention") == 26
    assert config.layer_types[29] == "full_attention"
    assert config.number_of_conv_states == 3


def test_a_pattern_may_be_one_mixer_or_a_list():
    """`mixer` fills every layer; `mixers` names each, and says how many there are."""
    assert GKAConfig(mixer="gla", num_hidden_layers=3).pattern == ["gla"] * 3
    config = GKAConfig(mixers=["gka", "swa", "attention", "deltanet"])
    assert config.num_hidden_layers == 4
    assert config.layer_types == [
        "linear_attention",
        "sliding_attention",
        "full_attention",
        "linear_attention",
    ]


def test_the_mlps_width_is_filled_in():
    """Without intermediate_size the MLP is 8/3 as wide as the model, in steps of 32."""
    assert GKAConfig(hidden_size=768).intermediate_size == 2048
    assert GKAConfig(hidden_size=64).intermediate_size == 192
    assert GKAConfig(hidden_size=64, intermediate_size=100).intermediate_size == 100


def test_every_option_of_the_layer_can_be_configured():
    """No constructor argument of any mixer is out of the configuration's reach."""
    # the layer's place; sliding_window; rope_options; mixer_overrides
    elsewhere = {"layer_idx", "window_size", "inv_freq", "rope_scale", "use_short_conv"}
    for mixer in MIXERS.values():
        names = set(inspect.signature(mixer).parameters) - elsewhere
        assert names <= set(vars(GKAConfig())), mixer
    for name in ("attention", "swa"):
        more = {name: {"use_short_conv": True}}
        config = GKAConfig(
            vocab_size=11, hidden_size=32, num_hidden_layers=1, mixer=name, mixer_overrides=more
        )
        assert mixers_of(config)[0].use_short_conv


def test_options_reach_the_layers():
    """num_iter, ridge_ratio, window, heads and the rest arrive in the modules."""
    config = GKAConfig(
        vocab_size=11, hidden_size=32, head_dim=8, num_heads=4, num_kv_heads=2, ridge_ratio=0.1,
        num_iter=7, conv_size=3, expand_v=2.0, norm_eps=1e-4, use_beta_gate=False, backend="torch",
        solver="adaptive", sliding_window=9, rope_theta=99.0, attention_num_heads=2, attention_head_dim=6,
        attention_num_kv_heads=1, qk_norm=False, mixers=["gka", "swa", "attention"],
    )  # fmt: skip
    gka, swa, attention = mixers_of(config)
    assert (gka.num_iter, gka.ridge_ratio, gka.backend) == (7, 0.1, "torch")
    assert gka.solver == "adaptive"
    assert (gka.num_heads, gka.num_k_heads, gka.head_v_dim, gka.layer_idx) == (4, 2, 16, 0)
    assert gka.q_conv1d.width == 3 and gka.o_norm.eps == 1e-4 and not hasattr(gka, "b_proj")
    assert (swa.window_size, swa.num_heads, swa.num_kv_heads, swa.head_dim) == (9, 2, 1, 6)
    assert attention.window_size is None and attention.layer_idx == 2
    assert attention.rope_theta == 99.0 and not hasattr(attention.q_norm, "weight")


def test_softmax_heads_default_to_the_recurrent_ones():
    """Mixers are compared at equal head sizes unless told otherwise."""
    shared: dict[str, Any] = {
        "vocab_size": 11,
        "hidden_size": 32,
        "head_dim": 8,
        "num_heads": 4,
        "num_kv_heads": 2,
    }
    (mixer,) = mixers_of(GKAConfig(**shared, mixers=["attention"]))
    assert (mixer.num_heads, mixer.num_kv_heads, mixer.head_dim) == (4, 2, 8)
    other = GKAConfig(**shared, mixers=["attention"], attention_num_heads=3)
    (mixer,) = mixers_of(other)
    assert (mixer.num_heads, mixer.num_kv_heads, mixer.head_dim) == (3, 3, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heds": 4}, r"'num_heds' \(did you mean 'num_heads'\?\)"),
        ({"temperature": 0.5}, "does not know 'temperature'"),
        ({"head_dim": 300}, "head_dim must be at most 256, got 300"),
        ({"expand_v": 3.0}, r"expand_v \* head_dim must be at most 256, got 384"),
        ({"mixer": "gla", "mixer_overrides": {"gla": {"head_dim": 300}}}, "head_dim must be at most 256"),
        ({"num_iter": 10**9}, "num_iter: expected at most 10000"),
        ({"per_layer_config": {0: {"num_iter": 3}}}, "per_layer_config"),
        ({"mixer": "gkaa"}, r"mixer: unknown mixer 'gkaa' \(did you mean 'gka'\?\)"),
        ({"mixers": ["gka", "mamba"]}, "mixers: unknown mixer 'mamba'.*known: gka"),
        ({"mixers": ["gka"], "num_hidden_layers": 2}, "mixers names 1 layers.*is 2"),
        ({"mixers": ["gka"], "attention_layers": [0]}, "give one of the two"),
        ({"num_hidden_layers": 4, "attention_layers": [4]}, r"attention_layers: \[4\] lie outside"),
        ({"num_hidden_layers": 4, "attention_layers": [-1]}, r"counted 0\.\.3"),
        ({"num_hidden_layers": 4, "attention_layers": [1, 1]}, "twice"),
        ({"num_heads": 6, "num_kv_heads": 4}, "num_heads = 6 must be a multiple of num_kv_heads"),
        ({"expand_v": 0.3, "head_dim": 8}, "expand_v"),
        ({"mixer": "attention", "attention_num_heads": 6, "attention_num_kv_heads": 4}, "6 attention"),
        ({"mixer": "attention", "attention_head_dim": 7}, "even size, got 7"),
        ({"mixer": "swa", "sliding_window": 1}, "sliding_window: expected 2"),
        ({"num_iter": 10**9}, "num_iter: expected at most 10000, got 1e"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers: expected at most 10000, got 1e"),
        ({"mixers": ["gka"] * 10_001}, "mixers: expected at most 10000 entries, got 10001"),
        ({"head_dim": 10**9}, "head_dim: expected at most 65536"),
        ({"vocab_size": 10**12}, "vocab_size: expected at most"),
        ({"expand_v": 1e300}, "expand_v: expected at most 1024, got 1e"),
        ({"norm_eps": 1e300}, "norm_eps: expected at most 1, got 1e"),
        ({"rope_theta": 1e300}, "rope_theta: expected at most 1e.30, got 1e"),
        ({"rope_theta": float("inf")}, "rope_theta: expected more than 0, got inf"),
        ({"norm_eps": float("nan")}, "norm_eps: expected more than 0, got nan"),
        ({"mixer_overrides": {"gka": {"num_iter": 10**9}}}, r"mixer_overrides\['gka'\]\['num_iter'\]"),
        ({"moe": {"num_experts": 10**9, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
                  "norm_topk_prob": True, "layers": [0]}}, r"moe\['num_experts'\]: expected at most"),
        ({"rope_options": {"rope_type": "linear", "factor": float("nan")}}, "rope_options of type"),
        ({"num_iter": -1}, "num_iter: expected 0 or more"),
        ({"ridge_ratio": 0.0}, "ridge_ratio: expected more than 0"),
        ({"ridge_ratio": float("nan")}, "ridge_ratio: expected more than 0"),
        ({"hidden_size": "64"}, "hidden_size: expected int, got '64'"),
        ({"num_heads": True}, "num_heads: expected int, got True"),
        ({"use_gate": 1}, "use_gate: expected bool, got 1"),
        ({"mixers": "gka"}, "mixers: expected a list of str or None"),
        ({"hidden_act": "sillu"}, "no activation called 'sillu'"),
        ({"backend": "cuda"}, "backend: expected one of auto.*'cuda'"),
        ({"solver": "magic"}, "solver: expected one of chebyshev, adaptive, cg, got 'magic'"),
        ({"model_type": "llama"}, "model_type: .*'llama'"),
        ({"num_hidden_layers": 1, "layer_types": ["full_attention"]}, "layer_types follows from"),
    ],
)  # fmt: skip
def test_mistakes_are_named(fields: dict[str, Any], message: str):
    """A wrong field is refused with its name, what was wrong and what was expected."""
    with pytest.raises(ValueError, match=message):
        GKAConfig(**fields)


def test_fields_set_later_are_checked_by_the_model():
    """An attribute changed after construction does not slip through."""
    config = GKAConfig(vocab_size=11, hidden_size=16, num_hidden_layers=1, num_heads=2, head_dim=8)
    config.num_iter = -2
    with pytest.raises(ValueError, match="num_iter"):
        GKAForCausalLM(config)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mixers": ["gka", "swa"], "eos_token_id": [1, 2], "pad_token_id": 0, "dtype": "bfloat16"},
        {"num_hidden_layers": 5, "attention_layers": [1, 3], "tie_word_embeddings": True},
        {"num_labels": 3, "ridge_ratio": 1, "architectures": ["GKAForCausalLM"]},
    ],
)
def test_round_trips_are_exact(tmp_path: Path, fields: dict[str, Any]):
    """to_dict, from_dict, save_pretrained, from_pretrained and AutoConfig agree in every field."""
    config = GKAConfig(**fields)
    assert GKAConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    for loaded in (GKAConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, GKAConfig)
        assert loaded.pattern == config.pattern
        ours = {key: value for key, value in loaded.to_dict().items() if key != "_name_or_path"}
        assert ours == {k: v for k, v in config.to_dict().items() if k != "_name_or_path"}
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "config.json").read_text()


def test_an_unknown_key_in_a_file_is_refused(tmp_path: Path):
    """A config.json with a misspelt key does not load as something else; derived keys that agree do."""
    config = GKAConfig(num_hidden_layers=1)
    config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    derived = {"layer_types": ["linear_attention"], "number_of_conv_states": 3}
    path.write_text(json.dumps(values | derived))
    assert GKAConfig.from_pretrained(tmp_path).pattern == ["gka"]
    path.write_text(json.dumps(values | {"num_iters": 5}))
    with pytest.raises(ValueError, match=r"'num_iters'.*'num_iter'"):
        AutoConfig.from_pretrained(tmp_path)


def test_everything_transformers_writes_is_known():
    """No key of transformers' own configuration is refused when it is read back."""
    written: dict[str, Any] = PreTrainedConfig().to_dict()
    written.pop("model_type")
    assert isinstance(GKAConfig(**written), GKAConfig)


def test_transformers_names_of_head_counts():
    """num_attention_heads and num_key_value_heads are read, written and given; of a hybrid they are the
    softmax layers'."""
    config = GKAConfig(num_attention_heads=8, num_key_value_heads=2)  # pyright: ignore
    assert (config.num_heads, config.num_kv_heads) == (8, 2)
    assert not {"num_attention_heads", "num_key_value_heads"} & set(config.to_dict())
    config.num_attention_heads = 4
    assert config.num_heads == 4
    assert GKAConfig(num_heads=6, head_dim=128).num_key_value_heads == 6
    hybrid = GKAConfig(mixers=["gka", "attention"], num_heads=8, attention_num_heads=4)
    assert (hybrid.num_attention_heads, hybrid.num_key_value_heads) == (4, 4)
    hybrid.num_key_value_heads = 2
    hybrid.num_attention_heads = 2
    assert (hybrid.attention_num_heads, hybrid.attention_num_kv_heads) == (2, 2)
    assert (hybrid.num_heads, hybrid.num_kv_heads) == (8, None)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_attention_heads": 8, "num_heads": 4}, "two names of one count"),
        ({"num_attention_heads": "8"}, "num_heads: expected int"),
        ({"num_key_value_heads": 0}, "num_kv_heads: expected more than 0"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "3"),
    ],
    ids=str,
)
def test_head_counts_must_fit_under_any_name(fields: dict, message: str):
    """Two names that disagree, and values out of range, are refused as under our own names."""
    with pytest.raises(InputError, match=message):
        GKAConfig(**fields)


def test_auto_map_is_there_and_not_written():
    """Loaders look into config.auto_map: it is empty, each configuration's own, and not in config.json."""
    one, other = GKAConfig(), GKAConfig()
    assert one.auto_map == {} and "auto_map" not in one.to_dict()
    one.auto_map["AutoConfig"] = "owner/code--file.Class"
    assert other.auto_map == {}
    assert one.to_dict()["auto_map"] == {"AutoConfig": "owner/code--file.Class"}
