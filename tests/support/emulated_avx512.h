/* AVX-512's vectors of 64 bytes made of two of AVX2, for sources that are compiled with it where the processor lacks the
 * wide ones. */
#ifndef FPQ_EMULATED_AVX512_H
#define FPQ_EMULATED_AVX512_H

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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

EMULATED __mmask16 emulated_less(WideFloats x, WideFloats y) {
  int mask[2];
  for (int i = 0; i < 2; i++) mask[i] = _mm256_movemask_ps(_mm256_cmp_ps(x.half[i], y.half[i], _CMP_LT_OQ));
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

EMULATED Wide emulated_setr_epi32(
    int a, int b, int c, int d, int e, int f, int g, int h, int i, int j, int k, int l, int m, int n, int o, int p) {
  Wide result = {{_mm256_setr_epi32(a, b, c, d, e, f, g, h), _mm256_setr_epi32(i, j, k, l, m, n, o, p)}};
  return result;
}
HALVES(WideFloats, add_ps, (WideFloats x, WideFloats y), _mm256_add_ps(x.half[i], y.half[i]))
HALVES(WideFloats, mul_ps, (WideFloats x, WideFloats y), _mm256_mul_ps(x.half[i], y.half[i]))
HALVES(WideFloats, div_ps, (WideFloats x, WideFloats y), _mm256_div_ps(x.half[i], y.half[i]))
HALVES(WideFloats, abs_ps, (WideFloats x), _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.half[i]))
HALVES(WideFloats, cvtepi32_ps, (Wide x), _mm256_cvtepi32_ps(x.half[i]))
EMULATED void emulated_storeu_ps(void *to, WideFloats x) { memcpy(to, &x, sizeof x); }
EMULATED WideFloats emulated_mask_mov_ps(WideFloats x, __mmask16 taken, WideFloats y) {
  float of_x[16], of_y[16];
  memcpy(of_x, &x, sizeof x), memcpy(of_y, &y, sizeof y);
  for (int i = 0; i < 16; i++) of_x[i] = taken >> i & 1 ? of_y[i] : of_x[i];
  memcpy(&x, of_x, sizeof x);
  return x;
}

/* sum + four products of unsigned a with signed b in each lane. */
EMULATED __m256i dot_of_quads(__m256i sum, __m256i a, __m256i b) {
  const __m256i even = _mm256_set1_epi16(255), ones = _mm256_set1_epi16(1);
  __m256i low = _mm256_mullo_epi16(_mm256_and_si256(a, even), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  __m256i high = _mm256_mullo_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, ones));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(high, ones));
}
HALVES(Wide, mullo_epi16, (Wide x, Wide y), _mm256_mullo_epi16(x.half[i], y.half[i]))
HALVES(Wide, and, (Wide x, Wide y), _mm256_and_si256(x.half[i], y.half[i]))
HALVES(Wide, andnot, (Wide x, Wide y), _mm256_andnot_si256(x.half[i], y.half[i]))
HALVES(Wide, or, (Wide x, Wide y), _mm256_or_si256(x.half[i], y.half[i]))
HALVES(Wide, shuffle_epi8, (Wide x, Wide y), _mm256_shuffle_epi8(x.half[i], y.half[i]))
HALVES(Wide, srli_epi16, (Wide x, int count), _mm256_srli_epi16(x.half[i], count))
HALVES(Wide, set1_epi8, (char x), (_mm256_set1_epi8(x) + 0 * i))
HALVES(Wide, set1_epi16, (short x), (_mm256_set1_epi16(x) + 0 * i))
HALVES(Wide, set1_epi32, (int x), (_mm256_set1_epi32(x) + 0 * i))
HALVES(Wide, broadcast_i32x4, (__m128i x), (_mm256_broadcastsi128_si256(x) + 0 * i))
HALVES(Wide, cvtepu8_epi32, (__m128i x), _mm256_cvtepu8_epi32(i ? _mm_unpackhi_epi64(x, x) : x))
HALVES(Wide, loadu, (const void *from), _mm256_loadu_si256((const __m256i *)from + i))
/* All of the lanes, or none. */
EMULATED Wide emulated_maskz_loadu(__mmask16 kept, const void *from) {
  const Wide none = {{_mm256_setzero_si256(), _mm256_setzero_si256()}};
  if (kept && kept != 0xffff) abort();
  return kept ? emulated_loadu(from) : none;
}
HALVES(Wide, dpbusd, (Wide sum, Wide a, Wide b), dot_of_quads(sum.half[i], a.half[i], b.half[i]))
EMULATED void emulated_storeu(void *to, Wide x) {
  for (int i = 0; i < 2; i++) _mm256_storeu_si256((__m256i *)to + i, x.half[i]);
}
EMULATED void emulated_store(void *to, Wide x) {
  if ((uintptr_t)to % 64) abort();
  emulated_storeu(to, x);
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
#define _mm512_cmp_ps_mask(x, y, how) ((how) == _CMP_UNORD_Q ? emulated_unordered(x, y) : emulated_less(x, y))
#define _mm512_reduce_max_ps emulated_reduce_max_ps
#define _mm512_reduce_add_epi64 emulated_reduce_add_epi64
#define _mm512_reduce_add_epi32 emulated_reduce_add_epi32
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
#define _mm512_setr_epi32 emulated_setr_epi32
#define _mm512_add_ps emulated_add_ps
#define _mm512_mul_ps emulated_mul_ps
#define _mm512_div_ps emulated_div_ps
#define _mm512_abs_ps emulated_abs_ps
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_storeu_ps emulated_storeu_ps
#define _mm512_mask_mov_ps emulated_mask_mov_ps
#define _mm512_mullo_epi16 emulated_mullo_epi16
#define _mm512_and_si512 emulated_and
#define _mm512_andnot_si512 emulated_andnot
#define _mm512_or_si512 emulated_or
#define _mm512_shuffle_epi8 emulated_shuffle_epi8
#undef _mm512_srli_epi16
#define _mm512_srli_epi16 emulated_srli_epi16
#define _mm512_set1_epi8 emulated_set1_epi8
#define _mm512_set1_epi16 emulated_set1_epi16
#define _mm512_set1_epi32 emulated_set1_epi32
#define _mm512_broadcast_i32x4 emulated_broadcast_i32x4
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#define _mm512_loadu_si512 emulated_loadu
#define _mm512_maskz_loadu_epi32 emulated_maskz_loadu
#define _mm512_storeu_si512 emulated_storeu
#define _mm512_store_si512 emulated_store
#define _mm512_dpbusd_epi32 emulated_dpbusd

#endif
