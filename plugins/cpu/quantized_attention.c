/* The products of QuantizedAttention, a block of queries against all keys of a head, in the variants of PackedGemm. */
#include "quantized_attention.h"

#include <math.h>
#include <string.h>

#include "packed_gemm_variant.h"
#include "span.h"
#include "variants.h"

#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

enum { QUERIES_AT_ONCE = 12 }; /* that whole tiles of every instruction set but AMX make up, by rows */
enum { SCORES_BYTES = 400 << 10, MOST_ROWS = 22 * QUERIES_AT_ONCE, STAGGER = 16, KEY_BLOCK = 512 };

/* Floats from one row of scores to the next: no power of two, of which few rows would share a set of the cache. */
static int64_t score_row(int64_t keys) { return filled(keys, PANEL) + STAGGER; }

static int64_t rows_of_block(const QuantizedAttention *attention) {
  int64_t rows = SCORES_BYTES / (score_row(attention->tensors.keys) * (int64_t)sizeof(float));
  rows = rows / QUERIES_AT_ONCE * QUERIES_AT_ONCE;
  return rows < QUERIES_AT_ONCE ? QUERIES_AT_ONCE : rows > MOST_ROWS ? MOST_ROWS : rows;
}

typedef struct Memory {
  float *scores;        /* [rows, score_row] */
  uint8_t *q, *weights; /* [rows, size filled up to octets], a span more, and [rows, keys filled up to spans] */
  int32_t *sums;        /* [rows, panels, 16], of as many as the variant takes at once */
  float *scale;         /* [rows]: of q, then 1 / sum of the weights */
  float *work;          /* [size filled up to spans] */
  int8_t *decoded;      /* of a block of keys, as a variant may want it */
  int16_t *ones;        /* multipliers of a block */
  uint8_t *heavy;       /* [rows, keys / STRETCH]: which weights may leave 16 bits */
} Memory;

static int64_t lay_out(const QuantizedAttention *attention, char *memory, Memory *parts) {
  int64_t rows = rows_of_block(attention), keys = attention->tensors.keys, used = 0;
  int64_t sizes[] = {
      rows * score_row(keys) * 4, rows * filled(attention->tensors.size, OCTET) + SPAN, rows * filled(keys, SPAN),
      rows * MOST_PANELS * PANEL * 4, rows * 4, filled(attention->tensors.size, SPAN) * 4,
      2 * KEY_BLOCK * PANEL, KEY_BLOCK / QUAD * 2 * PANEL * 2, rows * filled(keys, STRETCH) / STRETCH};
  void *at[9];
  for (int i = 0; i < 9; i++) at[i] = memory ? memory + used : NULL, used += filled(sizes[i], 64);
  if (parts) *parts = (Memory){at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8]};
  return used;
}

static int64_t scratch_of_block(const QuantizedAttention *attention) { return lay_out(attention, NULL, NULL); }

/* x - y modulo 2^32: operands that were damaged may be anything. */
static inline int32_t less(int32_t x, int32_t y) { return (int32_t)((uint32_t)x - (uint32_t)y); }

/* Sums of a panel of keys, `apart` from row to row, -> scores. zero: of the codes of q, which the sums hold too much of
 * the keys for. */
VARIANTS void scores_of_panel(
    const int32_t *sums, int64_t apart, int64_t rows, int32_t zero, const int32_t *key_sum, const float *key_scale,
    const float *scale, float *scores, int64_t stride) {
  int32_t of_zero[PANEL];
  for (int i = 0; i < PANEL; i++) of_zero[i] = (int32_t)((uint32_t)zero * (uint32_t)key_sum[i]);
  for (int64_t row = 0; row < rows; row++) {
    float factor = scale[row];
    FEW_ELEMENTS
    for (int i = 0; i < PANEL; i++)
      scores[row * stride + i] = (float)less(sums[row * apart + i], of_zero[i]) * factor * key_scale[i];
  }
}

VARIANTS void add_mask(float *scores, const float *mask, int64_t keys) {
  ELEMENTWISE
  for (int64_t i = 0; i < keys; i++) scores[i] += mask[i];
}

