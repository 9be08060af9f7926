// A whole state [K, W] in the accumulators of a block.
#pragma once

#include "scan.cuh"

// A thread holds rows `row` and row + 8, columns 8 j + column and the next.
template <int W>
struct State {
  float d[W / 2];
  int row, column, lane;
  DEVICE State() {
    lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, column = 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < W / 2; i++) d[i] = 0.f;
  }
  DEVICE void scale(float factor) {
#pragma unroll
    for (int i = 0; i < W / 2; i++) d[i] *= factor;
  }
  DEVICE void add(const float* from, float factor) {
#pragma unroll
    for (int j = 0; j < W / 8; j++)
#pragma unroll
      for (int b = 0; b < 2; b++) {
        float2 pair = *(const float2*)(from + (row + 8 * b) * W + 8 * j + column);
        d[4 * j + 2 * b] += pair.x * factor, d[4 * j + 2 * b + 1] += pair.y * factor;
      }
  }
  DEVICE void store(float* to, float factor) const {
#pragma unroll
    for (int j = 0; j < W / 8; j++)
#pragma unroll
      for (int b = 0; b < 2; b++)
        *(float2*)(to + (row + 8 * b) * W + 8 * j + column) =
            float2{d[4 * j + 2 * b] * factor, d[4 * j + 2 * b + 1] * factor};
  }
  // A warp moves its 16 rows to and from memory through its own rows of a tile [K, W] of halves. It accesses the
  // tile as fragments (16 columns at once) or as pieces of 16 bytes, those of consecutive lanes in one row.
  static constexpr int LANES = W / 8, ROWS = 32 / LANES;
  DEVICE u32 first_fragment() const {
    return again(swizzled(K, threadIdx.x / 32 * 16 + lane % 16, lane / 16 * 8));
  }
  DEVICE static u32 fragment(u32 first, int p) { return (first ^ (p & 3) << 5) + (p >> 2) * K * 128; }
  DEVICE u32 first_piece() const {
    return again(swizzled(K, threadIdx.x / 32 * 16 + lane / LANES, lane % LANES * 8));
  }
  DEVICE static u32 piece(u32 first, int n) { return (first ^ (n * ROWS & 7) << 4) + n * ROWS * 128; }
  DEVICE int first_entry() const { return again((int)(threadIdx.x / 32 * 16 + lane / LANES) * W + lane % LANES * 8); }
  // Starts copying the thread's pieces of a float16 state.
  DEVICE void request(u32 tile, const u16* from) const {
    u32 to = tile + first_piece();
    from = again(from + first_entry());
#pragma unroll
    for (int n = 0; n < W / 16; n++) copy_pieces(piece(to, n), from + n * ROWS * W, true);
  }
  DEVICE void send(const unsigned char* tile, u16* to) const {
    u32 from = first_piece();
    to = again(to + first_entry());
#pragma unroll
    for (int n = 0; n < W / 16; n++) *(uint4*)(to + n * ROWS * W) = *(const uint4*)(tile + piece(from, n));
  }
  // Writes d * factor to the tile; returns this thread's share of its sum of squares. STORED: the tile holds a
  // state S, and the share is that of <d * factor, S>. ADDS: then d = d * rescale + start * S.
  template <bool STORED, bool ADDS>
  DEVICE float put(u32 tile, float factor, float rescale = 1.f, float start = 0.f) {
    float sum[2] = {0.f, 0.f};
    u32 first = tile + first_fragment();
#pragma unroll
    for (int p = 0; p < W / 16; p++) {
      u32 in[4], out[4];
      if constexpr (STORED) load_matrices(in, fragment(first, p));
#pragma unroll
      for (int w = 0; w < 4; w++) {
        float &a = d[8 * p + 2 * w], &b = d[8 * p + 2 * w + 1];
        float scaled[2] = {a * factor, b * factor}, of[2] = {scaled[0], scaled[1]};
        out[w] = pack(scaled[0], scaled[1]);
        if constexpr (STORED) of[0] = low_half(in[w]), of[1] = high_half(in[w]);
        sum[0] += scaled[0] * of[0], sum[1] += scaled[1] * of[1];
        if constexpr (ADDS) a = a * rescale + start * of[0], b = b * rescale + start * of[1];
      }
      store_matrices(fragment(first, p), out);
    }
    return sum[0] + sum[1];
  }
  DEVICE float largest() const {
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < W / 2; i++) most = fmaxf(most, fabsf(d[i]));
    return most;
  }
  // d += factor S for a float16 state S.
  DEVICE void add_stored(const u16* from, float factor) {
#pragma unroll
    for (int i = 0; i < W / 4; i++) {
      u32 word = *(const u32*)(from + (row + i % 2 * 8) * W + i / 2 * 8 + column);
      d[2 * i] += factor * low_half(word), d[2 * i + 1] += factor * high_half(word);
    }
  }
};
