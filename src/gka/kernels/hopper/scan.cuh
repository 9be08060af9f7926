// Arguments of the scans over chunks.
#pragma once

#include "decay.cuh"
#include "inputs.cuh"

// H or U, or its gradient. W is the number of columns: K for H, V for U.
struct Side {
  const float *g;         // log decay [tokens, H] or null
  const float *boundary;      // [N, H, K, W] or null: the initial state; backwards the gradient of the final state
  u16 *states;            // [M, G, K, W] float16: the chunk-start state / its bound; backwards E at the chunk's end
  float *bounds;          // [M, G, W / 64]
  float *norms;           // [M, G, W / 64] or null: the sum of squares in the first, zeros in the others
  float *last;            // [N, H, K, W] or null: the final state; backwards the gradient of the initial state
  float *sums;                  // [S, G, K, W], null if every sequence is one segment: the segment's own sum,
                                // after combine.cu the state that it starts from
  float *sum_decays;            // [S, G]: log decay over a segment
  const u16 *stored;            // backwards [M, G, K, W]: chunk-start states / stored_bounds; E of U may overwrite U
  const float *stored_bounds;   // [M, G, W / 64]
  float *wholes;                // backwards [M, G, W / 64]: decay times <S_[c], E> in the first, then zeros
};

struct ScanArguments {
  Side h, u;
  const u16 *k, *v, *q, *x, *d_o, *y;  // x [tokens, H, K], y [tokens, G, K]: float16, rows / their scales
  const float *alpha, *beta, *x_scale, *y_scale, *key_weight, *start_weight;
  // [M, G] and [M, G, V / 64] or null, written: largest entries of k and v; backwards of z and do, that of z a
  // bound from q's largest entry and x's scales
  float *first_maxima, *second_maxima;
  const float *key_maxima;              // backwards [M, G]: largest entries of k
  const int *segments;                  // [S, 5]: sequence, first and end chunk, the sequence's first and end segment
  const long long *chunk_start;
  const int *chunk_length;
  float scale;
  int heads, key_heads, value_heads, first_head, group_heads, segment_count;
};

constexpr int C = 64, GROUPS = K / 64, THREADS = 128 * GROUPS;

enum Kind { STATES, U_BACK, H_BACK };

// A block's place: one segment of a sequence, one head.
struct Walk {
  int sequence, first, end, before, after, index, head, key_head, value_head;
  long long in_group;
  DEVICE Walk(const ScanArguments& a, int block) {
    index = block / a.group_heads;
    in_group = block % a.group_heads;
    const int* row = a.segments + 5 * index;
    sequence = row[0], first = row[1], end = row[2], before = row[3], after = row[4];
    head = a.first_head + (int)in_group;
    key_head = head / (a.heads / a.key_heads), value_head = head / (a.heads / a.value_heads);
  }
};
