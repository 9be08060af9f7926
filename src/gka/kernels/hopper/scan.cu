// Scans over chunks (gka/maths/moments.py): the states H and U at chunk starts, or with BACKWARDS their gradients E
// at chunk ends. blockIdx.y = 0 computes H, 1 computes U.
//
// A block walks along one segment of a sequence for one head. It holds a whole state in its accumulators, 64 rows
// per warpgroup, in units of `unit`; every chunk adds left^T right (products.cuh). A sequence in several segments
// takes three launches: sums.cu (each segment from zero), combine.cu (the state before each), and this scan.

#include "products.cuh"

// Tiles in shared memory. Backwards there is one stage: the stored states take the second one's place.
constexpr int TILES = BACKWARDS ? 3 : 2, STAGES = BACKWARDS ? 1 : 2, WIDEST = K > V ? K : V, TILE = C * WIDEST * 2;

struct Shared {
  unsigned char tiles[STAGES][TILES][TILE];
  unsigned char state[K * WIDEST * 2];  // backwards S_[c] as loaded; then the state to be stored
  Gates gates[3];
  Numbers numbers[2];
  u32 maxima[2][8];     // per warp: largest magnitudes in its share of two tiles, as bits
  float weighted[2][8];  // STATES, per warp: largest product of a weight and an entry of k (H: its square)
  float partial[2][8];  // per warp: part of <S_[c], E> or of a sum of squares; at first the largest entry
};

DEVICE float block_sum(const float (&of_warps)[8]) {
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < THREADS / 32; w++) sum += of_warps[w];
  return sum;
}

template <int KIND, bool OF_H>
DEVICE void scan(Shared& s, const ScanArguments& a, const Side& side, const Walk& at) {
  constexpr bool BACK = KIND != STATES;
  constexpr int W = OF_H ? K : V, COLUMN_BLOCKS = W / 64;
  int count = at.end - at.first, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  bool makes_weights = warp == 0;
  // a segment's chunks are consecutive, and only a sequence's last may be short
  int origin = count > 0 ? (int)a.chunk_start[at.first] - at.first * C : 0;
  int last_length = count > 0 ? a.chunk_length[at.end - 1] : 0;
  auto chunk_of = [&](int i) { return BACK ? at.end - 1 - again(i) : at.first + again(i); };
  auto length_of = [&](int i) { return chunk_of(i) == at.end - 1 ? last_length : C; };
  auto token_of = [&](int i) { return origin + chunk_of(i) * C; };
  auto index_of = [&](int i) { return chunk_of(i) * a.group_heads + (int)at.in_group; };
  auto tiles_of = [&](int i) { return shared_address(s.tiles[i % STAGES]); };
  State<W> state;
  Weights<KIND, true> weights;
  auto copy_numbers = [&](int i) {
    if (makes_weights && i < count)
      weights.copy(s.numbers[i % 2], a, side, at, token_of(i), length_of(i), index_of(i));
  };
  auto copy = [&](int i) {  // the chunk's tiles, and the numbers of the next chunk
    if (i < count) copy_tiles<KIND, OF_H, TILE>(tiles_of(i), a, at, token_of(i), length_of(i));
    copy_numbers(i + 1), copies_commit();
  };
  auto request = [&](int i) {  // S_[c]
    if constexpr (BACK) {
      if (i < count) state.request(shared_address(s.state), side.stored + (long long)index_of(i) * (K * W));
      copies_commit();
    }
  };
  auto make_weights = [&](int i) {  // no barrier: each lane reads what it copied itself
    if (makes_weights && i < count) weights.make(s.gates[i % 3], s.numbers[i % 2], a, side.g);
  };
  copy_numbers(0), copies_commit();
  request(0), copy(0);
  // the state that the segment starts from
  auto place_of = [&](const Walk& at) { return ((long long)at.sequence * a.heads + at.head) * (K * W); };
  bool first_of_all = BACK ? at.index + 1 == at.after : at.index == at.before;
  const float* given = first_of_all ? side.boundary : side.sums;
  if (given != nullptr)
    state.add(given + (first_of_all ? place_of(at) : ((long long)at.index * a.group_heads + at.in_group) * K * W), 1.f);
  float most = warp_most(state.largest()), bound = 0.f;
  if (lane == 0) s.partial[1][warp] = most;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < THREADS / 32; w++) bound = fmaxf(bound, s.partial[1][w]);
  float unit = bound * 0x1p-20f;  // small, so that the chunks' weights, in this unit, are not small in float16
  state.scale(inverse(unit));
  weights.unit = unit;
  copies_wait<BACK ? 2 : 1>();
  make_weights(0);
  __syncthreads();
  // stores a chunk's numbers and updates the bound of the state; after a barrier
  auto conclude = [&](int i) {
    const Gates& gate = s.gates[i % 3];
    int mh = index_of(i);
    float first = 0.f, second = 0.f;
    if constexpr (KIND != H_BACK) {
      u32 both = 0;
#pragma unroll
      for (int w = 0; w < THREADS / 32; w++) both = max_pair(both, s.maxima[i % 2][w]);
      float2 pair = widen(both);
      first = pair.x, second = pair.y;
    }
    float added = gate.sum[1];
    if constexpr (KIND == STATES) {  // the second bound is smaller where large keys have small weights
      float weighted = 0.f;
#pragma unroll
      for (int w = 0; w < THREADS / 32; w++) weighted = fmaxf(weighted, s.weighted[i % 2][w]);
      added = fminf(gate.sum[0] * first * second, C * weighted * (OF_H ? 1.f : second));
    }
    if constexpr (KIND == U_BACK) added = (gate.sum[0] * first + gate.sum[1]) * second;
    bound = bound * gate.whole + added;
    float* to = BACK ? side.wholes : side.norms;
    if (to != nullptr && threadIdx.x < COLUMN_BLOCKS)
      to[mh * COLUMN_BLOCKS + threadIdx.x] = threadIdx.x ? 0.f : block_sum(s.partial[i % 2]);
    __syncwarp();
    if constexpr (!OF_H) {
      if (KIND == U_BACK) first = gate.of_q * first + gate.of_x;
      if (a.first_maxima != nullptr && threadIdx.x < COLUMN_BLOCKS) {
        a.second_maxima[mh * COLUMN_BLOCKS + threadIdx.x] = second;
        if (threadIdx.x == 0) a.first_maxima[mh] = first;
      }
      __syncwarp();
    }
  };
