// Fewer steps with the same proven error bound (gka/maths/solvers/adaptive.py; proof in docs/numerics.md): the
// rank-one Nystroem part N_t = strength_t F_t w_t w_t^T <= H_t of every token, and a certified bound of H_t - N_t.
#pragma once

#include "chebyshev.cuh"
#include "ridge.cuh"

// Relative errors of the chunk's own share of F_t^2 (float16 weights and squares), of float32 sums, and of the
// operator (the solve holds its weights in float16).
constexpr float SLACK_OWN = 1.f / 2048.f, SLACK_SUM = 1.f / 65536.f, SLACK_OPERATOR = 1.f / 1024.f;

DEVICE float arcosh_1p(float x) { return log1pf(x + sqrtf(x * (x + 2.f))); }  // acosh(1 + x), accurate for small x too

// v, the unit vector along the sum of the chunk's keys, rounded to float16, as a left operand whose rows are all v.
// Zero if the sum is zero.
DEVICE void mean_key(u32 (&v)[K / 4], const float (&sum)[K / 2]) {
  float norm2 = 0.f;
#pragma unroll
  for (int j = 0; j < K / 8; j++) norm2 += sum[4 * j] * sum[4 * j] + sum[4 * j + 1] * sum[4 * j + 1];
  norm2 = quad_sum(norm2);
  float inverse = norm2 > TINY ? rsqrtf(norm2) : 0.f;
#pragma unroll
  for (int j = 0; j < K / 8; j++)
    v[2 * j] = v[2 * j + 1] = pack(sum[4 * j] * inverse, sum[4 * j + 1] * inverse);
}

// The trace of H16.
DEVICE float trace_of_state(const Shared& s, const Place& at) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < K / 32; i++) {
    int row = 32 * i + at.lane;
    sum += low_half(*(const u16*)(s.h + swizzled(K, row, row)));
  }
  return warp_sum(sum);
}

