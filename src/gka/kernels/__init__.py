"""The map on a GPU.

`forward`, `backward` and `decode` order the steps, `passes` defines them, and the backends `triton` and
`hopper` launch their kernels. `surround` fuses what surrounds the op in a layer. Choice of a backend, checks
and autograd are in `gka.ops`.
"""
