"""What the ranks of tests/parallel/test_context_model.py run: a model on parts of rows, beside whole rows."""

from typing import Any

import torch
from torch import Tensor

from gka.layers import GatedKalmaNet
from gka.layers.parts import surround
from gka.models import GKAConfig, GKAForCausalLM
from gka.parallel import ContextParallel
from parallel.ranks import DOCUMENTS, LENGTH, OVER_THREE, RANGES, RANKS, Counting, told

WORDS = 31
MIXERS = ["gka", "attention", "swa", "gla", "deltanet", "gated_deltanet"]
SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 16, "head_dim": 8, "num_heads": 2, "num_kv_heads": 1,
    "intermediate_size": 24, "num_iter": 5,
}  # fmt: skip
# a window over three ranks; tokens that each row's padding takes on the left, or on the right if negative
CASES: dict[str, dict[str, Any]] = {
    "batch": {"window": 300, "rows": 2},
    "packed": {"window": 20, "documents": DOCUMENTS},
    "over three ranks": {"window": 300, "documents": OVER_THREE, "recompute": True},
    "padded": {
        "window": 40,
        "padding": [70, -130, 0, 254],
        "mixer_overrides": {"attention": {"use_short_conv": True}},
    },
    "options": {
        "window": 2,
        "documents": OVER_THREE,
        "mixers": ["gka", "gka", "swa"],
        "conv_size": 5,
        "mixer_overrides": {
            "gka": {"use_v_conv": False, "kv_rank": 3},
            "swa": {"use_short_conv": True},
        },
    },
}
FUSED_RANGES = [(0, 64), (64, 128), (128, 192), (192, 200)]
# two tokens of the second document before rank 1, and one of a single token behind
FUSED_DOCUMENTS = [0, 62, 65, 66, 200]


