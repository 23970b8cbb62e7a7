/* What the weights of QuantizedAttention are by AVX-512, where the processor lacks it: their source compiled for AVX2,
 * with vectors of 64 bytes made of two. */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "quantized_attention.h"
#include "variants.h"

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* 64 bytes are returned, by functions of this file alone */
#endif
#define EMULATED static inline __attribute__((always_inline, target("avx2,fma")))

typedef struct WideFloats {
  __m256 half[2];
} WideFloats;
typedef struct Wide {
  __m256i half[2];
} Wide;
#define __m512 WideFloats
#define __m512i Wide

#define HALVES(type, name, parameters, of_half)                                                                        \
  EMULATED type emulated_##name parameters {                                                                           \
    type result;                                                                                                       \
    for (int i = 0; i < 2; i++) result.half[i] = of_half;                                                              \
    return result;                                                                                                     \
  }
HALVES(WideFloats, set1_ps, (float x), (_mm256_set1_ps(x) + 0 * (float)i))
HALVES(WideFloats, loadu_ps, (const float *from), _mm256_loadu_ps(from + 8 * i))
HALVES(WideFloats, max_ps, (WideFloats x, WideFloats y), _mm256_max_ps(x.half[i], y.half[i]))
HALVES(WideFloats, sub_ps, (WideFloats x, WideFloats y), _mm256_sub_ps(x.half[i], y.half[i]))
HALVES(WideFloats, fmadd_ps, (WideFloats x, WideFloats y, WideFloats z), _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]))
HALVES(WideFloats, fnmadd_ps, (WideFloats x, WideFloats y, WideFloats z), _mm256_fnmadd_ps(x.half[i], y.half[i], z.half[i]))
HALVES(WideFloats, castsi512_ps, (Wide x), _mm256_castsi256_ps(x.half[i]))
HALVES(Wide, castps_si512, (WideFloats x), _mm256_castps_si256(x.half[i]))
HALVES(Wide, cvtps_epi32, (WideFloats x), _mm256_cvtps_epi32(x.half[i]))
HALVES(Wide, slli_epi32, (Wide x, int count), _mm256_slli_epi32(x.half[i], count))
HALVES(Wide, add_epi32, (Wide x, Wide y), _mm256_add_epi32(x.half[i], y.half[i]))
HALVES(Wide, add_epi64, (Wide x, Wide y), _mm256_add_epi64(x.half[i], y.half[i]))
HALVES(Wide, packs_epi32, (Wide x, Wide y), _mm256_packs_epi32(x.half[i], y.half[i]))
HALVES(Wide, packus_epi16, (Wide x, Wide y), _mm256_packus_epi16(x.half[i], y.half[i]))
HALVES(Wide, sad_epu8, (Wide x, Wide y), _mm256_sad_epu8(x.half[i], y.half[i]))
HALVES(Wide, setzero_si512, (void), (_mm256_setzero_si256() + 0 * i))

EMULATED Wide emulated_permutexvar_epi32(Wide order, Wide x) {
  int32_t from[16], places[16], to[16];
  Wide result;
  memcpy(from, &x, sizeof from), memcpy(places, &order, sizeof places);
  for (int i = 0; i < 16; i++) to[i] = from[places[i] & 15];
  memcpy(&result, to, sizeof result);
  return result;
}

EMULATED __mmask16 emulated_unordered(WideFloats x, WideFloats y) {
  int mask[2];
  for (int i = 0; i < 2; i++) mask[i] = _mm256_movemask_ps(_mm256_cmp_ps(x.half[i], y.half[i], _CMP_UNORD_Q));
  return (__mmask16)(mask[0] | mask[1] << 8);
}

EMULATED float emulated_reduce_max_ps(WideFloats x) {
  float lanes[16], largest;
  memcpy(lanes, &x, sizeof lanes), largest = lanes[0];
  for (int i = 1; i < 16; i++) largest = lanes[i] > largest ? lanes[i] : largest;
  return largest;
}

EMULATED int64_t emulated_reduce_add_epi64(Wide x) {
  int64_t lanes[8], sum = 0;
  memcpy(lanes, &x, sizeof lanes);
  for (int i = 0; i < 8; i++) sum += lanes[i];
  return sum;
}

EMULATED int32_t emulated_reduce_add_epi32(Wide x) {
  int32_t lanes[16], sum = 0;
  memcpy(lanes, &x, sizeof lanes);
  for (int i = 0; i < 16; i++) sum += lanes[i];
  return sum;
}

EMULATED __m128i emulated_cvtepi32_epi8(Wide x) {
  int32_t lanes[16];
  uint8_t bytes[16];
  memcpy(lanes, &x, sizeof lanes);
  for (int i = 0; i < 16; i++) bytes[i] = (uint8_t)lanes[i];
  return _mm_loadu_si128((const __m128i *)bytes);
}

EMULATED void emulated_storeu_si512(void *to, Wide x) { memcpy(to, &x, sizeof x); }

EMULATED Wide emulated_setr_epi32(
    int a, int b, int c, int d, int e, int f, int g, int h, int i, int j, int k, int l, int m, int n, int o, int p) {
  Wide result = {{_mm256_setr_epi32(a, b, c, d, e, f, g, h), _mm256_setr_epi32(i, j, k, l, m, n, o, p)}};
  return result;
}

#undef _mm512_slli_epi32
#undef _mm512_cmp_ps_mask
#undef _mm512_setr_epi32
#define _mm512_set1_ps emulated_set1_ps
#define _mm512_loadu_ps emulated_loadu_ps
#define _mm512_max_ps emulated_max_ps
#define _mm512_sub_ps emulated_sub_ps
#define _mm512_fmadd_ps emulated_fmadd_ps
#define _mm512_fnmadd_ps emulated_fnmadd_ps
#define _mm512_castsi512_ps emulated_castsi512_ps
#define _mm512_castps_si512 emulated_castps_si512
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_slli_epi32 emulated_slli_epi32
#define _mm512_add_epi32 emulated_add_epi32
#define _mm512_add_epi64 emulated_add_epi64
#define _mm512_packs_epi32 emulated_packs_epi32
#define _mm512_packus_epi16 emulated_packus_epi16
#define _mm512_sad_epu8 emulated_sad_epu8
#define _mm512_setzero_si512 emulated_setzero_si512
#define _mm512_permutexvar_epi32 emulated_permutexvar_epi32
#define _mm512_cmp_ps_mask(x, y, unordered) emulated_unordered(x, y) /* the one comparison that is made */
#define _mm512_reduce_max_ps emulated_reduce_max_ps
#define _mm512_reduce_add_epi64 emulated_reduce_add_epi64
#define _mm512_reduce_add_epi32 emulated_reduce_add_epi32
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
#define _mm512_storeu_si512 emulated_storeu_si512
#define _mm512_setr_epi32 emulated_setr_epi32

#define target(instruction_sets) target("avx2,fma")
#define __builtin_cpu_supports(name) 1 /* so the widest loops are taken */
#include "quantized_weights.c"
