/* The loops of attention.c for one instruction set: TARGET its attribute, LANES the floats of its vectors, ROWS of a tile
 * of VECTORS vectors as its registers hold, NAME(x) the names of what stands here. Products are contracted with their
 * sums where the processor does that. */

#include "attention_turn.h"

/* --- products ------------------------------------------------------------------------------------------------------ */

/* out[rows, width] (times `factor` [width], unless that is NULL: what was there counts nothing) + a[rows, depth]
 * b[depth, width], `vectors` of the columns. An element of a is row * a_row + i * a_step floats from its first. */
TARGET INLINE void NAME(tile)(
    const int rows, const int vectors, const float *a, const int64_t a_row, const int64_t a_step, const float *b,
    int64_t depth, const float *factor, int64_t width, float *out) {
  NAME(Vector) sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int row = 0; row < rows; row++)
#pragma GCC unroll 3
    for (int part = 0; part < vectors; part++) {
      if (factor) {
        const NAME(Vector) before = *(const NAME(Vector) *)(out + row * width + part * LANES);
        sum[row][part] = before * *(const NAME(Vector) *)(factor + part * LANES);
      } else sum[row][part] = (NAME(Vector)){0};
    }
  for (int64_t i = 0; i < depth; i++, a += a_step, b += width) {
    NAME(Vector) column[VECTORS];
#pragma GCC unroll 3
    for (int part = 0; part < vectors; part++) column[part] = *(const NAME(Vector) *)(b + part * LANES);
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) {
      const float x = a[row * a_row];
#pragma GCC unroll 3
      for (int part = 0; part < vectors; part++) sum[row][part] += x * column[part];
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < rows; row++)
#pragma GCC unroll 3
    for (int part = 0; part < vectors; part++)
      *(NAME(Vector) *)(out + row * width + part * LANES) = sum[row][part];
}

/* The same for a panel of `vectors` vectors and any number of rows. */
TARGET INLINE void NAME(product)(
    const int vectors, const float *a, int64_t rows, const int64_t a_row, const int64_t a_step, const float *b,
    int64_t depth, const float *factor, float *out) {
  const int64_t width = vectors * LANES;
  int64_t row = 0;
  for (; row + ROWS <= rows; row += ROWS)
    NAME(tile)(ROWS, vectors, a + row * a_row, a_row, a_step, b, depth, factor, width, out + row * width);
  for (; row < rows; row++)
    NAME(tile)(1, vectors, a + row * a_row, a_row, a_step, b, depth, factor, width, out + row * width);
}

#define OF_EACH_WIDTH(...)                                                                                             \
  switch (width / LANES) {                                                                                             \
    case 1: NAME(product)(1, __VA_ARGS__); break;                                                                      \
    case 2: NAME(product)(2, __VA_ARGS__); break;                                                                      \
    default: NAME(product)(VECTORS, __VA_ARGS__);                                                                      \
  }

/* scores [keys, width] = k [keys, size] q [size, width] */
TARGET static void NAME(scores)(
    const float *k, int64_t keys, int64_t size, const float *q, int64_t width, float *scores) {
  OF_EACH_WIDTH(k, keys, size, 1, q, size, NULL, scores)
}

/* sums [size, width] = sums factor + v [keys, size]' weights [keys, width] */
TARGET static void NAME(add)(
    const float *v, int64_t keys, int64_t size, const float *weights, const float *factor, int64_t width, float *sums) {
  OF_EACH_WIDTH(v, size, 1, size, weights, keys, factor, sums)
}
#undef OF_EACH_WIDTH

/* --- weights ------------------------------------------------------------------------------------------------------- */

/* The second where one is NaN. */
TARGET INLINE NAME(Vector) NAME(larger)(NAME(Vector) x, NAME(Vector) y) {
  float lanes[LANES];
  const float *of_x = (const float *)&x, *of_y = (const float *)&y;
  FEW_ELEMENTS
  for (int i = 0; i < LANES; i++) lanes[i] = larger(of_x[i], of_y[i]);
  return *(const NAME(Vector) *)lanes;
}

/* exp(x) for x <= 0, 0 for x below about LEAST_EXPONENT + ln(2) / 2: x = n ln 2 + r. NaN stays: it meets the last
 * product. One constant is enough for ln 2: its error is 2^-28.7 of a product that is fused, or rounded once. */
TARGET INLINE NAME(Vector) NAME(exp)(NAME(Vector) x) {
  /* Adding it rounds to an integer, ties to even, and leaves that less LEAST in the lowest bits. */
  const float magic = MAGIC - LEAST;
  const NAME(Vector) least = (NAME(Vector)){0} + LEAST_EXPONENT;
  x = NAME(larger)(least, x);
  const NAME(Vector) shifted = x * LOG2_E + magic, r = x - (shifted - magic) * LN_2;
  NAME(Vector) p = (NAME(Vector)){0} + TWICE_EXP[0];
#pragma GCC unroll 6
  for (int i = 1; i < 7; i++) p = p * r + TWICE_EXP[i];
  return p * (NAME(Vector))((NAME(Integers))shifted << 23); /* 2^(n - 1); 0 of LEAST */
}

/* Scores [keys, width] -> weights; what a query's sums are to be multiplied with because its largest score has grown. A
 * query without any key so far has the weights 0 and the factor 0. */
TARGET static void NAME(weigh)(
    float *scores, int64_t keys, int64_t width, float *largest, float *total, float *factor) {
  for (int64_t at = 0; at < width; at += LANES) {
    const NAME(Vector) before = *(const NAME(Vector) *)(largest + at);
    NAME(Vector) sum = {0}, now = before, other = before; /* two, that do not wait for each other */
    for (int64_t i = at; i < keys * width; i += 2 * width) {
      const int64_t next = i + width < keys * width ? i + width : i;
      now = NAME(larger)(*(const NAME(Vector) *)(scores + i), now);
      other = NAME(larger)(*(const NAME(Vector) *)(scores + next), other);
    }
    now = NAME(larger)(other, now);
    *(NAME(Vector) *)(largest + at) = now;
    now = (NAME(Vector))((NAME(Integers))now & (now > -INFINITY));
    for (int64_t i = at; i < keys * width; i += width) {
      NAME(Vector) *score = (NAME(Vector) *)(scores + i);
      *score = NAME(exp)(*score - now);
      sum += *score;
    }
    const NAME(Vector) kept = NAME(exp)(before - now);
    *(NAME(Vector) *)(factor + at) = kept;
    *(NAME(Vector) *)(total + at) = *(const NAME(Vector) *)(total + at) * kept + sum;
  }
}

TARGET static void NAME(scale)(float *x, float factor, int64_t n) {
  ELEMENTWISE
  for (int64_t i = 0; i < n; i++) x[i] *= factor;
}

static const Loops NAME(loops) = {LANES,        NAME(turn),  NAME(scale), NAME(turn_back),
                                  NAME(scores), NAME(weigh), NAME(add)};
