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

static const int8_t *decode_plain(const Block *block, int8_t *decoded) {
  const int8_t *table = block->gemm->table;
  if (!table) return stored_bytes(block);
  for (int64_t octet = 0; octet < block->k / OCTET; octet++) {
    const uint8_t *codes = block->weight + (block->k0 / OCTET + octet) * BYTES;
    int8_t *out = decoded + octet * 2 * BYTES;
    for (int i = 0; i < BYTES; i++) {
      int factor = multiplier(block, block->k0 + octet * OCTET, i / QUAD);
      out[i] = (int8_t)(table[codes[i] & 15] * factor);
      out[BYTES + i] = (int8_t)(table[codes[i] >> 4] * factor);
    }
  }
  return decoded;
}

static void add_plain(const Block *block, const uint8_t *a, int64_t stride, int64_t rows, int32_t *sums) {
  start_sums(block, rows, sums);
  for (int64_t row = 0; row < rows; row++) {
    uint32_t total[PANEL] = {0};
    for (int64_t i = 0; i < block->k; i++) {
      const int8_t *w = block->w[0] + i / QUAD * BYTES + i % QUAD;
      for (int c = 0; c < PANEL; c++) total[c] += (uint32_t)(a[row * stride + i] * w[c * QUAD]);
    }
    for (int c = 0; c < PANEL; c++) sums[row * PANEL + c] = (int32_t)((uint32_t)sums[row * PANEL + c] + total[c]);
  }
}

static const Variant PLAIN = {"plain", 0, 0, 1, MAX_ROWS, decode_plain, add_plain, NULL, NULL};

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
  int64_t sums = rows * MOST_PANELS * PANEL * 4, low = gemm->low_codes ? 1 : 0, totals = gemm->sums > 1 ? sums : 0;
  int64_t decoded = MOST_PANELS * block * PANEL, factors = aligned(block / QUAD * 2 * PANEL * 2);
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

enum { AT_ONCE = 24 }; /* rows that are finished together: their spans stay in the nearest cache */

/* Rows first.. of stretch s of a panel: (sums - zero * weight_sum) * scale, integers modulo 2^32, added to the totals
 * of the stretches before it; the last one's are the product, which the epilogue takes on. sums, low and totals:
 * `stride` numbers from row to row. rows: at most AT_ONCE. count: channels, a constant where this is inlined for a whole
 * panel. One step after the other, as in finish_spans. */
INLINE void finish_stretch(
    const PackedGemm *gemm, int64_t channel, const int64_t count, int64_t s, int64_t first, int64_t rows,
    const int32_t *sums, const int32_t *low, float *totals, int64_t stride, float bound) {
  const Epilogue *epilogue = &gemm->epilogue;
  const int64_t n = gemm->n, place = first * n + channel;
  const HeadSpan head = head_span(epilogue, channel);
  const int32_t *weight_sum = gemm->weight_sum + s * n + channel;
  uint32_t limb = low ? (uint32_t)gemm->limb_weight : 1, factor = (uint32_t)gemm->zero * (limb + (low ? 1 : 0));
  Modulo of_zero = {0};
  Span x[AT_ONCE], scale;
  for (int64_t i = 0; i < count; i++) of_zero[i] = factor * (uint32_t)weight_sum[i];
  load_span(&scale, gemm->scale + s * gemm->scales / gemm->sums * n + channel, count);
  if (low)
    for (int64_t row = 0; row < rows; row++) {
      Modulo sum = *(const Modulo *)(sums + row * stride) * limb + *(const Modulo *)(low + row * stride) - of_zero;
      x[row] = __builtin_convertvector((Integers)sum, Span);
    }
  else
    for (int64_t row = 0; row < rows; row++)
      x[row] = __builtin_convertvector((Integers)(*(const Modulo *)(sums + row * stride) - of_zero), Span);
  if (gemm->integer_sums)
    for (int64_t row = 0; row < rows; row++)
      store_span(&x[row], gemm->integer_sums + s * gemm->rows * n + place + row * n, count);
  for (int64_t row = 0; row < rows; row++) x[row] *= scale;
  if (gemm->group_scale) {
    const float *of_rows = gemm->group_scale + first * gemm->group_scales + s * gemm->group_scales / gemm->sums;
    for (int64_t row = 0; row < rows; row++) x[row] *= of_rows[row * gemm->group_scales];
  }
  if (s)
    for (int64_t row = 0; row < rows; row++) x[row] += *(const Span *)(totals + row * stride);
  if (s + 1 < gemm->sums) {
    for (int64_t row = 0; row < rows; row++) *(Span *)(totals + row * stride) = x[row];
    return;
  }
  if (gemm->product)
    for (int64_t row = 0; row < rows; row++) store_span(&x[row], gemm->product + place + row * n, count);
  finish_spans(epilogue, epilogue_row(epilogue, first), &head, first, rows, channel, count, bound, x);
}

