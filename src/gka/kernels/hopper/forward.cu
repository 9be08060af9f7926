// Ridge, solve, mix and readout of one chunk of one head: x_t and o_t (gka/maths/chunked.py).

#include "system.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    gka_forward(const __grid_constant__ Arguments a) {
  extern __shared__ unsigned char raw[];
  Shared& s = *(Shared*)(raw + (-(int)shared_address(raw) & 1023));
  Place at(a);
  int value_head = at.head / (a.heads / a.value_heads);
  float k_max, v_max, x[K / 2], rhs[K / 2];
  System system;
  GateLoads gates;
  {
    u32 q[K / 4];
    {
      Pieces<K> k;
      Pieces<V> v;
      gates.load(a, at);
      k.load(a.k, a.key_heads, at.head / (a.heads / a.key_heads), at);
      copy_state<K, K>(shared_address(s.h), a.h_start + at.state * K * K, at.thread);
      copy_state<K, V, LATE>(shared_address(s.u), a.u_start + at.state * K * V, at.thread);
      v.load(a.v, a.value_heads, value_head, at);
      load_raw<K>(q, a.q, a.heads, at.head, at);
      gates.store(s, at);
      store_tiles(s, k, v, k_max, v_max, at);
    }
    copies_wait<1>();
    publish_shared();
    __syncthreads();
    system = prepare(s, a, at, gates, k_max, s.u);
    widen_raw<K>(rhs, q, at);
  }
  solve_chunk(x, rhs, s, system, a, at);
  if constexpr (LATE > 0) {  // the solve took this memory until now
    __syncthreads();
    copy_state<K, V, 0, LATE>(shared_address(s.u), a.u_start + at.state * K * V, at.thread);
  }

  // z = (1 - alpha) q + alpha x
  u32 z[K / 4];
  float largest[2], alpha[2];
  long long token[2] = {at.token(a, 0), at.token(a, 1)};
  {
    u32 q[K / 4];
    load_raw<K>(q, a.q, a.heads, at.head, at);
    load_alpha(alpha, a, at);
    scale_rows(z, largest, x);
    store_scaled<K>(a.x, a.x_scale, z, largest, token, at);
    widen_raw<K>(rhs, q, at);
#pragma unroll
    for (int i = 0; i < K / 2; i++) x[i] = (1.f - alpha[i / 2 % 2]) * rhs[i] + alpha[i / 2 % 2] * x[i];
  }
  scale_rows(z, largest, x);
  if (a.steps != nullptr && at.thread == 0)
    a.steps[(long long)at.chunk * a.heads + at.head] = system.it.steps;
  copies_wait<0>();
  publish_shared();
  __syncthreads();  // U has arrived

  // o = scale zmax kmax vmax (zeta/(kmax vmax) z16 U + ((z16 K16^T) o W) V16)
  float scores[C / 2], o[V / 2];
  u32 p[C / 4];
  mma_begin();
  product<K, 1, true, C>(scores, z, shared_address(s.k), false);
  mma_commit();
  product<K, 1, false, K>(o, z, shared_address(s.u), false);
  mma_commit();
  mma_wait<1>();
  hold(scores);
  weigh_scores(p, scores, s, at);
  mma_wait<0>();
  hold(o);
  float size = k_max * v_max;
#pragma unroll
  for (int n = 0; n < V / 64; n++) {
    float past[2];
#pragma unroll
    for (int b = 0; b < 2; b++) past[b] = __fdividef(power_of_two(s.decay_u[at.row[b]]) * s.u_scales[n], size);
#pragma unroll
    for (int i = 32 * n; i < 32 * n + 32; i++) o[i] *= past[i / 2 % 2];
  }
  mma_begin();
  product<C, 1, false, C>(o, p, shared_address(s.v), true);
  mma_commit();
  mma_wait<0>();
  hold(o);
  float factor[2] = {a.scale * size * largest[0], a.scale * size * largest[1]};
  store_fragment<V>(a.o, o, factor, token, at);
}
