"""Small inputs for kernels that may be interpreted, and one way to run a backend on them."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gka.ops import chunk_gka, last_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(
    heads=(2, 2, 2), dims=(16, 16), tied=True, gates=True, bounds=None, batch=1, length=20
) -> dict:
    """Inputs on the CPU in float64: unit queries and keys, both initial states, every gate."""
    torch.manual_seed(0)
    (h, hk, hv), (k_dim, v_dim), n = heads, dims, batch if bounds is None else len(bounds) - 1

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64)

    root = torch.randn(n, h, k_dim, k_dim, dtype=torch.float64)
    inputs: dict = {
        "q": normalize(rand(batch, length, h, k_dim) - 0.5, dim=-1),
        "k": normalize(rand(batch, length, hk, k_dim) - 0.3, dim=-1),
        "v": rand(batch, length, hv, v_dim) - 0.5,
        "h0": root @ root.mT / k_dim,
        "u0": rand(n, h, k_dim, v_dim) - 0.5,
    }
    if gates:
        inputs |= {
            "g": -0.3 * rand(batch, length, h),
            "alpha": rand(batch, length, h),
            "beta": rand(batch, length, h),
        }
        inputs |= {} if tied else {"gk": -0.3 * rand(batch, length, h)}
    return inputs


def results(inputs: dict, backend: str, dtype: torch.dtype, device: str, **options) -> dict:
    """Output, states and all gradients of one backend."""
    state = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        name: x.detach().clone().to(device, dtype if name in "qkv" else state).requires_grad_()
        for name, x in inputs.items()
    }
    t = dict(leaves)
    initial = (t.pop("h0"), t.pop("u0"))
    if "g" in t and "gk" not in t:
        t["gk"] = t["g"]
    o, final = chunk_gka(
        **t,
        initial_state=initial,
        output_final_state=True,
        backend=backend,
        chunk_size=16,
        **options,
    )
    assert final is not None and last_backend() == backend
    loss = o.double().square().sum() + sum(s.double().square().sum() for s in final)
    loss.backward()
    grads = {f"d{name}": x.grad for name, x in leaves.items()}
    return {"o": o, "h": final[0], "u": final[1], **grads}
