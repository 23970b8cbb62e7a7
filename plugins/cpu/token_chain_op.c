/* Custom op TokenChain: onnxruntime's tensors in, token_chain_rows on onnxruntime's threads. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "ort_op.h"
#include "token_chain.h"

#define FLOATS_PER_CHUNK 16384 /* rows of one call on one thread: 64 KiB, which stays in its cache */

enum { X, TOKEN_SCALE, BIAS, GATE, RESIDUAL, NORM_SCALE, NORM_SHIFT, HIGH_SUM, LOW_SUM, CHANNEL_SCALE, INPUTS };
enum { CODES, SCALE, Y, LINEAR, QUANTIZED, LOW_CODES, PRODUCT, OUTPUTS };

typedef struct Kernel {
  const Api *api;
  TokenChain options; /* attributes; the other fields are those of one call */
} Kernel;

typedef struct Work {
  TokenChain chain;
  int64_t rows, rows_per_chunk;
  int failed;
} Work;

/* The shape of the rows, in[X]: that of the sums where they stand for x, [samples, tokens, heads * size] where x is
 * [samples, heads, tokens, size]. */
static const char *as_rows(Tensor *in, int64_t heads) {
  Tensor *x = &in[X];
  if (in[HIGH_SUM].data) {
    if (x->data || heads) return "TokenChain: sums stand in the place of x";
    *x = in[HIGH_SUM];
  }
  if (!x->data || x->rank == 0) return "TokenChain: x must have at least one dimension";
  if (!heads) return NULL;
  if (x->rank != 4 || x->dims[1] != heads) return "TokenChain: x must be [batch, heads, tokens, size] with heads_in heads";
  x->dims[1] = x->dims[2];
  x->dims[2] = heads * x->dims[3];
  x->rank = 3;
  return NULL;
}

/* Rows that share one row of an input [samples, 1, n] or [n]; 0 if its shape does not fit. */
static int64_t rows_per_sample(const Tensor *tensor, int64_t n, int64_t rows) {
  int64_t samples = tensor->count / n;
  return tensor->count == samples * n && samples > 0 && rows % samples == 0 ? rows / samples : 0;
}

/* What is wrong with the shapes, NULL if nothing is; sets rows and the sizes of the chain. */
static const char *check(const Tensor *in, Work *work) {
  int64_t n = in[X].dims[in[X].rank - 1], heads = work->chain.heads_out;
  if (n <= 0) return "TokenChain: x has no channels";
  if (heads && (in[X].rank != 3 || n % heads)) return "TokenChain: heads_out must divide the channels of [batch, tokens, n]";
  int64_t rows = in[X].count / n;
  if (in[TOKEN_SCALE].data && in[TOKEN_SCALE].count != rows) return "TokenChain: token_scale must have one number a row";
  if (!in[HIGH_SUM].data != !in[LOW_SUM].data || !in[HIGH_SUM].data != !in[CHANNEL_SCALE].data)
    return "TokenChain: high_sum, low_sum and channel_scale come together";
  if (in[LOW_SUM].data && in[LOW_SUM].count != in[X].count) return "TokenChain: low_sum must have the shape of high_sum";
  if (in[CHANNEL_SCALE].data && in[CHANNEL_SCALE].count != n) return "TokenChain: channel_scale must have one number a channel";
  if (in[BIAS].data && in[BIAS].count != n) return "TokenChain: bias must have one number a channel";
  if (in[RESIDUAL].data && in[RESIDUAL].count != in[X].count) return "TokenChain: residual must have the shape of x";
  if (!in[NORM_SCALE].data != !in[NORM_SHIFT].data) return "TokenChain: a norm needs both its scale and its shift";
  int64_t gate = in[GATE].data ? rows_per_sample(&in[GATE], n, rows) : 1;
  int64_t norm = in[NORM_SCALE].data ? rows_per_sample(&in[NORM_SCALE], n, rows) : 1;
  if (rows && (!gate || !norm)) return "TokenChain: gate and norm_scale must be [batch, 1, channels] or [channels]";
  if (in[NORM_SHIFT].count != in[NORM_SCALE].count) return "TokenChain: norm_shift must have the shape of norm_scale";
  work->chain.tokens = in[X].rank > 1 ? in[X].dims[in[X].rank - 2] : 1;
  work->chain.n = n, work->chain.rows_per_gate = gate, work->chain.rows_per_norm = norm;
  work->rows = rows;
  return NULL;
}

static void run_chunk(void *data, size_t index) {
  Work *work = data;
  int64_t first = (int64_t)index * work->rows_per_chunk, last = first + work->rows_per_chunk;
  float *scratch = malloc((size_t)work->chain.n * sizeof *scratch);
  if (!scratch) {
    work->failed = 1;
    return;
  }
  token_chain_rows(&work->chain, first, last < work->rows ? last : work->rows, scratch);
  free(scratch);
}

