// Shared by the gradients through U and H: a chunk's tiles in shared memory, its numbers, sums over pairs, stores.
#pragma once

#include "fragments.cuh"
#include "inputs.cuh"

constexpr int WIDE = K > V ? K : V;
constexpr float FAINT = 1e-20f;  // a product smaller than its addend by this factor may lose digits

// A block's shared memory.
struct Tiles {
  unsigned char state[K * WIDE * 2];  // E of U, then E of H, then H_[c]
  unsigned char k[C * K * 2];
  unsigned char z[C * K * 2];         // z, then x
  unsigned char d[C * WIDE * 2];      // do, then y
  unsigned char v[2 * C * C * 2];     // v, then two tiles [C, C]
  // numbers per token, zero past the chunk's end
  float decay_u[C], decay_h[C], alpha[C], rest[C], beta2[C], x_scale[C], both[C], w[C], key_weight[C];
  float start_u[C], start_h[C], energy[C], ends[C], sums[C], columns[C];
  // numbers of the chunk's states
  float e_scales[V / 64], u_whole, h_whole, h_scale, h_norm2, h_end_scale;

  DEVICE u32 tile(int i) const { return shared_address(v) + i * C * C * 2; }
};

// Byte offset of the thread's first accumulator word in a tile [C, C]. Word j is at `place ^ j << 4`, and that of its
// second row at + 1024.
DEVICE u32 first_word(const Place& at) {
  return at.row[0] * 128 + ((at.row[0] & 7) << 4) + at.column * 2;
}

// The same place, opaque to the compiler: what derives from it holds no registers until its next use.
DEVICE Place again(const Place& at) {
  Place same = at;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(same.thread));
  same.lane = same.thread % 32;
  same.row[0] = same.thread / 32 * 16 + same.lane / 4, same.row[1] = same.row[0] + 8;
  same.column = 2 * (same.lane % 4);
  return same;
}

DEVICE float inverse(float x) { return x > 1e-37f ? __fdividef(1.f, x) : 0.f; }

template <int N>
DEVICE float largest_of(const float* x, long long index) {
  float largest = x[index * N];
#pragma unroll
  for (int i = 1; i < N; i++) largest = fmaxf(largest, x[index * N + i]);
  return largest;
}

// Loads four words of a left operand from a tile in shared memory: columns 16 k to 16 k + 15.
DEVICE void load_left(u32 (&a)[4], u32 tile, int k, const Place& at) {
  int row = at.thread / 32 * 16 + at.lane % 16;
  u32 from = (tile + row * 128 + ((at.lane / 16 ^ (row & 7)) << 4)) ^ (k & 3) << 5;
  load_matrices(a, from + (k >> 2) * C * 128);
}

// k16_j . d_j of the thread's two rows j.
DEVICE void dots_with_keys(float (&dot)[2], const float (&d)[K / 2], const Tiles& s, const Place& at) {
  dot[0] = dot[1] = 0.f;
#pragma unroll
  for (int k = 0; k < K / 16; k++) {
    u32 key[4];
    load_left(key, shared_address(s.k), k, at);
#pragma unroll
    for (int i = 0; i < 4; i++)
      dot[i % 2] += d[8 * k + 2 * i] * low_half(key[i]) + d[8 * k + 2 * i + 1] * high_half(key[i]);
  }
  dot[0] = quad_sum(dot[0]), dot[1] = quad_sum(dot[1]);
}

// Starts a swizzled copy of float16 rows of an array [tokens, heads, K]; zeros past the chunk's end.
DEVICE void copy_rows(u32 to, const u16* array, int heads, int head, const Place& at) {
  typedef Pieces<K> P;
  const u16* from = array + (at.start * heads + head) * K + P::column(at);
  u32 step = heads * K;
  to += P::place(at);
#pragma unroll
  for (int i = 0; i < P::N; i++) {
    bool valid = P::row(i, at) < at.length;
    copy_pieces(to + i * P::STEP * 128, from + (valid ? P::row(i, at) * step : 0), valid);
  }
  copies_commit();
}

// Prefetches a state [K, K] into the cache; called by one thread.
DEVICE void prefetch_state(const u16* from) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(K * K * 2));
}

