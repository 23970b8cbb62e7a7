/* Custom ops Attention and QuantizedAttention: onnxruntime's tensors in, blocks of queries on onnxruntime's threads. */
#include <stdatomic.h>

#include "attention.h"
#include "ort_op.h"
#include "quantized_attention.h"
#include "scratch.h"

enum { Q, K, V, MASK, INPUTS };

typedef struct Kernel {
  const Api *api;
  QuantizedAttention options; /* attributes; the other fields are those of one call */
} Kernel;

typedef struct Work {
  QuantizedAttention attention;
  int64_t blocks, queries; /* of a head; queries of a block */
  char *operands;          /* of each head, where they are quantized */
  atomic_int failed; /* by any of its threads */
} Work;

/* What is wrong with the shapes, NULL if nothing is; sets the sizes of the attention. */
static const char *check(const Tensor *in, Attention *attention) {
  for (int i = Q; i <= V; i++)
    if (in[i].rank != 4) return "attention: q, k and v must be [samples, heads, tokens, size]";
  const int64_t *q = in[Q].dims, *k = in[K].dims, *mask = in[MASK].dims;
  if (memcmp(k, in[V].dims, 4 * sizeof *k)) return "attention: k and v must have the same shape";
  if (q[0] != k[0] || q[1] != k[1] || q[3] != k[3]) return "attention: q and k must have the same samples, heads and size";
  if (q[3] <= 0) return "attention: q has no channels";
  attention->samples = q[0], attention->heads = q[1], attention->queries = q[2], attention->size = q[3];
  attention->keys = k[2];
  attention->q = in[Q].data, attention->k = in[K].data, attention->v = in[V].data;
  if (!in[MASK].data) return NULL;
  int64_t whole[] = {q[0], q[1], q[2], k[2]}, step = 1;
  if (in[MASK].rank > 4) return "attention: mask has more than 4 dimensions";
  for (int axis = 3, at = (int)in[MASK].rank - 1; axis >= 0; axis--, at--) {
    int64_t size = at < 0 ? 1 : mask[at];
    if (size != 1 && size != whole[axis]) return "attention: mask does not fit [samples, heads, queries, keys]";
    attention->mask_step[axis] = size == 1 ? 0 : step;
    step *= size;
  }
  if (in[MASK].count != 1 || *(const float *)in[MASK].data != 0) attention->mask = in[MASK].data; /* one 0 masks nothing */
  return NULL;
}

/* Reads a call's tensors and makes its output; NULL in `out` of the attention where there is nothing to compute. */
static Status *begin(const Kernel *kernel, KernelContext *context, Work *work) {
  Attention *attention = &work->attention.tensors;
  Tensor in[INPUTS];
  *work = (Work){.attention = kernel->options};
  for (size_t i = 0; i < INPUTS; i++) TRY(read_tensor(kernel->api, context, i, &in[i]));
  const char *wrong = check(in, attention);
  if (wrong) return invalid(kernel->api, wrong);
  TRY(make_output(kernel->api, context, 0, &in[Q], attention->size, 0, (void **)&attention->out));
  if (!attention->samples || !attention->heads || !attention->queries) attention->out = NULL;
  return NULL;
}

static Status *out_of_memory(const Api *api) { return CALL(api, create_status)(FAIL, "attention: out of memory"); }

/* Runs `task` for every block of at most `rows` queries of every head, of a multiple of `at_once` but for the last. */
static Status *run_blocks(
    const Api *api, KernelContext *context, void (*task)(void *, size_t), int64_t rows, int64_t at_once, Work *work) {
  const Attention *attention = &work->attention.tensors;
  int64_t queries = attention->queries;
  work->blocks = (queries + rows - 1) / rows;
  work->queries = filled((queries + work->blocks - 1) / work->blocks, at_once);
  size_t heads = (size_t)(attention->samples * attention->heads);
  TRY(CALL(api, parallel_for)(context, task, heads * (size_t)work->blocks, 0, work));
  return work->failed ? out_of_memory(api) : NULL;
}

typedef struct Queries {
  int64_t part, first, count; /* of head `part`; none where count is not above 0 */
} Queries;

static Queries queries_of(const Work *work, size_t index) {
  int64_t part = (int64_t)index / work->blocks, first = (int64_t)index % work->blocks * work->queries;
  int64_t left = work->attention.tensors.queries - first;
  return (Queries){part, first, left < work->queries ? left : work->queries};
}

/* Memory for a task, NULL where it has run out, which the call then says. */
static void *scratch_of(Work *work, int64_t bytes) {
  void *scratch = take_scratch(bytes);
  if (!scratch) work->failed = 1;
  return scratch;
}

static void run_block(void *data, size_t index) {
  Work *work = data;
  const Attention *attention = &work->attention.tensors;
  Queries at = queries_of(work, index);
  void *scratch = scratch_of(work, attention_scratch(attention));
  if (!scratch) return;
  if (at.count > 0)
    attention_block(attention, at.part / attention->heads, at.part % attention->heads, at.first, at.count, scratch);
  give_scratch(scratch);
}

