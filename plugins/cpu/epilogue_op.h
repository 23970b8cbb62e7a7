/* The epilogue's inputs and outputs as PackedGemm and TokenChain have them: what fits, and what is wrong. */
#ifndef FPQ_EPILOGUE_OP_H
#define FPQ_EPILOGUE_OP_H

#include "epilogue.h"
#include "ort_op.h"

typedef struct EpilogueInputs {
  const Tensor *token_scale, *bias, *gate, *residual;
} EpilogueInputs;

/* Rows that share one row of an input [samples, 1, n], [n] or [rows, n]; 0 if its shape does not fit. */
static inline int64_t rows_per_sample(const Tensor *tensor, int64_t n, int64_t rows) {
  int64_t samples = tensor->count / n;
  return tensor->count == samples * n && samples > 0 && rows % samples == 0 ? rows / samples : 0;
}

/* What is wrong with the shapes for rows [..., n], NULL if nothing is; then the epilogue has its sizes and inputs. */
static inline const char *fit_epilogue(Epilogue *it, const Tensor *rows, const EpilogueInputs *in) {
  int64_t n = rows->dims[rows->rank - 1], count = rows->count / n, heads = it->heads_out;
  if (heads && (heads < 0 || rows->rank != 3 || n % heads))
    return "heads_out must divide the channels of [batch, tokens, n]";
  if (in->token_scale->data && in->token_scale->count != count) return "token_scale must have one number a row";
  if (in->bias->data && in->bias->count != n) return "bias must have one number a channel";
  if (in->residual->data && in->residual->count != rows->count) return "residual must have the shape of x";
  it->rows_per_gate = in->gate->data ? rows_per_sample(in->gate, n, count) : 1;
  if (count && !it->rows_per_gate) return "gate must be [batch, 1, channels], [channels] or of the shape of x";
  it->n = n, it->tokens = rows->rank > 1 ? rows->dims[rows->rank - 2] : 1;
  it->token_scale = in->token_scale->data, it->bias = in->bias->data;
  it->gate = in->gate->data, it->residual = in->residual->data;
  return NULL;
}

/* Memory for the outputs that somebody reads. */
static inline Status *make_epilogue(
    const Api *api, KernelContext *context, size_t linear, size_t y, const Tensor *rows, Epilogue *it) {
  TRY(make_output(api, context, linear, rows, it->n, 0, &it->linear));
  return make_output(api, context, y, rows, it->n, it->heads_out, &it->y);
}

static inline Status *epilogue_attributes(const Api *api, const KernelInfo *info, Epilogue *it) {
  int64_t activation = NO_ACTIVATION;
  TRY(CALL(api, attribute_int)(info, "activation", &activation));
  if (activation < 0 || activation >= ACTIVATIONS)
    return invalid(api, "activation must be 0 (none), 1 (GELU) or 2 (SiLU)");
  it->activation = (Activation)activation;
  return CALL(api, attribute_int)(info, "heads_out", &it->heads_out);
}

#endif
