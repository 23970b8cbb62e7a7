/* PackedGemm by AVX-VNNI and AVX-512 VNNI: four products in 32 bits. */
#include "packed_gemm_variant.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

/* --- AVX-VNNI: the registers of AVX2 --- */

#define TARGET_VNNI_256 __attribute__((target("avx2,avxvnni")))

/* The low byte of a product depends on the low bytes of its factors alone: even and odd bytes in 16 bits each. */
TARGET_VNNI_256 INLINE __m256i multiply_bytes_256(__m256i x, __m256i y) {
  __m256i even = _mm256_mullo_epi16(x, y);
  __m256i odd = _mm256_mullo_epi16(_mm256_srli_epi16(x, 8), _mm256_srli_epi16(y, 8));
  return _mm256_or_si256(_mm256_and_si256(even, _mm256_set1_epi16(255)), _mm256_slli_epi16(odd, 8));
}

TARGET_VNNI_256 static const int8_t *decode_vnni_256(const Block *block, int8_t *decoded) {
  const __m256i four_times = _mm256_set1_epi32(0x01010101);
  if (!block->gemm->table) return stored_bytes(block);
  packed_gemm_decode_avx2(block, decoded);
  if (!block->multipliers) return decoded;
  for (int64_t octet = 0; octet < block->k / OCTET; octet++) {
    const uint8_t *group = block->multipliers + (block->k0 + octet * OCTET) / block->gemm->group * PANEL;
    for (int half = 0; half < 2; half++) {
      __m256i factors = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(group + half * PANEL / 2)));
      factors = _mm256_mullo_epi32(factors, four_times);
      for (int quad = 0; quad < 2; quad++) {
        __m256i *w = (__m256i *)(decoded + (octet * 2 + quad) * BYTES + half * 32);
        _mm256_store_si256(w, multiply_bytes_256(_mm256_load_si256(w), factors));
      }
    }
  }
  return decoded;
}

TARGET_VNNI_256 INLINE void tile_vnni_256(
    const int rows, const uint8_t *a, int64_t stride, int64_t k, const int8_t *w, int32_t *sums) {
  __m256i left[6], right[6];
#pragma GCC unroll 6
  for (int row = 0; row < rows; row++) {
    left[row] = _mm256_load_si256((const __m256i *)(sums + row * PANEL));
    right[row] = _mm256_load_si256((const __m256i *)(sums + row * PANEL + 8));
  }
  for (int64_t i = 0; i < k; i += QUAD, w += BYTES) {
    __m256i w_left = _mm256_loadu_si256((const __m256i *)w), w_right = _mm256_loadu_si256((const __m256i *)(w + 32));
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
      __m256i same = _mm256_castps_si256(_mm256_broadcast_ss((const float *)(a + row * stride + i)));
      left[row] = _mm256_dpbusd_avx_epi32(left[row], same, w_left);
      right[row] = _mm256_dpbusd_avx_epi32(right[row], same, w_right);
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < rows; row++) {
    _mm256_store_si256((__m256i *)(sums + row * PANEL), left[row]);
    _mm256_store_si256((__m256i *)(sums + row * PANEL + 8), right[row]);
  }
}

TARGET_VNNI_256 static void add_vnni_256(
    const Block *block, const uint8_t *a, int64_t stride, int64_t rows, int32_t *sums) {
  const int8_t *w = block->w[0];
  int64_t k = block->k;
  start_sums(block, rows, sums);
  for (; rows >= 6; rows -= 6, a += 6 * stride, sums += 6 * PANEL) tile_vnni_256(6, a, stride, k, w, sums);
  for (; rows >= 2; rows -= 2, a += 2 * stride, sums += 2 * PANEL) tile_vnni_256(2, a, stride, k, w, sums);
  if (rows) tile_vnni_256(1, a, stride, k, w, sums);
}

const Variant PACKED_GEMM_AVX_VNNI = {"avx_vnni", 0, 0, 1, 60, decode_vnni_256, add_vnni_256, NULL, NULL};

/* --- AVX-512 VNNI: four products in 32 bits ---------------------------------------------------------------------- */

#define TARGET_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

/* Bytes times a factor below 256 for each two of them: an odd one keeps its place in its 16 bits. */
TARGET_VNNI INLINE __m512i multiply_bytes(__m512i x, __m512i factors) {
  const __m512i even = _mm512_set1_epi16(255);
  __m512i odd = _mm512_mullo_epi16(_mm512_andnot_si512(even, x), factors);
  return _mm512_or_si512(odd, _mm512_and_si512(even, _mm512_mullo_epi16(x, factors)));
}

