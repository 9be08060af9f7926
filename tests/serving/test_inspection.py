"""Inspection: its figures are those of the layers' own inputs, found another way."""

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matplotlib.transforms import Bbox
from rich.console import Console
from torch import Tensor

from gka.errors import InputError
from gka.maths.solvers.exact import exact_solve
from gka.models import GKACache, GKAForCausalLM, cache_tensors
from gka.ops import solver_steps
from gka.serving import inspect_model
from gka.serving.inspection_page import layer_figure, overview, page, round_range, table, tick_text
from tolerances import assert_close

Build = Callable[..., GKAForCausalLM]
Ids = Callable[..., Tensor]


def inputs(model: GKAForCausalLM, tokens: Tensor) -> tuple[Any, ...]:
    """(q, k, g, beta, alpha) of the first layer, in float64, beta applied to k."""
    seen: dict[str, Any] = {}
    mixer: Any = model.model.layers[0].mixer
    mix = mixer.mix
    mixer.mix = lambda q, k, v, gates, run: (
        seen.update(q=q, k=k, gates=gates) or mix(q, k, v, gates, run)
    )
    with torch.no_grad():
        model(tokens, use_cache=False)
    del mixer.mix
    gates = seen["gates"]
    return seen["q"], seen["k"] * gates.beta[..., None], gates.g, gates.beta, gates.alpha


