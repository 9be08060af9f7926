"""The op in Triton: any NVIDIA GPU from compute capability 8.0, or interpreted on a CPU."""
