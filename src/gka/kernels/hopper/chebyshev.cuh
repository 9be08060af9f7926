// Chebyshev iteration on the tensor cores, residual form (gka/maths/chebyshev.py).

// The iteration's numbers: B = P^-1 A scaled to a spectrum around one.
struct Iteration {
  float step;    // 2/(L + mu) in units of 1/F_t
  float rho2;    // ((L - mu)/(L + mu))^2
  int steps;
  float tau[2];  // P_t^-1 = (1 - tau_t w_t w_t^T) / lambda_t where `deflated`
  bool deflated;
};

// x of A_t x_t = rhs_t, up to the factor step/F_t. On entry `residual` holds rhs (largest entry of a row one).
// The update d is rounded to float16 before it enters both x and the residual: rounding it costs no accuracy.
template <bool DEFLATED>
DEVICE void solve(float (&x)[K / 2], float (&residual)[K / 2], Shared& s, const Place& at,
                  const Iteration& it, const float (&h_factor)[2], float lambda) {
  u32 d[K / 4], zeta_d[K / 4], zeta[2];
#pragma unroll
  for (int b = 0; b < 2; b++) zeta[b] = pack(h_factor[b], h_factor[b]);
#pragma unroll
  for (int i = 0; i < K / 2; i++) x[i] = 0.f;
#pragma unroll
  for (int i = 0; i < K / 4; i++) d[i] = 0;
  u32 k = shared_address(s.k), h = shared_address(s.h);
  float omega = 2.f, gain = 1.f, keep = 0.f;  // d <- keep d + gain (1 - tau w w^T) residual
  for (int i = 0;; i++) {
    float along[2] = {0.f, 0.f};
    u32 w[DEFLATED ? K / 4 : 1];
    if (DEFLATED) {
#pragma unroll
      for (int n = 0; n < K / 16; n++) {
        uint4 four = ((const uint4*)s.v)[n * THREADS + at.thread];
#pragma unroll
        for (int m = 0; m < 4; m++) w[4 * n + m] = ((const u32*)&four)[m];
      }
#pragma unroll
      for (int j = 0; j < K / 4; j++)
        along[j % 2] += residual[2 * j] * low_half(w[j]) + residual[2 * j + 1] * high_half(w[j]);
#pragma unroll
      for (int b = 0; b < 2; b++) along[b] = quad_sum(along[b]) * it.tau[b];
    }
#pragma unroll
    for (int j = 0; j < K / 4; j++) {
      float low = residual[2 * j], high = residual[2 * j + 1];
      if (DEFLATED) low -= along[j % 2] * low_half(w[j]), high -= along[j % 2] * high_half(w[j]);
      low = gain * low + keep * low_half(d[j]);
      high = gain * high + keep * high_half(d[j]);
      d[j] = pack(low, high);
      zeta_d[j] = times(d[j], zeta[j % 2]);
    }
    if (i == it.steps) break;
    omega = 4.f / (4.f - it.rho2 * omega), gain = omega, keep = omega - 1.f;
    float scores[C / 2];
    mma_begin();
    product<K, 1, true, C>(scores, d, k, false);
    mma_commit();
    product<K, -1, true, K>(residual, zeta_d, h, true);
    mma_commit();
#pragma unroll
    for (int j = 0; j < K / 4; j++) {
      x[2 * j] += low_half(d[j]);
      x[2 * j + 1] += high_half(d[j]);
    }
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
#pragma unroll
    for (int j = 0; j < K / 4; j++) {
      residual[2 * j] -= lambda * low_half(d[j]);
      residual[2 * j + 1] -= lambda * high_half(d[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < K / 4; j++) {
    x[2 * j] += low_half(d[j]);
    x[2 * j + 1] += high_half(d[j]);
  }
}
