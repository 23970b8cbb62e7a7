/* The loops of half_gemm.c for one instruction set: TARGET its attribute, LANES the floats of its vectors, NAME(x) the
 * names of what stands here. */

typedef float NAME(Vector) __attribute__((vector_size(4 * LANES), aligned(4)));

/* float16 -> float32. No step of it meets a denormal float32, which a processor may be told to take for 0. */
TARGET static void NAME(decode)(const uint16_t *half, int64_t n, float *out) {
  ELEMENTWISE
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = half[i], magnitude = bits & 0x7fff, sign = (bits & 0x8000) << 16;
    float small = (float)(int32_t)magnitude * 0x1p-24f;
    uint32_t wide = (magnitude << 13) + (112u << 23) + (magnitude < 0x7c00 ? 0 : 112u << 23), narrow;
    memcpy(&narrow, &small, sizeof narrow);
    wide = (magnitude < 0x400 ? narrow : wide) | sign;
    memcpy(out + i, &wide, sizeof wide);
  }
}

/* sums[count, 16] = x[count, k] w[k, 16]; rows of x are k floats apart. */
TARGET INLINE void NAME(tile)(const int count, const float *x, const float *w, int64_t k, float *sums) {
  enum { VECTORS = HALF_PANEL / LANES };
  NAME(Vector) sum[6][VECTORS];
#pragma GCC unroll 6
  for (int row = 0; row < count; row++)
#pragma GCC unroll 4
    for (int part = 0; part < VECTORS; part++) sum[row][part] = (NAME(Vector)){0};
  for (int64_t i = 0; i < k; i++, w += HALF_PANEL) {
    NAME(Vector) column[VECTORS];
#pragma GCC unroll 4
    for (int part = 0; part < VECTORS; part++) column[part] = *(const NAME(Vector) *)(w + part * LANES);
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

TARGET static void NAME(product)(int count, const float *x, const float *w, int64_t k, float *sums) {
  if (count == 6) NAME(tile)(6, x, w, k, sums);
  else if (count == 2) NAME(tile)(2, x, w, k, sums);
  else NAME(tile)(1, x, w, k, sums);
}

static const Loops NAME(loops) = {NAME(decode), NAME(product)};