def build(case: dict[str, Any], dtype: torch.dtype) -> GKAForCausalLM:
    torch.manual_seed(0)
    mixers = case.get("mixers", MIXERS)
    fields = SIZES | {n: case[n] for n in ("conv_size", "mixer_overrides") if n in case}
    config = GKAConfig(
        **fields, mixers=mixers, num_hidden_layers=len(mixers), sliding_window=case["window"]
    )
    model: Any = GKAForCausalLM(config)
    if case.get("recompute"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(dtype).train()


def inputs(case: dict[str, Any]) -> dict[str, Any]:
    """Embeddings and labels of whole rows, bounds, mask."""
    generator = torch.Generator().manual_seed(3)
    padding = case.get("padding", [0] * case.get("rows", 1))
    labels = torch.randint(WORDS, (len(padding), LENGTH), generator=generator)
    mask = torch.ones_like(labels)
    for row, count in enumerate(padding):
        mask[row, : max(count, 0)] = 0
        mask[row, LENGTH + min(count, 0) :] = 0
    labels[:, 100:130] = -100
    x = torch.randn(*labels.shape, 16, generator=generator, dtype=torch.float64)
    documents = case.get("documents")
    return {
        "inputs_embeds": x,
        "labels": labels.masked_fill(mask == 0, -100),
        "cu_seqlens": None if documents is None else torch.tensor(documents),
        "attention_mask": mask if "padding" in case else None,
    }


def results(model: Any, dtype: torch.dtype, **call: Any) -> dict[str, Tensor]:
    """Logits, loss and every gradient of both; those of a rank are to be summed over ranks."""
    x = call.pop("inputs_embeds").to(dtype).requires_grad_()
    found = model(inputs_embeds=x, return_logits=True, **call)
    assert found.loss is not None and found.logits is not None
    weights = torch.linspace(-1, 1, WORDS, dtype=dtype)
    # the loss is that of all ranks, whose gradients are to be averaged
    shares = RANKS if "context" in call else 1
    ((found.logits * weights).sum() / 1000 + found.loss / shares).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": found.logits.detach(), "loss": found.loss.detach(), "dx": x.grad, **gradients}  # pyright: ignore


def whole(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    case = CASES[name]
    return results(build(case, dtype), dtype, **inputs(case))


def split(name: str, dtype: torch.dtype) -> dict[str, Any]:
    case = CASES[name]
    call = inputs(case)
    context = Counting(
        None, RANGES, call.pop("cu_seqlens"), attention_mask=call.pop("attention_mask")
    )
    mine = {key: context.shard(x) for key, x in call.items()}
    return results(build(case, dtype), dtype, context=context, **mine) | {"sent": context.sent}


def layer(split: bool) -> dict[str, Tensor]:
    """Output and gradients of a layer: by plain torch, of ranks 1 and 2 by the fused kernels."""
    torch.manual_seed(0)
    mixer: Any = GatedKalmaNet(hidden_size=16, head_dim=8, num_heads=1, num_iter=3, backend="torch")
    x, w = torch.randn(2, 1, FUSED_RANGES[-1][1], 16, generator=torch.Generator().manual_seed(1))
    bounds, context = torch.tensor(FUSED_DOCUMENTS), None
    if split:
        context, bounds = ContextParallel(None, FUSED_RANGES, bounds), None
        if context.rank in (1, 2):  # an interpreter is slow
            mixer._surround = lambda *_: surround.FUSED
        x, w = context.shard(x), context.shard(w)
    x = x.clone().requires_grad_()
    o, _, _ = mixer(x, cu_seqlens=bounds, context=context)
    (o * w).sum().backward()
    gradients = {n: p.grad for n, p in mixer.named_parameters()}
    return {"logits": o.detach(), "dx": x.grad, "loss": o.new_zeros(()), **gradients}  # pyright: ignore


def compiled() -> list[float]:
    """For two batches with other documents, the largest difference of compiled layers from eager ones."""
    case = CASES["packed"] | {"mixers": ["gka", "swa", "gated_deltanet"]}
    eager, graphs = build(case, torch.float64), build(case, torch.float64)
    body: Any = graphs.model
    for one in body.layers:
        one.forward = torch.compile(one.forward, backend="aot_eager")
    found = []
    for documents in (DOCUMENTS, OVER_THREE, [0, 20, 100, LENGTH]):
        call = inputs(case | {"documents": documents})
        context = ContextParallel(None, RANGES, call.pop("cu_seqlens"))
        del call["attention_mask"]
        mine = {key: context.shard(x) for key, x in call.items()}
        a, b = (results(m, torch.float64, context=context, **mine) for m in (eager, graphs))
        found.append(max(float((a[n] - b[n]).abs().max()) for n in a))
    return found


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Results of whole rows from those of the ranks; gradients of the sum of logits and of the mean loss."""
    rows = {n: torch.cat([part[n] for part in parts], 1) for n in ("logits", "dx")}
    of_all = [n for n in parts[0] if n not in (*rows, "loss", "sent")]
    gradients = {n: torch.stack([part[n] for part in parts]).sum(0) for n in of_all}
    return rows | gradients | {"loss": parts[0]["loss"]}


def all_models() -> dict[Any, Any]:
    """Every case in float64, and one in float32."""
    found: dict[Any, Any] = {(name, torch.float64): split(name, torch.float64) for name in CASES}
    found["packed", torch.float32] = split("packed", torch.float32)
    return found | {"fused": layer(split=True), "errors": errors()}


def errors() -> dict[str, str]:
    """What each wrong call raises, by words that must be in it."""
    model: Any = build(CASES["packed"], torch.float32).eval()
    context = ContextParallel(None, RANGES)
    ids = torch.zeros(1, LENGTH, dtype=torch.int64)
    mine, mask = context.shard(ids), torch.ones_like(ids)
    holes = mask.clone()
    holes[:, 3:5] = 0
    bounds = torch.tensor([0, LENGTH])
    x = torch.zeros(1, context.end - context.begin, SIZES["hidden_size"])
    body: Any = model.model
    layers = [body.layers[0].mixer, body.layers[1].mixer]
    wrong: dict[str, Any] = {
        "Pass context.shard(input_ids)": lambda: model(input_ids=ids, context=context),
        "pass context.shard(labels)": lambda: model(input_ids=mine, labels=ids, context=context),
        "attention_mask: not together": lambda: model(mine, context.shard(mask), context=context),
        "position_ids: not together": lambda: model(mine, position_ids=mine, context=context),
        "cu_seqlens: not together": lambda: model(mine, cu_seqlens=bounds, context=context),
        "use_cache: not together": lambda: model(mine, use_cache=True, context=context),
        "generate, needs whole rows": lambda: model.generate(
            mine, context=context, max_new_tokens=1
        ),
        "padding between a row's tokens": lambda: ContextParallel(
            None, RANGES, attention_mask=holes
        ),
        "must be [batch, 440]": lambda: ContextParallel(None, RANGES, attention_mask=mask[:, 1:]),
        "exclude each other": lambda: ContextParallel(None, RANGES, bounds, attention_mask=mask),
        "give it to ContextParallel": lambda: layers[0](x, context.shard(mask), context=context),
        "the context holds the bounds": lambda: layers[1](x, cu_seqlens=bounds, context=context),
        "has no cache": lambda: layers[1](x, use_cache=True, context=context),
    }
    said = {words: told(call) for words, call in wrong.items()}
    body.layers[3].mixer.backend = "fla"
    said["layer 3 has backend 'fla'"] = told(lambda: model(mine, context=context))
    body.layers[3].mixer = torch.nn.Identity()
    return said | {"layer 3 has a Identity": told(lambda: model(mine, context=context))}
