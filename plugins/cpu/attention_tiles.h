/* The loops of attention.c for one instruction set: TARGET its attribute, LANES the floats of its vectors, NAME(x) the
 * names of what stands here. Products are contracted with their sums where the processor does that. */

typedef float NAME(Vector) __attribute__((vector_size(4 * LANES), aligned(4)));

#if LANES == 16 /* 32 registers */
#define MOST_VECTORS 5
#else
#define MOST_VECTORS 3
#endif

/* out[rows, columns] (= or +=) a[rows, depth] b[depth, columns], `vectors` (1 to MOST_VECTORS) vectors of columns. Rows of a, b
 * and out are a_row, b_row and out_row floats apart. */
TARGET INLINE void NAME(tile)(
    const int rows, const int vectors, int add, const float *a, int64_t a_row, const float *b, int64_t b_row,
    int64_t depth, float *out, int64_t out_row) {
  NAME(Vector) sum[6][MOST_VECTORS];
#pragma GCC unroll 6
  for (int row = 0; row < rows; row++)
#pragma GCC unroll 5
    for (int part = 0; part < vectors; part++) {
      NAME(Vector) *at = (NAME(Vector) *)(out + row * out_row + part * LANES);
      sum[row][part] = add ? *at : (NAME(Vector)){0};
    }
  for (int64_t i = 0; i < depth; i++, b += b_row) {
    NAME(Vector) column[MOST_VECTORS];
#pragma GCC unroll 5
    for (int part = 0; part < vectors; part++) column[part] = *(const NAME(Vector) *)(b + part * LANES);
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
      float x = a[row * a_row + i];
#pragma GCC unroll 5
      for (int part = 0; part < vectors; part++) sum[row][part] += x * column[part];
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < rows; row++)
#pragma GCC unroll 5
    for (int part = 0; part < vectors; part++)
      *(NAME(Vector) *)(out + row * out_row + part * LANES) = sum[row][part];
}

/* The same for any number of rows, and columns that are a multiple of LANES: tiles of as many sums as there are
 * registers for. */
TARGET static void NAME(product)(
    int add, const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t depth, float *out, int64_t out_row,
    int64_t rows, int64_t columns) {
#define TILE(rows, vectors) NAME(tile)(rows, vectors, add, a_at, a_row, b + column, b_row, depth, out_at, out_row)
  int64_t vectors = columns / LANES, wide = vectors % 2 && vectors % 3 == 0 ? 3 : 2;
  if (vectors % MOST_VECTORS == 0) wide = MOST_VECTORS;
  int64_t tall = wide > 2 ? 4 : 6;
  for (int64_t column = 0; column < columns; column += wide * LANES) {
    int64_t here = (columns - column) / LANES < wide ? 1 : wide, count = 0;
    for (int64_t row = 0; row < rows; row += count) {
      const float *a_at = a + row * a_row;
      float *out_at = out + row * out_row + column;
      count = rows - row >= tall ? tall : 1;
      if (here > 3) count == 1 ? TILE(1, MOST_VECTORS) : TILE(4, MOST_VECTORS);
      else if (count == 1) here == 3 ? TILE(1, 3) : here == 2 ? TILE(1, 2) : TILE(1, 1);
      else here == 3 ? TILE(4, 3) : here == 2 ? TILE(6, 2) : TILE(6, 1);
    }
  }
#undef TILE
}
#undef MOST_VECTORS

/* Whole vectors of scores -> exp(scores - largest), 0 where that is below exp(-bound); returns the sum. */
TARGET static float NAME(weights)(float *scores, float largest, float bound, int64_t n) {
  float lanes[LANES] = {0};
  for (int64_t i = 0; i < n; i += LANES) {
    float weights[LANES];
    FEW_ELEMENTS
    for (int j = 0; j < LANES; j++) {
      float x = scores[i + j] - largest, kept = -bound > x ? -bound : x;
      /* NaN stays, by the difference: exp, which adds to bits, makes numbers of many. */
      weights[j] = kept_bits(exponential(kept), !(x < -bound)) + (kept - kept);
    }
    FEW_ELEMENTS
    for (int j = 0; j < LANES; j++) lanes[j] += weights[j], scores[i + j] = weights[j];
  }
  return sum_of_lanes(lanes, LANES);
}

/* Of whole vectors; NaN is none. */
TARGET static float NAME(largest)(const float *x, float start, int64_t n) {
  enum { AT_ONCE = 4 * LANES }; /* so many that their maxima do not wait for each other */
  float lanes[AT_ONCE];
  int64_t i = 0;
  for (int j = 0; j < AT_ONCE; j++) lanes[j] = start;
  for (; i + AT_ONCE <= n; i += AT_ONCE) {
    FEW_ELEMENTS
    for (int j = 0; j < AT_ONCE; j++) lanes[j] = larger(x[i + j], lanes[j]);
  }
  for (; i < n; i += LANES) {
    FEW_ELEMENTS
    for (int j = 0; j < LANES; j++) lanes[j] = larger(x[i + j], lanes[j]);
  }
  return largest_of_lanes(lanes, AT_ONCE);
}

TARGET static void NAME(add_to)(float *x, const float *y, int64_t n) {
  ELEMENTWISE
  for (int64_t i = 0; i < n; i++) x[i] += y[i];
}

TARGET static void NAME(scale_to)(const float *x, float factor, int64_t n, float *out) {
  ELEMENTWISE
  for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor;
}

TARGET static void NAME(divide_to)(const float *x, float by, int64_t n, float *out) {
  ELEMENTWISE
  for (int64_t i = 0; i < n; i++) out[i] = x[i] / by;
}

/* b[n, m] = a[m, n]', rows of a `row` floats apart, those of b KEYS. */
TARGET static void NAME(turn)(const float *a, int64_t m, int64_t n, float *b) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < m; j++) b[i * KEYS + j] = a[j * n + i];
}

static const Loops NAME(loops) = {
    LANES,        NAME(product),  NAME(weights),   NAME(largest),
    NAME(add_to), NAME(scale_to), NAME(divide_to), NAME(turn)};