TARGET_VNNI const int8_t *packed_gemm_decode_vnni(const Block *block, int8_t *decoded) {
  if (!block->gemm->table) return stored_bytes(block);
  const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)block->gemm->table));
  const __m512i low = _mm512_set1_epi8(15);
  __m512i factors = low;
  const uint8_t *codes = block->weight + block->k0 / OCTET * BYTES;
  int64_t next = 0; /* where the next group begins */
  for (int64_t octet = 0; octet < block->k / OCTET; octet++) {
    __m512i both = _mm512_loadu_si512(codes + octet * BYTES);
    __m512i first = _mm512_shuffle_epi8(table, _mm512_and_si512(both, low));
    __m512i second = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
    if (block->multipliers) {
      int64_t k = block->k0 + octet * OCTET;
      if (!octet || k == next) { /* of each channel, for both halves of its four bytes */
        int64_t group = k / block->gemm->group;
        __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(block->multipliers + group * PANEL)));
        factors = _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16)), next = (group + 1) * block->gemm->group;
      }
      first = multiply_bytes(first, factors), second = multiply_bytes(second, factors);
    }
    _mm512_store_si512(decoded + octet * 2 * BYTES, first);
    _mm512_store_si512(decoded + octet * 2 * BYTES + BYTES, second);
  }
  return decoded;
}

enum { VNNI_ROWS = 12 }; /* with 2 panels 24 sums, 2 weights and codes: of 32 registers */

/* Rows are addressed from every third one, with the stride once and twice, and `octet` input channels by constants. first:
 * of `all` that the epilogue takes together. */
TARGET_VNNI INLINE void tile_vnni(
    const int rows, const int panels, const Block *block, int64_t first, int64_t all, const uint8_t *a, int64_t stride,
    int32_t *sums) {
  __m512i total[VNNI_ROWS][MOST_PANELS];
  const int8_t *left = block->w[0], *right = block->w[panels - 1];
  const __mmask16 kept = block->fresh ? 0 : 0xffff; /* sums so far */
  const int64_t k = block->k;
  const uint8_t *third[(VNNI_ROWS + 2) / 3];
#pragma GCC unroll 12
  for (int row = 0; row < rows; row++) {
    if (row % 3 == 0) third[row / 3] = a + row * stride;
    for (int part = 0; part < panels; part++)
      total[row][part] = _mm512_maskz_loadu_epi32(kept, sums + (row * panels + part) * PANEL);
  }
  const Fetch *fetch = &block->fetch;
  const int64_t lines = rows * fetch->streams, weight_end = fetch->lines * (first + rows) / all;
  int64_t line = 0, weight_line = fetch->lines * first / all;
  for (int64_t i = 0; i < k; i += OCTET, left += 2 * BYTES, right += 2 * BYTES) {
    /* One or two at a time: many at once would hold up the loads of codes. */
    if (line < lines) {
      int64_t row = first + line / fetch->streams, stream = line % fetch->streams;
      __builtin_prefetch(fetch->stream[stream] + row * fetch->apart[stream], 0, 2);
      line++;
    } else if (weight_line < weight_end) {
      for (int part = 0; part < panels; part++) __builtin_prefetch(fetch->weight[part] + weight_line * LINE, 0, 2);
      weight_line++;
    }
#pragma GCC unroll 2
    for (int quad = 0; quad < 2; quad++) {
      __m512i left_weight = _mm512_loadu_si512(left + quad * BYTES), right_weight = left_weight;
      if (panels == 2) right_weight = _mm512_loadu_si512(right + quad * BYTES);
#pragma GCC unroll 12
      for (int row = 0; row < rows; row++) {
        int32_t codes;
        memcpy(&codes, third[row / 3] + row % 3 * stride + quad * QUAD, sizeof codes);
        __m512i same = _mm512_set1_epi32(codes);
        total[row][0] = _mm512_dpbusd_epi32(total[row][0], same, left_weight);
        if (panels == 2) total[row][1] = _mm512_dpbusd_epi32(total[row][1], same, right_weight);
      }
    }
#pragma GCC unroll 4
    for (int row = 0; row < rows; row += 3) third[row / 3] += OCTET;
  }
#pragma GCC unroll 12
  for (int row = 0; row < rows; row++)
    for (int part = 0; part < panels; part++)
      _mm512_storeu_si512(sums + (row * panels + part) * PANEL, total[row][part]);
}

TARGET_VNNI INLINE void rows_vnni(
    const int panels, const Block *block, const uint8_t *a, int64_t stride, int64_t rows, int32_t *sums) {
  const int64_t wide = panels * PANEL, all = rows;
  int64_t first = 0;
#define TILE(count)                                                                                                    \
  tile_vnni(count, panels, block, first, all, a, stride, sums), first += count, a += count * stride, sums += count * wide
  for (; rows >= VNNI_ROWS; rows -= VNNI_ROWS) TILE(VNNI_ROWS);
  if (rows >= 8) TILE(8), rows -= 8;
  for (; rows >= 4; rows -= 4) TILE(4);
  for (; rows; rows--) TILE(1);
#undef TILE
}

TARGET_VNNI static void add_vnni(
    const Block *block, const uint8_t *a, int64_t stride, int64_t rows, int32_t *sums) {
  if (block->panels == 2) rows_vnni(2, block, a, stride, rows, sums);
  else rows_vnni(1, block, a, stride, rows, sums);
}

const Variant PACKED_GEMM_AVX512_VNNI = {
    "avx512_vnni", 0, 1, MOST_PANELS, 2 * VNNI_ROWS, packed_gemm_decode_vnni, add_vnni, NULL, NULL};
#endif
