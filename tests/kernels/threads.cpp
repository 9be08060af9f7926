// What recurrent.cu asks of CUDA, by threads of the CPU: a block is K threads with barriers, a warp 32 of them.
// SOURCE is the kernel's file with its shared memory declared as `raw = RAW`.
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

using std::max;
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

struct Index { int x; };
static thread_local Index threadIdx, blockIdx;
static unsigned char* RAW;
static std::unique_ptr<std::barrier<>> BLOCK;
static std::vector<std::unique_ptr<std::barrier<>>> WARPS_OF;
static u32 LANES[32][32];

inline void __syncthreads() { BLOCK->arrive_and_wait(); }
inline u32 bits(float x) { u32 y; memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(u32 x) { float y; memcpy(&y, &x, 4); return y; }

template <class Read> auto exchange(u32 mine, Read read) {
  int warp = threadIdx.x / 32;
  LANES[warp][threadIdx.x % 32] = mine;
  WARPS_OF[warp]->arrive_and_wait();
  auto found = read(LANES[warp]);
  WARPS_OF[warp]->arrive_and_wait();
  return found;
}
inline float __shfl_sync(u32, float x, int lane) {
  return __uint_as_float(exchange(bits(x), [=](u32* all) { return all[lane & 31]; }));
}
inline float __shfl_xor_sync(u32, float x, int mask) { return __shfl_sync(~0u, x, threadIdx.x % 32 ^ mask); }
inline u32 __ballot_sync(u32, bool yes) {
  return exchange(yes, [](u32* all) { u32 y = 0; for (int i = 0; i < 32; i++) y |= all[i] << i; return y; });
}
inline int __ffs(u32 x) { return __builtin_ffs(x); }
inline float __fdividef(float x, float y) { return x / y; }
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
inline void copies_commit() {}
template <int> inline void copies_wait() {}

#include SOURCE

extern "C" int arguments_bytes() { return sizeof(StepArguments); }
extern "C" void launch(const StepArguments* a, int blocks) {
  std::vector<float4> memory(sizeof(Shared) / 16 + 1);
  RAW = (unsigned char*)memory.data();
  BLOCK = std::make_unique<std::barrier<>>(K);
  WARPS_OF.clear();
  for (int w = 0; w < K / 32; w++) WARPS_OF.push_back(std::make_unique<std::barrier<>>(32));
  for (int b = 0; b < blocks; b++) {
    memset(RAW, 0xff, sizeof(Shared));  // NaN
    std::vector<std::thread> threads;
    for (int t = 0; t < K; t++)
      threads.emplace_back([=] { threadIdx.x = t, blockIdx.x = b, gka_step(*a); });
    for (auto& t : threads) t.join();
  }
}
