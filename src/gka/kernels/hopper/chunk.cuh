// One chunk of one head: kernel arguments, tiles in shared memory, decays, write gates.
//
// A block is one warpgroup and works on C = 64 tokens of one of the H' heads of a group. K, V, BF16 (else float16
// inputs), ADAPTIVE and CG are set when compiling. Names are those of docs/maths.md; *16 is a float16 copy, divided by a
// scale.
#pragma once

#include "decay.cuh"
#include "numbers.cuh"
#include "tensor_cores.cuh"

constexpr int C = 64;
constexpr int THREADS = 128;

struct Arguments {
  const u16 *q, *k, *v;                     // [tokens, H, K], [tokens, HK, K], [tokens, HV, V]
  const float *g, *gk, *alpha, *beta;       // [tokens, H] or null
  const u16 *h_start, *u_start;           // [M, H', K, K], [M, H', K, V] float16: chunk-start states / scale
  const float *h_scales, *h_norms;          // [M, H', K / 64]: only the first is read
  const float *u_scales;                    // [M, H', V / 64]
  const long long *chunk_start;             // [M], or null if every chunk has C tokens
  const int *chunk_length;                  // [M]
  u16 *o;                                   // [tokens, H, V]
  u16 *x;                                   // [tokens, H, K] float16: x_t / x_scale_t
  float *x_scale;                           // [tokens, H]
  int *steps;                               // [M, H] or null: steps taken
  // of the adjoint
  const u16 *d_o;                           // [tokens, H, V]
  u16 *dq;                                  // [tokens, H, K]
  float *d_alpha;                           // [tokens, H] or null
  u16 *y;                                   // [tokens, H', K] float16: y_t / y_scale_t
  float *y_scale;                           // [tokens, H']
  float *w, *key_weight;                    // [tokens, H']: 2a <x_t, y_t> / F_t; sum_t zeta_t w_t W_tj
  float *start_weight;                      // [M, H']: sum_t zeta_t^2 w_t
  float *start_u, *start_h;                 // [tokens, H']: zeta_t z_t.(U_[c] do_t) scale; x_t.H_[c] y_t
  // of the gradients
  const u16 *u_ends, *h_ends;               // [M, H', K, V], [M, H', K, K] float16: E / scale; of H unsymmetrised
  const float *u_end_scales, *u_wholes;     // [M, H', V / 64]: the scales; decay over the chunk <U_[c], E>
  const float *h_end_scales, *h_wholes;     // [M, H', K / 64]: the same of H, only the first is read
  const float *k_maxima, *z_maxima;         // [M, H']: largest entries of the chunk; of z a bound
  const float *v_maxima, *d_maxima;         // [M, H', V / 64]
  void *dk, *dv;                            // as k and v; [tokens, H', K or V] float32 if heads share
  float *dg, *dgk, *d_beta2;                // [tokens, H] or null
  float scale, ridge_ratio, empty_below, stop;  // stop: of conjugate gradients, a target^2
  int num_iter, heads, key_heads, value_heads, first_head, group_heads, first_chunk;
};

// Sum or maximum over the block; `scratch`: 4 floats. Begins and ends with a barrier.
template <bool MAXIMUM>
DEVICE float block_reduce(float x, float* scratch) {
  x = MAXIMUM ? warp_max(x) : warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float a = scratch[0], b = scratch[1], c = scratch[2], d = scratch[3];
  return MAXIMUM ? fmaxf(fmaxf(a, b), fmaxf(c, d)) : (a + b) + (c + d);
}

// The place of this block and thread.
struct Place {
  int chunk, head, thread, lane, column;  // column: this thread's first in a fragment
  int row[2];                             // this thread's two tokens of the chunk
  int length;
  long long start, state;                 // first token; index of the chunk's states in arrays of the group
  DEVICE Place(const Arguments& a) {
    chunk = a.first_chunk + blockIdx.x / a.group_heads;
    head = a.first_head + blockIdx.x % a.group_heads;
    state = blockIdx.x;
    thread = threadIdx.x;
    lane = thread % 32;
    row[0] = thread / 32 * 16 + lane / 4;
    row[1] = row[0] + 8;
    column = 2 * (lane % 4);
    bool whole = a.chunk_start == nullptr;
    start = whole ? (long long)C * chunk : a.chunk_start[chunk];
    length = whole ? C : a.chunk_length[chunk];
  }
  DEVICE bool valid(int b) const { return row[b] < length; }
  // The row if valid, else the chunk's first, which may always be read: loads need no branch.
  DEVICE int readable(int b) const { return valid(b) ? row[b] : 0; }
  DEVICE long long token(const Arguments& a, int b) const {
    return (start + readable(b)) * a.heads + head;
  }
  DEVICE long long group_token(const Arguments& a, int b) const {
    return (start + readable(b)) * a.group_heads + head - a.first_head;
  }
};

