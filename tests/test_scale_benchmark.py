"""The benchmark of scaling on a CPU: what it measures, compares and predicts, and what a failure ends."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    # processes of a launch import the benchmark from here as well
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{ROOT}")
    from benchmarks.scale import bench

    return bench


@pytest.fixture
def scale(bench):
    from benchmarks.scale import cells, launch, report, trace

    return {"cells": cells, "launch": launch, "report": report, "trace": trace, "bench": bench}


def test_two_processes_and_a_plan_of_four(bench, monkeypatch, tmp_path, capsys):
    """One launch checks both layouts of two ranks against one and measures their cells; four are predicted,
    marked so and named in a message; a second run with the same --output measures nothing."""
    words = [
        "--tiny",
        "--gpus",
        "2,4",
        "--rows",
        "dp,cp64k,mixed",
        "--steps",
        "2",
        "--warm-up",
        "1",
    ]
    words += ["--output", str(tmp_path)]
    bench.main(words)
    found = json.loads((tmp_path / "scale.json").read_text())
    assert len(found["checks"]["2"]["layouts"]) == 4 and found["checks"]["2"]["status"] == "ok"
    for key, tokens in {"dp/2": 2 * 2 * 64, "cp64k/2": 2 * 128}.items():
        cell = found["cells"][key]
        assert (
            cell["status"] == "ok"
            and cell["tokens"] == tokens
            and len(cell["step_ms"]) == (8 if key == "dp/2" else 2)
        )
        assert cell["loss"][1] < cell["loss"][0] and cell["plan"]["step_ms"] > 0
    assert {k for k, x in found["cells"].items() if x["status"] == "predicted"} == {
        "dp/4", "cp64k/4", "mixed/4",
    }  # fmt: skip
    out, page = capsys.readouterr().out, (tmp_path / "scale.md").read_text()
    assert "cells of 4 are predicted by the planner, not measured" in out
    assert "| mixed | 4 | dp_shard 2 x cp 2 | 256 | 512 | predicted |" in page
    assert "cp 2, float32: loss" in page and (tmp_path / "scale.png").exists()
    monkeypatch.setattr(bench.Launch, "run", lambda *_: pytest.fail("measured again"))
    bench.main(words)


PROCESS = """
import json, os, sys, time
from pathlib import Path
spec = json.loads(Path(sys.argv[1]).read_text())
folder, rank = Path(spec["folder"]), int(os.environ["RANK"])
def write(name, found):
    part = folder / f"{name}.part"
    part.write_text(json.dumps(found))
    part.rename(folder / f"{name}.json")
def tell(key, found):
    write(f"cell-{key.replace('/', '-')}", {"key": key, "found": found})
for cell in spec["cells"]:
    key = f"{cell['row']}/{cell['gpus']}"
    if rank == 0:
        write("begun", {"key": key, "time": time.time()})
    if cell["row"] == "dp-kept":
        time.sleep(60)
    if cell["row"] == "cp256k" and rank == 1:
        sys.exit(3)
    if cell["row"] == "cp256k":
        time.sleep(60)
    if cell["row"] == "cp64k" and cell["ways"][0] == "none":
        if rank == 1:
            told = {"key": key, "way": "none", "message": "no memory", "time": time.time()}
            write("memory-cp64k-2-1", told)
        time.sleep(60)
    if rank == 0:
        tell(key, {"status": "ok", "checkpoint": cell["ways"][0]})
