"""The layer's mathematics in plain torch: any device, any float dtype, one quantity per file.

Reading order: `reference` (the whole map, token by token), then the same map chunk by chunk:
`layout`, `moments`, `ridge`, `solvers`, `readout`, `chunked`, and its derivative, `adjoint`.
Symbols and derivations: docs/maths.md.
"""