// Rows of a 16-bit array [tokens, heads, D] as a left operand's fragment, not yet widened.
template <int D>
DEVICE void load_raw(u32 (&a)[D / 4], const u16* array, int heads, int head, const Place& at) {
#pragma unroll
  for (int b = 0; b < 2; b++) {
    const u16* from = array + (at.start * heads + head) * D + at.readable(b) * (heads * D) + at.column;
#pragma unroll
    for (int j = 0; j < D / 8; j++) a[2 * j + b] = *(const u32*)(from + 8 * j);
  }
}

// The fragment in float32; zeros past the chunk's end.
template <int D>
DEVICE void widen_raw(float (&d)[D / 2], const u32 (&a)[D / 4], const Place& at) {
#pragma unroll
  for (int i = 0; i < D / 4; i++) {
    float2 pair = widen(at.valid(i % 2) ? a[i] : 0);
    d[2 * i] = pair.x, d[2 * i + 1] = pair.y;
  }
}

// Starts a swizzled copy of a state [rows, columns], or of some of its tiles of 64 columns, to shared memory. A
// thread's pieces are a multiple of eight rows apart, so they share one swizzle.
template <int ROWS, int COLUMNS, int FIRST = 0, int TILES = COLUMNS / 64 - FIRST>
DEVICE void copy_state(u32 to, const u16* from, int thread) {
  if constexpr (TILES > 0) {
    constexpr int STEP = THREADS / (8 * TILES);  // rows per step: whole swizzle patterns
    u32 row = (u32)thread / (8 * TILES), column = 64 * FIRST + (u32)thread % (8 * TILES) * 8;
    to += swizzled(ROWS, row, column), from += row * COLUMNS + column;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++) copy_async(to + i * STEP * 128, from + i * STEP * COLUMNS);
  }
  copies_commit();
}

// Rows of keys or values between global and shared memory: pieces of 16 bytes, all loads issued together.
template <int D>
struct Pieces {
  static constexpr int STEP = THREADS * 8 / D, N = C / STEP;  // rows per step: whole swizzle patterns
  uint4 held[N];  // past the chunk's end: the first row

  DEVICE static int row(int i, const Place& at) { return i * STEP + (u32)at.thread / (D / 8); }
  DEVICE static int column(const Place& at) { return (u32)at.thread % (D / 8) * 8; }
  DEVICE static u32 place(const Place& at) { return swizzled(C, row(0, at), column(at)); }

  DEVICE void load(const u16* array, int heads, int head, const Place& at) {
    const u16* from = array + (at.start * heads + head) * D + column(at);
    u32 step = heads * D;
#pragma unroll
    for (int i = 0; i < N; i++) {
      u32 offset = row(i, at) < at.length ? row(i, at) * step : 0;
      held[i] = *(const uint4*)(from + offset);
    }
  }
  DEVICE float largest() const {
    u32 most = 0;  // magnitudes compare as their bits do
#pragma unroll
    for (int i = 0; i < 4 * N; i++) most = max_pair(most, ((const u32*)held)[i] & 0x7fff7fffu);
    float2 pair = widen(most);
    return fmaxf(pair.x, pair.y);
  }
  // Stores the rows times `factor` in float16, swizzled; zeros past the chunk's end.
  DEVICE void store(unsigned char* to, float factor, const Place& at) const {
    to += place(at);
#pragma unroll
    for (int i = 0; i < N; i++) {
      float scale = row(i, at) < at.length ? factor : 0.f;
      uint4 scaled;
#pragma unroll
      for (int w = 0; w < 4; w++) {
        float2 pair = widen(((const u32*)&held[i])[w]);
        ((u32*)&scaled)[w] = pack(pair.x * scale, pair.y * scale);
      }
      *(uint4*)(to + i * STEP * 128) = scaled;
    }
  }
};

// Log decays of the tokens 2 l and 2 l + 1, l the lane; zeros without decay.
DEVICE float2 load_decays(const float* g, const Arguments& a, const Place& at) {
  float pair[2] = {0.f, 0.f};
#pragma unroll
  for (int e = 0; e < 2; e++) {
    int row = 2 * at.lane + e;
    if (g != nullptr) pair[e] = g[(at.start + (row < at.length ? row : 0)) * a.heads + at.head];
    if (row >= at.length) pair[e] = 0.f;
  }
  return {log_decay(pair[0]), log_decay(pair[1])};
}

