// Log decays as the kernels take them.
#pragma once

#include "tensor_cores.cuh"

// A log decay, not below RESET, whose exp is zero: -inf would give inf - inf between the tokens behind it, and a
// sum would swallow what follows -1e18. 64 of them sum to 8192: 5e-4 of what follows, a 16-bit operand's rounding.
DEVICE float log_decay(float g) { return g < RESET ? RESET : g; }  // NaN stays NaN
