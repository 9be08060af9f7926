// Fewer steps with the same proven bound (gka/maths/adaptive.py; proof in docs/numerics.md): the rank-one
// Nystroem part N_t = strength_t F_t w_t w_t^T <= H_t of every token, and a certified bound of the rest.

// Relative errors: of the chunk's own share of F_t^2, whose weights and squares are float16; of float32 sums;
// of the operator, whose weights the solve holds in float16.
constexpr float SLACK_OWN = 1.f / 2048.f, SLACK_SUM = 1.f / 65536.f, SLACK_OPERATOR = 1.f / 1024.f;
constexpr float THETA_FLOOR = 1.f / 1024.f;

DEVICE float inverse_cosh(float x) { return logf(x + sqrtf(x * x - 1.f)); }  // of x well above one

// v and H16 v to shared memory, and v as an operand.
DEVICE void load_top(Shared& s, const Arguments& a, const Place& at) {
  const float* from = a.top + at.state * 2 * K;
  for (int i = at.thread; i < 2 * K; i += THREADS) s.top[i] = from[i];
  if (at.thread < K / 2) {  // neighbouring lanes, neighbouring pairs: a row without swizzle
    float2 pair = *(const float2*)(from + 2 * at.thread);
    *(u32*)(s.top_tile + at.thread / 32 * 1024 + at.lane * 4) = pack(pair.x, pair.y);
  }
}

// Replaces the plain iteration where a proven bound asks for fewer steps; leaves w_t in it.vectors. w: W_tj.
DEVICE void tighten(Iteration& it, const Ridge& r, const float (&w)[C / 2], const float (&fro)[2],
                    const bool (&empty)[2], Shared& s, const Arguments& a, const Place& at, float k_max) {
  float h_trace = a.trace[at.state] * r.h_scale, k2 = k_max * k_max;
  // u_t = H_t v / F_t
  u32 left[C / 4];
  float u[K / 2], trace[2] = {0.f, 0.f};
#pragma unroll
  for (int j = 0; j < C / 8; j++) {
    float2 dot = *(const float2*)(s.key_dot + 8 * j + at.column);
    float2 norm2 = *(const float2*)(s.key_norm2 + 8 * j + at.column);
#pragma unroll
    for (int b = 0; b < 2; b++) {
      float low = w[4 * j + 2 * b], high = w[4 * j + 2 * b + 1];
      left[2 * j + b] = pack(low * dot.x, high * dot.y);
      trace[b] += low * norm2.x + high * norm2.y;
    }
  }
  mma_begin();
  product<C, 1, false, C>(u, left, shared_address(s.k), false);
  mma_commit();
  mma_wait<0>();
  hold(u);
  float inverse[2] = {__fdividef(1.f, fro[0]), __fdividef(1.f, fro[1])};
  float theta[2] = {0.f, 0.f}, norm2[2] = {0.f, 0.f}, strength[2];
#pragma unroll
  for (int j = 0; j < K / 8; j++) {
    float2 v = *(const float2*)(s.top + 8 * j + at.column);
    float2 h_v = *(const float2*)(s.top + K + 8 * j + at.column);
#pragma unroll
    for (int b = 0; b < 2; b++) {
      int i = 4 * j + 2 * b;
      float past = r.zeta[b] * r.h_scale * inverse[b], own = k2 * inverse[b];
      u[i] = past * h_v.x + own * u[i], u[i + 1] = past * h_v.y + own * u[i + 1];
      theta[b] += u[i] * v.x + u[i + 1] * v.y;
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
    rayleigh[b] = quad_sum(r.zeta[b] * r.h_scale * past + k2 * own) * inverse[b];
    trace[b] = (r.zeta[b] * h_trace + k2 * quad_sum(trace[b])) * inverse[b];
  }
  // |R_t|_2 / F_t by trace and Frobenius norm (Wolkowicz and Styan)
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
  float ratio = (a.num_iter + 1) * inverse_cosh(1.f + 2.f * a.ridge_ratio) /
                inverse_cosh(1.f + 2.f * a.ridge_ratio / fminf(phi, 1.f));
  int steps = (int)ceilf(ratio) - 1;
  it.deflated = 6 * steps <= 5 * a.num_iter;
  if (!it.deflated) return;
  float kappa = 1.f + phi / a.ridge_ratio, rho = (kappa - 1.f) / (kappa + 1.f);
  it.steps = steps, it.rho2 = rho * rho, it.step = 2.f / ((kappa + 1.f) * a.ridge_ratio);
}
