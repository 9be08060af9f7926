// Gradients of keys, values, decays and write gate of one chunk of one head (gka/maths/adjoint.py): first
// through U, then through H. The two parts of dk, and those of d(beta^2), meet in registers.

constexpr int WIDE = K > V ? K : V;
constexpr float FAINT = 1e-20f;  // a product this much smaller than what it is added to may lose digits

// What the block keeps in shared memory.
struct Tiles {
  unsigned char state[K * WIDE * 2];  // E of U, then E of H, then H_[c]
  unsigned char k[C * K * 2];
  unsigned char z[C * K * 2];         // z, then x
  unsigned char d[C * WIDE * 2];      // do, then y
  unsigned char v[2 * C * C * 2];     // v, then two tiles [C, C]
  // numbers of every token, zero past the chunk's end
  float decay_u[C], decay_h[C], alpha[C], rest[C], beta2[C], x_scale[C], both[C], w[C], key_weight[C];
  float start_u[C], start_h[C], energy[C], ends[C], sums[C], columns[C];

  DEVICE u32 tile(int i) const { return shared_address(v) + i * C * C * 2; }
};

// Byte offset in a tile [C, C] of the thread's words of an accumulator: `place ^ j << 4`, + 1024 for row 1.
DEVICE u32 first_word(const Place& at) {
  return at.row[0] * 128 + ((at.row[0] & 7) << 4) + at.column * 2;
}

// The same place, computed anew: what is derived from it holds no registers until its next use.
DEVICE Place again(const Place& at) {
  Place same = at;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(same.thread));
  same.lane = same.thread % 32;
  same.row[0] = same.thread / 32 * 16 + same.lane / 4, same.row[1] = same.row[0] + 8;
  same.column = 2 * (same.lane % 4);
  return same;
}

DEVICE u32 again(u32 address) {
  asm volatile("" : "+r"(address));
  return address;
}

DEVICE float inverse(float x) { return x > 1e-37f ? __fdividef(1.f, x) : 0.f; }

template <int N>
DEVICE float largest_of(const float* x, long long index) {
  float largest = x[index * N];
#pragma unroll
  for (int i = 1; i < N; i++) largest = fmaxf(largest, x[index * N + i]);
  return largest;
}
template <int N>
DEVICE float sum_of(const float* x, long long index) {
  float sum = x[index * N];
#pragma unroll
  for (int i = 1; i < N; i++) sum += x[index * N + i];
  return sum;
}

// Four words of a left operand from a tile in shared memory: columns 16 k to 16 k + 15.
DEVICE void load_left(u32* a, u32 tile, int k, const Place& at) {
  int row = at.thread / 32 * 16 + at.lane % 16;
  u32 from = (tile + row * 128 + ((at.lane / 16 ^ (row & 7)) << 4)) ^ (k & 3) << 5;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(from + (k >> 2) * C * 128)
               : "memory");
}

// k16_j . d_j of the thread's two rows j.
DEVICE void dots_with_keys(float (&dot)[2], const float (&d)[K / 2], const Tiles& s, const Place& at) {
  dot[0] = dot[1] = 0.f;
#pragma unroll
  for (int k = 0; k < K / 16; k++) {
    u32 key[4];
    load_left(key, shared_address(s.k), k, at);
#pragma unroll
    for (int i = 0; i < 4; i++)
      dot[i % 2] += d[8 * k + 2 * i] * low_half(key[i]) + d[8 * k + 2 * i + 1] * high_half(key[i]);
  }
  dot[0] = quad_sum(dot[0]), dot[1] = quad_sum(dot[1]);
}

