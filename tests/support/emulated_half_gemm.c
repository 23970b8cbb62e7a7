/* What HalfGemm's loops for AVX-512 compute, where the processor lacks it: their source compiled for AVX2, with vectors
 * of 64 bytes made of two. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "half_gemm.h"
#include "variants.h"

#pragma GCC diagnostic ignored "-Wpsabi" /* 64 bytes are returned, by functions of this file alone */
typedef float Wide __attribute__((vector_size(64), aligned(4)));

__attribute__((always_inline, target("avx2,fma,f16c"))) static inline Wide widened_halves(__m256i half) {
  __m256 parts[] = {_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
  Wide result;
  memcpy(&result, parts, sizeof result);
  return result;
}
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps widened_halves
#define target(instruction_sets) target("avx2,fma,f16c")
#define __builtin_cpu_supports(name) 1 /* so the widest loops are taken */
#include "half_gemm.c"
