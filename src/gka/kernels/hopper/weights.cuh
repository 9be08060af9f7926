// Weights of a chunk's tokens in the products that add it to a state, computed by one warp one chunk ahead.
#pragma once

#include "scan.cuh"

// Limits of a weight in units of the state: beyond MOST the state is rescaled, and LARGEST is then the largest weight.
// Weighted inputs in bfloat16 have float32's range; in float16 they stay below the inputs themselves. H_BACK: the
// weights of y are always float16. Those of the keys enter times SHARE or, in float16, times a sixteenth of the
// largest key entry if that is more: neither a weight nor a weighted key then leaves float16's range.
template <int KIND>
struct Room {
  static constexpr float MOST = KIND == H_BACK ? BF16 ? 1024.f : 64.f : BF16 ? 0x1p60f : .5f;
  static constexpr float SHARE = BF16 ? 0x1p-20f : 0x1p-9f;
  static constexpr float LARGEST = KIND == H_BACK || BF16 ? 1.f : .5f;
};

// Weights / unit of the pairs of tokens 2 p and 2 p + 1, in the order of a left operand's registers (`place`).
// STATES: of k. H_BACK: of k, then of y in float16. Those of k are differences of two numbers (`split`).
// U_BACK: of q and of x, float32.
struct alignas(16) Gates {
  u32 pairs[2 * C];
  float rescale;  // factor of the state before the chunk is added
  float unit, start;
  // Only if the state is stored at every chunk (EVERY). whole: the chunk's decay. sum: sums of the weights'
  // magnitudes; H_BACK's second bounds all that the chunk adds. stored_bound: scale of the chunk's stored state.
  // of_q, of_x: U_BACK, largest factors of q and of x in z.
  float whole, sum[2], stored_bound, of_q, of_x;
  float written[C];  // STATES: the weights themselves
};

// Place of pair p: the pairs 8 s + c and 8 s + 4 + c, which are read together, are adjacent. s: slice of 16 tokens.
DEVICE int place(int pair) { return pair / 8 * 8 + pair % 4 * 2 + pair / 4 % 2; }

DEVICE float inverse(float x) { return x > TINY ? __fdividef(1.f, x) : 0.f; }

// The largest of a warp's numbers, none negative; such numbers compare as their bits do.
DEVICE u32 warp_most(u32 x) { return __reduce_max_sync(~0u, x); }
DEVICE float warp_most(float x) { return __uint_as_float(warp_most(__float_as_uint(x))); }

// Two numbers, each as the difference of two numbers of the inputs' dtype.
DEVICE uint2 split(float low, float high) {
  u32 first = narrow(low, high);
  float2 back = widen(first);
  return {first, narrow(back.x - low, back.y - high)};
}

// Numbers from which a chunk's weights are computed: per token, zero past the chunk's end. Absent gates stay unread.
struct alignas(16) Numbers {
  float g[C], beta[C], alpha[C], x_scale[C], y_scale[C], key_weight[C];
  float start_weight, key_max, stored_bound;  // of the chunk
};

// Starts copying the two numbers of a lane's tokens.
DEVICE void copy_numbers(float* to, const float* from, int first, int heads, int head, int length) {
  int row = 2 * (threadIdx.x % 32);
  const float* source = from + (long long)(first + row) * heads + head;
  copy_number(to + row, source, row < length), copy_number(to + row + 1, source + heads, row + 1 < length);
}

// Lane l of the warp computes the weights of tokens 2 l and 2 l + 1.
template <int KIND, bool EVERY>
struct Weights {
  float unit = 0.f, decays = 0.f;  // decays: running sum of log decays
  float start = 0.f;               // H_BACK without EVERY: the multiple of H that is not in the accumulators

  // Starts copying the numbers of the chunk of `length` tokens from `first`; `chunk`: its index among [M, G].
  DEVICE static void copy(Numbers& to, const ScanArguments& s, const Side& side, const Walk& at, int first,
                          int length, long long chunk) {
    auto copy = [&](float* array, const float* from) {
      if (from != nullptr) copy_numbers(array, from, first, s.heads, at.head, length);
    };
    copy(to.g, side.g);
    if constexpr (KIND == U_BACK) copy(to.alpha, s.alpha);
    if constexpr (KIND != U_BACK) copy(to.beta, s.beta);
    if constexpr (KIND != STATES) copy(to.x_scale, s.x_scale);
    if constexpr (KIND == H_BACK) {
      copy_numbers(to.y_scale, s.y_scale, first, s.group_heads, (int)at.in_group, length);
      copy_numbers(to.key_weight, s.key_weight, first, s.group_heads, (int)at.in_group, length);
      copy_number(&to.start_weight, s.start_weight + chunk, true);
      copy_number(&to.key_max, s.key_maxima + chunk, true);
    }
    if constexpr (KIND != STATES && EVERY)
      copy_number(&to.stored_bound, side.stored_bounds + chunk * ((KIND == H_BACK ? K : V) / 64), true);
  }

