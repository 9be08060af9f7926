// Scans over chunks (gka/maths/moments.py): KIND 0, the states H and U at chunk starts; backwards, the
// gradients E at chunk ends, KIND 1 of U, KIND 2 of H.
//
// A block walks along one segment of a sequence for one head. It holds a whole state in its accumulators, a
// warpgroup 64 rows of it, in units of `unit`; every chunk adds left^T right, two [C, ...] tiles in float16
// whose rows carry the weights. `sum_only`: segments from zero, to be put together by the second launch.

constexpr int C = 64, GROUPS = K / 64, THREADS = 128 * GROUPS, WIDEST = K > V ? K : V;

// One of the two states, or its gradient. W is its number of columns, K for H and V for U.
struct Side {
  const float *g;         // log decay [tokens, H] or null
  const float *boundary;  // [N, H, K, W] or null: the initial state; backwards the final state's gradient
  const float *boundary_max;  // [N, H]: largest magnitude of it
  u16 *states;            // [M, G, K, W] float16: as a chunk finds it / its bound; backwards E at its end
  float *bounds;          // [M, G, W / 64]
  float *norms;           // [M, G, W / 64] or null: sums of squares, all in the first
  float *last;            // [N, H, K, W] or null: the final state; backwards the initial one's gradient
  float *sums, *sum_bounds, *sum_decays;  // [S, G, K, W], [S, G], [S, G], or null with one segment each
};

struct ScanArguments {
  Side h, u;
  const u16 *k, *v, *q, *x, *d_o, *y;  // x [tokens, H, K], y [tokens, G, K]: float16, rows / their scales
  const float *alpha, *beta, *x_scale, *y_scale, *key_weight, *start_weight;
  float *first_maxima, *second_maxima;  // [M, G] and [M, G, V / 64] or null: of k and v; backwards z and do
  const u16 *stored;                    // backwards [M, G, K, W]: the chunk-start states / stored_bounds
  const float *stored_bounds;           // [M, G, W / 64]
  float *wholes;                        // backwards [M, G, W / 64]: decay times <S_[c], E>, in the first
  const int *segments;                  // [S, 5]: sequence, chunks from, to, segments from, to
  const long long *chunk_start;
  const int *chunk_length;
  float scale;
  int heads, key_heads, value_heads, first_head, group_heads, sum_only;
};

// What the rows of a chunk are weighted with; two sets, for the next chunk's are made during this one.
struct Gates {
  float weight[C], first[C], second[C], total;
};

struct Shared {
  unsigned char right[C * WIDEST * 2];
#if KIND == 2
  unsigned char right_keys[C * K * 2];
  // k, rescaled in place; x; and y in two sets: as the next chunk's arrive these are multiplied
  unsigned char raw[4][C * K * 2];
#else
  unsigned char left[C * K * 2];
  unsigned char raw[KIND + 2][C * WIDEST * 2];  // k, v; q, x, do
#endif
  Gates gates[2];
  float first_max[C], second_max[C], partial[8];
};

// Each thread's own 16-byte pieces of a [C, D] tile; a row lies in D/8 neighbouring lanes.
template <int D>
struct Pieces {
  static constexpr int N = C * D / 8 / THREADS, LANES = D / 8;
  DEVICE static int row(int i) { return (i * THREADS + threadIdx.x) / LANES; }
  DEVICE static u32 place(int i) { return swizzled(C, row(i), threadIdx.x % LANES * 8); }
  // Starts copying rows of one head of [tokens, heads, D]; zeros past the chunk's end.
  DEVICE static void copy(unsigned char* to, const u16* array, long long start, int heads, int head, int length) {
    u32 address = shared_address(to);
#pragma unroll
    for (int i = 0; i < N; i++) {
      int from = row(i) < length ? row(i) : 0;
      const u16* source = array + ((start + from) * heads + head) * D + threadIdx.x % LANES * 8;
      int bytes = row(i) < length ? 16 : 0;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address + place(i)), "l"(source),
                   "r"(bytes) : "memory");
    }
  }
  DEVICE static void read(float (&d)[8], const unsigned char* from, int i, bool half) {
    uint4 four = *(const uint4*)(from + place(i));
#pragma unroll
    for (int w = 0; w < 4; w++) {
      u32 word = ((const u32*)&four)[w];
      float2 pair = half ? float2{low_half(word), high_half(word)} : widen(word);
      d[2 * w] = pair.x, d[2 * w + 1] = pair.y;
    }
  }
  DEVICE static void write(unsigned char* to, int i, const float (&d)[8], float factor) {
    uint4 four;
#pragma unroll
    for (int w = 0; w < 4; w++) ((u32*)&four)[w] = pack(d[2 * w] * factor, d[2 * w + 1] * factor);
    *(uint4*)(to + place(i)) = four;
  }
  // Largest magnitude of the row, known to all its lanes; one of them leaves it.
  DEVICE static float row_max(const float (&d)[8], float* to, int i) {
    float most = 0.f;
#pragma unroll
    for (int e = 0; e < 8; e++) most = fmaxf(most, fabsf(d[e]));
#pragma unroll
    for (int lane = 1; lane < LANES; lane <<= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, lane));
    if (threadIdx.x % LANES == 0) to[row(i)] = most;
    return most;
  }
};

