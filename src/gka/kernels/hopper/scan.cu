// Scans over chunks (gka/maths/moments.py): the states H and U at chunk starts, or with BACKWARDS their
// gradients E at chunk ends. Blocks with blockIdx.y = 0 do H, those with 1 do U.
//
// A block walks along one segment of a sequence for one head. It holds a whole state in its accumulators, a
// warpgroup 64 rows of it, in units of `unit`; every chunk adds left^T right, two [C, ...] tiles in float16
// whose rows carry the weights. With several segments a sequence there are three launches: sums.cu, each
// segment from zero; combine.cu, what comes before each; and the scan itself.

constexpr int WIDEST = K > V ? K : V;

// What the rows of a chunk are weighted with; two sets, for the next chunk's are made during this one.
struct Gates {
  float weight[C], first[C], second[C], total;
  float largest, sum;  // H_BACK: of its weights, with keys of size one
};

struct Shared {
  unsigned char right[C * WIDEST * 2];
  unsigned char left[C * K * 2];  // H_BACK: the right operand of the keys
  // What arrives of a chunk. STATES: k, v. U_BACK: q, x, do. H_BACK: k, rescaled in place; x; and y in two
  // sets, for as the next chunk's arrive these are multiplied.
  unsigned char raw[BACKWARDS ? 4 : 2][C * WIDEST * 2];
  Gates gates[2];
  float first_max[C], second_max[C], partial[8];
};

// Each thread's own 16-byte pieces of a [C, D] tile; a row lies in D/8 neighbouring lanes.
template <int D>
struct Pieces {
  static constexpr int LANES = D / 8, STEP = THREADS / LANES, N = C / STEP;
  static_assert(STEP % 8 == 0);  // one swizzle for all pieces of a thread
  DEVICE static int row(int i) { return threadIdx.x / LANES + i * STEP; }
  DEVICE static u32 place(int i) {
    return swizzled(C, threadIdx.x / LANES, threadIdx.x % LANES * 8) + i * STEP * 128;
  }
  // Starts copying rows of one head of [tokens, heads, D]; zeros past the chunk's end.
  DEVICE static void copy(unsigned char* to, const u16* array, long long start, int heads, int head, int length) {
    u32 address = shared_address(to);
    const u16* first = array + (start * heads + head) * D + threadIdx.x % LANES * 8;
    int stride = heads * D;
#pragma unroll
    for (int i = 0; i < N; i++) {
      bool valid = row(i) < length;
      const u16* source = first + (valid ? row(i) * stride : 0);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address + place(i)), "l"(source),
                   "r"(valid ? 16 : 0) : "memory");
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
  // Largest magnitude of the row.
  DEVICE static void row_max(const float (&d)[8], float* to, int i) {
    float most = 0.f;
#pragma unroll
    for (int e = 0; e < 8; e++) most = fmaxf(most, fabsf(d[e]));
#pragma unroll
    for (int lane = 1; lane < LANES; lane <<= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, lane));
    if (threadIdx.x % LANES == 0) to[row(i)] = most;
  }
  // The same of inputs: magnitudes of 16-bit numbers are ordered as their bits are, two at a time.
  DEVICE static void raw_row_max(const unsigned char* from, float* to, int i) {
    uint4 four = *(const uint4*)(from + place(i));
    u32 most = 0;
#pragma unroll
    for (int w = 0; w < 4; w++) most = max_pair(most, ((const u32*)&four)[w] & 0x7fff7fffu);
#pragma unroll
    for (int lane = 1; lane < LANES; lane <<= 1) most = max_pair(most, __shfl_xor_sync(~0u, most, lane));
    float2 pair = widen(most);
    if (threadIdx.x % LANES == 0) to[row(i)] = fmaxf(pair.x, pair.y);
  }
};

DEVICE float inverse(float x) { return x > TINY ? __fdividef(1.f, x) : 0.f; }

