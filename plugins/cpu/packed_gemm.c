/* PackedGemm on each instruction set. A variant decodes a panel in its own way and adds rows of it into `sums`. */
#include "packed_gemm.h"

#include <stdlib.h>
#include <string.h>

#include "variants.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

#define INLINE static inline __attribute__((always_inline))
enum { BYTES = PANEL * QUAD, MAX_RUN = 8 };

/* Where one panel is worked on: a block of decoded weights, its multipliers, and the sums of all rows. */
typedef struct Scratch {
  int32_t *sums;     /* [rows, 16] */
  int8_t *decoded;   /* [k / 4, 64]: 4 input channels of 16 channels */
  int16_t *factors;  /* [runs, 32]: the multiplier of each channel twice */
  uint8_t *tail[2];  /* [rows, k filled up] of each limb, where k is no multiple of 8 */
} Scratch;

/* One block of input channels: k0..k0 + k - 1 of the panel. */
typedef struct Block {
  const PackedGemm *gemm;
  const uint8_t *weight, *multipliers; /* of the panel */
  int64_t k0, k;
} Block;

typedef struct Variant {
  const char *name;
  int multiplies_sums; /* multipliers are applied to sums of runs, else they are in the decoded weight */
  void (*decode)(const Block *, Scratch *);
  /* sums[rows, 16] += a[rows, k] * decoded; a row of `a` is `stride` bytes long. run: quads of a run. */
  void (*add)(const uint8_t *a, int64_t stride, int64_t rows, int64_t k, int run, const Scratch *, int32_t *sums);
} Variant;

static int64_t filled(int64_t k) { return (k + OCTET - 1) / OCTET * OCTET; }

static uint8_t multiplier(const Block *block, int64_t k, int channel) {
  return block->multipliers ? block->multipliers[k / block->gemm->group * PANEL + channel] : 1;
}

/* --- any processor -------------------------------------------------------------------------------------------- */

static void decode_plain(const Block *block, Scratch *scratch) {
  const int8_t *table = block->gemm->table;
  for (int64_t octet = 0; octet < block->k / OCTET; octet++) {
    const uint8_t *codes = block->weight + (block->k0 / OCTET + octet) * BYTES;
    int8_t *out = scratch->decoded + octet * 2 * BYTES;
    for (int i = 0; i < BYTES; i++) {
      int factor = multiplier(block, block->k0 + octet * OCTET, i / QUAD);
      out[i] = (int8_t)(table[codes[i] & 15] * factor);
      out[BYTES + i] = (int8_t)(table[codes[i] >> 4] * factor);
    }
  }
}

static void add_plain(
    const uint8_t *a, int64_t stride, int64_t rows, int64_t k, int run, const Scratch *scratch, int32_t *sums) {
  (void)run;
  for (int64_t row = 0; row < rows; row++) {
    uint32_t total[PANEL] = {0};
    for (int64_t i = 0; i < k; i++) {
      const int8_t *w = scratch->decoded + i / QUAD * BYTES + i % QUAD;
      for (int c = 0; c < PANEL; c++) total[c] += (uint32_t)(a[row * stride + i] * w[c * QUAD]);
    }
    for (int c = 0; c < PANEL; c++) sums[row * PANEL + c] = (int32_t)((uint32_t)sums[row * PANEL + c] + total[c]);
  }
}

static const Variant PLAIN = {"plain", 0, decode_plain, add_plain};

#if defined(__x86_64__)
/* --- AVX2: pairs of products in 16 bits ------------------------------------------------------------------------- */

