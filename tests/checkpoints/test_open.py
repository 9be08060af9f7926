"""One way to open a model's folder: the same formats for every command, whole or refused."""

import inspect
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import foreign
from gka.checkpoints.open import load_gka, load_model, load_tokenizer_of, model_folder
from gka.data.text import byte_tokenizer
from gka.errors import InputError
from gka.models import GKAConfig, GKAForCausalLM

BYTES = 257
KINDS = ("ours", "llama", "hybrid", "fla", "fla_gated_deltanet")
Open = Callable[[Path], torch.nn.Module]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model over bytes in every format, and GPT-2, which only transformers can run; tokenizers beside."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": BYTES, "hidden_size": 16, "num_hidden_layers": 2}
    GKAForCausalLM(GKAConfig(**sizes, num_heads=2, head_dim=8)).save_pretrained(root / "ours")
    llama = LlamaConfig(**sizes, intermediate_size=24, num_attention_heads=2)
    LlamaForCausalLM(llama).save_pretrained(root / "llama")
    gpt2 = GPT2Config(
        vocab_size=BYTES, n_embd=16, n_layer=1, n_head=2, bos_token_id=256, eos_token_id=256
    )
    GPT2LMHeadModel(gpt2).save_pretrained(root / "gpt2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreign, "VOCABULARY", BYTES)
        config = foreign.hybrid_config("qwen3", "*-GKA-GDN")
        foreign.write(root / "hybrid", config, foreign.hybrid_weights(config), shards=2)
        for name, kind in (("fla", "gka"), ("fla_gated_deltanet", "gated_deltanet")):
            config = foreign.fla_config(kind, [1])
            foreign.write(root / name, config, foreign.fla_weights(config))
    for folder in root.iterdir():
        byte_tokenizer().save_pretrained(folder)
    return {folder.name: folder for folder in root.iterdir()}


def _generate(folder: Path) -> torch.nn.Module:
    """The model of `gka generate` and `gka inspect`."""

    from gka.checkpoints.open import load_with_tokenizer

    return load_with_tokenizer(folder)[0]


def _evaluate(folder: Path) -> torch.nn.Module:
    """The model of `gka evaluate`."""
    from gka.data import find_documents
    from gka.evaluation.context.run import Machine, Subject, _grader

    text = find_documents([inspect.getfile(GKAConfig)])
    return _grader(Subject.open(folder, text), Machine()).reader.model


def _harness(folder: Path) -> torch.nn.Module:
    """The model of `gka lm-eval --model gka`."""
    from gka.evaluation.harness_model import GKAHarnessModel

    return GKAHarnessModel(str(folder), device="cpu").model


def _prime(folder: Path) -> torch.nn.Module:
    """The teacher of `gka prime`."""
    from gka.training.priming.run import load_teacher

    return load_teacher(str(folder))


needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason='lm_eval is not installed: pip install -e ".[eval]"'
)
OPENERS = [
    pytest.param(load_model, id="load_model"),
    pytest.param(load_gka, id="load_gka"),
    pytest.param(_generate, id="generate"),
    pytest.param(_evaluate, id="evaluate"),
    pytest.param(_harness, id="lm-eval", marks=needs_lm_eval),
    pytest.param(_prime, id="prime"),
]
opened_by = pytest.mark.parametrize("opening", OPENERS)


def copy_with(folder: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a folder whose stored weights were changed; of several files, the first."""
    shutil.copytree(folder, target)
    file = min(target.glob("*.safetensors"))
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return target


@opened_by
@pytest.mark.parametrize("kind", KINDS)
def test_every_command_opens_every_format(folders: dict[str, Path], opening: Open, kind: str):
    """Each command's loader reads each format, and all of them get the same logits from it."""
    ids = torch.arange(9)[None] * 7
    wanted: Any = GKAForCausalLM.from_pretrained(folders[kind], dtype=torch.float32).eval()
    model: Any = opening(folders[kind])
    assert not model.training
    with torch.no_grad():
        found = model(input_ids=ids).logits.cpu()
        torch.testing.assert_close(found, wanted(input_ids=ids).logits)


@opened_by
@pytest.mark.parametrize("kind", KINDS)
def test_missing_weights_are_refused(
    folders: dict[str, Path], tmp_path: Path, opening: Open, kind: str
):
    """No command runs a model of any format with a weight that was made up."""
    lacking = copy_with(
        folders[kind], tmp_path / "lacking", lambda weights: weights.pop(max(weights))
    )
    with pytest.raises(InputError, match=r"missing|lacks"):
        opening(lacking)


@opened_by
@pytest.mark.parametrize("kind", KINDS)
def test_left_over_weights_are_refused(
    folders: dict[str, Path], tmp_path: Path, opening: Open, kind: str
):
    """No command drops a stored weight that the configuration has no place for; it is named."""
    name = "model.layers.1.norms.weight"
    fuller = copy_with(
        folders[kind], tmp_path / "fuller", lambda weights: weights.update({name: torch.ones(3)})
    )
    with pytest.raises(InputError, match=r"(left over|not provide for).*norms\.weight"):
        opening(fuller)


def test_models_of_transformers_keep_their_class(folders: dict[str, Path]):
    """`load_model` leaves to transformers what it has a class for; `load_gka` expresses it where it can."""
    assert type(load_model(folders["llama"])) is LlamaForCausalLM
    assert type(load_gka(folders["llama"])) is GKAForCausalLM
    assert type(load_model(folders["gpt2"])) is GPT2LMHeadModel
    with pytest.raises(InputError, match="of type 'gpt2', which GKAForCausalLM cannot express"):
        load_gka(folders["gpt2"])


def test_dtype_and_device(folders: dict[str, Path], tmp_path: Path):
    """Weights come as they are stored unless a dtype is asked for, and on the device that is named."""
    load_gka(folders["ours"], dtype="bfloat16").save_pretrained(tmp_path / "half")
    for load in (load_model, load_gka):
        assert load(tmp_path / "half").dtype == torch.bfloat16
        assert load(tmp_path / "half", dtype="float32").dtype == torch.float32
        assert load(tmp_path / "half", device="cpu").device == torch.device("cpu")
        assert load(tmp_path / "half", device="meta").device == torch.device("meta")


def test_a_run_is_opened_by_its_folder(folders: dict[str, Path], tmp_path: Path):
    """The folder of a run will do: model and tokenizer are those in its `model/`."""
    shutil.copytree(folders["ours"], tmp_path / "run" / "model")
    assert model_folder(tmp_path / "run") == tmp_path / "run" / "model"
    assert load_gka(tmp_path / "run").config.vocab_size == BYTES
    assert load_tokenizer_of(tmp_path / "run").eos_token_id == 256
    with pytest.raises(InputError, match=r"holds no config\.json; give the folder"):
        model_folder(tmp_path)


def test_tokenizers_are_there_readable_and_fit(folders: dict[str, Path], tmp_path: Path):
    """A folder without tokenizer, with a damaged one or with one of more ids is refused as that."""
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "llama"))
    tokenizer = load_tokenizer_of(folder)
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(folder)
    for opening in (_generate, _evaluate):
        with pytest.raises(InputError, match="its tokenizer has 258 ids, the model 257"):
            opening(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer of .* cannot be loaded"):
        load_tokenizer_of(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="has no tokenizer beside it"):
        load_tokenizer_of(folder)
