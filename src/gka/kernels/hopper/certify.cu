// The rank-one part N = nu u u^T <= H16 of every chunk-start state, and how large the rest can be
// (gka/maths/adaptive.py). It depends on the states alone, so solve and adjoint solve share it.

struct State {
  unsigned char h[K * K * 2];
  float top[K], top_h[K], scratch[8];  // u and H16 u; before that, the power steps
};

// Row `row` of a swizzled array of K columns times a vector in shared memory.
DEVICE float row_times(const unsigned char* array, int rows, int row, const float* vector) {
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < K / 8; j++) {
    uint4 piece = *(const uint4*)(array + swizzled(rows, row, 8 * j));
    const u32* words = (const u32*)&piece;
#pragma unroll
    for (int w = 0; w < 4; w++) {
      float2 pair = *(const float2*)(vector + 8 * j + 2 * w);
      sum += low_half(words[w]) * pair.x + high_half(words[w]) * pair.y;
    }
  }
  return sum;
}

// N = nu u u^T <= H16 by Nystroem from two power steps: leaves u and H16 u; returns nu and u^T H16 u.
DEVICE float2 nystroem(State& s, int thread) {
  int row = thread % K;
  bool mine = thread < K;
  auto entry = [&](int r, int c) { return low_half(*(const u16*)(s.h + swizzled(K, r, c))); };
  float diagonal = entry(row, row);
  float best = block_reduce<true>(diagonal, s.scratch);
  int first = -(int)block_reduce<true>(mine && diagonal == best ? -row : -1e6f, s.scratch);
  if (best <= 0.f) {  // no history before this chunk
    if (mine) s.top[row] = 0.f, s.top_h[row] = 0.f;
    __syncthreads();
    return {0.f, 0.f};
  }
  if (mine) s.top[row] = entry(row, first);
  __syncthreads();
  float power = row_times(s.h, K, row, s.top);
  float v = power * rsqrtf(block_reduce<false>(mine ? power * power : 0.f, s.scratch));
  if (mine) s.top_h[row] = v;
  __syncthreads();
  float u = row_times(s.h, K, row, s.top_h);
  float theta = block_reduce<false>(mine ? u * v : 0.f, s.scratch);
  float norm2 = block_reduce<false>(mine ? u * u : 0.f, s.scratch);
  u *= rsqrtf(norm2);
  if (mine) s.top[row] = u;
  __syncthreads();
  float h_u = row_times(s.h, K, row, s.top);
  float energy = block_reduce<false>(mine ? u * h_u : 0.f, s.scratch);
  if (mine) s.top_h[row] = h_u;
  __syncthreads();
  return {theta > 0.f ? norm2 / theta : 0.f, energy};
}

// |(H16 - N)^2|_F.
DEVICE float squared_remainder(State& s, int thread, float nu) {
  float sum = 0.f;
#pragma unroll 1
  for (int block = 0; block < K / C; block++) {
    float square[K / 2];
    mma_begin();
    product_shared<K, K, K>(square, shared_address(s.h) + block * C * 128, shared_address(s.h));
    mma_commit();
    mma_wait<0>();
    hold(square);
#pragma unroll
    for (int b = 0; b < 2; b++) {
      int row = block * C + thread / 32 * 16 + thread % 32 / 4 + 8 * b;
      float u = s.top[row], h_u = s.top_h[row];
#pragma unroll
      for (int j = 0; j < K / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          int column = 8 * j + 2 * (thread % 4) + e;
          float v = s.top[column];
          float rest = square[4 * j + 2 * b + e] - nu * (h_u * v + u * s.top_h[column]) + nu * nu * u * v;
          sum += rest * rest;
        }
    }
  }
  return sqrtf(block_reduce<false>(sum, s.scratch));
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) gka_certify(const __grid_constant__ Arguments a) {
  extern __shared__ unsigned char raw[];
  State& s = *(State*)(raw + (-(int)shared_address(raw) & 1023));
  long long state = blockIdx.x;
  int thread = threadIdx.x;
  copy_state<K, K>(shared_address(s.h), a.h_states + state * K * K, thread);
  copies_wait<0>();
  publish_shared();
  __syncthreads();
  float2 top = nystroem(s, thread);
  float remainder = sqrtf(squared_remainder(s, thread, top.x));
  if (thread < K) a.top[state * K + thread] = s.top[thread];
  if (thread == 0) {
    float* bounds = a.bounds + state * 3;
    bounds[0] = top.x, bounds[1] = top.y, bounds[2] = remainder;
  }
}