/* Sums of a panel of channels, `apart` from row to row, -> out. */
INLINE void finish_panel(
    const int32_t *sums, int64_t apart, int64_t rows, const float *value_scale, const float *scale, const int64_t count,
    float *out, int64_t stride) {
  for (int64_t row = 0; row < rows; row++) {
    FEW_ELEMENTS
    for (int64_t i = 0; i < count; i++)
      out[row * stride + i] = (float)sums[row * apart + i] * value_scale[i] * scale[row];
  }
}

VARIANTS void finish(
    const int32_t *sums, int64_t apart, int64_t rows, const float *value_scale, const float *scale, int64_t count,
    float *out, int64_t stride) {
  if (count >= PANEL) finish_panel(sums, apart, rows, value_scale, scale, PANEL, out, stride);
  else if (count == PANEL / 2) finish_panel(sums, apart, rows, value_scale, scale, PANEL / 2, out, stride);
  else finish_panel(sums, apart, rows, value_scale, scale, count, out, stride);
}

/* Sums of at most 255 * kmax in pairs: quads of a run that stay in 16 bits, 0 if a pair does not. */
static int run_of(int32_t largest_code, float kmax) {
  float pair = 2.0f * (float)largest_code * kmax;
  return 2 * pair <= INT16_MAX ? 2 : pair <= INT16_MAX ? 1 : 0;
}

/* codes [rows, k], `stride` bytes apart, times `panels` panels of [k / 4, 16, 4], side by side. */
typedef struct Product {
  const uint8_t *codes;
  const int8_t *panel;
  int64_t stride, k;
  int panels, run, channels; /* channels: of a panel that are read where `heavy` is given */
  const uint8_t *heavy;      /* rows of k / STRETCH marks for codes, NULL for none */
} Product;

/* memory->sums [rows, panels, 16] of the product's rows first..: as many as its variant takes while they stay in the
 * nearest cache. At most KEY_BLOCK of k at a time; variants that take more than one panel read bytes where they are. */
static void multiply(
    const Variant *variant, const Product *product, int64_t first, int64_t rows, const Memory *memory) {
  static const PackedGemm bytes = {0};
  const int64_t k = product->k;
  Block block = {.gemm = &bytes, .panels = product->panels, .run = product->run, .factors = memory->ones};
  block.channels = product->channels, block.heavy_row = filled(k, STRETCH) / STRETCH;
  for (; block.k0 < k; block.k0 += block.k) {
    block.k = k - block.k0 < KEY_BLOCK ? k - block.k0 : KEY_BLOCK, block.fresh = block.k0 == 0;
    if (product->heavy) block.heavy = product->heavy + first * block.heavy_row + block.k0 / STRETCH;
    for (int part = 0; part < product->panels; part++) {
      block.weight = (const uint8_t *)product->panel + part * k * PANEL;
      if (!product->heavy) block.w[part] = variant->decode(&block, memory->decoded);
    }
    variant->add(
        &block, product->codes + first * product->stride + block.k0, product->stride, rows, memory->sums);
  }
}

