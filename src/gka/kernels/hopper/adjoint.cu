// Readout's adjoint -> mix's adjoint -> solve of one chunk of one head (gka/maths/adjoint.py):
// dz, d alpha, y_t = p_r(A_t) dx_t, dq, and the numbers per token that the gradients through H and U take.

#include "system.cuh"

// dz_t = scale (zeta_t U_[c] do_t + sum_j W_tj (do_t . v_j) k_j), start_t = scale zeta_t z_t.(U_[c] do_t)
// and d alpha_t = dz_t . (x_t - q_t).
DEVICE void readout_adjoint(float (&dz)[K / 2], u32 (&d_o)[V / 4], const float (&alpha)[2],
                            const float (&x_scale)[2], Shared& s, const Arguments& a, const Place& at,
                            float k_max, float v_max) {
  float largest[2], scores[C / 2], u_scale[V / 64], u_max = 0.f;
  u32 p[C / 4], q[K / 4], x[K / 4], past[V / 4];
  load_raw<K>(q, a.q, a.heads, at.head, at);
  load_raw<K>(x, a.x, a.heads, at.head, at);
#pragma unroll
  for (int n = 0; n < V / 64; n++) {
    u_scale[n] = s.u_scales[n];
    u_max = fmaxf(u_max, u_scale[n]);
  }
  u_max = u_max > TINY ? u_max : 1.f;
  {
    float wide[V / 2];
    widen_raw<V>(wide, d_o, at);
    scale_rows(d_o, largest, wide);
  }
#pragma unroll
  for (int n = 0; n < V / 64; n++) {
    u32 relative = both(u_scale[n] / u_max);
#pragma unroll
    for (int i = 16 * n; i < 16 * n + 16; i++) past[i] = times(d_o[i], relative);
  }
  mma_begin();
  product<V, 1, true, C>(scores, d_o, shared_address(s.v), false);
  mma_commit();
  product<V, 1, true, K>(dz, past, shared_address(s.u), false);
  mma_commit();
  mma_wait<1>();
  hold(scores);
  weigh_scores(p, scores, s, at);
  mma_wait<0>();
  hold(dz);
  float size = k_max * v_max, factor[2], start[2] = {0.f, 0.f}, d_alpha[2] = {0.f, 0.f};
#pragma unroll
  for (int b = 0; b < 2; b++) factor[b] = a.scale * largest[b] * size;
#pragma unroll
  for (int b = 0; b < 2; b++) {
    float from_past = __fdividef(power_of_two(s.decay_u[at.row[b]]) * u_max, size);
#pragma unroll
    for (int j = 0; j < K / 8; j++) {
      int i = 4 * j + 2 * b;
      dz[i] *= from_past, dz[i + 1] *= from_past;
      float2 of_q = widen(q[2 * j + b]);
      float low = (1.f - alpha[b]) * of_q.x + alpha[b] * (low_half(x[2 * j + b]) * x_scale[b]);
      float high = (1.f - alpha[b]) * of_q.y + alpha[b] * (high_half(x[2 * j + b]) * x_scale[b]);
      start[b] += dz[i] * low + dz[i + 1] * high;
    }
  }
  mma_begin();
  product<C, 1, false, C>(dz, p, shared_address(s.k), true);
  mma_commit();
  mma_wait<0>();
  hold(dz);
#pragma unroll
  for (int b = 0; b < 2; b++) {
#pragma unroll
    for (int j = 0; j < K / 8; j++) {
      int i = 4 * j + 2 * b;
      dz[i] *= factor[b], dz[i + 1] *= factor[b];
      float2 of_q = widen(q[2 * j + b]);
      d_alpha[b] += dz[i] * (low_half(x[2 * j + b]) * x_scale[b] - of_q.x);
      d_alpha[b] += dz[i + 1] * (high_half(x[2 * j + b]) * x_scale[b] - of_q.y);
    }
    start[b] = quad_sum(start[b]) * factor[b];
    d_alpha[b] = quad_sum(d_alpha[b]);
  }
#pragma unroll
  for (int b = 0; b < 2; b++) {
    if (!at.valid(b) || at.lane % 4) continue;
    a.start_u[at.group_token(a, b)] = start[b];
    if (a.d_alpha != nullptr) a.d_alpha[at.token(a, b)] = d_alpha[b];
  }
  __syncwarp();
}