__attribute__((target("avx2"))) static void decode_avx2(const Block *block, Scratch *scratch) {
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
    const int rows, const int run, const uint8_t *a, int64_t stride, int64_t k, const Scratch *scratch, int32_t *sums) {
  const int8_t *w = scratch->decoded;
  const int16_t *factors = scratch->factors;
  for (int64_t i = 0; i < k; i += run * QUAD, a += run * QUAD, w += run * BYTES, factors += 2 * PANEL) {
    __m256i left[4], right[4];
    for (int row = 0; row < rows; row++) left[row] = right[row] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int quad = 0; quad < run; quad++) {
      __m256i w_left = _mm256_load_si256((const __m256i *)(w + quad * BYTES));
      __m256i w_right = _mm256_load_si256((const __m256i *)(w + quad * BYTES + 32));
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
      const uint8_t *a, int64_t stride, int64_t rows, int64_t k, const Scratch *scratch, int32_t *sums) {              \
    for (; rows >= 4; rows -= 4, a += 4 * stride, sums += 4 * PANEL) tile_avx2(4, run, a, stride, k, scratch, sums);   \
    if (rows == 3) tile_avx2(3, run, a, stride, k, scratch, sums);                                                     \
    else if (rows == 2) tile_avx2(2, run, a, stride, k, scratch, sums);                                                \
    else if (rows == 1) tile_avx2(1, run, a, stride, k, scratch, sums);                                                \
  }
ROWS_AVX2(8)
ROWS_AVX2(4)
ROWS_AVX2(2)
ROWS_AVX2(1)

static void add_avx2(
    const uint8_t *a, int64_t stride, int64_t rows, int64_t k, int run, const Scratch *scratch, int32_t *sums) {
  (run == 8 ? rows_avx2_8 : run == 4 ? rows_avx2_4 : run == 2 ? rows_avx2_2 : rows_avx2_1)(
      a, stride, rows, k, scratch, sums);
}

static const Variant AVX2 = {"avx2", 1, decode_avx2, add_avx2};

/* --- AVX-VNNI: four products in 32 bits, in the registers of AVX2 --------------------------------------------------- */

#define TARGET_VNNI_256 __attribute__((target("avx2,avxvnni")))

/* The low byte of a product depends on the low bytes of its factors alone: even and odd bytes in 16 bits each. */
TARGET_VNNI_256 INLINE __m256i multiply_bytes_256(__m256i x, __m256i y) {
  __m256i even = _mm256_mullo_epi16(x, y);
  __m256i odd = _mm256_mullo_epi16(_mm256_srli_epi16(x, 8), _mm256_srli_epi16(y, 8));
  return _mm256_or_si256(_mm256_and_si256(even, _mm256_set1_epi16(255)), _mm256_slli_epi16(odd, 8));
}

TARGET_VNNI_256 static void decode_vnni_256(const Block *block, Scratch *scratch) {
  const __m256i four_times = _mm256_set1_epi32(0x01010101);
  decode_avx2(block, scratch);
  if (!block->multipliers) return;
  for (int64_t octet = 0; octet < block->k / OCTET; octet++) {
    const uint8_t *group = block->multipliers + (block->k0 + octet * OCTET) / block->gemm->group * PANEL;
    for (int half = 0; half < 2; half++) {
      __m256i factors = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(group + half * PANEL / 2)));
      factors = _mm256_mullo_epi32(factors, four_times);
      for (int quad = 0; quad < 2; quad++) {
        __m256i *w = (__m256i *)(scratch->decoded + (octet * 2 + quad) * BYTES + half * 32);
        _mm256_store_si256(w, multiply_bytes_256(_mm256_load_si256(w), factors));
      }
    }
  }
}

