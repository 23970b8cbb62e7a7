/* Custom op PackedGemm: onnxruntime's tensors in, packed_gemm_panels on onnxruntime's threads; then the norm and the
 * quantizer of what reads its rows, for a block of them as soon as it is there. */
#include <stdatomic.h>

#include "epilogue_op.h"
#include "limits.h"
#include "ort_op.h"
#include "packed_gemm.h"
#include "quantizer_op.h"
#include "scratch.h"
#include "yield.h"

/* At least so many products, some 10 microseconds, and panels for so few tasks that each reads a stretch of the weights,
 * which many numbers of threads divide. */
enum { PRODUCTS_PER_TASK = 1 << 20, TASKS_PER_BLOCK = 48 };
/* Blocks of rows that are there at once where only the quantizer reads them: one is multiplied while the one before it
 * is quantized. */
enum { SLOTS = 2, FLOATS_PER_CHUNK = 16384 };

enum {
  CODES, LOW_CODES, WEIGHT, MULTIPLIERS, TABLE, SCALE, WEIGHT_SUM, GROUP_SCALE, /* of the product */
  TOKEN_SCALE, BIAS, GATE, RESIDUAL, /* of the epilogue */
  NORM_SCALE, NORM_SHIFT, INPUTS     /* of the quantizer */
};
enum { PRODUCT, INTEGER_SUMS, LINEAR, Y, NEXT_CODES, NEXT_SCALE, QUANTIZED, NEXT_LOW_CODES, OUTPUTS };

typedef struct Kernel {
  const Api *api;
  PackedGemm options; /* attributes; the other fields are those of one call */
  TokenChain quantizer;
} Kernel;

typedef struct Work {
  PackedGemm gemm;
  TokenChain quantizer; /* of rows y; it makes what somebody reads of it */
  int64_t blocks, panels, panels_per_task, tasks_per_block, rows_per_block;
  atomic_int failed; /* by any of its threads */
  /* Where rows are quantized: y [SLOTS blocks of rows, n] where no output holds them, and what is done of each block. */
  float *slots;
  int64_t rows_per_chunk, chunks_per_block;
  atomic_llong claimed, *multiplied, *quantized; /* parts of all, of each block */
} Work;

/* What is wrong with the shapes, NULL if nothing is; sets the sizes of the GEMM. */
static const char *check(const Tensor *in, PackedGemm *gemm, TokenChain *quantizer) {
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
  const char *wrong = fit_epilogue(&gemm->epilogue, &rows, &inputs);
  quantizer->n = gemm->n;
  return wrong ? wrong : fit_norm(quantizer, &in[NORM_SCALE], &in[NORM_SHIFT], gemm->n, gemm->rows);
}

typedef struct Rows {
  int64_t first, last; /* of the call: last is the one behind them */
} Rows;

static Rows rows_of(const Work *work, int64_t block) {
  int64_t first = block * work->rows_per_block, last = first + work->rows_per_block;
  return (Rows){first, last < work->gemm.rows ? last : work->gemm.rows};
}

/* Where row 0 would lie, so that those of a block are in its slot. */
static float *row_in_slots(const Work *work, int64_t block) {
  return work->slots + (block % SLOTS - block) * work->rows_per_block * work->gemm.n;
}

/* Part `part` of a block's product; y of its rows lies where `slots` says, if they do. */
static void multiply_part(Work *work, int64_t block, int64_t part) {
  PackedGemm gemm = work->gemm;
  Rows rows = rows_of(work, block);
  int64_t panel = part * work->panels_per_task, end = panel + work->panels_per_task;
  void *scratch = take_scratch(packed_gemm_scratch(&gemm));
  if (!scratch) {
    work->failed = 1;
    return;
  }
  if (work->slots) gemm.epilogue.y = row_in_slots(work, block);
  packed_gemm_panels(&gemm, panel, end < work->panels ? end : work->panels, rows.first, rows.last, scratch);
  give_scratch(scratch);
}

static void run_task(void *data, size_t index) {
  Work *work = data;
  multiply_part(work, (int64_t)index / work->tasks_per_block, (int64_t)index % work->tasks_per_block);
}

/* --- rows that are quantized --------------------------------------------------------------------------------------- */

