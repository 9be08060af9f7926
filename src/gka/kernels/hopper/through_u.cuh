// Gradients through U: dv, dg, and its parts of dk and d(beta^2) (gka/maths/adjoint.py).
#pragma once

#include "tiles.cuh"

// From z_t . k_j in `pairs` and do_t . v_j in `d_v`: stores z k^T o M and do v^T o M, each times its factor, in the
// tiles, and leaves P_tj in `pairs`.
DEVICE void mask_pairs(float (&pairs)[C / 2], const float (&d_v)[C / 2], float part_v, float part_k, Tiles& s,
                       const Place& at) {
  u32 place = first_word(at);
  float mine[2] = {s.decay_u[at.row[0]], s.decay_u[at.row[1]]};
#pragma unroll
  for (int j = 0; j < C / 8; j++) {
    int column = 8 * j + at.column;
    float theirs[2] = {s.decay_u[column], s.decay_u[column + 1]};
#pragma unroll
    for (int b = 0; b < 2; b++) {
      float z_k[2], masked[2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        int i = 4 * j + 2 * b + e;
        float mask = power_of_two(mine[b] - theirs[e]);  // may overflow above the diagonal, which the next line drops
        mask = column + e <= at.row[b] ? mask : 0.f;
        z_k[e] = pairs[i] * mask, masked[e] = d_v[i] * mask;
        pairs[i] = z_k[e] * d_v[i];
        asm volatile("" : "+f"(pairs[i]));  // multiply now: later, both factors would hold registers
      }
      unsigned char* to = s.v + (place ^ j << 4) + b * 1024;
      *(u32*)to = pack(z_k[0] * part_v, z_k[1] * part_v);
      *(u32*)(to + C * C * 2) = pack(masked[0] * part_k, masked[1] * part_k);
    }
  }
}

// Writes dv and dg of U; leaves the parts of dk and d(beta^2) through U. Starts the copies of E of H, x and y.
DEVICE void through_u(float (&dk)[K / 2], float (&d_beta2)[2], Tiles& s, const Largest& most,
                      const Arguments& a, const Place& at) {
  u32 keys = shared_address(s.k), z = shared_address(s.z), d_o = shared_address(s.d);
  u32 state = shared_address(s.state);
  float e_scale[V / 64], e_max = 0.f;
#pragma unroll
  for (int n = 0; n < V / 64; n++) {
    e_scale[n] = s.e_scales[n];
    e_max = fmaxf(e_max, e_scale[n]);
  }
  float pairs[C / 2], d_v[C / 2], dv[V / 2];  // z_t . k_j, then P_tj; do_t . v_j
  {
    u32 left[V / 16][4];  // v, each block's columns times the scale of E there
#pragma unroll
    for (int k = 0; k < V / 16; k++) {
      float relative = e_scale[k / 4] * inverse(e_max);
      load_left(left[k], shared_address(s.v), k, at);
#pragma unroll
      for (int i = 0; i < 4; i++) left[k][i] = times(left[k][i], both(relative));
    }
    mma_begin();
    product_shared<V, false, true, C, C>(d_v, again(d_o), again(shared_address(s.v)), false);
    product_shared<K, false, true, C, C>(pairs, again(z), again(keys), false);
    product<V, 1, true, K>(dk, left[0], again(state), false);  // rows E v_j
    mma_commit();
    mma_wait<0>();
    hold(d_v), hold(pairs), hold(dk);
  }
  __syncthreads();  // v has been read
  float size_k = most.d * most.v * most.z * a.scale, size_v = most.z * most.k * most.d * a.scale;
  float bound_k = most.v * e_max, bound_v = most.k * e_max;
  float unit_k = fmaxf(fmaxf(fabsf(size_k), bound_k * FAINT), TINY);
  float unit_v = fmaxf(fmaxf(fabsf(size_v), bound_v * FAINT), TINY);
  float to_end[2];
  {
    float ends[2], past = __fdividef(bound_k, unit_k);
    dots_with_keys(ends, dk, s, at);
#pragma unroll
    for (int b = 0; b < 2; b++) {
      to_end[b] = power_of_two(s.decay_u[C - 1] - s.decay_u[at.row[b]]);
      if (at.lane % 4 == 0) s.ends[at.row[b]] = ends[b] * (to_end[b] * bound_k * most.k);
    }
#pragma unroll
    for (int i = 0; i < K / 2; i++) dk[i] *= to_end[i / 2 % 2] * past;
  }
  mask_pairs(pairs, d_v, __fdividef(size_v, unit_v), __fdividef(size_k, unit_k), s, again(at));
  publish_shared();
  __syncthreads();
  mma_begin();
  product_shared<K, false, false, C, K>(dv, again(keys), again(state), false);  // rows E^T k_j
  product_shared<C, true, false, C, C>(dk, again(s.tile(1)), again(z), true);
  mma_commit();
  mma_wait<0>();
  hold(dv), hold(dk);
  __syncthreads();  // E of U and z have been read
  copy_state<K, K>(state, a.h_ends + at.state * K * K, again(at).thread);
  copy_rows(z, a.x, a.heads, at.head, again(at));
#pragma unroll
  for (int n = 0; n < V / 64; n++) {
    float part = __fdividef(most.k * e_scale[n], unit_v), past[2] = {to_end[0] * part, to_end[1] * part};
#pragma unroll
    for (int i = 32 * n; i < 32 * n + 32; i++) dv[i] *= past[i / 2 % 2];
  }
  mma_begin();
  product_shared<C, true, false, C, C>(dv, again(s.tile(0)), again(d_o), true);
  mma_commit();
  mma_wait<0>();
  hold(dv);
  __syncthreads();  // do and the tiles have been read
  copy_rows(d_o, a.y, a.group_heads, at.head - a.first_head, again(at));
  float factor[2] = {s.beta2[at.row[0]], s.beta2[at.row[1]]};
#pragma unroll
  for (int b = 0; b < 2; b++) factor[b] *= unit_v;
  store_gradient<V>(a.dv, a.value_heads < a.heads, dv, factor, a, again(at));
  sum_pairs(pairs, (most.z * most.k) * (most.d * most.v) * a.scale, s, again(at));
  store_decay(a.dg, d_beta2, s.start_u, s.u_whole, s, a, again(at));
  factor[0] = s.beta2[at.row[0]] * unit_k, factor[1] = s.beta2[at.row[1]] * unit_k;
#pragma unroll
  for (int i = 0; i < K / 2; i++) dk[i] *= factor[i / 2 % 2];
  hold(dk);
}