// Starts a swizzled copy of float16 rows of an array [tokens, heads, K]; zeros past the chunk's end.
DEVICE void copy_rows(u32 to, const u16* array, int heads, int head, const Place& at) {
  typedef Pieces<K> P;
  const u16* from = array + (at.start * heads + head) * K + P::column(at);
  u32 step = heads * K;
  to += P::place(at);
#pragma unroll
  for (int i = 0; i < P::N; i++) {
    bool valid = P::row(i, at) < at.length;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to + i * P::STEP * 128),
                 "l"(from + (valid ? P::row(i, at) * step : 0)), "r"(valid ? 16 : 0)
                 : "memory");
  }
  copies_commit();
}

// Brings a state [K, K] that is read later to the cache; for one thread.
DEVICE void prefetch_state(const u16* from) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(K * K * 2));
}

DEVICE void load_numbers(Tiles& s, const Arguments& a, const Place& at) {
  int row = at.thread % C;
  bool valid = row < at.length;
  long long first = at.start + (valid ? row : 0), token = first * a.heads + at.head;
  long long group = first * a.group_heads + at.head - a.first_head;
  float alpha = 1.f, beta = 1.f;
  if (a.alpha != nullptr) alpha = a.alpha[token];
  if (a.beta != nullptr) beta = a.beta[token];
  float x_scale = a.x_scale[token], y_scale = a.y_scale[group], w = a.w[group];
  float key_weight = a.key_weight[group], start_u = a.start_u[group], start_h = a.start_h[group];
  s.alpha[row] = alpha;
  s.rest[row] = valid ? 1.f - alpha : 0.f;
  s.beta2[row] = valid ? beta * beta : 0.f;
  s.x_scale[row] = valid ? x_scale : 0.f;
  s.both[row] = valid ? x_scale * y_scale : 0.f;
  s.w[row] = valid ? w : 0.f;
  s.key_weight[row] = valid ? key_weight : 0.f;
  s.start_u[row] = valid ? start_u : 0.f;
  s.start_h[row] = valid ? start_h : 0.f;
  bool of_u = at.thread / 32 % 2;
  sum_decays(of_u ? s.decay_u : s.decay_h, of_u ? a.g : a.gk, a, at);
}

// Largest entries of the chunk's k, v, z, do.
struct Largest {
  float k, v, z, d;
};

// k, v, z, do / their largest entries, and the tokens' numbers, to shared memory; E of U is on its
// way after.
DEVICE void load_tiles(Tiles& s, const Largest& most, const Arguments& a, const Place& at) {
  copy_rows(shared_address(s.z), a.x, a.heads, at.head, at);
  copy_state<K, V>(shared_address(s.state), a.u_ends + at.state * K * V, at.thread);
  Pieces<K> k, q;
  Pieces<V> v, d;
  k.load(a.k, a.key_heads, at.head / (a.heads / a.key_heads), at);
  v.load(a.v, a.value_heads, at.head / (a.heads / a.value_heads), at);
  d.load(a.d_o, a.heads, at.head, at);
  q.load(a.q, a.heads, at.head, at);
  if (at.thread == 0) {
    prefetch_state(a.h_ends + at.state * K * K);
    prefetch_state(a.h_states + at.state * K * K);
  }
  load_numbers(s, a, at);
  k.store(s.k, inverse(most.k), at);
  v.store(s.v, inverse(most.v), at);
  d.store(s.d, inverse(most.d), at);
  copies_wait<1>();  // the thread's own pieces of x
  __syncthreads();
  float less = inverse(most.z);
  unsigned char* z = s.z + Pieces<K>::place(at);
#pragma unroll
  for (int i = 0; i < Pieces<K>::N; i++) {
    int row = Pieces<K>::row(i, at);  // past the chunk's end both factors are zero
    float of_x = s.alpha[row] * s.x_scale[row] * less, of_q = s.rest[row] * less;
    uint4 mixed = *(const uint4*)(z + i * Pieces<K>::STEP * 128);
#pragma unroll
    for (int w = 0; w < 4; w++) {
      float2 pair = widen(((const u32*)&q.held[i])[w]);
      u32 halves = ((const u32*)&mixed)[w];
      ((u32*)&mixed)[w] = pack(of_q * pair.x + of_x * low_half(halves), of_q * pair.y + of_x * high_half(halves));
    }
    *(uint4*)(z + i * Pieces<K>::STEP * 128) = mixed;
  }
}

