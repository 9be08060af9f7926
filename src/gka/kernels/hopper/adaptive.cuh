// Fewer steps with the same proven bound: certified spectral bounds and a rank-one preconditioner
// (gka/maths/adaptive.py; proof in docs/numerics.md).

// What float16 weights and squares may cost: relative error of F_t^2, and so of |R_t|^2 / F_t^2.
constexpr float SLACK = 1.f / 512.f;

// Row `row` of a swizzled array of K columns times a vector in shared memory.
DEVICE float row_times(const unsigned char* array, int rows, int row, const float* vector) {
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < K / 8; j++) {
    uint4 piece = *(const uint4*)(array + swizzled(rows, row, 8 * j));
    const u32* words = (const u32*)&piece;
#pragma unroll
    for (int w = 0; w < 4; w++) {
      float2 pair = *(const float2*)(vector + 8 * j + 2 * w);
      sum += low_half(words[w]) * pair.x + high_half(words[w]) * pair.y;
    }
  }
  return sum;
}

// N = nu u u^T <= H16 by Nystroem from two power steps: leaves u and H16 u; returns nu and u^T H16 u.
DEVICE float2 nystroem(Shared& s, const Place& at) {
  int row = at.thread % K;
  bool mine = at.thread < K;
  auto entry = [&](int r, int c) { return low_half(*(const u16*)(s.h + swizzled(K, r, c))); };
  float diagonal = entry(row, row);
  float best = block_reduce<true>(diagonal, s.scratch);
  int first = -(int)block_reduce<true>(mine && diagonal == best ? -row : -1e6f, s.scratch);
  if (best <= 0.f) {  // no history before this chunk
    if (mine) s.top[row] = 0.f, s.top_h[row] = 0.f;
    __syncthreads();
    return {0.f, 0.f};
  }
  if (mine) s.top[row] = entry(row, first);
  __syncthreads();
  float power = row_times(s.h, K, row, s.top);
  float v = power * rsqrtf(block_reduce<false>(mine ? power * power : 0.f, s.scratch));
  if (mine) s.top_h[row] = v;
  __syncthreads();
  float u = row_times(s.h, K, row, s.top_h);
  float theta = block_reduce<false>(mine ? u * v : 0.f, s.scratch);
  float norm2 = block_reduce<false>(mine ? u * u : 0.f, s.scratch);
  u *= rsqrtf(norm2);
  if (mine) s.top[row] = u;
  __syncthreads();
  float h_u = row_times(s.h, K, row, s.top);
  float energy = block_reduce<false>(mine ? u * h_u : 0.f, s.scratch);
  if (mine) s.top_h[row] = h_u;
  __syncthreads();
  return {theta > 0.f ? norm2 / theta : 0.f, energy};
}

// |(H16 - N)^2|_F.
DEVICE float squared_remainder(Shared& s, const Place& at, float nu) {
  float sum = 0.f;
#pragma unroll 1
  for (int block = 0; block < K / C; block++) {
    float square[K / 2];
    mma_begin();
    product_shared<K, K, K>(square, shared_address(s.h) + block * C * 128, shared_address(s.h));
    mma_commit();
    mma_wait<0>();
    hold(square);
#pragma unroll
    for (int b = 0; b < 2; b++) {
      int row = block * C + at.row[b];
      float u = s.top[row], h_u = s.top_h[row];
#pragma unroll
      for (int j = 0; j < K / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          int column = 8 * j + at.column + e;
          float v = s.top[column];
          float rest = square[4 * j + 2 * b + e] - nu * (h_u * v + u * s.top_h[column]) + nu * nu * u * v;
          sum += rest * rest;
        }
    }
  }
  return sqrtf(block_reduce<false>(sum, s.scratch));
}

DEVICE float inverse_cosh(float x) { return logf(x + sqrtf(x * x - 1.f)); }

// Replaces the plain iteration where a proven bound asks for fewer steps.
DEVICE void tighten(Iteration& it, const Ridge& r, const float (&fro)[2], const bool (&empty)[2], Shared& s,
                    const Arguments& a, const Place& at, float k_max) {
  float2 top = nystroem(s, at);
  float nu = top.x, n = nu * r.h_scale;
  if (at.thread < C) {
    float dot = row_times(s.k, C, at.thread, s.top) * k_max;
    s.overlap[at.thread] = dot * dot;
  }
  float remainder = sqrtf(squared_remainder(s, at, nu)) * r.h_scale;  // barriers inside
  u32 w[C / 4];
  weights(w, s.decay_h, s.beta2, at, 1.f, 1.f);
  float worst = 0.f;
#pragma unroll
  for (int b = 0; b < 2; b++) {
    float cross = 0.f;
#pragma unroll
    for (int j = 0; j < C / 8; j++) {
      cross += low_half(w[2 * j + b]) * s.overlap[8 * j + at.column];
      cross += high_half(w[2 * j + b]) * s.overlap[8 * j + at.column + 1];
    }
    float past = r.zeta[b] * n / fro[b];                                            // zeta |N| / F
    float inner = (r.zeta[b] * r.h_scale * top.y + quad_sum(cross)) / fro[b];       // u^T H_t u / F
    float by_norm = sqrtf(fmaxf(1.f - 2.f * past * inner + past * past, 0.f) + SLACK);
    float by_square = (r.zeta[b] * remainder + sqrtf(r.own2[b])) / fro[b] * (1.f + 2.f * SLACK);
    if (at.valid(b) && !empty[b]) worst = fmaxf(worst, fminf(by_norm, by_square));
    it.tau[b] = past / (a.ridge_ratio + past);
  }
  float phi = fmaxf(block_reduce<true>(worst, s.scratch), SLACK);
  float ratio = (a.num_iter + 1) * inverse_cosh(1.f + 2.f * a.ridge_ratio) /
                inverse_cosh(1.f + 2.f * a.ridge_ratio / fminf(phi, 1.f));
  int steps = (int)ceilf(ratio) - 1;
  bool fewer = steps < a.num_iter && a.num_iter > 0;
  if (at.thread == 0) s.deflated = fewer && nu > 0.f;
  __syncthreads();
  if (!fewer) {
    it.tau[0] = it.tau[1] = 0.f;
    return;
  }
  float kappa = 1.f + phi / a.ridge_ratio, rho = (kappa - 1.f) / (kappa + 1.f);
  it.steps = steps, it.rho2 = rho * rho, it.step = 2.f / ((kappa + 1.f) * a.ridge_ratio);
}
