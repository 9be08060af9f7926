// Stores of fragments as float16 rows with one scale per row.
#pragma once

#include "chunk.cuh"

// Largest magnitude in each of the thread's rows; one for a row of zeros.
template <int N>
DEVICE void row_maxima(float (&largest)[2], const float (&d)[N]) {
  largest[0] = largest[1] = 0.f;
#pragma unroll
  for (int i = 0; i < N; i++) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], fabsf(d[i]));
#pragma unroll
  for (int b = 0; b < 2; b++) {
    largest[b] = quad_max(largest[b]);
    largest[b] = largest[b] > TINY ? largest[b] : 1.f;
  }
}

// d divided by its row maxima, as a left operand.
template <int N>
DEVICE void scale_rows(u32 (&a)[N / 2], float (&largest)[2], const float (&d)[N]) {
  row_maxima(largest, d);
  float inverse[2] = {__fdividef(1.f, largest[0]), __fdividef(1.f, largest[1])};
#pragma unroll
  for (int i = 0; i < N / 2; i++) a[i] = pack(d[2 * i] * inverse[i % 2], d[2 * i + 1] * inverse[i % 2]);
}

// Transposes the four words of a quad's four threads: word i of thread c becomes word c of thread i. A thread then
// holds 16 consecutive bytes of a row, and stores them at once.
DEVICE uint4 transpose_quad(u32 w0, u32 w1, u32 w2, u32 w3, int lane) {
  bool odd = lane & 1, high = lane & 2;
  u32 a = __shfl_xor_sync(~0u, odd ? w0 : w1, 1), b = __shfl_xor_sync(~0u, odd ? w2 : w3, 1);
  w0 = odd ? a : w0, w1 = odd ? w1 : a, w2 = odd ? b : w2, w3 = odd ? w3 : b;
  a = __shfl_xor_sync(~0u, high ? w0 : w2, 2), b = __shfl_xor_sync(~0u, high ? w1 : w3, 2);
  return uint4{high ? a : w0, high ? b : w1, high ? w2 : a, high ? w3 : b};
}

// Stores a left operand [C, D] of 16-bit pairs as rows of an array; `token`: indices of the thread's two rows.
template <int D>
DEVICE void store_rows(u16* array, const u32 (&a)[D / 4], const long long (&token)[2], const Place& at) {
#pragma unroll
  for (int b = 0; b < 2; b++) {
    u16* to = array + token[b] * D + at.lane % 4 * 8;
#pragma unroll
    for (int g = 0; g < D / 32; g++) {
      int i = 8 * g + b;
      uint4 four = transpose_quad(a[i], a[i + 2], a[i + 4], a[i + 6], at.lane);
      if (at.valid(b)) *(uint4*)(to + 32 * g) = four;
    }
  }
}

// Stores the operand and the scales of its rows.
template <int D>
DEVICE void store_scaled(u16* array, float* scales, const u32 (&a)[D / 4], const float (&largest)[2],
                         const long long (&token)[2], const Place& at) {
  store_rows<D>(array, a, token, at);
#pragma unroll
  for (int b = 0; b < 2; b++)
    if (at.valid(b) && at.lane % 4 == 0) scales[token[b]] = largest[b];
}

// Stores a float32 fragment, each row times its factor, in the inputs' dtype.
template <int D>
DEVICE void store_fragment(u16* array, const float (&d)[D / 2], const float (&factor)[2],
                           const long long (&token)[2], const Place& at) {
  u32 pairs[D / 4];
#pragma unroll
  for (int i = 0; i < D / 4; i++)
    pairs[i] = narrow(d[2 * i] * factor[i % 2], d[2 * i + 1] * factor[i % 2]);
  store_rows<D>(array, pairs, token, at);
}

// alpha of the thread's two tokens; one if there is no mix gate.
DEVICE void load_alpha(float (&alpha)[2], const Arguments& a, const Place& at) {
#pragma unroll
  for (int b = 0; b < 2; b++)
    alpha[b] = a.alpha == nullptr ? 1.f : a.alpha[at.token(a, b)];
}
