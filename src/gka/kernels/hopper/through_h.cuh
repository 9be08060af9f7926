// Gradients through H: its parts of dk and d(beta^2), and the gradient of H's decay (gka/maths/adjoint.py).
#pragma once

#include "tiles.cuh"

// Largest magnitude of C numbers; computed by every warp.
DEVICE float chunk_largest(const float* x, const Place& at) {
  return warp_max(fmaxf(fabsf(x[at.lane]), fabsf(x[at.lane + 32])));
}

// Stores M_jt w_t / max |w| in the first tile and M_jt in the second.
DEVICE void store_masks(Tiles& s, float less, const Place& at) {
  u32 place = first_word(at);
  float mine[2] = {s.decay_h[at.row[0]], s.decay_h[at.row[1]]};
  float part[2] = {s.w[at.row[0]] * less, s.w[at.row[1]] * less};
#pragma unroll
  for (int j = 0; j < C / 8; j++) {
    int column = 8 * j + at.column;
    float theirs[2] = {s.decay_h[column], s.decay_h[column + 1]};
#pragma unroll
    for (int b = 0; b < 2; b++) {
      float mask[2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        mask[e] = power_of_two(mine[b] - theirs[e]);
        mask[e] = column + e <= at.row[b] ? mask[e] : 0.f;
      }
      unsigned char* to = s.v + (place ^ j << 4) + b * 1024;
      *(u32*)to = pack(mask[0] * part[b], mask[1] * part[b]);
      *(u32*)(to + C * C * 2) = pack(mask[0], mask[1]);
    }
  }
}

// Left operands (M^T w M o K K^T) beta^2 and M beta^2, beta^2 relative to its maximum. Stores (K K^T)^2 in the first
// tile.
DEVICE void ridge_operands(u32 (&full)[C / 4], u32 (&left)[C / 4], const float (&sum)[C / 2],
                           const float (&gram)[C / 2], float less, Tiles& s, const Place& at) {
  u32 place = first_word(at);
#pragma unroll
  for (int j = 0; j < C / 8; j++) {
    int column = 8 * j + at.column;
    float low = s.beta2[column] * less, high = s.beta2[column + 1] * less;
    u32 relative = pack(low, high);
#pragma unroll
    for (int b = 0; b < 2; b++) {
      int i = 4 * j + 2 * b;
      unsigned char* to = s.v + (place ^ j << 4) + b * 1024;
      full[2 * j + b] = pack(sum[i] * gram[i] * low, sum[i + 1] * gram[i + 1] * high);
      left[2 * j + b] = times(*(const u32*)(to + C * C * 2), relative);
      *(u32*)to = pack(gram[i] * gram[i], gram[i + 1] * gram[i + 1]);
    }
  }
}

// Turns (W (K K^T)^2)_tj in `pairs` into P_tj of H. Stores x_k and y_k, weighted by M_jt and the scales of x and y, in
// the tiles, and the chunk-start state's part of each t.
DEVICE void weigh_pairs(float (&pairs)[C / 2], const float (&x_k)[C / 2], const float (&y_k)[C / 2], float size,
                        float k2, float less, float h_norm2, Tiles& s, const Place& at) {
  u32 place = first_word(at);
  float half_w[2], zeta[2], both[2], part[2], of_start[2], of_own[2], inner[2] = {0.f, 0.f};
#pragma unroll
  for (int b = 0; b < 2; b++) {
    half_w[b] = 0.5f * s.w[at.row[b]], zeta[b] = power_of_two(s.decay_h[at.row[b]]);
    of_start[b] = half_w[b] * zeta[b], of_own[b] = half_w[b] * size;
    both[b] = s.both[at.row[b]];
    part[b] = both[b] * less, both[b] *= k2;
  }
#pragma unroll
  for (int j = 0; j < C / 8; j++) {
    int column = 8 * j + at.column;
    float energy[2] = {s.energy[column], s.energy[column + 1]};
    float written[2] = {energy[0] * s.beta2[column], energy[1] * s.beta2[column + 1]};
#pragma unroll
    for (int b = 0; b < 2; b++) {
      unsigned char* to = s.v + (place ^ j << 4) + b * 1024;
      u32 pair = *(const u32*)(to + C * C * 2);
      float mask[2] = {low_half(pair), high_half(pair)}, of_x[2], of_y[2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        int i = 4 * j + 2 * b + e;
        inner[b] += mask[e] * written[e];
        float of_ridge = of_start[b] * energy[e] + of_own[b] * pairs[i];
        pairs[i] = -mask[e] * (of_ridge + x_k[i] * y_k[i] * both[b]);
        mask[e] *= part[b];
        of_x[e] = x_k[i] * mask[e], of_y[e] = y_k[i] * mask[e];
      }
      *(u32*)to = pack(of_x[0], of_x[1]);
      *(u32*)(to + C * C * 2) = pack(of_y[0], of_y[1]);
    }
  }
  float start[2];
#pragma unroll
  for (int b = 0; b < 2; b++) {
    inner[b] = quad_sum(inner[b]) + zeta[b] * h_norm2;
    start[b] = -zeta[b] * (s.start_h[at.row[b]] + half_w[b] * inner[b]);
  }
  __syncwarp();  // the quad has read the old values
  if (at.lane % 4 == 0) s.start_h[at.row[0]] = start[0], s.start_h[at.row[1]] = start[1];
  __syncwarp();
}