TARGET_VNNI_256 INLINE void tile_vnni_256(
    const int rows, const uint8_t *a, int64_t stride, int64_t k, const Scratch *scratch, int32_t *sums) {
  __m256i left[6], right[6];
#pragma GCC unroll 6
  for (int row = 0; row < rows; row++) {
    left[row] = _mm256_load_si256((const __m256i *)(sums + row * PANEL));
    right[row] = _mm256_load_si256((const __m256i *)(sums + row * PANEL + 8));
  }
  const int8_t *w = scratch->decoded;
  for (int64_t i = 0; i < k; i += QUAD, w += BYTES) {
    __m256i w_left = _mm256_load_si256((const __m256i *)w), w_right = _mm256_load_si256((const __m256i *)(w + 32));
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
    const uint8_t *a, int64_t stride, int64_t rows, int64_t k, int run, const Scratch *scratch, int32_t *sums) {
  (void)run;
  for (; rows >= 6; rows -= 6, a += 6 * stride, sums += 6 * PANEL) tile_vnni_256(6, a, stride, k, scratch, sums);
  for (; rows >= 2; rows -= 2, a += 2 * stride, sums += 2 * PANEL) tile_vnni_256(2, a, stride, k, scratch, sums);
  if (rows) tile_vnni_256(1, a, stride, k, scratch, sums);
}

static const Variant VNNI_256 = {"avx_vnni", 0, decode_vnni_256, add_vnni_256};

/* --- AVX-512 VNNI: four products in 32 bits ---------------------------------------------------------------------- */

#define TARGET_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

TARGET_VNNI INLINE __m512i multiply_bytes(__m512i x, __m512i y) {
  __m512i even = _mm512_mullo_epi16(x, y);
  __m512i odd = _mm512_mullo_epi16(_mm512_srli_epi16(x, 8), _mm512_srli_epi16(y, 8));
  return _mm512_or_si512(_mm512_and_si512(even, _mm512_set1_epi16(255)), _mm512_slli_epi16(odd, 8));
}

TARGET_VNNI static void decode_vnni(const Block *block, Scratch *scratch) {
  const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)block->gemm->table));
  const __m512i low = _mm512_set1_epi8(15), four_times = _mm512_set1_epi32(0x01010101);
  const uint8_t *codes = block->weight + block->k0 / OCTET * BYTES;
  for (int64_t octet = 0; octet < block->k / OCTET; octet++) {
    __m512i both = _mm512_loadu_si512(codes + octet * BYTES);
    __m512i first = _mm512_shuffle_epi8(table, _mm512_and_si512(both, low));
    __m512i second = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
    if (block->multipliers) {
      const uint8_t *group = block->multipliers + (block->k0 + octet * OCTET) / block->gemm->group * PANEL;
      __m512i factors = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)group));
      factors = _mm512_mullo_epi32(factors, four_times);
      first = multiply_bytes(first, factors), second = multiply_bytes(second, factors);
    }
    _mm512_store_si512(scratch->decoded + octet * 2 * BYTES, first);
    _mm512_store_si512(scratch->decoded + octet * 2 * BYTES + BYTES, second);
  }
}

TARGET_VNNI INLINE void tile_vnni(
    const int rows, const uint8_t *a, int64_t stride, int64_t k, const Scratch *scratch, int32_t *sums) {
  __m512i total[12];
  for (int row = 0; row < rows; row++) total[row] = _mm512_loadu_si512(sums + row * PANEL);
  const int8_t *w = scratch->decoded;
  for (int64_t i = 0; i < k; i += QUAD, w += BYTES) {
    __m512i weight = _mm512_load_si512(w);
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) {
      int32_t quad;
      memcpy(&quad, a + row * stride + i, sizeof quad);
      total[row] = _mm512_dpbusd_epi32(total[row], _mm512_set1_epi32(quad), weight);
    }
  }
  for (int row = 0; row < rows; row++) _mm512_storeu_si512(sums + row * PANEL, total[row]);
}

TARGET_VNNI static void add_vnni(
    const uint8_t *a, int64_t stride, int64_t rows, int64_t k, int run, const Scratch *scratch, int32_t *sums) {
  (void)run;
  for (; rows >= 12; rows -= 12, a += 12 * stride, sums += 12 * PANEL) tile_vnni(12, a, stride, k, scratch, sums);
  for (; rows >= 4; rows -= 4, a += 4 * stride, sums += 4 * PANEL) tile_vnni(4, a, stride, k, scratch, sums);
  for (; rows; rows--, a += stride, sums += PANEL) tile_vnni(1, a, stride, k, scratch, sums);
}

