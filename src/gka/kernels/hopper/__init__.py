"""The op on Hopper (sm_90a) in CUDA C++: one block per chunk of 64 tokens and head.

| file | computes |
|---|---|
| `sums.cu`, `combine.cu`, `scan.cu` | H and U at chunk starts, and their gradients at chunk ends |
| `forward.cu` | ridge, solve, mix, readout |
| `adjoint.cu` | adjoints of readout and mix, adjoint solve |
| `gradients.cu` | gradients of keys, values, decays and write gate |
| `decode.cu` | tokens one after another |

Operands of the tensor cores are float16, each scaled by its largest entry. The scans take inputs unscaled in
their own dtype, and weighted inputs as differences of two such numbers.
"""