// Adds the parts of dk and d(beta^2) through H; writes dg of H.
DEVICE void through_h(float (&dk)[K / 2], float (&d_beta2)[2], Tiles& s, float k_max, const Arguments& a,
                      const Place& at) {
  u32 keys = shared_address(s.k), state = shared_address(s.state);
  float k2 = k_max * k_max, w_max = chunk_largest(s.w, at), both_max = chunk_largest(s.both, at);
  float beta2_max = chunk_largest(s.beta2, at), less_beta2 = inverse(beta2_max);
  float h_scale = s.h_scale, e_scale = s.h_end_scale;
  float beta2[2] = {s.beta2[at.row[0]], s.beta2[at.row[1]]}, sum[C / 2], d[K / 2];
  copies_wait<2>();  // E of H has arrived
  publish_shared();
  __syncthreads();
  mma_begin();
  product_shared<K, false, true, C, K>(d, again(keys), again(state), false);
  product_shared<K, false, false, C, K>(d, again(keys), again(state), true);  // rows (E + E^T) k_j
  mma_commit();
  store_masks(s, inverse(w_max), again(at));
  mma_wait<0>();
  hold(d);
  publish_shared();
  __syncthreads();  // E of H has been read
  copy_state<K, K>(state, a.h_start + at.state * K * K, at.thread);
  float gram[C / 2];
  mma_begin();
  product_shared<K, false, true, C, C>(gram, again(keys), again(keys), false);
  product_shared<C, true, false, C, C>(sum, again(s.tile(1)), again(s.tile(0)), false);  // sum_t M_jt w_t M_tj'
  mma_commit();
  {
    float ends[2], size[2];
    dots_with_keys(ends, d, s, at);
#pragma unroll
    for (int b = 0; b < 2; b++) {
      size[b] = power_of_two(s.decay_h[C - 1] - s.decay_h[at.row[b]]) * (k_max * e_scale);
      if (at.lane % 4 == 0) s.ends[at.row[b]] = ends[b] * (size[b] * k_max * 0.5f);
      size[b] *= beta2[b];
    }
#pragma unroll
    for (int i = 0; i < K / 2; i++) dk[i] += d[i] * size[i / 2 % 2];
  }
  mma_wait<0>();
  hold(gram), hold(sum);
  __syncthreads();  // the first tile has been read
  u32 full[C / 4], left[C / 4];
  ridge_operands(full, left, sum, gram, less_beta2, s, again(at));
  publish_shared();
  __syncthreads();
  mma_begin();
  product<C, 1, false, C>(d, full, again(keys), false);
  product<C, 1, true, C>(sum, left, again(s.tile(0)), false);  // (W (K K^T)^2)_tj
  mma_commit();
  mma_wait<0>();
  hold(d), hold(sum);
  float size[2];
#pragma unroll
  for (int b = 0; b < 2; b++) size[b] = w_max * (beta2_max * k_max) * (beta2[b] * k_max) * k_max;
#pragma unroll
  for (int i = 0; i < K / 2; i++) dk[i] -= d[i] * size[i / 2 % 2];
  copies_wait<0>();  // x, y and H_[c] have arrived
  publish_shared();
  __syncthreads();
  mma_begin();
  product_shared<K, false, false, C, K>(d, again(keys), again(state), false);
  mma_commit();
  mma_wait<0>();
  hold(d);
  {
    float energy[2];
    dots_with_keys(energy, d, s, at);
#pragma unroll
    for (int b = 0; b < 2; b++) {
      size[b] = s.key_weight[at.row[b]] * (h_scale * k_max);
      if (at.lane % 4 == 0) s.energy[at.row[b]] = energy[b] * (h_scale * k2);
    }
#pragma unroll
    for (int i = 0; i < K / 2; i++) dk[i] -= d[i] * size[i / 2 % 2];
  }
  float x_k[C / 2], y_k[C / 2];
  mma_begin();
  product_shared<K, false, true, C, C>(x_k, again(shared_address(s.z)), again(keys), false);
  product_shared<K, false, true, C, C>(y_k, again(shared_address(s.d)), again(keys), false);
  mma_commit();
  mma_wait<0>();
  hold(x_k), hold(y_k);
  __syncthreads();  // the energies are stored
  weigh_pairs(sum, x_k, y_k, beta2_max * k2 * k2, k2, inverse(both_max), s.h_norm2, s,
              again(at));
  publish_shared();
  __syncthreads();
  mma_begin();
  product_shared<C, true, false, C, C>(d, again(s.tile(0)), again(shared_address(s.d)), false);
  product_shared<C, true, false, C, C>(d, again(s.tile(1)), again(shared_address(s.z)), true);
  mma_commit();
  mma_wait<0>();
  hold(d);
#pragma unroll
  for (int b = 0; b < 2; b++) size[b] = beta2[b] * k_max * both_max;
#pragma unroll
  for (int i = 0; i < K / 2; i++) dk[i] -= d[i] * size[i / 2 % 2];
  __syncthreads();  // the tiles have been read
  sum_pairs(sum, 1.f, s, again(at));
  store_decay(a.dgk, d_beta2, s.start_h, s.h_whole, s, a, again(at));
}
