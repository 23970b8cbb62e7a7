/* PackedGemm on each instruction set. A variant decodes a panel in its own way and adds rows of it into `sums`. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "packed_gemm_variant.h"
#include "variants.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

static int64_t filled(int64_t k) { return (k + OCTET - 1) / OCTET * OCTET; }

/* --- any processor -------------------------------------------------------------------------------------------- */

static const int8_t *decode_plain(const Block *block, Scratch *scratch) {
  const int8_t *table = block->gemm->table;
  if (!table) return stored_bytes(block);
  for (int64_t octet = 0; octet < block->k / OCTET; octet++) {
    const uint8_t *codes = block->weight + (block->k0 / OCTET + octet) * BYTES;
    int8_t *out = scratch->decoded + octet * 2 * BYTES;
    for (int i = 0; i < BYTES; i++) {
      int factor = multiplier(block, block->k0 + octet * OCTET, i / QUAD);
      out[i] = (int8_t)(table[codes[i] & 15] * factor);
      out[BYTES + i] = (int8_t)(table[codes[i] >> 4] * factor);
    }
  }
  return scratch->decoded;
}

static void add_plain(const Block *block, const uint8_t *a, int64_t stride, int64_t rows, int32_t *sums) {
  for (int64_t row = 0; row < rows; row++) {
    uint32_t total[PANEL] = {0};
    for (int64_t i = 0; i < block->k; i++) {
      const int8_t *w = block->w + i / QUAD * BYTES + i % QUAD;
      for (int c = 0; c < PANEL; c++) total[c] += (uint32_t)(a[row * stride + i] * w[c * QUAD]);
    }
    for (int c = 0; c < PANEL; c++) sums[row * PANEL + c] = (int32_t)((uint32_t)sums[row * PANEL + c] + total[c]);
  }
}

static const Variant PLAIN = {"plain", 0, decode_plain, add_plain, NULL, NULL};

/* --- which variant ------------------------------------------------------------------------------------------------ */

enum { MAX_VARIANTS = 5 };

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
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    if (packed_gemm_has_amx()) list[count++] = &PACKED_GEMM_AMX;
    list[count++] = &PACKED_GEMM_AVX512_VNNI;
  }
  if (has_avx_vnni()) list[count++] = &PACKED_GEMM_AVX_VNNI;
  if (__builtin_cpu_supports("avx2")) list[count++] = &PACKED_GEMM_AVX2;
#elif defined(__aarch64__) && defined(__APPLE__)
  int has_i8mm = 0;
  size_t size = sizeof has_i8mm;
  sysctlbyname("hw.optional.arm.FEAT_I8MM", &has_i8mm, &size, NULL, 0); /* where it is unknown, it stays 0 */
  if (has_i8mm) list[count++] = &PACKED_GEMM_I8MM;
  list[count++] = &PACKED_GEMM_DOT; /* every Apple processor */
#elif defined(__aarch64__) && defined(__linux__)
  if (getauxval(AT_HWCAP2) & HWCAP2_I8MM) list[count++] = &PACKED_GEMM_I8MM;
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) list[count++] = &PACKED_GEMM_DOT;
#endif
  list[count++] = &PLAIN;
  return count;
}

static const Variant *_Atomic chosen; /* NULL until the processor was asked, which costs microseconds in a virtual machine */

const Variant *packed_gemm_chosen(void) {
  const Variant *list[MAX_VARIANTS];
  if (!chosen) variants(list), chosen = list[0];
  return chosen;
}

EXPORT const char *packed_gemm_variant(void) { return packed_gemm_chosen()->name; }

EXPORT int packed_gemm_force(const char *name) {
  const Variant *list[MAX_VARIANTS], *named = NULL;
  int count = variants(list);
  for (int i = 0; name && i < count; i++)
    if (!strcmp(list[i]->name, name)) named = list[i];
  chosen = named; /* NULL: it is chosen anew */
  return !name || named;
}

/* --- a panel ------------------------------------------------------------------------------------------------------ */

static int largest_integer(const PackedGemm *gemm) {
  int largest = 1;
  if (!gemm->table) return gemm->largest_weight;
  for (int i = 0; i < 16; i++) largest = abs(gemm->table[i]) > largest ? abs(gemm->table[i]) : largest;
  return largest;
}

