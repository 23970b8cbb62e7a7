/* The loops of half_gemm.c for one instruction set: TARGET its attribute, LANES the floats of its vectors, NAME(x) the
 * names of what stands here. */

typedef float NAME(Vector) __attribute__((vector_size(4 * LANES), aligned(4)));

/* LANES numbers of float16. Neither way takes a denormal one for 0, whatever the processor is told to do with those of
 * float32. */
TARGET INLINE NAME(Vector) NAME(wide)(const uint16_t *half) {
#if LANES == 16
  return (NAME(Vector))_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i_u *)half));
#elif LANES == 8
  return (NAME(Vector))_mm256_cvtph_ps(_mm_loadu_si128((const __m128i_u *)half));
#else
  NAME(Vector) numbers;
  for (int i = 0; i < LANES; i++) numbers[i] = widened(half[i]);
  return numbers;
#endif
}

TARGET static void NAME(decode)(const uint16_t *half, int64_t n, float *out) {
  for (int64_t i = 0; i < n; i += LANES) *(NAME(Vector) *)(out + i) = NAME(wide)(half + i);
}

/* sums[count, 16] = x[count, k] w[k, 16]; rows of x are k floats apart. w is given as `half`, or decoded. */
TARGET INLINE void NAME(tile)(
    const int count, const float *x, const uint16_t *half, const float *w, int64_t k, float *sums) {
  enum { VECTORS = HALF_PANEL / LANES };
  NAME(Vector) sum[6][VECTORS];
#pragma GCC unroll 6
  for (int row = 0; row < count; row++)
#pragma GCC unroll 4
    for (int part = 0; part < VECTORS; part++) sum[row][part] = (NAME(Vector)){0};
  for (int64_t i = 0, at = 0; i < k; i++, at += HALF_PANEL) {
    NAME(Vector) column[VECTORS];
#pragma GCC unroll 4
    for (int part = 0; part < VECTORS; part++) {
      if (half) column[part] = NAME(wide)(half + at + part * LANES);
      else column[part] = *(const NAME(Vector) *)(w + at + part * LANES);
    }
#pragma GCC unroll 6
    for (int row = 0; row < count; row++) {
      float value = x[row * k + i];
#pragma GCC unroll 4
      for (int part = 0; part < VECTORS; part++) sum[row][part] += value * column[part];
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < count; row++)
#pragma GCC unroll 4
    for (int part = 0; part < VECTORS; part++)
      *(NAME(Vector) *)(sums + row * HALF_PANEL + part * LANES) = sum[row][part];
}

TARGET static void NAME(product)(
    int count, const float *x, const uint16_t *half, const float *w, int64_t k, float *sums) {
  if (count == 6) NAME(tile)(6, x, NULL, w, k, sums);
  else if (half) count == 2 ? NAME(tile)(2, x, half, NULL, k, sums) : NAME(tile)(1, x, half, NULL, k, sums);
  else count == 2 ? NAME(tile)(2, x, NULL, w, k, sums) : NAME(tile)(1, x, NULL, w, k, sums);
}

static const Loops NAME(loops) = {NAME(decode), NAME(product)};
