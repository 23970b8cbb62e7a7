/* Custom ops Attention, AttentionOperands and QuantizedAttention: onnxruntime's tensors in, blocks of queries, or heads of
 * keys and values, on onnxruntime's threads. */
#include <stdatomic.h>

#include "attention.h"
#include "ort_op.h"
#include "quantized_attention.h"
#include "scratch.h"

typedef struct Kernel {
  const Api *api;
  QuantizedAttention options; /* attributes; the other fields are those of one call */
} Kernel;

typedef struct Work {
  QuantizedAttention attention;
  int64_t blocks, queries; /* of a head; queries of a block */
  char *operands;          /* of each head, labelled, where they are quantized */
  atomic_int failed;       /* by any of its threads */
} Work;

static Status *read_tensors(const Api *api, KernelContext *context, size_t count, Tensor *in) {
  for (size_t i = 0; i < count; i++) TRY(read_tensor(api, context, i, &in[i]));
  return NULL;
}

/* These say what is wrong with a tensor, NULL if nothing is, and set what it tells of the attention. */
static const char *check_queries(const Tensor *q, Attention *attention) {
  if (q->rank != 4) return "attention: q must be [samples, heads, tokens, size]";
  if (q->dims[3] <= 0) return "attention: q has no channels";
  attention->samples = q->dims[0], attention->heads = q->dims[1], attention->queries = q->dims[2];
  attention->size = q->dims[3], attention->q = q->data;
  return NULL;
}

static const char *check_keys(const Tensor *k, const Tensor *v, Attention *attention) {
  if (k->rank != 4 || v->rank != 4) return "attention: k and v must be [samples, heads, tokens, size]";
  if (memcmp(k->dims, v->dims, 4 * sizeof *k->dims)) return "attention: k and v must have the same shape";
  attention->samples = k->dims[0], attention->heads = k->dims[1], attention->keys = k->dims[2];
  attention->size = k->dims[3], attention->k = k->data, attention->v = v->data;
  return NULL;
}

static const char *check_mask(const Tensor *mask, Attention *attention) {
  if (!mask->data) return NULL;
  int64_t whole[] = {attention->samples, attention->heads, attention->queries, attention->keys}, step = 1;
  if (mask->rank > 4) return "attention: mask has more than 4 dimensions";
  for (int axis = 3, at = (int)mask->rank - 1; axis >= 0; axis--, at--) {
    int64_t size = at < 0 ? 1 : mask->dims[at];
    if (size != 1 && size != whole[axis]) return "attention: mask does not fit [samples, heads, queries, keys]";
    attention->mask_step[axis] = size == 1 ? 0 : step;
    step *= size;
  }
  if (mask->count != 1 || *(const float *)mask->data != 0) attention->mask = mask->data; /* one 0 masks nothing */
  return NULL;
}