DEVICE void load_numbers(Tiles& s, const Arguments& a, const Place& at) {
  int row = at.thread % C;
  bool valid = row < at.length;
  long long first = at.start + (valid ? row : 0), token = first * a.heads + at.head;
  long long group = first * a.group_heads + at.head - a.first_head;
  bool of_u = at.thread / 32 % 2;
  float2 decays = load_decays(of_u ? a.g : a.gk, a, at);
  float alpha = 1.f, beta = 1.f;
  if (a.alpha != nullptr) alpha = a.alpha[token];
  if (a.beta != nullptr) beta = a.beta[token];
  float x_scale = a.x_scale[token], y_scale = a.y_scale[group], w = a.w[group];
  float key_weight = a.key_weight[group], start_u = a.start_u[group], start_h = a.start_h[group];
  s.alpha[row] = alpha;
  s.rest[row] = valid ? 1.f - alpha : 0.f;
  s.beta2[row] = valid ? beta * beta : 0.f;
  s.x_scale[row] = valid ? x_scale : 0.f;
  s.both[row] = valid ? x_scale * y_scale : 0.f;
  s.w[row] = valid ? w : 0.f;
  s.key_weight[row] = valid ? key_weight : 0.f;
  s.start_u[row] = valid ? start_u : 0.f;
  s.start_h[row] = valid ? start_h : 0.f;
  sum_decays(of_u ? s.decay_u : s.decay_h, decays, at);
  if (at.thread >= 32) return;
  long long of_h = at.state * (K / 64), of_v = at.state * (V / 64);
  const float* from = at.lane < V / 64 ? a.u_end_scales + of_v + at.lane : a.u_wholes + of_v;
  from = at.lane == V / 64 + 1 ? a.h_wholes + of_h : at.lane == V / 64 + 2 ? a.h_scales + of_h : from;
  from = at.lane == V / 64 + 3 ? a.h_norms + of_h : at.lane == V / 64 + 4 ? a.h_end_scales + of_h : from;
  if (at.lane < V / 64 + 5) s.e_scales[at.lane] = *from;
  __syncwarp();
}

// Largest entries of the chunk's k, v and do, and an upper bound of z's.
struct Largest {
  float k, v, z, d;
};

// Stores k, v, z and do, divided by their bounds, and the tokens' numbers in shared memory; returns the bounds. Issues
// all loads before it waits for any, and leaves the copy of E of U in flight.
DEVICE Largest load_tiles(Tiles& s, const Arguments& a, const Place& at) {
  copy_rows(shared_address(s.z), a.x, a.heads, at.head, at);
  copy_state<K, V>(shared_address(s.state), a.u_ends + at.state * K * V, at.thread);
  Pieces<K> k, q;
  Pieces<V> v, d;
  k.load(a.k, a.key_heads, at.head / (a.heads / a.key_heads), at);
  v.load(a.v, a.value_heads, at.head / (a.heads / a.value_heads), at);
  d.load(a.d_o, a.heads, at.head, at);
  q.load(a.q, a.heads, at.head, at);
  if (at.thread == 0) {
    prefetch_state(a.h_ends + at.state * K * K);
    prefetch_state(a.h_start + at.state * K * K);
  }
  Largest most = {a.k_maxima[at.state], largest_of<V / 64>(a.v_maxima, at.state), a.z_maxima[at.state],
                  largest_of<V / 64>(a.d_maxima, at.state)};
  load_numbers(s, a, at);
  k.store(s.k, inverse(most.k), at);
  v.store(s.v, inverse(most.v), at);
  d.store(s.d, inverse(most.d), at);
  copies_wait<1>();  // the thread's own pieces of x have arrived
  __syncthreads();
  float less = inverse(most.z);
  unsigned char* z = s.z + Pieces<K>::place(at);
#pragma unroll
  for (int i = 0; i < Pieces<K>::N; i++) {
    int row = Pieces<K>::row(i, at);  // past the chunk's end both factors are zero
    float of_x = s.alpha[row] * s.x_scale[row] * less, of_q = s.rest[row] * less;
    uint4 mixed = *(const uint4*)(z + i * Pieces<K>::STEP * 128);
#pragma unroll
    for (int w = 0; w < 4; w++) {
      float2 pair = widen(((const u32*)&q.held[i])[w]);
      u32 halves = ((const u32*)&mixed)[w];
      ((u32*)&mixed)[w] = pack(of_q * pair.x + of_x * low_half(halves), of_q * pair.y + of_x * high_half(halves));
    }
    *(uint4*)(z + i * Pieces<K>::STEP * 128) = mixed;
  }
  return most;
}