const char *packed_gemm_misfit(const PackedGemm *gemm) {
  if (gemm->largest_code < 0 || gemm->largest_code > 255) return "largest_code must be that of a byte";
  if (!gemm->table && (gemm->largest_weight < 1 || gemm->largest_weight > 127))
    return "largest_weight of a weight of bytes must be 1 to 127";
  if (!gemm->table && gemm->multipliers) return "multipliers are for weights with a table";
  if (gemm->table && 2 * gemm->largest_code * largest_integer(gemm) > INT16_MAX)
    return "a pair of products can leave 16 bits";
  if (gemm->multipliers && (gemm->group < OCTET || gemm->group % OCTET || gemm->k % gemm->group))
    return "group_size must be a multiple of 8 that divides the input channels";
  if (gemm->sums > 1 && gemm->k % (gemm->sums * OCTET))
    return "scales by group must be of a multiple of 8 input channels each";
  if (gemm->scales < 1 || gemm->sums % gemm->scales || gemm->group_scales < 1 || gemm->sums % gemm->group_scales)
    return "scales must span whole sums";
  return NULL;
}

/* Quads in a run: a power of two, so that the run's sums stay in 16 bits and within a group; 0 if one's do not. */
static int run_of(const PackedGemm *gemm) {
  int pair = 2 * gemm->largest_code * largest_integer(gemm), run = MAX_RUN;
  int64_t span = gemm->sums > 1 ? gemm->k / gemm->sums : filled(gemm->k);
  int64_t group = gemm->multipliers ? gemm->group : span;
  while (run && (run * pair > INT16_MAX || span % (run * QUAD) || group % (run * QUAD))) run /= 2;
  return run;
}

static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* Cuts `memory` into the parts of a scratch; returns its size. */
static int64_t lay_out(const PackedGemm *gemm, char *memory, Scratch *scratch) {
  int64_t rows = gemm->rows < MAX_ROWS ? gemm->rows : MAX_ROWS, k = filled(gemm->k), used = 0;
  int64_t block = k < K_BLOCK ? k : K_BLOCK, tail = k == gemm->k ? 0 : aligned(rows * k);
  int64_t sums = aligned(rows * PANEL * 4), low = gemm->low_codes ? 1 : 0;
  int64_t decoded = aligned((2 * k < K_BLOCK ? 2 * k : K_BLOCK) * PANEL), factors = aligned(block / QUAD * 2 * PANEL * 2);
  int64_t totals = gemm->sums > 1 ? sums : 0;
  int64_t sizes[] = {sums, low * sums, totals, decoded, factors, tail, low * tail};
  void *parts[7];
  for (int i = 0; i < 7; i++) parts[i] = memory ? memory + used : NULL, used += sizes[i];
  if (scratch) *scratch = (Scratch){{parts[0], parts[1]}, parts[2], parts[3], parts[4], {parts[5], parts[6]}};
  return used;
}

int64_t packed_gemm_scratch(const PackedGemm *gemm) { return lay_out(gemm, NULL, NULL); }

