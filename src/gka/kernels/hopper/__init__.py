"""The op on Hopper (sm_90a) in CUDA C++, a chunk of 64 tokens and a head to a block.

`sums.cu`, `combine.cu`, `scan.cu`: H and U at chunk starts, and their gradients at chunk ends. `forward.cu`:
ridge, solve, mix, readout. `adjoint.cu`: readout's and mix's adjoint, solve. `gradients.cu`: keys, values,
decays, write gate. Tensor cores take float16 operands, each scaled by its largest entry; in the scans inputs
as they came, and weighted ones as pairs of numbers. `decode.cu`: tokens
one after another.
"""
