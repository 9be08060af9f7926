"""The recurrent mixers against one another and against the token-by-token rule they implement."""

import pytest
import torch
from torch import Tensor

from gka.layers import DeltaNet, GatedDeltaNet, GatedKalmaNet, GatedLinearAttention
from gka.layers.recurrent_mixer import RecurrentMixer
from tolerances import assert_close

EXACT = 1e-10
SIZES = {"hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}


def make(kind: type, **options) -> RecurrentMixer:
    torch.manual_seed(0)
    return kind(**SIZES, **options).double()


def parts(mixer: RecurrentMixer, x: Tensor) -> tuple[Tensor, ...]:
    """q, k, v with all heads, and g, by the formulas of the layer, written out."""

    def heads(name: str) -> Tensor:
        y = getattr(mixer, f"{name}_proj")(x)
        weight = getattr(mixer, f"{name}_conv1d").weight[:, 0]
        past = torch.cat([y.new_zeros(y.shape[0], 3, y.shape[-1]), y], 1)
        y = torch.stack([past[:, i : i + x.shape[1]] * weight[:, i] for i in range(4)]).sum(0)
        y = (y * torch.sigmoid(y)).unflatten(-1, (-1, 6))
        return y.repeat_interleave(4 // y.shape[2], dim=2)

    q, k, v = (heads(name) for name in "qkv")
    q, k = (y / (y.norm(dim=-1, keepdim=True) + 1e-6) for y in (q, k))
    if not mixer.use_forgetting_gate:
        return q, k, v, torch.zeros_like(q[..., 0])
    a = torch.nn.functional.softplus(mixer.a_proj(x) + mixer.dt_bias)
    return q, k, v, -mixer.A_log.exp() * a


def finish(mixer: RecurrentMixer, o: Tensor, x: Tensor) -> Tensor:
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.o_norm.weight
    if mixer.use_gate:
        gate = mixer.g_proj(x).unflatten(-1, (-1, 6))
        o = o * gate * torch.sigmoid(gate)
    return mixer.o_proj(o.flatten(-2))


def scan(mixer: RecurrentMixer, x: Tensor, delta: bool) -> Tensor:
    q, k, v, g = parts(mixer, x)
    state = x.new_zeros(x.shape[0], 4, 6, 6)
    outputs = []
    for t in range(x.shape[1]):
        kt, vt = k[:, t, :, :, None], v[:, t, :, None]
        if delta:
            beta = torch.sigmoid(mixer.get_submodule("b_proj")(x[:, t]))[..., None, None]
            erase = torch.eye(6, dtype=x.dtype) - beta * kt @ kt.mT
            state = g[:, t, :, None, None].exp() * erase @ state + beta * kt @ vt
        else:
            state = g[:, t, :, None, None].exp() * state + kt @ vt
        outputs.append(6**-0.5 * (state.mT @ q[:, t, :, :, None])[..., 0])
    return finish(mixer, torch.stack(outputs, 1), x)


@pytest.mark.parametrize(
    "kind, delta", [(GatedLinearAttention, False), (DeltaNet, True), (GatedDeltaNet, True)]
)
def test_token_by_token(kind, delta, tokens):
    """The layer is its published recurrence with the shared convolutions, norms and gates around it."""
    mixer, x = make(kind), tokens(2, 70)
    assert_close(mixer(x)[0], scan(mixer, x, delta), EXACT)


def test_gka_without_iterations_is_gated_linear_attention(tokens):
    """num_iter = 0 without the write gate leaves gated linear attention, parameters and all."""
    gla = make(GatedLinearAttention)
    gka = make(GatedKalmaNet, num_iter=0, use_beta_gate=False, use_alpha_connection=False)
    gka.load_state_dict(gla.state_dict())
    x = tokens(2, 70)
    assert_close(gka(x)[0], gla(x)[0], EXACT)


def test_gated_delta_net_without_decay_is_delta_net(tokens):
    """With A_log = -inf the state does not decay."""
    gated, plain = make(GatedDeltaNet), make(DeltaNet)
    with torch.no_grad():
        gated.A_log.fill_(-torch.inf)
    plain.load_state_dict(gated.state_dict(), strict=False)
    x = tokens(2, 70)
    assert_close(gated(x)[0], plain(x)[0], EXACT)
    assert set(gated.state_dict()) - set(plain.state_dict()) == {
        "A_log",
        "dt_bias",
        "a_proj.weight",
    }


@pytest.mark.parametrize("kind", [GatedLinearAttention, DeltaNet, GatedDeltaNet])
def test_output_gate_is_optional(kind, tokens):
    """Without use_gate there is no g_proj, and the norm is plain."""
    mixer, x = make(kind, use_gate=False), tokens(2, 9)
    assert "g_proj.weight" not in mixer.state_dict()
    expected = scan(mixer, x, delta=kind is not GatedLinearAttention)
    assert_close(mixer(x)[0], expected, EXACT)
