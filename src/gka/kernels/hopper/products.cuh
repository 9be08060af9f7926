// Copies of a chunk's tiles to shared memory, and the product left^T right that adds them to a state: `left` is
// weighted by token in registers, `right` is used as loaded.
#pragma once

#include "state.cuh"
#include "weights.cuh"

// Starts copying a tile [C, D], rows of one head of [tokens, heads, D] from `token`; zeros past its length.
template <int D>
DEVICE void copy_tile(u32 to, const u16* array, int token, int heads, int head, int length) {
  constexpr int LANES = D / 8, STEP = THREADS / LANES;
  static_assert(STEP % 8 == 0);  // all pieces of a thread share one swizzle
  int row = threadIdx.x / LANES, column = threadIdx.x % LANES * 8;
  const u16* source = array + ((long long)(token + row) * heads + head) * D + column;
  to += swizzled(C, row, column);
#pragma unroll
  for (int i = 0; i < C / STEP; i++)
    copy_pieces(to + i * STEP * 128, source + (long long)(i * STEP * D) * heads, row + i * STEP < length);
}

// Starts copying a chunk's tiles. STATES: k, v. U_BACK: q, x, do. H_BACK: k, x, y.
template <int KIND, bool OF_H, int TILE>
DEVICE void copy_tiles(u32 to, const ScanArguments& a, const Walk& at, int token, int length) {
  if constexpr (KIND == U_BACK) {
    copy_tile<K>(to, a.q, token, a.heads, at.head, length);
    copy_tile<V>(to + 2 * TILE, a.d_o, token, a.heads, at.head, length);
  } else {
    copy_tile<K>(to, a.k, token, a.key_heads, at.key_head, length);
  }
  if constexpr (KIND != STATES) copy_tile<K>(to + TILE, a.x, token, a.heads, at.head, length);
  if constexpr (KIND == H_BACK) copy_tile<K>(to + 2 * TILE, a.y, token, a.group_heads, (int)at.in_group, length);
  if constexpr (KIND == STATES && !OF_H)
    copy_tile<V>(to + TILE, a.v, token, a.value_heads, at.value_head, length);
}

// The largest of `most` and eight inputs' magnitudes, compared as bits, two at a time. By value: one 16-byte read.
DEVICE u32 max_inputs(u32 most, uint4 eight) {
#pragma unroll
  for (int w = 0; w < 4; w++) most = max_pair(most, ((const u32*)&eight)[w] & 0x7fff7fffu);
  return most;
}

// Largest magnitudes of the inputs in the thread's part of a tile [C, D].
template <int D>
DEVICE u32 largest_inputs(const unsigned char* tile) {
  u32 most = 0;
#pragma unroll
  for (int n = 0; n < C * D / 8 / THREADS; n++)
    most = max_inputs(most, ((const uint4*)tile)[threadIdx.x + n * THREADS]);
  return most;
}

// The same; into `weighted` the largest product of a token's weight and a magnitude of its row (SQUARED: its square).
template <int D, bool SQUARED>
DEVICE u32 largest_inputs(const unsigned char* tile, const float* weight, float& weighted) {
  constexpr int PIECES = C * D / 8 / THREADS, ROWS = C * 8 / THREADS;  // per thread; piece n is in row n % ROWS
  u32 most = 0;
  weighted = 0.f;
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    u32 of_row = 0;
#pragma unroll
    for (int n = i; n < PIECES; n += ROWS)
      of_row = max_inputs(of_row, ((const uint4*)tile)[threadIdx.x + n * THREADS]);
    float2 pair = widen(of_row);
    float largest = fmaxf(pair.x, pair.y);
    weighted = fmaxf(weighted, weight[threadIdx.x / 8 + i * (THREADS / 8)] * (SQUARED ? largest * largest : largest));
    most = max_pair(most, of_row);
  }
  return most;
}

// The lane's offset in a tile with which `load_transposed` gives the warp's 16 columns of the first 16 tokens as a
// left operand. The next 16 tokens lie SLICE bytes further.
constexpr int SLICE = 16 * 128;
DEVICE u32 left_place() {
  int lane = threadIdx.x % 32;
  return swizzled(C, lane / 16 * 8 + lane % 8, threadIdx.x / 32 * 16 + lane / 8 % 2 * 8);
}

// Inputs times weights as first - second, to 16 bits or more. A weight is a difference of two inputs' numbers, too,
// and the rounding error of a product of two such numbers is itself such a number.
DEVICE void weigh(u32 (&first)[4], u32 (&second)[4], const u32 (&a)[4], const uint4& weight) {
#pragma unroll
  for (int b = 0; b < 2; b++) {
    u32 most = b ? weight.z : weight.x, less = b ? weight.w : weight.y, minus = minus_inputs(most);
#pragma unroll
    for (int i = 2 * b; i < 2 * b + 2; i++) {
      first[i] = times_inputs(a[i], most);
      second[i] = times_plus_inputs(a[i], less, times_plus_inputs(a[i], minus, first[i]));
    }
  }
}

// Weighted z = q + alpha (x - q) as first - second.
DEVICE void mix(u32 (&first)[4], u32 (&second)[4], const u32 (&q)[4], const u32 (&x)[4], const float4 (&weight)[2]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float2 of_q = widen(q[i]);
    const float4& w = weight[i / 2];
    float z[2] = {of_q.x * w.x + low_half(x[i]) * w.z, of_q.y * w.y + high_half(x[i]) * w.w};
    first[i] = narrow(z[0], z[1]);
    float2 back = widen(first[i]);
    second[i] = narrow(back.x - z[0], back.y - z[1]);
  }
}

// d += left^T right for one chunk, tiles as in copy_tiles. A warpgroup's 64 rows of the state are 64 columns of
// `left`.
template <int KIND, bool OF_H, int TILE, int N>
DEVICE void add_chunk(float (&d)[N], u32 tiles, const Gates& gate) {
  u32 place = tiles + left_place(), c = threadIdx.x % 4;
  constexpr int RIGHT = OF_H ? 0 : KIND == STATES ? 1 : 2;
  u64 right = descriptor(tiles + RIGHT * TILE, C * 128, 1024), x = descriptor(tiles + TILE, C * 128, 1024);
#pragma unroll
  for (int s = 0; s < C / 16; s++) {
    u32 a[4], other[4], first[4], second[4];
    if constexpr (KIND == H_BACK) {
      load_transposed(other, place + 2 * TILE + s * SLICE);
      uint2 weight = ((const uint2*)(gate.pairs + C))[4 * s + c];
#pragma unroll
      for (int i = 0; i < 4; i++) other[i] = times(other[i], i < 2 ? weight.x : weight.y);
      mma_begin();
      mma<1, 1>(d, other, advance(x, s * SLICE), true);
    }
    load_transposed(a, place + s * SLICE);
    if constexpr (KIND == U_BACK) {
      load_transposed(other, place + TILE + s * SLICE);
      const float4* weight = (const float4*)gate.pairs + 8 * s + 2 * c;
      mix(first, second, a, other, {weight[0], weight[1]});
    } else {
      weigh(first, second, a, ((const uint4*)gate.pairs)[4 * s + c]);
    }
    mma_begin();
    mma_inputs<1>(d, first, advance(right, s * SLICE));
    mma_inputs<-1>(d, second, advance(right, s * SLICE));
    mma_commit();
    if (s > 0) mma_wait<1>();  // frees the registers of the previous operands
  }
}
