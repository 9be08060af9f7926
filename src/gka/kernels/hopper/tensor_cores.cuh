// Hopper's tensor cores: wgmma on one warpgroup (128 threads), float16 operands, float32 sums.
//
// Fragments: a thread of warp w and lane l holds rows r = 16 w + l / 4 and r + 8 of a tile, columns 8 j + 2 (l % 4)
// and the next. In an accumulator these are d[4 j + 2 b + e], b the row and e the column. Packed to float16 pairs
// a[2 j + b], the same values are the left operand of a product.
//
// Right operands lie in shared memory in tiles of 64 columns (128 bytes a row, 128-byte swizzle).
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

#define DEVICE __device__ __forceinline__

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// A right operand's matrix descriptor; `leading` and `stride` in bytes.
DEVICE u64 descriptor(u32 address, u32 leading, u32 stride) {
  return (u64)((address & 0x3FFFF) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 |
         1ull << 62;
}

// The descriptor advanced by `bytes`: only its low word, which holds the address, changes.
DEVICE u64 advance(u64 d, u32 bytes) {
  asm("{.reg .u32 l, h;\n mov.b64 {l, h}, %0;\n add.u32 l, l, %1;\n mov.b64 %0, {l, h};}" : "+l"(d) : "r"(bytes >> 4));
  return d;
}

// Byte offset of (row, column) in a swizzled array of `rows` rows.
DEVICE u32 swizzled(int rows, int row, int column) {
  return (column >> 6) * rows * 128 + row * 128 + ((((column & 63) >> 3) ^ (row & 7)) << 4) +
         (column & 7) * 2;
}

DEVICE void mma_begin() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
DEVICE void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int PENDING>
DEVICE void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(PENDING) : "memory");
}
// Makes ordinary stores to shared memory visible to the tensor cores; a barrier must follow.
DEVICE void publish_shared() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Keeps the compiler from moving reads of a product's registers before the preceding wait.
template <int N>
DEVICE void hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// The accumulators' names in an instruction, and their registers.
#define NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15," \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64 \
  NAMES_32 "," \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47," \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
  "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define REGISTERS_32(d) REGISTERS_8(d, 0), REGISTERS_8(d, 8), REGISTERS_8(d, 16), REGISTERS_8(d, 24)
#define REGISTERS_64(d) \
  REGISTERS_32(d), REGISTERS_8(d, 32), REGISTERS_8(d, 40), REGISTERS_8(d, 48), REGISTERS_8(d, 56)

// d [64, 64] (+)= SIGN a [64, 16] b [16, 64], a in registers.
template <int SIGN, int TRANSPOSED>
DEVICE void mma(float (&d)[32], const u32* a, u64 b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
      NAMES_32 "}, "
      "{%32, %33, %34, %35}, %36, p, %38, 1, %39;\n}\n"
      : REGISTERS_32(d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(SIGN), "n"(TRANSPOSED));
}

// The same with a in shared memory, stored by rows like a right operand or, if LEFT_TRANSPOSED, by columns.
template <int LEFT_TRANSPOSED, int TRANSPOSED>
DEVICE void mma(float (&d)[32], u64 a, u64 b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
      NAMES_32 "}, "
      "%32, %33, p, 1, 1, %35, %36;\n}\n"
      : REGISTERS_32(d)
      : "l"(a), "l"(b), "r"(accumulate), "n"(LEFT_TRANSPOSED), "n"(TRANSPOSED));
}

