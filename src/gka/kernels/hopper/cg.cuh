// Conjugate gradients that stop where their own residual proves the error (gka/maths/solvers/cg.py; proof in
// docs/numerics.md), on the tensor cores.
#pragma once

#include "fragments.cuh"

// Largest entry to which the right-hand sides are scaled. Neither d, whose length is at most that of q / a, nor d^T k
// then leaves float16's range, and the last d lies far above its smallest number.
DEVICE float entry_of(float ridge_ratio) { return fminf(8.f, 400.f * ridge_ratio); }

// x of A_t x_t = q_t in units of 1/F_t. On entry `r` holds q; `zeta`: factor of H16. A row is proven when
// |r|^2 <= stop x.(q + r), where x.(q + r) is the sum of the steps' s |r|^2, and then stands still. Returns the
// steps of the chunk's slowest row. The rounded d enters x, r and the row sums alike.
DEVICE int conjugate_gradients(float (&x)[K / 2], float (&r)[K / 2], float4* held, Shared& s, const Place& at,
                               const float (&zeta)[2], float lambda, float stop, int most) {
  u32 d[K / 4], k = shared_address(s.k), h = shared_address(s.h);
  float size[2] = {0.f, 0.f}, energy[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < K / 2; i++) size[i / 2 % 2] += r[i] * r[i], x[i] = 0.f;
#pragma unroll
  for (int j = 0; j < K / 4; j++) d[j] = pack(r[2 * j], r[2 * j + 1]);
#pragma unroll
  for (int i = 0; i < HELD / 4; i++) held[i * THREADS + at.thread] = {0.f, 0.f, 0.f, 0.f};
  size[0] = quad_sum(size[0]), size[1] = quad_sum(size[1]);
  bool done[2] = {size[0] == 0.f, size[1] == 0.f};  // not for NaN, which one step spreads over the row
  int steps = 0;
#pragma unroll 1
  while (__syncthreads_or(!done[0] || !done[1]) && steps < most) {
    steps++;
    float scores[C / 2], a_d[K / 2], length[2], d_a_d[2] = {0.f, 0.f};
    mma_begin();
    product<K, 1, true, C>(scores, d, k, false);
    mma_commit();
    product<K, 1, true, K>(a_d, d, h, false);
    mma_commit();
    mma_wait<1>();
    hold(scores);
    u32 p[C / 4];
#pragma unroll
    for (int n = 0; n < C / 16; n++) {
      uint4 w = s.weights[n * THREADS + at.thread];
#pragma unroll
      for (int m = 0; m < 4; m++) {
        float low = scores[8 * n + 2 * m], high = scores[8 * n + 2 * m + 1];
        u32 weighted = p[4 * n + m] = times(pack(low, high), ((const u32*)&w)[m]);
        d_a_d[m % 2] += low * low_half(weighted);
        d_a_d[m % 2] += high * high_half(weighted);
      }
    }
    mma_wait<0>();
    hold(a_d);
#pragma unroll
    for (int j = 0; j < K / 4; j++) {
      float low = low_half(d[j]), high = high_half(d[j]);
      a_d[2 * j] = zeta[j % 2] * a_d[2 * j] + lambda * low;
      a_d[2 * j + 1] = zeta[j % 2] * a_d[2 * j + 1] + lambda * high;
      d_a_d[j % 2] += a_d[2 * j] * low;
      d_a_d[j % 2] += a_d[2 * j + 1] * high;
    }
    mma_begin();
    product<C, 1, false, C>(a_d, p, k, true);
    mma_commit();
#pragma unroll
    for (int j = 0; j < K / 4; j++) asm volatile("" : "+r"(d[j]));  // widen again: 64 numbers would be spilled
#pragma unroll
    for (int b = 0; b < 2; b++) {  // while that product runs
      d_a_d[b] = quad_sum(d_a_d[b]);
      length[b] = done[b] ? 0.f : __fdividef(size[b], d_a_d[b]);
      energy[b] += length[b] * size[b];
    }
#pragma unroll
    for (int j = 0; j < (K / 2 - HELD) / 2; j++) {
      x[2 * j] += length[j % 2] * low_half(d[j]);
      x[2 * j + 1] += length[j % 2] * high_half(d[j]);
    }
#pragma unroll
    for (int i = 0; i < HELD / 4; i++) {
      float4 four = held[i * THREADS + at.thread];
      u32 first = d[(K / 2 - HELD) / 2 + 2 * i], second = d[(K / 2 - HELD) / 2 + 2 * i + 1];
      four.x += length[0] * low_half(first), four.y += length[0] * high_half(first);
      four.z += length[1] * low_half(second), four.w += length[1] * high_half(second);
      held[i * THREADS + at.thread] = four;
    }
    mma_wait<0>();
    hold(a_d);
    float now[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < K / 2; i++) {
      r[i] -= length[i / 2 % 2] * a_d[i];
      now[i / 2 % 2] += r[i] * r[i];
    }
    u32 keep[2];
#pragma unroll
    for (int b = 0; b < 2; b++) {
      float before = size[b];
      size[b] = quad_sum(now[b]);
      done[b] = done[b] || !(size[b] > stop * energy[b]) || size[b] > 1e37f;  // NaN too
      keep[b] = both(done[b] ? 0.f : __fdividef(size[b], before));
    }
#pragma unroll
    for (int j = 0; j < K / 4; j++) d[j] = times_plus(keep[j % 2], d[j], pack(r[2 * j], r[2 * j + 1]));
  }
#pragma unroll
  for (int i = 0; i < HELD / 4; i++) {
    float4 four = held[i * THREADS + at.thread];
    x[K / 2 - HELD + 4 * i] = four.x, x[K / 2 - HELD + 4 * i + 1] = four.y;
    x[K / 2 - HELD + 4 * i + 2] = four.z, x[K / 2 - HELD + 4 * i + 3] = four.w;
  }
  return steps;
}
