// The scans' kernels by threads of the CPU (threads.hpp), which stand in for the tensor cores too.
// SOURCE is the kernel's file and what it includes but for numbers, inputs and tensor_cores, its shared memory
// declared as `raw = RAW`. ENTRY: the kernel; BLOCK_THREADS and SHARED_BYTES: of a block.
#include "threads.hpp"

constexpr float TINY = 1e-30f;
inline float high_half(u32 x) { return low_half(x >> 16); }
inline u32 half_of(double x) { _Float16 y = (_Float16)x; u16 b; memcpy(&b, &y, 2); return b; }
// To bfloat16 at once: a double's rounding is odd where float32 cannot hold it.
inline u32 bfloat16_of(double x) {
  float y = (float)x;
  u32 b = bits(y);
  if ((double)y != x) b = ((double)y > x) == (x > 0) ? (b - 1) | 1 : b | 1;
  return rounded(__uint_as_float(b));
}
inline float number(u32 x) { return BF16 ? __uint_as_float(x << 16) : low_half(x); }
inline u32 input_of(double x) { return BF16 ? bfloat16_of(x) : half_of(x); }
inline float2 widen(u32 x) { return {number(x & 0xffff), number(x >> 16)}; }
inline u32 narrow(float low, float high) { return input_of(low) | input_of(high) << 16; }
template <class F> u32 pairwise(F f) { return f(0) | f(16) << 16; }
inline u32 times(u32 a, u32 b) {
  return pairwise([=](int i) { return half_of((double)low_half(a >> i) * low_half(b >> i)); });
}
inline u32 times_plus_inputs(u32 a, u32 b, u32 c) {
  return pairwise([=](int i) {
    return input_of((double)number(a >> i & 0xffff) * number(b >> i & 0xffff) + number(c >> i & 0xffff));
  });
}
inline u32 times_inputs(u32 a, u32 b) { return times_plus_inputs(a, b, 0); }
inline u32 minus_inputs(u32 a) { return a ^ 0x80008000u; }

template <class T> T again(T x) { return x; }
inline void copy_pieces(u32 to, const void* from, bool counts) {
  COPIES.add([=] {
    if (counts) memcpy(RAW + to, from, 16); else memset(RAW + to, 0, 16);
  });
}
inline void copy_number(float* to, const float* from, bool counts) {
  COPIES.add([=] { *to = counts ? *from : 0.f; });
}
inline u16 half_at(u32 address) { u16 x; memcpy(&x, RAW + address, 2); return x; }
inline void load_transposed(u32 (&a)[4], u32 from) {
  int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  exchange({from}, [&](Words* all) {
    for (int i = 0; i < 4; i++)
      a[i] = half_at(all[8 * i + 2 * c].w[0] + 2 * g) | half_at(all[8 * i + 2 * c + 1].w[0] + 2 * g) << 16;
    return 0;
  });
}

inline void load_matrices(u32 (&a)[4], u32 from) {
  int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  exchange({from}, [&](Words* all) {
    for (int i = 0; i < 4; i++) memcpy(&a[i], RAW + all[8 * i + g].w[0] + 4 * c, 4);
    return 0;
  });
}
inline void store_matrices(u32 to, const u32 (&a)[4]) {
  int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  exchange({to}, [&](Words* all) {
    for (int i = 0; i < 4; i++) memcpy(RAW + all[8 * i + g].w[0] + 4 * c, &a[i], 4);
    return 0;
  });
}

inline u32 swizzled(int rows, int row, int column) {
  return (column >> 6) * rows * 128 + row * 128 + ((((column & 63) >> 3) ^ (row & 7)) << 4) + (column & 7) * 2;
}
inline u64 descriptor(u32 address, u32 leading, u32 stride) {
  return (u64)address | (u64)(leading >> 4) << 32 | (u64)(stride >> 4) << 48;
}
inline u64 advance(u64 d, u32 bytes) { return d + bytes; }
static thread_local Pending PRODUCTS;
// d [64, 2 N] += a b, a in registers, b's entry (k, n) at row k, column n of swizzled shared memory.
template <class Number, int N> void multiply(float (&d)[N], const u32* a, u64 b, Number number, int sign) {
  int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  struct Rows { float entry[2][16]; } left;
  exchange({a[0], a[1], a[2], a[3]}, [&](Words* all) {
    for (int row = 0; row < 2; row++)
      for (int k = 0; k < 16; k++) {
        u32 word = all[4 * g + k % 8 / 2].w[row + k / 8 * 2];
        left.entry[row][k] = sign * number(word >> k % 2 * 16 & 0xffff);
      }
    return 0;
  });
  u32 address = (u32)b, leading = (b >> 32 & 0xffff) << 4, stride = (b >> 48) << 4;
  PRODUCTS.add([=, &d] {
    for (int j = 0; j < N / 4; j++)
      for (int e = 0; e < 2; e++) {
        int n = 8 * j + 2 * c + e;
        for (int k = 0; k < 16; k++) {
          u32 at = address + n / 64 * leading + k / 8 * stride + k % 8 * 128 + n % 64 * 2;
          float right = number(half_at(at ^ (at >> 7 & 7) << 4));
          for (int row = 0; row < 2; row++) d[4 * j + 2 * row + e] += left.entry[row][k] * right;
        }
      }
  });
}
template <int SIGN, int N> void mma_inputs(float (&d)[N], const u32 (&a)[4], u64 b) {
  multiply(d, a, b, number, SIGN);
}
template <int SIGN, int TRANSPOSED, int N> void mma(float (&d)[N], const u32 (&a)[4], u64 b, int) {
  multiply(d, a, b, low_half, SIGN);
}
inline void mma_begin() {}
inline void mma_commit() { PRODUCTS.commit(); }
template <int PENDING> inline void mma_wait() { PRODUCTS.wait(PENDING); }
template <int N> inline void hold(float (&)[N]) {}
inline void publish_shared() {}
inline u32 max_pair(u32 a, u32 b) { return max(a & 0xffff, b & 0xffff) | max(a >> 16, b >> 16) << 16; }
inline void __syncwarp() { WARPS_OF[threadIdx.x / 32]->arrive_and_wait(); }

#include SOURCE

extern "C" int arguments_bytes() { return sizeof(ScanArguments); }
extern "C" void launch(const ScanArguments* a, int blocks) {
  run_blocks([=] { ENTRY(*a); }, blocks, 2, BLOCK_THREADS, SHARED_BYTES);
}
