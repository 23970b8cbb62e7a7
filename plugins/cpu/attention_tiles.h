/* The loops of attention.c for one instruction set: TARGET its attribute, LANES the floats of its vectors, NAME(x) the
 * names of what stands here. Products are contracted with their sums where the processor does that. */

typedef float NAME(Vector) __attribute__((vector_size(4 * LANES), aligned(4)));

TARGET INLINE NAME(Vector) NAME(same)(float x) { return (NAME(Vector)){0} + x; }

/* out[rows, columns] (= or +=) a[rows, depth] b[depth, columns], `vectors` (1 or 2) vectors of columns. Rows of a, b
 * and out are a_row, b_row and out_row floats apart. */
TARGET INLINE void NAME(tile)(
    const int rows, const int vectors, int add, const float *a, int64_t a_row, const float *b, int64_t b_row,
    int64_t depth, float *out, int64_t out_row) {
  NAME(Vector) sum[6][2];
  for (int row = 0; row < rows; row++)
    for (int part = 0; part < vectors; part++) {
      NAME(Vector) *at = (NAME(Vector) *)(out + row * out_row + part * LANES);
      sum[row][part] = add ? *at : NAME(same)(0);
    }
  for (int64_t i = 0; i < depth; i++, b += b_row) {
    NAME(Vector) left = *(const NAME(Vector) *)b, right = left;
    if (vectors == 2) right = *(const NAME(Vector) *)(b + LANES);
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
      NAME(Vector) x = NAME(same)(a[row * a_row + i]);
      sum[row][0] += x * left;
      if (vectors == 2) sum[row][1] += x * right;
    }
  }
  for (int row = 0; row < rows; row++)
    for (int part = 0; part < vectors; part++)
      *(NAME(Vector) *)(out + row * out_row + part * LANES) = sum[row][part];
}

/* The same for any number of rows, and columns that are a multiple of LANES. */
TARGET static void NAME(product)(
    int add, const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t depth, float *out, int64_t out_row,
    int64_t rows, int64_t columns) {
  for (int64_t column = 0; column < columns; column += 2 * LANES) {
    int both = columns - column > LANES;
    int64_t row = 0;
    for (; row + 6 <= rows; row += 6)
      if (both) NAME(tile)(6, 2, add, a + row * a_row, a_row, b + column, b_row, depth, out + row * out_row + column, out_row);
      else NAME(tile)(6, 1, add, a + row * a_row, a_row, b + column, b_row, depth, out + row * out_row + column, out_row);
    for (; row < rows; row++)
      if (both) NAME(tile)(1, 2, add, a + row * a_row, a_row, b + column, b_row, depth, out + row * out_row + column, out_row);
      else NAME(tile)(1, 1, add, a + row * a_row, a_row, b + column, b_row, depth, out + row * out_row + column, out_row);
  }
}

/* scores -> exp(scores - largest), 0 where that is below exp(-bound); returns the sum. */
TARGET static float NAME(weights)(float *scores, float largest, float bound, int64_t n) {
  float lanes[LANES] = {0};
  int64_t whole = n - n % LANES;
  ELEMENTWISE
  for (int64_t i = 0; i < n; i++) {
    float x = scores[i] - largest, kept = -bound > x ? -bound : x;
    float y = exponential(kept);
    scores[i] = x < -bound ? 0.0f : y;
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
