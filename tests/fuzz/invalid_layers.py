"""Wrong layers and wrong calls of layers."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fuzz.invalid import (
    FLAGS,
    INF,
    NAN,
    NUMBERS,
    WRONG_BOUNDS,
    B,
    Case,
    T,
    bind,
    bounds,
    of_another_kind,
)
from gka.layers import MIXERS, mixer_options

OPTIONS: dict[str, list[Any]] = {
    "hidden_size": [0, -1, 16.0, "a", True], "head_dim": [0, -8, 8.0, "a", 300, 257],
    "num_heads": [0, -2, 2.0, True], "num_kv_heads": [0, 3, 2.0], "num_v_heads": [0, 3],
    "num_k_heads": [0, 3],
    "expand_v": [0.0, -1.0, 0.33, NAN, INF, "a", 40.0], "conv_size": [0, -1, 2.0, "a"],
    "num_iter": NUMBERS["num_iter"], "ridge_ratio": NUMBERS["ridge_ratio"], "solver": NUMBERS["solver"],
    "backend": NUMBERS["backend"], "norm_eps": [-1.0, NAN, INF, "a"], "layer_idx": [-1, "a", 1.0],
    "window_size": [0, -1, 2.0], "rope_theta": [0.0, -1.0, NAN, INF], "kv_rank": [0, 1.0, "a"],
    "sketch_dim": [0, -1, 9, 2.0, True, "a"], "sketch": ["a", None, 1],
    "use_gate": FLAGS, "use_v_conv": FLAGS, "use_beta_gate": FLAGS, "use_forgetting_gate": FLAGS,
    "qk_norm": FLAGS, "use_alpha_connection": FLAGS, "use_forgetting_gate_kk": FLAGS,
    "gla_rescale": FLAGS, "kv_mix": FLAGS,
}  # fmt: skip


def wrong_layers() -> list[Case]:
    cases = []
    for name, mixer in MIXERS.items():
        sizes = {"hidden_size": 16, "head_dim": 8, "num_heads": 2}
        wrong = [
            (key, bad) for key in mixer_options(name) for bad in OPTIONS.get(key, [])
            if not (name in ("attention", "swa") and (key, bad) == ("head_dim", 300))
        ]  # fmt: skip
        cases += bind(mixer, sizes, wrong)
        layer, x = mixer(**sizes), torch.randn(B, T, 16)
        kinds = [
            bad
            for bad in of_another_kind(x)
            if not (isinstance(bad, Tensor) and bad.device.type == "meta")
        ]
        shapes = [x[0], x[..., :8], x[:, :0], x.unsqueeze(0)]
        cases += bind(layer, {}, [("hidden_states", bad) for bad in (None, *kinds, *shapes)], name)
        good, packed = {"hidden_states": x}, {"hidden_states": x[:1]}
        masks = [
            "x",
            [1],
            torch.ones(B, 3).long(),
            torch.ones(B, 1, 1, T).bool(),
            torch.ones(B + 1, T).bool(),
        ]
        cases += bind(layer, good, [("attention_mask", bad) for bad in masks], name)
        cases += bind(layer, packed, [("cu_seqlens", bad) for bad in WRONG_BOUNDS], name)
        cases += bind(layer, good, [("cu_seqlens", bounds(0, T))], name)
    return cases


def wrong_configurations() -> list[Case]:
    """Wrong fields of a configuration; a layer's limits hold there already."""
    from gka.models import GKAConfig

    known = {f.name for f in fields(GKAConfig)}
    wrong = [(key, bad) for key, values in OPTIONS.items() if key in known for bad in values]
    wrong = [
        w for w in wrong if not (w[0] in ("num_heads", "conv_size", "kv_rank") and w[1] is None)
    ]
    wrong += [
        ("head_dims", 8),
        ("mixer", "gkb"),
        ("mixers", ["gka", "gla "]),
        ("mixers", "gka"),
        ("vocab_size", 0),
    ]
    wrong += [
        ("attention_layers", [7]),
        ("sliding_window", 0),
        ("head_dim", 300),
        ("initializer_range", NAN),
    ]
    sizes = {
        "hidden_size": 16,
        "head_dim": 8,
        "num_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 7,
    }
    cases = bind(GKAConfig, sizes, wrong)
    overridden = {"gla": {"head_dim": 300}}
    mixed = {
        **sizes,
        "num_hidden_layers": None,
        "mixers": ["gka", "gla"],
        "mixer_overrides": overridden,
    }
    return [*cases, ("GKAConfig(mixer_overrides)", "head_dim", lambda: GKAConfig(**mixed))]
