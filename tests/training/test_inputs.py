"""A run's text: documents apart by default, several corpora, packed folders, streams, runs of before."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from gka.commands.main import app
from gka.data import byte_tokenizer, find_documents, make
from gka.errors import InputError
from gka.training import RunConfig
from gka.training.folder import _settings_checksum

Run = Callable[..., dict[str, Any]]
SHORT = {"max_steps": 4, "log_steps": 1, "save_steps": 2, "eval_steps": 4}


def _weights(output: Path) -> dict[str, Any]:
    return load_file(output / "model" / "model.safetensors")


def _same(a: Path, b: Path) -> bool:
    one, other = _weights(a), _weights(b)
    return all(one[key].equal(other[key]) for key in one)


def test_documents_apart_do_not_leak(run_tiny: Run, tmp_path: Path, text: Path) -> None:
    """Apart is the default. A sequence with several documents trains as they do one by one: twice as long
    sequences, which hold two documents where one held one, give the same weights; running ones do not."""
    apart = run_tiny(tmp_path / "apart", {"training": SHORT})
    assert apart["config"]["data"]["documents"] == "apart"
    assert apart["data"]["padding"] == pytest.approx(1 - 13 / 16)
    running = run_tiny(tmp_path / "running", {"data": {"documents": "running"}, "training": SHORT})
    assert running["data"]["padding"] == 0 and not _same(tmp_path / "apart", tmp_path / "running")
    # Eleven documents to train on: batches of all of them, in sequences of one or of two documents.
    steps = {"max_steps": 2, "gradient_accumulation": 1, "save_steps": 2, "eval_steps": 2}
    one = {"sequence_length": 13}, steps | {"batch_size": 12}
    two = {"sequence_length": 26}, steps | {"batch_size": 6}
    losses = []
    for name, (data, training) in (("one", one), ("two", two)):
        metrics = run_tiny(tmp_path / name, {"data": data, "training": training | {"log_steps": 1}})
        losses.append(metrics["evaluation"]["loss"])
        if name == "one":
            assert metrics["data"]["padding"] == 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_sources_of_a_run(run_tiny: Run, tmp_path: Path, text: Path) -> None:
    """A folder of packed tokens, and the same text streamed, train to the same weights as the text; of a
    stream the counts are not known. Loader processes change nothing."""
    reference = run_tiny(tmp_path / "text", {"training": SHORT})
    make(tmp_path / "packed", find_documents([str(text)]), byte_tokenizer())
    changes = {"data": {"text": [str(tmp_path / "packed")], "verify": True}, "training": SHORT}
    packed = run_tiny(tmp_path / "a", changes)
    assert packed["data"] == reference["data"] and _same(tmp_path / "a", tmp_path / "text")
    streamed = run_tiny(tmp_path / "b", {"data": {"stream_gb": 0.1}, "training": SHORT})
    assert streamed["data"]["tokens"] is None and _same(tmp_path / "b", tmp_path / "text")
    run_tiny(tmp_path / "c", {"training": SHORT | {"loader_workers": 1}})
    assert _same(tmp_path / "c", tmp_path / "text")


def test_several_corpora_resume_exactly(run_tiny: Run, tmp_path: Path, text: Path) -> None:
    """With weights each path is a corpus; the run resumes in the middle to the same weights."""
    other = tmp_path / "other"
    other.mkdir()
    for i in range(9):
        (other / f"{i}").write_text(f"other {i} words and more\n")
    data = {"text": [str(text), str(other)], "weights": [0.75, 0.25]}
    whole = run_tiny(tmp_path / "whole", {"data": data, "training": SHORT})
    assert whole["data"]["documents"] == 14 + 9
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for name in ("model", "checkpoints/checkpoint-4"):
        shutil.rmtree(tmp_path / "again" / name)
    (tmp_path / "again" / "metrics.json").unlink()
    metrics = run_tiny(tmp_path / "again", {"data": data, "training": SHORT}, resume=True)
    assert "checkpoint-2" in metrics["shown"] and _same(tmp_path / "whole", tmp_path / "again")
    with pytest.raises(InputError, match="2 for 1 texts"):
        run_tiny(tmp_path / "bad", {"data": {"weights": [0.5, 0.5]}})


def test_a_run_of_an_earlier_release_resumes(run_tiny: Run, tmp_path: Path, tables: Any) -> None:
    """run.json without the new keys is a run whose documents run on in the former order: it goes on so, to
    the weights of the former command."""
    old = {"data": {"documents": "former", "column": "", "eval_tokens": 0}, "training": SHORT}
    run_tiny(tmp_path / "whole", old)
    stored = json.loads((tmp_path / "whole" / "run.json").read_text())
    for key in ("documents", "column", "eval_tokens", "weights", "stream_gb", "verify", "workers"):
        del stored["config"]["data"][key]
    del stored["config"]["training"]["loader_workers"]
    stored["config_sha256"] = _settings_checksum(stored["config"])
    assert "tokens_sha256" in stored
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps(stored))
    for name in ("model", "checkpoints/checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "metrics.json").unlink()
    from gka.training.folder import resumed_config

    config = resumed_config(tmp_path / "run", {}, RunConfig)
    assert config.data.documents == "former"
    run_tiny(tmp_path / "run", old, resume=True)
    assert _same(tmp_path / "run", tmp_path / "whole")


def test_another_tokenizer_is_refused(run_tiny: Run, tmp_path: Path, text: Path) -> None:
    """A folder packed with another tokenizer is named with both fingerprints and what to do."""
    make(tmp_path / "packed", find_documents([str(text)]), byte_tokenizer())
    path = tmp_path / "packed" / "corpus.json"
    path.write_text(path.read_text().replace('"tokenizer": "', '"tokenizer": "0'))
    with pytest.raises(InputError, match="packed with another tokenizer: give that one"):
        run_tiny(tmp_path / "run", {"data": {"text": [str(tmp_path / "packed")]}})


def test_cuda_graphs_need_one_shape(run_tiny: Run, tmp_path: Path) -> None:
    """Batches of documents apart have bounds of another number each time: refused, with what to do."""
    with pytest.raises(InputError, match="give --documents running, or compile layers"):
        run_tiny(tmp_path / "run", {"training": {"compile": "cuda-graphs"}})


def test_the_command_packs_and_checks(tmp_path: Path, text: Path) -> None:
    """`gka tokenize` makes a folder that it opens again, verifies on request, and does not make twice."""
    output = tmp_path / "tokens"
    first = CliRunner().invoke(app, ["tokenize", str(text), "--output", str(output)])
    assert first.exit_code == 0 and "in 14 documents, 182 tokens" in first.output
    stamp = (output / "corpus.json").stat().st_mtime_ns
    shard = output / "000000.tokens"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    again = ["tokenize", str(text), "--output", str(output)]
    assert CliRunner().invoke(app, again).exit_code == 0
    refused = CliRunner().invoke(app, [*again, "--verify"])
    assert "checksum of 000000.tokens differs" in str(refused.exception)
    assert (output / "corpus.json").stat().st_mtime_ns == stamp
    negative = CliRunner().invoke(app, [*again, "--workers", "-1"])
    assert "workers is -1; expected 0" in str(negative.exception)
