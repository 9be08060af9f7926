// Between sums.cu and scan.cu: replaces the sum of every segment by the state that the segment starts from.
// A thread carries four entries of one head's state along a sequence's segments.

#include "scan.cuh"

constexpr int BATCH = 8;

DEVICE void combine(const ScanArguments& a, const Side& side, int width, int in_group) {
  int entry = 4 * (blockIdx.x % (K * width / 512) * 128 + threadIdx.x), count = a.segment_count;
  long long size = (long long)K * width;
  float4 carried = {0.f, 0.f, 0.f, 0.f};
  int sequence = -1;
#pragma unroll 1
  for (int first = 0; first < count; first += BATCH) {
    float4 sum[BATCH];
    float whole[BATCH];
    int of[BATCH];
    bool last[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; i++) {  // all loads before the first store
      int segment = min(first + i, count - 1);
      segment = BACKWARDS ? count - 1 - segment : segment;
      const int* row = a.segments + 5 * segment;
      long long at = (long long)segment * a.group_heads + in_group;
      of[i] = row[0], last[i] = BACKWARDS ? segment == row[3] : segment + 1 == row[4];
      sum[i] = *(const float4*)(side.sums + at * size + entry);
      whole[i] = side.sum_decays[at];
    }
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      if (first + i >= count) break;
      int segment = BACKWARDS ? count - 1 - first - i : first + i;
      long long at = (long long)segment * a.group_heads + in_group;
      if (of[i] != sequence) {  // starts from the caller's state, or from zero
        sequence = of[i];
        long long given = (long long)sequence * a.heads + a.first_head + in_group;
        carried = float4{0.f, 0.f, 0.f, 0.f};
        if (side.boundary != nullptr) carried = *(const float4*)(side.boundary + given * size + entry);
      }
      *(float4*)(side.sums + at * size + entry) = carried;
      if (last[i]) continue;  // no segment follows, and its sum was not written
      float factor = __expf(whole[i]);
      carried = float4{carried.x * factor + sum[i].x, carried.y * factor + sum[i].y,
                       carried.z * factor + sum[i].z, carried.w * factor + sum[i].w};
    }
  }
}

extern "C" __global__ void gka_combine(const __grid_constant__ ScanArguments a) {
  bool of_h = blockIdx.y == 0;
  int width = of_h ? K : V, blocks = K * width / 512;
  if (blockIdx.x >= blocks * a.group_heads) return;
  combine(a, of_h ? a.h : a.u, width, blockIdx.x / blocks);
}
