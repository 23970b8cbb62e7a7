/* PackedGemm by AVX2: pairs of products in 16 bits where they fit, else each in 32.
 *
 * What a processor with four vector units and two multipliers among them (Zen 3) spends on 32 products: 2 operations
 * where runs are long (vpmaddubsw, vpaddw), 3 where a pair alone fits 16 bits (vpmaddubsw, vpmaddwd, vpaddd), 4 where
 * none does: vpmaddwd and vpaddd of 16 products each. Two halves of 4 bits, or signs moved to the weight (vpsignb) so
 * that factors of 7 bits are left, take 4 and more.
 *
 * A run ends with 2 operations for each sum of pairs, and begins with one less. How long one may be follows from the
 * largest factors there can be, `run`, and for twice as long a run from the weights there are: each sum in 16 bits is
 * of codes from 0 to largest_code times the same weights for all rows, so its magnitude is at most largest_code times
 * the sum of these weights' magnitudes, and vpaddw may wrap on the way, since only the last sum is read.
 */
#include "packed_gemm_variant.h"

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx2"))) void packed_gemm_decode_avx2(const Block *block, int8_t *decoded) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)block->gemm->table));
  const __m256i low = _mm256_set1_epi8(15);
  const uint8_t *codes = block->weight + block->k0 / OCTET * BYTES;
  for (int64_t i = 0; i < block->k / OCTET * BYTES; i += 32) {
    __m256i both = _mm256_loadu_si256((const __m256i *)(codes + i));
    int8_t *out = decoded + i / BYTES * 2 * BYTES + i % BYTES;
    _mm256_store_si256((__m256i *)out, _mm256_shuffle_epi8(table, _mm256_and_si256(both, low)));
    __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
    _mm256_store_si256((__m256i *)(out + BYTES), _mm256_shuffle_epi8(table, high));
  }
}

enum { WIDE_ROWS = 6, SHORT_ROWS = 4 }; /* with 2 sums each and what they are made from: all 16 registers */

#define TARGET_AVX2 __attribute__((target("avx2")))

/* One product of a quad with 8 channels, added to a sum in 16 bits. In assembly, since compilers gather the additions
 * of a run into trees that need more than the 16 registers. */
#define MULTIPLY(sum, w, a) __asm__("vpmaddubsw %1, %2, %0" : "=x"(sum) : "x"(w), "x"(a))
#define MULTIPLY_THEN_ADD(multiply, add, sum, w, a)                                                                    \
  do {                                                                                                                 \
    __m256i product_;                                                                                                  \
    __asm__(multiply " %2, %3, %1\n\t" add " %1, %0, %0" : "+x"(sum), "=&x"(product_) : "x"(w), "x"(a));               \
  } while (0)
#define MULTIPLY_ADD(sum, w, a) MULTIPLY_THEN_ADD("vpmaddubsw", "vpaddw", sum, w, a)
#define MULTIPLY_ADD_WIDE(sum, w, a) MULTIPLY_THEN_ADD("vpmaddwd", "vpaddd", sum, w, a)
/* A pointer of its own: compilers would address all rows from the first, with offsets that they keep in memory. */
#define OPAQUE(pointer) __asm__("" : "+r"(pointer))

TARGET_AVX2 INLINE __m256i four_codes(const uint8_t *a) {
  return _mm256_castps_si256(_mm256_broadcast_ss((const float *)a));
}

TARGET_AVX2 INLINE __m256i load(const void *address) { return _mm256_loadu_si256(address); }

/* The two products of a quad of one row, the second in the place of its codes, and their addition to sums in 16 bits.
 * Additions can use all four vector units, products two of them, and an addition that waits beside a product takes its
 * unit from it: products two by two, and additions LAG rows behind them, were fastest of the orders that fit 16
 * registers. */
#define MULTIPLY_ROW(product, codes, w_left, w_right)                                                                  \
  __asm__ volatile("vpmaddubsw %2, %1, %0\n\tvpmaddubsw %3, %1, %1"                                                    \
                   : "=&x"(product), "+x"(codes)                                                                       \
                   : "x"(w_left), "x"(w_right))
#define ADD_ROW(left, right, left_product, right_product)                                                              \
  __asm__ volatile("vpaddw %2, %0, %0\n\tvpaddw %3, %1, %1"                                                            \
                   : "+x"(left), "+x"(right)                                                                           \
                   : "x"(left_product), "x"(right_product))
