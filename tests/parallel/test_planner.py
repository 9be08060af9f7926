"""Plans agree with what was measured, and say what would fit."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gka.commands.main import app
from gka.errors import InputError
from gka.models import GKAConfig
from gka.parallel import Layout
from gka.parallel.planner import Job, Plan, make_plan, read_card
from gka.parallel.planner.exchange import context_bytes

PAGE = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
LINES = PAGE.splitlines()


def _job(mixer: str = "gka", length: int = 2048, **changes: Any) -> Job:
    """The 395 M model of benchmarks/model/sizes.py, bfloat16 weights."""
    sizes = {"vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 24, "num_heads": 8}
    config = GKAConfig(**(sizes | {"mixer": mixer} | changes.pop("model", {})))
    micro = changes.pop("micro", 8 if length == 2048 else 1)
    blocks = changes.pop("blocks", micro)
    return Job(config, length, micro, blocks, 1, **{"autocast": False, **changes})


def _plan(job: Job) -> Plan:
    return make_plan(job, read_card("h200"))


def _row(first: str) -> list[float]:
    """The first number of each cell of the page's row that begins so, in the table of whole models."""
    page = LINES[LINES.index("## Whole models") :]
    line = next(line for line in page if line.startswith(f"| {first} |"))
    cells = [cell.replace(",", "") for cell in line.split("|")[2:-1]]
    return [float(m[0]) for cell in cells if (m := re.match(r"\s*\d+(\.\d+)?", cell))]


@pytest.mark.parametrize(
    ("row", "mixer", "steps"),
    [
        ("gka, 30 steps", "gka", 30),
        ("gka, 8 steps", "gka", 8),
        ("gated_deltanet", "gated_deltanet", 30),
        ("attention", "attention", 30),
    ],
)
def test_steps_of_8_x_2048_are_as_measured(row: str, mixer: str, steps: int) -> None:
    """Step time, tokens/s, the sum of the kernels and the peak of docs/performance.md, within 15 %."""
    ms, speed, *_, kernels, gib, _ = _row(row)
    found = _plan(_job(mixer, model={"num_iter": steps}))
    assert 1e3 * found.seconds == pytest.approx(ms, rel=0.15)
    assert found.tokens_per_second == pytest.approx(speed, rel=0.15)
    assert 1e3 * found.work.device == pytest.approx(kernels, rel=0.15)
    assert found.memory.total / 2**30 == pytest.approx(gib, rel=0.15)


@pytest.mark.parametrize("way", ["none", "selective", "full"])
def test_a_long_sequence_with_checkpointing_is_as_measured(way: str) -> None:
    """1 x 32768 tokens: time and peak of docs/performance.md within 15 %."""
    ms, _, gib = _row(way)
    found = _plan(_job(length=32768, checkpointing=way))
    assert 1e3 * found.seconds == pytest.approx(ms, rel=0.15)
    assert found.memory.total / 2**30 == pytest.approx(gib, rel=0.15)


def test_kept_states_are_counted() -> None:
    """134 MB a GKA layer of 8 heads of 128 and 16384 tokens, and none of a mixer that keeps no states."""
    for mixer, bytes_ in (("gka", 24 * 2 * 256 * 8 * 128 * 256), ("attention", 0)):
        plain, kept = (_plan(_job(mixer, keep_states=keep)).memory for keep in (False, True))
        assert kept.activations - plain.activations == bytes_


@pytest.mark.parametrize(
    ("length", "layout", "micro", "ms"),
    [
        (2048, Layout(), 8, 155.9),
        (2048, Layout(dp_shard=2), 8, 283.8),
        (65536, Layout(), 1, 575.0),
        pytest.param(131072, Layout(cp=2), 1, 746.2, marks=pytest.mark.xfail(strict=True)),
    ],
)
def test_steps_of_the_440_m_model_on_two_gpus(
    length: int, layout: Layout, micro: int, ms: float
) -> None:
    """Within 15 % of docs/performance.md, dp_shard by FSDP2's time on the host, which was taken from its
    row; ranks of cp wait for each other longer than the plan knows."""
    assert f"{ms} (" in PAGE
    model = {"num_hidden_layers": 28, "num_heads": 8, "tie_word_embeddings": False}
    blocks = micro * layout.readers
    job = _job(length=length, layout=layout, micro=micro, blocks=blocks, autocast=True, model=model)
    assert 1e3 * _plan(job).seconds == pytest.approx(ms, rel=0.15)


def test_a_small_model_is_bound_by_the_host() -> None:
    """28 M parameters: 48.9 ms a step, of which kernels fill 28.5, and the plan says why."""
    small = {"vocab_size": 256, "hidden_size": 512, "num_hidden_layers": 8}
    found = _plan(_job(length=1024, micro=32, model=small, autocast=True))
    found_in = re.search(r"compiled layers ([\d.]+) ms.*kernels take ([\d.]+) ms", PAGE)
    assert found_in
    ms, kernels = map(float, found_in.groups())
    assert 1e3 * found.seconds == pytest.approx(ms, rel=0.15)
    assert 1e3 * found.work.device == pytest.approx(kernels, rel=0.15)
    assert any("host is the bound" in text for text in found.warnings())