/* The multiplier of every run and channel, twice: once for each half of a sum of pairs. */
static void spread_factors(const Block *block, int16_t *factors) {
  int64_t group = block->gemm->group, size = 2 * PANEL;
  for (int64_t k = 0; k < block->k; k += block->run * QUAD, factors += size)
    if (k && (!block->multipliers || (block->k0 + k) % group)) memcpy(factors, factors - size, (size_t)size * 2);
    else for (int i = 0; i < size; i++) factors[i] = multiplier(block, block->k0 + k, i / 2);
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

enum { FINISHED_ROWS = 64 }; /* at a time: 4 KiB, which stay in the first-level cache from stage to stage */

/* Rows first.. of stretch s of a panel: (sums - zero * weight_sum) * scale, integers modulo 2^32, added to the totals
 * of the stretches before it; the last one's are the product, which the epilogue takes on. offset: the rows' place in
 * the scratch. count: channels, a constant where this is inlined for a whole panel. */
INLINE void finish_stretch(
    const PackedGemm *gemm, int64_t channel, const int64_t count, int64_t s, int64_t first, int64_t offset,
    int64_t rows, const Scratch *scratch, float bound) {
  const float *scale = gemm->scale + s * gemm->scales / gemm->sums * gemm->n + channel;
  const int32_t *weight_sum = gemm->weight_sum + s * gemm->n + channel;
  const int32_t *sums = scratch->sums[0] + offset * PANEL, *low = NULL;
  if (gemm->low_codes) low = scratch->sums[1] + offset * PANEL;
  uint32_t weight = low ? (uint32_t)gemm->limb_weight : 1, factor = (uint32_t)gemm->zero * (weight + (low ? 1 : 0));
  float x[FINISHED_ROWS * PANEL], *totals = scratch->totals + offset * PANEL;
  uint32_t of_zero[PANEL];
  for (int64_t i = 0; i < count; i++) of_zero[i] = factor * (uint32_t)weight_sum[i];
  for (int64_t row = 0; row < rows; row++) {
    FEW_ELEMENTS
    for (int64_t i = 0; i < count; i++) {
      uint32_t sum = (uint32_t)sums[row * PANEL + i] * weight - of_zero[i];
      x[row * count + i] = (float)(int32_t)(low ? sum + (uint32_t)low[row * PANEL + i] : sum);
    }
  }
  int64_t place = first * gemm->n + channel;
  if (gemm->integer_sums) store_rows(x, rows, count, gemm->integer_sums + s * gemm->rows * gemm->n + place, gemm->n);
  for (int64_t row = 0; row < rows; row++) {
    FEW_ELEMENTS
    for (int64_t i = 0; i < count; i++) x[row * count + i] *= scale[i];
  }
  if (gemm->group_scale) {
    const float *group_scale = gemm->group_scale + first * gemm->group_scales + s * gemm->group_scales / gemm->sums;
    for (int64_t row = 0; row < rows; row++) {
      FEW_ELEMENTS
      for (int64_t i = 0; i < count; i++) x[row * count + i] *= group_scale[row * gemm->group_scales];
    }
  }
  if (s) {
    ELEMENTWISE
    for (int64_t i = 0; i < rows * count; i++) x[i] += totals[i];
  }
  if (s + 1 < gemm->sums) {
    memcpy(totals, x, (size_t)(rows * count) * sizeof *x);
    return;
  }
  if (gemm->product) store_rows(x, rows, count, gemm->product + place, gemm->n);
  finish_tile(&gemm->epilogue, first, rows, channel, count, bound, x);
}

VARIANTS void finish_rows(
    const PackedGemm *gemm, int64_t panel, int64_t s, int64_t first, int64_t rows, const Scratch *scratch,
    float bound) {
  int64_t channel = panel * PANEL, count = gemm->n - channel;
  for (int64_t done = 0, part; done < rows; done += part) {
    part = rows - done < FINISHED_ROWS ? rows - done : FINISHED_ROWS;
    if (count >= PANEL) finish_stretch(gemm, channel, PANEL, s, first + done, done, part, scratch, bound);
    else finish_stretch(gemm, channel, count, s, first + done, done, part, scratch, bound);
  }
}

void packed_gemm_panel(const PackedGemm *gemm, int64_t panel, int64_t first, int64_t last, void *memory) {
  const Variant *variant = packed_gemm_chosen();
  int64_t k = filled(gemm->k), rows = last - first, panel_bytes = gemm->table ? k * PANEL / 2 : k * PANEL;
  int limbs = gemm->low_codes ? 2 : 1;
  const uint8_t *codes[] = {gemm->codes, gemm->low_codes};
  Scratch scratch;
  lay_out(gemm, memory, &scratch);
  for (int limb = 0; limb < limbs; limb++)
    codes[limb] = whole_octets(gemm, codes[limb] + first * gemm->k, rows, scratch.tail[limb]);
  Block block = {.gemm = gemm, .weight = gemm->weight + panel * panel_bytes, .factors = scratch.factors};
  if (gemm->multipliers) block.multipliers = gemm->multipliers + panel * (gemm->k / gemm->group) * PANEL;
  const int run = variant->adds_pairs ? run_of(gemm) : 0;
  int64_t most = variant->adds_pairs && !run ? K_BLOCK / 2 : K_BLOCK; /* weights of 16 bits are as many bytes */
  int64_t spread = 0; /* factors that are there: where there are no multipliers all are 1, for runs of any length */
  for (int64_t s = 0, end = 0; s < gemm->sums; s++) {
    int64_t start = end;
    end = gemm->sums == 1 ? k : start + gemm->k / gemm->sums;
    for (int limb = 0; limb < limbs; limb++)
      memset(scratch.sums[limb], 0, (size_t)(rows * PANEL) * sizeof(int32_t));
    for (block.k0 = start; block.k0 < end; block.k0 += block.k) {
      block.k = end - block.k0 < most ? end - block.k0 : most;
      block.run = run;
      block.w = variant->decode(&block, &scratch);
      if (run && variant->longer_run) block.run = variant->longer_run(&block);
      int64_t runs = block.run ? block.k / (block.run * QUAD) : 0;
      if (block.multipliers ? run : runs > spread) spread_factors(&block, scratch.factors), spread = runs;
      for (int limb = 0; limb < limbs; limb++)
        variant->add(&block, codes[limb] + block.k0, k, rows, scratch.sums[limb]);
    }
    finish_rows(gemm, panel, s, first, rows, &scratch, EXP_BOUND);
  }
}