enum { RUN_ROWS = 4, LAG = 2, LONGEST_RUN = 16 };

/* At most RUN_ROWS rows, runs of `run` quads: both constants where this is inlined. */
TARGET_AVX2 INLINE void tile_of_runs(
    const int rows, const int run, const Block *block, const uint8_t *a, int64_t stride, int32_t *sums) {
  const int8_t *w = block->w[0];
  const int16_t *factors = block->factors;
  const uint8_t *codes[RUN_ROWS];
#pragma GCC unroll 4
  for (int row = 0; row < rows; row++) codes[row] = a + row * stride;
  for (int64_t left_k = block->k; left_k > 0; left_k -= run * QUAD, w += run * BYTES, factors += 2 * PANEL) {
    __m256i left[RUN_ROWS], right[RUN_ROWS], left_product[LAG + 1], right_product[LAG + 1];
    const int products = (run - 1) * rows; /* that are added: those of the first quad are the sums */
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
      OPAQUE(codes[row]);
      __m256i same = four_codes(codes[row]);
      MULTIPLY(left[row], load(w), same);
      MULTIPLY(right[row], load(w + 32), same);
    }
#pragma GCC unroll 16
    for (int quad = 1; quad < run; quad++) {
      __m256i w_left = load(w + quad * BYTES), w_right = load(w + quad * BYTES + 32);
#pragma GCC unroll 4
      for (int row = 0; row < rows; row++) {
        const int now = (quad - 1) * rows + row, then = now - LAG;
        right_product[now % (LAG + 1)] = four_codes(codes[row] + quad * QUAD);
        MULTIPLY_ROW(left_product[now % (LAG + 1)], right_product[now % (LAG + 1)], w_left, w_right);
        if (then >= 0)
          ADD_ROW(left[then % rows], right[then % rows], left_product[then % (LAG + 1)], right_product[then % (LAG + 1)]);
      }
    }
#pragma GCC unroll 2
    for (int then = products - LAG; then < products; then++)
      ADD_ROW(left[then % rows], right[then % rows], left_product[then % (LAG + 1)], right_product[then % (LAG + 1)]);
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
      __builtin_prefetch(codes[row] + rows * stride); /* of the next tile */
      codes[row] += run * QUAD;
    }
    __m256i left_factor = load(factors), right_factor = load(factors + PANEL);
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
      __m256i *sum = (__m256i *)(sums + row * PANEL);
      sum[0] = _mm256_add_epi32(sum[0], _mm256_madd_epi16(left[row], left_factor));
      sum[1] = _mm256_add_epi32(sum[1], _mm256_madd_epi16(right[row], right_factor));
    }
  }
}

/* At most SHORT_ROWS rows, runs of 1 or 2 quads: sums stay in registers. */
TARGET_AVX2 INLINE void tile_of_short_runs(
    const int rows, const int run, const Block *block, const uint8_t *a, int64_t stride, int32_t *sums) {
  const int8_t *w = block->w[0];
  const int16_t *factors = block->factors;
  const uint8_t *codes[SHORT_ROWS];
  __m256i left[SHORT_ROWS], right[SHORT_ROWS];
#pragma GCC unroll 4
  for (int row = 0; row < rows; row++) {
    codes[row] = a + row * stride;
    left[row] = load(sums + row * PANEL), right[row] = load(sums + row * PANEL + 8);
  }
  for (int64_t left_k = block->k; left_k > 0; left_k -= run * QUAD, w += run * BYTES, factors += 2 * PANEL) {
    __m256i left_factor = load(factors), right_factor = load(factors + PANEL);
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) {
      __m256i same = four_codes(codes[row]), left_pairs, right_pairs;
      OPAQUE(codes[row]);
      MULTIPLY(left_pairs, load(w), same);
      MULTIPLY(right_pairs, load(w + 32), same);
      if (run == 2) {
        same = four_codes(codes[row] + QUAD);
        MULTIPLY_ADD(left_pairs, load(w + BYTES), same);
        MULTIPLY_ADD(right_pairs, load(w + BYTES + 32), same);
      }
      left[row] = _mm256_add_epi32(left[row], _mm256_madd_epi16(left_pairs, left_factor));
      right[row] = _mm256_add_epi32(right[row], _mm256_madd_epi16(right_pairs, right_factor));
      __builtin_prefetch(codes[row] + rows * stride);
      codes[row] += run * QUAD;
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < rows; row++) {
    _mm256_storeu_si256((__m256i *)(sums + row * PANEL), left[row]);
    _mm256_storeu_si256((__m256i *)(sums + row * PANEL + 8), right[row]);
  }
}

