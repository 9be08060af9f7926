"""What stage 1 minimises, and the divergence of stage 2, are what they are said to be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from gka.models import GKAConfig, GKAForCausalLM
from gka.models.replacement import replace_attention
from gka.training.priming.matching import Matching, freeze_others
from gka.training.priming.recovery import divergence

Tables = dict[str, dict[str, Any]]
Prime = Callable[..., dict[str, Any]]
NO_TRAINING: Tables = {"stage1": {"max_steps": 0}, "stage2": {"max_steps": 0}}


def tiny(**fields: Any) -> Any:
    """An untrained Transformer of four layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "head_dim": 8, "num_heads": 4, "num_kv_heads": 2}
    settings = {"mixer": "attention", "num_hidden_layers": 4, "vocab_size": 257}
    return GKAForCausalLM(GKAConfig(**{**settings, **sizes, **fields})).eval()


def test_layer_errors_are_those_of_two_models() -> None:
    """e_l compares the new mixer with the attention on what that layer of the teacher alone is given."""
    teacher, hybrid = tiny(), tiny()
    attention = replace_attention(hybrid, [0, 2], "gka", {"num_iter": 4})
    seen: dict[int, tuple[Any, Any]] = {}
    for layer in (0, 2):
        module: Any = teacher.model.layers[layer].mixer
        module.register_forward_hook(
            lambda _, args, out, layer=layer: seen.update({layer: (args[0], out[0])})
        )
    tokens = torch.randint(0, 256, (2, 20))
    with torch.no_grad():
        teacher(tokens)
        found = Matching(hybrid, attention)(tokens)["layers"]
        for error, layer in zip(found, (0, 2), strict=True):
            x, expected = seen[layer]
            given = hybrid.model.layers[layer].mixer(x)[0]
            ratio = (given - expected).square().sum() / expected.square().sum()
            assert error.item() == pytest.approx(ratio.item(), rel=1e-4)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_end_error_is_that_of_two_models(recompute: str) -> None:
    """e_end compares the last hidden states of teacher and hybrid; its gradient is the hybrid's own."""
    teacher, hybrid = tiny(), tiny()
    attention = replace_attention(hybrid, [1, 2], "gka", {"num_iter": 4})
    freeze_others(hybrid, attention)
    tokens = torch.randint(0, 256, (2, 20))
    matching = Matching(hybrid, attention, 0.0, 2.0, recompute)
    loss = matching(tokens)["loss"]
    expected = teacher.model(tokens).last_hidden_state.detach()
    given = hybrid.model(tokens, use_cache=False).last_hidden_state
    ratio = 2 * (given - expected).square().sum() / expected.square().sum()
    assert loss.item() == pytest.approx(ratio.item(), rel=1e-4)
    parameters = list(matching.parameters())
    pairs = zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(ratio, parameters), strict=True
    )
    for one, other in pairs:
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def test_teacher_and_hybrid_share_their_weights() -> None:
    """A checkpoint of stage 1 is the new mixers; nothing else of the model is copied, counted or learns."""
    hybrid = tiny()
    attention = replace_attention(hybrid, [0, 2], "gka", {"num_iter": 4})
    freeze_others(hybrid, attention)
    matching = Matching(hybrid, attention)
    mixers = [hybrid.model.layers[layer].mixer for layer in (0, 2)]
    own = {id(p) for mixer in mixers for p in mixer.parameters()}
    assert {id(p) for p in matching.parameters()} == own
    assert {id(p) for p in hybrid.parameters() if p.requires_grad} == own
    assert set(matching.state_dict()) == {
        f"mixers.{layer}.{name}" for layer in (0, 2) for name in mixers[0].state_dict()
    }
    matching(torch.randint(0, 256, (1, 9)))["loss"].backward()
    assert all(p.grad is not None for p in matching.parameters() if p.requires_grad)


def test_divergence_is_the_definition() -> None:
    """In parts or at once, sum_t sum_v p log(p / q), and its gradient."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    other, head = torch.randn(7, 4), torch.randn(11, 4)
    log_q = (hidden @ weight.T).log_softmax(-1)
    log_p = (other @ head.T).log_softmax(-1)
    expected = nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    for size in (11 * 4 * 2, 1 << 20):
        found = divergence(hidden, weight, other, head, logits_bytes=size)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        for one, two in zip(torch.autograd.grad(found, (hidden, weight)), gradients, strict=True):
            assert torch.allclose(one, two, atol=1e-5)
