/* Custom op PackedGemm: onnxruntime's tensors in, packed_gemm_panels on onnxruntime's threads. */
#include "epilogue_op.h"
#include "ort_op.h"
#include "packed_gemm.h"
#include "scratch.h"

/* At least so many products, some 10 microseconds, and panels for so few tasks that each reads a stretch of the weights,
 * which many numbers of threads divide. */
enum { PRODUCTS_PER_TASK = 1 << 20, TASKS_PER_BLOCK = 48 };

enum {
  CODES, LOW_CODES, WEIGHT, MULTIPLIERS, TABLE, SCALE, WEIGHT_SUM, GROUP_SCALE, /* of the product */
  TOKEN_SCALE, BIAS, GATE, RESIDUAL, INPUTS
};
enum { PRODUCT, INTEGER_SUMS, LINEAR, Y, OUTPUTS };

typedef struct Kernel {
  const Api *api;
  PackedGemm options; /* attributes; the other fields are those of one call */
} Kernel;

typedef struct Work {
  PackedGemm gemm;
  int64_t panels, panels_per_task, tasks_per_block, rows_per_block;
  int failed;
} Work;

/* What is wrong with the shapes, NULL if nothing is; sets the sizes of the GEMM. */
static const char *check(const Tensor *in, PackedGemm *gemm) {
  if (in[CODES].rank == 0) return "PackedGemm: codes must have at least one dimension";
  gemm->k = in[CODES].dims[in[CODES].rank - 1], gemm->n = in[SCALE].rank ? in[SCALE].dims[in[SCALE].rank - 1] : 0;
  if (gemm->k <= 0 || gemm->n <= 0) return "PackedGemm: codes and scale must have channels";
  gemm->scales = in[SCALE].count / gemm->n, gemm->sums = in[WEIGHT_SUM].count / gemm->n;
  gemm->rows = in[CODES].count / gemm->k, gemm->group_scales = 1;
  if (in[GROUP_SCALE].data && gemm->rows) gemm->group_scales = in[GROUP_SCALE].count / gemm->rows;
  if (!in[MULTIPLIERS].data) gemm->group = gemm->k;
  int64_t panels = (gemm->n + PANEL - 1) / PANEL, octets = (gemm->k + OCTET - 1) / OCTET;
  int64_t bytes = panels * octets * PANEL * (in[TABLE].data ? QUAD : OCTET);
  if (in[WEIGHT].count != bytes) return "PackedGemm: weight must be [panels, k / 8, 64], without a table [panels, k / 4, 64]";
  if (in[TABLE].data && in[TABLE].count != 16) return "PackedGemm: table must have 16 integers";
  if (gemm->sums <= 0 || in[WEIGHT_SUM].count != gemm->sums * gemm->n || in[SCALE].count != gemm->scales * gemm->n)
    return "PackedGemm: weight_sum and scale must be [sums, channels]";
  if (in[GROUP_SCALE].data && in[GROUP_SCALE].count != gemm->rows * gemm->group_scales)
    return "PackedGemm: group_scale must be [tokens, scales]";
  if (in[LOW_CODES].data && in[LOW_CODES].count != in[CODES].count)
    return "PackedGemm: low_codes must have the shape of codes";
  Tensor rows = in[CODES];
  rows.dims[rows.rank - 1] = gemm->n, rows.count = gemm->rows * gemm->n;
  EpilogueInputs inputs = {&in[TOKEN_SCALE], &in[BIAS], &in[GATE], &in[RESIDUAL]};
  return fit_epilogue(&gemm->epilogue, &rows, &inputs);
}

static void run_task(void *data, size_t index) {
  Work *work = data;
  const PackedGemm *gemm = &work->gemm;
  int64_t first = (int64_t)index / work->tasks_per_block * work->rows_per_block, last = first + work->rows_per_block;
  int64_t panel = (int64_t)index % work->tasks_per_block * work->panels_per_task, end = panel + work->panels_per_task;
  void *scratch = take_scratch(packed_gemm_scratch(gemm));
  if (!scratch) {
    work->failed = 1;
    return;
  }
  packed_gemm_panels(
      gemm, panel, end < work->panels ? end : work->panels, first, last < gemm->rows ? last : gemm->rows, scratch);
  give_scratch(scratch);
}

