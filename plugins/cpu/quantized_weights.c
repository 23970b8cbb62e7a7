/* The weights of QuantizedAttention: exp(score - the largest of its row) in steps of 1 / WEIGHT_STEPS. */
#include <math.h>
#include <string.h>

#include "exponential.h"
#include "packed_gemm.h"
#include "quantized_attention.h"
#include "quantized_weights.h"
#include "span.h"
#include "variants.h"

#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

/* --- any processor: whole spans, filled up with scores of minus infinity ------------------------------------------ */

enum { AT_ONCE = 4 * SPAN }; /* so many that their maxima do not wait for each other */

/* The largest score, NaN if any is. */
VARIANTS float largest_score(const float *scores, int64_t n) {
  float lanes[AT_ONCE];
  int32_t unordered[SPAN] = {0}, any = 0;
  int64_t i = 0;
  for (int j = 0; j < AT_ONCE; j++) lanes[j] = -INFINITY;
  for (; i + AT_ONCE <= n; i += AT_ONCE) {
    FEW_ELEMENTS
    for (int j = 0; j < AT_ONCE; j++) lanes[j] = larger(scores[i + j], lanes[j]);
  }
  for (; i < n; i += SPAN) {
    FEW_ELEMENTS
    for (int j = 0; j < SPAN; j++) lanes[j] = larger(scores[i + j], lanes[j]);
  }
  for (i = 0; i < n; i += SPAN) {
    FEW_ELEMENTS
    for (int j = 0; j < SPAN; j++) unordered[j] |= -(scores[i + j] != scores[i + j]);
  }
  for (int j = 0; j < SPAN; j++) any |= unordered[j];
  return any ? NAN : largest_of_lanes(lanes, AT_ONCE);
}

/* Codes of exp(scores - largest) and their sum. A weight below half a step is 0, long before exp has no normal number.
 * `bound`, EXP_BOUND, must be no constant to the compiler, as that of an activation. */
VARIANTS int32_t weights_of(const float *scores, float largest, float bound, uint8_t *weights, int64_t n) {
  Modulo lanes = {0};
  int32_t sum = 0;
  for (int64_t i = 0; i < n; i += SPAN) {
    float rounded[SPAN];
    FEW_ELEMENTS
    for (int j = 0; j < SPAN; j++) {
      float x = scores[i + j] - largest;
      x = x > -bound ? x : -bound;
      rounded[j] = weight_of(x) + MAGIC; /* whose lowest bits are the code */
    }
    Integers codes = *(const Integers *)rounded;
    store_bytes(&codes, weights + i);
    lanes += (Modulo)codes & 255;
  }
  for (int j = 0; j < SPAN; j++) sum += (int32_t)lanes[j];
  return sum;
}

/* --- AVX2 and AVX-512 --------------------------------------------------------------------------------------------- */

#if defined(__x86_64__)
#define TARGET_AVX2 __attribute__((target("avx2,fma")))

TARGET_AVX2 static float largest_score_avx2(const float *scores, int64_t n) {
  __m256 largest[4], unordered = _mm256_setzero_ps();
  for (int part = 0; part < 4; part++) largest[part] = _mm256_set1_ps(-INFINITY);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++) {
      __m256 x = _mm256_loadu_ps(scores + i + 8 * part);
      largest[part] = _mm256_max_ps(x, largest[part]); /* the second of the two where the first is NaN */
      unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    }
  float lanes[8], last = -INFINITY;
  int any = _mm256_movemask_ps(unordered);
  _mm256_storeu_ps(
      lanes, _mm256_max_ps(_mm256_max_ps(largest[0], largest[1]), _mm256_max_ps(largest[2], largest[3])));
  for (int lane = 0; lane < 8; lane++) last = lanes[lane] > last ? lanes[lane] : last;
  for (; i < n; i++) last = scores[i] > last ? scores[i] : last, any |= scores[i] != scores[i];
  return any ? NAN : last;
}

/* As weight_codes_avx512, of eight. */
TARGET_AVX2 INLINE __m256i weight_codes_avx2(__m256 scores, __m256 largest) {
  __m256 x = _mm256_max_ps(_mm256_sub_ps(scores, largest), _mm256_set1_ps(-EXP_BOUND));
  __m256 shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(LOG2_E), _mm256_set1_ps(MAGIC));
  __m256 n = _mm256_sub_ps(shifted, _mm256_set1_ps(MAGIC));
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN_2), x), p = _mm256_set1_ps(WEIGHT_POLYNOMIAL[0]);
#pragma GCC unroll 5
  for (int power = 1; power < WEIGHT_TERMS; power++) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(WEIGHT_POLYNOMIAL[power]));
  __m256i power = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23); /* the lowest bits of `shifted` are n */
  return _mm256_cvtps_epi32(_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power)));
}

