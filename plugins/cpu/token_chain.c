/* Kernels of TokenChain. Plain C that compilers vectorize; compile with -ffp-contract=off and without fast-math.
 *
 * Every loop does the same float operations in the same order whatever the width of the vectors, so all instruction
 * sets give the same bits.
 */
#include "token_chain.h"

#include <math.h>
#include <string.h>

#include "exponential.h"
#include "variants.h"

static inline int32_t magnitude_bits(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & INT32_MAX;
}

/* x (1 + tanh(u)) / 2 = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3). `bound`, 87, is no constant here: of
 * one, compilers make branches with results computed beforehand, and then no vectors. */
static inline float gelu(float x, float bound) {
  float t = x * (-1.5957691216f - 0.0713548163f * (x * x));
  t = t < bound ? t : bound;
  t = t > -bound ? t : -bound;
  return x / (1.0f + exponential(t));
}

VARIANTS void scale_and_add(const float *x, float scale, const float *bias, float *out, int64_t n) {
  ELEMENTWISE
  for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale + bias[i];
}

VARIANTS void scale_by(const float *x, float scale, float *out, int64_t n) {
  ELEMENTWISE
  for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale;
}

VARIANTS void join_sums(
    const int32_t *high, const int32_t *low, int32_t weight, const float *scale, float *out, int64_t n) {
  ELEMENTWISE
  for (int64_t i = 0; i < n; i++) out[i] = (float)(high[i] * weight + low[i]) * scale[i];
}

VARIANTS void add(const float *x, const float *y, float *out, int64_t n) {
  ELEMENTWISE
  for (int64_t i = 0; i < n; i++) out[i] = x[i] + y[i];
}

VARIANTS void multiply(const float *x, const float *y, float *out, int64_t n) {
  ELEMENTWISE
  for (int64_t i = 0; i < n; i++) out[i] = x[i] * y[i];
}

VARIANTS void multiply_and_add(const float *x, const float *y, const float *z, float *out, int64_t n) {
  ELEMENTWISE
  for (int64_t i = 0; i < n; i++) out[i] = x[i] * y[i] + z[i];
}

VARIANTS void gelu_row(const float *x, float bound, float *out, int64_t n) {
  ELEMENTWISE
  for (int64_t i = 0; i < n; i++) out[i] = gelu(x[i], bound);
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

/* Row of an array, NULL for no array. */
static inline float *row_of(float *array, int64_t row, int64_t n) { return array ? array + row * n : NULL; }

/* Where part `head` of a row lies in [samples, heads, tokens, n / heads]. */
static inline int64_t part_of(const TokenChain *chain, int64_t row, int64_t heads, int64_t head) {
  int64_t sample = row / chain->tokens, token = row % chain->tokens;
  return ((sample * heads + head) * chain->tokens + token) * (chain->n / heads);
}

static const float *gather_row(const TokenChain *chain, int64_t row, float *out) {
  int64_t heads = chain->heads_in, size = chain->n / heads;
  for (int64_t head = 0; head < heads; head++)
    memcpy(out + head * size, chain->x + part_of(chain, row, heads, head), (size_t)size * sizeof *out);
  return out;
}

static const float *input_row(const TokenChain *chain, int64_t row, float *out) {
  int64_t n = chain->n;
  if (chain->heads_in) return gather_row(chain, row, out);
  if (!chain->high_sum) return chain->x + row * n;
  const int32_t *high = chain->high_sum + row * n, *low = chain->low_sum + row * n;
  join_sums(high, low, chain->limb_weight, chain->channel_scale, out, n);
  return out;
}

static const float *linear_row(const TokenChain *chain, const float *x, int64_t row, float *out) {
  int64_t n = chain->n;
  if (chain->token_scale && chain->bias) scale_and_add(x, chain->token_scale[row], chain->bias, out, n);
  else if (chain->token_scale) scale_by(x, chain->token_scale[row], out, n);
  else if (chain->bias) add(x, chain->bias, out, n);
  else return x;
  return out;
}

static const float *residual_row(const TokenChain *chain, const float *x, int64_t row, float *out) {
  int64_t n = chain->n;
  const float *gate = chain->gate ? chain->gate + row / chain->rows_per_gate * n : NULL;
  const float *residual = chain->residual ? chain->residual + row * n : NULL;
  if (chain->gelu) gelu_row(x, EXP_BOUND, out, n), x = out;
  if (gate && residual) multiply_and_add(x, gate, residual, out, n), x = out;
  else if (gate) multiply(x, gate, out, n), x = out;
  else if (residual) add(x, residual, out, n), x = out;
  return x;
}

static void scatter_row(const TokenChain *chain, int64_t row, const float *from) {
  int64_t heads = chain->heads_out, size = chain->n / heads;
  for (int64_t head = 0; head < heads; head++)
    memcpy(chain->y + part_of(chain, row, heads, head), from + head * size, (size_t)size * sizeof *from);
}

static void copy_row(const float *from, float *to, int64_t n) {
  if (to && from != to) memcpy(to, from, (size_t)n * sizeof *to);
}

void token_chain_rows(const TokenChain *chain, int64_t first, int64_t last, float *scratch) {
  int64_t n = chain->n;
  for (int64_t row = first; row < last; row++) {
    float *linear = row_of(chain->linear, row, n), *y = row_of(chain->heads_out ? NULL : chain->y, row, n);
    float *quantized = row_of(chain->quantized, row, n);
    float *product = row_of(chain->product, row, n);
    const float *at = input_row(chain, row, product ? product : scratch);
    at = linear_row(chain, at, row, linear ? linear : y ? y : scratch);
    copy_row(at, linear, n);
    at = residual_row(chain, at, row, y ? y : scratch);
    copy_row(at, y, n);
    if (chain->heads_out && chain->y) scatter_row(chain, row, at);
    if (chain->norm_scale) {
      int64_t sample = row / chain->rows_per_norm * n;
      float *out = quantized ? quantized : scratch;
      norm_row(at, chain->norm_scale + sample, chain->norm_shift + sample, chain->epsilon, out, n);
      at = out;
    }
    copy_row(at, quantized, n);
    if (chain->codes) quantize_row(chain, at, row);
  }
}
