// Towards the preconditioner of every chunk (gka/maths/adaptive.py): the unit vector v of two power steps on
// the chunk-start state, H16 v, and the trace of H16. They depend on the states alone.

struct State {
  unsigned char h[K * K * 2];
  float vector[K], scratch[8];
};

// Row `row` of H16 times s.vector.
DEVICE float row_times(const State& s, int row) {
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < K / 8; j++) {
    uint4 piece = *(const uint4*)(s.h + swizzled(K, row, 8 * j));
#pragma unroll
    for (int w = 0; w < 4; w++) {
      u32 halves = ((const u32*)&piece)[w];
      float2 pair = *(const float2*)(s.vector + 8 * j + 2 * w);
      sum += low_half(halves) * pair.x + high_half(halves) * pair.y;
    }
  }
  return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, 6) gka_certify(const __grid_constant__ Arguments a) {
  extern __shared__ unsigned char raw[];
  State& s = *(State*)(raw + (-(int)shared_address(raw) & 1023));
  long long state = blockIdx.x;
  int thread = threadIdx.x, row = thread % K;
  bool mine = thread < K;
  copy_state<K, K>(shared_address(s.h), a.h_states + state * K * K, thread);
  copies_wait<0>();
  __syncthreads();
  auto entry = [&](int r, int c) { return low_half(*(const u16*)(s.h + swizzled(K, r, c))); };
  float diagonal = entry(row, row);
  float trace = block_reduce<false>(mine ? diagonal : 0.f, s.scratch);
  float best = block_reduce<true>(diagonal, s.scratch);
  int first = -(int)block_reduce<true>(diagonal == best ? -row : -1e6f, s.scratch);
  float v = entry(row, first);  // H16 e_first: half of the first step
#pragma unroll 1
  for (int i = 0; i < 2; i++) {
    float norm2 = block_reduce<false>(mine ? v * v : 0.f, s.scratch);
    v = norm2 > 0.f ? v * rsqrtf(norm2) : 0.f;
    v = low_half(pack(v, v));  // the keys meet it in float16
    if (mine) s.vector[row] = v;
    __syncthreads();
    if (i == 1 && mine) a.top[(state * 2) * K + row] = v;
    v = row_times(s, row);
  }
  if (mine) a.top[(state * 2 + 1) * K + row] = v;
  if (thread == 0) a.trace[state] = trace;
}