static const Variant VNNI = {"avx512_vnni", 0, decode_vnni, add_vnni};

#elif defined(__aarch64__)
/* --- Arm dot product: four products of signed bytes in 32 bits --------------------------------------------------- */

#define TARGET_DOT __attribute__((target("arch=armv8.2-a+dotprod")))

TARGET_DOT static void decode_dot(const Block *block, Scratch *scratch) {
  const int8x16_t table = vld1q_s8(block->gemm->table);
  const uint8_t *codes = block->weight + block->k0 / OCTET * BYTES;
  for (int64_t octet = 0; octet < block->k / OCTET; octet++)
    for (int part = 0; part < BYTES; part += 16) {
      uint8x16_t both = vld1q_u8(codes + octet * BYTES + part);
      int8x16_t first = vqtbl1q_s8(table, vandq_u8(both, vdupq_n_u8(15)));
      int8x16_t second = vqtbl1q_s8(table, vshrq_n_u8(both, 4));
      int8_t factors[16], *out = scratch->decoded + octet * 2 * BYTES + part;
      for (int i = 0; i < 16; i++)
        factors[i] = (int8_t)multiplier(block, block->k0 + octet * OCTET, (part + i) / QUAD);
      vst1q_s8(out, vmulq_s8(first, vld1q_s8(factors)));
      vst1q_s8(out + BYTES, vmulq_s8(second, vld1q_s8(factors)));
    }
}

/* a - 128 is a signed byte; what it takes off, 128 times the weights, is added to what the sums start with. */
TARGET_DOT INLINE void tile_dot(
    const int rows, const uint8_t *a, int64_t stride, int64_t k, const Scratch *scratch, int32_t *sums) {
  const int8x16_t ones = vdupq_n_s8(64);
  int32x4_t total[4][4], offset[4];
  for (int row = 0; row < rows; row++)
    for (int part = 0; part < 4; part++) total[row][part] = vld1q_s32(sums + row * PANEL + 4 * part);
  for (int part = 0; part < 4; part++) offset[part] = vdupq_n_s32(0);
  for (int64_t i = 0; i < k; i += QUAD) {
    const int8_t *w = scratch->decoded + i / QUAD * BYTES;
    int8x16_t weight[4];
    for (int part = 0; part < 4; part++) {
      weight[part] = vld1q_s8(w + 16 * part);
      offset[part] = vdotq_s32(offset[part], weight[part], ones);
    }
    for (int row = 0; row < rows; row++) {
      uint32_t quad;
      memcpy(&quad, a + row * stride + i, sizeof quad);
      int8x16_t same = vreinterpretq_s8_u32(vdupq_n_u32(quad ^ 0x80808080u));
      for (int part = 0; part < 4; part++) total[row][part] = vdotq_s32(total[row][part], weight[part], same);
    }
  }
  for (int row = 0; row < rows; row++)
    for (int part = 0; part < 4; part++)
      vst1q_s32(sums + row * PANEL + 4 * part, vaddq_s32(total[row][part], vshlq_n_s32(offset[part], 1)));
}

TARGET_DOT static void add_dot(
    const uint8_t *a, int64_t stride, int64_t rows, int64_t k, int run, const Scratch *scratch, int32_t *sums) {
  (void)run;
  for (; rows >= 4; rows -= 4, a += 4 * stride, sums += 4 * PANEL) tile_dot(4, a, stride, k, scratch, sums);
  for (; rows; rows--, a += stride, sums += PANEL) tile_dot(1, a, stride, k, scratch, sums);
}

static const Variant DOT = {"dotprod", 0, decode_dot, add_dot};
#endif

/* --- which variant ------------------------------------------------------------------------------------------------ */

enum { MAX_VARIANTS = 4 };

#if defined(__x86_64__)
/* Compilers do not all know this one by name. Where AVX2 is to be had, the system keeps its registers. */
static int has_avx_vnni(void) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

