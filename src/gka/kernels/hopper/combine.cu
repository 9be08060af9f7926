// Between the two launches of a scan in segments: the sum of every segment gives way to the state that the
// segment begins with. A thread carries four entries of one head's state along a sequence's segments.

DEVICE void combine(const ScanArguments& a, const Side& side, int width, int in_group) {
  int entry = 4 * (blockIdx.x % (K * width / 512) * 128 + threadIdx.x), count = a.segment_count;
  long long size = (long long)K * width;
  float4 carried = {0.f, 0.f, 0.f, 0.f};
  float bound = 0.f;
  int sequence = -1;
#pragma unroll 4
  for (int i = 0; i < count; i++) {
    int segment = BACKWARDS ? count - 1 - i : i;
    const int* row = a.segments + 5 * segment;
    bool last = BACKWARDS ? segment == row[3] : segment + 1 == row[4];
    long long at = (long long)segment * a.group_heads + in_group;
    float4 *place = (float4*)(side.sums + at * size + entry), sum = {0.f, 0.f, 0.f, 0.f};
    float sum_bound = 0.f, whole = 0.f;
    if (!last) sum = *place, sum_bound = side.sum_bounds[at], whole = __expf(side.sum_decays[at]);
    if (row[0] != sequence) {  // begins with the caller's state, or with nothing
      sequence = row[0];
      long long given = (long long)sequence * a.heads + a.first_head + in_group;
      bound = side.boundary == nullptr ? 0.f : side.boundary_max[given];
      carried = float4{0.f, 0.f, 0.f, 0.f};
      if (side.boundary != nullptr) carried = *(const float4*)(side.boundary + given * size + entry);
    }
    *place = carried;
    if (entry == 0) side.start_bounds[at] = bound;
    carried = float4{carried.x * whole + sum.x, carried.y * whole + sum.y, carried.z * whole + sum.z,
                     carried.w * whole + sum.w};
    bound = bound * whole + sum_bound;
  }
}

extern "C" __global__ void gka_combine(const __grid_constant__ ScanArguments a) {
  bool of_h = blockIdx.y == 0;
  int width = of_h ? K : V, blocks = K * width / 512;
  if (blockIdx.x >= blocks * a.group_heads) return;
  combine(a, of_h ? a.h : a.u, width, blockIdx.x / blocks);
}
