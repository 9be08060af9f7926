"""What makes the map fast on a GPU.

`forward`, `backward` and `decode` have the order of the steps, `passes` says what a step is, `triton` and
`hopper` launch the kernels. `surround` has what is fused around the op in a layer. Nothing here chooses,
checks or differentiates: see `gka.ops`.
"""