/* The output, of the shape of q; NULL where nobody reads it or it has no element: then there is nothing to compute. */
static Status *make_result(const Api *api, KernelContext *context, const Tensor *q, Attention *attention) {
  void *out;
  TRY(make_output(api, context, 0, q, attention->size, 0, &out));
  attention->out = q->count ? out : NULL;
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

/* --- of floats ----------------------------------------------------------------------------------------------------- */

enum { Q, K, V, MASK, INPUTS };

static const char *check(const Tensor *in, Attention *attention) {
  const char *wrong = check_keys(&in[K], &in[V], attention);
  if (!wrong) wrong = check_queries(&in[Q], attention);
  if (wrong) return wrong;
  const int64_t *q = in[Q].dims, *k = in[K].dims;
  if (q[0] != k[0] || q[1] != k[1] || q[3] != k[3]) return "attention: q and k must have the same samples, heads and size";
  return check_mask(&in[MASK], attention);
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
  const Api *api = kernel->api;
  Work work = {.attention = kernel->options};
  Attention *attention = &work.attention.tensors;
  Tensor in[INPUTS];
  TRY(read_tensors(api, context, INPUTS, in));
  const char *wrong = check(in, attention);
  if (wrong) return invalid(api, wrong);
  TRY(make_result(api, context, &in[Q], attention));
  return attention->out ? run_blocks(api, context, run_block, QUERIES, MOST_LANES, &work) : NULL;
}

/* --- of codes: keys and values ------------------------------------------------------------------------------------- */

enum { OF_KEYS, OF_VALUES, OPERANDS_INPUTS };
/* Operands are read and written as floats and integers, and by vectors that would else lie in two lines of the cache. A
 * tensor that a caller hands over may begin anywhere. */
static int is_aligned(const void *memory) { return (uintptr_t)memory % LABEL_BYTES == 0; }

static int64_t heads_of(const Work *work) { return work->attention.tensors.samples * work->attention.tensors.heads; }

static char *labelled(const Work *work, int64_t part) {
  return work->operands + part * quantized_attention_labelled(&work->attention);
}

static HeadOperands operands_of(const Work *work, int64_t part) {
  return quantized_attention_operands(&work->attention, labelled(work, part) + LABEL_BYTES);
}

static void prepare_head(void *data, size_t index) {
  Work *work = data;
  HeadOperands operands = operands_of(work, (int64_t)index);
  void *scratch = scratch_of(work, quantized_attention_work(&work->attention));
  if (!scratch) return;
  quantized_attention_label(&work->attention, labelled(work, (int64_t)index));
  quantized_attention_prepare(&work->attention, (int64_t)index, &operands, scratch);
  give_scratch(scratch);
}

static Status *compute_operands(void *data, KernelContext *context) {
  const Kernel *kernel = data;
  const Api *api = kernel->api;
  Work work = {.attention = kernel->options};
  const Attention *attention = &work.attention.tensors;
  Tensor in[OPERANDS_INPUTS];
  TRY(read_tensors(api, context, OPERANDS_INPUTS, in));
  const char *wrong = check_keys(&in[OF_KEYS], &in[OF_VALUES], &work.attention.tensors);
  if (wrong) return invalid(api, wrong);
  if (attention->size <= 0) return invalid(api, "AttentionOperands: k has no channels");
  if (attention->keys > MOST_KEYS) return invalid(api, "AttentionOperands: sums over more than 65793 keys are not exact");
  if (!attention->keys) return invalid(api, "AttentionOperands: no keys, whose weights would add up to one");
  Tensor heads = {.dims = {attention->samples, attention->heads}, .rank = 3};
  int64_t bytes = quantized_attention_labelled(&work.attention), count = heads_of(&work);
  void *out;
  TRY(make_output(api, context, 0, &heads, bytes, 0, &out));
  if (!count || !out) return NULL;
  work.operands = is_aligned(out) ? out : take_scratch(count * bytes);
  if (!work.operands) return out_of_memory(api);
  Status *status = CALL(api, parallel_for)(context, prepare_head, (size_t)count, 0, &work);
  if (!status && work.failed) status = out_of_memory(api);
  if (work.operands != out) {
    memcpy(out, work.operands, (size_t)(count * bytes));
    give_scratch(work.operands);
  }
  return status;
}

/* --- of codes: queries --------------------------------------------------------------------------------------------- */

enum { OF_QUERIES, OF_OPERANDS, OF_MASK, QUANTIZED_INPUTS };

/* What a tensor of operands says it has becomes the attention's, whose queries are known. An error where it is no such
 * tensor for them, before anything behind its end is read. */
static Status *check_operands(const Api *api, const Tensor *operands, QuantizedAttention *attention) {
  Attention *tensors = &attention->tensors;
  if (operands->rank != 3 || operands->dims[0] != tensors->samples || operands->dims[1] != tensors->heads)
    return invalid(api, "QuantizedAttention: operands must be [samples, heads, bytes], samples and heads as q has them");
  char why[MOST_WORDS];
  int64_t heads = tensors->samples * tensors->heads;
  return quantized_attention_misfit(attention, operands->data, heads, operands->dims[2], why) ? invalid(api, why) : NULL;
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
  Work work = {.attention = kernel->options};
  Attention *attention = &work.attention.tensors;
  Tensor in[QUANTIZED_INPUTS];
  TRY(read_tensors(api, context, QUANTIZED_INPUTS, in));
  const char *wrong = check_queries(&in[OF_QUERIES], attention);
  if (wrong) return invalid(api, wrong);
  TRY(check_operands(api, &in[OF_OPERANDS], &work.attention));
  /* Of no heads nobody says how many keys there are. */
  if (heads_of(&work) && (wrong = check_mask(&in[OF_MASK], attention))) return invalid(api, wrong);
  TRY(make_result(api, context, &in[OF_QUERIES], attention));
  if (!attention->out) return NULL;
  char *given = in[OF_OPERANDS].data;
  work.operands = is_aligned(given) ? given : take_scratch(in[OF_OPERANDS].count);
  if (!work.operands) return out_of_memory(api);
  if (work.operands != given) memcpy(work.operands, given, (size_t)in[OF_OPERANDS].count);
  int64_t rows = quantized_attention_rows(&work.attention);
  Status *status = run_blocks(api, context, run_quantized_block, rows, quantized_attention_at_once(), &work);
  if (work.operands != given) give_scratch(work.operands);
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

/* Which of the ops of codes has an attribute. Both have what their numbers must agree in, see check_operands. */
enum { TOLD_OPERANDS = 1, TOLD_QUERIES = 2 };

static Status *create_kernel_of_codes(const Api *api, const KernelInfo *info, int told, void **out) {
  QuantizedAttention options = {0};
  struct {
    int told;
    const char *name;
    float *value;
  } attributes[] = {
      {TOLD_QUERIES, "scale", &options.tensors.scale},
      {TOLD_QUERIES | TOLD_OPERANDS, "absmax_floor", &options.absmax_floor},
      {TOLD_QUERIES | TOLD_OPERANDS, "qk_max_value", &options.qk.max_value},
      {TOLD_QUERIES | TOLD_OPERANDS, "qk_kmax", &options.qk.kmax},
      {TOLD_QUERIES | TOLD_OPERANDS, "qk_rounding_factor", &options.qk.rounding_factor},
      {TOLD_QUERIES | TOLD_OPERANDS, "pv_kmax", &options.pv.kmax},
      {TOLD_OPERANDS, "pv_max_value", &options.pv.max_value},
      {TOLD_OPERANDS, "pv_rounding_factor", &options.pv.rounding_factor},
  };
  for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++)
    if (attributes[i].told & told) TRY(CALL(api, attribute_float)(info, attributes[i].name, attributes[i].value));
  for (int i = 0; i < 2; i++) {
    const Grid *grid = i ? &options.pv : &options.qk;
    if (!(grid->kmax >= 1 && grid->kmax <= 127)) return invalid(api, "quantized attention: kmax must be 1 to 127");
  }
  return new_kernel(api, &options, out);
}

static Status *create_operands_kernel(const CustomOp *op, const Api *api, const KernelInfo *info, void **out) {
  return (void)op, create_kernel_of_codes(api, info, TOLD_OPERANDS, out);
}

static Status *create_quantized_kernel(const CustomOp *op, const Api *api, const KernelInfo *info, void **out) {
  return (void)op, create_kernel_of_codes(api, info, TOLD_QUERIES, out);
}

static const char *name(const CustomOp *op) { return (void)op, "Attention"; }
static const char *operands_name(const CustomOp *op) { return (void)op, "AttentionOperands"; }
static const char *quantized_name(const CustomOp *op) { return (void)op, "QuantizedAttention"; }
static size_t input_count(const CustomOp *op) { return (void)op, INPUTS; }
static size_t operands_input_count(const CustomOp *op) { return (void)op, OPERANDS_INPUTS; }
static size_t quantized_input_count(const CustomOp *op) { return (void)op, QUANTIZED_INPUTS; }
static size_t output_count(const CustomOp *op) { return (void)op, 1; }
static int type_float(const CustomOp *op, size_t index) { return (void)op, (void)index, TYPE_FLOAT; }
static int type_bytes(const CustomOp *op, size_t index) { return (void)op, (void)index, TYPE_UINT8; }
static int quantized_type(const CustomOp *op, size_t index) {
  return (void)op, index == OF_OPERANDS ? TYPE_UINT8 : TYPE_FLOAT;
}

const CustomOp ATTENTION = {
    OP_DEFAULTS,
    .name = name,
    .input_type = type_float,
    .input_count = input_count,
    .output_type = type_float,
    .output_count = output_count,
    .create_kernel = create_kernel,
    .compute = compute,
};
const CustomOp ATTENTION_OPERANDS = {
    OP_DEFAULTS,
    .name = operands_name,
    .input_type = type_float,
    .input_count = operands_input_count,
    .output_type = type_bytes,
    .output_count = output_count,
    .create_kernel = create_operands_kernel,
    .compute = compute_operands,
};
const CustomOp QUANTIZED_ATTENTION = {
    OP_DEFAULTS,
    .name = quantized_name,
    .input_type = quantized_type,
    .input_count = quantized_input_count,
    .output_type = type_float,
    .output_count = output_count,
    .create_kernel = create_quantized_kernel,
    .compute = compute_quantized,
};