DEVICE float inverse(float x) { return x > TINY ? __fdividef(1.f, x) : 0.f; }

// The gates of lane l's rows 2l and 2l + 1 on their way from memory.
struct GateLoads {
  float g[2], a[2], b[2];
  DEVICE void load(const ScanArguments& s, const float* decay, long long start, int length, int head) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int e = 0; e < 2; e++) {
      int row = 2 * lane + e;
      bool valid = row < length;
      long long from = start + (valid ? row : 0), token = from * s.heads + head;
      g[e] = decay == nullptr ? 0.f : decay[token];
#if KIND == 0
      a[e] = s.beta == nullptr ? 1.f : s.beta[token], b[e] = 0.f;
#elif KIND == 1
      a[e] = s.alpha == nullptr ? 1.f : s.alpha[token], b[e] = s.x_scale[token];
#else
      long long in_group = from * s.group_heads + head - s.first_head;
      a[e] = s.x_scale[token] * s.y_scale[in_group], b[e] = s.key_weight[in_group];
#endif
      if (!valid) g[e] = a[e] = b[e] = 0.f;
    }
  }
  DEVICE void store(Gates& to, float scale) const {
    int lane = threadIdx.x % 32;
    float sum = g[0] + g[1];
#pragma unroll
    for (int i = 1; i < 32; i <<= 1) {
      float before = __shfl_up_sync(~0u, sum, i);
      if (lane >= i) sum += before;
    }
    float total = __shfl_sync(~0u, sum, 31), log_decay[2] = {sum - g[1], sum};
    to.total = total;
#pragma unroll
    for (int e = 0; e < 2; e++) {
      int row = 2 * lane + e;
#if KIND == 0
      to.weight[row] = __expf(total - log_decay[e]) * a[e] * a[e];
#elif KIND == 1
      to.weight[row] = __expf(log_decay[e]) * scale, to.first[row] = a[e], to.second[row] = b[e];
#else
      to.weight[row] = __expf(log_decay[e]) * a[e], to.first[row] = .5f * b[e];
#endif
    }
  }
};