static Status *compute(void *data, KernelContext *context) {
  const Kernel *kernel = data;
  Work work;
  TRY(begin(kernel, context, &work));
  if (!work.attention.tensors.out) return NULL;
  return run_blocks(kernel->api, context, run_block, QUERIES, MOST_LANES, &work);
}

/* --- of codes ------------------------------------------------------------------------------------------------------ */

static HeadOperands operands_of(const Work *work, int64_t part) {
  return quantized_attention_operands(
      &work->attention, work->operands + part * quantized_attention_head(&work->attention));
}

static void prepare_head(void *data, size_t index) {
  Work *work = data;
  HeadOperands operands = operands_of(work, (int64_t)index);
  void *scratch = scratch_of(work, quantized_attention_work(&work->attention));
  if (!scratch) return;
  quantized_attention_prepare(&work->attention, (int64_t)index, &operands, scratch);
  give_scratch(scratch);
}

static void run_quantized_block(void *data, size_t index) {
  Work *work = data;
  Queries at = queries_of(work, index);
  HeadOperands operands = operands_of(work, at.part);
  void *scratch = scratch_of(work, quantized_attention_scratch(&work->attention));
  if (!scratch) return;
  if (at.count > 0) quantized_attention_block(&work->attention, at.part, &operands, at.first, at.count, scratch);
  give_scratch(scratch);
}

static Status *compute_quantized(void *data, KernelContext *context) {
  const Kernel *kernel = data;
  const Api *api = kernel->api;
  Work work;
  TRY(begin(kernel, context, &work));
  const Attention *attention = &work.attention.tensors;
  int64_t heads = attention->samples * attention->heads;
  if (!attention->out) return NULL;
  if (attention->keys > MOST_KEYS) return invalid(api, "QuantizedAttention: sums over more than 65793 keys are not exact");
  if (!attention->keys) return invalid(api, "QuantizedAttention: no keys, whose weights would add up to one");
  work.operands = take_scratch(heads * quantized_attention_head(&work.attention));
  if (!work.operands) return out_of_memory(api);
  Status *status = CALL(api, parallel_for)(context, prepare_head, (size_t)heads, 0, &work);
  if (!status && work.failed) status = out_of_memory(api);
  int64_t rows = quantized_attention_rows(&work.attention);
  if (!status) status = run_blocks(api, context, run_quantized_block, rows, QUERIES_AT_ONCE, &work);
  give_scratch(work.operands);
  return status;
}

/* --- their descriptions -------------------------------------------------------------------------------------------- */

static Status *new_kernel(const Api *api, const QuantizedAttention *options, void **out) {
  Kernel *kernel = malloc(sizeof *kernel);
  if (!kernel) return out_of_memory(api);
  *kernel = (Kernel){api, *options};
  *out = kernel;
  return NULL;
}

static Status *create_kernel(const CustomOp *op, const Api *api, const KernelInfo *info, void **out) {
  (void)op;
  QuantizedAttention options = {0};
  TRY(CALL(api, attribute_float)(info, "scale", &options.tensors.scale));
  return new_kernel(api, &options, out);
}

static Status *create_quantized_kernel(const CustomOp *op, const Api *api, const KernelInfo *info, void **out) {
  (void)op;
  QuantizedAttention options = {0};
  struct {
    const char *name;
    float *value;
  } attributes[] = {
      {"scale", &options.tensors.scale},
      {"absmax_floor", &options.absmax_floor},
      {"qk_max_value", &options.qk.max_value},
      {"qk_kmax", &options.qk.kmax},
      {"qk_rounding_factor", &options.qk.rounding_factor},
      {"pv_max_value", &options.pv.max_value},
      {"pv_kmax", &options.pv.kmax},
      {"pv_rounding_factor", &options.pv.rounding_factor},
  };
  for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++)
    TRY(CALL(api, attribute_float)(info, attributes[i].name, attributes[i].value));
  for (int i = 0; i < 2; i++) {
    const Grid *grid = i ? &options.pv : &options.qk;
    if (!(grid->kmax >= 1 && grid->kmax <= 127)) return invalid(api, "QuantizedAttention: kmax must be 1 to 127");
  }
  return new_kernel(api, &options, out);
}

static const char *name(const CustomOp *op) { return (void)op, "Attention"; }
static const char *quantized_name(const CustomOp *op) { return (void)op, "QuantizedAttention"; }
static size_t input_count(const CustomOp *op) { return (void)op, INPUTS; }
static size_t output_count(const CustomOp *op) { return (void)op, 1; }
static int type(const CustomOp *op, size_t index) { return (void)op, (void)index, TYPE_FLOAT; }

#define ATTENTION_OP .input_type = type, .input_count = input_count, .output_type = type, .output_count = output_count

const CustomOp ATTENTION = {OP_DEFAULTS, ATTENTION_OP, .name = name, .create_kernel = create_kernel, .compute = compute};
const CustomOp QUANTIZED_ATTENTION = {
    OP_DEFAULTS,
    ATTENTION_OP,
    .name = quantized_name,
    .create_kernel = create_quantized_kernel,
    .compute = compute_quantized,
};
