/* PackedGemm by AVX2: pairs of products in 16 bits. */
#include "packed_gemm_variant.h"

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx2"))) void packed_gemm_decode_avx2(const Block *block, Scratch *scratch) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)block->gemm->table));
  const __m256i low = _mm256_set1_epi8(15);
  const uint8_t *codes = block->weight + block->k0 / OCTET * BYTES;
  for (int64_t i = 0; i < block->k / OCTET * BYTES; i += 32) {
    __m256i both = _mm256_loadu_si256((const __m256i *)(codes + i));
    int8_t *out = scratch->decoded + i / BYTES * 2 * BYTES + i % BYTES;
    _mm256_store_si256((__m256i *)out, _mm256_shuffle_epi8(table, _mm256_and_si256(both, low)));
    __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
    _mm256_store_si256((__m256i *)(out + BYTES), _mm256_shuffle_epi8(table, high));
  }
}

/* One product of a quad with 8 channels, added to a sum in 16 bits. In assembly, since compilers gather the additions
 * of a run into trees that need more than the 16 registers. */
#define MULTIPLY_ADD(sum, w, a)                                                                                        \
  do {                                                                                                                 \
    __m256i product_;                                                                                                  \
    __asm__("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(product_) : "x"(w), "x"(a));               \
  } while (0)

/* `rows` (at most 4) rows, runs of `run` quads: both constants where this is inlined. */
__attribute__((target("avx2"))) INLINE void tile_avx2(
    const int rows, const int run, const Block *block, const uint8_t *a, int64_t stride, int32_t *sums) {
  const int8_t *w = block->w;
  const int16_t *factors = block->factors;
  for (int64_t i = 0; i < block->k; i += run * QUAD, a += run * QUAD, w += run * BYTES, factors += 2 * PANEL) {
    __m256i left[4], right[4];
    for (int row = 0; row < rows; row++) left[row] = right[row] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int quad = 0; quad < run; quad++) {
      __m256i w_left = _mm256_loadu_si256((const __m256i *)(w + quad * BYTES));
      __m256i w_right = _mm256_loadu_si256((const __m256i *)(w + quad * BYTES + 32));
#pragma GCC unroll 4
      for (int row = 0; row < rows; row++) {
        __m256i same = _mm256_castps_si256(_mm256_broadcast_ss((const float *)(a + row * stride + quad * QUAD)));
        MULTIPLY_ADD(left[row], w_left, same);
        MULTIPLY_ADD(right[row], w_right, same);
      }
    }
    __m256i left_factor = _mm256_load_si256((const __m256i *)factors);
    __m256i right_factor = _mm256_load_si256((const __m256i *)(factors + PANEL));
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
      __m256i *sum = (__m256i *)(sums + row * PANEL);
      sum[0] = _mm256_add_epi32(sum[0], _mm256_madd_epi16(left[row], left_factor));
      sum[1] = _mm256_add_epi32(sum[1], _mm256_madd_epi16(right[row], right_factor));
    }
  }
}

#define ROWS_AVX2(run)                                                                                                 \
  __attribute__((target("avx2"))) static void rows_avx2_##run(                                                         \
      const Block *block, const uint8_t *a, int64_t stride, int64_t rows, int32_t *sums) {                             \
    for (; rows >= 4; rows -= 4, a += 4 * stride, sums += 4 * PANEL) tile_avx2(4, run, block, a, stride, sums);        \
    if (rows == 3) tile_avx2(3, run, block, a, stride, sums);                                                          \
    else if (rows == 2) tile_avx2(2, run, block, a, stride, sums);                                                     \
    else if (rows == 1) tile_avx2(1, run, block, a, stride, sums);                                                     \
  }
ROWS_AVX2(8)
ROWS_AVX2(4)
ROWS_AVX2(2)
ROWS_AVX2(1)

/* Pairs that leave 16 bits: each product in 32. decode_avx2 has widened the weight. */
__attribute__((target("avx2"))) static void rows_wide(
    const Block *block, const uint8_t *a, int64_t stride, int64_t rows, int32_t *sums) {
  const __m256i low = _mm256_set1_epi32(0x00ff00ff);
  for (; rows; rows--, a += stride, sums += PANEL) {
    const __m256i *w = (const __m256i *)block->w;
    __m256i left = _mm256_load_si256((__m256i *)sums), right = _mm256_load_si256((__m256i *)sums + 1);
    for (int64_t i = 0; i < block->k; i += QUAD, w += 4) {
      __m256i quad = _mm256_castps_si256(_mm256_broadcast_ss((const float *)(a + i)));
      __m256i even = _mm256_and_si256(quad, low), odd = _mm256_srli_epi16(quad, 8);
      left = _mm256_add_epi32(left, _mm256_madd_epi16(even, _mm256_load_si256(w)));
      right = _mm256_add_epi32(right, _mm256_madd_epi16(even, _mm256_load_si256(w + 1)));
      left = _mm256_add_epi32(left, _mm256_madd_epi16(odd, _mm256_load_si256(w + 2)));
      right = _mm256_add_epi32(right, _mm256_madd_epi16(odd, _mm256_load_si256(w + 3)));
    }
    _mm256_store_si256((__m256i *)sums, left), _mm256_store_si256((__m256i *)sums + 1, right);
  }
}

/* Each quad [64] of bytes as [4, 16] of 16 bits: input channels 0 and 2 of its two halves, then 1 and 3. */
__attribute__((target("avx2"))) static const int8_t *widened(const Block *block, Scratch *scratch) {
  const __m256i *bytes = (const __m256i *)stored_bytes(block);
  __m256i *out = (__m256i *)scratch->decoded;
  for (int64_t i = 0; i < block->k; i += QUAD, bytes += 2, out += 4)
    for (int half = 0; half < 2; half++) {
      __m256i both = _mm256_loadu_si256(bytes + half);
      _mm256_store_si256(out + half, _mm256_srai_epi16(_mm256_slli_epi16(both, 8), 8));
      _mm256_store_si256(out + 2 + half, _mm256_srai_epi16(both, 8));
    }
  return scratch->decoded;
}

static const int8_t *decode_avx2(const Block *block, Scratch *scratch) {
  if (block->gemm->table) return packed_gemm_decode_avx2(block, scratch), scratch->decoded;
  return block->run ? stored_bytes(block) : widened(block, scratch);
}

static void add_avx2(const Block *block, const uint8_t *a, int64_t stride, int64_t rows, int32_t *sums) {
  int run = block->run;
  (run == 8 ? rows_avx2_8 : run == 4 ? rows_avx2_4 : run == 2 ? rows_avx2_2 : run ? rows_avx2_1 : rows_wide)(
      block, a, stride, rows, sums);
}

const Variant PACKED_GEMM_AVX2 = {"avx2", 1, decode_avx2, add_avx2};
#endif
