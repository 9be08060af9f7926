// The sum that each segment of a sequence adds to H and U, or with BACKWARDS to their gradients E: a scan (scan.cu)
// from zero that stores only its end. Blocks with blockIdx.y = 0 do H, those with 1 do U.

#include "products.cuh"

constexpr int TILES = BACKWARDS ? 3 : 2, STAGES = BACKWARDS ? 2 : 3, TILE = C * (K > V ? K : V) * 2;

struct Shared {
  unsigned char tiles[STAGES][TILES][TILE];
  Gates gates[2];
  Numbers numbers[STAGES];
};

template <int KIND, bool OF_H>
DEVICE void sum(Shared& s, const ScanArguments& a, const Side& side, const Walk& at) {
  constexpr bool BACK = KIND != STATES;
  constexpr int W = OF_H ? K : V;
  if (BACK ? at.index == at.before : at.index + 1 == at.after) return;  // no segment follows
  State<W> state;
  int count = at.end - at.first;
  bool makes_weights = threadIdx.x < 32;
  // a segment's chunks are consecutive, and only a sequence's last may be short
  int start = (int)a.chunk_start[at.first];
  int last_length = a.chunk_length[at.end - 1];
  auto chunk_of = [&](int i) { return BACK ? at.end - 1 - i : at.first + i; };
  auto length_of = [&](int i) { return chunk_of(i) == at.end - 1 ? last_length : C; };
  auto token_of = [&](int i) { return start + (chunk_of(i) - at.first) * C; };
  auto index_of = [&](int i) { return (long long)chunk_of(i) * a.group_heads + at.in_group; };
  auto tiles_of = [&](int i) { return shared_address(s.tiles[i % STAGES]); };
  auto copy = [&](int i) {
    if (i < count) copy_tiles<KIND, OF_H, TILE>(tiles_of(i), a, at, token_of(i), length_of(i));
  };
  Weights<KIND, false> weights;
  auto copy_numbers = [&](int i) {
    if (makes_weights && i < count)
      weights.copy(s.numbers[i % STAGES], a, side, at, token_of(i), length_of(i), index_of(i));
  };
  auto make_weights = [&](int i) {  // no barrier: each lane reads what it copied itself
    if (makes_weights && i < count) weights.make(s.gates[i % 2], s.numbers[i % STAGES], a, side.g);
  };
  copy_numbers(0), copies_commit();
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) copy(i), copy_numbers(i + 1), copies_commit();
  copies_wait<STAGES - 1>();
  make_weights(0);
#pragma unroll 1
  for (int i = 0; i < count; i++) {
    copies_wait<STAGES - 2>();
    publish_shared();
    __syncthreads();  // the tiles have arrived, and those of the chunk before have been read
    auto ask = [&] { copy(i + STAGES - 1), copy_numbers(i + STAGES), copies_commit(); };
    if constexpr (BACK) ask();
    const Gates& gate = s.gates[i % 2];
    float factor = gate.rescale;
    if (factor != 1.f) state.scale(factor);
    add_chunk<KIND, OF_H, TILE>(state.d, tiles_of(i), gate);
    if constexpr (!BACK) ask();  // two chunks ahead, after the products are issued
    make_weights(i + 1);
    mma_wait<0>();
    hold(state.d);
  }
  const Gates& gate = s.gates[(count - 1) % 2];
  long long to = (long long)at.index * a.group_heads + at.in_group;
  state.scale(gate.unit);
  if constexpr (KIND == H_BACK) {
    long long mh = (long long)at.first * a.group_heads + at.in_group;
    state.add_stored(side.stored + mh * K * W, gate.start * side.stored_bounds[mh * (W / 64)]);
  }
  state.store(side.sums + to * K * W, 1.f);
  if (threadIdx.x == 0) side.sum_decays[to] = weights.decays;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) gka_sums(const __grid_constant__ ScanArguments a) {
  extern __shared__ unsigned char raw[];
  Shared& s = *(Shared*)(raw + (-(int)shared_address(raw) & 1023));
  Walk at(a, blockIdx.x);
  if (blockIdx.y == 0)
    sum<BACKWARDS ? H_BACK : STATES, true>(s, a, a.h, at);
  else
    sum<BACKWARDS ? U_BACK : STATES, false>(s, a, a.u, at);
}