TARGET_AVX2 static int32_t weights_of_avx2(
    const float *scores, float largest, float bound, uint8_t *weights, int64_t n) {
  (void)bound;
  const __m256 most = _mm256_set1_ps(largest);
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* of what two packings of four vectors leave */
  __m256i sums = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    __m256i codes[4];
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++) codes[part] = weight_codes_avx2(_mm256_loadu_ps(scores + i + 8 * part), most);
    __m256i low = _mm256_packs_epi32(codes[0], codes[1]), high = _mm256_packs_epi32(codes[2], codes[3]);
    __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), in_order);
    _mm256_storeu_si256((__m256i *)(weights + i), bytes);
    sums = _mm256_add_epi64(sums, _mm256_sad_epu8(bytes, _mm256_setzero_si256()));
  }
  for (; i < n; i += 8) {
    __m256i codes = weight_codes_avx2(_mm256_loadu_ps(scores + i), most);
    __m256i words = _mm256_packs_epi32(codes, codes), both = _mm256_packus_epi16(words, words);
    __m128i octet = _mm_unpacklo_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    _mm_storel_epi64((__m128i *)(weights + i), octet);
    sums = _mm256_add_epi64(sums, _mm256_castsi128_si256(_mm_sad_epu8(_mm_move_epi64(octet), _mm_setzero_si128())));
  }
  int64_t parts[4];
  _mm256_storeu_si256((__m256i *)parts, sums);
  return (int32_t)(parts[0] + parts[1] + parts[2] + parts[3]);
}

TARGET_AVX512 static float largest_score_avx512(const float *scores, int64_t n) {
  __m512 largest[4];
  __mmask16 unordered = 0;
  for (int part = 0; part < 4; part++) largest[part] = _mm512_set1_ps(-INFINITY);
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    __m512 x[4];
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++) {
      x[part] = _mm512_loadu_ps(scores + i + 16 * part);
      largest[part] = _mm512_max_ps(x[part], largest[part]); /* the second of the two where the first is NaN */
    }
    unordered |= _mm512_cmp_ps_mask(x[0], x[1], _CMP_UNORD_Q) | _mm512_cmp_ps_mask(x[2], x[3], _CMP_UNORD_Q);
  }
  for (; i < n; i += 16) {
    __m512 x = _mm512_loadu_ps(scores + i);
    largest[0] = _mm512_max_ps(x, largest[0]);
    unordered |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  }
  __m512 last = _mm512_max_ps(_mm512_max_ps(largest[0], largest[1]), _mm512_max_ps(largest[2], largest[3]));
  return unordered ? NAN : _mm512_reduce_max_ps(last);
}

TARGET_AVX512 static int32_t weights_of_avx512(
    const float *scores, float largest, float bound, uint8_t *weights, int64_t n) {
  (void)bound;
  const __m512 most = _mm512_set1_ps(largest);
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15); /* as above */
  __m512i sums = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    __m512i codes[4];
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++) codes[part] = weight_codes_avx512(_mm512_loadu_ps(scores + i + 16 * part), most);
    __m512i low = _mm512_packs_epi32(codes[0], codes[1]), high = _mm512_packs_epi32(codes[2], codes[3]);
    __m512i bytes = _mm512_permutexvar_epi32(in_order, _mm512_packus_epi16(low, high));
    _mm512_storeu_si512(weights + i, bytes);
    sums = _mm512_add_epi64(sums, _mm512_sad_epu8(bytes, _mm512_setzero_si512()));
  }
  int32_t sum = (int32_t)_mm512_reduce_add_epi64(sums);
  for (; i < n; i += 16) {
    __m512i codes = weight_codes_avx512(_mm512_loadu_ps(scores + i), most);
    _mm_storeu_si128((__m128i *)(weights + i), _mm512_cvtepi32_epi8(codes));
    sum += _mm512_reduce_add_epi32(codes);
  }
  return sum;
}
#endif

/* --- rows --------------------------------------------------------------------------------------------------------- */

typedef struct Loops {
  float (*largest)(const float *scores, int64_t n);
  int32_t (*weights)(const float *scores, float largest, float bound, uint8_t *weights, int64_t n);
} Loops;

static Loops loops(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return (Loops){largest_score_avx512, weights_of_avx512};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return (Loops){largest_score_avx2, weights_of_avx2};
#endif
  return (Loops){largest_score, weights_of};
}

void quantized_attention_weigh(
    float *scores, int64_t stride, int64_t rows, int64_t keys, uint8_t *weights, float *scale) {
  const Loops use = loops();
  const int64_t wide = filled(keys, SPAN);
  for (int64_t row = 0; row < rows; row++, scores += stride, weights += wide) {
    for (int64_t i = keys; i < wide; i++) scores[i] = -INFINITY;
    float largest = use.largest(scores, wide);
    if (isfinite(largest)) scale[row] = 1.0f / (float)use.weights(scores, largest, EXP_BOUND, weights, wide);
    else memset(weights, 0, (size_t)wide), scale[row] = NAN;
  }
}
