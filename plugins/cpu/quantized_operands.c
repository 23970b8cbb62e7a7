/* Queries, keys and values of QuantizedAttention as integers. No contraction here: the rounding sums need each of their
 * operations rounded. */
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "exponential.h"
#include "packed_gemm.h"
#include "quantized_attention.h"
#include "span.h"
#include "variants.h"

static int64_t lay_out(const QuantizedAttention *attention, char *memory, HeadOperands *operands) {
  int64_t size = attention->tensors.size, keys = attention->tensors.keys, used = 0;
  int64_t channels = filled(size, PANEL), columns = filled(keys, PANEL);
  int64_t sizes[] = {columns * filled(size, OCTET), channels * filled(keys, OCTET), columns * 4, channels * 4, columns * 4};
  void *parts[5];
  for (int i = 0; i < 5; i++) parts[i] = memory ? memory + used : NULL, used += filled(sizes[i], 64);
  if (operands) *operands = (HeadOperands){parts[0], parts[1], parts[2], parts[3], parts[4]};
  return used;
}

int64_t quantized_attention_head(const QuantizedAttention *attention) { return lay_out(attention, NULL, NULL); }

HeadOperands quantized_attention_operands(const QuantizedAttention *attention, void *memory) {
  HeadOperands operands;
  return lay_out(attention, memory, &operands), operands;
}

int64_t quantized_attention_labelled(const QuantizedAttention *attention) {
  return LABEL_BYTES + quantized_attention_head(attention);
}

/* The name ends with the version of what follows: one more where the order of the operands changes. */
static const char LABEL_NAME[8] = {'F', 'P', 'Q', 'H', 'E', 'A', 'D', '1'};
enum { NUMBERS = 5 };
static const char *const NUMBER_NAMES[NUMBERS] = {"qk_max_value", "qk_kmax", "qk_rounding_factor", "absmax_floor", "pv_kmax"};

typedef struct Label {
  char name[sizeof LABEL_NAME];
  int64_t keys, size;
  float numbers[NUMBERS]; /* what queries must have in common, and what bounds the sums of values */
} Label;

void quantized_attention_label(const QuantizedAttention *attention, void *memory) {
  const Grid *qk = &attention->qk;
  Label label = {
      .keys = attention->tensors.keys,
      .size = attention->tensors.size,
      .numbers = {qk->max_value, qk->kmax, qk->rounding_factor, attention->absmax_floor, attention->pv.kmax},
  };
  memcpy(label.name, LABEL_NAME, sizeof label.name);
  memset(memory, 0, LABEL_BYTES);
  memcpy(memory, &label, offsetof(Label, numbers) + sizeof label.numbers);
}

/* What is wrong with `label`, which should be `expected` but for its keys, 0 for nothing. */
static int label_misfit(const Label *label, const Label *expected, char why[MOST_WORDS]) {
  if (memcmp(label->name, expected->name, sizeof label->name))
    return snprintf(why, MOST_WORDS, "QuantizedAttention: operands do not begin with %.8s: they are of another version, or "
                    "damaged; let AttentionOperands make them again", expected->name);
  if (label->keys < 1 || label->keys > MOST_KEYS)
    return snprintf(why, MOST_WORDS, "QuantizedAttention: operands of %lld keys are damaged: 1 to %d there can be; let "
                    "AttentionOperands make them again", (long long)label->keys, MOST_KEYS);
  if (label->size != expected->size)
    return snprintf(why, MOST_WORDS, "QuantizedAttention: operands of %lld channels for queries of %lld; give those of the "
                    "same attention", (long long)label->size, (long long)expected->size);
  for (int i = 0; i < NUMBERS; i++)
    if (memcmp(label->numbers + i, expected->numbers + i, sizeof *label->numbers))
      return snprintf(why, MOST_WORDS, "QuantizedAttention: operands of another format, with %s %.9g where this attention has "
                      "%.9g; give those of the same attention", NUMBER_NAMES[i], (double)label->numbers[i],
                      (double)expected->numbers[i]);
  return 0;
}

