"""What is fused around the op in a layer, in Triton: convolution, gates, gated norm, a step of decoding."""
