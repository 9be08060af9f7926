"""The two passes on a GPU, from tokens to results. The kernels know nothing of their order."""

# With a solve there are x and H; the types do not tell.
# pyright: reportArgumentType=false

from torch import Tensor

from gka.kernels.backward import Backward
from gka.kernels.call import Launch
from gka.kernels.chunked import readout_kernel
from gka.kernels.hopper import calls as hopper
from gka.kernels.inputs import aligned, boundary
from gka.maths.adjoint import Gradients
from gka.maths.chunked import Forward, Settings, Tokens

CHUNK_HEADS = 792  # chunks times heads that the derivative works on together: bounds its scratch


def chunk_forward(tokens: Tokens, settings: Settings, on_hopper: bool = False) -> Forward:
    """`gka.maths.chunked.chunk_forward` on the GPU; rows of x are divided by `x_scale`.

    `on_hopper`: scans, solve and readout by the kernels of `gka.kernels.hopper`.
    """
    run = Launch(tokens, settings, on_hopper)
    t, (heads,) = run.t, run.groups
    h, u = run.moments(heads, run.solve or settings.with_h)
    x = x_scale = None
    if run.solve:
        x, x_scale = run.empty(*t.q.shape, dtype=run.op_dtype), run.empty(*t.q.shape[:3])
    o = run.empty(*t.q.shape[:3], run.V, dtype=t.q.dtype)
    if run.hopper:
        assert h is not None and x is not None and x_scale is not None
        hopper.solve_and_readout(run, heads, h, u, x, x_scale, o)
        return Forward(o=o, x=x, h=h.final, u=u.final, x_scale=x_scale)
    if run.solve:
        run.solve_(heads, (t.q, None), h, (x, x_scale))
    args = (
        t.q, x, x_scale, t.k, t.v, t.g, t.alpha, t.beta, *u.stored, o, *run.tables, settings.scale,
    )  # fmt: skip
    run.launch(readout_kernel, "readout", (run.M * run.H,), heads, args)
    return Forward(o=o, x=x, h=None if h is None else h.final, u=u.final, x_scale=x_scale)


def chunk_backward(
    tokens: Tokens,
    x: Tensor | None,
    x_scale: Tensor | None,
    do: Tensor,
    dh_final: Tensor | None,
    du_final: Tensor | None,
    settings: Settings,
    on_hopper: bool = False,
) -> Gradients:
    """`gka.maths.adjoint.chunk_backward` on the GPU; x and x_scale as `chunk_forward` gave them."""
    run = Launch(tokens, settings, on_hopper)
    run.split_heads(CHUNK_HEADS)
    if x is not None and x_scale is None:  # of the recurrent form
        x_scale = x.abs().amax(-1)
        x = (x / x_scale.clamp_min(1e-37)[..., None]).to(run.op_dtype)
    x, x_scale, do = aligned(x), aligned(x_scale), aligned(do)
    finals = (boundary(state, not run.hopper) for state in (dh_final, du_final))
    back = Backward(run, x, x_scale, do, *finals)
    for heads in run.groups:
        back.through(heads)
    return back.collect()
