"""Triton kernels around the op in a layer: convolution, gates, gated norm, and a step of decoding."""