// Rows of dk or dv: of shared heads to float32 scratch [tokens, H', D], else to the caller's array.
template <int D>
DEVICE void store_gradient(void* array, bool shared, const float (&d)[D / 2], const float (&factor)[2],
                           const Arguments& a, const Place& at) {
  if (!shared) {
    long long token[2] = {at.token(a, 0), at.token(a, 1)};
    store_fragment<D>((u16*)array, d, factor, token, at);
    return;
  }
#pragma unroll
  for (int b = 0; b < 2; b++) {
    float* to = (float*)array + at.group_token(a, b) * D + at.column;
    if (!at.valid(b)) continue;
#pragma unroll
    for (int j = 0; j < D / 8; j++)
      *(float2*)(to + 8 * j) = {d[4 * j + 2 * b] * factor[b], d[4 * j + 2 * b + 1] * factor[b]};
  }
}

// Sums of the pairs' parts P_tj (without beta_j^2), times a factor: over t to `columns`, and beta_j^2 P_tj
// over j < i <= t to `sums`. A product with a triangle of ones adds them up; bfloat16 has float32's range,
// and two of them 16 of its bits. Takes both tiles; ends with a barrier.
DEVICE void sum_pairs(const float (&pairs)[C / 2], float factor, Tiles& s, const Place& at) {
  u32 place = first_word(at), since[C / 4];
#pragma unroll
  for (int i = 0; i < C / 4; i++) {
    u32 high, low;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(high) : "f"(pairs[2 * i + 1]), "f"(pairs[2 * i]));
    float rest[2] = {pairs[2 * i] - __uint_as_float(high << 16),
                     pairs[2 * i + 1] - __uint_as_float(high & 0xffff0000u)};
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(low) : "f"(rest[1]), "f"(rest[0]));
    unsigned char* to = s.v + (place ^ i / 2 << 4) + i % 2 * 1024;
    *(u32*)to = high, *(u32*)(to + C * C * 2) = low;
    int missing = max(16 * (at.row[i % 2] - at.column - i / 2 * 8), 0);  // bits: 1 where column >= row
    asm("shl.b32 %0, %1, %2;" : "=r"(since[i]) : "r"(0x3f803f80u), "r"(missing));
    asm volatile("" : "+r"(since[i]));  // made before the product begins
  }
  publish_shared();
  __syncthreads();
  u64 right = descriptor(s.tile(0), C * 128, 1024);
  float after[C / 2];  // sum over t >= i, for each j
  mma_begin();
#pragma unroll
  for (int k = 0; k < 2 * C / 16; k++)
    mma_bfloat16(after, since + k % (C / 16) * 4, advance(right, k * 2048), k > 0);
  mma_commit();
  mma_wait<0>();
  hold(after);
  float sum[2] = {0.f, 0.f};
#pragma unroll
  for (int j = 0; j < C / 8; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      int column = 8 * j + at.column + e;
      float beta2 = s.beta2[column];
#pragma unroll
      for (int b = 0; b < 2; b++)
        if (8 * j + e < at.row[b] - at.column) sum[b] += after[4 * j + 2 * b + e] * beta2;
      if (at.row[0] == 0) s.columns[column] = after[4 * j + e] * factor;
    }
  sum[0] = quad_sum(sum[0]), sum[1] = quad_sum(sum[1]);
#pragma unroll
  for (int b = 0; b < 2; b++)
    if (at.lane % 4 == 0) s.sums[at.row[b]] = sum[b] * factor;
  __syncthreads();
}

