// Token by token, states in place (gka/maths/recurrent.py): decay, update, ridge, solve, mix, readout. One block of
// K threads per sequence and head.
//
// Thread t holds rows 4 (t / 4) + i of H, i < 4, in registers, and of these the columns 16 m + 4 (t % 4) + e, e < 4.
// A product with H then reads 16 bytes of the vector for 16 multiplications, and two exchanges within a quad
// leave thread t with entry t: it owns entry t of every vector. U stays in shared memory during the solve.
// FORMAT of q, k, v, o: 0 float32, 1 bfloat16, 2 float16. U16: U is stored as bfloat16.

#include "numbers.cuh"

struct View {  // [B,T,heads,...], strides in elements; data is null if the argument is None
  const void* data;
  long long batch, token, head;
};

struct StepArguments {
  View q, k, v, g, gk, alpha, beta;
  float* h;                       // [P,H,K,K]; null if H is not formed
  void* u;                        // [P,H,K,V]
  const void *indices, *bounds;   // each sequence's place in the pool [B]; bounds of packed sequences [B+1], int64
  void* o;                        // [B,T,H,V]
  float* x;                       // [B,T,H,K] or null
  long long h_stride, u_stride;   // from state to state of the pool
  float scale, ridge_ratio, empty_below, stop;  // stop: of conjugate gradients, a target^2
  int num_iter, length, heads, key_heads, value_heads, pool, wide_indices, commit;
};

constexpr int C = K / 4, WARPS = K / 32, GROUPS = V / 4, SLICES = K / GROUPS, ROWS = K / SLICES;

struct Shared {
  float u[K * V];
  float vector[2][K], key[K], z[K], other[K];
  float value[V], partial[SLICES * V], alpha, gamma_u;
  float* h_at;
  char* u_at;
  float sums[5][WARPS][5];
};

DEVICE float load_input(const void* p, long long i) {
#if FORMAT == 0
  return ((const float*)p)[i];
#elif FORMAT == 1
  return __uint_as_float((u32)((const u16*)p)[i] << 16);
#else
  return low_half(((const u16*)p)[i]);
#endif
}
DEVICE void store_output(void* p, long long i, float x) {
#if FORMAT == 0
  ((float*)p)[i] = x;
#elif FORMAT == 1
  ((u16*)p)[i] = (u16)pack_bfloat16(x, 0.f);
#else
  ((u16*)p)[i] = (u16)pack(x, 0.f);
#endif
}

// Sums of N numbers over the block. `slot`: an entry of Shared::sums, another one for each call within a token.
template <int N>
DEVICE void block_sums(float (&x)[N], Shared& s, int slot, int thread) {
#pragma unroll
  for (int n = 0; n < N; n++) {
    x[n] = warp_sum(x[n]);
    if (thread % 32 == 0) s.sums[slot][thread / 32][n] = x[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; n++) {
    x[n] = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) x[n] += s.sums[slot][w][n];
  }
}

// The block's largest x >= 0; such floats compare as their bits do. `slot` as in `block_sums`.
DEVICE float block_largest(float x, Shared& s, int slot, int thread) {
  float best = warp_max(x);
  if (thread % 32 == 0) s.sums[slot][thread / 32][1] = best;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS; w++) best = fmaxf(best, s.sums[slot][w][1]);
  return best;
}

// Entry t of H times the vector.
DEVICE float product(const float (&h)[4][C], const float* vector, int thread) {
  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  asm volatile("" : "+r"(thread));  // forms addresses here: kept through the solve, they would spill
#pragma unroll
  for (int m = 0; m < C / 4; m++) {
    float4 d = *(const float4*)(vector + 16 * m + 4 * (thread % 4));
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] += h[i][4 * m] * d.x;
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] += h[i][4 * m + 1] * d.y;
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] += h[i][4 * m + 2] * d.z;
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] += h[i][4 * m + 3] * d.w;
  }
  bool high = thread & 2, odd = thread & 1;
  float first = high ? sum[2] : sum[0], second = high ? sum[3] : sum[1];
  first += __shfl_xor_sync(~0u, high ? sum[0] : sum[2], 2);
  second += __shfl_xor_sync(~0u, high ? sum[1] : sum[3], 2);
  float mine = odd ? second : first;
  return mine + __shfl_xor_sync(~0u, odd ? first : second, 1);
}