// Writes key_weight, sum_t zeta_t w_t W_tj for every key j, and start_weight, sum_t zeta_t^2 w_t.
DEVICE void hand_back(const float (&w)[2], Shared& s, const Arguments& a, const System& system,
                      const Place& at) {
  float total = 0.f;
#pragma unroll
  for (int b = 0; b < 2; b++) {
    float zeta_w = system.zeta[b] * w[b];
    total += at.lane % 4 ? 0.f : system.zeta[b] * zeta_w;
    if (at.lane % 4 == 0) s.energy[at.row[b]] = __fdividef(zeta_w, system.w_factor[b]);
  }
  total = block_reduce<false>(total, s.scratch);
  if (at.thread == 0) a.start_weight[at.state] = total;
  // column j of W, read from the fragments: two threads per column, 32 rows each
  int column = at.thread % C, first = at.thread / C * 32, word = 2 * (column / 8);
  int owner = first / 16 * 32 + column % 8 / 2;
  const u16* halves = (const u16*)s.weights + ((word / 4 * THREADS + owner) * 4 + word % 4) * 2 + column % 2;
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 32; i++)  // row first + i
    sum += s.energy[first + i] * low_half(halves[i / 16 * 256 + i / 8 % 2 * 2 + i % 8 * 32]);
  __syncthreads();
  if (first) s.decay_h[column] = sum;
  __syncthreads();
  if (at.thread < at.length)
    a.key_weight[(at.start + column) * a.group_heads + at.head - a.first_head] = sum + s.decay_h[column];
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    gka_adjoint(const __grid_constant__ Arguments a) {
  extern __shared__ unsigned char raw[];
  Shared& s = *(Shared*)(raw + (-(int)shared_address(raw) & 1023));
  Place at(a);
  float k_max, alpha[2], y[K / 2];
  float4* held = (float4*)s.u;  // this thread's part of dz
  GateLoads gates;
  gates.load(a, at);
  load_alpha(alpha, a, at);
  long long token[2] = {at.token(a, 0), at.token(a, 1)};
  {
    u32 d_o[V / 4];
    float v_max, dz[K / 2], x_scale[2] = {a.x_scale[token[0]], a.x_scale[token[1]]};
    {
      Pieces<K> k;
      Pieces<V> v;
      k.load(a.k, a.key_heads, at.head / (a.heads / a.key_heads), at);
      copy_states(s, a, at);
      v.load(a.v, a.value_heads, at.head / (a.heads / a.value_heads), at);
      load_raw<V>(d_o, a.d_o, a.heads, at.head, at);
      gates.store(s, at);
      store_tiles(s, k, v, k_max, v_max, at);
    }
    copies_wait<0>();
    publish_shared();
    __syncthreads();
    readout_adjoint(dz, d_o, alpha, x_scale, s, a, at, k_max, v_max);
    __syncthreads();  // all products with U and V are done
#pragma unroll
    for (int i = 0; i < K / 8; i++)
      held[i * THREADS + at.thread] = {dz[4 * i], dz[4 * i + 1], dz[4 * i + 2], dz[4 * i + 3]};
  }
  System system = prepare(s, a, at, gates, k_max, s.v);
  {
    float rhs[K / 2];
#pragma unroll
    for (int i = 0; i < K / 8; i++) {
      float4 dz = held[i * THREADS + at.thread];
      rhs[4 * i] = alpha[0] * dz.x, rhs[4 * i + 1] = alpha[0] * dz.y;
      rhs[4 * i + 2] = alpha[1] * dz.z, rhs[4 * i + 3] = alpha[1] * dz.w;
    }
    solve_chunk(y, rhs, s, system, a, at);
  }
  u32 rows[K / 4], x[K / 4];
  float largest[2], h_y[K / 2], x_dot_y[2] = {0.f, 0.f}, start[2] = {0.f, 0.f};
  load_raw<K>(x, a.x, a.heads, at.head, at);
  scale_rows(rows, largest, y);
  mma_begin();
  product<K, 1, true, K>(h_y, rows, shared_address(s.h), false);
  mma_commit();
  long long group[2] = {at.group_token(a, 0), at.group_token(a, 1)};
  store_scaled<K>(a.y, a.y_scale, rows, largest, group, at);
#pragma unroll
  for (int i = 0; i < K / 8; i++) {
    float4 dz = held[i * THREADS + at.thread];
    float low[2] = {dz.x, dz.z}, high[2] = {dz.y, dz.w};
#pragma unroll
    for (int b = 0; b < 2; b++) {
      float y_low = y[4 * i + 2 * b], y_high = y[4 * i + 2 * b + 1];
      x_dot_y[b] += y_low * low_half(x[2 * i + b]) + y_high * high_half(x[2 * i + b]);
      y[4 * i + 2 * b] = y_low + (1.f - alpha[b]) * low[b];
      y[4 * i + 2 * b + 1] = y_high + (1.f - alpha[b]) * high[b];
    }
  }
  float one[2] = {1.f, 1.f};
  store_fragment<K>(a.dq, y, one, token, at);
  mma_wait<0>();
  hold(h_y);
#pragma unroll
  for (int i = 0; i < K / 4; i++)
    start[i % 2] += h_y[2 * i] * low_half(x[i]) + h_y[2 * i + 1] * high_half(x[i]);
  float w[2];
#pragma unroll
  for (int b = 0; b < 2; b++) {
    float x_scale = a.x_scale[token[b]];
    x_dot_y[b] = quad_sum(x_dot_y[b]) * x_scale;
    start[b] = quad_sum(start[b]) * (x_scale * largest[b] * system.h_scale);
    w[b] = __fdividef(2.f * a.ridge_ratio * x_dot_y[b], system.fro[b]);
    if (system.empty[b] || !at.valid(b)) w[b] = 0.f;
  }
#pragma unroll
  for (int b = 0; b < 2; b++)
    if (at.valid(b) && at.lane % 4 == 0) a.w[group[b]] = w[b], a.start_h[group[b]] = start[b];
  __syncwarp();
  hand_back(w, s, a, system, at);
}