// dg_i of the tokens 2 lane and 2 lane + 1 to the array (or nowhere); their d(beta^2) is added to.
DEVICE void store_decay(float* dg, float (&d_beta2)[2], const float* start, float whole, const Tiles& s,
                        const Arguments& a, const Place& at) {
  int first = 2 * at.lane;
  float end[2], before, later = start[first] + start[first + 1];
#pragma unroll
  for (int e = 0; e < 2; e++) {
    d_beta2[e] += s.columns[first + e] + s.ends[first + e];
    end[e] = s.ends[first + e] * s.beta2[first + e];
  }
  before = end[0] + end[1];
#pragma unroll
  for (int i = 1; i < 32; i <<= 1) {
    float down = __shfl_up_sync(~0u, before, i), up = __shfl_down_sync(~0u, later, i);
    before += at.lane >= i ? down : 0.f, later += at.lane + i < 32 ? up : 0.f;
  }
  before = __shfl_up_sync(~0u, before, 1), later = __shfl_down_sync(~0u, later, 1);
  before = at.lane > 0 ? before : 0.f, later = at.lane < 31 ? later : 0.f;
  later += start[first + 1];
  float gradient[2] = {s.sums[first] + before + (later + start[first]) + whole,
                       s.sums[first + 1] + (before + end[0]) + later + whole};
  if (dg == nullptr || at.thread >= 32) return;
#pragma unroll
  for (int e = 0; e < 2; e++)
    if (first + e < at.length) dg[(at.start + first + e) * a.heads + at.head] = gradient[e];
}

// Of z_t . k_j in `pairs` and do_t . v_j: the tiles z k^T o M and do v^T o M times their parts, and P_tj.
DEVICE void mask_pairs(float (&pairs)[C / 2], const float (&d_v)[C / 2], float part_v, float part_k, Tiles& s,
                       const Place& at) {
  u32 place = first_word(at);
  float mine[2] = {s.decay_u[at.row[0]], s.decay_u[at.row[1]]};
#pragma unroll
  for (int j = 0; j < C / 8; j++) {
    int column = 8 * j + at.column;
    float theirs[2] = {s.decay_u[column], s.decay_u[column + 1]};
#pragma unroll
    for (int b = 0; b < 2; b++) {
      float z_k[2], masked[2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        int i = 4 * j + 2 * b + e;
        float mask = power_of_two(mine[b] - theirs[e]);  // selected: an overflow above the diagonal is no matter
        mask = column + e <= at.row[b] ? mask : 0.f;
        z_k[e] = pairs[i] * mask, masked[e] = d_v[i] * mask;
        pairs[i] = z_k[e] * d_v[i];
        asm volatile("" : "+f"(pairs[i]));  // now: later would keep both factors
      }
      unsigned char* to = s.v + (place ^ j << 4) + b * 1024;
      *(u32*)to = pack(z_k[0] * part_v, z_k[1] * part_v);
      *(u32*)(to + C * C * 2) = pack(masked[0] * part_k, masked[1] * part_k);
    }
  }
}

