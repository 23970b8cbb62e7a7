/* exp for loops that compilers vectorize. */
#ifndef FPQ_EXPONENTIAL_H
#define FPQ_EXPONENTIAL_H

#include <stdint.h>
#include <string.h>

static const float MAGIC = 12582912.0f;   /* 1.5 * 2^23: adding and subtracting it rounds to an integer, ties to even */
static const float EXP_BOUND = 87.0f;     /* exp of it and of its negative are normal numbers */

static inline float from_bits(int32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

/* exp for |x| <= 87: x = n ln 2 + r, a polynomial of degree 7 in r (minimax coefficients of Cephes' expf), times 2^n.
 * Relative error below 2^-22. */
static inline float exponential(float x) {
  float n = (x * 1.44269504f + MAGIC) - MAGIC;
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts, the first exact in n * part */
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  return p * from_bits((int32_t)((uint32_t)((int32_t)n + 127) << 23));
}

#endif
