"""The map's GPU kernels, and the passes that launch them.

`forward`, `backward` and `decode` give the order of the steps, `passes` defines the steps, `triton` and
`hopper` launch the kernels. `surround` has the fused kernels around the op in a layer. Checks, the choice
of a backend and autograd are in `gka.ops`.
"""