// Stores rows of dk or dv: in float32 scratch [tokens, H', D] if heads share, else in the caller's array.
template <int D>
DEVICE void store_gradient(void* array, bool shared, const float (&d)[D / 2], const float (&factor)[2],
                           const Arguments& a, const Place& at) {
  if (!shared) {
    long long token[2] = {at.token(a, 0), at.token(a, 1)};
    store_fragment<D>((u16*)array, d, factor, token, at);
    return;
  }
#pragma unroll
  for (int b = 0; b < 2; b++) {
    float* to = (float*)array + at.group_token(a, b) * D + at.column;
    if (!at.valid(b)) continue;
#pragma unroll
    for (int j = 0; j < D / 8; j++)
      *(float2*)(to + 8 * j) = {d[4 * j + 2 * b] * factor[b], d[4 * j + 2 * b + 1] * factor[b]};
  }
}

// Sums of the pairs' parts P_tj (without beta_j^2), times a factor: over t into `columns`, and of beta_j^2 P_tj over
// j < i <= t into `sums`. Adds by a product with a triangle of ones; two bfloat16 numbers have float32's range and 16
// of its bits. Overwrites both tiles; ends with a barrier.
DEVICE void sum_pairs(const float (&pairs)[C / 2], float factor, Tiles& s, const Place& at) {
  u32 place = first_word(at), since[C / 4];
#pragma unroll
  for (int i = 0; i < C / 4; i++) {
    u32 high = pack_bfloat16(pairs[2 * i], pairs[2 * i + 1]);
    float rest[2] = {pairs[2 * i] - __uint_as_float(high << 16),
                     pairs[2 * i + 1] - __uint_as_float(high & 0xffff0000u)};
    u32 low = pack_bfloat16(rest[0], rest[1]);
    unsigned char* to = s.v + (place ^ i / 2 << 4) + i % 2 * 1024;
    *(u32*)to = high, *(u32*)(to + C * C * 2) = low;
    int missing = max(16 * (at.row[i % 2] - at.column - i / 2 * 8), 0);  // bits: 1 where column >= row
    asm("shl.b32 %0, %1, %2;" : "=r"(since[i]) : "r"(0x3f803f80u), "r"(missing));
    asm volatile("" : "+r"(since[i]));  // computed before the product begins
  }
  publish_shared();
  __syncthreads();
  u64 right = descriptor(s.tile(0), C * 128, 1024);
  float after[C / 2];  // sum over t >= i, for each j
  mma_begin();
#pragma unroll
  for (int k = 0; k < 2 * C / 16; k++)
    mma_bfloat16(after, since + k % (C / 16) * 4, advance(right, k * 2048), k > 0);
  mma_commit();
  mma_wait<0>();
  hold(after);
  float sum[2] = {0.f, 0.f};
#pragma unroll
  for (int j = 0; j < C / 8; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      int column = 8 * j + at.column + e;
      float beta2 = s.beta2[column];
#pragma unroll
      for (int b = 0; b < 2; b++)
        if (8 * j + e < at.row[b] - at.column) sum[b] += after[4 * j + 2 * b + e] * beta2;
      if (at.row[0] == 0) s.columns[column] = after[4 * j + e] * factor;
    }
  sum[0] = quad_sum(sum[0]), sum[1] = quad_sum(sum[1]);
#pragma unroll
  for (int b = 0; b < 2; b++)
    if (at.lane % 4 == 0) s.sums[at.row[b]] = sum[b] * factor;
  __syncthreads();
}

// Writes dg_i of the tokens 2 lane and 2 lane + 1 (unless dg is null), and adds to their d(beta^2).
DEVICE void store_decay(float* dg, float (&d_beta2)[2], const float* start, float whole, const Tiles& s,
                        const Arguments& a, const Place& at) {
  int first = 2 * at.lane;
  float end[2], before, later = start[first] + start[first + 1];
#pragma unroll
  for (int e = 0; e < 2; e++) {
    d_beta2[e] += s.columns[first + e] + s.ends[first + e];
    end[e] = s.ends[first + e] * s.beta2[first + e];
  }
  before = end[0] + end[1];
#pragma unroll
  for (int i = 1; i < 32; i <<= 1) {
    float down = __shfl_up_sync(~0u, before, i), up = __shfl_down_sync(~0u, later, i);
    before += at.lane >= i ? down : 0.f, later += at.lane + i < 32 ? up : 0.f;
  }
  before = __shfl_up_sync(~0u, before, 1), later = __shfl_down_sync(~0u, later, 1);
  before = at.lane > 0 ? before : 0.f, later = at.lane < 31 ? later : 0.f;
  later += start[first + 1];
  float gradient[2] = {s.sums[first] + before + (later + start[first]) + whole,
                       s.sums[first + 1] + (before + end[0]) + later + whole};
  if (dg == nullptr || at.thread >= 32) return;
#pragma unroll
  for (int e = 0; e < 2; e++)
    if (first + e < at.length) dg[(at.start + first + e) * a.heads + at.head] = gradient[e];
}
