"""Weights: how they start, how they are stored, how they come back."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from gka.models import GKAForCausalLM, GKAModel

Build = Callable[..., GKAForCausalLM]
Ids = Callable[..., Tensor]

EVERY = ["gka", "attention", "swa", "gla", "deltanet", "gated_deltanet"]


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Every parameter has the same name, dtype and bits."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name


def check_decay(mixer: Any) -> None:
    """A_log and dt_bias lie where the layer's own initialisation draws them."""
    assert mixer.A_log.isfinite().all() and (mixer.A_log <= math.log(16)).all()
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert (dt >= 0.99e-4).all() and (dt <= 0.101).all()
    assert mixer.A_log.unique().numel() > 1 and mixer.dt_bias.unique().numel() > 1


def test_every_part_starts_as_it_should(build: Build):
    """Matrices and embeddings have initializer_range's spread; decays, convolutions and norms their own."""
    model = build(mixers=["gka", "gated_deltanet"], hidden_size=64, initializer_range=0.05)
    for name, value in model.named_parameters():
        if name.endswith(("_proj.weight", "embed_tokens.weight", "lm_head.weight")):
            assert abs(value.std().item() - 0.05) < 0.02, name
        elif "norm" in name:
            assert (value == 1).all(), name
        elif "conv1d" in name:
            assert value.abs().max() <= 0.5 and value.std() > 0.2, name
        elif name.endswith("bias") and "dt_bias" not in name:
            assert (value == 0).all(), name
        else:
            assert name.endswith(("A_log", "dt_bias")), name
    for layer in model.model.layers:
        check_decay(layer.get_submodule("mixer"))


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bit_exact(build: Build, ids: Ids, tmp_path: Path, tied: bool, auto: bool):
    """A model of every mixer comes back bit for bit, tied or not, also through the Auto classes."""
    model, tokens = build(mixers=EVERY, tie_word_embeddings=tied), ids(2, 9)
    model.save_pretrained(tmp_path)
    loaded = (AutoModelForCausalLM if auto else GKAForCausalLM).from_pretrained(tmp_path)
    assert type(loaded) is GKAForCausalLM
    assert_same(model, loaded)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied
    body = (AutoModel if auto else GKAModel).from_pretrained(tmp_path)
    assert type(body) is GKAModel
    assert_same(model.model, body)