  // Updates `unit` so that weights up to `largest` fit; returns the factor of the state.
  DEVICE float rescale(float largest, float whole) {
    float old = unit * whole, factor = 1.f;
    unit = old;
    if (largest > Room<KIND>::MOST * old || old <= TINY) {
      unit = fmaxf(old, largest * (1.f / Room<KIND>::LARGEST));
      factor = old * inverse(unit);
      unit = unit > TINY ? unit : 0.f;
    }
    return factor;
  }

  DEVICE void make(Gates& to, const Numbers& from, const ScanArguments& s, const float* decay) {
    int lane = threadIdx.x % 32, row = 2 * lane;
    float start_weight = KIND == H_BACK ? from.start_weight : 0.f;
    float key_max = KIND == H_BACK ? from.key_max : 0.f, stored_bound = 0.f, of_q = 0.f, of_x = 0.f;
    if constexpr (KIND != STATES && EVERY) stored_bound = from.stored_bound;
    float2 g = {0.f, 0.f};
    if (decay != nullptr) g = *(const float2*)(from.g + row);
    g.x = log_decay(g.x), g.y = log_decay(g.y);
    float sum = g.x + g.y;
#pragma unroll
    for (int i = 1; i < 32; i <<= 1) {
      float before = __shfl_up_sync(~0u, sum, i);
      if (lane >= i) sum += before;
    }
    float total = __shfl_sync(~0u, sum, 31), whole = __expf(total), so_far[2] = {sum - g.y, sum};
    float first[2], second[2], largest = 0.f;
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float to_end = __expf(total - so_far[e]), since_start = __expf(so_far[e]);
      float beta = s.beta == nullptr ? 1.f : from.beta[row + e], beta2 = beta * beta;
      if constexpr (KIND == STATES) {
        first[e] = to_end * beta2, second[e] = 0.f;
        if constexpr (EVERY) to.written[row + e] = first[e];
      } else if constexpr (KIND == U_BACK) {
        float alpha = s.alpha == nullptr ? 1.f : from.alpha[row + e], weight = since_start * s.scale;
        first[e] = weight * (1.f - alpha), second[e] = weight * alpha * from.x_scale[row + e];
        of_q = fmaxf(of_q, fabsf(1.f - alpha)), of_x = fmaxf(of_x, fabsf(alpha * from.x_scale[row + e]));
      } else {
        first[e] = -.5f * from.key_weight[row + e];
        if constexpr (!EVERY) first[e] += start * whole * to_end * beta2;
        second[e] = -since_start * (from.x_scale[row + e] * from.y_scale[row + e]);
      }
      float share = KIND != H_BACK ? 1.f : BF16 ? Room<KIND>::SHARE : fmaxf(key_max * .0625f, Room<KIND>::SHARE);
      largest = fmaxf(largest, fmaxf(fabsf(first[e]) * share, fabsf(second[e])));
    }
    if constexpr (EVERY) {
      float sum[2] = {fabsf(first[0]) + fabsf(first[1]), fabsf(second[0]) + fabsf(second[1])};
      if constexpr (KIND == H_BACK) sum[1] = warp_sum(sum[0] * key_max * key_max + sum[1]);
      if constexpr (KIND != H_BACK) sum[0] = warp_sum(sum[0]);
      if constexpr (KIND == U_BACK) sum[1] = warp_sum(sum[1]), of_q = warp_most(of_q), of_x = warp_most(of_x);
      if constexpr (KIND == H_BACK) {
        start = -.5f * start_weight * stored_bound;
        largest = fmaxf(largest, fabsf(start) * 0x1p-20f), sum[1] += fabsf(start);
      }
      to.whole = whole, to.stored_bound = stored_bound, to.of_q = of_q, to.of_x = of_x;
      to.sum[0] = sum[0], to.sum[1] = sum[1];
    }
    to.rescale = rescale(warp_most(largest), whole);
    float per_unit = inverse(unit);
#pragma unroll
    for (int e = 0; e < 2; e++) first[e] *= per_unit, second[e] *= per_unit;
    if constexpr (KIND == U_BACK) {
      ((float4*)to.pairs)[place(lane)] = float4{first[0], first[1], second[0], second[1]};
    } else {
      ((uint2*)to.pairs)[place(lane)] = split(first[0], first[1]);
      if constexpr (KIND == H_BACK) to.pairs[C + place(lane)] = pack(second[0], second[1]);
    }
    start = EVERY ? start * per_unit : (start * whole) * whole - .5f * start_weight;
    decays += total, to.unit = unit, to.start = start;
  }
};