"""


@pytest.fixture
def launched(scale, monkeypatch, tmp_path):
    """Cells of these rows on two scripted processes: what a launch finds."""
    launch = scale["launch"]
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    real = launch.subprocess.Popen

    def scripted(words, **options):
        return real([sys.executable, "-S", str(script), words[-1]], **options)

    monkeypatch.setattr(launch.subprocess, "Popen", scripted)
    for name in ("PATIENCE", "AFTER_LOSS"):
        monkeypatch.setattr(launch, name, 0.3)
    monkeypatch.setattr(launch, "OPEN", 0.05)

    def call(*rows: str, seconds: float = 60.0) -> dict:
        cells = scale["cells"]
        cell = cells.Cell("dp", 2, (1, 2, 1, 1), 1, 64, True, "off", cells.TRIED, 1, 1, 0.1)
        found: dict[str, dict] = {}
        run = launch.Launch(
            tmp_path / "processes",
            "cpu",
            True,
            time.time() + seconds,
            1.0,
            (),
            found.__setitem__,
            print,
        )
        run.run(2, [replace(cell, row=row) for row in rows], False, seconds)
        return found

    return call


def test_a_cell_that_fails_ends_alone(launched):
    """A hang, a lost rank and a lack of memory on one rank end their cell; the others are measured, and
    more checkpointing is tried where memory was missing."""
    found = launched("dp-kept", "dp", "cp256k", "cp64k", "mixed")
    assert {key: cell["status"] for key, cell in found.items()} == {
        "dp-kept/2": "failed", "dp/2": "ok", "cp256k/2": "failed", "cp64k/2": "ok", "mixed/2": "ok",
    }  # fmt: skip
    assert found["dp-kept/2"]["message"] == "not done after 1 s"
    assert found["cp256k/2"]["message"] == "a process ended with 3"
    assert found["cp64k/2"]["checkpoint"] == "selective"


def test_what_time_does_not_suffice_for_is_named(launched):
    """At the end of its time a launch ends, and cells without figures are not measured."""
    found = launched("dp", "dp-kept", "mixed", seconds=0.7)
    assert found["dp/2"]["status"] == "ok"
    for row in ("dp-kept", "mixed"):
        assert found[f"{row}/2"] == {"status": "not measured", "message": "the time was spent"}


def test_rows_keep_the_tokens_of_a_gpu(scale):
    """Every cell of a row has the tokens of its GPU times the GPUs; cp256k reaches two million in a sequence;
    checkpointing is the least that one GPU's plan allows."""
    cells = scale["cells"]
    from gka.parallel.planner import read_card

    asked = cells.Asked(False, tuple(cells.ROWS), ("dp",), "auto", 8, 5, 2)
    card = read_card("h200")
    for gpus in (1, 2, 4, 8):
        for cell in cells.make_cells(asked, gpus, card):
            each = 8 * 2048 if cell.row.startswith("dp") else cells.ROWS[cell.row].tokens
            assert cell.tokens == gpus * each and cell.layout.ranks == gpus
    found = {cell.row: cell for cell in cells.make_cells(asked, 8, card)}
    assert found["cp256k"].length == 2**21 and found["cp256k"].ways == ("selective", "full")
    assert found["mixed"].layout == cells.Layout(dp_shard=4, cp=2)
    assert found["dp"].compiled == "layers" and found["cp64k"].compiled == "off"
    assert "mixed" not in {cell.row for cell in cells.make_cells(asked, 2, card)}
    fields = cells.model_fields(False)
    assert fields["num_hidden_layers"] == 28 and fields["vocab_size"] == 32000


def test_time_of_collectives_counts_once(scale):
    """Kernels that overlap count once; a collective is alone where no other kernel runs."""
    trace = scale["trace"]
    found = trace.fractions([(0, 4), (2, 6)], [(0, 3), (5, 10)])
    assert found == {"nccl_share": pytest.approx(0.6), "nccl_alone": pytest.approx(0.2)}
    assert trace.fractions([], []) == {"nccl_share": 0.0, "nccl_alone": 0.0}


def cell(row: str, gpus: int, ms: float, status: str = "ok", planned: float = 100.0) -> dict:
    found = {
        "row": row, "gpus": gpus, "sizes": [1, gpus, 1, 1], "length": 2048, "tokens": 16384 * gpus,
        "compiled": "layers", "checkpoint": "none", "flops_per_token": 4e9, "peak_tflops": 989.4,
        "plan": {"step_ms": planned, "bytes": 2**30, "exposed_ms": 0.0}, "status": status,
    }  # fmt: skip
    if status == "ok":
        found |= {
            "step_ms": [ms, ms, ms + 1],
            "peak_bytes": 2**31,
            "nccl_share": 0.1,
            "nccl_alone": 0.01,
        }
    return found