static Status *compute(void *data, KernelContext *context) {
  const Kernel *kernel = data;
  const Api *api = kernel->api;
  Work work = {.gemm = kernel->options};
  PackedGemm *gemm = &work.gemm;
  Tensor in[INPUTS];
  for (size_t i = 0; i < INPUTS; i++) TRY(read_tensor(api, context, i, &in[i]));
  const char *wrong = check(in, gemm);
  if (wrong) return invalid(api, wrong);
  gemm->codes = in[CODES].data, gemm->low_codes = in[LOW_CODES].data;
  gemm->weight = in[WEIGHT].data, gemm->multipliers = in[MULTIPLIERS].data, gemm->table = in[TABLE].data;
  gemm->scale = in[SCALE].data, gemm->weight_sum = in[WEIGHT_SUM].data;
  gemm->group_scale = in[GROUP_SCALE].data;
  if ((wrong = packed_gemm_misfit(gemm))) return invalid(api, wrong);
  work.panels = (gemm->n + PANEL - 1) / PANEL;
  if (gemm->multipliers && in[MULTIPLIERS].count != work.panels * (gemm->k / gemm->group) * PANEL)
    return invalid(api, "PackedGemm: multipliers must be [panels, k / group_size, 16]");
  TRY(make_output(api, context, PRODUCT, &in[CODES], gemm->n, 0, (void **)&gemm->product));
  Tensor sums = {.rank = 3, .dims = {gemm->sums, gemm->rows}};
  TRY(make_output(api, context, INTEGER_SUMS, &sums, gemm->n, 0, (void **)&gemm->integer_sums));
  TRY(make_epilogue(api, context, LINEAR, Y, &in[CODES], &gemm->epilogue));
  if (!gemm->rows || !(gemm->product || gemm->integer_sums || gemm->epilogue.linear || gemm->epilogue.y)) return NULL;
  /* Blocks of about as many rows: threads take whole ones, as far as there are enough. */
  int64_t blocks = (gemm->rows + MAX_ROWS - 1) / MAX_ROWS;
  work.rows_per_block = (gemm->rows + blocks - 1) / blocks;
  work.panels_per_task = PRODUCTS_PER_TASK / (work.rows_per_block * gemm->k * PANEL) + 1;
  if (work.panels_per_task < work.panels / TASKS_PER_BLOCK) work.panels_per_task = work.panels / TASKS_PER_BLOCK;
  work.panels_per_task += work.panels_per_task % 2; /* some variants take two at once */
  work.tasks_per_block = (work.panels + work.panels_per_task - 1) / work.panels_per_task;
  TRY(CALL(api, parallel_for)(context, run_task, (size_t)(blocks * work.tasks_per_block), 0, &work));
  return work.failed ? CALL(api, create_status)(FAIL, "PackedGemm: out of memory") : NULL;
}

static Status *create_kernel(const CustomOp *op, const Api *api, const KernelInfo *info, void **out) {
  (void)op;
  PackedGemm options = {0};
  int64_t zero = 0, limb_weight = 0, largest_code = 0, largest_weight = 0;
  TRY(CALL(api, attribute_int)(info, "zero", &zero));
  TRY(CALL(api, attribute_int)(info, "limb_weight", &limb_weight));
  TRY(CALL(api, attribute_int)(info, "largest_code", &largest_code));
  TRY(CALL(api, attribute_int)(info, "largest_weight", &largest_weight));
  TRY(CALL(api, attribute_int)(info, "group_size", &options.group));
  TRY(epilogue_attributes(api, info, &options.epilogue));
  if (zero != (int32_t)zero || limb_weight != (int32_t)limb_weight || largest_code != (int32_t)largest_code ||
      largest_weight != (int32_t)largest_weight)
    return invalid(api, "PackedGemm: zero, limb_weight, largest_code and largest_weight must fit 32 bits");
  options.zero = (int32_t)zero, options.limb_weight = (int32_t)limb_weight;
  options.largest_code = (int32_t)largest_code, options.largest_weight = (int32_t)largest_weight;
  Kernel *kernel = malloc(sizeof *kernel);
  if (!kernel) return CALL(api, create_status)(FAIL, "PackedGemm: out of memory");
  *kernel = (Kernel){api, options};
  *out = kernel;
  return NULL;
}

static const char *op_name(const CustomOp *op) { return (void)op, "PackedGemm"; }
static size_t input_count(const CustomOp *op) { return (void)op, INPUTS; }
static size_t output_count(const CustomOp *op) { return (void)op, OUTPUTS; }
static int input_type(const CustomOp *op, size_t index) {
  static const int types[INPUTS] = {[CODES] = TYPE_UINT8,       [LOW_CODES] = TYPE_UINT8, [WEIGHT] = TYPE_UINT8,
                                    [MULTIPLIERS] = TYPE_UINT8, [TABLE] = TYPE_INT8,      [SCALE] = TYPE_FLOAT,
                                    [WEIGHT_SUM] = TYPE_INT32,  [GROUP_SCALE] = TYPE_FLOAT, [TOKEN_SCALE] = TYPE_FLOAT,
                                    [BIAS] = TYPE_FLOAT,        [GATE] = TYPE_FLOAT,      [RESIDUAL] = TYPE_FLOAT};
  return (void)op, types[index];
}
static int output_type(const CustomOp *op, size_t index) { return (void)op, (void)index, TYPE_FLOAT; }

const CustomOp PACKED_GEMM = {
    OP_DEFAULTS,
    .name = op_name,
    .input_type = input_type,
    .input_count = input_count,
    .output_type = output_type,
    .output_count = output_count,
    .create_kernel = create_kernel,
    .compute = compute,
};