TARGET_AVX2 INLINE void widen_16(const uint8_t *a, __m256i order, uint8_t *wide) {
  __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)a));
  _mm256_store_si256((__m256i *)wide, _mm256_shuffle_epi8(twice, order));
}

/* Codes [rows, k] as [rows, k] of 16 bits, K_BLOCK bytes from row to row: of each four the input channels 0, 2, 1, 3.
 * Not inlined, since its constant would take a register from the tile. */
TARGET_AVX2 __attribute__((noinline)) static void widen_codes(int rows, const uint8_t *a, int64_t stride, int64_t k, uint8_t *wide) {
  const __m256i order = _mm256_setr_epi8(0, -1, 2, -1, 1, -1, 3, -1, 4, -1, 6, -1, 5, -1, 7, -1,
                                         8, -1, 10, -1, 9, -1, 11, -1, 12, -1, 14, -1, 13, -1, 15, -1);
  for (int row = 0; row < rows; row++, a += stride, wide += K_BLOCK) {
    int64_t i = 0;
    for (; i + 64 <= k; i += 64) {
      __builtin_prefetch(a + i + rows * stride);
#pragma GCC unroll 4
      for (int part = 0; part < 64; part += 16) widen_16(a + i + part, order, wide + 2 * (i + part));
    }
    for (; i + 16 <= k; i += 16) widen_16(a + i, order, wide + 2 * i);
    if (i < k) {
      __m128i octet = _mm_loadl_epi64((const __m128i *)(a + i));
      _mm_store_si128((__m128i *)(wide + 2 * i), _mm_shuffle_epi8(octet, _mm256_castsi256_si128(order)));
    }
  }
}

/* At most WIDE_ROWS rows of codes and a weight of 16 bits, both in their order: |products of two| < 2^17. */
TARGET_AVX2 INLINE void wide_tile(
    const int rows, const Block *block, const uint8_t *a, int64_t stride, int32_t *sums) {
  uint8_t memory[WIDE_ROWS * K_BLOCK] __attribute__((aligned(32))), *wide = memory;
  __m256i left[WIDE_ROWS], right[WIDE_ROWS];
  const int8_t *w = block->w[0];
  widen_codes(rows, a, stride, block->k, wide);
#pragma GCC unroll 8
  for (int row = 0; row < rows; row++)
    left[row] = load(sums + row * PANEL), right[row] = load(sums + row * PANEL + 8);
  for (int64_t pairs = block->k / 2; pairs; pairs--, w += BYTES, wide += QUAD) {
    __m256i w_left = load(w), w_right = load(w + 32);
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) {
      __m256i same = four_codes(wide + row * K_BLOCK);
      MULTIPLY_ADD_WIDE(left[row], w_left, same);
      MULTIPLY_ADD_WIDE(right[row], w_right, same);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < rows; row++) {
    _mm256_storeu_si256((__m256i *)(sums + row * PANEL), left[row]);
    _mm256_storeu_si256((__m256i *)(sums + row * PANEL + 8), right[row]);
  }
}

/* Each quad [64] of bytes as [2, 32] of 16 bits: input channels 0 and 2 of 16 channels, then 1 and 3. */
TARGET_AVX2 static const int8_t *widened(const Block *block, int8_t *decoded) {
  const int8_t *bytes = stored_bytes(block);
  __m256i *out = (__m256i *)decoded;
  for (int64_t i = 0; i < block->k; i += QUAD, bytes += BYTES, out += 4)
    for (int half = 0; half < 2; half++) {
      __m256i both = load(bytes + half * 32);
      _mm256_store_si256(out + half, _mm256_srai_epi16(_mm256_slli_epi16(both, 8), 8));
      _mm256_store_si256(out + 2 + half, _mm256_srai_epi16(both, 8));
    }
  return decoded;
}

enum { ROWS_TO_LOOK = 32 }; /* fewer do not pay for the look at the weights */

