"""Configuration of a training run: the tables data, model, training and parallel."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from gka.data.weights import check_weights
from gka.errors import InputError
from gka.training.settings import Table, Tables, build_tables, check_tables, require, setting

DTYPES = ("float32", "bfloat16")
COMPILE = ("auto", "layers", "model", "cuda-graphs", "off")
_, ON, OFF = SAVE_ASYNC = ("auto", "on", "off")
CHECKPOINTING = ("none", "full", "selective", "selective-products")
"""Of activations; `gka.models.recomputation` has what each keeps."""
MOST_SEED = 2**32 - 1
"""Largest seed that every random number generator takes (NumPy's has 32 bits)."""
YOURS = "yours"
"""Value of settings that a recipe cannot have: text, tokenizer, a model to start from."""
STANDARD_LIBRARY_HELD_OUT = 0.002
"""`eval_fraction` if no text is given: a small share of the standard library suffices and is quick."""
APART, RUNNING, FORMER = DOCUMENTS = ("apart", "running", "former")
# Set from the tokenizer, so that model and data agree.
FROM_TOKENIZER = ("vocab_size", "eos_token_id", "pad_token_id", "bos_token_id")
_MATRICES = "Of matrices and convolutions; A_log, dt_bias, norms, biases and embeddings have none."


@dataclass(frozen=True, kw_only=True)
class DataConfig(Table):
    """Table [data]: the text, its tokenizer and the blocks cut from it."""

    text: tuple[str, ...] = setting(
        (),
        "Text files and folders (UTF-8).",
        option=True,
        metavar="PATH",
        shown="Python's standard library",
    )
    glob: str = setting("*", 'Which files of folders, such as "*.py".', option=True)
    tokenizer: str = setting(
        "bytes", "bytes, or a Hugging Face tokenizer's folder or name.", option=True
    )
    sequence_length: int = setting(256, "Tokens per block.", option=True, least=2)
    # For the standard library `RunConfig.from_tables` takes `STANDARD_LIBRARY_HELD_OUT` instead.
    eval_fraction: float = setting(
        0.01, "Share of the tokens held out, by whole documents.", above=0, below=1
    )
    without_text: str = setting(
        "standard-library",
        "Where no text is given: Python's standard library, or an error, for recipes that need one's own.",
        choices=("standard-library", "error"),
    )
    hash_sources: bool = setting(
        False,
        "Detect changed text by its checksum, for which all of it is read before each run; otherwise by "
        "names, paths, sizes, inodes and times of modification and change.",
    )
    column: str = setting(
        "text",
        "Column of .jsonl, .jsonl.gz and .parquet files that holds the text, each row a document; '' reads "
        "all files as plain text.",
        option=True,
    )
    workers: int = setting(
        0,
        "Processes that tokenise.",
        option=True,
        shown="one a core, if there is text enough",
        least=0,
        most=1024,
    )

    table: ClassVar[str] = "data"


@dataclass(frozen=True, kw_only=True)
class CorpusConfig(DataConfig):
    """Table [data] of `gka train`: one text or several with weights, and what sequences are made of."""

    weights: tuple[float, ...] = setting(
        (),
        "Makes each PATH a corpus of its own, with this share of the training sequences; sum 1, as in "
        "0.7,0.3.",
        option=True,
        metavar="X,X",
    )
    documents: str = setting(
        APART,
        "apart: several in a sequence, each seeing itself only; running: cut from one running text; former: "
        "running, in the order of earlier releases, which their runs keep.",
        option=True,
        choices=DOCUMENTS,
    )
    eval_tokens: int = setting(
        4_000_000, "Tokens of a corpus held out at most; 0: no limit but eval_fraction.", least=0
    )
    stream_gb: float = setting(
        0.0,
        "Tokenise while training and keep at most so many GiB of tokens on the disk; 0 tokenises all of it "
        "first.",
        option=True,
        least=0,
    )
    verify: bool = setting(False, "Compare all packed tokens with their checksums before training.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights:
            check_weights(self.weights, len(self.text))
        if self.documents == FORMER:
            self.require(not self.weights, "weights", "none with data.documents = 'former'")
            self.require(not self.stream_gb, "stream_gb", "0 with data.documents = 'former'")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Fields of `gka.models.GKAConfig` for which `gka train` has an option or a default of its own.

    The defaults give a model that two CPU cores train in minutes.
    """

    mixer: str = setting(
        "gka", "gka, attention, swa, gla, deltanet or gated_deltanet.", option=True
    )
    attention_layers: list[int] | None = setting(
        None,
        "Layers, counted from 0, with attention instead, as in 1,3.",
        option=True,
        metavar="N,N",
    )
    hidden_size: int = setting(128, "Width of the model.", option=True)
    num_hidden_layers: int = setting(2, "Number of layers.", option=True)
    num_heads: int = setting(4, "Heads of a layer, each hidden_size / num_heads wide.", option=True)
    tie_word_embeddings: bool = setting(True, "One matrix for the embedding and the output.")
    start: str | None = setting(
        None, "Saved model with whose weights training begins.", option=True, metavar="FOLDER"
    )


MODEL_DEFAULTS = {f.name: f.default for f in fields(ModelSettings) if f.default is not None}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Table):
    """Table [training]: AdamW, a linear warm-up, then a cosine to zero; gradients are clipped.

    The defaults are those of recipes/cpu.toml: minutes on a laptop.
    """

    max_steps: int = setting(1300, "Optimizer steps.", option=True, by_table=True, least=1)
    batch_size: int = setting(2, "Blocks per forward pass on each device.", option=True, least=1)
    gradient_accumulation: int = setting(1, "Forward passes per optimizer step.", least=1)
    learning_rate: float = setting(
        4e-3, "Highest learning rate.", option=True, by_table=True, above=0
    )
    warmup_steps: int = setting(50, "Steps over which the learning rate rises.", least=0)
    weight_decay: float = setting(0.01, _MATRICES, least=0)
    max_grad_norm: float = setting(
        1.0, "Gradients are scaled down to this norm; 0 does not clip.", least=0
    )
    adam_beta2: float = setting(0.95, "AdamW's second decay rate.", above=0, below=1)
    dtype: str = setting(
        "float32",
        "Of the computation (autocast); weights are float32.",
        option=True,
        choices=DTYPES,
    )
    compile: str = setting(
        "auto",
        "torch.compile of the layers one by one, of the model as a whole (a longer first step), that "
        "replayed as CUDA graphs (faster for models below about 100 M parameters), or off; auto: layers on a "
        "GPU, off on a CPU.",
        option=True,
        choices=COMPILE,
    )
    gradient_checkpointing: str = setting(
        "none",
        "What the backward pass recomputes to save memory: full: whole layers; selective: all but the "
        "sequence operators (solve, delta rule, attention); selective-products: nor matrix products.",
        choices=CHECKPOINTING,
    )
    keep_states: bool = setting(
        False,
        "Keep the GKA layers' states at chunk starts for the backward pass: a scan less for 2 H K (K + V) "
        "bytes a layer and 64 tokens. On GPUs only.",
    )
    spike_threshold: float = setting(
        10.0,
        "A loss this many robust standard deviations above the median of the last 64 is a spike, and its "
        "step is skipped; 0: never.",
        least=0,
    )
    max_skipped: int = setting(
        10,
        "Skipped steps (spikes, and losses or gradients that are not finite) that a run bears in 100.",
        least=0,
    )
    health_steps: int = setting(
        200, "Steps between two measurements of the GKA layers for log.jsonl; 0: none.", least=0
    )
    health_tokens: int = setting(512, "Tokens that are read for it.", least=1)
    tensorboard: bool = setting(False, "Write TensorBoard's events beside log.jsonl.", option=True)
    log_steps: int = setting(10, "Steps between two logged losses.", least=1)
    eval_steps: int = setting(260, "Steps between two evaluations.", least=1)
    save_steps: int = setting(260, "Steps between two checkpoints.", least=1)
    save_async: str = setting(
        "auto",
        "Write checkpoints, sharded ones, while training goes on; auto: if there are several processes.",
        choices=SAVE_ASYNC,
    )
    loader_workers: int = setting(
        0, "Processes that prepare batches; 0: the training process itself.", least=0, most=1024
    )
    # At least two, so that one is whole while the next is written.
    keep_checkpoints: int = setting(2, "Newest checkpoints that are kept.", least=2)
    seed: int = setting(
        0, "Of initial weights and data order.", option=True, least=0, most=MOST_SEED
    )

    table: ClassVar[str] = "training"


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Table):
    """Table [parallel]: how the processes that torchrun started share the work.

    The product of the four numbers is the number of processes. Another product may resume a run: the global
    batch stays.
    """

    dp_shard: int = setting(
        0,
        "Ranks that share parameters, gradients and optimizer (FSDP2), each with blocks of its own; 0: all "
        "that the other numbers leave.",
        option=True,
        shown="the rest",
        least=0,
    )
    dp_replicate: int = setting(1, "Copies of such a group of ranks.", option=True, least=1)
    tp: int = setting(
        1, "Ranks that share each layer's heads and MLP columns.", option=True, least=1
    )
    cp: int = setting(1, "Ranks that share each sequence.", option=True, least=1)

    table: ClassVar[str] = "parallel"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A complete training run. `model` holds fields of `gka.models.GKAConfig`, which checks them."""

    data: CorpusConfig = field(default_factory=CorpusConfig)
    model: Mapping[str, Any] = field(default_factory=lambda: dict(MODEL_DEFAULTS))
    training: TrainingConfig = field(default_factory=TrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def tables(self) -> Tables:
        """The run as tables of JSON and TOML values; `from_tables` is the inverse."""
        data = dataclasses.asdict(self.data)
        data["text"], data["weights"] = list(self.data.text), list(self.data.weights)
        return {
            "data": data,
            "model": dict(self.model),
            "training": dataclasses.asdict(self.training),
            "parallel": dataclasses.asdict(self.parallel),
        }

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any]) -> "RunConfig":
        """A run from tables; absent keys have their defaults.

        Raises:
            InputError: a table or key is unknown, of the wrong type or out of range; the message names it.
        """
        check_tables(tables, ("data", "model", "training", "parallel"))
        data = dict(tables.get("data", {}))
        if not data.get("text"):
            data.setdefault("eval_fraction", STANDARD_LIBRARY_HELD_OUT)
        kinds = {"data": CorpusConfig, "training": TrainingConfig, "parallel": ParallelConfig}
        keys = {"model": [setting.name for setting in fields(ModelSettings)]}
        built = build_tables(kinds, {**tables, "data": data}, keys)
        return cls(model=_complete(tables.get("model", {})), **built)


def _complete(given: Mapping[str, Any]) -> dict[str, Any]:
    """The [model] table with defaults for absent keys that given keys do not determine."""
    for key in FROM_TOKENIZER:
        require(key not in given, f"model.{key}", given.get(key), "absent: the tokenizer sets it")
    if "mixers" in given and "mixer" in given:
        raise InputError("model.mixer and model.mixers both name mixers; give one of them")
    model = {**MODEL_DEFAULTS, **given}
    if "mixers" in given:  # one name per layer, which also gives the number of layers
        model = {
            k: v for k, v in model.items() if k in given or k not in ("mixer", "num_hidden_layers")
        }
    width, heads = model["hidden_size"], model["num_heads"]
    if "head_dim" not in model and isinstance(heads, int) and isinstance(width, int) and heads > 0:
        from gka.layers.parts.heads import default_head_dim  # loads torch

        model["head_dim"] = default_head_dim(width, heads)
    return model