static void quantize_chunk(Work *work, int64_t block, int64_t chunk) {
  TokenChain quantizer = work->quantizer;
  Rows rows = rows_of(work, block);
  int64_t first = rows.first + chunk * work->rows_per_chunk, last = first + work->rows_per_chunk;
  float *scratch = take_scratch(quantizer.n * (int64_t)sizeof *scratch);
  if (!scratch) {
    work->failed = 1;
    return;
  }
  quantizer.x = work->slots ? row_in_slots(work, block) : work->gemm.epilogue.y;
  token_chain_rows(&quantizer, first, last < rows.last ? last : rows.last, scratch);
  give_scratch(scratch);
}

/* All parts in an order in which each needs parts before it alone: a block's products, then half of the next one's, so
 * that nobody waits for the last of the first; then its chunks. */
typedef struct Part {
  int64_t block, index;
  int quantizes;
} Part;

static Part part_of(const Work *work, int64_t place) {
  int64_t tasks = work->tasks_per_block, chunks = work->chunks_per_block, half = tasks / 2;
  if (place < tasks) return (Part){0, place, 0};
  int64_t block = 1 + (place - tasks) / (tasks + chunks), index = (place - tasks) % (tasks + chunks);
  if (block == work->blocks) return (Part){block - 1, index, 1};
  if (index < half) return (Part){block, index, 0};
  if (index < half + chunks) return (Part){block - 1, index - half, 1};
  return (Part){block, index - chunks, 0};
}

static atomic_llong quantizing_ns; /* of all threads in all calls so far */

/* Onnxruntime's profiler has one time for all that an op does. */
EXPORT double packed_gemm_quantizing_seconds(void) { return 1e-9 * (double)atomic_load(&quantizing_ns); }

/* Threads take parts in their order, whatever order they are called in: so the one that another waits for is at work. */
static void run_part(void *data, size_t index) {
  (void)index;
  Work *work = data;
  Part part = part_of(work, (int64_t)atomic_fetch_add(&work->claimed, 1));
  if (part.quantizes) {
    wait_for(&work->multiplied[part.block], work->tasks_per_block);
    double started = seconds_now();
    quantize_chunk(work, part.block, part.index);
    atomic_fetch_add(&quantizing_ns, (long long)(1e9 * (seconds_now() - started)));
    atomic_fetch_add(&work->quantized[part.block], 1);
  } else {
    if (work->slots && part.block >= SLOTS) wait_for(&work->quantized[part.block - SLOTS], work->chunks_per_block);
    int64_t half = (work->tasks_per_block + 1) / 2; /* from both halves in turn: two threads read a stretch each */
    multiply_part(work, part.block, part.index % 2 * half + part.index / 2);
    atomic_fetch_add(&work->multiplied[part.block], 1);
  }
}

static Status *run_quantized(const Api *api, KernelContext *context, Work *work) {
  int64_t blocks = work->blocks, n = work->gemm.n, held = blocks < SLOTS ? blocks : SLOTS;
  int64_t counts = (2 * blocks * (int64_t)sizeof(atomic_llong) + 63) / 64 * 64;
  int64_t floats = work->gemm.epilogue.y ? 0 : held * work->rows_per_block * n;
  char *memory = take_scratch(counts + floats * (int64_t)sizeof(float));
  if (!memory) return CALL(api, create_status)(FAIL, "PackedGemm: out of memory");
  if (floats) work->slots = (float *)(memory + counts);
  work->multiplied = (atomic_llong *)memory, work->quantized = work->multiplied + blocks;
  for (int64_t i = 0; i < 2 * blocks; i++) atomic_init(&work->multiplied[i], 0);
  work->rows_per_chunk = FLOATS_PER_CHUNK / n + 1;
  work->chunks_per_block = (work->rows_per_block + work->rows_per_chunk - 1) / work->rows_per_chunk;
  size_t parts = (size_t)(blocks * (work->tasks_per_block + work->chunks_per_block));
  Status *status = CALL(api, parallel_for)(context, run_part, parts, 0, work);
  give_scratch(memory);
  return status;
}