static void block_by_rows(
    const QuantizedAttention *attention, int64_t part, const HeadOperands *operands, int64_t first, int64_t count,
    void *scratch) {
  const Attention *tensors = &attention->tensors;
  const Variant *variant = packed_gemm_chosen();
  int64_t size = tensors->size, keys = tensors->keys, wide = filled(size, OCTET), stride = score_row(keys);
  int64_t long_row = filled(keys, OCTET), weight_row = filled(keys, SPAN);
  const int64_t *step = tensors->mask_step;
  const float *mask = tensors->mask;
  int32_t zero = quantized_attention_zero(attention);
  float *out = tensors->out + (part * tensors->queries + first) * size;
  Memory memory;
  lay_out(attention, scratch, &memory);
  quantized_attention_queries(
      attention, tensors->q + (part * tensors->queries + first) * size, count, memory.q, memory.scale, memory.work);
  for (int64_t row = 0; row < count; row++) memory.scale[row] *= tensors->scale;
  for (int64_t i = 0; i < KEY_BLOCK / QUAD * 2 * PANEL; i++) memory.ones[i] = 1;

  Product scores = {.codes = memory.q, .stride = wide, .k = wide, .run = run_of(2 * zero, attention->qk.kmax)};
  for (int64_t key = 0; key < keys; key += scores.panels * PANEL) {
    scores.panel = operands->keys + key * wide, scores.panels = keys - key > PANEL ? variant->panels : 1;
    for (int64_t row = 0, rows; row < count; row += rows) {
      rows = count - row < variant->rows ? count - row : variant->rows;
      multiply(variant, &scores, row, rows, &memory);
      for (int64_t part = 0, at = key; part < scores.panels; part++, at += PANEL)
        scores_of_panel(
            memory.sums + part * PANEL, scores.panels * PANEL, rows, zero, operands->key_sum + at,
            operands->key_scale + at, memory.scale + row, memory.scores + row * stride + at, stride);
    }
  }
  if (mask) {
    mask += part / tensors->heads * step[0] + part % tensors->heads * step[1] + first * step[2];
    for (int64_t row = 0; row < count; row++, mask += step[2])
      if (step[3] == 1) add_mask(memory.scores + row * stride, mask, keys);
      else
        for (int64_t key = 0; key < keys; key++) memory.scores[row * stride + key] += mask[key * step[3]];
  }
  quantized_attention_weigh(memory.scores, stride, count, keys, memory.weights, memory.scale);

  Product sums = {.codes = memory.weights, .stride = weight_row, .k = long_row};
  sums.run = run_of(WEIGHT_STEPS, attention->pv.kmax);
  if (variant->mark_heavy && sums.run < 2) { /* most weights are small, and their sums tell more than their bound */
    int32_t most = INT16_MAX / (int32_t)ceilf(attention->pv.kmax);
    int64_t marked = variant->mark_heavy(memory.weights, weight_row, count, long_row, most, memory.heavy);
    /* Products of heavy ones by themselves take more than all widened: no gain from one in eight on. */
    if (sums.run || 8 * marked < count * (filled(keys, STRETCH) / STRETCH)) sums.heavy = memory.heavy;
  }
  for (int64_t channel = 0; channel < size; channel += sums.panels * PANEL) {
    sums.panel = operands->values + channel * long_row, sums.panels = size - channel > PANEL ? variant->panels : 1;
    sums.channels = (int)(size - channel < PANEL ? size - channel : PANEL);
    for (int64_t row = 0, rows; row < count; row += rows) {
      rows = count - row < variant->rows ? count - row : variant->rows;
      multiply(variant, &sums, row, rows, &memory);
      for (int64_t part = 0, at = channel; part < sums.panels; part++, at += PANEL)
        finish(
            memory.sums + part * PANEL, sums.panels * PANEL, rows, operands->value_scale + at, memory.scale + row,
            size - at, out + row * size + at, size);
    }
  }
}

/* --- which block --------------------------------------------------------------------------------------------------- */

typedef struct Blocks {
  int64_t at_once;
  int64_t (*rows)(const QuantizedAttention *);
  int64_t (*scratch)(const QuantizedAttention *);
  void (*block)(const QuantizedAttention *, int64_t, const HeadOperands *, int64_t, int64_t, void *);
} Blocks;

static Blocks blocks(void) {
#if defined(__x86_64__)
  if (packed_gemm_chosen() == &PACKED_GEMM_AVX512_VNNI)
    return (Blocks){MOST_LANES, quantized_attention_vnni_rows, quantized_attention_vnni_scratch, quantized_attention_vnni_block};
#endif
  return (Blocks){QUERIES_AT_ONCE, rows_of_block, scratch_of_block, block_by_rows};
}

int64_t quantized_attention_at_once(void) { return blocks().at_once; }
int64_t quantized_attention_rows(const QuantizedAttention *attention) { return blocks().rows(attention); }
int64_t quantized_attention_scratch(const QuantizedAttention *attention) { return blocks().scratch(attention); }

void quantized_attention_block(
    const QuantizedAttention *attention, int64_t part, const HeadOperands *operands, int64_t first, int64_t count,
    void *scratch) {
  blocks().block(attention, part, operands, first, count, scratch);
}