// dv, written; the part of dk and of d(beta^2) through U, and dg. Leaves E of H, x and y on their way.
DEVICE void through_u(float (&dk)[K / 2], float (&d_beta2)[2], Tiles& s, const Largest& most,
                      const Arguments& a, const Place& at) {
  u32 keys = shared_address(s.k), z = shared_address(s.z), d_o = shared_address(s.d);
  u32 state = shared_address(s.state);
  float e_scale[V / 64], e_max = 0.f;
#pragma unroll
  for (int n = 0; n < V / 64; n++) {
    e_scale[n] = a.u_end_scales[at.state * (V / 64) + n];
    e_max = fmaxf(e_max, e_scale[n]);
  }
  float pairs[C / 2], d_v[C / 2], dv[V / 2];  // z_t . k_j, then P_tj; do_t . v_j
  {
    u32 left[V / 4];  // v, the columns of each block times its scale of E
#pragma unroll
    for (int k = 0; k < V / 16; k++) {
      float relative = e_scale[k / 4] * inverse(e_max);
      load_left(left + 4 * k, shared_address(s.v), k, at);
#pragma unroll
      for (int i = 0; i < 4; i++) left[4 * k + i] = times(left[4 * k + i], pack(relative, relative));
    }
    mma_begin();
    product_shared<V, false, true, C, C>(d_v, again(d_o), again(shared_address(s.v)), false);
    product_shared<K, false, true, C, C>(pairs, again(z), again(keys), false);
    product<V, 1, true, K>(dk, left, again(state), false);  // rows E v_j
    mma_commit();
    mma_wait<0>();
    hold(d_v), hold(pairs), hold(dk);
  }
  __syncthreads();  // nobody reads v any more
  float size_k = most.d * most.v * most.z * a.scale, size_v = most.z * most.k * most.d * a.scale;
  float bound_k = most.v * e_max, bound_v = most.k * e_max;
  float unit_k = fmaxf(fmaxf(fabsf(size_k), bound_k * FAINT), TINY);
  float unit_v = fmaxf(fmaxf(fabsf(size_v), bound_v * FAINT), TINY);
  float to_end[2];
  {
    float ends[2], past = __fdividef(bound_k, unit_k);
    dots_with_keys(ends, dk, s, at);
#pragma unroll
    for (int b = 0; b < 2; b++) {
      to_end[b] = power_of_two(s.decay_u[C - 1] - s.decay_u[at.row[b]]);
      if (at.lane % 4 == 0) s.ends[at.row[b]] = ends[b] * (to_end[b] * bound_k * most.k);
    }
#pragma unroll
    for (int i = 0; i < K / 2; i++) dk[i] *= to_end[i / 2 % 2] * past;
  }
  mask_pairs(pairs, d_v, __fdividef(size_v, unit_v), __fdividef(size_k, unit_k), s, again(at));
  publish_shared();
  __syncthreads();
  mma_begin();
  product_shared<K, false, false, C, K>(dv, again(keys), again(state), false);  // rows E^T k_j
  product_shared<C, true, false, C, C>(dk, again(s.tile(1)), again(z), true);
  mma_commit();
  mma_wait<0>();
  hold(dv), hold(dk);
  __syncthreads();  // nor E of U and z
  copy_state<K, K>(state, a.h_ends + at.state * K * K, again(at).thread);
  copy_rows(z, a.x, a.heads, at.head, again(at));
#pragma unroll
  for (int n = 0; n < V / 64; n++) {
    float part = __fdividef(most.k * e_scale[n], unit_v), past[2] = {to_end[0] * part, to_end[1] * part};
#pragma unroll
    for (int i = 32 * n; i < 32 * n + 32; i++) dv[i] *= past[i / 2 % 2];
  }
  mma_begin();
  product_shared<C, true, false, C, C>(dv, again(s.tile(0)), again(d_o), true);
  mma_commit();
  mma_wait<0>();
  hold(dv);
  __syncthreads();  // nor do and the tiles
  copy_rows(d_o, a.y, a.group_heads, at.head - a.first_head, again(at));
  float factor[2] = {s.beta2[at.row[0]], s.beta2[at.row[1]]};
#pragma unroll
  for (int b = 0; b < 2; b++) factor[b] *= unit_v;
  store_gradient<V>(a.dv, a.value_heads < a.heads, dv, factor, a, again(at));
  sum_pairs(pairs, (most.z * most.k) * (most.d * most.v) * a.scale, s, again(at));
  store_decay(a.dg, d_beta2, s.start_u, sum_of<V / 64>(a.u_wholes, at.state), s, a, again(at));
  factor[0] = s.beta2[at.row[0]] * unit_k, factor[1] = s.beta2[at.row[1]] * unit_k;
#pragma unroll
  for (int i = 0; i < K / 2; i++) dk[i] *= factor[i / 2 % 2];
  hold(dk);
}