int quantized_attention_misfit(
    QuantizedAttention *attention, const char *tensor, int64_t heads, int64_t bytes, char why[MOST_WORDS]) {
  char line[LABEL_BYTES];
  Label label, expected;
  attention->tensors.keys = 0;
  if (!heads) return 0;
  if (bytes < LABEL_BYTES)
    return snprintf(why, MOST_WORDS, "QuantizedAttention: operands of %lld bytes a head, fewer than the %d that say what "
                    "they are; give what AttentionOperands made", (long long)bytes, LABEL_BYTES);
  quantized_attention_label(attention, line);
  memcpy(&expected, line, sizeof expected), memcpy(&label, tensor, sizeof label);
  if (label_misfit(&label, &expected, why)) return 1;
  attention->tensors.keys = label.keys;
  if (bytes != quantized_attention_labelled(attention))
    return snprintf(why, MOST_WORDS, "QuantizedAttention: operands of %lld bytes a head, of %lld keys there are %lld; let "
                    "AttentionOperands make them again", (long long)bytes, (long long)label.keys,
                    (long long)quantized_attention_labelled(attention));
  quantized_attention_label(attention, line);
  for (int64_t head = 0; head < heads; head++)
    if (memcmp(tensor + head * bytes, line, LABEL_BYTES))
      return snprintf(why, MOST_WORDS, "QuantizedAttention: the label of head %lld of %lld is damaged, or that of the first: "
                      "they differ; let AttentionOperands make them again", (long long)head, (long long)heads);
  return 0;
}

/* Three rows of numbers, and the codes of all keys. */
int64_t quantized_attention_work(const QuantizedAttention *attention) {
  int64_t size = attention->tensors.size;
  return filled(size, PANEL) * 3 * (int64_t)sizeof(float) + filled(attention->tensors.keys * filled(size, OCTET) + SPAN, 64);
}

static inline int32_t magnitude_bits(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & INT32_MAX;
}

/* The "magic add" of pipeline/backends/cpu/quantizers.py. */
static inline int32_t rounded(float v, float factor) {
  float wide = fabsf(v) * factor, c = wide > MAGIC ? wide : MAGIC;
  return (int32_t)((v + c) - c);
}

/* Scale and its inverse of numbers whose largest magnitude has these bits: NaN and 0 unless it is finite. */
static inline float scale_of(const Grid *grid, float floor, int32_t bits, float *inverse) {
  float absmax = from_bits(bits);
  if (bits >= 0x7f800000) return *inverse = 0, NAN;
  absmax = absmax > floor ? absmax : floor;
  *inverse = grid->kmax / absmax;
  return absmax / grid->max_value;
}

/* What a format's integer is worth. */
static inline float unit(const Grid *grid) { return grid->max_value / grid->kmax; }

/* x [count, n] less `mean` by token -> codes, rows of `wide` bytes filled up with 0, `zero` added; the scale of each. A
 * token that is not finite has codes `zero` and the scale NaN. Spans cover a row; the last one ends with it, and has some
 * of its numbers twice. mean: at least a span, with 0 from n on; codes: a span more than those of all tokens. */
VARIANTS void round_tokens(
    const float *x, const float *mean, int64_t count, int64_t n, const Grid *grid, float floor, int32_t zero,
    uint8_t *codes, int64_t wide, float *scale) {
  const float factor = grid->rounding_factor;
  const int64_t last = n < SPAN ? 0 : n - SPAN;
  float few[SPAN] = {0};
  for (int64_t token = 0; token < count; token++, x += n, codes += wide) {
    const float *row = n < SPAN ? memcpy(few, x, (size_t)n * sizeof *x) : x;
    int32_t lanes[SPAN] = {0};
    for (int64_t i = 0; i < n; i += SPAN) {
      int64_t at = i < last ? i : last;
      FEW_ELEMENTS
      for (int j = 0; j < SPAN; j++) lanes[j] = larger_integer(magnitude_bits(row[at + j] - mean[at + j]), lanes[j]);
    }
    float inverse;
    scale[token] = scale_of(grid, floor, largest_integer_of_lanes(lanes, SPAN), &inverse) * unit(grid);
    for (int64_t i = 0; i < n; i += SPAN) {
      int64_t at = i < last ? i : last;
      int32_t integers[SPAN];
      FEW_ELEMENTS
      for (int j = 0; j < SPAN; j++) integers[j] = zero + rounded((row[at + j] - mean[at + j]) * inverse, factor);
      store_bytes((const Integers *)integers, codes + at);
    }
    if (inverse == 0) memset(codes, zero, (size_t)n); /* what came of infinity or NaN */
    for (int64_t i = n; i < wide; i++) codes[i] = 0;
  }
}

void quantized_attention_queries(
    const QuantizedAttention *attention, const float *q, int64_t count, uint8_t *codes, float *scale, float *zeros) {
  int64_t size = attention->tensors.size;
  memset(zeros, 0, (size_t)filled(size, SPAN) * sizeof *zeros);
  round_tokens(
      q, zeros, count, size, &attention->qk, attention->absmax_floor, quantized_attention_zero(attention), codes,
      filled(size, OCTET), scale);
}

