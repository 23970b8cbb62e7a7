/* Custom op TokenChain: onnxruntime's tensors in, token_chain_rows on onnxruntime's threads. */
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "epilogue_op.h"
#include "ort_op.h"
#include "quantizer_op.h"

#define FLOATS_PER_CHUNK 16384 /* rows of one call on one thread: 64 KiB, which stays in its cache */

enum { X, TOKEN_SCALE, BIAS, GATE, RESIDUAL, NORM_SCALE, NORM_SHIFT, INPUTS };
enum { CODES, SCALE, Y, LINEAR, QUANTIZED, LOW_CODES, OUTPUTS };

typedef struct Kernel {
  const Api *api;
  TokenChain options; /* attributes; the other fields are those of one call */
} Kernel;

typedef struct Work {
  TokenChain chain;
  int64_t rows, rows_per_chunk;
  atomic_int failed; /* by any of its threads */
} Work;

/* The shape of the rows, in[X]: [samples, tokens, heads * size] where x is [samples, heads, tokens, size]. */
static const char *as_rows(Tensor *x, int64_t heads) {
  if (!x->data || x->rank == 0) return "TokenChain: x must have at least one dimension";
  if (!heads) return NULL;
  if (x->rank != 4 || x->dims[1] != heads) return "TokenChain: x must be [batch, heads, tokens, size] with heads_in heads";
  x->dims[1] = x->dims[2];
  x->dims[2] = heads * x->dims[3];
  x->rank = 3;
  return NULL;
}

/* What is wrong with the shapes, NULL if nothing is; sets rows and the sizes of the chain. */
static const char *check(const Tensor *in, Work *work) {
  TokenChain *chain = &work->chain;
  int64_t n = in[X].dims[in[X].rank - 1];
  if (n <= 0) return "TokenChain: x has no channels";
  work->rows = in[X].count / n;
  EpilogueInputs inputs = {&in[TOKEN_SCALE], &in[BIAS], &in[GATE], &in[RESIDUAL]};
  const char *wrong = fit_epilogue(&chain->epilogue, &in[X], &inputs);
  if (wrong) return wrong;
  chain->tokens = chain->epilogue.tokens, chain->n = n;
  return fit_norm(chain, &in[NORM_SCALE], &in[NORM_SHIFT], n, work->rows);
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
  const char *wrong = as_rows(&in[X], chain->heads_in);
  if (!wrong) wrong = check(in, &work);
  if (wrong) return invalid(api, wrong);
  chain->x = in[X].data;
  static const size_t places[] = {CODES, SCALE, QUANTIZED, LOW_CODES};
  TRY(make_codes(api, context, places, &in[X], chain));
  TRY(make_epilogue(api, context, LINEAR, Y, &in[X], &chain->epilogue));
  if (!work.rows) return NULL;
  work.rows_per_chunk = FLOATS_PER_CHUNK / chain->n + 1;
  size_t chunks = (size_t)((work.rows + work.rows_per_chunk - 1) / work.rows_per_chunk);
  TRY(CALL(api, parallel_for)(context, run_chunk, chunks, 0, &work));
  return work.failed ? CALL(api, create_status)(FAIL, "TokenChain: out of memory") : NULL;
}

static Status *create_kernel(const CustomOp *op, const Api *api, const KernelInfo *info, void **out) {
  (void)op;
  TokenChain options = {0};
  TRY(CALL(api, attribute_int)(info, "heads_in", &options.heads_in));
  TRY(epilogue_attributes(api, info, &options.epilogue));
  TRY(quantizer_attributes(api, info, "zero", &options));
  Kernel *kernel = malloc(sizeof *kernel);
  if (!kernel) return CALL(api, create_status)(FAIL, "TokenChain: out of memory");
  *kernel = (Kernel){api, options};
  *out = kernel;
  return NULL;
}

static const char *op_name(const CustomOp *op) { return (void)op, "TokenChain"; }
static size_t input_count(const CustomOp *op) { return (void)op, INPUTS; }
static size_t output_count(const CustomOp *op) { return (void)op, OUTPUTS; }
static int input_type(const CustomOp *op, size_t index) { return (void)op, (void)index, TYPE_FLOAT; }
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