// Largest magnitude of C numbers; every warp for itself.
DEVICE float chunk_largest(const float* x, const Place& at) {
  return warp_max(fmaxf(fabsf(x[at.lane]), fabsf(x[at.lane + 32])));
}

// The first tile M_jt w_t / max |w|, the second M_jt.
DEVICE void store_masks(Tiles& s, float less, const Place& at) {
  u32 place = first_word(at);
  float mine[2] = {s.decay_h[at.row[0]], s.decay_h[at.row[1]]};
  float part[2] = {s.w[at.row[0]] * less, s.w[at.row[1]] * less};
#pragma unroll
  for (int j = 0; j < C / 8; j++) {
    int column = 8 * j + at.column;
    float theirs[2] = {s.decay_h[column], s.decay_h[column + 1]};
#pragma unroll
    for (int b = 0; b < 2; b++) {
      float mask[2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        mask[e] = power_of_two(mine[b] - theirs[e]);
        mask[e] = column + e <= at.row[b] ? mask[e] : 0.f;
      }
      unsigned char* to = s.v + (place ^ j << 4) + b * 1024;
      *(u32*)to = pack(mask[0] * part[b], mask[1] * part[b]);
      *(u32*)(to + C * C * 2) = pack(mask[0], mask[1]);
    }
  }
}

// Left operands (M^T w M o K K^T) beta^2 and M beta^2, beta^2 relative to its maximum; (K K^T)^2 to the first tile.
DEVICE void ridge_operands(u32 (&full)[C / 4], u32 (&left)[C / 4], const float (&sum)[C / 2],
                           const float (&gram)[C / 2], float less, Tiles& s, const Place& at) {
  u32 place = first_word(at);
#pragma unroll
  for (int j = 0; j < C / 8; j++) {
    int column = 8 * j + at.column;
    float low = s.beta2[column] * less, high = s.beta2[column + 1] * less;
    u32 relative = pack(low, high);
#pragma unroll
    for (int b = 0; b < 2; b++) {
      int i = 4 * j + 2 * b;
      unsigned char* to = s.v + (place ^ j << 4) + b * 1024;
      full[2 * j + b] = pack(sum[i] * gram[i] * low, sum[i + 1] * gram[i + 1] * high);
      left[2 * j + b] = times(*(const u32*)(to + C * C * 2), relative);
      *(u32*)to = pack(gram[i] * gram[i], gram[i + 1] * gram[i + 1]);
    }
  }
}

// Of (W (K K^T)^2)_tj in `pairs`: P_tj of H; x_k and y_k weighted by M_jt and x's and y's scales to the tiles;
// the chunk-start state's part of each t.
DEVICE void weigh_pairs(float (&pairs)[C / 2], const float (&x_k)[C / 2], const float (&y_k)[C / 2], float size,
                        float k2, float less, float h_norm2, Tiles& s, const Place& at) {
  u32 place = first_word(at);
  float half_w[2], zeta[2], both[2], part[2], of_start[2], of_own[2], inner[2] = {0.f, 0.f};
#pragma unroll
  for (int b = 0; b < 2; b++) {
    half_w[b] = 0.5f * s.w[at.row[b]], zeta[b] = power_of_two(s.decay_h[at.row[b]]);
    of_start[b] = half_w[b] * zeta[b], of_own[b] = half_w[b] * size;
    both[b] = s.both[at.row[b]];
    part[b] = both[b] * less, both[b] *= k2;
  }
#pragma unroll
  for (int j = 0; j < C / 8; j++) {
    int column = 8 * j + at.column;
    float energy[2] = {s.energy[column], s.energy[column + 1]};
    float written[2] = {energy[0] * s.beta2[column], energy[1] * s.beta2[column + 1]};
#pragma unroll
    for (int b = 0; b < 2; b++) {
      unsigned char* to = s.v + (place ^ j << 4) + b * 1024;
      u32 pair = *(const u32*)(to + C * C * 2);
      float mask[2] = {low_half(pair), high_half(pair)}, of_x[2], of_y[2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        int i = 4 * j + 2 * b + e;
        inner[b] += mask[e] * written[e];
        float of_ridge = of_start[b] * energy[e] + of_own[b] * pairs[i];
        pairs[i] = -mask[e] * (of_ridge + x_k[i] * y_k[i] * both[b]);
        mask[e] *= part[b];
        of_x[e] = x_k[i] * mask[e], of_y[e] = y_k[i] * mask[e];
      }
      *(u32*)to = pack(of_x[0], of_x[1]);
      *(u32*)(to + C * C * 2) = pack(of_y[0], of_y[1]);
    }
  }
#pragma unroll
  for (int b = 0; b < 2; b++) {
    inner[b] = quad_sum(inner[b]) + zeta[b] * h_norm2;
    float start = -zeta[b] * (s.start_h[at.row[b]] + half_w[b] * inner[b]);
    __syncwarp();  // the quad has read its old value
    if (at.lane % 4 == 0) s.start_h[at.row[b]] = start;
  }
}