// d [64, 64] (+)= a [64, 16] b [16, 64] in bfloat16, a in registers, b's entry (k, n) at row k, column n.
DEVICE void mma_bfloat16(float (&d)[32], const u32* a, u64 b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      NAMES_32 "}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}\n"
      : REGISTERS_32(d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

// d [64, 128] (+)= SIGN a [64, 16] b [16, 128], a in registers.
template <int SIGN, int TRANSPOSED>
DEVICE void mma(float (&d)[64], const u32* a, u64 b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
      NAMES_64 "}, "
      "{%64, %65, %66, %67}, %68, p, %70, 1, %71;\n}\n"
      : REGISTERS_64(d)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(SIGN), "n"(TRANSPOSED));
}

// The same with a in shared memory, stored by rows like a right operand or, if LEFT_TRANSPOSED, by columns.
template <int LEFT_TRANSPOSED, int TRANSPOSED>
DEVICE void mma(float (&d)[64], u64 a, u64 b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
      NAMES_64 "}, "
      "%64, %65, p, 1, 1, %67, %68;\n}\n"
      : REGISTERS_64(d)
      : "l"(a), "l"(b), "r"(accumulate), "n"(LEFT_TRANSPOSED), "n"(TRANSPOSED));
}

// Steps FIRST to LAST - 1 of the following product, 16 columns of a each; `work(k)` runs after step k is issued.
template <int FIRST, int LAST, int SIGN, bool ALONG_ROWS, int ROWS, int N, class Work>
DEVICE void product_while(float (&d)[N], const u32* a, u32 b, bool accumulate, Work work) {
  u64 right = descriptor(b, ALONG_ROWS ? 16 : ROWS * 128, 1024);
#pragma unroll
  for (int k = FIRST; k < LAST; k++) {
    u32 step = ALONG_ROWS ? (k >> 2) * ROWS * 128 + (k & 3) * 32 : k * 2048;
    mma<SIGN, ALONG_ROWS ? 0 : 1>(d, a + 4 * k, advance(right, step), accumulate || k > 0);
    work(k);
  }
}
template <int FIRST, int LAST, int SIGN, bool ALONG_ROWS, int ROWS, int N>
DEVICE void product_part(float (&d)[N], const u32* a, u32 b, bool accumulate) {
  product_while<FIRST, LAST, SIGN, ALONG_ROWS, ROWS>(d, a, b, accumulate, [](int) {});
}

// d (+)= SIGN a B over K rows of B. a: fragments [64, K]. B: ROWS rows in shared memory, all columns. B's entry
// (k, n) is at row n, column k if ALONG_ROWS (a transposed right factor), else at row k, column n.
template <int K, int SIGN, bool ALONG_ROWS, int ROWS, int N>
DEVICE void product(float (&d)[N], const u32* a, u32 b, bool accumulate) {
  product_part<0, K / 16, SIGN, ALONG_ROWS, ROWS>(d, a, b, accumulate);
}

// d (+)= A B over K columns of A, both in shared memory. A: [64 of A_ROWS, K] or, if LEFT_TRANSPOSED,
// [K of A_ROWS, 64]. B as in `product`.
template <int K, bool LEFT_TRANSPOSED, bool ALONG_ROWS, int A_ROWS, int ROWS, int N>
DEVICE void product_shared(float (&d)[N], u32 a, u32 b, bool accumulate) {
  u64 left = descriptor(a, LEFT_TRANSPOSED ? A_ROWS * 128 : 16, 1024);
  u64 right = descriptor(b, ALONG_ROWS ? 16 : ROWS * 128, 1024);
#pragma unroll
  for (int k = 0; k < K / 16; k++) {
    u32 on = LEFT_TRANSPOSED ? k * 2048 : (k >> 2) * A_ROWS * 128 + (k & 3) * 32;
    u32 step = ALONG_ROWS ? (k >> 2) * ROWS * 128 + (k & 3) * 32 : k * 2048;
    mma<LEFT_TRANSPOSED, ALONG_ROWS ? 0 : 1>(d, advance(left, on), advance(right, step), accumulate || k > 0);
  }
}

// d = A B^T, both with K columns.
template <int K, int A_ROWS, int ROWS, int N>
DEVICE void product_shared(float (&d)[N], u32 a, u32 b) {
  product_shared<K, false, true, A_ROWS, ROWS>(d, a, b, false);
}