// Log decay to base 2 from the chunk's start to every token, into `out` [C]. Each warp computes all of it.
DEVICE void sum_decays(float* out, float2 pair, const Place& at) {
  float sum = pair.x + pair.y;
#pragma unroll
  for (int i = 1; i < 32; i <<= 1) {
    float before = __shfl_up_sync(~0u, sum, i);
    if (at.lane >= i) sum += before;
  }
  out[2 * at.lane] = (sum - pair.y) * LOG2_E;
  out[2 * at.lane + 1] = sum * LOG2_E;
}

// W_tj = M_jt beta_j^2 as a fragment [C, C].
DEVICE void weights(float (&w)[C / 2], const float* decay, const float* beta2, const Place& at) {
  float mine[2] = {decay[at.row[0]], decay[at.row[1]]};
#pragma unroll
  for (int j = 0; j < C / 8; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      int column = 8 * j + at.column + e;
      float b = decay[column], beta = beta2[column];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float weight = power_of_two(mine[r] - b) * beta;  // may overflow above the diagonal, which the next line drops
        w[4 * j + 2 * r + e] = column <= at.row[r] ? weight : 0.f;
      }
    }
}

// Of the thread's K / 2 numbers of x, those that conjugate gradients keep in shared memory: registers hold r, d, A d.
constexpr int HELD = CG && K == 128 ? K / 4 : 0;
// Tiles of U whose memory the solve takes.
constexpr int LATE = ADAPTIVE || HELD > 0 ? 1 : 0;

// A block's shared memory. In the adjoint, U's tile holds dz during the solve. An adaptive solve keeps the vectors
// w_t, and conjugate gradients a part of x, by thread, where U's first columns will be or, in the adjoint, v was.
struct Shared {
  unsigned char h[K * K * 2];
  unsigned char u[K * V * 2 > C * K * 4 ? K * V * 2 : C * K * 4];
  unsigned char k[C * K * 2];
  unsigned char v[C * (K > V ? K : V) * 2];
  uint4 weights[C / 16 * THREADS];  // W / F, by thread; before that, (K K^T)^2
  float decay_h[C], decay_u[C], beta2[C], energy[C], scratch[8];
#if ADAPTIVE
  float key_norm2[C];  // |k16_j|^2
#endif
  float u_scales[V / 64];
};

// Starts the copies of both states.
DEVICE void copy_states(Shared& s, const Arguments& a, const Place& at) {
  copy_state<K, K>(shared_address(s.h), a.h_start + at.state * K * K, at.thread);
  copy_state<K, V>(shared_address(s.u), a.u_start + at.state * K * V, at.thread);
}

// Loads of decays, write gates and both states' numbers. Issued first, since everything else waits for them.
struct GateLoads {
  float2 decay;
  float beta, h_scale, h_norm2, u_scale;
  DEVICE void load(const Arguments& a, const Place& at) {
    int row = at.thread % C;
    decay = load_decays(at.thread / 32 % 2 ? a.g : a.gk, a, at);
    beta = 1.f;
    if (a.beta != nullptr) beta = a.beta[(at.start + (row < at.length ? row : 0)) * a.heads + at.head];
    if (row >= at.length) beta = 0.f;
    h_scale = a.h_scales[at.state * (K / 64)], h_norm2 = a.h_norms[at.state * (K / 64)];
    u_scale = a.u_scales[at.state * (V / 64) + at.thread % (V / 64)];
  }
  // Every warp sums, two of them the same numbers: this keeps shuffles out of branches.
  DEVICE void store(Shared& s, const Place& at) const {
    sum_decays(at.thread / 32 % 2 ? s.decay_u : s.decay_h, decay, at);
    s.beta2[at.thread % C] = beta * beta;
    if (at.thread < V / 64) s.u_scales[at.thread] = u_scale;
    __syncwarp();
  }
};

// Stores keys and values, each divided by its largest entry (one if all are zero), and returns those entries.
DEVICE void store_tiles(Shared& s, const Pieces<K>& k, const Pieces<V>& v, float& k_max, float& v_max,
                        const Place& at) {
  k_max = warp_max(k.largest()), v_max = warp_max(v.largest());
  if (at.lane == 0) *(float2*)(s.scratch + 2 * (at.thread / 32)) = {k_max, v_max};
  __syncthreads();
#pragma unroll
  for (int i = 0; i < THREADS / 32; i++)
    k_max = fmaxf(k_max, s.scratch[2 * i]), v_max = fmaxf(v_max, s.scratch[2 * i + 1]);
  k_max = k_max > TINY ? k_max : 1.f, v_max = v_max > TINY ? v_max : 1.f;
  k.store(s.k, 1.f / k_max, at), v.store(s.v, 1.f / v_max, at);
}
