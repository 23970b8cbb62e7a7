/* Rows into lanes and back, for one instruction set: TARGET its attribute, LANES the floats of its vectors, NAME(x) the
 * names of what stands here. */

typedef float NAME(Vector) __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t NAME(Integers) __attribute__((vector_size(4 * LANES), aligned(4)));

#if LANES == 16
#define FIRST_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define SECOND_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define FIRST_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define SECOND_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define FIRST_HALVES 0, 4, 1, 5
#define SECOND_HALVES 2, 6, 3, 7
#endif
#if defined(__clang__)
#define INTERLEAVED(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define INTERLEAVED(x, y, ...) __builtin_shuffle(x, y, (NAME(Integers)){__VA_ARGS__})
#endif

/* LANES vectors of LANES lanes, transposed: each step takes the highest bit of a row's number to the lowest of a lane's,
 * and the highest of the lane's to the lowest of the row's. */
TARGET INLINE void NAME(transpose)(NAME(Vector) *x) {
#pragma GCC unroll 4
  for (int step = 1; step < LANES; step *= 2) {
    NAME(Vector) y[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
      y[2 * i] = INTERLEAVED(x[i], x[i + LANES / 2], FIRST_HALVES);
      y[2 * i + 1] = INTERLEAVED(x[i], x[i + LANES / 2], SECOND_HALVES);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) x[i] = y[i];
  }
}
#undef INTERLEAVED
#undef SECOND_HALVES
#undef FIRST_HALVES

/* The first of LANES channels: of the last ones, such that they end with the last. */
#define AT_MOST(i, last) ((i) < (last) ? (i) : (last))

/* to[columns, width] = from[rows, columns]', rows `apart` floats from each other; lanes beyond the rows get those of the
 * last row. Bits stay. */
TARGET static void NAME(turn)(
    const float *from, int64_t apart, int64_t rows, int64_t columns, float *to, int64_t width) {
  for (int64_t row = 0; row < width; row += LANES) {
    if (columns < LANES)
      for (int64_t i = row; i < row + LANES; i++)
        for (int64_t j = 0; j < columns; j++)
          memcpy(to + j * width + i, from + AT_MOST(i, rows - 1) * apart + j, sizeof *to);
    for (int64_t i = 0; columns >= LANES && i < columns; i += LANES) {
      const int64_t column = AT_MOST(i, columns - LANES);
      NAME(Vector) x[LANES];
#pragma GCC unroll 16
      for (int j = 0; j < LANES; j++) x[j] = *(const NAME(Vector) *)(from + AT_MOST(row + j, rows - 1) * apart + column);
      NAME(transpose)(x);
#pragma GCC unroll 16
      for (int j = 0; j < LANES; j++) *(NAME(Vector) *)(to + (column + j) * width + row) = x[j];
    }
  }
}

/* to[rows, columns] = (from[columns, width] factor[width])', the first `rows` lanes of it. */
TARGET static void NAME(turn_back)(
    const float *from, int64_t width, const float *factor, int64_t rows, int64_t columns, float *to) {
  for (int64_t row = 0; row < rows; row += LANES) {
    const NAME(Vector) of_rows = *(const NAME(Vector) *)(factor + row);
    if (columns < LANES)
      for (int64_t i = row; i < AT_MOST(row + LANES, rows); i++)
        for (int64_t j = 0; j < columns; j++) to[i * columns + j] = from[j * width + i] * factor[i];
    for (int64_t i = 0; columns >= LANES && i < columns; i += LANES) {
      const int64_t column = AT_MOST(i, columns - LANES);
      NAME(Vector) x[LANES];
#pragma GCC unroll 16
      for (int j = 0; j < LANES; j++) x[j] = *(const NAME(Vector) *)(from + (column + j) * width + row) * of_rows;
      NAME(transpose)(x);
#pragma GCC unroll 16
      for (int j = 0; j < LANES; j++)
        if (row + j < rows) *(NAME(Vector) *)(to + (row + j) * columns + column) = x[j];
    }
  }
}
#undef AT_MOST