#pragma unroll 1
  for (int i = 0; i < count; i++) {
    if constexpr (!BACK) {
      copies_wait<0>();
      publish_shared();
      __syncthreads();  // the tiles have arrived, and those of the chunk before have been read
      copy(i + 1);
      if (i > 0) conclude(i - 1);
    }
    const Gates& gate = s.gates[i % 3];
    int mh = index_of(i);
    // store the state
    float factor = unit * inverse(bound), sum, rescale = gate.rescale;
    if constexpr (BACK) {
      copies_wait<1>();
      __syncwarp();  // S_[c] has arrived
      sum = state.template put<true, OF_H>(shared_address(s.state), factor, rescale, gate.start);
      sum *= bound * gate.stored_bound * gate.whole;
    } else {
      sum = state.template put<false, false>(shared_address(s.state), factor) * (bound * bound);
    }
    __syncwarp();
    state.send(s.state, side.states + (long long)mh * (K * W));
    if constexpr (BACK || OF_H) sum = warp_sum(sum);
    if ((BACK || OF_H) && lane == 0) s.partial[i % 2][warp] = sum;
    if (threadIdx.x < COLUMN_BLOCKS) side.bounds[mh * COLUMN_BLOCKS + threadIdx.x] = bound;
    __syncwarp();
    if constexpr (BACK) {
      request(i + 1);
      copies_wait<1>();
      publish_shared();
      __syncthreads();  // the tiles have arrived
    }
    if (KIND != H_BACK && rescale != 1.f) state.scale(rescale);
    unit = gate.unit;
    add_chunk<KIND, OF_H, TILE>(state.d, tiles_of(i), gate);
    if constexpr (KIND != H_BACK) {
      const auto& tiles = s.tiles[i % STAGES];
      u32 first, second;
      if constexpr (KIND == STATES) {
        float weighted;
        first = largest_inputs<K, OF_H>(tiles[0], gate.written, weighted);
        weighted = warp_most(weighted);
        if (lane == 0) s.weighted[i % 2][warp] = weighted;
        __syncwarp();
      } else {
        first = largest_inputs<K>(tiles[0]);
      }
      if constexpr (!OF_H) second = largest_inputs<V>(tiles[BACK ? 2 : 1]);
      first = warp_most(max(first & 0xffff, first >> 16));
      if constexpr (OF_H) second = first;
      if constexpr (!OF_H) second = warp_most(max(second & 0xffff, second >> 16));
      if (lane == 0) s.maxima[i % 2][warp] = first | second << 16;
      __syncwarp();
    }
    make_weights(i + 1);
    mma_wait<0>();
    hold(state.d);
    if constexpr (BACK) {
      __syncthreads();  // the tiles have been read
      copy(i + 1);
      conclude(i);
    }
  }
  if constexpr (!BACK) {
    __syncthreads();
    if (count > 0) conclude(count - 1);
  }
  if (side.last == nullptr) return;
  Walk same(a, again((int)blockIdx.x));  // computed again: frees registers during the scan
  bool last_of_all = BACK ? same.index == same.before : same.index + 1 == same.after;
  if (last_of_all) state.store(side.last + place_of(same), unit);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) gka_scan(const __grid_constant__ ScanArguments a) {
  extern __shared__ unsigned char raw[];
  Shared& s = *(Shared*)(raw + (-(int)shared_address(raw) & 1023));
  Walk at(a, blockIdx.x);
  if (blockIdx.y == 0)
    scan<BACKWARDS ? H_BACK : STATES, true>(s, a, a.h, at);
  else
    scan<BACKWARDS ? U_BACK : STATES, false>(s, a, a.u, at);
}
