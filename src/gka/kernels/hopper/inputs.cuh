// Arithmetic on pairs of numbers of the inputs' dtype, copies, and products of inputs on the tensor cores.
#pragma once

#include "numbers.cuh"

#if BF16
#define INPUT "bf16"
#else
#define INPUT "f16"
#endif

DEVICE u32 times_inputs(u32 a, u32 b) {
  u32 x;
  asm("mul.rn." INPUT "x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
  return x;
}
DEVICE u32 times_plus_inputs(u32 a, u32 b, u32 c) {
  u32 x;
  asm("fma.rn." INPUT "x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
  return x;
}
DEVICE u32 minus_inputs(u32 a) {
  u32 x;
  asm("neg." INPUT "x2 %0, %1;" : "=r"(x) : "r"(a));
  return x;
}

// x, opaque to the compiler: what derives from it is computed again, and holds no registers until its next use.
template <class Number>
DEVICE Number again(Number x) {
  asm volatile("" : "+r"(x));
  return x;
}
template <class Number>
DEVICE Number* again(Number* x) {
  asm volatile("" : "+l"(x));
  return x;
}

// Starts a copy of 16 or 4 bytes to shared memory; of zeros unless `counts`.
DEVICE void copy_pieces(u32 to, const void* from, bool counts) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(counts ? 16 : 0) : "memory");
}
DEVICE void copy_number(float* to, const float* from, bool counts) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(to)), "l"(from),
               "r"(counts ? 4 : 0)
               : "memory");
}

// Loads four matrices of 8 x 8 halves, transposed; lane l has the address of row l % 8 of matrix l / 8.
DEVICE void load_transposed(u32 (&a)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(from)
               : "memory");
}

// Loads four matrices untransposed, and stores them.
DEVICE void load_matrices(u32 (&a)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(from)
               : "memory");
}
DEVICE void store_matrices(u32 to, const u32 (&a)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(to), "r"(a[0]), "r"(a[1]),
               "r"(a[2]), "r"(a[3])
               : "memory");
}

// d [64, 64] += SIGN a [64, 16] b [16, 64], a in registers, b's entry (k, n) at row k, column n.
template <int SIGN>
DEVICE void mma_inputs(float (&d)[32], const u32 (&a)[4], u64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." INPUT "." INPUT " {"
      NAMES_32 "}, "
      "{%32, %33, %34, %35}, %36, 1, %37, 1, 1;\n"
      : REGISTERS_32(d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(SIGN));
}

// d [64, 128] += SIGN a [64, 16] b [16, 128], a in registers, b's entry (k, n) at row k, column n.
template <int SIGN>
DEVICE void mma_inputs(float (&d)[64], const u32 (&a)[4], u64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." INPUT "." INPUT " {"
      NAMES_64 "}, "
      "{%64, %65, %66, %67}, %68, 1, %69, 1, 1;\n"
      : REGISTERS_64(d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(SIGN));
}