static Status *compute(void *data, KernelContext *context) {
  const Kernel *kernel = data;
  const Api *api = kernel->api;
  Work work = {.chain = kernel->options};
  TokenChain *chain = &work.chain;
  Tensor in[INPUTS];
  for (size_t i = 0; i < INPUTS; i++) TRY(read_tensor(api, context, i, &in[i]));
  const char *wrong = as_rows(in, chain->heads_in);
  if (!wrong) wrong = check(in, &work);
  if (wrong) return invalid(api, wrong);
  chain->high_sum = (const int32_t *)in[HIGH_SUM].data, chain->low_sum = (const int32_t *)in[LOW_SUM].data;
  chain->channel_scale = in[CHANNEL_SCALE].data;
  chain->x = in[X].data, chain->token_scale = in[TOKEN_SCALE].data, chain->bias = in[BIAS].data;
  chain->gate = in[GATE].data, chain->residual = in[RESIDUAL].data;
  chain->norm_scale = in[NORM_SCALE].data, chain->norm_shift = in[NORM_SHIFT].data;
  TRY(make_output(api, context, CODES, &in[X], chain->n, 0, (void **)&chain->codes));
  TRY(make_output(api, context, SCALE, &in[X], 1, 0, (void **)&chain->scale));
  TRY(make_output(api, context, Y, &in[X], chain->n, chain->heads_out, (void **)&chain->y));
  TRY(make_output(api, context, LINEAR, &in[X], chain->n, 0, (void **)&chain->linear));
  TRY(make_output(api, context, QUANTIZED, &in[X], chain->n, 0, (void **)&chain->quantized));
  TRY(make_output(api, context, LOW_CODES, &in[X], chain->n, 0, (void **)&chain->low_codes));
  TRY(make_output(api, context, PRODUCT, &in[X], chain->n, 0, (void **)&chain->product));
  if (chain->product && !chain->high_sum) return invalid(api, "TokenChain: product is that of high_sum and low_sum");
  if (!chain->low_codes != !(chain->codes && chain->limb_base))
    return invalid(api, "TokenChain: low_codes come with codes and limb_base");
  if (!chain->codes != !chain->scale) return invalid(api, "TokenChain: codes and scale come together");
  if (!work.rows) return NULL;
  work.rows_per_chunk = FLOATS_PER_CHUNK / chain->n + 1;
  size_t chunks = (size_t)((work.rows + work.rows_per_chunk - 1) / work.rows_per_chunk);
  TRY(CALL(api, parallel_for)(context, run_chunk, chunks, 0, &work));
  return work.failed ? CALL(api, create_status)(FAIL, "TokenChain: out of memory") : NULL;
}

static Status *create_kernel(const CustomOp *op, const Api *api, const KernelInfo *info, void **out) {
  (void)op;
  TokenChain options = {0};
  int64_t gelu = 0, zero = 0, limb_base = 0, limb_weight = 0;
  TRY(CALL(api, attribute_int)(info, "heads_in", &options.heads_in));
  TRY(CALL(api, attribute_int)(info, "heads_out", &options.heads_out));
  TRY(CALL(api, attribute_int)(info, "gelu", &gelu));
  TRY(CALL(api, attribute_int)(info, "zero", &zero));
  TRY(CALL(api, attribute_int)(info, "limb_base", &limb_base));
  TRY(CALL(api, attribute_int)(info, "limb_weight", &limb_weight));
  TRY(CALL(api, attribute_float)(info, "epsilon", &options.epsilon));
  TRY(CALL(api, attribute_float)(info, "absmax_floor", &options.absmax_floor));
  TRY(CALL(api, attribute_float)(info, "max_value", &options.max_value));
  TRY(CALL(api, attribute_float)(info, "kmax", &options.kmax));
  TRY(CALL(api, attribute_float)(info, "rounding_factor", &options.rounding_factor));
  options.gelu = gelu != 0, options.zero = (int32_t)zero;
  options.limb_base = (int32_t)limb_base, options.limb_weight = (int32_t)limb_weight;
  Kernel *kernel = malloc(sizeof *kernel);
  if (!kernel) return CALL(api, create_status)(FAIL, "TokenChain: out of memory");
  *kernel = (Kernel){api, options};
  *out = kernel;
  return NULL;
}

static const char *op_name(const CustomOp *op) { return (void)op, "TokenChain"; }
static size_t input_count(const CustomOp *op) { return (void)op, INPUTS; }
static size_t output_count(const CustomOp *op) { return (void)op, OUTPUTS; }
static int input_type(const CustomOp *op, size_t index) {
  return (void)op, index == HIGH_SUM || index == LOW_SUM ? TYPE_INT32 : TYPE_FLOAT;
}
static int output_type(const CustomOp *op, size_t index) {
  return (void)op, index == CODES || index == LOW_CODES ? TYPE_UINT8 : TYPE_FLOAT;
}

const CustomOp TOKEN_CHAIN = {
    OP_DEFAULTS,
    .name = op_name,
    .input_type = input_type,
    .input_count = input_count,
    .output_type = output_type,
    .output_count = output_count,
    .create_kernel = create_kernel,
    .compute = compute,
};