// The gates of lane l's rows 2l and 2l + 1 on their way from memory.
template <int KIND>
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
      if constexpr (KIND == STATES) {
        a[e] = s.beta == nullptr ? 1.f : s.beta[token], b[e] = 0.f;
      } else if constexpr (KIND == U_BACK) {
        a[e] = s.alpha == nullptr ? 1.f : s.alpha[token], b[e] = s.x_scale[token];
      } else {
        long long in_group = from * s.group_heads + head - s.first_head;
        a[e] = s.x_scale[token] * s.y_scale[in_group], b[e] = s.key_weight[in_group];
      }
      if (!valid) g[e] = a[e] = b[e] = 0.f;
    }
  }
  DEVICE void store(Gates& to, float scale, float key_max) const {
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
      if constexpr (KIND == STATES)
        to.weight[row] = __expf(total - log_decay[e]) * a[e] * a[e];
      else if constexpr (KIND == U_BACK)
        to.weight[row] = __expf(log_decay[e]) * scale, to.first[row] = a[e], to.second[row] = b[e];
      else
        to.weight[row] = __expf(log_decay[e]) * a[e], to.first[row] = .5f * b[e];
    }
    if constexpr (KIND == H_BACK) {  // the rows' sizes are known: x and y have one, keys that of the chunk
      float most = 0.f, all = 0.f;
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float both = fabsf(__expf(log_decay[e]) * a[e]), keys = fabsf(.5f * b[e]) * key_max * key_max;
        most = fmaxf(most, fmaxf(both, keys)), all += both + keys;
      }
      to.largest = warp_max(most), to.sum = warp_sum(all);
    }
  }
};

// Sums over the block of what every thread left in s.partial; after a barrier.
DEVICE float block_total(const Shared& s) {
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < THREADS / 32; i++) total += s.partial[i];
  return total;
}

// HEADROOM: the weights of a chunk may exceed the unit by it before the state is rescaled.
constexpr float HEADROOM = 1024.f;

