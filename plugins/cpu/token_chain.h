/* What happens to a token between two GEMMs, one row at a time while it is in the cache. */
#ifndef FPQ_TOKEN_CHAIN_H
#define FPQ_TOKEN_CHAIN_H

#include <stdint.h>

#include "epilogue.h"

/* Stages in order; a NULL input or output leaves its stage out. All floats are binary32, nothing is contracted:
 *
 *   linear, y = those of the epilogue of x        x [rows, n]; see epilogue.h
 *   quantized = y, or norm(y) * norm_scale + norm_shift        [rows / rows_per_norm, n] each
 *   codes     = zero + integer of quantized / scale, scale [rows] as fpq.QuantizeActivation has it; with limb_base the
 *               integer is limb_base * (codes - zero) + (low_codes - zero), codes rounded to nearest even
 *
 * Attention keeps a row in parts: with heads_in x is [samples, heads_in, tokens, n / heads_in].
 */
typedef struct TokenChain {
  const float *x, *norm_scale, *norm_shift;
  Epilogue epilogue;
  int64_t heads_in; /* 0: rows in one piece */
  float epsilon;                                        /* of the norm */
  float absmax_floor, max_value, kmax, rounding_factor; /* of the quantizer, see pipeline/backends/cpu/quantizers.py */
  int32_t zero, limb_base; /* limb_base 0: the integer is one limb */
  uint8_t *codes, *low_codes;
  float *scale, *quantized;
  int64_t n, tokens, rows_per_norm; /* tokens: rows of a sample, for heads */
} TokenChain;

/* Rows first..last-1. scratch: n floats. */
void token_chain_rows(const TokenChain *chain, int64_t first, int64_t last, float *scratch);

#endif