/* Twice `run`, where that stays in 16 bits with the weights that the block has. */
TARGET_AVX2 static int longer_run(const Block *block) {
  const int run = 2 * block->run, span = run * QUAD;
  const int8_t *w = block->w[0];
  const __m256i ones = _mm256_set1_epi8(1);
  __m256i widest = _mm256_setzero_si256();
  if (!run || run > LONGEST_RUN || block->gemm->rows < ROWS_TO_LOOK || block->k % span) return block->run;
  if (block->multipliers && block->gemm->group % span) return block->run;
  for (int64_t k = 0; k < block->k; k += span) {
    __m256i left = _mm256_setzero_si256(), right = left;
    for (int quad = 0; quad < run; quad++, w += BYTES) {
      left = _mm256_add_epi16(left, _mm256_maddubs_epi16(_mm256_abs_epi8(load(w)), ones));
      right = _mm256_add_epi16(right, _mm256_maddubs_epi16(_mm256_abs_epi8(load(w + 32)), ones));
    }
    widest = _mm256_max_epi16(widest, _mm256_max_epi16(left, right)); /* at most 2 * 16 * 127 */
  }
  int largest_code = block->gemm->largest_code > 1 ? block->gemm->largest_code : 1;
  __m256i beyond = _mm256_cmpgt_epi16(widest, _mm256_set1_epi16((int16_t)(INT16_MAX / largest_code)));
  return _mm256_testz_si256(beyond, beyond) ? run : block->run;
}

static const int8_t *decode_avx2(const Block *block, int8_t *decoded) {
  if (block->gemm->table) return packed_gemm_decode_avx2(block, decoded), decoded;
  return block->run ? stored_bytes(block) : widened(block, decoded);
}

#define ALL_ROWS(name, most, ...)                                                                                      \
  TARGET_AVX2 static void name(const Block *block, const uint8_t *a, int64_t stride, int64_t rows, int32_t *sums) {    \
    for (; rows >= most; rows -= most, a += most * stride, sums += most * PANEL) TILE(most, __VA_ARGS__);              \
    if (most > 4 && rows & 4) TILE(4, __VA_ARGS__), a += 4 * stride, sums += 4 * PANEL;                                \
    if (rows & 2) TILE(2, __VA_ARGS__), a += 2 * stride, sums += 2 * PANEL;                                            \
    if (rows & 1) TILE(1, __VA_ARGS__);                                                                                \
  }
#define TILE(rows, run) tile_of_runs(rows, run, block, a, stride, sums)
ALL_ROWS(runs_of_16, RUN_ROWS, 16)
ALL_ROWS(runs_of_8, RUN_ROWS, 8)
ALL_ROWS(runs_of_4, RUN_ROWS, 4)
#undef TILE
#define TILE(rows, run) tile_of_short_runs(rows, run, block, a, stride, sums)
ALL_ROWS(runs_of_2, SHORT_ROWS, 2)
ALL_ROWS(runs_of_1, SHORT_ROWS, 1)
#undef TILE
#define TILE(rows, run) wide_tile(rows, block, a, stride, sums)
ALL_ROWS(no_runs, WIDE_ROWS, 0)
#undef TILE

/* --- codes of which few are large ---------------------------------------------------------------------------------- */

/* A lane of 16 bits adds the products of 8 of a stretch's 16 codes. Where the sum of these, times the largest magnitude of
 * a weight, is below 2^15, no sum of their products leaves 16 bits, whatever the weights are. */
TARGET_AVX2 static int64_t mark_heavy(
    const uint8_t *codes, int64_t stride, int64_t rows, int64_t k, int32_t most, uint8_t *heavy) {
  const __m128i ones = _mm_set1_epi8(1), limit = _mm_set1_epi16((int16_t)most);
  int64_t count = 0;
  for (int64_t row = 0; row < rows; row++, codes += stride)
    for (int64_t i = 0; i < k; i += STRETCH, heavy++) {
      __m128i sums = i + STRETCH <= k ? _mm_loadu_si128((const __m128i *)(codes + i))
                                      : _mm_loadl_epi64((const __m128i *)(codes + i));
      sums = _mm_maddubs_epi16(sums, ones); /* of each quad and lane */
      sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0x4e));
      sums = _mm_add_epi16(sums, _mm_shuffle_epi32(sums, 0xb1));
      *heavy = _mm_cvtsi128_si32(_mm_cmpgt_epi16(sums, limit)) != 0;
      count += *heavy;
    }
  return count;
}

