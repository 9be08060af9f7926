// What the kernels ask of CUDA, by threads of the CPU: a warp is 32 of them, with barriers.
#pragma once
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

using std::max, std::min;
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define DEVICE inline
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };

struct Index { int x, y; };
static thread_local Index threadIdx, blockIdx;
static unsigned char* RAW;  // the block's shared memory
static std::unique_ptr<std::barrier<>> BLOCK;
static std::vector<std::unique_ptr<std::barrier<>>> WARPS_OF;
struct Words { u32 w[4]; };
static Words LANES[32][32];

inline void __syncthreads() { BLOCK->arrive_and_wait(); }
inline u32 bits(float x) { u32 y; memcpy(&y, &x, 4); return y; }
inline u32 __float_as_uint(float x) { return bits(x); }
inline float __uint_as_float(u32 x) { float y; memcpy(&y, &x, 4); return y; }

// `read` sees what every lane of the warp brought.
template <class Read> auto exchange(Words mine, Read read) {
  int warp = threadIdx.x / 32;
  LANES[warp][threadIdx.x % 32] = mine;
  WARPS_OF[warp]->arrive_and_wait();
  auto found = read(LANES[warp]);
  WARPS_OF[warp]->arrive_and_wait();
  return found;
}
inline float __shfl_sync(u32, float x, int lane) {
  return __uint_as_float(exchange({bits(x)}, [=](Words* all) { return all[lane & 31].w[0]; }));
}
inline float __shfl_xor_sync(u32, float x, int mask) { return __shfl_sync(~0u, x, threadIdx.x % 32 ^ mask); }
inline float __shfl_up_sync(u32, float x, int by) { return __shfl_sync(~0u, x, max((int)threadIdx.x % 32 - by, 0)); }
inline u32 __ballot_sync(u32, bool yes) {
  return exchange({yes}, [](Words* all) { u32 y = 0; for (int i = 0; i < 32; i++) y |= all[i].w[0] << i; return y; });
}
inline u32 __reduce_max_sync(u32, u32 x) {
  return exchange({x}, [](Words* all) { u32 y = 0; for (int i = 0; i < 32; i++) y = max(y, all[i].w[0]); return y; });
}
inline int __ffs(u32 x) { return __builtin_ffs(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

// numbers.cuh
constexpr float LOG2_E = 1.44269504f;
inline float power_of_two(float x) { return exp2f(x); }
inline float warp_sum(float x) { for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i); return x; }
inline float warp_max(float x) { for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i)); return x; }
inline u32 rounded(float x) { u32 b = bits(x); return (b + 0x7fff + (b >> 16 & 1)) >> 16; }
inline u32 pack_bfloat16(float low, float high) { return rounded(low) | rounded(high) << 16; }
inline float low_half(u32 x) { _Float16 y; u16 b = x; memcpy(&y, &b, 2); return y; }
inline u32 pack(float low, float high) { _Float16 x[2] = {(_Float16)low, (_Float16)high}; u32 y; memcpy(&y, x, 4); return y; }
#define shared_address(p) ((u32)((unsigned char*)(p) - RAW))
inline void copy_async(u32 to, const void* from) { memcpy(RAW + to, from, 16); }

// What runs beside a thread may be done at once or when it is waited for. Here even threads do it at once, so
// that what overwrites too early shows, and odd ones late, so that a missing wait does.
struct Pending {
  std::vector<std::vector<std::function<void()>>> groups{1};
  template <class F> void add(F f) {
    if (threadIdx.x % 2) groups.back().push_back(f); else f();
  }
  void commit() { groups.emplace_back(); }
  void wait(size_t pending) {  // all groups but the last ones
    while (groups.size() > pending + 1) {
      for (auto& f : groups.front()) f();
      groups.erase(groups.begin());
    }
  }
};
static thread_local Pending COPIES;
inline void copies_commit() { COPIES.commit(); }
template <int PENDING> inline void copies_wait() { COPIES.wait(PENDING); }

// Runs `kernel` in blocks of `threads`, each with its own shared memory, NaN at first.
template <class Kernel> void run_blocks(Kernel kernel, int blocks, int rows, int threads, size_t shared) {
  std::vector<float4> memory(shared / 16 + 1);
  RAW = (unsigned char*)memory.data();
  BLOCK = std::make_unique<std::barrier<>>(threads);
  WARPS_OF.clear();
  for (int w = 0; w < threads / 32; w++) WARPS_OF.push_back(std::make_unique<std::barrier<>>(32));
  for (int b = 0; b < blocks * rows; b++) {
    memset(RAW, 0xff, shared);
    std::vector<std::thread> running;
    for (int t = 0; t < threads; t++)
      running.emplace_back([=] { threadIdx.x = t, blockIdx = {b % blocks, b / blocks}, kernel(); });
    for (auto& t : running) t.join();
  }
}
