// 16-bit numbers, reductions over lanes, copies to shared memory. BF16: the inputs are bfloat16, else float16.
#pragma once

#include "tensor_cores.cuh"

constexpr float TINY = 1e-30f;  // a tile or row below it is taken for zero, and its scale for one

constexpr float LOG2_E = 1.44269504f;
DEVICE float power_of_two(float x) {  // one instruction; flushes subnormal results to zero
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float low_half(u32 x) {
  float y;
  asm("{.reg .f16 l, h;\n mov.b32 {l, h}, %1;\n cvt.f32.f16 %0, l;}" : "=f"(y) : "r"(x));
  return y;
}
DEVICE float high_half(u32 x) {
  float y;
  asm("{.reg .f16 l, h;\n mov.b32 {l, h}, %1;\n cvt.f32.f16 %0, h;}" : "=f"(y) : "r"(x));
  return y;
}
DEVICE u32 pack(float low, float high) {
  u32 x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
DEVICE u32 pack_bfloat16(float low, float high) {
  u32 x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
DEVICE u32 times(u32 a, u32 b) {  // on pairs of float16
  u32 x;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
  return x;
}
DEVICE u32 times_plus(u32 a, u32 b, u32 c) {
  u32 x;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
  return x;
}
DEVICE u32 both(float x) { return pack(x, x); }

DEVICE u32 max_pair(u32 a, u32 b) {  // on pairs of 16-bit unsigned integers
  u32 x;
  asm("max.u16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
  return x;
}

// A pair of inputs as float32, and back.
DEVICE float2 widen(u32 x) {
#if BF16
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
#else
  return {low_half(x), high_half(x)};
#endif
}
DEVICE u32 narrow(float low, float high) {
#if BF16
  return pack_bfloat16(low, high);
#else
  return pack(low, high);
#endif
}

DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
DEVICE float warp_sum(float x) {
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) x += __shfl_xor_sync(~0u, x, i);
  return x;
}
DEVICE float warp_max(float x) {
#pragma unroll
  for (int i = 16; i > 0; i >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, i));
  return x;
}

DEVICE void copy_async(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(to), "l"(from) : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int PENDING>
DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}
