// A state in the accumulators of its block: rows `row` and row + 8, columns 8 j + column and the next.
template <int W>
struct State {
  float d[W / 2];
  int row, column, lane;
  DEVICE State() {
    lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, column = 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < W / 2; i++) d[i] = 0.f;
  }
  DEVICE void scale(float factor) {
#pragma unroll
    for (int i = 0; i < W / 2; i++) d[i] *= factor;
  }
  DEVICE void add(const float* from, float factor) {
#pragma unroll
    for (int j = 0; j < W / 8; j++)
#pragma unroll
      for (int b = 0; b < 2; b++) {
        float2 pair = *(const float2*)(from + (row + 8 * b) * W + 8 * j + column);
        d[4 * j + 2 * b] += pair.x * factor, d[4 * j + 2 * b + 1] += pair.y * factor;
      }
  }
  DEVICE void store(float* to, float factor) const {
#pragma unroll
    for (int j = 0; j < W / 8; j++)
#pragma unroll
      for (int b = 0; b < 2; b++)
        *(float2*)(to + (row + 8 * b) * W + 8 * j + column) =
            float2{d[4 * j + 2 * b] * factor, d[4 * j + 2 * b + 1] * factor};
  }
  DEVICE void store_half(u16* to, float factor) const {
#pragma unroll
    for (int b = 0; b < 2; b++)
#pragma unroll
      for (int g = 0; g < W / 32; g++) {
        u32 words[4];
#pragma unroll
        for (int w = 0; w < 4; w++) {
          int i = 4 * (4 * g + w) + 2 * b;
          words[w] = pack(d[i] * factor, d[i + 1] * factor);
        }
        *(uint4*)(to + (row + 8 * b) * W + 32 * g + lane % 4 * 8) =
            transpose_quad(words[0], words[1], words[2], words[3], lane);
      }
  }
  DEVICE float square_sum() const {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < W / 2; i++) sum += d[i] * d[i];
    return sum;
  }
  // <d, S> of a float16 state; then d += factor S.
  DEVICE float inner_then_add(const u16* from, float factor) {
    float sum = 0.f;
#pragma unroll
    for (int b = 0; b < 2; b++) {
      uint4 four[W / 32];
#pragma unroll
      for (int g = 0; g < W / 32; g++)
        four[g] = *(const uint4*)(from + (row + 8 * b) * W + 32 * g + lane % 4 * 8);
#pragma unroll
      for (int g = 0; g < W / 32; g++) {
        uint4 words = transpose_quad(four[g].x, four[g].y, four[g].z, four[g].w, lane);
#pragma unroll
        for (int w = 0; w < 4; w++) {
          u32 word = ((const u32*)&words)[w];
          int i = 4 * (4 * g + w) + 2 * b;
          sum += d[i] * low_half(word) + d[i + 1] * high_half(word);
          d[i] += factor * low_half(word), d[i + 1] += factor * high_half(word);
        }
      }
    }
    return sum;
  }
  DEVICE float largest() const {
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < W / 2; i++) most = fmaxf(most, fabsf(d[i]));
    return most;
  }
  // d += factor S of a float16 state.
  DEVICE void add_stored(const u16* from, float factor) {
#pragma unroll
    for (int i = 0; i < W / 4; i++) {
      u32 word = *(const u32*)(from + (row + i % 2 * 8) * W + i / 2 * 8 + column);
      d[2 * i] += factor * low_half(word), d[2 * i + 1] += factor * high_half(word);
    }
  }
  // d += left^T right, tiles of C rows; this warpgroup's 64 rows of the state are 64 columns of `left`.
  DEVICE void multiply(const unsigned char* left, const unsigned char* right) {
    u32 a = shared_address(left) + threadIdx.x / 128 * C * 128, b = shared_address(right);
#pragma unroll
    for (int k = 0; k < C / 16; k++)
      mma<1, 1>(d, descriptor(a + k * 2048, C * 128, 1024), descriptor(b + k * 2048, C * 128, 1024), true);
  }
};