static Status *compute(void *data, KernelContext *context) {
  const Kernel *kernel = data;
  const Api *api = kernel->api;
  Work work = {.gemm = kernel->options, .quantizer = kernel->quantizer};
  PackedGemm *gemm = &work.gemm;
  Tensor in[INPUTS];
  for (size_t i = 0; i < INPUTS; i++) TRY(read_tensor(api, context, i, &in[i]));
  const char *wrong = check(in, gemm, &work.quantizer);
  if (wrong) return invalid(api, wrong);
  gemm->codes = in[CODES].data, gemm->low_codes = in[LOW_CODES].data;
  gemm->weight = in[WEIGHT].data, gemm->multipliers = in[MULTIPLIERS].data, gemm->table = in[TABLE].data;
  gemm->scale = in[SCALE].data, gemm->weight_sum = in[WEIGHT_SUM].data;
  gemm->group_scale = in[GROUP_SCALE].data;
  if ((wrong = packed_gemm_misfit(gemm))) return invalid(api, wrong);
  work.panels = (gemm->n + PANEL - 1) / PANEL;
  if (gemm->multipliers && in[MULTIPLIERS].count != work.panels * (gemm->k / gemm->group) * PANEL)
    return invalid(api, "PackedGemm: multipliers must be [panels, k / group_size, 16]");
  TRY(make_output(api, context, PRODUCT, &in[CODES], gemm->n, 0, &gemm->product));
  Tensor sums = {.rank = 3, .dims = {gemm->sums, gemm->rows}};
  TRY(make_output(api, context, INTEGER_SUMS, &sums, gemm->n, 0, &gemm->integer_sums));
  TRY(make_epilogue(api, context, LINEAR, Y, &in[CODES], &gemm->epilogue));
  static const size_t places[] = {NEXT_CODES, NEXT_SCALE, QUANTIZED, NEXT_LOW_CODES};
  TRY(make_codes(api, context, places, &in[CODES], &work.quantizer));
  int quantizes = work.quantizer.codes || work.quantizer.quantized;
  if (quantizes && gemm->epilogue.heads_out) return invalid(api, "PackedGemm: rows in heads are not quantized");
  if (!gemm->rows || !(gemm->product || gemm->integer_sums || gemm->epilogue.linear || gemm->epilogue.y || quantizes))
    return NULL;
  /* Blocks of about as many rows: threads take whole ones, as far as there are enough. */
  work.blocks = (gemm->rows + MAX_ROWS - 1) / MAX_ROWS;
  work.rows_per_block = (gemm->rows + work.blocks - 1) / work.blocks;
  work.panels_per_task = PRODUCTS_PER_TASK / (work.rows_per_block * gemm->k * PANEL) + 1;
  if (work.panels_per_task < work.panels / TASKS_PER_BLOCK) work.panels_per_task = work.panels / TASKS_PER_BLOCK;
  work.panels_per_task += work.panels_per_task % 2; /* some variants take two at once */
  work.tasks_per_block = (work.panels + work.panels_per_task - 1) / work.panels_per_task;
  if (quantizes) TRY(run_quantized(api, context, &work));
  else TRY(CALL(api, parallel_for)(context, run_task, (size_t)(work.blocks * work.tasks_per_block), 0, &work));
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
  TokenChain quantizer = {0};
  TRY(epilogue_attributes(api, info, &options.epilogue));
  TRY(quantizer_attributes(api, info, "code_zero", &quantizer));
  if (zero != (int32_t)zero || limb_weight != (int32_t)limb_weight || largest_code != (int32_t)largest_code ||
      largest_weight != (int32_t)largest_weight)
    return invalid(api, "PackedGemm: zero, limb_weight, largest_code and largest_weight must fit 32 bits");
  options.zero = (int32_t)zero, options.limb_weight = (int32_t)limb_weight;
  options.largest_code = (int32_t)largest_code, options.largest_weight = (int32_t)largest_weight;
  Kernel *kernel = malloc(sizeof *kernel);
  if (!kernel) return CALL(api, create_status)(FAIL, "PackedGemm: out of memory");
  *kernel = (Kernel){api, options, quantizer};
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
                                    [BIAS] = TYPE_FLOAT,        [GATE] = TYPE_FLOAT,      [RESIDUAL] = TYPE_FLOAT,
                                    [NORM_SCALE] = TYPE_FLOAT,  [NORM_SHIFT] = TYPE_FLOAT};
  return (void)op, types[index];
}
static int output_type(const CustomOp *op, size_t index) {
  return (void)op, index == NEXT_CODES || index == NEXT_LOW_CODES ? TYPE_UINT8 : TYPE_FLOAT;
}

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