// A state in the accumulators of its block: rows `row` and row + 8, columns 8 j + column and the next.
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
  DEVICE void store_half(u16* to, float factor) const {
#pragma unroll
    for (int b = 0; b < 2; b++)
#pragma unroll
      for (int g = 0; g < W / 32; g++) {
        u32 words[4];
#pragma unroll
        for (int w = 0; w < 4; w++) {
          int i = 4 * (4 * g + w) + 2 * b;
          words[w] = pack(d[i] * factor, d[i + 1] * factor);
        }
        *(uint4*)(to + (row + 8 * b) * W + 32 * g + lane % 4 * 8) =
            transpose_quad(words[0], words[1], words[2], words[3], lane);
      }
  }
  DEVICE float square_sum() const {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < W / 2; i++) sum += d[i] * d[i];
    return sum;
  }
  // <d, S> of a float16 state; then d += factor S.
  DEVICE float inner_then_add(const u16* from, float factor) {
    float sum = 0.f;
#pragma unroll
    for (int b = 0; b < 2; b++) {
      uint4 four[W / 32];
#pragma unroll
      for (int g = 0; g < W / 32; g++)
        four[g] = *(const uint4*)(from + (row + 8 * b) * W + 32 * g + lane % 4 * 8);
#pragma unroll
      for (int g = 0; g < W / 32; g++) {
        uint4 words = transpose_quad(four[g].x, four[g].y, four[g].z, four[g].w, lane);
#pragma unroll
        for (int w = 0; w < 4; w++) {
          u32 word = ((const u32*)&words)[w];
          int i = 4 * (4 * g + w) + 2 * b;
          sum += d[i] * low_half(word) + d[i + 1] * high_half(word);
          d[i] += factor * low_half(word), d[i + 1] += factor * high_half(word);
        }
      }
    }
    return sum;
  }
  // d += left^T right, tiles of C rows; this warpgroup's 64 rows of the state are 64 columns of `left`.
  DEVICE void multiply(const unsigned char* left, const unsigned char* right) {
    u32 a = shared_address(left) + threadIdx.x / 128 * C * 128, b = shared_address(right);
#pragma unroll
    for (int k = 0; k < C / 16; k++)
      mma<1, 1>(d, descriptor(a + k * 2048, C * 128, 1024), descriptor(b + k * 2048, C * 128, 1024), true);
  }
};

// Sums over the block of what every thread left in s.partial; after a barrier.
DEVICE float block_total(const Shared& s) {
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < THREADS / 32; i++) total += s.partial[i];
  return total;
}

// Where a block is.
struct Walk {
  int sequence, first, end, before, after, index, head;
  long long in_group;
  DEVICE Walk(const ScanArguments& a) {
    int segment = blockIdx.x / a.group_heads;
    in_group = blockIdx.x % a.group_heads;
    const int* row = a.segments + 5 * segment;
    sequence = row[0], first = row[1], end = row[2], before = row[3], after = row[4];
    index = segment, head = a.first_head + (int)in_group;
  }
};

