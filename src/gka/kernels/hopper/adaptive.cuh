// Fewer steps with the same proven bound: certified spectral bounds and a rank-one preconditioner
// (gka/maths/adaptive.py; proof in docs/numerics.md).

// What float16 weights and squares may cost: relative error of F_t^2, and so of |R_t|^2 / F_t^2.
constexpr float SLACK = 1.f / 512.f;

DEVICE float inverse_cosh(float x) { return logf(x + sqrtf(x * x - 1.f)); }

// (k_j . u)^2 of every key, in units of one. Two threads a key.
DEVICE void overlaps(float* out, const Shared& s, const Place& at, float k_max) {
  int row = at.thread / 2, first = at.thread % 2 * (K / 2);
  float sum = 0.f;
#pragma unroll 2
  for (int j = 0; j < K / 16; j++) {
    int column = first + 8 * j;
    uint4 piece = *(const uint4*)(s.k + swizzled(C, row, column));
#pragma unroll
    for (int w = 0; w < 4; w++) {
      u32 pair = ((const u32*)&piece)[w];
      float2 u = *(const float2*)(s.top + column + 2 * w);
      sum += low_half(pair) * u.x + high_half(pair) * u.y;
    }
  }
  sum = (sum + __shfl_xor_sync(~0u, sum, 1)) * k_max;
  if (at.thread % 2 == 0) out[row] = sum * sum;
}

// Replaces the plain iteration where a proven bound asks for fewer steps. w: W_tj.
DEVICE void tighten(Iteration& it, const Ridge& r, const float (&w)[C / 2], const float (&fro)[2],
                    const bool (&empty)[2], Shared& s, const Arguments& a, const Place& at, float k_max) {
  const float* bounds = a.bounds + at.state * 3;  // nu, u^T H16 u, |(H16 - N)^2|_F^(1/2)
  float nu = bounds[0] * r.h_scale, energy = bounds[1] * r.h_scale, remainder = bounds[2] * r.h_scale;
  if (at.thread < K) s.top[at.thread] = a.top[at.state * K + at.thread];
  __syncthreads();  // all have read s.energy, too
  overlaps(s.energy, s, at, k_max);
  __syncthreads();
  float worst = 0.f;
#pragma unroll
  for (int b = 0; b < 2; b++) {
    float cross = 0.f;
#pragma unroll
    for (int j = 0; j < C / 8; j++) {
      float2 overlap = *(const float2*)(s.energy + 8 * j + at.column);
      cross += w[4 * j + 2 * b] * overlap.x + w[4 * j + 2 * b + 1] * overlap.y;
    }
    float inverse = __fdividef(1.f, fro[b]);
    float past = r.zeta[b] * nu * inverse;                                // zeta |N| / F
    float inner = (r.zeta[b] * energy + quad_sum(cross)) * inverse;       // u^T H_t u / F
    float by_norm = sqrtf(fmaxf(1.f - 2.f * past * inner + past * past, 0.f) + SLACK);
    float by_square = (r.zeta[b] * remainder + sqrtf(r.own2[b])) * inverse * (1.f + 2.f * SLACK);
    if (at.valid(b) && !empty[b]) worst = fmaxf(worst, fminf(by_norm, by_square));
    it.tau[b] = __fdividef(past, a.ridge_ratio + past);
  }
  float phi = fmaxf(block_reduce<true>(worst, s.scratch), SLACK);
  float ratio = (a.num_iter + 1) * inverse_cosh(1.f + 2.f * a.ridge_ratio) /
                inverse_cosh(1.f + 2.f * a.ridge_ratio / fminf(phi, 1.f));
  int steps = (int)ceilf(ratio) - 1;
  it.deflated = steps < a.num_iter && nu > 0.f;
  if (steps >= a.num_iter) return;
  float kappa = 1.f + phi / a.ridge_ratio, rho = (kappa - 1.f) / (kappa + 1.f);
  it.steps = steps, it.rho2 = rho * rho, it.step = 2.f / ((kappa + 1.f) * a.ridge_ratio);
}
