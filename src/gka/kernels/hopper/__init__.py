"""The op on Hopper (sm_90a) in CUDA C++, one block per chunk of 64 tokens and head.

`sums.cu`, `combine.cu`, `scan.cu`: H and U at chunk starts, and their gradients at chunk ends. `forward.cu`:
ridge, solve, mix, readout. `adjoint.cu`: adjoints of readout and mix, solve. `gradients.cu`: keys, values,
decays, write gate. `decode.cu`: token by token.

Operands of the tensor cores are float16, each scaled by its largest entry. The scans multiply the inputs
as they are; weighted inputs are pairs of numbers.
"""