/* Rows of stretch s of `panels` panels side by side; offset: the first row's place in the scratch. */
VARIANTS void finish_rows(
    const PackedGemm *gemm, int64_t panel, int panels, int64_t s, int64_t first, int64_t offset, int64_t rows,
    const Scratch *scratch, float bound) {
  int64_t stride = panels * PANEL;
  for (int part = 0; part < panels; part++)
    for (int64_t row = 0, left = rows, some; left; row += some, left -= some) {
      int64_t channel = (panel + part) * PANEL, count = gemm->n - channel, place = (offset + row) * stride + part * PANEL;
      const int32_t *sums = scratch->sums[0] + place, *low = gemm->low_codes ? scratch->sums[1] + place : NULL;
      float *totals = scratch->totals + place;
      some = left < AT_ONCE ? left : AT_ONCE;
      if (count >= PANEL) finish_stretch(gemm, channel, PANEL, s, first + row, some, sums, low, totals, stride, bound);
      else finish_stretch(gemm, channel, count, s, first + row, some, sums, low, totals, stride, bound);
    }
}

/* Where input channel k0 of a panel begins, and the bytes of `k` of them. */
static const uint8_t *stored(const PackedGemm *gemm, int64_t panel, int64_t k0) {
  int64_t k = panel * filled(gemm->k) + k0;
  return gemm->weight + (gemm->table ? k * PANEL / 2 : k * PANEL);
}

/* Part `part` of `parts` of the weights that are read after those of a block: no processor foresees where they lie. */
INLINE void next_weights(
    const PackedGemm *gemm, const Block *block, int64_t panel, int64_t part, int64_t parts, Fetch *fetch) {
  int64_t k = filled(gemm->k), k0 = block->k0 + block->k;
  if (k0 == k) panel += block->panels, k0 = 0;
  k = k - k0 < block->k ? k - k0 : block->k;
  fetch->lines = 0;
  for (int i = 0; i < block->panels; i++) {
    if ((panel + i) * PANEL >= gemm->n) { /* the last panel has no neighbour, whose lines are not waited for */
      fetch->weight[i] = fetch->weight[0];
      continue;
    }
    const uint8_t *from = stored(gemm, panel + i, k0);
    int64_t lines = (stored(gemm, panel + i, k0 + k) - from) / LINE, line = lines * part / parts;
    fetch->weight[i] = from + line * LINE, fetch->lines = lines * (part + 1) / parts - line;
  }
}

static void fetch_weights(const Fetch *fetch, int panels) {
  for (int64_t line = 0; line < fetch->lines; line++)
    for (int i = 0; i < panels; i++) __builtin_prefetch(fetch->weight[i] + line * LINE, 0, 2);
}

/* What the epilogue of rows first.. of some panels reads and writes most of: the product, `linear`, a gate of a row each,
 * residual and y, y of heads as far as rows are of one sample. */
