"""Foreign checkpoints: read, run, fine-tuned, written back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import foreign
from gka import checkpoints
from gka.checkpoints import open as opening
from gka.checkpoints import save_as
from gka.checkpoints.save import foreign_config
from gka.errors import InputError
from gka.models import GKAConfig, GKAForCausalLM, GKAModel
from tolerances import relative_error

Ids = Callable[..., Tensor]
RELEASED = Path(__file__).parents[1] / "fixtures" / "official_hybrid_qwen3_tiny"

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1],
       "norm_topk_prob": True, "decoder_sparse_step": 1}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 128}  # fmt: skip
LOW_RANK = {"num_iter": 6, "kv_proj_rank": 3}
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3": foreign.hybrid_config("qwen3", "*-GKA-*-GKA"),
    "every layer": foreign.hybrid_config("qwen3", "SWA-GKA-GDN-*", tie_word_embeddings=True),
    "expansion": foreign.hybrid_config("qwen3", "GKA-*", gka_config=LOW_RANK),
    "learned mix": foreign.hybrid_config(
        "qwen3", "GKA-GDN", gka_config=LOW_RANK | {"kv_learnable_residual": True}
    ),
    "qwen2": foreign.hybrid_config("qwen2", "*-GKA"),
    "llama": foreign.hybrid_config("llama", "GKA-*", rope_parameters=LLAMA3),
    "experts": foreign.hybrid_config("qwen3_moe", "*-GKA-GKA", **MOE),
}
FLAS: dict[str, dict[str, Any]] = {
    "fla gka": foreign.fla_config("gka"),
    "fla gka and attention": foreign.fla_config("gka", [1]),
    "fla gka and windows": foreign.fla_config(
        "gka", attn=foreign.fla_attention([0, 2], qkv_bias=True, window_size=6, rope_theta=99.0)
    ),
    "fla gated deltanet": foreign.fla_config("gated_deltanet", [0]),
}
EVERY = HYBRIDS | FLAS
FORMATS = {name: config["model_type"] for name, config in HYBRIDS.items()} | {
    "fla gka": "fla", "fla gka and attention": "fla", "fla gka and windows": "fla",
    "fla gated deltanet": "fla_gated_deltanet",
}  # fmt: skip


def weights_of(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    if config["model_type"].startswith("hybrid"):
        return foreign.hybrid_weights(config, dtype)
    return {name: value.to(dtype) for name, value in foreign.fla_weights(config).items()}


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def test_the_released_model_gives_the_released_logits():
    """The authors' tiny hybrid (their code, products in TF32, which is 1.9e-2 from exact): logits within
    2.5e-2, the likeliest token the same for at least 94 % of the positions."""
    expected = load_file(RELEASED / "expected.safetensors")
    model = GKAForCausalLM.from_pretrained(RELEASED, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(expected["input_ids"].long()).logits
    assert relative_error(logits, expected["logits"]) <= 2.5e-2
    same = logits.argmax(-1) == expected["logits"].argmax(-1)
    assert same.float().mean() >= 0.94


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_back_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path, ids: Ids):
    """Read, run, written in the foreign format again: the same tensors, and a model of the same logits; in
    our own format likewise. In bfloat16 too, though decay rates are held in float32."""
    weights = weights_of(EVERY[name], dtype)
    config = EVERY[name] | {"dtype": str(dtype).removeprefix("torch.")}
    folder = foreign.write(tmp_path / "theirs", config, weights)
    model, tokens = GKAForCausalLM.from_pretrained(folder).eval(), ids(2, 20)
    assert model.dtype == dtype
    logits = model(tokens).logits
    assert logits.isfinite().all() and logits.float().std() > 0.01
    save_as(model, tmp_path / "again", FORMATS[name])
    assert_equal(stored(tmp_path / "again"), weights)
    model.save_pretrained(tmp_path / "ours")
    for other in (tmp_path / "again", tmp_path / "ours"):
        assert torch.equal(GKAForCausalLM.from_pretrained(other).eval()(tokens).logits, logits)
    save_as(GKAForCausalLM.from_pretrained(tmp_path / "ours"), tmp_path / "back", FORMATS[name])
    assert_equal(stored(tmp_path / "back"), weights)


@pytest.mark.parametrize("name", EVERY)
def test_every_weight_matters(name: str, tmp_path: Path, ids: Ids):
    """Each stored tensor takes part: its gradient is there and not zero."""
    folder = foreign.write(tmp_path, EVERY[name], weights_of(EVERY[name]))
    model = GKAForCausalLM.from_pretrained(folder).train()
    tokens = ids(2, 20)
    model(tokens, labels=tokens).loss.backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_fine_tuning_lowers_the_loss(tmp_path: Path, ids: Ids):
    """Steps of AdamW on a foreign checkpoint lower its loss, and the result is written in its format."""
    folder = foreign.write(tmp_path / "a", HYBRIDS["qwen3"], weights_of(HYBRIDS["qwen3"]))
    model, tokens = GKAForCausalLM.from_pretrained(folder).train(), ids(2, 30)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.2
    save_as(model.eval(), tmp_path / "b", "hybrid_qwen3")
    again = GKAForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_shards_and_auto_classes(tmp_path: Path, ids: Ids):
    """Shards with an index load as one file does; the Auto classes and the model without a head load too."""
    config = HYBRIDS["every layer"]
    weights = weights_of(config)
    one = GKAForCausalLM.from_pretrained(foreign.write(tmp_path / "one", config, weights)).eval()
    folder = foreign.write(tmp_path / "three", config, weights, shards=3)
    auto = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = ids(1, 9)
    assert type(auto) is GKAForCausalLM and type(AutoConfig.from_pretrained(folder)) is GKAConfig
    assert torch.equal(auto(tokens).logits, one(tokens).logits)
    body = GKAModel.from_pretrained(folder).eval()
    assert torch.equal(body(tokens).last_hidden_state, one.model(tokens).last_hidden_state)
    save_as(one, tmp_path / "split", "hybrid_qwen3", max_shard_size="20KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 2
    assert_equal(stored(tmp_path / "split"), weights)


def test_the_configuration_is_read_whole(tmp_path: Path):
    """Head counts, epsilons, ridge, window and bases arrive where the format puts them; overrides win."""
    table = {
        "num_q_heads": 4, "num_k_heads": 1, "num_v_heads": 2, "head_dim": 8, "num_iter": 9, "norm_eps": 1e-4,
        "ridge_strength": 0.07, "chunk_size": 32, "solver_type": "chebyshev", "bp_lambda": True,
        "hidden_size": 32, "use_v_conv": False, "gla_rescale": False,
    }  # fmt: skip
    theirs = foreign.hybrid_config(
        "qwen3", "GKA-SWA-GDN-*", gka_config=table, gka_overrides={"num_iter": 3},
        gdn_config={"norm_eps": 1e-3}, swa_config={"window_size": 7},
    )  # fmt: skip
    model = GKAForCausalLM(GKAConfig.from_dict(theirs))
    mixers: list[Any] = [layer.get_submodule("mixer") for layer in model.model.layers]
    gka, swa, gdn, attention = mixers
    counts: Any = (gka.num_heads, gka.num_k_heads, gka.num_v_heads)
    assert counts == (4, 1, 2) and (gka.num_iter, gka.ridge_ratio, gka.scale) == (3, 0.07, 1.0)
    assert not hasattr(gka, "v_conv1d") and gka.o_norm.eps == 1e-4
    assert swa.window_size == 7 and attention.window_size is None
    assert gdn.o_norm.eps == 1e-3 and gdn.num_k_heads == 2
    assert attention.rope_theta == 1e6 and attention.q_norm.eps == 1e-5
    again = foreign_config(model.config, "hybrid_qwen3")  # checks that nothing is lost
    assert again["gka_config"]["num_v_heads"] == 2 and again["gdn_config"]["num_v_heads"] == 2
    windows = GKAConfig.from_dict(FLAS["fla gka and windows"])
    assert (windows.mixers, windows.sliding_window) == (["swa", "gka", "swa"], 6)
    assert windows.attention_bias and windows.rope_theta == 99.0
    assert GKAConfig.from_dict(theirs, num_iter=5).num_iter == 5
    assert GKAConfig.from_dict(HYBRIDS["every layer"]).mixer_overrides == {
        "gka": {"norm_eps": 1e-6}
    }  # 1e-5 is the default of GDN layers and of this model


def test_older_spellings_are_read(tmp_path: Path):
    """rope_theta, rope_scaling and torch_dtype, as transformers 4 wrote them, mean the same."""
    scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    new = foreign.hybrid_config("llama", "GKA-*", rope_parameters=LLAMA3, dtype="bfloat16")
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "dtype")}
    old |= {"rope_theta": 5e5, "rope_scaling": scaling, "torch_dtype": "bfloat16"}
    weights = foreign.hybrid_weights(new, torch.bfloat16)
    model = GKAForCausalLM.from_pretrained(foreign.write(tmp_path, old, weights))
    expected = GKAConfig.from_dict(new)
    assert model.dtype == torch.bfloat16 and model.config.rope_theta == expected.rope_theta == 5e5
    assert model.config.rope_options == expected.rope_options == scaling


def test_their_name_is_ours_too(tmp_path: Path):
    """FLA calls its model type "gka" as well; our own folders are still read as ours."""
    GKAConfig(
        vocab_size=11, hidden_size=16, num_heads=2, head_dim=8, num_hidden_layers=1
    ).save_pretrained(tmp_path)
    assert GKAConfig.from_pretrained(tmp_path).hidden_size == 16
    assert GKAConfig.from_dict(FLAS["fla gka"]).mixers == ["gka"] * 3
    assert GKAConfig.from_dict(FLAS["fla gka"]).qk_norm is False


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (foreign.hybrid_config("qwen3", "*DA-GKA"), "fused layer of the distillation stage"),
        (foreign.hybrid_config("qwen3", "*-GKA*"), "'GKA\\*' is a fused layer"),
        (
            foreign.hybrid_config("qwen3", "*-GKA", layer_types=["GKA", "*"]),
            "layer_types .* contradict hybrid_override_pattern",
        ),
        (
            foreign.fla_config(
                "gka",
                attn=[foreign.fla_attention([0]), foreign.fla_attention([1], rope_theta=5.0)],
            ),
            "specifications whose options differ",
        ),
        (foreign.hybrid_config("qwen3", "*-M2"), "unknown layer 'M2'; known: \\*, GKA, SWA, GDN"),
        (
            foreign.hybrid_config("qwen3", "*-GKA", num_hidden_layers=3),
            "names 2 layers, but num_hidden",
        ),
        (
            foreign.hybrid_config("qwen3", "GKA", gka_config={"solver_type": "cg"}),
            "solver_type = 'cg' is not supported, only 'chebyshev'",
        ),
        (
            foreign.hybrid_config("qwen3", "GKA", gka_config={"ridge": 1}),
            "gka_config: unknown key 'ridge'",
        ),
        (
            foreign.hybrid_config("qwen3", "GKA", gka_config={"hidden_size": 64}),
            "hidden_size = 64 differs from the model's 32",
        ),
        (
            foreign.hybrid_config("qwen3", "GDN", gdn_config={"allow_neg_eigval": True}),
            "gdn_config: allow_neg_eigval = True is not supported",
        ),
        (foreign.hybrid_config("qwen3", "SWA", swa_config={}), "swa_config: window_size"),
        (
            foreign.hybrid_config("qwen3", "GKA", gka_config="small"),
            "config.json of a hybrid_qwen3 model cannot be used: ",
        ),
        (
            foreign.hybrid_config("qwen3", "GKA", hidden_size="wide"),
            "config.json of a hybrid_qwen3 model cannot be used: .*hidden_size",
        ),
        (
            foreign.hybrid_config("qwen3", "GKA", hidden_size=-3),
            "hidden_size: expected more than 0",
        ),
        (
            foreign.hybrid_config("llama", "*-GKA", mlp_bias=True),
            "mlp_bias: MLPs with biases are not supported",
        ),
        (
            foreign.hybrid_config(
                "qwen3",
                "*",
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            ),
            "rope_type must be one of linear, yarn, llama3, got 'dynamic'",
        ),
        (
            foreign.fla_config("gka", attnres_block_size=2),
            "attnres_block_size = 2 is not supported",
        ),
        (foreign.fla_config("gka", use_magic=True), "unknown key 'use_magic'"),
        (foreign.fla_config("gated_deltanet", num_v_heads=8), "num_v_heads = 8"),
        (foreign.fla_config("gated_deltanet", use_short_conv=False), "use_short_conv = False"),
        (foreign.fla_config("gka", [7]), "layer 7 lies outside the 3 layers"),
    ],
)
def test_what_has_no_meaning_here_is_refused(theirs: dict[str, Any], message: str):
    """Configurations of other mathematics are refused with the key and the reason."""
    with pytest.raises(InputError, match=message):
        GKAConfig.from_dict(theirs).check()


def tampered(kind: str, folder: Path) -> str:
    """Damage the checkpoint; returns what the message must say."""
    weights = weights_of(HYBRIDS["qwen3"])
    shards = 3 if "shard" in kind or "index" in kind else 1
    key = "model.layers.1.gka.dt_bias"
    if kind == "missing key":
        del weights[key]
    elif kind == "left over":
        weights["model.layers.0.gka.q_proj.weight"] = torch.zeros(3)
    elif kind == "shape":
        weights[key] = torch.zeros(5)
    foreign.write(folder, HYBRIDS["qwen3"], weights, shards)
    file = folder / ("model-00002-of-00003.safetensors" if shards == 3 else "model.safetensors")
    if kind == "missing shard":
        file.unlink()
        return "index.json names model-00002-of-00003.safetensors, which is missing"
    if kind == "cut shard" or kind == "cut":
        file.write_bytes(file.read_bytes()[:-100])
        return f"{file.name} is damaged or cut short"
    if kind == "index":
        index = folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("model.norm.weight", "model.norm.wait"))
        return "lacks 'model.norm.wait', which model.safetensors.index.json says it has"
    return {
        "missing key": f"weights are missing: '{key}'",
        "left over": "model.safetensors has weights .* 'model.layers.0.gka.q_proj.weight'",
        "shape": rf"model.safetensors: '{key}' has shape \(5,\), config.json implies \(4,\)",
    }[kind]


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize(
    "kind", ["missing key", "left over", "shape", "missing shard", "cut", "cut shard", "index"]
)
def test_damaged_checkpoints_are_refused(kind: str, auto: bool, tmp_path: Path):
    """A key missing, left over or misshapen, a shard missing or cut short: refused, key and file named."""
    message = tampered(kind, tmp_path)
    with pytest.raises(InputError, match=message):
        (AutoModelForCausalLM if auto else GKAForCausalLM).from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["missing key", "left over"])
def test_what_the_loader_notices_is_refused_too(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Files that are not in a local folder are checked by transformers' loader alone: as strictly."""
    tampered(kind, tmp_path)
    monkeypatch.setattr(opening, "check_stored", lambda *_: None)
    what = {"missing key": "missing: .*dt_bias", "left over": "left over: .*q_proj"}[kind]
    with pytest.raises(InputError, match=f"weights are {what}"):
        GKAForCausalLM.from_pretrained(tmp_path)


