// Conjugate gradients that stop where their own residual proves the error (gka/maths/solvers/cg.py; proof in
// docs/numerics.md), on the tensor cores.
#pragma once

#include "fragments.cuh"

// Unit of A d: lambda_t, unless (SMALL_RIDGE) that is too small for W over it in float16.
DEVICE float unit_of(float ridge_ratio) { return SMALL_RIDGE ? LEAST_UNIT : ridge_ratio; }

// Largest entry to which the right-hand sides are scaled: |d| stays below |q| / a and products of d with keys, over a,
// below float16's limit, while the last d lies far above its smallest number.
DEVICE float entry_of(float ridge_ratio) { return fminf(2.f, 100.f * unit_of(ridge_ratio)); }

// The same numbers, which the compiler cannot know to be the same: it would keep what it has computed from them.
// zero: zero bits, known at run time alone.
template <int N>
DEVICE void forget(u32 (&a)[N], u32 zero) {
#pragma unroll
  for (int i = 0; i < N; i++) a[i] ^= zero;
}

// With SMALL_RIDGE: |d|^2.
DEVICE void square_sums(float (&square)[2], const u32 (&d)[K / 4]) {
#pragma unroll
  for (int j = 0; j < K / 4; j++)
    square[j % 2] += low_half(d[j]) * low_half(d[j]) + high_half(d[j]) * high_half(d[j]);
  square[0] = quad_sum(square[0]), square[1] = quad_sum(square[1]);
}

// With SMALL_RIDGE: whether d's curvature drowns in rounding, or products of finite numbers have overflowed.
DEVICE bool lost(float d_a_d, float square, float size) {
  return d_a_d < LEAST_CURVATURE * square || (!(fabsf(d_a_d) <= FLOAT32_MAX) && size < LARGEST_SIZE);
}

// |r|^2 over that before, in both halves of a word; with SMALL_RIDGE a float, which does not overflow.
DEVICE u32 ratio(float value) { return SMALL_RIDGE ? __float_as_uint(value) : both(value); }

// With SMALL_RIDGE: r + keep d for two numbers, finite whatever r is, and 0 in rows that have ended.
DEVICE u32 within_range(u32 d, const float* r, u32 keep, bool done) {
  float by = __uint_as_float(keep);
  float low = fminf(fmaxf(r[0] + by * low_half(d), -LARGEST_ENTRY), LARGEST_ENTRY);
  float high = fminf(fmaxf(r[1] + by * high_half(d), -LARGEST_ENTRY), LARGEST_ENTRY);
  return done ? 0u : pack(low, high);
}

// p_tj = (d_t . k_j) W_tj / (F_t unit) for 16 keys, from `scores`; adds p_tj (d_t . k_j) to `along`.
DEVICE void weigh_step(u32* p, const float* scores, uint4 w, float (&along)[4]) {
#pragma unroll
  for (int m = 0; m < 4; m++) {
    float low = scores[2 * m], high = scores[2 * m + 1];
    p[m] = times(pack(low, high), ((const u32*)&w)[m]);
    along[m % 2] += low * low_half(p[m]);
    along[2 + m % 2] += high * high_half(p[m]);
  }
}

// x += s d for a part of the row: numbers 16 n to 16 n + 15 of the thread. The first of them are in registers.
DEVICE void add_step(float (&x)[K / 2], float4* held, const u32 (&d)[K / 4], const float (&s)[2], int n, int thread) {
#pragma unroll
  for (int i = 4 * n; i < 4 * n + 4; i++) {  // four numbers
    float low[2] = {low_half(d[2 * i]), low_half(d[2 * i + 1])};
    float high[2] = {high_half(d[2 * i]), high_half(d[2 * i + 1])};
    if (4 * i < K / 2 - HELD) {
#pragma unroll
      for (int b = 0; b < 2; b++) x[4 * i + 2 * b] += s[b] * low[b], x[4 * i + 2 * b + 1] += s[b] * high[b];
    } else {
      float4* to = held + (i - (K / 2 - HELD) / 4) * THREADS + thread;
      float4 four = *to;
      *to = {four.x + s[0] * low[0], four.y + s[0] * high[0], four.z + s[1] * low[1], four.w + s[1] * high[1]};
    }
  }
}

