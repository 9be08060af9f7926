// A chunk's ridge systems and their solution (gka/maths/ridge.py).
#pragma once

#include "chebyshev.cuh"
#include "ridge.cuh"
#if ADAPTIVE
#include "adaptive.cuh"
#elif CG
#include "cg.cuh"
#endif

// A chunk's systems, prepared for `solve`.
struct System {
  Iteration it;
  float fro[2], zeta[2], lambda, h_scale;  // fro: F_t, one where empty
  float h_factor[2], w_factor[2];          // scale H16 and W for the iteration
  bool empty[2];
};

// Finds the spectrum's bounds and the step count; leaves W / F in shared memory, and w_t in `vectors` there.
DEVICE System prepare(Shared& s, const Arguments& a, const Place& at, const GateLoads& of, float k_max,
                      unsigned char* vectors) {
  float w[C / 2], key_sum[ADAPTIVE ? K / 2 : 1];
  Ridge r = ridge(w, key_sum, s, at, of, k_max);
  System y;
  y.h_scale = of.h_scale;
#pragma unroll
  for (int b = 0; b < 2; b++) {
    y.empty[b] = r.fro2[b] < a.empty_below * a.empty_below;
    y.fro[b] = y.empty[b] ? 1.f : __fsqrt_rn(r.fro2[b]);
    y.zeta[b] = r.zeta[b];
  }
  float rho = 1.f / (1.f + 2.f * a.ridge_ratio);
  y.it.rho2 = rho * rho, y.it.step = 2.f * rho, y.it.steps = a.num_iter, y.it.deflated = false;
  y.it.vectors = (uint4*)vectors;
#if ADAPTIVE
  tighten(y.it, r, w, key_sum, y.fro, y.empty, s, a, at, of.h_scale, k_max);
#endif
#if CG
  y.it.step = 1.f;
#endif
  y.lambda = a.ridge_ratio * y.it.step;
  __syncthreads();  // every thread has read the squares that W / F overwrites
#pragma unroll
  for (int b = 0; b < 2; b++) {
    float unit = __fdividef(y.it.step, y.fro[b]);
#if CG
    unit = __fdividef(unit, unit_of(a.ridge_ratio));
#endif
    y.h_factor[b] = y.zeta[b] * of.h_scale * unit;
    y.w_factor[b] = fmaxf(unit * k_max * k_max, 1e-37f);  // keeps quotients by it finite
  }
#pragma unroll
  for (int n = 0; n < C / 16; n++) {
    uint4 four;
#pragma unroll
    for (int m = 0; m < 4; m++)
      ((u32*)&four)[m] = pack(w[8 * n + 2 * m] * y.w_factor[m % 2], w[8 * n + 2 * m + 1] * y.w_factor[m % 2]);
    s.weights[n * THREADS + at.thread] = four;
  }
  return y;
}

// x_t of A_t x_t = rhs_t, zero where the history is empty; overwrites rhs. With conjugate gradients, counts the steps.
DEVICE void solve_chunk(float (&x)[K / 2], float (&rhs)[K / 2], Shared& s, System& y, const Arguments& a,
                        const Place& at) {
  float largest[2], factor[2];
  row_maxima(largest, rhs);
#if CG
  float entry = entry_of(a.ridge_ratio);
  largest[0] = __fdividef(largest[0], entry), largest[1] = __fdividef(largest[1], entry);
#endif
#pragma unroll
  for (int b = 0; b < 2; b++) factor[b] = y.empty[b] ? 0.f : __fdividef(1.f, largest[b]);
#pragma unroll
  for (int i = 0; i < K / 2; i++) rhs[i] *= factor[i / 2 % 2];
#if CG
  float unit = unit_of(a.ridge_ratio), own = __fdividef(a.ridge_ratio, unit);
  float4* held = (float4*)y.it.vectors;
  y.it.steps = conjugate_gradients(x, rhs, held, s, at, y.h_factor, unit, own, a.stop, a.num_iter);
#else
#if ADAPTIVE
  if (y.it.deflated)
    solve<true>(x, rhs, s, at, y.it, y.h_factor, y.lambda);
  else
#endif
    solve<false>(x, rhs, s, at, y.it, y.h_factor, y.lambda);
#endif
#pragma unroll
  for (int b = 0; b < 2; b++) factor[b] = largest[b] * __fdividef(y.it.step, y.fro[b]);
#pragma unroll
  for (int i = 0; i < K / 2; i++) x[i] *= factor[i / 2 % 2];
}

// scores o W, W with the decay of U, as a left operand.
DEVICE void weigh_scores(u32 (&p)[C / 4], const float (&scores)[C / 2], const Shared& s, const Place& at) {
  float w[C / 2];
  weights(w, s.decay_u, s.beta2, at);
#pragma unroll
  for (int i = 0; i < C / 4; i++) p[i] = pack(scores[2 * i] * w[2 * i], scores[2 * i + 1] * w[2 * i + 1]);
}