// Adds the part of dk through H, and that of d(beta^2); writes dg of H.
DEVICE void through_h(float (&dk)[K / 2], float (&d_beta2)[2], Tiles& s, float k_max, const Arguments& a,
                      const Place& at) {
  u32 keys = shared_address(s.k), state = shared_address(s.state);
  float k2 = k_max * k_max, w_max = chunk_largest(s.w, at), both_max = chunk_largest(s.both, at);
  float beta2_max = chunk_largest(s.beta2, at), less_beta2 = inverse(beta2_max);
  float h_scale = a.h_scales[at.state * a.h_blocks], e_scale = a.h_end_scales[at.state * a.h_blocks];
  float beta2[2] = {s.beta2[at.row[0]], s.beta2[at.row[1]]}, sum[C / 2], d[K / 2];
  copies_wait<2>();  // E of H is there
  publish_shared();
  __syncthreads();
  mma_begin();
  product_shared<K, false, true, C, K>(d, again(keys), again(state), false);
  product_shared<K, false, false, C, K>(d, again(keys), again(state), true);  // rows (E + E^T) k_j
  mma_commit();
  store_masks(s, inverse(w_max), again(at));
  mma_wait<0>();
  hold(d);
  publish_shared();
  __syncthreads();  // E of H is read
  copy_state<K, K>(state, a.h_states + at.state * K * K, at.thread);
  float gram[C / 2];
  mma_begin();
  product_shared<K, false, true, C, C>(gram, again(keys), again(keys), false);
  product_shared<C, true, false, C, C>(sum, again(s.tile(1)), again(s.tile(0)), false);  // sum_t M_jt w_t M_tj'
  mma_commit();
  {
    float ends[2], size[2];
    dots_with_keys(ends, d, s, at);
#pragma unroll
    for (int b = 0; b < 2; b++) {
      size[b] = power_of_two(s.decay_h[C - 1] - s.decay_h[at.row[b]]) * (k_max * e_scale);
      if (at.lane % 4 == 0) s.ends[at.row[b]] = ends[b] * (size[b] * k_max * 0.5f);
      size[b] *= beta2[b];
    }
#pragma unroll
    for (int i = 0; i < K / 2; i++) dk[i] += d[i] * size[i / 2 % 2];
  }
  mma_wait<0>();
  hold(gram), hold(sum);
  __syncthreads();  // the first tile is read
  u32 full[C / 4], left[C / 4];
  ridge_operands(full, left, sum, gram, less_beta2, s, again(at));
  publish_shared();
  __syncthreads();
  mma_begin();
  product<C, 1, false, C>(d, full, again(keys), false);
  product<C, 1, true, C>(sum, left, again(s.tile(0)), false);  // (W (K K^T)^2)_tj
  mma_commit();
  mma_wait<0>();
  hold(d), hold(sum);
  float size[2];
#pragma unroll
  for (int b = 0; b < 2; b++) size[b] = w_max * (beta2_max * k_max) * (beta2[b] * k_max) * k_max;
#pragma unroll
  for (int i = 0; i < K / 2; i++) dk[i] -= d[i] * size[i / 2 % 2];
  copies_wait<0>();  // x, y and H_[c] are there
  publish_shared();
  __syncthreads();
  mma_begin();
  product_shared<K, false, false, C, K>(d, again(keys), again(state), false);
  mma_commit();
  mma_wait<0>();
  hold(d);
  {
    float energy[2];
    dots_with_keys(energy, d, s, at);
#pragma unroll
    for (int b = 0; b < 2; b++) {
      size[b] = s.key_weight[at.row[b]] * (h_scale * k_max);
      if (at.lane % 4 == 0) s.energy[at.row[b]] = energy[b] * (h_scale * k2);
    }
#pragma unroll
    for (int i = 0; i < K / 2; i++) dk[i] -= d[i] * size[i / 2 % 2];
  }
  float x_k[C / 2], y_k[C / 2];
  mma_begin();
  product_shared<K, false, true, C, C>(x_k, again(shared_address(s.z)), again(keys), false);
  product_shared<K, false, true, C, C>(y_k, again(shared_address(s.d)), again(keys), false);
  mma_commit();
  mma_wait<0>();
  hold(x_k), hold(y_k);
  __syncthreads();  // energies are there
  weigh_pairs(sum, x_k, y_k, beta2_max * k2 * k2, k2, inverse(both_max), sum_of<K / 64>(a.h_norms, at.state), s,
              again(at));
  publish_shared();
  __syncthreads();
  mma_begin();
  product_shared<C, true, false, C, C>(d, again(s.tile(0)), again(shared_address(s.d)), false);
  product_shared<C, true, false, C, C>(d, again(s.tile(1)), again(shared_address(s.z)), true);
  mma_commit();
  mma_wait<0>();
  hold(d);
#pragma unroll
  for (int b = 0; b < 2; b++) size[b] = beta2[b] * k_max * both_max;
#pragma unroll
  for (int i = 0; i < K / 2; i++) dk[i] -= d[i] * size[i / 2 % 2];
  __syncthreads();  // the tiles are read
  sum_pairs(sum, 1.f, s, again(at));
  store_decay(a.dgk, d_beta2, s.start_h, sum_of<K / 64>(a.h_wholes, at.state), s, a, again(at));
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    gka_gradients(const __grid_constant__ Arguments a) {
  extern __shared__ unsigned char raw[];
  Tiles& s = *(Tiles*)(raw + (-(int)shared_address(raw) & 1023));
  Place at(a);
  stagger_blocks(a);
  float dk[K / 2], d_beta2[2] = {0.f, 0.f}, one[2] = {1.f, 1.f}, k_max;
  {
    Largest most = {a.k_maxima[at.state], largest_of<V / 64>(a.v_maxima, at.state), a.z_maxima[at.state],
                    largest_of<V / 64>(a.d_maxima, at.state)};
    k_max = most.k;
    load_tiles(s, most, a, at);
    copies_wait<0>();
    publish_shared();
    __syncthreads();
    through_u(dk, d_beta2, s, most, a, again(at));
  }
  through_h(dk, d_beta2, s, k_max, a, again(at));
  store_gradient<K>(a.dk, a.key_heads < a.heads, dk, one, a, again(at));
  if (a.d_beta2 == nullptr || at.thread >= 32) return;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    int row = 2 * at.lane + e;
    if (row < at.length) a.d_beta2[(at.start + row) * a.heads + at.head] = d_beta2[e];
  }
}
