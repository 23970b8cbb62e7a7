/* Sixteen numbers at once, in as many registers as the processor needs for them: GCC and Clang make their operations of
 * the vectors that there are. */
#ifndef FPQ_SPAN_H
#define FPQ_SPAN_H

#include <stdint.h>
#include <string.h>

#include "variants.h"

enum { SPAN = 16 };

typedef float Span __attribute__((vector_size(4 * SPAN), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * SPAN), aligned(4), may_alias));
typedef uint32_t Modulo __attribute__((vector_size(4 * SPAN), aligned(4), may_alias)); /* 2^32 */
typedef uint8_t Bytes __attribute__((vector_size(SPAN), aligned(1), may_alias));

/* The first `count` of a span; the others are 0. count: a constant where this is inlined for whole spans. */
INLINE void load_span(Span *x, const float *from, const int64_t count) {
  if (count == SPAN) {
    *x = *(const Span *)from;
    return;
  }
  float numbers[SPAN] = {0};
  memcpy(numbers, from, (size_t)count * sizeof *numbers);
  *x = *(const Span *)numbers;
}

INLINE void store_span(const Span *x, float *to, const int64_t count) {
  if (count == SPAN) *(Span *)to = *x;
  else memcpy(to, x, (size_t)count * sizeof *to);
}

INLINE float larger(float x, float y) { return x > y ? x : y; } /* the second where one is NaN */
INLINE int32_t larger_integer(int32_t x, int32_t y) { return x > y ? x : y; }

/* Sums and maxima of 64 or fewer lanes, half by half: compilers make vectors of each step by itself. */
#define HALVE(step, n)                                                                                                 \
  if (lanes > n) FEW_ELEMENTS                                                                                          \
    for (int i = 0; i < n; i++) x[i] = step(x[i + n], x[i]);
#define REDUCTION(name, type, step)                                                                                    \
  INLINE type name(type *x, const int lanes) {                                                                         \
    HALVE(step, 32) HALVE(step, 16) HALVE(step, 8) HALVE(step, 4)                                                      \
    return step(step(x[0], x[2]), step(x[1], x[3]));                                                                   \
  }
#define ADDED(x, y) ((x) + (y))
REDUCTION(sum_of_lanes, float, ADDED)
REDUCTION(largest_of_lanes, float, larger)
REDUCTION(largest_integer_of_lanes, int32_t, larger_integer)
#undef ADDED
#undef REDUCTION
#undef HALVE

/* The low byte of each. */
INLINE void store_bytes(const Integers *x, uint8_t *to) {
  *(Bytes *)to = __builtin_convertvector((Modulo)*x & 255, Bytes);
}

#endif
