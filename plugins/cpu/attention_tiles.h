/* The loops of attention.c for one instruction set: TARGET its attribute, LANES the floats of its vectors, NAME(x) the
 * names of what stands here. Products are contracted with their sums where the processor does that. */

typedef float NAME(Vector) __attribute__((vector_size(4 * LANES), aligned(4)));

/* out[rows, columns] (= or +=) a[rows, depth] b[depth, columns], `vectors` (1 to 3) vectors of columns. Rows of a, b
 * and out are a_row, b_row and out_row floats apart. */
TARGET INLINE void NAME(tile)(
    const int rows, const int vectors, int add, const float *a, int64_t a_row, const float *b, int64_t b_row,
    int64_t depth, float *out, int64_t out_row) {
  NAME(Vector) sum[6][3];
#pragma GCC unroll 6
  for (int row = 0; row < rows; row++)
#pragma GCC unroll 3
    for (int part = 0; part < vectors; part++) {
      NAME(Vector) *at = (NAME(Vector) *)(out + row * out_row + part * LANES);
      sum[row][part] = add ? *at : (NAME(Vector)){0};
    }
  for (int64_t i = 0; i < depth; i++, b += b_row) {
    NAME(Vector) column[3];
#pragma GCC unroll 3
    for (int part = 0; part < vectors; part++) column[part] = *(const NAME(Vector) *)(b + part * LANES);
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
      float x = a[row * a_row + i];
#pragma GCC unroll 3
      for (int part = 0; part < vectors; part++) sum[row][part] += x * column[part];
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < rows; row++)
#pragma GCC unroll 3
    for (int part = 0; part < vectors; part++)
      *(NAME(Vector) *)(out + row * out_row + part * LANES) = sum[row][part];
}

/* The same for any number of rows, and columns that are a multiple of LANES: tiles of as many sums as there are
 * registers for. */
TARGET static void NAME(product)(
    int add, const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t depth, float *out, int64_t out_row,
    int64_t rows, int64_t columns) {
#define TILE(rows, vectors) NAME(tile)(rows, vectors, add, a_at, a_row, b + column, b_row, depth, out_at, out_row)
  int64_t vectors = columns / LANES, wide = vectors % 2 && vectors % 3 == 0 ? 3 : 2, tall = wide == 3 ? 4 : 6;
  for (int64_t column = 0; column < columns; column += wide * LANES) {
    int64_t here = (columns - column) / LANES < wide ? 1 : wide, count = 0;
    for (int64_t row = 0; row < rows; row += count) {
      const float *a_at = a + row * a_row;
      float *out_at = out + row * out_row + column;
      count = rows - row >= tall ? tall : 1;
      if (count == 1) here == 3 ? TILE(1, 3) : here == 2 ? TILE(1, 2) : TILE(1, 1);
      else here == 3 ? TILE(4, 3) : here == 2 ? TILE(6, 2) : TILE(6, 1);
    }
  }
#undef TILE
}

/* scores -> exp(scores - largest), 0 where that is below exp(-bound); returns the sum. */
TARGET static float NAME(weights)(float *scores, float largest, float bound, int64_t n) {
  float lanes[LANES] = {0};
  int64_t whole = n - n % LANES;
  ELEMENTWISE
  for (int64_t i = 0; i < n; i++) {
    float x = scores[i] - largest, kept = -bound > x ? -bound : x;
    scores[i] = kept_bits(exponential(kept), !(x < -bound)); /* NaN stays */
  }
  for (int64_t i = 0; i < whole; i += LANES)
    for (int j = 0; j < LANES; j++) lanes[j] += scores[i + j];
  for (int64_t i = whole; i < n; i++) lanes[i - whole] += scores[i];
  float sum = 0;
  for (int j = 0; j < LANES; j++) sum += lanes[j];
  return sum;
}

TARGET static float NAME(largest)(const float *x, float start, int64_t n) {
  float lanes[LANES], largest = start;
  int64_t whole = n - n % LANES;
  for (int j = 0; j < LANES; j++) lanes[j] = start;
  for (int64_t i = 0; i < whole; i += LANES)
    for (int j = 0; j < LANES; j++) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  for (int64_t i = whole; i < n; i++) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
  for (int j = 0; j < LANES; j++) largest = lanes[j] > largest ? lanes[j] : largest;
  return largest;
}

TARGET static void NAME(add_to)(float *x, const float *y, int64_t n) {
  ELEMENTWISE
  for (int64_t i = 0; i < n; i++) x[i] += y[i];
}

TARGET static void NAME(scale_to)(float *x, float factor, int64_t n) {
  ELEMENTWISE
  for (int64_t i = 0; i < n; i++) x[i] *= factor;
}

/* b[n, m] = a[m, n]', rows of a `row` floats apart, those of b KEYS. */
TARGET static void NAME(turn)(const float *a, int64_t m, int64_t n, float *b) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < m; j++) b[i * KEYS + j] = a[j * n + i];
}

static const Loops NAME(loops) = {
    LANES, NAME(product), NAME(weights), NAME(largest), NAME(add_to), NAME(scale_to), NAME(turn)};