/* The variants that this processor has, the fastest first; their number. */
static int variants(const Variant *list[MAX_VARIANTS]) {
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    list[count++] = &VNNI;
  if (has_avx_vnni()) list[count++] = &VNNI_256;
  if (__builtin_cpu_supports("avx2")) list[count++] = &AVX2;
#elif defined(__aarch64__) && defined(__APPLE__)
  list[count++] = &DOT; /* every Apple processor */
#elif defined(__aarch64__) && defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) list[count++] = &DOT;
#endif
  list[count++] = &PLAIN;
  return count;
}

static const Variant *forced; /* for tests */

static const Variant *chosen(void) {
  const Variant *list[MAX_VARIANTS];
  return variants(list), forced ? forced : list[0];
}

EXPORT const char *packed_gemm_variant(void) { return chosen()->name; }

EXPORT int packed_gemm_force(const char *name) {
  const Variant *list[MAX_VARIANTS];
  int count = variants(list);
  forced = NULL;
  for (int i = 0; name && i < count; i++)
    if (!strcmp(list[i]->name, name)) forced = list[i];
  return !name || forced;
}

/* --- a panel ------------------------------------------------------------------------------------------------------ */

static int largest_integer(const PackedGemm *gemm) {
  int largest = 1;
  for (int i = 0; i < 16; i++) largest = abs(gemm->table[i]) > largest ? abs(gemm->table[i]) : largest;
  return largest;
}

const char *packed_gemm_misfit(const PackedGemm *gemm) {
  if (gemm->largest_code < 0 || gemm->largest_code > 255) return "largest_code must be that of a byte";
  if (2 * gemm->largest_code * largest_integer(gemm) > INT16_MAX) return "a pair of products can leave 16 bits";
  if (gemm->multipliers && (gemm->group < OCTET || gemm->group % OCTET || gemm->k % gemm->group))
    return "group_size must be a multiple of 8 that divides the input channels";
  if (gemm->sums > 1 && (gemm->multipliers || gemm->k % (gemm->sums * OCTET)))
    return "scales by group must be of a multiple of 8 input channels each, and without multipliers";
  return NULL;
}

/* Quads in a run: a power of two, so that the run's sums stay in 16 bits and within a group. */
static int run_of(const PackedGemm *gemm) {
  int pair = 2 * gemm->largest_code * largest_integer(gemm), run = MAX_RUN;
  int64_t span = gemm->multipliers ? gemm->group : gemm->sums > 1 ? gemm->k / gemm->sums : filled(gemm->k);
  while (run > 1 && (run * pair > INT16_MAX || span % (run * QUAD))) run /= 2;
  return run;
}

static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* Cuts `memory` into the parts of a scratch; returns its size. */
static int64_t lay_out(const PackedGemm *gemm, char *memory, Scratch *scratch) {
  int64_t rows = gemm->rows < MAX_ROWS ? gemm->rows : MAX_ROWS, k = filled(gemm->k), used = 0;
  int64_t block = k < K_BLOCK ? k : K_BLOCK, tail = k == gemm->k ? 0 : aligned(rows * k);
  int64_t sizes[] = {aligned(rows * PANEL * 4), aligned(block * PANEL), aligned(block / QUAD * 2 * PANEL * 2), tail, tail};
  void *parts[5];
  for (int i = 0; i < 5; i++) parts[i] = memory ? memory + used : NULL, used += sizes[i];
  if (scratch) *scratch = (Scratch){parts[0], parts[1], parts[2], {parts[3], parts[4]}};
  return used;
}

int64_t packed_gemm_scratch(const PackedGemm *gemm) { return lay_out(gemm, NULL, NULL); }

/* The multiplier of every run and channel, twice: once for each half of a sum of pairs. */
static void spread_factors(const Block *block, int run, int16_t *factors) {
  for (int64_t k = 0; k < block->k; k += run * QUAD, factors += 2 * PANEL)
    for (int i = 0; i < 2 * PANEL; i++) factors[i] = multiplier(block, block->k0 + k, i / 2);
}