def test_unsafe_weights_are_not_read(tmp_path: Path):
    """A folder with pickled weights alone is refused."""
    foreign.write(tmp_path, HYBRIDS["qwen3"], weights_of(HYBRIDS["qwen3"]))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"neither model.safetensors nor"):
        GKAForCausalLM.from_pretrained(tmp_path)


def test_weights_of_an_unused_decay_do_no_harm(tmp_path: Path):
    """Released layers store a decay's weights where they do not use one; they are left aside, and a model
    without a decay is not written in that format."""
    config = foreign.hybrid_config("qwen3", "GKA", gka_config={"use_forgetting_gate": False})
    model = GKAForCausalLM.from_pretrained(foreign.write(tmp_path, config, weights_of(config)))
    assert not hasattr(model.get_submodule("model.layers.0.mixer"), "A_log")
    with pytest.raises(InputError, match="store the weights of a decay in any case"):
        save_as(model, tmp_path / "b", "hybrid_qwen3")


@pytest.mark.parametrize(
    ("fields", "format", "message"),
    [
        ({"mixers": ["gla"]}, "hybrid_qwen3", "hybrid_qwen3 has no gla layers, only"),
        ({"mixers": ["gka"]}, "qwen3", "qwen3 has no gka layers, only attention, swa"),
        (
            {"mixers": ["attention"], "qk_norm": False},
            "hybrid_qwen3",
            "qk_norm of 'attention' = False",
        ),
        ({"mixers": ["gka"], "num_kv_heads": 1, "kv_rank": 2}, "fla", "kv_rank of 'gka' = 2"),
        ({"mixers": ["gka"], "solver": "adaptive"}, "fla", "solver of 'gka' = 'adaptive'"),
        ({"mixers": ["gka"], "solver": "cg"}, "hybrid_qwen3", "solver of 'gka' = 'cg'"),
        ({"mixers": ["gka"], "num_iter": 0}, "fla", "num_iter = 0 .* is refused by FLA"),
        ({"mixers": ["gka"], "expand_v": 2.0}, "hybrid_qwen3", "expand_v of 'gka' = 2.0"),
        ({"mixers": ["gka"]}, "hybrid_gemma", "format 'hybrid_gemma' is unknown; choose gka,"),
    ],
)
def test_what_a_format_cannot_say_is_not_written(
    fields: dict[str, Any], format: str, message: str, build: Any, tmp_path: Path
):
    """A model is written in a format that can express it, or not at all."""
    with pytest.raises(InputError, match=message):
        save_as(build(**fields), tmp_path / "out", format)
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten_or_half_written(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A folder in use is refused; an interruption leaves nothing behind."""
    model = build(mixers=["gka", "attention"])
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").touch()
    with pytest.raises(InputError, match="exists and is not empty"):
        save_as(model, tmp_path / "used", "hybrid_qwen3")
    monkeypatch.setattr("gka.checkpoints.save.save_torch_state_dict", None)
    with pytest.raises(TypeError):
        save_as(model, tmp_path / "new", "hybrid_qwen3")
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


def test_other_files_come_along(tmp_path: Path, build: Any):
    """Tokenizer files of the source are copied; its weights and configuration are not."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "pytorch_model.bin", "config.json"):
        (source / name).write_text("{}")
    save_as(build(mixers=["gka"]), tmp_path / "out", "hybrid_qwen3", extra_files=source)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"tokenizer.json", "config.json", "generation_config.json", "model.safetensors"}
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "hybrid_qwen3"
    )


def test_every_format_has_another_name():
    """The table of formats is complete, and each knows its name."""
    assert all(name == format.name for name, format in checkpoints.FORMATS.items())
    assert {f"hybrid_{family}" for family in ("qwen3", "qwen2", "llama", "qwen3_moe")} <= set(
        checkpoints.FORMATS
    )
