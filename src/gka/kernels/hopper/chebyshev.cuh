// Chebyshev iteration on the tensor cores, residual form (gka/maths/solvers/chebyshev.py).
#pragma once

#include "fragments.cuh"

// Parameters of the iteration on P^-1 A, scaled to a spectrum around one.
struct Iteration {
  float step;    // 2/(L + mu) in units of 1/F_t
  float rho2;    // ((L - mu)/(L + mu))^2
  int steps;
  float tau[2];  // P_t^-1 = (1 - tau_t w_t w_t^T) / lambda_t if `deflated`
  bool deflated;
  uint4* vectors;  // w_t of this thread's tokens, in shared memory
};

// -tau w^T r for this thread's two rows. Products are summed in float16 by fours: the rounding is unbiased, and
// small beside that of r.
DEVICE void project(u32 (&minus)[2], const u32 (&r)[K / 4], const u32 (&w)[K / 4], const float (&tau)[2]) {
#pragma unroll
  for (int b = 0; b < 2; b++) {
    float along = 0.f;
#pragma unroll
    for (int n = 0; n < K / 4; n += 8) {
      u32 sum = times(r[n + b], w[n + b]);
#pragma unroll
      for (int m = 2; m < 8; m += 2) sum = times_plus(r[n + m + b], w[n + m + b], sum);
      along += low_half(sum) + high_half(sum);
    }
    minus[b] = both(-tau[b] * quad_sum(along));
  }
}

// x of A_t x_t = rhs_t, up to the factor step/F_t. On entry `residual` holds rhs (largest entry of a row one).
// The update d is rounded to float16 before it enters both x and the residual, so neither its rounding nor that of
// its parts costs accuracy.
template <bool DEFLATED>
DEVICE void solve(float (&x)[K / 2], float (&residual)[K / 2], Shared& s, const Place& at,
                  const Iteration& it, const float (&h_factor)[2], float lambda) {
  u32 d[K / 4], zeta_d[K / 4], zeta[2] = {both(h_factor[0]), both(h_factor[1])};
#pragma unroll
  for (int i = 0; i < K / 2; i++) x[i] = 0.f;
#pragma unroll
  for (int i = 0; i < K / 4; i++) d[i] = 0;
  u32 k = shared_address(s.k), h = shared_address(s.h);
  float omega = 2.f;
  u32 gain = both(1.f), keep = 0;  // d <- keep d + gain (1 - tau w w^T) residual
  for (int i = 0;; i++) {
    u32 r[K / 4];
#pragma unroll
    for (int j = 0; j < K / 4; j++)
      r[j] = pack(residual[2 * j], residual[2 * j + 1]);
    if (DEFLATED) {
      u32 w[K / 4], minus[2];
#pragma unroll
      for (int n = 0; n < K / 16; n++) {
        uint4 four = it.vectors[n * THREADS + at.thread];
#pragma unroll
        for (int m = 0; m < 4; m++) w[4 * n + m] = ((const u32*)&four)[m];
      }
      project(minus, r, w, it.tau);
#pragma unroll
      for (int j = 0; j < K / 4; j++) r[j] = times_plus(minus[j % 2], w[j], r[j]);
    }
#pragma unroll
    for (int j = 0; j < K / 4; j++) d[j] = times_plus(gain, r[j], times(keep, d[j]));
    if (i == it.steps) break;
    omega = __fdividef(4.f, 4.f - it.rho2 * omega), gain = both(omega), keep = both(omega - 1.f);
    float scores[C / 2];
    mma_begin();
    product<K, 1, true, C>(scores, d, k, false);
    mma_commit();
#pragma unroll
    for (int j = 0; j < K / 4; j++) {  // while that product runs
      float low = low_half(d[j]), high = high_half(d[j]);
      residual[2 * j] -= lambda * low, residual[2 * j + 1] -= lambda * high;
      x[2 * j] += low, x[2 * j + 1] += high;
      zeta_d[j] = times(d[j], zeta[j % 2]);
    }
    mma_begin();
    product<K, -1, true, K>(residual, zeta_d, h, true);
    mma_commit();
    mma_wait<1>();
    hold(scores);
    u32 p[C / 4];
#pragma unroll
    for (int n = 0; n < C / 16; n++) {
      uint4 w = s.weights[n * THREADS + at.thread];
      const u32* words = (const u32*)&w;
#pragma unroll
      for (int m = 0; m < 4; m++)
        p[4 * n + m] = times(pack(scores[8 * n + 2 * m], scores[8 * n + 2 * m + 1]), words[m]);
    }
    mma_begin();
    product<C, -1, false, C>(residual, p, k, true);
    mma_commit();
    mma_wait<0>();
    hold(residual);
  }
#pragma unroll
  for (int j = 0; j < K / 4; j++) {
    x[2 * j] += low_half(d[j]);
    x[2 * j + 1] += high_half(d[j]);
  }
}