def test_efficiency_goals_and_the_planners_error(scale):
    """Efficiency is tokens/s/GPU over those of one GPU, of plans over the plan; goals and the planner's
    largest error stand below the table; failed cells are named."""
    report = scale["report"]
    cells = [cell("dp", 1, 100.0), cell("dp", 4, 110.0), cell("dp", 8, 0, "predicted", 125.0)]
    cells.append(cell("dp", 2, 0, "failed") | {"message": "out of memory"})
    result = {"cells": {f"{x['row']}/{x['gpus']}": x for x in cells}, "checks": {}}
    assert report.efficiency(result, cells[1]) == pytest.approx(100 / 110)
    assert report.efficiency(result, cells[2]) == pytest.approx(100 / 125)
    assert report.mfu(cells[0]) == pytest.approx(4e9 * 163840 / 989.4e12)
    lines = report.table(result)
    assert [line[report.HEAD.index("state")] for line in lines] == [
        "measured", "failed", "measured", "predicted",
    ]  # fmt: skip
    assert "-9.1%" in lines[2] and lines[1][report.HEAD.index("tokens/s")] == ""
    told = report.verdicts(result)
    assert told[0] == "dp: 90.9% efficiency on 4 GPUs (goal 90%)"
    assert told[1] == "planner within 15% of 2 of 2 cells, at most 9.1% off"
    assert report.missing(result) == ["dp on 2 GPUs: failed: out of memory"]


def test_stored_results_are_reported_together(bench, tmp_path):
    """--from writes one table of several files, where measured cells replace others, with the plans of other
    numbers of GPUs; another card is refused."""
    shared = {
        "card": "NVIDIA H200", "versions": {"torch": "2"},
        "commit": "abc", "there": 4, "date": "today", "planner": "card h200", "checks": {},
        "settings": {"steps": 5, "warm_up": 2, "sequences": 8, "tiny": True},
    }  # fmt: skip
    files = []
    for number, cells in enumerate((
        {"dp/1": cell("dp", 1, 100.0), "dp/4": cell("dp", 4, 0, "predicted")},
        {"dp/4": cell("dp", 4, 104.0)},
        {"dp/4": cell("dp", 4, 0, "failed") | {"message": "lost"}},
    )):  # fmt: skip
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps(shared | {"cells": cells, "command": f"command {number}"}))
    bench.main(["--output", str(tmp_path), "--from", *map(str, files)])
    page = (tmp_path / "scale.md").read_text()
    assert "| dp | 8 | dp_shard 8 | 64 | 4,096 | predicted | layers |" in page
    assert "96.2%" in page and "failed" not in page and "`command 0; command 1; command 2`" in page
    files[0].write_text(json.dumps(shared | {"card": "another", "cells": {}, "command": ""}))
    with pytest.raises(SystemExit, match="another card"):
        bench.main(["--output", str(tmp_path), "--from", *map(str, files)])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpus", "1,x"], "numbers of GPUs from 1 on"),
        (["--rows", "tp"], "there are dp, dp-kept, cp64k, cp256k, mixed"),
        (["--tiny", "--steps", "0"], "--steps must be 1 or more"),
    ],
)
def test_options_that_do_not_fit_are_named(bench, words, told, capsys):
    """A wrong number, row or count ends the command with what would fit."""
    with pytest.raises(SystemExit):
        bench.parse(None, words)
    assert told in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(bench, tmp_path):
    """Without a GPU and --tiny nothing is written."""
    with pytest.raises(SystemExit, match="no GPU that torch can use; --tiny"):
        bench.main(["--output", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()
