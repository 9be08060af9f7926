// Fragments to and from memory in float16 with one scale per row.

// Largest entry of each of the thread's rows; one where all are zero.
template <int N>
DEVICE void row_maxima(float (&largest)[2], const float (&d)[N]) {
  largest[0] = largest[1] = 0.f;
#pragma unroll
  for (int i = 0; i < N; i++) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], fabsf(d[i]));
#pragma unroll
  for (int b = 0; b < 2; b++) {
    largest[b] = quad_max(largest[b]);
    largest[b] = largest[b] > TINY ? largest[b] : 1.f;
  }
}

// d / its row maxima as a left operand.
template <int N>
DEVICE void scale_rows(u32 (&a)[N / 2], float (&largest)[2], const float (&d)[N]) {
  row_maxima(largest, d);
  float inverse[2] = {__fdividef(1.f, largest[0]), __fdividef(1.f, largest[1])};
#pragma unroll
  for (int i = 0; i < N / 2; i++) a[i] = pack(d[2 * i] * inverse[i % 2], d[2 * i + 1] * inverse[i % 2]);
}

// Row dots of two fragments.
template <int N>
DEVICE void row_dots(float (&dot)[2], const float (&a)[N], const float (&b)[N]) {
  dot[0] = dot[1] = 0.f;
#pragma unroll
  for (int i = 0; i < N; i++) dot[i / 2 % 2] += a[i] * b[i];
  dot[0] = quad_sum(dot[0]), dot[1] = quad_sum(dot[1]);
}

// A left operand [C, D] to an array [tokens, H, D] of float16, its scales to [tokens, H].
template <int D>
DEVICE void store_scaled(u16* array, float* scales, const u32 (&a)[D / 4], const float (&largest)[2],
                         const Arguments& arguments, const Place& at) {
#pragma unroll
  for (int b = 0; b < 2; b++) {
    if (!at.valid(b)) continue;
    long long token = at.token(arguments, b);
#pragma unroll
    for (int j = 0; j < D / 8; j++) *(u32*)(array + token * D + 8 * j + at.column) = a[2 * j + b];
    if (at.lane % 4 == 0) scales[token] = largest[b];
  }
}

// A float32 fragment, times a factor for each row, to an array of the inputs' dtype.
template <int D>
DEVICE void store_fragment(u16* array, const float (&d)[D / 2], const float (&factor)[2],
                           const Arguments& arguments, const Place& at) {
#pragma unroll
  for (int b = 0; b < 2; b++) {
    if (!at.valid(b)) continue;
    u16* to = array + at.token(arguments, b) * D + at.column;
#pragma unroll
    for (int j = 0; j < D / 8; j++)
      *(u32*)(to + 8 * j) = narrow(d[4 * j + 2 * b] * factor[b], d[4 * j + 2 * b + 1] * factor[b]);
  }
}

// alpha of the thread's two tokens; one without the gate.
DEVICE void load_alpha(float (&alpha)[2], const Arguments& a, const Place& at) {
#pragma unroll
  for (int b = 0; b < 2; b++)
    alpha[b] = a.alpha == nullptr ? 1.f : a.alpha[at.token(a, b)];
}