DEVICE void load_h(float (&h)[4][C], const float* from, int thread) {
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int m = 0; m < C / 4; m++) {
      float4 x = *(const float4*)(from + (thread / 4 * 4 + i) * K + 16 * m + 4 * (thread % 4));
      h[i][4 * m] = x.x, h[i][4 * m + 1] = x.y, h[i][4 * m + 2] = x.z, h[i][4 * m + 3] = x.w;
    }
}
DEVICE void store_h(float* to, const float (&h)[4][C], int thread) {
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int m = 0; m < C / 4; m++)
      *(float4*)(to + (thread / 4 * 4 + i) * K + 16 * m + 4 * (thread % 4)) =
          float4{h[i][4 * m], h[i][4 * m + 1], h[i][4 * m + 2], h[i][4 * m + 3]};
}

// H <- gamma H + k k^T, k in s.key. Returns this thread's part of |H|_F^2.
DEVICE float update_h(float (&h)[4][C], float gamma, const Shared& s, int thread) {
  float4 four = *(const float4*)(s.key + thread / 4 * 4);
  float row[4] = {four.x, four.y, four.z, four.w}, squares[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int m = 0; m < C / 4; m++) {
    float4 k = *(const float4*)(s.key + 16 * m + 4 * (thread % 4));
    float column[4] = {k.x, k.y, k.z, k.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float& x = h[i][4 * m + e];
        x = gamma * x + row[i] * column[e];
        squares[i] += x * x;
      }
  }
  return (squares[0] + squares[1]) + (squares[2] + squares[3]);
}

// Parameters of the solve: Chebyshev iteration on P^-1 A with P = lambda (1 - tau w w^T)^-1.
struct Plan {
  int steps;
  float step, rho2;         // 2/(L + mu) and ((L - mu)/(L + mu))^2
  float taken, along;       // tau w_t, and w . r
  bool deflated;
};

#if ADAPTIVE
// Fewer steps with the same proven error bound: gka/maths/solvers/adaptive.py for one token.
constexpr float SLACK_SUM = 4.f * K * FLOAT32_EPS, SLACK_OPERATOR = FLOAT32_EPS;

DEVICE float arcosh_1p(float x) { return log1pf(x + sqrtf(x * (x + 2.f))); }

// One where the indices are equal. Sums weighted by it select registers by a runtime index; indexing would move
// the array to memory.
DEVICE float picks(int i, int wanted) { return i == wanted ? 1.f : 0.f; }

