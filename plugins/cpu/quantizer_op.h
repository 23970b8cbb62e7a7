/* The norm and the quantizer of a row, as PackedGemm and TokenChain have them: what fits, and what is wrong. */
#ifndef FPQ_QUANTIZER_OP_H
#define FPQ_QUANTIZER_OP_H

#include "epilogue_op.h"
#include "ort_op.h"
#include "token_chain.h"

/* What is wrong with a norm's scale and shift for rows of n channels, NULL if nothing is; then the chain has them. */
static inline const char *fit_norm(TokenChain *chain, const Tensor *scale, const Tensor *shift, int64_t n, int64_t rows) {
  if (!scale->data != !shift->data) return "a norm needs both its scale and its shift";
  chain->rows_per_norm = scale->data ? rows_per_sample(scale, n, rows) : 1;
  if (rows && !chain->rows_per_norm) return "norm_scale must be [batch, 1, channels] or [channels]";
  if (shift->count != scale->count) return "norm_shift must have the shape of norm_scale";
  chain->norm_scale = scale->data, chain->norm_shift = shift->data;
  return NULL;
}

/* Memory for the outputs of rows [..., n] that somebody reads; refuses those that do not go together. */
static inline Status *make_codes(
    const Api *api, KernelContext *context, const size_t places[4], const Tensor *rows, TokenChain *chain) {
  TRY(make_output(api, context, places[0], rows, chain->n, 0, &chain->codes));
  TRY(make_output(api, context, places[1], rows, 1, 0, &chain->scale));
  TRY(make_output(api, context, places[2], rows, chain->n, 0, &chain->quantized));
  TRY(make_output(api, context, places[3], rows, chain->n, 0, &chain->low_codes));
  if (!chain->low_codes != !(chain->codes && chain->limb_base))
    return invalid(api, "low_codes come with codes and limb_base");
  return !chain->codes == !chain->scale ? NULL : invalid(api, "codes and scale come together");
}

/* zero_name: of the attribute that is added to the integers. */
static inline Status *quantizer_attributes(
    const Api *api, const KernelInfo *info, const char *zero_name, TokenChain *chain) {
  int64_t zero = 0, limb_base = 0;
  TRY(CALL(api, attribute_int)(info, zero_name, &zero));
  TRY(CALL(api, attribute_int)(info, "limb_base", &limb_base));
  TRY(CALL(api, attribute_float)(info, "epsilon", &chain->epsilon));
  TRY(CALL(api, attribute_float)(info, "absmax_floor", &chain->absmax_floor));
  TRY(CALL(api, attribute_float)(info, "max_value", &chain->max_value));
  TRY(CALL(api, attribute_float)(info, "kmax", &chain->kmax));
  TRY(CALL(api, attribute_float)(info, "rounding_factor", &chain->rounding_factor));
  chain->zero = (int32_t)zero, chain->limb_base = (int32_t)limb_base;
  return NULL;
}

#endif