// Replaces the plain iteration if a proven bound takes fewer steps; leaves w_t in it.vectors. w: W_tj.
DEVICE void tighten(Iteration& it, const Ridge& r, const float (&w)[C / 2], const float (&key_sum)[K / 2],
                    const float (&fro)[2], const bool (&empty)[2], Shared& s, const Arguments& a,
                    const Place& at, float h_scale, float k_max) {
  u32 v[K / 4], left[C / 4];
  float dot[C / 2], u[K / 2], trace[2] = {0.f, 0.f}, k2 = k_max * k_max;
  mean_key(v, key_sum);
  mma_begin();
  product<K, 1, true, C>(dot, v, shared_address(s.k), false);
  mma_commit();
  product<K, 1, true, K>(u, v, shared_address(s.h), false);
  mma_commit();
  float h_trace = trace_of_state(s, at) * h_scale;
  // u_t = H_t v / F_t; its two parts are in units of the larger
  float past[2], own[2], unit_of[2], inverse[2];
#pragma unroll
  for (int b = 0; b < 2; b++) {
    inverse[b] = __fdividef(1.f, fro[b]);
    float of_start = r.zeta[b] * h_scale, most = fmaxf(fmaxf(of_start, k2), TINY);
    past[b] = of_start / most, own[b] = k2 / most, unit_of[b] = most * inverse[b];
  }
  mma_wait<1>();
  hold(dot);
#pragma unroll
  for (int j = 0; j < C / 8; j++) {
    float2 norm2 = *(const float2*)(s.key_norm2 + 8 * j + at.column);
#pragma unroll
    for (int b = 0; b < 2; b++) {
      int i = 4 * j + 2 * b;
      left[2 * j + b] = pack(w[i] * dot[i] * own[b], w[i + 1] * dot[i + 1] * own[b]);
      trace[b] += w[i] * norm2.x + w[i + 1] * norm2.y;
    }
  }
  mma_wait<0>();
  hold(u);
#pragma unroll
  for (int i = 0; i < K / 2; i++) u[i] *= past[i / 2 % 2];
  mma_begin();
  product<C, 1, false, C>(u, left, shared_address(s.k), true);
  mma_commit();
  mma_wait<0>();
  hold(u);
  float theta[2] = {0.f, 0.f}, norm2[2] = {0.f, 0.f}, strength[2];
#pragma unroll
  for (int j = 0; j < K / 8; j++) {
    float low = low_half(v[2 * j]), high = high_half(v[2 * j]);
#pragma unroll
    for (int b = 0; b < 2; b++) {
      int i = 4 * j + 2 * b;
      u[i] *= unit_of[b], u[i + 1] *= unit_of[b];
      theta[b] += u[i] * low + u[i + 1] * high;
      norm2[b] += u[i] * u[i] + u[i + 1] * u[i + 1];
    }
  }
  u32 unit[K / 4];
#pragma unroll
  for (int b = 0; b < 2; b++) {
    theta[b] = quad_sum(theta[b]), norm2[b] = quad_sum(norm2[b]);
    strength[b] = __fdividef(norm2[b], fmaxf(theta[b], 0.f) * (1.f + SLACK_OPERATOR) + THETA_FLOOR);
    float length = norm2[b] > TINY ? rsqrtf(norm2[b]) : 0.f;
#pragma unroll
    for (int j = 0; j < K / 8; j++)
      unit[2 * j + b] = pack(u[4 * j + 2 * b] * length, u[4 * j + 2 * b + 1] * length);
  }
  // w_t^T H_t w_t / F_t
  float rayleigh[2] = {0.f, 0.f}, along[C / 2];
  mma_begin();
  product<K, 1, true, C>(along, unit, shared_address(s.k), false);
  mma_commit();
  product<K, 1, true, K>(u, unit, shared_address(s.h), false);
  mma_commit();
#pragma unroll
  for (int n = 0; n < K / 16; n++)
    it.vectors[n * THREADS + at.thread] =
        uint4{unit[4 * n], unit[4 * n + 1], unit[4 * n + 2], unit[4 * n + 3]};
  mma_wait<0>();
  hold(along), hold(u);
#pragma unroll
  for (int b = 0; b < 2; b++) {
    float past = 0.f, own = 0.f;
#pragma unroll
    for (int j = 0; j < K / 8; j++)
      past += u[4 * j + 2 * b] * low_half(unit[2 * j + b]) + u[4 * j + 2 * b + 1] * high_half(unit[2 * j + b]);
#pragma unroll
    for (int j = 0; j < C / 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++)
        own += w[4 * j + 2 * b + e] * along[4 * j + 2 * b + e] * along[4 * j + 2 * b + e];
    rayleigh[b] = quad_sum(r.zeta[b] * h_scale * past + k2 * own) * inverse[b];
    trace[b] = (r.zeta[b] * h_trace + k2 * quad_sum(trace[b])) * inverse[b];
  }
  // bound of |R_t|_2 / F_t from trace and Frobenius norm (Wolkowicz and Styan)
  float worst = 0.f;
#pragma unroll
  for (int b = 0; b < 2; b++) {
    float mean = (trace[b] - strength[b]) * (1.f / K);
    float square = 1.f - 2.f * strength[b] * rayleigh[b] + strength[b] * strength[b];
    float slack = SLACK_OWN * r.own2[b] * inverse[b] * inverse[b] + SLACK_SUM;
    float spread = (1.f - 1.f / K) * fmaxf(square - K * mean * mean, 0.f) + slack;
    if (at.valid(b) && !empty[b]) worst = fmaxf(worst, mean + sqrtf(spread) + SLACK_OPERATOR);
    it.tau[b] = __fdividef(strength[b], a.ridge_ratio + strength[b]);
  }
  float phi = fmaxf(block_reduce<true>(worst, s.scratch), SLACK_OPERATOR);
  float ratio = (a.num_iter + 1) * arcosh_1p(2.f * a.ridge_ratio) /
                arcosh_1p(2.f * a.ridge_ratio / fminf(phi, 1.f));
  int steps = (int)ceilf(ratio) - 1;
  it.deflated = WORTHWHILE_OF * steps <= WORTHWHILE * a.num_iter;
  if (!it.deflated) return;
  float kappa = 1.f + phi / a.ridge_ratio, rho = (kappa - 1.f) / (kappa + 1.f);
  it.steps = steps, it.rho2 = rho * rho, it.step = 2.f / ((kappa + 1.f) * a.ridge_ratio);
}
