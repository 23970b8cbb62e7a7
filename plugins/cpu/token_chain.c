/* Kernels of TokenChain. Plain C that compilers vectorize; compile with -ffp-contract=off and without fast-math.
 *
 * Every loop does the same float operations in the same order whatever the width of the vectors, so all instruction
 * sets give the same bits.
 */
#include "token_chain.h"

#include <math.h>
#include <string.h>

static inline int32_t magnitude_bits(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & INT32_MAX;
}

VARIANTS void finish_row(const Epilogue *it, int64_t row, float bound, float *x) {
  EpilogueRow at = epilogue_row(it, row);
  int64_t whole = it->n - it->n % SPAN, left = it->n - whole;
  Span span;
  for (int64_t channel = 0; channel < whole; channel += SPAN) {
    HeadSpan of = head_span(it, channel);
    load_span(&span, x + channel, SPAN);
    finish_spans(it, at, &of, row, 1, channel, SPAN, bound, &span);
    store_span(&span, x + channel, SPAN);
  }
  if (left) {
    HeadSpan of = head_span(it, whole);
    load_span(&span, x + whole, left);
    finish_spans(it, at, &of, row, 1, whole, left, bound, &span);
    store_span(&span, x + whole, left);
  }
}

static inline float total(const float lanes[LANES]) {
  float sum = 0;
  for (int j = 0; j < LANES; j++) sum += lanes[j];
  return sum;
}

VARIANTS void norm_row(const float *x, const float *scale, const float *shift, float epsilon, float *out, int64_t n) {
  float lanes[LANES] = {0}, squares[LANES] = {0};
  int64_t whole = n - n % LANES;
  for (int64_t i = 0; i < whole; i += LANES)
    for (int j = 0; j < LANES; j++) lanes[j] += x[i + j];
  for (int64_t i = whole; i < n; i++) lanes[i - whole] += x[i];
  float mean = total(lanes) / (float)n;
  for (int64_t i = 0; i < whole; i += LANES)
    for (int j = 0; j < LANES; j++) squares[j] += (x[i + j] - mean) * (x[i + j] - mean);
  for (int64_t i = whole; i < n; i++) squares[i - whole] += (x[i] - mean) * (x[i] - mean);
  float inverse = 1.0f / sqrtf(total(squares) / (float)n + epsilon);
  ELEMENTWISE
  for (int64_t i = 0; i < n; i++) out[i] = ((x[i] - mean) * inverse) * scale[i] + shift[i];
}

/* Bits of the largest magnitude; as integers they are in the order of the magnitudes, infinity and NaN above all. */
VARIANTS int32_t absmax_bits(const float *x, int64_t n) {
  int32_t largest = 0;
  for (int64_t i = 0; i < n; i++) {
    int32_t bits = magnitude_bits(x[i]);
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

/* The "magic add" of pipeline/backends/cpu/quantizers.py. */
VARIANTS void round_row(const float *x, float inverse, float factor, int32_t zero, uint8_t *codes, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    float v = x[i] * inverse, wide = fabsf(v) * factor;
    float c = wide > MAGIC ? wide : MAGIC;
    codes[i] = (uint8_t)(zero + (int32_t)((v + c) - c));
  }
}

/* The same in two limbs. An integer is far below 2^23, so quotients and products by the base, a power of two, are exact. */
VARIANTS void round_row_in_limbs(const float *x, float inverse, const TokenChain *chain, int64_t row) {
  int64_t n = chain->n;
  uint8_t *high = chain->codes + row * n, *low = chain->low_codes + row * n;
  float factor = chain->rounding_factor, base = (float)chain->limb_base, part = 1.0f / base;
  int32_t zero = chain->zero;
  for (int64_t i = 0; i < n; i++) {
    float v = x[i] * inverse, wide = fabsf(v) * factor;
    float c = wide > MAGIC ? wide : MAGIC;
    float whole = (v + c) - c, top = (whole * part + MAGIC) - MAGIC;
    high[i] = (uint8_t)(zero + (int32_t)top);
    low[i] = (uint8_t)(zero + (int32_t)(whole - top * base));
  }
}

static void quantize_row(const TokenChain *chain, const float *x, int64_t row) {
  uint8_t *codes = chain->codes + row * chain->n;
  int32_t bits = absmax_bits(x, chain->n);
  if (bits >= 0x7f800000) { /* infinity or NaN: the token must not look healthy */
    memset(codes, chain->zero, (size_t)chain->n);
    if (chain->low_codes) memset(chain->low_codes + row * chain->n, chain->zero, (size_t)chain->n);
    chain->scale[row] = NAN;
    return;
  }
  float absmax = from_bits(bits);
  absmax = absmax > chain->absmax_floor ? absmax : chain->absmax_floor;
  chain->scale[row] = absmax / chain->max_value;
  float inverse = chain->kmax / absmax;
  if (chain->low_codes) round_row_in_limbs(x, inverse, chain, row);
  else round_row(x, inverse, chain->rounding_factor, chain->zero, codes, chain->n);
}

static void gather_row(const TokenChain *chain, int64_t row, float *out) {
  int64_t heads = chain->heads_in, size = chain->n / heads, sample = row / chain->tokens, token = row % chain->tokens;
  for (int64_t head = 0; head < heads; head++) {
    const float *part = chain->x + ((sample * heads + head) * chain->tokens + token) * size;
    memcpy(out + head * size, part, (size_t)size * sizeof *out);
  }
}

void token_chain_rows(const TokenChain *chain, int64_t first, int64_t last, float *scratch) {
  const Epilogue *epilogue = &chain->epilogue;
  int64_t n = chain->n;
  int finishes = epilogue->linear || epilogue->y || epilogue->token_scale || epilogue->bias ||
                 epilogue->activation || epilogue->gate || epilogue->residual;
  for (int64_t row = first; row < last; row++) {
    const float *at = chain->x + row * n;
    if (chain->heads_in) gather_row(chain, row, scratch), at = scratch;
    if (finishes) {
      if (at != scratch) memcpy(scratch, at, (size_t)n * sizeof *scratch);
      finish_row(epilogue, row, EXP_BOUND, scratch);
      at = scratch;
    }
    if (chain->norm_scale) {
      int64_t sample = row / chain->rows_per_norm * n;
      norm_row(at, chain->norm_scale + sample, chain->norm_shift + sample, chain->epsilon, scratch, n);
      at = scratch;
    }
    if (chain->quantized) memcpy(chain->quantized + row * n, at, (size_t)n * sizeof *at);
    if (chain->codes) quantize_row(chain, at, row);
  }
}