// x of A_t x_t = q_t in units of 1/F_t. On entry `r` holds q; `zeta`: factor of H16 in A_t / unit; `weights` of Shared:
// W / (F unit); `own`: lambda_t / unit, read if SMALL_RIDGE, else one. A row is proven when |r|^2 <= stop x.(q + r),
// where x.(q + r) is the sum of the steps' s |r|^2, and then stands still. Returns the steps of the chunk's slowest
// row. The rounded d enters x, r and the row sums alike. What needs no product runs between the issues of products,
// which block the warp.
DEVICE int conjugate_gradients(float (&x)[K / 2], float (&r)[K / 2], float4* held, Shared& s, const Place& at,
                               const float (&zeta)[2], float unit, float own, float stop, int most) {
  u32 d[K / 4], k = shared_address(s.k), h = shared_address(s.h), zero = __float_as_uint(stop) & 0x80000000u;
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
    float scores[C / 2], a_d[K / 2], along[4] = {0.f, 0.f, 0.f, 0.f};  // A d / unit
    u32 p[C / 4];
    mma_begin();
    product<K, 1, true, C>(scores, d, k, false);
    mma_commit();
    product_part<0, 2, 1, true, K>(a_d, d, h, false);
    mma_commit();
    mma_wait<1>();
    hold(scores);
    product_while<2, K / 16, 1, true, K>(a_d, d, h, true, [&](int i) {
      int n = i - 2;
      if (n < C / 16) weigh_step(p + 4 * n, scores + 8 * n, s.weights[n * THREADS + at.thread], along);
    });
    mma_commit();
#pragma unroll
    for (int n = K / 16 - 2; n < C / 16; n++)
      weigh_step(p + 4 * n, scores + 8 * n, s.weights[n * THREADS + at.thread], along);
    mma_wait<0>();
    hold(a_d);
    forget(d, zero);
#pragma unroll
    for (int j = 0; j < K / 4; j++) {
      float low = low_half(d[j]), high = high_half(d[j]);
      a_d[2 * j] = zeta[j % 2] * a_d[2 * j] + (SMALL_RIDGE ? own * low : low);
      a_d[2 * j + 1] = zeta[j % 2] * a_d[2 * j + 1] + (SMALL_RIDGE ? own * high : high);
      along[j % 2] += a_d[2 * j] * low;
      along[2 + j % 2] += a_d[2 * j + 1] * high;
    }
    float length[2], square[2] = {0.f, 0.f};  // square: |d|^2
    if (SMALL_RIDGE) square_sums(square, d);
#pragma unroll
    for (int b = 0; b < 2; b++) {
      float d_a_d = quad_sum(along[b] + along[2 + b]);
      done[b] = done[b] || (SMALL_RIDGE ? lost(unit * d_a_d, square[b], size[b]) : d_a_d <= 0.f);  // not NaN
      length[b] = done[b] ? 0.f : __fdividef(size[b], unit * d_a_d);
      energy[b] += length[b] * size[b];
    }
    forget(d, zero);
    mma_begin();
    product_while<0, C / 16, 1, false, C>(a_d, p, k, true, [&](int n) {
      if (n < K / 32) add_step(x, held, d, length, n, at.thread);
    });
    mma_commit();
    float now[4] = {0.f, 0.f, 0.f, 0.f}, by[2] = {unit * length[0], unit * length[1]};
    mma_wait<0>();
    hold(a_d);
#pragma unroll
    for (int i = 0; i < K / 2; i++) {
      r[i] -= by[i / 2 % 2] * a_d[i];
      now[i % 4] += r[i] * r[i];
    }
    u32 keep[2];
#pragma unroll
    for (int b = 0; b < 2; b++) {
      float before = size[b];
      size[b] = quad_sum(now[2 * b] + now[2 * b + 1]);
      done[b] = done[b] || !(size[b] > stop * energy[b]) || size[b] > LARGEST_SIZE;  // NaN too
      keep[b] = ratio(done[b] ? 0.f : __fdividef(size[b], before));
    }
#pragma unroll
    for (int j = 0; j < K / 4; j++)
      d[j] = SMALL_RIDGE ? within_range(d[j], r + 2 * j, keep[j % 2], done[j % 2])
                         : times_plus(keep[j % 2], d[j], pack(r[2 * j], r[2 * j + 1]));
  }
#pragma unroll
  for (int i = 0; i < HELD / 4; i++) {
    float4 four = held[i * THREADS + at.thread];
    x[K / 2 - HELD + 4 * i] = four.x, x[K / 2 - HELD + 4 * i + 1] = four.y;
    x[K / 2 - HELD + 4 * i + 2] = four.z, x[K / 2 - HELD + 4 * i + 3] = four.w;
  }
  return steps;
}
