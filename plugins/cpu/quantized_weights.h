/* A weight of QuantizedAttention: exp(score - the largest) in steps of 1 / WEIGHT_STEPS, the same bits on all processors. */
#ifndef FPQ_QUANTIZED_WEIGHTS_H
#define FPQ_QUANTIZED_WEIGHTS_H

#include <math.h>

#include "exponential.h"
#include "variants.h"

/* Of r from the highest power down. */
static const float WEIGHT_POLYNOMIAL[] = {2.115893f, 10.688486f, 42.50232f, 127.49718f, 254.99992f, 255.00002f};
enum { WEIGHT_TERMS = sizeof WEIGHT_POLYNOMIAL / sizeof *WEIGHT_POLYNOMIAL };

/* 255 * exp(x) for x from -87 to 0: x = n ln 2 + r, a polynomial of degree 5 in r fitted to 255 exp(r) with the least
 * relative error, 2^-23.3, times 2^n by adding to the exponent. One constant is enough for ln 2: its error is multiplied
 * by at most 10 where the weight is not 0, and the product is fused. With all roundings exp is off by less than 2 units in
 * its last place. */
static inline float weight_of(float x) {
  float shifted = fmaf(x, LOG2_E, MAGIC), n = shifted - MAGIC, r = fmaf(-n, LN_2, x);
  float p = WEIGHT_POLYNOMIAL[0];
#pragma GCC unroll 5
  for (int power = 1; power < WEIGHT_TERMS; power++) p = fmaf(p, r, WEIGHT_POLYNOMIAL[power]);
  int32_t power, bits; /* the lowest bits of `shifted` are n */
  memcpy(&power, &shifted, sizeof power);
  memcpy(&bits, &p, sizeof bits);
  return from_bits((int32_t)((uint32_t)bits + ((uint32_t)power << 23)));
}

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))

/* Sixteen codes: round(weight_of(x)) of x = scores - largest, and 0 for x below -87. */
TARGET_AVX512 INLINE __m512i weight_codes_avx512(__m512 scores, __m512 largest) {
  __m512 x = _mm512_max_ps(_mm512_sub_ps(scores, largest), _mm512_set1_ps(-EXP_BOUND));
  __m512 shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(LOG2_E), _mm512_set1_ps(MAGIC));
  __m512 n = _mm512_sub_ps(shifted, _mm512_set1_ps(MAGIC));
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN_2), x), p = _mm512_set1_ps(WEIGHT_POLYNOMIAL[0]);
#pragma GCC unroll 5
  for (int power = 1; power < WEIGHT_TERMS; power++) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(WEIGHT_POLYNOMIAL[power]));
  __m512i power = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_cvtps_epi32(_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), power)));
}

#endif

#endif