def test_exchanges_are_counted_by_kind() -> None:
    """One GPU exchanges nothing; of context parallelism (K^2 + KV + 1) H float32 a layer leave each way,
    and three queries, keys and values; of attention the keys and values that later ranks read."""
    assert _plan(_job()).exchange.total == 0
    job = _job(length=32768, layout=Layout(cp=4))
    halo = 24 * 2 * 2 * 3 * 3 * 1024
    assert context_bytes(job) == 24 * 2 * 3 * 4 * 8 * (2 * 128**2 + 1) + halo
    window = _job("swa", 32768, layout=Layout(cp=4), model={"sliding_window": 9000})
    assert context_bytes(window) == 24 * 2 * 2 * 2 * 8999 * 1024
    whole = _plan(job)
    assert whole.exchange.tp == whole.exchange.dp_replicate == 0 < whole.exchange.cp
    shared = _plan(_job(layout=Layout(dp_shard=8), blocks=64))
    assert shared.exchange.dp_shard == pytest.approx(7 / 8 * 6 * shared.job.parameters)
    assert shared.memory.weights == shared.job.parameters * 2 / 8
    copies = _plan(_job(layout=Layout(dp_replicate=2), blocks=16)).exchange
    assert copies.dp_replicate == 2 * shared.job.parameters and copies.dp_shard == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": Layout(tp=3)}, r"tp = 3 does not divide 8 gka num_heads.*fits: 1, 2, 4, 8"),
        ({"layout": Layout(cp=33)}, r"cp = 33 does not fit sequences of 2048.*fits: 1, 2, 4, 8"),
        ({"layout": Layout(dp_shard=3), "blocks": 16}, r"16 sequences.*dp_shard = 1, 2;"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    """Heads, sequences and batch: the error names the number and what would fit."""
    with pytest.raises(InputError, match=message):
        _plan(_job(**changes))


def test_too_little_memory_is_told_with_what_would_fit() -> None:
    """The advice of a plan that does not fit is one that does."""
    found = _plan(_job(length=32768, micro=16, blocks=16))
    assert not found.fits
    match = re.search(
        r"batch_size = (\d+) with gradient_checkpointing = '([\w-]+)'", found.warnings()[0]
    )
    assert match
    assert _plan(_job(length=32768, micro=int(match[1]), blocks=16, checkpointing=match[2])).fits


@pytest.mark.parametrize(
    ("recipe", "millions", "tokens"),
    [
        ("440m", 450.1, 8.0e9), ("1b", 959.2, 20e9), ("2.8b", 2901.5, 100e9),
        ("2.8b-128k", 2901.5, 25e9), ("hybrid", 2700.6, 100e9),
    ],
)  # fmt: skip
def test_the_papers_recipes_have_their_sizes(recipe: str, millions: float, tokens: float) -> None:
    """`gka plan` shows parameters and tokens as the recipe's comments have them."""
    asked = ["plan", recipe, "--gpus", "8", "--json"]
    result = CliRunner().invoke(app, asked, catch_exceptions=False)
    found = json.loads(result.output)
    assert found["parameters"] / 1e6 == pytest.approx(millions, rel=2e-3)
    assert found["tokens"] == pytest.approx(tokens, rel=2e-3)
    assert found["gpu_hours"] == pytest.approx(8 * 24 * found["days"])


def test_the_command_refuses_other_numbers_of_gpus_and_shows_a_table() -> None:
    """A product of ranks that is not --gpus is an error; the recipe's own numbers are taken where none are
    given; the table has every part of a plan."""
    run = CliRunner().invoke
    wrong = run(app, ["plan", "440m", "--gpus", "8", "--tp", "3"])
    assert "are 6 GPUs, and --gpus is 8" in str(wrong.exception)
    own = run(app, ["plan", "440m", "--gpus", "4", "--set", "parallel.tp=2", "--json"])
    assert json.loads(own.output)["ranks"] == {"dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 2}
    shown = run(app, ["plan", "440m"], catch_exceptions=False, env={"COLUMNS": "200"}).output
    for part in ("memory a GPU", "step time", "tokens/s", "GPU hours", "MFU", "exchanged a step"):
        assert part in shown


def test_a_card_is_measured_and_read(tmp_path: Path) -> None:
    """`--measure` on this machine writes a file that `--card` takes, with positive figures."""
    path = tmp_path / "card.json"
    asked = ["plan", "440m", "--measure", str(path), "--device", "cpu", "--card", str(path)]
    result = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert result.exit_code == 0
    card = read_card(str(path))
    assert min(*card.product_tflops.values(), card.solve_tflops, card.traffic_tbs) > 0
    with pytest.raises(InputError, match="card 'h500' is unknown; known: h200"):
        read_card("h500")
