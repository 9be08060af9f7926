// F_t of every token of a chunk (gka/maths/ridge.py).
#pragma once

#include "fragments.cuh"

// F_t^2 of this thread's two tokens, and the share of the chunk's own keys.
struct Ridge {
  float fro2[2], own2[2];  // F_t^2; |sum_j W_tj k_j k_j^T|^2
  float zeta[2];
};

#if ADAPTIVE
// Stores |k16_j|^2 of every key, the diagonal of the Gram matrix.
DEVICE void keep_norms(Shared& s, const float (&gram)[C / 2], const Place& at) {
  float norm2[2] = {0.f, 0.f};
#pragma unroll
  for (int b = 0; b < 2; b++)  // a sum of selections: indexing by the warp would move the array to memory
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; warp++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float mine = at.thread / 32 == warp && at.lane / 4 % 2 == e ? 1.f : 0.f;
        norm2[b] += mine * gram[4 * (2 * warp + b) + 2 * b + e];
      }
  if (at.lane % 4 == at.lane / 8) s.key_norm2[at.row[0]] = norm2[0], s.key_norm2[at.row[1]] = norm2[1];
  __syncwarp();
}
#endif

// F_t^2 = zeta_t^2 |H_[c]|^2 + sum_j W_tj (2 zeta_t k_j^T H_[c] k_j + (W (K K^T)^2)_tj), and W.
// h and k must be loaded. With the adaptive solver also the sum of the keys, the same in every row.
DEVICE Ridge ridge(float (&w)[C / 2], float (&key_sum)[ADAPTIVE ? K / 2 : 1], Shared& s, const Place& at,
                   const GateLoads& of, float k_max) {
  Ridge r;
  float k2 = k_max * k_max;
  float gram[C / 2];
  {
    float kh[K / 2];
    mma_begin();
    product_shared<K, C, C>(gram, shared_address(s.k), shared_address(s.k));
    product_shared<K, C, K>(kh, shared_address(s.k), shared_address(s.h));
    mma_commit();
    weights(w, s.decay_h, s.beta2, at);
    mma_wait<0>();
    hold(gram), hold(kh);
#if ADAPTIVE
    keep_norms(s, gram, at);
#endif
    u32 key_place = at.row[0] * 128 + ((at.row[0] & 7) << 4) + at.column * 2;  // swizzled(C, row, column)
    float energy[2] = {0.f, 0.f};
#pragma unroll
    for (int b = 0; b < 2; b++) {
#pragma unroll
      for (int j = 0; j < K / 8; j++) {
        u32 key = *(const u32*)(s.k + (key_place ^ (j & 7) << 4) + (j >> 3) * C * 128 + b * 1024);
        energy[b] += kh[4 * j + 2 * b] * low_half(key) + kh[4 * j + 2 * b + 1] * high_half(key);
      }
      energy[b] = quad_sum(energy[b]) * (of.h_scale * k2);
    }
    if (at.lane % 4 == 0) s.energy[at.row[0]] = energy[0], s.energy[at.row[1]] = energy[1];
    __syncwarp();  // otherwise the compiler lets the warp continue in two parts
  }
  unsigned char* squares = (unsigned char*)s.weights;
  u32 place = at.row[0] * 128 + ((at.row[0] & 7) << 4) + at.column * 2;
#pragma unroll
  for (int j = 0; j < C / 8; j++)
#pragma unroll
    for (int b = 0; b < 2; b++) {
      float low = gram[4 * j + 2 * b], high = gram[4 * j + 2 * b + 1];
      *(u32*)(squares + (place ^ j << 4) + b * 1024) = pack(low * low, high * high);
    }
  publish_shared();
  u32 left[C / 4];
#pragma unroll
  for (int i = 0; i < C / 4; i++) left[i] = pack(w[2 * i], w[2 * i + 1]);
  __syncthreads();
  float pair[C / 2];
  mma_begin();
  product<C, 1, true, C>(pair, left, shared_address(squares), false);
#if ADAPTIVE
  u32 ones[C / 4];
#pragma unroll
  for (int i = 0; i < C / 4; i++) ones[i] = both(1.f);
  product<C, 1, false, C>(key_sum, ones, shared_address(s.k), false);
#endif
  mma_commit();
  mma_wait<0>();
  hold(pair);
#if ADAPTIVE
  hold(key_sum);
#endif
#pragma unroll
  for (int b = 0; b < 2; b++) {
    float cross = 0.f, own = 0.f;
#pragma unroll
    for (int j = 0; j < C / 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float weight = w[4 * j + 2 * b + e];
        cross += weight * s.energy[8 * j + at.column + e];
        own += weight * pair[4 * j + 2 * b + e];
      }
    r.zeta[b] = power_of_two(s.decay_h[at.row[b]]);
    r.own2[b] = quad_sum(own) * (k2 * k2);
    r.fro2[b] = r.zeta[b] * (r.zeta[b] * of.h_norm2 + 2.f * quad_sum(cross)) + r.own2[b];
  }
  return r;
}