INLINE void next_lines(const PackedGemm *gemm, int64_t panel, int panels, int64_t first, Fetch *fetch) {
  const Epilogue *it = &gemm->epilogue;
  const EpilogueRow at = epilogue_row(it, first);
  for (int part = 0; part < panels; part++) {
    int64_t channel = (panel + part) * PANEL, place = first * it->n + channel;
    const HeadSpan of = head_span(it, channel);
    const float *y = !it->y ? NULL : it->heads_out ? head_place(it, &at, &of) : it->y + place;
    const float *ends[ENDS] = {y, gemm->product ? gemm->product + place : NULL, it->linear ? it->linear + place : NULL,
                               it->gate && it->rows_per_gate == 1 ? it->gate + place : NULL,
                               it->residual ? it->residual + place : NULL};
    for (int end = 0; end < ENDS; end++)
      if (ends[end]) {
        fetch->stream[fetch->streams] = (const char *)ends[end];
        fetch->apart[fetch->streams++] = (end == 0 && it->heads_out ? of.size : it->n) * (int64_t)sizeof(float);
      }
  }
}

/* Rows of `block->panels` panels from `panel` on. */
static void multiply(
    const PackedGemm *gemm, const Variant *variant, Block *block, int64_t panel, int64_t first, int64_t last,
    const uint8_t *const codes[2], Scratch *scratch) {
  const int64_t k = filled(gemm->k), all = last - first, stride = block->panels * PANEL;
  const int64_t chunks = (all + variant->rows - 1) / variant->rows;
  const int run = variant->adds_pairs ? run_of(gemm) : 0, limbs = gemm->low_codes ? 2 : 1;
  int64_t most = variant->adds_pairs && !run ? K_BLOCK / 2 : K_BLOCK; /* weights of 16 bits are as many bytes */
  int64_t spread = 0; /* factors that are there: where there are no multipliers all are 1, for runs of any length */
  for (int64_t s = 0, end = 0; s < gemm->sums; s++) {
    int64_t start = end;
    end = gemm->sums == 1 ? k : start + gemm->k / gemm->sums;
    for (block->k0 = start; block->k0 < end; block->k0 += block->k) {
      block->k = end - block->k0 < most ? end - block->k0 : most;
      block->run = run, block->fresh = block->k0 == start;
      for (int part = 0; part < block->panels; part++) {
        block->weight = stored(gemm, panel + part, 0);
        if (gemm->multipliers) block->multipliers = gemm->multipliers + (panel + part) * (gemm->k / gemm->group) * PANEL;
        block->w[part] = variant->decode(block, scratch->decoded + part * block->k * PANEL);
      }
      if (run && variant->longer_run) block->run = variant->longer_run(block);
      int64_t runs = block->run ? block->k / (block->run * QUAD) : 0;
      if (block->multipliers ? run : runs > spread) spread_factors(block, scratch->factors), spread = runs;
      for (int64_t row = 0, chunk = 0, rows; row < all; row += rows, chunk++) {
        rows = all - row < variant->rows ? all - row : variant->rows;
        next_weights(gemm, block, panel, chunk, chunks, &block->fetch);
        block->fetch.streams = 0;
        if (!variant->fetches) fetch_weights(&block->fetch, block->panels);
        else if (block->k0 + block->k == k) next_lines(gemm, panel, block->panels, first + row, &block->fetch);
        for (int limb = 0; limb < limbs; limb++) {
          int32_t *sums = scratch->sums[limb] + row * stride;
          variant->add(block, codes[limb] + row * k + block->k0, k, rows, sums);
        }
        if (block->k0 + block->k == end)
          finish_rows(gemm, panel, block->panels, s, first + row, row, rows, scratch, EXP_BOUND);
      }
    }
  }
}

void packed_gemm_panels(
    const PackedGemm *gemm, int64_t panel, int64_t end, int64_t first, int64_t last, void *memory) {
  const Variant *variant = packed_gemm_chosen();
  const uint8_t *codes[2] = {gemm->codes, gemm->low_codes};
  Scratch scratch;
  lay_out(gemm, memory, &scratch);
  for (int limb = 0; limb < 2; limb++)
    if (codes[limb])
      codes[limb] = whole_octets(gemm, codes[limb] + first * gemm->k, last - first, scratch.tail[limb]);
  for (; panel < end; panel += variant->panels) {
    Block block = {.gemm = gemm, .factors = scratch.factors};
    block.panels = end - panel < variant->panels ? (int)(end - panel) : variant->panels;
    multiply(gemm, variant, &block, panel, first, last, codes, &scratch);
  }
}