/* Rows of codes whose length is a multiple of 8: themselves, or a copy filled up (with what weights of 0 meet). */
static const uint8_t *whole_octets(const PackedGemm *gemm, const uint8_t *codes, int64_t rows, uint8_t *copy) {
  int64_t k = filled(gemm->k);
  if (k == gemm->k) return codes;
  for (int64_t row = 0; row < rows; row++) {
    memcpy(copy + row * k, codes + row * gemm->k, (size_t)gemm->k);
    memset(copy + row * k + gemm->k, 0, (size_t)(k - gemm->k));
  }
  return copy;
}

/* product (+)= (sums - zero * weight_sum) * scale of a panel's stretch s, integers modulo 2^32. */
VARIANTS void finish_rows(
    const PackedGemm *gemm, int64_t panel, int64_t s, int64_t first, int64_t rows, const int32_t *sums) {
  int64_t channel = panel * PANEL, count = gemm->n - channel < PANEL ? gemm->n - channel : PANEL;
  const float *scale = gemm->scale + s * gemm->n + channel;
  const int32_t *weight_sum = gemm->weight_sum + s * gemm->n + channel;
  uint32_t factor = (uint32_t)gemm->zero * (uint32_t)(gemm->low_codes ? gemm->limb_weight + 1 : 1);
  for (int64_t row = 0; row < rows; row++) {
    float *out = gemm->product + (first + row) * gemm->n + channel;
    for (int64_t i = 0; i < count; i++) {
      uint32_t sum = (uint32_t)sums[row * PANEL + i] - factor * (uint32_t)weight_sum[i];
      float part = (float)(int32_t)sum * scale[i];
      out[i] = s ? out[i] + part : part;
    }
  }
}

VARIANTS void weigh(int32_t *sums, uint32_t weight, int64_t count) {
  for (int64_t i = 0; i < count; i++) sums[i] = (int32_t)((uint32_t)sums[i] * weight);
}

void packed_gemm_panel(const PackedGemm *gemm, int64_t panel, int64_t first, int64_t last, void *memory) {
  const Variant *variant = chosen();
  int64_t k = filled(gemm->k), rows = last - first;
  int run = run_of(gemm);
  const uint8_t *limbs[2] = {gemm->codes, gemm->low_codes};
  Scratch scratch;
  lay_out(gemm, memory, &scratch);
  const uint8_t *codes[2] = {NULL, NULL};
  for (int limb = 0; limb < 2 && limbs[limb]; limb++)
    codes[limb] = whole_octets(gemm, limbs[limb] + first * gemm->k, rows, scratch.tail[limb]);
  Block block = {gemm, gemm->weight + panel * k / OCTET * BYTES, NULL, 0, 0};
  if (gemm->multipliers) block.multipliers = gemm->multipliers + panel * (gemm->k / gemm->group) * PANEL;
  for (int64_t s = 0, end = 0; s < gemm->sums; s++) {
    int64_t start = end;
    end = gemm->sums == 1 ? k : start + gemm->k / gemm->sums;
    memset(scratch.sums, 0, (size_t)(rows * PANEL) * sizeof *scratch.sums);
    for (int limb = 0; limb < 2 && codes[limb]; limb++) {
      if (limb) weigh(scratch.sums, (uint32_t)gemm->limb_weight, rows * PANEL);
      for (block.k0 = start; block.k0 < end; block.k0 += block.k) {
        block.k = end - block.k0 < K_BLOCK ? end - block.k0 : K_BLOCK;
        variant->decode(&block, &scratch);
        if (variant->multiplies_sums) spread_factors(&block, run, scratch.factors);
        variant->add(codes[limb] + block.k0, k, rows, block.k, run, &scratch, scratch.sums);
      }
    }
    finish_rows(gemm, panel, s, first, rows, scratch.sums);
  }
}