// H_tt, passed from the quad's thread that holds it to thread t.
DEVICE float diagonal(const float (&h)[4][C], int thread) {
  int group = thread / 4;
  float mine[4] = {0.f, 0.f, 0.f, 0.f}, x = 0.f;
#pragma unroll
  for (int m = 0; m < C / 4; m++) {
    float here = picks(m, group / 4);
#pragma unroll
    for (int i = 0; i < 4; i++) mine[i] += here * h[i][4 * m + i];
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
    x += picks(i, thread % 4) * __shfl_sync(~0u, mine[i], (thread & 28) + group % 4);
  return x;
}

// Copies row `row` of H to shared memory, by the quad that holds it.
DEVICE void publish_row(const float (&h)[4][C], int row, float* to, int thread) {
  if (thread / 4 != row / 4) return;
  float here[4] = {picks(0, row % 4), picks(1, row % 4), picks(2, row % 4), picks(3, row % 4)};
#pragma unroll
  for (int m = 0; m < C / 4; m++) {
    float x[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      int n = 4 * m + e;
      x[e] = here[0] * h[0][n] + here[1] * h[1][n] + here[2] * h[2][n] + here[3] * h[3][n];
    }
    *(float4*)(to + 16 * m + 4 * (thread % 4)) = float4{x[0], x[1], x[2], x[3]};
  }
}

// The first index of the block's largest x >= 0.
DEVICE int first_largest(float x, Shared& s, int slot, int thread) {
  float best = block_largest(x, s, slot, thread);
  u32 holders = __ballot_sync(~0u, x == best);
  if (thread % 32 == 0) s.sums[slot][thread / 32][2] = holders ? (float)(thread + __ffs(holders) - 1) : 1e9f;
  __syncthreads();
  float first = s.sums[slot][0][2];
#pragma unroll
  for (int w = 1; w < WARPS; w++) first = fminf(first, s.sums[slot][w][2]);
  return (int)first;
}

// Finds w by a column of H and two products, and bounds the remainder by a third. Leaves lambda w + H w in s.other.
DEVICE void tighten(Plan& plan, const float (&h)[4][C], float q, float fro, float lambda, const StepArguments& a,
                    Shared& s, int thread) {
  float inverse = __fdividef(1.f, fro), entry = diagonal(h, thread);
  publish_row(h, first_largest(entry, s, 1, thread), s.vector[0], thread);
  __syncthreads();
  float v = product(h, s.vector[0], thread) * (inverse * inverse);
  s.vector[1][thread] = v;
  __syncthreads();
  float u = product(h, s.vector[1], thread) * inverse;  // |v| H v / F; the lengths follow from the sums
  s.vector[0][thread] = u;
  __syncthreads();
  float h_u = product(h, s.vector[0], thread) * inverse;
  float sums[5] = {v * v, u * v, u * u, u * h_u, u * q};
  block_sums(sums, s, 2, thread);
  float traces[1] = {entry * inverse};
  block_sums(traces, s, 3, thread);
  float theta = __fdividef(fmaxf(sums[1], 0.f), sums[0]) * (1.f + SLACK_SUM + SLACK_OPERATOR) + THETA_FLOOR;
  float strength = __fdividef(__fdividef(sums[2], sums[0]), theta), rayleigh = __fdividef(sums[3], sums[2]);
  float mean = (traces[0] - strength) * (1.f / K);
  float square = 1.f - 2.f * strength * rayleigh + strength * strength;
  float spread = (1.f - 1.f / K) * fmaxf(square - K * mean * mean, 0.f) + SLACK_SUM;
  float phi = fminf(mean + sqrtf(spread) + SLACK_SUM + SLACK_OPERATOR, 1.f);
  float gap = __fdividef(2.f * a.ridge_ratio, phi), rho = __fdividef(1.f, 1.f + gap);
  float ratio = __fdividef(arcosh_1p(2.f * a.ridge_ratio), arcosh_1p(gap));
  int steps = max((int)ceilf((a.num_iter + 1) * ratio) - 1, 0);
  // runs plain for a length of zero or beyond float32, which only an empty history has
  if (WORTHWHILE_OF * steps > WORTHWHILE * a.num_iter || !(strength >= 0.f) || !(sums[2] > 0.f)) return;
  float length = rsqrtf(sums[2]), w = u * length;
  plan = Plan{steps, __fdividef(2.f, (phi + 2.f * a.ridge_ratio) * fro), rho * rho,
              __fdividef(strength, a.ridge_ratio + strength) * w, sums[4] * length, true};
  s.other[thread] = lambda * w + h_u * fro * length;
}
#endif

#if CG
// x_t of (H + lambda) x = q by conjugate gradients, until |r|^2 <= stop x.(q + r) for H / F (gka/maths/solvers/cg.py).
DEVICE float solve_state(const float (&h)[4][C], float q, float fro, const StepArguments& a, Shared& s, int thread) {
  float largest = block_largest(fabsf(q), s, 4, thread);  // scaled by it, squares neither overflow nor vanish
  largest = largest > 0.f ? largest : 1.f;
  float inverse = __fdividef(1.f, fro), r = q / largest, d = r, x = 0.f, energy = 0.f, size[1] = {r * r};
  block_sums(size, s, 1, thread);
  bool done = size[0] == 0.f;  // not for NaN, which one step spreads
#pragma unroll 1
  for (int i = 0; i < a.num_iter && !done; i++) {
    s.vector[0][thread] = d;
    __syncthreads();
    float a_d = product(h, s.vector[0], thread) * inverse + a.ridge_ratio * d, d_a_d[1] = {d * a_d};
    block_sums(d_a_d, s, 2, thread);
    float length = __fdividef(size[0], d_a_d[0]), before = size[0];
    energy += length * before;
    x += length * d, r -= length * a_d;
    size[0] = r * r;
    block_sums(size, s, 3, thread);
    done = !(size[0] > a.stop * energy) || size[0] > LARGEST_SIZE;
    d = r + __fdividef(size[0], before) * d;
  }
  return x * (inverse * largest);
}
#else
// x_t of (H + lambda) x = q. w . r is updated by (A w) . d, which needs no barrier of its own.
DEVICE float solve(Plan& plan, const float (&h)[4][C], float q, float lambda, Shared& s, int thread) {
  float r = q, d = plan.step * (r - plan.taken * plan.along), x = d, omega = 2.f;
  float4 a_w = {0.f, 0.f, 0.f, 0.f};
  s.vector[0][thread] = d;
  __syncthreads();
  if (plan.deflated && thread % 32 < C) a_w = *(const float4*)(s.other + 4 * (thread % 32));
#pragma unroll 1
  for (int i = 0; i < plan.steps; i++) {
    const float* now = s.vector[i % 2];
    if (plan.deflated) {
      float4 four = *(const float4*)(now + 4 * (thread % 32 % C));
      plan.along -= warp_sum(a_w.x * four.x + a_w.y * four.y + a_w.z * four.z + a_w.w * four.w);
    }
    omega = __fdividef(4.f, 4.f - plan.rho2 * omega);
    float gain = omega * plan.step, given = (omega - 1.f) * d - gain * (plan.taken * plan.along);
    r -= lambda * d;
    r -= product(h, now, thread);
    d = gain * r + given;
    s.vector[(i + 1) % 2][thread] = d;
    x += d;
    __syncthreads();
  }
  return x;
}

// x_t for a non-empty history.
DEVICE float solve_state(const float (&h)[4][C], float q, float fro, const StepArguments& a, Shared& s, int thread) {
  float lambda = a.ridge_ratio * fro, rho = __fdividef(1.f, 1.f + 2.f * a.ridge_ratio);
  Plan plan{a.num_iter, __fdividef(2.f * rho, fro), rho * rho, 0.f, 0.f, false};
#if ADAPTIVE
  tighten(plan, h, q, fro, lambda, a, s, thread);
#endif
  return solve(plan, h, q, lambda, s, thread);
}
#endif

// Starts copying this head's U to shared memory, in its stored dtype.
DEVICE void fetch_u(Shared& s, const char* from, int bytes, int thread) {
  u32 to = shared_address(s.u);
  for (int i = 16 * thread; i < bytes; i += 16 * K) copy_async(to + i, from + i);
  copies_commit();
}

// Loads this head's U to shared memory, widened to float32.
DEVICE void widen_u(Shared& s, const u32* from, int thread) {
#pragma unroll 8
  for (int i = thread; i < K * V / 2; i += K) {
    u32 pair = from[i];
    *(float2*)(s.u + 2 * i) = float2{__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  }
}

DEVICE float4 widen_four(uint2 x) {
  return float4{__uint_as_float(x.x << 16), __uint_as_float(x.x & 0xffff0000u), __uint_as_float(x.y << 16),
                __uint_as_float(x.y & 0xffff0000u)};
}

// U <- gamma U + k v^T; returns this thread's share of U^T z. U is read from shared memory (PACKED: bfloat16) and
// written to global memory in its stored dtype if `to` is not null, and back to shared memory if `keep`.
template <bool PACKED>
DEVICE float4 update_u(Shared& s, float gamma, char* to, bool keep, int thread) {
  int group = thread % GROUPS, first = thread / GROUPS * ROWS;
  float4 v = *(const float4*)(s.value + 4 * group), sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 2
  for (int j = first; j < first + ROWS; j += 4) {
    float4 u[4], keys = *(const float4*)(s.key + j), zs = *(const float4*)(s.z + j);
    float k[4] = {keys.x, keys.y, keys.z, keys.w}, z[4] = {zs.x, zs.y, zs.z, zs.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int at = (j + i) * V + 4 * group;
      u[i] = PACKED ? widen_four(*(const uint2*)((const u16*)s.u + at)) : *(const float4*)(s.u + at);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u[i].x = gamma * u[i].x + k[i] * v.x, u[i].y = gamma * u[i].y + k[i] * v.y;
      u[i].z = gamma * u[i].z + k[i] * v.z, u[i].w = gamma * u[i].w + k[i] * v.w;
      sum.x += z[i] * u[i].x, sum.y += z[i] * u[i].y, sum.z += z[i] * u[i].z, sum.w += z[i] * u[i].w;
    }
    if (to) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int at = (j + i) * V + 4 * group;
#if U16
        *(uint2*)((u16*)to + at) = uint2{pack_bfloat16(u[i].x, u[i].y), pack_bfloat16(u[i].z, u[i].w)};
#else
        *(float4*)((float*)to + at) = u[i];
#endif
      }
    } else if (keep && !PACKED) {
#pragma unroll
      for (int i = 0; i < 4; i++) *(float4*)(s.u + (j + i) * V + 4 * group) = u[i];
    }
  }
  return sum;
}

