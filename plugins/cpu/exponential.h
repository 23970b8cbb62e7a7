/* exp for loops that compilers vectorize. */
#ifndef FPQ_EXPONENTIAL_H
#define FPQ_EXPONENTIAL_H

#include <stdint.h>
#include <string.h>

static const float MAGIC = 12582912.0f;   /* 1.5 * 2^23: adding and subtracting it rounds to an integer, ties to even */
static const float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;
static const float EXP_BOUND = 87.0f;     /* exp of it and of its negative are normal numbers */

static inline float from_bits(int32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

/* exp for |x| <= 87: x = n ln 2 + r, 1 + r + r^2 times a polynomial in r, times 2^n by adding to the exponent. The
 * polynomial of degree 4 is fitted to the least relative error, 2^-28; with all roundings it is below 2^-23, contracted or
 * not. */
static inline float exponential(float x) {
  float shifted = x * LOG2_E + MAGIC, n = shifted - MAGIC;
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts, the first exact in n * part */
  float p = 1.3814595e-3f;
  p = p * r + 8.3687175e-3f;
  p = p * r + 4.1668389e-2f;
  p = p * r + 1.6666521e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  int32_t power, bits; /* the lowest bits of `shifted` are n */
  memcpy(&power, &shifted, sizeof power);
  memcpy(&bits, &p, sizeof bits);
  return from_bits((int32_t)((uint32_t)bits + ((uint32_t)power << 23)));
}

#endif
