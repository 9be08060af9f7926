"""Products between H query heads and fewer shared heads, without repeating the shared ones in memory.

Consecutive heads share: head h uses shared head h // (H / Hk). The rows of a group's heads are stacked
into one taller matrix, which is a view.
"""

from torch import Tensor


def shared_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a_h b_(shared head of h): [M,H,R,X] x [M,Hk,X,Y] -> [M,H,R,Y]."""
    m, heads, rows, x = a.shape
    shared = b.shape[1]
    if shared == heads:
        return a @ b
    folded = a.reshape(m, shared, heads // shared * rows, x) @ b
    return folded.view(m, heads, rows, b.shape[-1])


def group_sum_matmul(a: Tensor, b: Tensor, shared: int) -> Tensor:
    """Sum over the heads of a group of a_h^T b_h: [M,H,R,X] x [M,H,R,Y] -> [M,Hk,X,Y]."""
    m, heads, rows, _ = a.shape
    stacked = heads // shared * rows
    a = a.reshape(m, shared, stacked, a.shape[-1])
    return a.transpose(-1, -2) @ b.reshape(m, shared, stacked, b.shape[-1])


def group_sum(a: Tensor, shared: int) -> Tensor:
    """Sum over the heads of a group: [M,H,...] -> [M,Hk,...]."""
    if a.shape[1] == shared:
        return a
    return a.unflatten(1, (shared, a.shape[1] // shared)).sum(2)


def weight_shared(weights: Tensor, b: Tensor) -> Tensor:
    """w_h o b_(shared head of h), rows scaled: [M,H,C] x [M,Hk,C,X] -> [M,H,C,X]."""
    shared = b.shape[1]
    grouped = weights.unflatten(1, (shared, weights.shape[1] // shared))
    return (grouped.unsqueeze(-1) * b.unsqueeze(2)).flatten(1, 2)
