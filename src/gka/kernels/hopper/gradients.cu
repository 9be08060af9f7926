// Gradients of keys, values, decays and write gate of one chunk of one head (gka/maths/adjoint.py): first
// through U, then through H. The two parts of dk, and those of d(beta^2), are added in registers.

#include "through_h.cuh"
#include "through_u.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    gka_gradients(const __grid_constant__ Arguments a) {
  extern __shared__ unsigned char raw[];
  Tiles& s = *(Tiles*)(raw + (-(int)shared_address(raw) & 1023));
  Place at(a);
  float dk[K / 2], d_beta2[2] = {0.f, 0.f}, one[2] = {1.f, 1.f}, k_max;
  {
    Largest most = load_tiles(s, a, at);
    k_max = most.k;
    copies_wait<0>();
    publish_shared();
    __syncthreads();
    through_u(dk, d_beta2, s, most, a, again(at));
  }
  through_h(dk, d_beta2, s, k_max, a, again(at));
  store_gradient<K>(a.dk, a.key_heads < a.heads, dk, one, a, again(at));
  if (a.d_beta2 == nullptr || at.thread >= 32) return;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    int row = 2 * at.lane + e;
    if (row < at.length) a.d_beta2[(at.start + row) * a.heads + at.head] = d_beta2[e];
  }
}