// This thread's entries of a token and head, with the write gate applied.
struct Token {
  float q, k, v[(V + K - 1) / K], alpha, gamma_h, gamma_u;
};

DEVICE Token load_token(const StepArguments& a, int batch, int token, int head, int thread) {
  auto at = [&](const View& v, int h) { return batch * v.batch + token * v.token + h * v.head; };
  auto gate = [&](const View& v, float otherwise) {
    return v.data ? ((const float*)v.data)[at(v, head)] : otherwise;
  };
  Token x;
  float beta = gate(a.beta, 1.f);
  x.q = load_input(a.q.data, at(a.q, head) + thread);
  x.k = beta * load_input(a.k.data, at(a.k, head / (a.heads / a.key_heads)) + thread);
#pragma unroll
  for (int i = 0; i < (V + K - 1) / K; i++) {
    int column = thread + i * K;
    x.v[i] = column < V ? beta * load_input(a.v.data, at(a.v, head / (a.heads / a.value_heads)) + column) : 0.f;
  }
  x.alpha = gate(a.alpha, 1.f);
  x.gamma_h = power_of_two(LOG2_E * gate(a.gk, 0.f)), x.gamma_u = power_of_two(LOG2_E * gate(a.g, 0.f));
  return x;
}

extern "C" __global__ void __launch_bounds__(K, BLOCKS) gka_step(const __grid_constant__ StepArguments a) {
  extern __shared__ __align__(16) unsigned char raw[];
  Shared& s = *(Shared*)raw;
  int thread = threadIdx.x, head = blockIdx.x % a.heads, sequence = blockIdx.x / a.heads;
  int begin = 0, count = a.length;
  long long place = sequence;
  if (a.bounds) {
    const long long* bounds = (const long long*)a.bounds;
    begin = (int)bounds[sequence], count = (int)bounds[sequence + 1] - begin;
  }
  if (a.indices)
    place = a.wide_indices ? ((const long long*)a.indices)[sequence] : ((const int*)a.indices)[sequence];
  int batch = a.bounds ? 0 : sequence;
  auto row = [&](int t) { return ((long long)batch * a.length + begin + t) * a.heads + head; };  // of o and x
  if (count <= 0) return;
  if (place < 0 || place >= a.pool) {  // no place in the pool: zeros
    for (int t = 0; t < count; t++) {
      for (int i = thread; i < V; i += K) store_output(a.o, row(t) * V + i, 0.f);
      if (a.x) a.x[row(t) * K + thread] = 0.f;
    }
    return;
  }
  Token now = load_token(a, batch, begin, head, thread);
  // what is used after the solve stays in shared memory: H fills the registers
  float* h_at = a.h ? a.h + place * a.h_stride + (long long)head * K * K : nullptr;
  char* u_at = (char*)a.u + (place * a.u_stride + (long long)head * K * V) * (U16 ? 2 : 4);
  if (thread == 0) s.h_at = h_at, s.u_at = u_at;
  float h[4][C];
  if (a.h) load_h(h, h_at, thread);
  const bool packed = U16 && count == 1;
  if (U16 && !packed)
    widen_u(s, (const u32*)u_at, thread);
  else
    fetch_u(s, u_at, K * V * (U16 ? 2 : 4), thread);

#pragma unroll 1
  for (int t = 0; t < count; t++) {
    bool last = t == count - 1;
    s.key[thread] = now.k, s.z[thread] = now.q;
    if (thread == 0) s.alpha = now.alpha, s.gamma_u = now.gamma_u;
#pragma unroll
    for (int i = 0; i < (V + K - 1) / K; i++)
      if (thread + i * K < V) s.value[thread + i * K] = now.v[i];
    __syncthreads();
    float z = s.z[thread];
    if (a.h) {
      float squares[1] = {update_h(h, now.gamma_h, s, thread)};
      if (last && a.commit) store_h(s.h_at, h, thread);
      if (a.num_iter > 0) {
        block_sums(squares, s, 0, thread);
        float x = 0.f;
        if (squares[0] >= a.empty_below * a.empty_below) x = solve_state(h, z, sqrtf(squares[0]), a, s, thread);
        if (a.x) a.x[row(t) * K + thread] = x;
        float q = s.z[thread];
        z = a.alpha.data ? (1.f - s.alpha) * q + s.alpha * x : x;
      }
    }
    s.z[thread] = z * a.scale;
    copies_wait<0>();
    __syncthreads();
    char* to = last && a.commit ? s.u_at : nullptr;
    float4 sum = packed ? update_u<U16>(s, s.gamma_u, to, false, thread)
                        : update_u<false>(s, s.gamma_u, to, !last, thread);
    *(float4*)(s.partial + thread / GROUPS * V + 4 * (thread % GROUPS)) = sum;
    __syncthreads();
    for (int i = thread; i < V; i += K) {
      float o = 0.f;
#pragma unroll
      for (int n = 0; n < SLICES; n++) o += s.partial[n * V + i];
      store_output(a.o, row(t) * V + i, o);
    }
    if (!last) now = load_token(a, batch, begin + t + 1, head, thread);
  }
}
