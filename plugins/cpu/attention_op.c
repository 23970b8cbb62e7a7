/* Custom op Attention: onnxruntime's tensors in, attention_block on onnxruntime's threads. */
#include "attention.h"
#include "ort_op.h"
#include "scratch.h"

enum { Q, K, V, MASK, INPUTS };
enum { AT_ONCE = 12 }; /* a number of queries that whole tiles of every instruction set make up */

typedef struct Kernel {
  const Api *api;
  float scale;
} Kernel;

typedef struct Work {
  Attention attention;
  int64_t blocks, queries; /* of a head; queries of a block */
  int failed;
} Work;

/* What is wrong with the shapes, NULL if nothing is; sets the sizes of the attention. */
static const char *check(const Tensor *in, Attention *attention) {
  for (int i = Q; i <= V; i++)
    if (in[i].rank != 4) return "Attention: q, k and v must be [samples, heads, tokens, size]";
  const int64_t *q = in[Q].dims, *k = in[K].dims, *mask = in[MASK].dims;
  if (memcmp(k, in[V].dims, 4 * sizeof *k)) return "Attention: k and v must have the same shape";
  if (q[0] != k[0] || q[1] != k[1] || q[3] != k[3]) return "Attention: q and k must have the same samples, heads and size";
  if (q[3] <= 0) return "Attention: q has no channels";
  attention->samples = q[0], attention->heads = q[1], attention->queries = q[2], attention->size = q[3];
  attention->keys = k[2];
  if (!in[MASK].data) return NULL;
  int64_t whole[] = {q[0], q[1], q[2], k[2]}, step = 1;
  if (in[MASK].rank > 4) return "Attention: mask has more than 4 dimensions";
  for (int axis = 3, at = (int)in[MASK].rank - 1; axis >= 0; axis--, at--) {
    int64_t size = at < 0 ? 1 : mask[at];
    if (size != 1 && size != whole[axis]) return "Attention: mask does not fit [samples, heads, queries, keys]";
    attention->mask_step[axis] = size == 1 ? 0 : step;
    step *= size;
  }
  return NULL;
}

static void run_block(void *data, size_t index) {
  Work *work = data;
  const Attention *attention = &work->attention;
  int64_t first = (int64_t)index % work->blocks * work->queries, part = (int64_t)index / work->blocks;
  int64_t left = attention->queries - first, count = left < work->queries ? left : work->queries;
  void *scratch = take_scratch(attention_scratch(attention));
  if (!scratch) {
    work->failed = 1;
    return;
  }
  if (count > 0) attention_block(attention, part / attention->heads, part % attention->heads, first, count, scratch);
  give_scratch(scratch);
}

static Status *compute(void *data, KernelContext *context) {
  const Kernel *kernel = data;
  const Api *api = kernel->api;
  Work work = {.attention = {.scale = kernel->scale}};
  Attention *attention = &work.attention;
  Tensor in[INPUTS];
  for (size_t i = 0; i < INPUTS; i++) TRY(read_tensor(api, context, i, &in[i]));
  const char *wrong = check(in, attention);
  if (wrong) return invalid(api, wrong);
  attention->q = in[Q].data, attention->k = in[K].data, attention->v = in[V].data;
  attention->mask = in[MASK].data;
  TRY(make_output(api, context, 0, &in[Q], attention->size, 0, (void **)&attention->out));
  int64_t heads = attention->samples * attention->heads, queries = attention->queries;
  if (!heads || !queries || !attention->out) return NULL;
  work.blocks = (queries + QUERIES - 1) / QUERIES;
  work.queries = ((queries + work.blocks - 1) / work.blocks + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
  TRY(CALL(api, parallel_for)(context, run_block, (size_t)(heads * work.blocks), 0, &work));
  return work.failed ? CALL(api, create_status)(FAIL, "Attention: out of memory") : NULL;
}

static Status *create_kernel(const CustomOp *op, const Api *api, const KernelInfo *info, void **out) {
  (void)op;
  float scale = 0;
  TRY(CALL(api, attribute_float)(info, "scale", &scale));
  Kernel *kernel = malloc(sizeof *kernel);
  if (!kernel) return CALL(api, create_status)(FAIL, "Attention: out of memory");
  *kernel = (Kernel){api, scale};
  *out = kernel;
  return NULL;
}

static const char *op_name(const CustomOp *op) { return (void)op, "Attention"; }
static size_t input_count(const CustomOp *op) { return (void)op, INPUTS; }
static size_t output_count(const CustomOp *op) { return (void)op, 1; }
static int type(const CustomOp *op, size_t index) { return (void)op, (void)index, TYPE_FLOAT; }

const CustomOp ATTENTION = {
    OP_DEFAULTS,
    .name = op_name,
    .input_type = type,
    .input_count = input_count,
    .output_type = type,
    .output_count = output_count,
    .create_kernel = create_kernel,
    .compute = compute,
};