@pytest.mark.parametrize("chunk", [4096, 7])
@pytest.mark.parametrize("kk", [True, False])
@torch.no_grad()
def test_figures_equal_the_definitions(build: Build, ids: Ids, chunk: int, kk: bool):
    """H by its recursion, its norm, ridge, eigenvalues, decay sums and quantiles, token by token in float64:
    the inspection says the same at every place, whatever the chunks."""
    model, tokens = build(use_forgetting_gate_kk=kk, dtype=torch.float64), ids(1, 40)
    found = inspect_model(model, tokens, positions=40, chunk=chunk)
    layer = found["layers"][0]
    q, k, g, beta, alpha = inputs(model, tokens)
    h, memory = torch.zeros(4, 8, 8, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    bound = 51.0
    assert layer["condition_bound"] == pytest.approx(bound) and found["positions"] == [*range(40)]
    for t in range(40):
        gamma = g[0, t].exp() if kk else torch.ones(4, dtype=torch.float64)
        h = gamma[:, None, None] * h + k[0, t][:, :, None] * k[0, t][:, None]
        memory = gamma * memory + 1
        fro = h.flatten(1).norm(dim=1)
        values = torch.linalg.eigvalsh(h + 0.02 * fro[:, None, None] * torch.eye(8))
        condition = values[:, -1] / values[:, 0]
        for name, expected in (
            ("fro", fro), ("lambda", 0.02 * fro), ("condition", condition), ("memory", memory),
        ):  # fmt: skip
            assert_close(
                torch.tensor(layer["curves"][name][t], dtype=torch.float64), expected, 1e-8, name
            )
        assert max(layer["curves"]["condition"][t]) <= bound * (1 + 1e-9)
        assert max(layer["curves"]["error"][t]) <= layer["error_bound"]
        x = exact_solve(h, q[0, t], 0.02 * fro)
        assert x.isfinite().all()
    for head, shown in enumerate(layer["heads"]):
        gammas = g[0, :, head].exp()
        assert shown["decay_quantiles"][2] == pytest.approx(gammas.quantile(0.5).item())
        assert shown["half_life"] == pytest.approx(
            -0.6931471805599453 / g[0, :, head].mean().item()
        )
        assert shown["alpha"] == pytest.approx(alpha[0, :, head].mean().item())
        assert shown["beta"] == pytest.approx(beta[0, :, head].mean().item(), rel=1e-4)
        assert shown["final_norm_h"] == pytest.approx(fro[head].item())


def test_errors_shrink_with_steps_and_vanish_in_none(build: Build, ids: Ids):
    """More steps, smaller solve error; no steps, no error to speak of."""
    worst = []
    for num_iter in (2, 6, 20):
        found = inspect_model(build(num_iter=num_iter), ids(1, 30), positions=5)
        curve = found["layers"][1]["curves"]["error"]
        worst.append(max(e for row in curve for e in row))
        assert worst[-1] <= found["layers"][1]["error_bound"] * 1.01 + 1e-5
    assert worst[0] > 2 * worst[1] and worst[1] > 20 * worst[2]
    none = inspect_model(build(num_iter=0), ids(1, 30), positions=5)["layers"][0]
    assert none["error_bound"] is None and none["curves"]["error"][0] == [None] * 4


@pytest.mark.parametrize(("length", "chunk_size"), [(12, 1), (100, 64)])
def test_adaptive_steps_are_those_of_the_op(build: Build, ids: Ids, length: int, chunk_size: int):
    """With solver="adaptive" the steps shown are those of `gka.ops.solver_steps` for the chunks in which
    the layer reads the text: of one token where it is short, else of 64."""
    model, tokens = build(num_iter=30, solver="adaptive"), ids(1, length)
    layer = inspect_model(model, tokens, positions=length, chunk=length)["layers"][0]
    found = layer["curves"]["steps"]
    _, _, g, beta, _ = inputs(model, tokens)
    mixer: Any = model.model.layers[0].mixer
    seen: list[Tensor] = []
    mix = mixer.mix
    mixer.mix = lambda q, k, *rest: seen.append(k) or mix(q, k, *rest)
    with torch.no_grad():
        model(tokens, use_cache=False)
    steps = solver_steps(seen[0], gk=g, beta=beta, num_iter=30, num_heads=4, chunk_size=chunk_size)
    assert (torch.tensor(found) - steps[0]).abs().max() <= 1  # the same n, but for rounding of phi
    assert len({tuple(row) for row in found}) <= -(-length // chunk_size)


@pytest.mark.parametrize("length", [12, 100])
def test_conjugate_gradients_are_counted_and_measured(build: Build, ids: Ids, length: int):
    """With solver="cg" the steps differ by place, by queries too, none beyond what the theory needs; every
    error is within the bound."""
    model, tokens = build(num_iter=30, solver="cg"), ids(1, length)
    layer = inspect_model(model, tokens, positions=length, chunk=length)["layers"][0]
    found = torch.tensor(layer["curves"]["steps"])
    assert layer["solver"] == "cg" and found.min() >= 1 and found.max() <= 39
    assert len(found.unique()) > 1
    assert max(e for row in layer["curves"]["error"] for e in row) <= layer["error_bound"] + 1e-5


def test_the_model_computes_as_ever(build: Build, ids: Ids):
    """Being looked at changes no state and leaves nothing behind."""
    model, tokens = build(mixers=["gka", "attention"]), ids(1, 20)
    before = set(vars(model.model.layers[0].mixer))
    plain, first = GKACache(model.config), {}
    with torch.no_grad():
        model(tokens, past_key_values=plain)
    inspect_model(model, tokens, positions=3)
    assert set(vars(model.model.layers[0].mixer)) == before
    again = GKACache(model.config)
    with torch.no_grad():
        model(tokens, past_key_values=again)
    first = cache_tensors(plain)
    assert all(torch.equal(x, first[name]) for name, x in cache_tensors(again).items())


def test_hybrids_and_long_texts(build: Build, ids: Ids):
    """Any pattern, any length: layers without a ridge are listed, places are spread, JSON has no NaN."""
    model = build(mixers=["attention", "gka", "gla", "swa"], use_forgetting_gate=True)
    found = inspect_model(model, ids(1, 9000), positions=10, chunk=1000)
    assert [layer["mixer"] for layer in found["layers"]] == ["attention", "gka", "gla", "swa"]
    assert [set(layer) - {"layer", "mixer"} != set() for layer in found["layers"]] == [0, 1, 0, 0]
    assert found["positions"] == [899 + 900 * i for i in range(10)]
    json.dumps(found, allow_nan=False)
    undecayed = inspect_model(build(use_forgetting_gate=False), ids(1, 9))["layers"][0]
    assert undecayed["heads"][0]["half_life"] is None
    assert undecayed["curves"]["memory"][-1] == [9.0] * 4


@pytest.mark.parametrize("fields", [{}, {"use_forgetting_gate": False}])
@pytest.mark.parametrize("num_iter", [6, 0])
def test_the_page_stands_alone(build: Build, ids: Ids, fields: dict[str, Any], num_iter: int):
    """One HTML page: it asks for nothing from outside, its images are whole SVG documents, names are
    escaped."""
    mixers = ["gka", "attention"]
    model = build(mixers=mixers, num_iter=num_iter, **fields)
    content = {"model_folder": "<b>&"} | inspect_model(model, ids(1, 30), positions=4)
    text = page(content)
    assert "&lt;b&gt;&amp;" in text and "<b>&" not in text
    sources = re.findall(r'(?:src|href)=[\'"]([^\'"]+)', text)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "<script" not in text and "@import" not in text and "url(" not in text
    assert len(sources) == 2
    for source in sources:
        root = ElementTree.fromstring(base64.b64decode(source.partition(",")[2]))
        assert root.tag.endswith("svg") and len(list(root.iter())) > 100
    for index, mixer in enumerate(mixers):
        assert f"Layer {index}: {mixer}" in text


def test_the_table_has_every_layer(build: Build, ids: Ids):
    """In 80 columns every layer and figure of the table is readable."""
    console = Console(width=80)
    with console.capture() as captured:
        content = inspect_model(build(mixers=["gka", "attention"]), ids(1, 30), positions=4)
        console.print(table(content))
    shown = captured.get()
    for word in ("0 gka", "1 attention", "half-life", "remembered", "lambda", "condition", "steps"):
        assert word in shown, shown
    assert "…" not in shown


def drawn(figure: Any) -> Any:
    """The figure, laid out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    return figure


@pytest.mark.parametrize(("layers", "heads", "length"), [(1, 1, 2), (2, 4, 300), (9, 16, 40)])
def test_no_panel_runs_into_another(build: Build, ids: Ids, layers: int, heads: int, length: int):
    """Titles, tick labels and axes of a panel leave a tenth of an inch to those of every other panel."""
    model = build(num_hidden_layers=layers, num_heads=heads)
    content = inspect_model(model, ids(1, length), positions=20)
    for figure in (overview(content), layer_figure(content["layers"][0], content["positions"])):
        boxes = [axes.get_tightbbox() for axes in drawn(figure).axes]
        panels = len(boxes) if figure.axes[-1].get_label() != "<colorbar>" else len(boxes) // 2
        # a colour bar belongs to its panel
        joined = [
            Bbox.union([boxes[i], *boxes[i + panels : i + panels + 1]]) for i in range(panels)
        ]
        for i, one in enumerate(joined):
            assert all(not one.padded(0.05 * figure.dpi).overlaps(x.padded(0.05 * figure.dpi))
                       for x in joined[:i])  # fmt: skip
            assert one.x0 >= 0 and one.x1 <= figure.bbox.x1


def test_long_memories_are_told_apart(build: Build, ids: Ids):
    """Decays of 0.993 and 0.999 are 143 and 1000 tokens, apart in the figure and the page, and a state that
    does not decay is drawn and named as such."""
    content = inspect_model(build(num_heads=4), ids(1, 30), positions=3)
    layer = content["layers"][0]
    for head, gamma in zip(layer["heads"], (0.993, 0.999, 0.2, 1.0), strict=True):
        head["decay_quantiles"] = [gamma] * 5
    axes = drawn(layer_figure(layer, content["positions"])).axes[0]
    medians = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "_"]
    assert medians[:3] == pytest.approx([1 / 0.007, 1000, 1.25]) and axes.get_yscale() == "log"
    places = axes.transData.transform([(0, y) for y in medians])[:, 1]
    assert places[1] - places[0] > 0.1 * axes.bbox.height < places[3] - places[1]
    assert [text.get_text() for text in axes.texts] == ["no decay"]
    shown = page(content)
    assert all(f"<td>{x}</td>" in shown for x in ("143", "1e+03", "1.25", "∞"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.3, 7.0], (0.2, 10)),
        ([1.0], (1, 2)),
        ([2.0, 50.0], (2, 50)),
        ([3e-5], (2e-5, 5e-5)),
        ([], (1, 2)),
    ],
)
def test_axes_end_at_round_numbers(values: list[float], expected: tuple[float, float]):
    """A log axis begins and ends at 1, 2 or 5 times a power of ten, which get short labels."""
    assert round_range(values) == pytest.approx(expected)
    assert tick_text(2e-5) == "2e-5" and tick_text(1e6) == "1e6" and tick_text(0.0002) == "0.0002"


def test_models_without_a_ridge_are_refused(build: Build, ids: Ids):
    """A model without a GKA layer has nothing to be looked at, and is not shown as an empty page."""
    with pytest.raises(
        InputError, match=r"no Gated KalmaNet layer to inspect \(its mixers: attention, gla\)"
    ):
        inspect_model(build(mixers=["gla", "attention", "gla"]), ids(1, 5))


def test_other_models_are_refused():
    """What is no GKA language model is refused by name."""
    with pytest.raises(InputError, match="expected a GKAForCausalLM, got Linear"):
        inspect_model(torch.nn.Linear(1, 1), [1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "one text"),
        ([[1], [2]], {}, r"one text \[T\], got shape \(2, 1\)"),
        ([1], {"positions": 0}, "positions is 0"),
        ([1], {"chunk": 0}, "prefill_chunk is 0"),
    ],
)
def test_bad_input(build: Build, tokens: Any, options: dict[str, int], message: str):
    """What cannot be inspected is refused by name."""
    with pytest.raises(InputError, match=message):
        inspect_model(build(), tokens, **options)