/* At most RUN_ROWS rows of the first or second 8 channels of a panel, a stretch at a time: one run where no row is heavy;
 * else pairs by themselves where they fit, and products of a pair apart where not: 255 * 127 < 2^15. */
TARGET_AVX2 INLINE void tile_of_stretches(
    const int rows, const Block *block, int64_t first, const int8_t *w, const uint8_t *a, int64_t stride, int32_t *sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  const uint8_t *heavy[RUN_ROWS];
  __m256i total[RUN_ROWS];
#pragma GCC unroll 4
  for (int row = 0; row < rows; row++) {
    heavy[row] = block->heavy + (first + row) * block->heavy_row;
    total[row] = load(sums + row * PANEL);
  }
  for (int64_t k = 0; k < block->k; k += STRETCH, w += STRETCH * PANEL, a += STRETCH) {
    const int quads = block->k - k < STRETCH ? 2 : 4;
    int any = 0;
#pragma GCC unroll 4
    for (int row = 0; row < rows; row++) any |= heavy[row][k / STRETCH];
    if (!any && quads == 4) {
      __m256i sum[RUN_ROWS];
#pragma GCC unroll 4
      for (int quad = 0; quad < 4; quad++) {
        __m256i weight = load(w + quad * BYTES), product[RUN_ROWS];
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) {
          __m256i same = four_codes(a + row * stride + quad * QUAD);
          __asm__ volatile("vpmaddubsw %1, %2, %0" : "=x"(product[row]) : "x"(weight), "x"(same));
        }
#pragma GCC unroll 4
        for (int row = 0; row < rows; row++) {
          if (quad) __asm__ volatile("vpaddw %1, %0, %0" : "+x"(sum[row]) : "x"(product[row]));
          else sum[row] = product[row];
        }
      }
#pragma GCC unroll 4
      for (int row = 0; row < rows; row++)
        total[row] = _mm256_add_epi32(total[row], _mm256_madd_epi16(sum[row], ones));
      continue;
    }
    const __m256i even = _mm256_set1_epi16(255);
    for (int quad = 0; quad < quads; quad++) {
      __m256i weight = load(w + quad * BYTES);
#pragma GCC unroll 4
      for (int row = 0; row < rows; row++) {
        __m256i same = four_codes(a + row * stride + quad * QUAD);
        if (block->run) {
          total[row] = _mm256_add_epi32(total[row], _mm256_madd_epi16(_mm256_maddubs_epi16(same, weight), ones));
          continue;
        }
        __m256i first_of_pair = _mm256_maddubs_epi16(_mm256_and_si256(same, even), weight);
        __m256i second = _mm256_maddubs_epi16(_mm256_andnot_si256(even, same), weight);
        total[row] = _mm256_add_epi32(total[row], _mm256_madd_epi16(first_of_pair, ones));
        total[row] = _mm256_add_epi32(total[row], _mm256_madd_epi16(second, ones));
      }
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < rows; row++) _mm256_storeu_si256((__m256i *)(sums + row * PANEL), total[row]);
}

TARGET_AVX2 static void stretches(const Block *block, const uint8_t *a, int64_t stride, int64_t rows, int32_t *sums) {
  for (int64_t row = 0, here = 0; row < rows; row += here) {
    here = rows - row >= RUN_ROWS ? RUN_ROWS : 1;
    for (int half = 0; half < (block->channels > PANEL / 2 ? 2 : 1); half++) {
      const int8_t *w = stored_bytes(block) + half * 32;
      const uint8_t *at = a + row * stride;
      int32_t *sum = sums + row * PANEL + half * PANEL / 2;
      if (here == 1) tile_of_stretches(1, block, row, w, at, stride, sum);
      else tile_of_stretches(RUN_ROWS, block, row, w, at, stride, sum);
    }
  }
}

static void add_avx2(const Block *block, const uint8_t *a, int64_t stride, int64_t rows, int32_t *sums) {
  int run = block->run;
  start_sums(block, rows, sums);
  (block->heavy ? stretches
   : run == 16  ? runs_of_16
   : run == 8   ? runs_of_8
   : run == 4   ? runs_of_4
   : run == 2   ? runs_of_2
   : run        ? runs_of_1
                : no_runs)(block, a, stride, rows, sums);
}

const Variant PACKED_GEMM_AVX2 = {"avx2", 1, 0, 1, 96, decode_avx2, add_avx2, longer_run, mark_heavy};
#endif