def test_shards_are_bit_exact(build: Build, tmp_path: Path):
    """Weights split over several files come back bit for bit."""
    model = build(mixers=EVERY)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(model, GKAForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_decays_in_float32(
    build: Build, ids: Ids, tmp_path: Path, dtype: torch.dtype
):
    """Loaded in half precision all weights are rounded but A_log and dt_bias; stored again, all bits stay."""
    model = build(mixers=["gka", "attention", "gated_deltanet"])
    model.save_pretrained(tmp_path / "float32")
    half = GKAForCausalLM.from_pretrained(tmp_path / "float32", dtype=dtype)
    for name, value in half.named_parameters():
        kept = name.endswith(("A_log", "dt_bias"))
        assert value.dtype == (torch.float32 if kept else dtype), name
        assert torch.equal(value, model.get_parameter(name).to(value.dtype)), name
    half.save_pretrained(tmp_path / "half")
    again = GKAForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert again.dtype == dtype
    assert_same(half, again)
    tokens = ids(2, 9)
    assert torch.equal(half(tokens).logits, again(tokens).logits)
    assert half(tokens).logits.dtype == dtype
    assert half(tokens, labels=tokens).loss.dtype == torch.float32


def test_a_model_cast_to_bfloat16_keeps_its_values(build: Build, tmp_path: Path):
    """After .bfloat16() even the decays are rounded; storing and loading changes no value."""
    model = build(mixers=["gka"]).bfloat16()
    model.save_pretrained(tmp_path)
    loaded = GKAForCausalLM.from_pretrained(tmp_path)
    for name, value in loaded.named_parameters():
        assert torch.equal(value.float(), model.get_parameter(name).float()), name


DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", [["gka", "attention"], ["gla", "gated_deltanet"]])
def test_no_way_to_a_dtype_reduces_the_decay(
    build: Build, tmp_path: Path, pattern: list[str], dtype: torch.dtype
):
    """Constructed by dtype, cast, loaded by dtype, or loaded and cast: A_log and dt_bias are float32, have
    their marks, and all else has the dtype."""
    model = build(mixers=pattern)
    model.save_pretrained(tmp_path)
    load = GKAForCausalLM.from_pretrained
    made = {
        "from_config": AutoModelForCausalLM.from_config(model.config, dtype=dtype),
        "loaded": load(tmp_path, dtype=dtype),
        "loaded and cast": load(tmp_path).to(dtype),
        "a copy": copy.deepcopy(load(tmp_path, dtype=dtype)),
        "cast": model.half() if dtype == torch.float16 else model.bfloat16(),
    }
    for way, found in made.items():
        for name, parameter in found.named_parameters():
            kept = name.endswith(("A_log", "dt_bias"))
            assert parameter.dtype == (torch.float32 if kept else dtype), (way, name)
            assert getattr(parameter, "_no_weight_decay", False) == kept, (way, name)


@pytest.mark.parametrize(
    "missing", [("A_log",), ("A_log", "dt_bias"), ("v_conv1d.weight", "o_norm.weight")]
)
def test_missing_weights_are_initialised_and_the_rest_is_kept(
    build: Build, tmp_path: Path, missing: tuple[str, ...]
):
    """What a checkpoint lacks starts as in a new model; what it has is not touched."""
    model = build(mixers=["gka"])
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.rand_like(value) - 2)  # nothing that an initialisation would give
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    left = {k: v for k, v in load_file(path).items() if not k.endswith(missing)}
    save_file(left, path, metadata={"format": "pt"})
    torch.manual_seed(5)
    loaded = GKAForCausalLM.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert value.isfinite().all(), name
        assert torch.equal(value, model.state_dict()[name]) is not name.endswith(missing), name
    if missing == ("A_log", "dt_bias"):
        check_decay(loaded.get_submodule("model.layers.0.mixer"))
    if "o_norm.weight" in missing:
        assert (loaded.get_parameter("model.layers.0.mixer.o_norm.weight") == 1).all()
        assert loaded.get_parameter("model.layers.0.mixer.v_conv1d.weight").abs().max() <= 0.5


def test_construction_without_memory(build: Build):
    """On the meta device a model of any size can be described, for instance to count its parameters."""
    config = copy.deepcopy(build(mixers=EVERY).config)
    config.hidden_size = 4096
    with torch.device("meta"):
        model = GKAForCausalLM(config)
    assert all(value.is_meta for value in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_can_be_resized(build: Build, ids: Ids, tmp_path: Path, tied: bool):
    """More tokens: old logits stay, loss and generation work, and the new size is stored."""
    model, tokens = build(tie_word_embeddings=tied, num_hidden_layers=1), ids(1, 5)
    before = model(tokens).logits
    model.resize_token_embeddings(105)
    after = model(tokens, labels=tokens)
    assert torch.equal(after.logits[..., :97], before) and after.logits.shape[-1] == 105
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert model.train()(torch.full((1, 3), 104), labels=torch.full((1, 3), 104)).loss.isfinite()
    model.eval().save_pretrained(tmp_path)
    loaded = GKAForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 105
    assert torch.equal(loaded(tokens).logits, after.logits)


def test_options_may_be_changed_on_loading(build: Build, tmp_path: Path):
    """from_pretrained(num_iter=...) changes the solver's work, and a wrong value is refused."""
    build(mixers=["gka"]).save_pretrained(tmp_path)
    loaded = GKAForCausalLM.from_pretrained(tmp_path, num_iter=2)
    assert loaded.get_submodule("model.layers.0.mixer").num_iter == 2
    with pytest.raises(ValueError, match="num_iter"):
        GKAForCausalLM.from_pretrained(tmp_path, num_iter=-2)
    with pytest.raises(TypeError, match="num_iters"):
        GKAForCausalLM.from_pretrained(tmp_path, num_iters=2)