template <int KIND, bool OF_H>
DEVICE void scan(Shared& s, const ScanArguments& a, const Side& side, const Walk& at) {
  constexpr bool BACK = KIND != STATES;
  constexpr int W = OF_H ? K : V, BLOCKS_OF_STATE = W / 64, VALUES = BACK ? 2 : 1;
  State<W> state;
  float unit = 0.f, bound = 0.f;
  long long heads = a.heads, place = (at.sequence * heads + at.head) * (long long)(K * W);
  int count = at.end - at.first, warp = threadIdx.x / 32;
  bool first_of_all = BACK ? at.index + 1 == at.after : at.index == at.before;
  bool last_of_all = BACK ? at.index == at.before : at.index + 1 == at.after;
  if (side.sums != nullptr && !first_of_all) {
    long long from = (long long)at.index * a.group_heads + at.in_group;
    state.add(side.sums + from * K * W, 1.f);
  } else if (side.boundary != nullptr && first_of_all) {
    state.add(side.boundary + place, 1.f);
  }
  s.partial[warp] = warp_max(state.largest());
  __syncthreads();
#pragma unroll
  for (int w = 0; w < THREADS / 32; w++) bound = fmaxf(bound, s.partial[w]);
  unit = bound;
  state.scale(inverse(bound));
  // the chunks of a segment are neighbours, and all but a sequence's last are whole
  long long segment_start = count > 0 ? a.chunk_start[at.first] : 0;
  int last_length = count > 0 ? a.chunk_length[at.end - 1] : 0;
  auto chunk_of = [&](int i) { return BACK ? at.end - 1 - i : at.first + i; };
  auto start_of = [&](int c) { return segment_start + (long long)(c - at.first) * C; };
  auto length_of = [&](int c) { return c == at.end - 1 ? last_length : C; };
  [[maybe_unused]] int key_head = at.head / (a.heads / a.key_heads);
  [[maybe_unused]] int value_head = at.head / (a.heads / a.value_heads);
  auto key_max_of = [&](int c) {
    return KIND == H_BACK ? a.key_maxima[(long long)c * a.group_heads + at.in_group] : 0.f;
  };
  GateLoads<KIND> gates;
  auto copy = [&](int c) {  // starts what a chunk needs
    int length = length_of(c);
    long long start = start_of(c);
    if constexpr (KIND == STATES) {
      Pieces<K>::copy(s.raw[0], a.k, start, a.key_heads, key_head, length);
      if (!OF_H) Pieces<V>::copy(s.raw[1], a.v, start, a.value_heads, value_head, length);
    } else if constexpr (KIND == U_BACK) {
      Pieces<K>::copy(s.raw[0], a.q, start, a.heads, at.head, length);
      Pieces<K>::copy(s.raw[1], a.x, start, a.heads, at.head, length);
      Pieces<V>::copy(s.raw[2], a.d_o, start, a.heads, at.head, length);
    } else {
      Pieces<K>::copy(s.raw[1], a.x, start, a.heads, at.head, length);
      Pieces<K>::copy(s.raw[2 + c % 2], a.y, start, a.group_heads, (int)at.in_group, length);
    }
    copies_commit();
  };
  auto copy_late = [&](int c) {  // what takes the place of an operand
    if constexpr (KIND == H_BACK) {
      Pieces<K>::copy(s.raw[0], a.k, start_of(c), a.key_heads, key_head, length_of(c));
      copies_commit();
    }
  };
  if (count > 0) {
    int c = chunk_of(0);
    copy(c), copy_late(c);
    if (warp == 0) {
      gates.load(a, side.g, start_of(c), length_of(c), at.head);
      gates.store(s.gates[0], a.scale, key_max_of(c));
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < count; i++) {
    int chunk = chunk_of(i);
    long long mh = (long long)chunk * a.group_heads + at.in_group;
    bool more = i + 1 < count;
    float next_key_max = 0.f;
    if (more && warp == 0) {
      int c = chunk_of(i + 1);
      gates.load(a, side.g, start_of(c), length_of(c), at.head);
      next_key_max = key_max_of(c);
    }
    const Gates& gate = s.gates[i % 2];
    float whole = __expf(gate.total), of_start = 0.f, stored_bound = 0.f;
    if constexpr (BACK) stored_bound = side.stored_bounds[mh * BLOCKS_OF_STATE];
    if constexpr (KIND == H_BACK) of_start = .5f * a.start_weight[mh] * stored_bound;
    {
      float partial = 0.f;
      if constexpr (BACK)  // before E takes the place of U
        partial = state.inner_then_add(side.stored + mh * K * W, 0.f) * (unit * stored_bound * whole);
      else if (OF_H && side.norms != nullptr)
        partial = state.square_sum() * unit * unit;
      state.store_half(side.states + mh * K * W, unit * inverse(bound));
      if (threadIdx.x < BLOCKS_OF_STATE) side.bounds[mh * BLOCKS_OF_STATE + threadIdx.x] = bound;
      partial = warp_sum(partial);
      if (threadIdx.x % 32 == 0) s.partial[warp] = partial;
    }
    copies_wait<0>();
    // largest entries of the rows
    float z[KIND == U_BACK ? Pieces<K>::N : 1][8];
#pragma unroll
    for (int n = 0; n < Pieces<K>::N; n++) {
      if constexpr (KIND == U_BACK) {
        float q[8], x[8], alpha = gate.first[Pieces<K>::row(n)], x_scale = gate.second[Pieces<K>::row(n)];
        Pieces<K>::read(q, s.raw[0], n, false);
        Pieces<K>::read(x, s.raw[1], n, true);
#pragma unroll
        for (int e = 0; e < 8; e++) z[n][e] = q[e] + alpha * (x[e] * x_scale - q[e]);
        Pieces<K>::row_max(z[n], s.first_max, n);
      } else if constexpr (KIND == STATES) {
        Pieces<K>::raw_row_max(s.raw[0], s.first_max, n);
      }
    }
    if constexpr (!OF_H) {
#pragma unroll
      for (int n = 0; n < Pieces<V>::N; n++) Pieces<V>::raw_row_max(s.raw[VALUES], s.second_max, n);
    }
    __syncthreads();
    if (threadIdx.x < BLOCKS_OF_STATE) {
      float* to = BACK ? side.wholes : side.norms;
      if (to != nullptr) to[mh * BLOCKS_OF_STATE + threadIdx.x] = threadIdx.x ? 0.f : block_total(s);
    }
    // the largest weight, and what the chunk adds to the bound of the state's entries
    float largest = gate.largest, sum = gate.sum, key_max = 0.f;
    if constexpr (KIND == H_BACK) {
      key_max = key_max_of(chunk);
      largest = fmaxf(largest, fabsf(of_start)), sum += fabsf(of_start);
    } else {
      float first_most = 0.f, second_most = 0.f;
      largest = sum = 0.f;
#pragma unroll
      for (int e = 0; e < 2; e++) {
        int row = 2 * (threadIdx.x % 32) + e;
        float first = s.first_max[row], second = OF_H ? first : s.second_max[row];
        float most = fabsf(gate.weight[row]) * first * second;
        largest = fmaxf(largest, most), sum += most;
        first_most = fmaxf(first_most, first), second_most = fmaxf(second_most, second);
      }
      largest = warp_max(largest), sum = warp_sum(sum);
      if (a.first_maxima != nullptr && !OF_H && warp == 0) {
        first_most = warp_max(first_most), second_most = warp_max(second_most);
        if (threadIdx.x == 0) a.first_maxima[mh] = first_most;
        if (threadIdx.x < V / 64) a.second_maxima[mh * (V / 64) + threadIdx.x] = second_most;
      }
    }
    // the unit decays with the state, which is touched only where float16 weights would leave their range
    float next = unit * whole;
    if (largest > HEADROOM * next || next <= TINY) {
      float old = next;
      next = fmaxf(next, largest);
      state.scale(old * inverse(next));
      next = next > TINY ? next : 0.f;
    }
    float per_unit = inverse(next);
    if constexpr (KIND == H_BACK) state.inner_then_add(side.stored + mh * K * W, -of_start * per_unit);
    unit = next, bound = bound * whole + sum;
    // the tiles
#pragma unroll
    for (int n = 0; n < Pieces<K>::N; n++) {
      int row = Pieces<K>::row(n);
      float most = KIND == H_BACK ? key_max : s.first_max[row];
      if constexpr (KIND == U_BACK) {
        Pieces<K>::write(s.left, n, z[n], inverse(most));
      } else {
        float d[8];
        Pieces<K>::read(d, s.raw[0], n, false);
        if constexpr (KIND == STATES) {
          Pieces<K>::write(s.left, n, d, inverse(most));
          if (OF_H) Pieces<K>::write(s.right, n, d, gate.weight[row] * most * per_unit);
        } else {
          Pieces<K>::write(s.raw[0], n, d, inverse(most));
          Pieces<K>::write(s.left, n, d, -gate.first[row] * most * per_unit);
          Pieces<K>::read(d, s.raw[1], n, true);
          Pieces<K>::write(s.right, n, d, -gate.weight[row] * per_unit);
        }
      }
    }
    if constexpr (!OF_H) {
#pragma unroll
      for (int n = 0; n < Pieces<V>::N; n++) {
        float d[8];
        int row = Pieces<V>::row(n);
        Pieces<V>::read(d, s.raw[VALUES], n, false);
        Pieces<V>::write(s.right, n, d, gate.weight[row] * s.first_max[row] * per_unit);
      }
    }
    if (more) {
      copy(chunk_of(i + 1));  // each thread has read its own pieces
      if (warp == 0) gates.store(s.gates[(i + 1) % 2], a.scale, next_key_max);
    }
    publish_shared();
    __syncthreads();
    mma_begin();
    if constexpr (KIND == H_BACK) {
      state.multiply(s.raw[2 + chunk % 2], s.right);
      state.multiply(s.raw[0], s.left);
    } else {
      state.multiply(s.left, s.right);
    }
    mma_commit();
    mma_wait<0>();
    hold(state.d);
    if (KIND == H_BACK && more) {
      __syncthreads();  // both warpgroups have read the operand
      copy_late(chunk_of(i + 1));
    }
  }
  if (side.last != nullptr && last_of_all) {
    state.store(side.last + place, unit);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) gka_scan(const __grid_constant__ ScanArguments a) {
  extern __shared__ unsigned char raw[];
  Shared& s = *(Shared*)(raw + (-(int)shared_address(raw) & 1023));
  Walk at(a);
  if (blockIdx.y == 0)
    scan<BACKWARDS ? H_BACK : STATES, true>(s, a, a.h, at);
  else
    scan<BACKWARDS ? U_BACK : STATES, false>(s, a, a.u, at);
}