VARIANTS void mean_of_tokens(const float *x, int64_t count, int64_t n, double *sum, float *mean) {
  memset(sum, 0, (size_t)n * sizeof *sum);
  for (int64_t token = 0; token < count; token++) {
    ELEMENTWISE
    for (int64_t i = 0; i < n; i++) sum[i] += (double)x[token * n + i];
  }
  for (int64_t i = 0; i < n; i++) mean[i] = (float)(sum[i] / (double)count);
}

/* Codes [keys, wide] -> panels of 16 keys by quads, and the sum of each key's codes. */
VARIANTS void panels_of_keys(const uint8_t *codes, int64_t keys, int64_t wide, int8_t *panels, int32_t *sums) {
  for (int64_t key = 0; key < keys; key++, codes += wide) {
    int8_t *panel = panels + key / PANEL * PANEL * wide + key % PANEL * QUAD;
    int32_t sum = 0;
    for (int64_t i = 0; i < wide; i++) sum += (int8_t)codes[i];
    sums[key] = sum;
    for (int64_t i = 0; i < wide; i += QUAD) memcpy(panel + i * PANEL, codes + i, QUAD);
  }
}

/* row: 2 * size floats. */
static void prepare_keys(
    const QuantizedAttention *attention, const float *k, const HeadOperands *operands, float *mean, float *row,
    uint8_t *codes) {
  int64_t size = attention->tensors.size, keys = attention->tensors.keys, wide = filled(size, OCTET);
  memset(mean, 0, (size_t)filled(size, SPAN) * sizeof *mean);
  mean_of_tokens(k, keys, size, (double *)row, mean);
  round_tokens(
      k, mean, keys, size, &attention->qk, attention->absmax_floor, 0, codes, wide, operands->key_scale);
  panels_of_keys(codes, keys, wide, operands->keys, operands->key_sum);
}

/* The largest magnitude of each channel over all tokens, as bits. */
VARIANTS void widest_tokens(const float *x, int64_t count, int64_t n, int32_t *largest) {
  memset(largest, 0, (size_t)n * sizeof *largest);
  for (int64_t token = 0; token < count; token++) {
    ELEMENTWISE
    for (int64_t i = 0; i < n; i++) {
      int32_t bits = magnitude_bits(x[token * n + i]);
      largest[i] = bits > largest[i] ? bits : largest[i];
    }
  }
}

/* Up to QUAD tokens of n channels -> quads[n]: the codes of a channel, those of missing tokens 0. Channels that are not
 * finite have the inverse 0, and any codes: their scale is NaN. */
VARIANTS void round_quad(
    const float *x, int64_t count, int64_t n, const float *inverse, const Grid *grid, uint32_t *quads) {
  memset(quads, 0, (size_t)n * sizeof *quads);
  for (int64_t token = 0; token < count; token++) {
    ELEMENTWISE
    for (int64_t i = 0; i < n; i++) {
      float v = x[token * n + i] * inverse[i];
      v = v > -grid->kmax ? v : -grid->kmax; /* NaN is no integer */
      quads[i] |= ((uint32_t)rounded(v, grid->rounding_factor) & 255) << (8 * token);
    }
  }
}

static void prepare_values(
    const QuantizedAttention *attention, const float *v, const HeadOperands *operands, float *inverse,
    int32_t *largest) {
  int64_t size = attention->tensors.size, keys = attention->tensors.keys, long_row = filled(keys, OCTET) * PANEL;
  uint32_t *quads = (uint32_t *)largest;
  widest_tokens(v, keys, size, largest);
  for (int64_t i = 0; i < size; i++)
    operands->value_scale[i] =
        scale_of(&attention->pv, attention->absmax_floor, largest[i], inverse + i) * unit(&attention->pv);
  for (int64_t key = 0; key < keys; key += QUAD) {
    round_quad(v + key * size, keys - key < QUAD ? keys - key : QUAD, size, inverse, &attention->pv, quads);
    for (int64_t i = 0; i < size; i += PANEL)
      memcpy(operands->values + i / PANEL * long_row + key * PANEL, quads + i,
             (size_t)((size - i < PANEL ? size - i : PANEL) * QUAD));
  }
}

void quantized_attention_prepare(
    const QuantizedAttention *attention, int64_t part, const HeadOperands *operands, void *work) {
  const Attention *tensors = &attention->tensors;
  int64_t wide = filled(tensors->size, PANEL), first = part * tensors->keys * tensors->size;
  float *one = work, *other = one + wide;
  memset(operands->keys, 0, (size_t)quantized_attention_head(attention));
  prepare_keys(attention, tensors->k + first, operands, one, other, (uint8_t *)(one + 3 * wide));
  prepare_values(attention, tensors->v + first, operands, one, (int32_t *)other);
}
