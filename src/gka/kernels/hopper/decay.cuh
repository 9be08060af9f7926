// Log decays, bounded below.
#pragma once

#include "tensor_cores.cuh"

// A log decay, not below RESET, whose exp is zero. -inf would give inf - inf between later tokens, and a sum would
// lose what follows -1e18. 64 of them sum to 8192, which rounds what follows by 5e-4, as a 16-bit operand does.
DEVICE float log_decay(float g) { return g < RESET ? RESET : g; }  // keeps NaN
