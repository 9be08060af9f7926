"""What makes the map fast on a GPU: Triton kernels named as in `gka.maths`, and their launcher.

Nothing here chooses, checks or differentiates: see `gka.ops`. `import gka.kernels.launch` needs triton.
"""