template <int W, bool OF_H>
DEVICE void scan(Shared& s, const ScanArguments& a, const Side& side, const Walk& at) {
  constexpr bool BACK = KIND > 0;
  constexpr int BLOCKS_OF_STATE = W / 64;
  State<W> state;
  float unit = 0.f, bound = 0.f, decays = 0.f;
  long long heads = a.heads, place = (at.sequence * heads + at.head) * (long long)(K * W);
  int count = at.end - at.first, warp = threadIdx.x / 32;
  if (a.sum_only) {
    if (BACK ? at.index == at.before : at.index + 1 == at.after) return;  // nothing goes on from here
  } else {
    if (side.boundary != nullptr) {
      state.add(side.boundary + place, 1.f);
      bound = side.boundary_max[at.sequence * heads + at.head];
    }
    if (side.sums != nullptr) {
      int steps = BACK ? at.after - 1 - at.index : at.index - at.before;
#pragma unroll 1
      for (int i = 0; i < steps; i++) {
        long long from = (BACK ? at.after - 1 - i : at.before + i) * (long long)a.group_heads + at.in_group;
        float whole = __expf(side.sum_decays[from]);
        state.scale(whole);
        state.add(side.sums + from * K * W, 1.f);
        bound = bound * whole + side.sum_bounds[from];
      }
    }
    unit = bound;
    state.scale(inverse(bound));
  }
  // the chunks of a segment are neighbours, and all but a sequence's last are whole
  long long segment_start = count > 0 ? a.chunk_start[at.first] : 0;
  int last_length = count > 0 ? a.chunk_length[at.end - 1] : 0;
  auto chunk_of = [&](int i) { return BACK ? at.end - 1 - i : at.first + i; };
  auto start_of = [&](int c) { return segment_start + (long long)(c - at.first) * C; };
  auto length_of = [&](int c) { return c == at.end - 1 ? last_length : C; };
  [[maybe_unused]] int key_head = at.head / (a.heads / a.key_heads);
  [[maybe_unused]] int value_head = at.head / (a.heads / a.value_heads);
  GateLoads gates;
  auto copy = [&](int c) {  // starts what a chunk needs
    int length = length_of(c);
    long long start = start_of(c);
#if KIND == 0
    Pieces<K>::copy(s.raw[0], a.k, start, a.key_heads, key_head, length);
    if (!OF_H) Pieces<V>::copy(s.raw[1], a.v, start, a.value_heads, value_head, length);
#elif KIND == 1
    Pieces<K>::copy(s.raw[0], a.q, start, a.heads, at.head, length);
    Pieces<K>::copy(s.raw[1], a.x, start, a.heads, at.head, length);
    Pieces<V>::copy(s.raw[2], a.d_o, start, a.heads, at.head, length);
#else
    Pieces<K>::copy(s.raw[1], a.x, start, a.heads, at.head, length);
    Pieces<K>::copy(s.raw[2 + c % 2], a.y, start, a.group_heads, (int)at.in_group, length);
#endif
    copies_commit();
  };
  auto copy_late = [&](int c) {  // what takes the place of an operand
#if KIND == 2
    Pieces<K>::copy(s.raw[0], a.k, start_of(c), a.key_heads, key_head, length_of(c));
    copies_commit();
#endif
  };
  if (count > 0) {
    int c = chunk_of(0);
    copy(c), copy_late(c);
    if (warp == 0) {
      gates.load(a, side.g, start_of(c), length_of(c), at.head);
      gates.store(s.gates[0], a.scale);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < count; i++) {
    int chunk = chunk_of(i);
    long long mh = (long long)chunk * a.group_heads + at.in_group;
    bool more = i + 1 < count;
    if (more && warp == 0) {
      int c = chunk_of(i + 1);
      gates.load(a, side.g, start_of(c), length_of(c), at.head);
    }
    const Gates& gate = s.gates[i % 2];
    float partial = 0.f, of_start = 0.f;
    if (!a.sum_only) {
      state.store_half(side.states + mh * K * W, unit * inverse(bound));
      if (threadIdx.x < BLOCKS_OF_STATE) side.bounds[mh * BLOCKS_OF_STATE + threadIdx.x] = bound;
    }
    float whole = __expf(gate.total);
    if constexpr (KIND == 0) {
      if (OF_H && side.norms != nullptr) partial = state.square_sum() * unit * unit;
    } else {
      float scale = a.stored_bounds[mh * BLOCKS_OF_STATE];
      if constexpr (KIND == 2) of_start = .5f * a.start_weight[mh] * scale;
      if (!a.sum_only) {
        float inner = state.inner_then_add(a.stored + mh * K * W, 0.f);
        partial = inner * (unit * scale * whole);
      }
    }
    partial = warp_sum(partial);
    if (threadIdx.x % 32 == 0) s.partial[warp] = partial;
    copies_wait<0>();
    // largest entries of the rows
#if KIND == 1
    float z[Pieces<K>::N][8];
#endif
#pragma unroll
    for (int n = 0; n < Pieces<K>::N; n++) {
      float d[8];
      Pieces<K>::read(d, s.raw[0], n, false);
#if KIND == 1
      float x[8], alpha = gate.first[Pieces<K>::row(n)], x_scale = gate.second[Pieces<K>::row(n)];
      Pieces<K>::read(x, s.raw[1], n, true);
#pragma unroll
      for (int e = 0; e < 8; e++) z[n][e] = d[e] = d[e] + alpha * (x[e] * x_scale - d[e]);
#endif
      Pieces<K>::row_max(d, s.first_max, n);
    }
    if constexpr (!OF_H) {
#pragma unroll
      for (int n = 0; n < Pieces<V>::N; n++) {
        float d[8];
        Pieces<V>::read(d, s.raw[KIND + 1], n, false);
        Pieces<V>::row_max(d, s.second_max, n);
      }
    }
    __syncthreads();
    if (!a.sum_only && threadIdx.x < BLOCKS_OF_STATE) {
      float* to = BACK ? a.wholes : side.norms;
      if (to != nullptr) to[mh * BLOCKS_OF_STATE + threadIdx.x] = threadIdx.x ? 0.f : block_total(s);
    }
    // the unit that keeps all weights at most one, and the bound of the state's entries
    float largest = 0.f, sum = 0.f, first_most = 0.f, second_most = 0.f;
#pragma unroll
    for (int e = 0; e < 2; e++) {
      int row = 2 * (threadIdx.x % 32) + e;
      float first = s.first_max[row], second = OF_H ? first : s.second_max[row];
      float most = fabsf(gate.weight[row]) * first * second, total = most;
      if constexpr (KIND == 2) {
        float of_keys = fabsf(gate.first[row]) * first * first;
        most = fmaxf(fabsf(gate.weight[row]), of_keys), total = fabsf(gate.weight[row]) + of_keys;
      }
      largest = fmaxf(largest, most), sum += total;
      first_most = fmaxf(first_most, first), second_most = fmaxf(second_most, second);
    }
    largest = fmaxf(warp_max(largest), fabsf(of_start)), sum = warp_sum(sum) + fabsf(of_start);
    if (a.first_maxima != nullptr && !a.sum_only && !OF_H && warp == 0) {
      first_most = warp_max(first_most), second_most = warp_max(second_most);
      if (threadIdx.x == 0) a.first_maxima[mh] = first_most;
      if (threadIdx.x < V / 64) a.second_maxima[mh * (V / 64) + threadIdx.x] = second_most;
    }
    float next = fmaxf(unit * whole, largest), per_unit = inverse(next);
    state.scale(unit * whole * per_unit);
    if constexpr (KIND == 2) state.inner_then_add(a.stored + mh * K * W, -of_start * per_unit);
    unit = next > TINY ? next : 0.f, bound = bound * whole + sum, decays += gate.total;
    // the tiles
#pragma unroll
    for (int n = 0; n < Pieces<K>::N; n++) {
      int row = Pieces<K>::row(n);
      float most = s.first_max[row];
#if KIND == 1
      Pieces<K>::write(s.left, n, z[n], inverse(most));
#else
      float d[8];
      Pieces<K>::read(d, s.raw[0], n, false);
#if KIND == 0
      Pieces<K>::write(s.left, n, d, inverse(most));
      if (OF_H) Pieces<K>::write(s.right, n, d, gate.weight[row] * most * per_unit);
#else
      Pieces<K>::write(s.raw[0], n, d, inverse(most));
      Pieces<K>::write(s.right_keys, n, d, -gate.first[row] * most * per_unit);
      Pieces<K>::read(d, s.raw[1], n, true);
      Pieces<K>::write(s.right, n, d, -gate.weight[row] * per_unit);
#endif
#endif
    }
    if constexpr (!OF_H) {
#pragma unroll
      for (int n = 0; n < Pieces<V>::N; n++) {
        float d[8];
        int row = Pieces<V>::row(n);
        Pieces<V>::read(d, s.raw[KIND + 1], n, false);
        Pieces<V>::write(s.right, n, d, gate.weight[row] * s.first_max[row] * per_unit);
      }
    }
    if (more) {
      copy(chunk_of(i + 1));  // each thread has read its own pieces
      if (warp == 0) gates.store(s.gates[(i + 1) % 2], a.scale);
    }
    publish_shared();
    __syncthreads();
    mma_begin();
#if KIND == 2
    state.multiply(s.raw[2 + chunk % 2], s.right);
    state.multiply(s.raw[0], s.right_keys);
#else
    state.multiply(s.left, s.right);
#endif
    mma_commit();
    mma_wait<0>();
    hold(state.d);
    if (KIND == 2 && more) {
      __syncthreads();  // both warpgroups have read the operand
      copy_late(chunk_of(i + 1));
    }
  }
  if (a.sum_only) {
    long long to = (long long)at.index * a.group_heads + at.in_group;
    state.store(side.sums + to * K * W, unit);
    if (threadIdx.x == 0) side.sum_bounds[to] = bound, side.sum_decays[to] = decays;
  } else if (side.last != nullptr && (BACK ? at.index == at.before : at.index + 1 == at.after)) {
    state.store(side.last + place, unit);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    gka_scan(const __grid_constant__ ScanArguments a) {
  extern __shared__ unsigned char raw[];
  Shared& s = *(Shared*)(raw + (-(int)shared_address(raw) & 1023));
  Walk at(a);
#if KIND == 0
  if (blockIdx.y == 0)
    scan<K, true>(s, a, a.h, at);
  else
    scan<V, false>(s, a, a.u, at);
#elif KIND == 1
  scan<V, false>(s, a, a.u, at);
#else
  scan<K, true>(s, a, a.h, at);
#endif
}
