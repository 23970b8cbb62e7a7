/* What happens to a token between two GEMMs, one row at a time while it is in the cache. */
#ifndef FPQ_TOKEN_CHAIN_H
#define FPQ_TOKEN_CHAIN_H

#include <stdint.h>

/* Stages in order; a NULL input or output leaves its stage out. All floats are binary32, nothing is contracted:
 *
 *   product   = (high_sum * limb_weight + low_sum) * channel_scale      int32 [rows, n] each, channel_scale [n]
 *   x         = product, where there are sums
 *   linear    = x * token_scale + bias            x [rows, n], token_scale [rows], bias [n]
 *   y         = linear, or gelu(linear)           the tanh form
 *   y         = y * gate, then + residual         gate [rows / rows_per_gate, n], residual [rows, n]
 *   quantized = y, or norm(y) * norm_scale + norm_shift        [rows / rows_per_norm, n] each
 *   codes     = zero + integer of quantized / scale, scale [rows] as fpq.QuantizeActivation has it; with limb_base the
 *               integer is limb_base * (codes - zero) + (low_codes - zero), codes rounded to nearest even
 *
 * Attention keeps a row in parts: with heads_in x, with heads_out y is [samples, heads, tokens, n / heads] instead.
 */
typedef struct TokenChain {
  const int32_t *high_sum, *low_sum;
  const float *channel_scale, *x, *token_scale, *bias, *gate, *residual, *norm_scale, *norm_shift;
  int gelu;
  int64_t heads_in, heads_out; /* 0: rows in one piece */
  float epsilon;                                        /* of the norm */
  float absmax_floor, max_value, kmax, rounding_factor; /* of the quantizer, see pipeline/backends/cpu/quantizers.py */
  int32_t zero, limb_base, limb_weight; /* limb_base 0: the integer is one limb */
  uint8_t *codes, *low_codes;
  float *product, *scale, *y, *linear, *quantized;
  int64_t n, tokens, rows_per_gate, rows_per_norm; /* tokens: rows of a sample, for heads */
} TokenChain;

/* Rows first..last-1. scratch: n floats. */
void token_chain_rows(const TokenChain *chain, int64_t first, int64_t last, float *scratch);

#endif
