// Log decays with a lower limit.
#pragma once

#include "tensor_cores.cuh"

// A log decay, at least RESET, whose exp is zero. In sums -inf would give inf - inf between later tokens, and -1e18
// would absorb what follows. 64 of RESET sum to 8192, whose float32 rounding is 5e-4, that of a 16-bit operand.
DEVICE float log_decay(float g) { return g < RESET ? RESET : g; }  // NaN stays NaN
