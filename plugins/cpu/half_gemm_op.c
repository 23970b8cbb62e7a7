/* Custom op HalfGemm: onnxruntime's tensors in, half_gemm_panel on onnxruntime's threads. */
#include <stdatomic.h>

#include "half_gemm.h"
#include "ort_op.h"
#include "scratch.h"

enum { X, WEIGHT, BIAS, INPUTS };

typedef struct Kernel {
  const Api *api;
  int64_t channels; /* of the output */
} Kernel;

typedef struct Work {
  HalfGemm gemm;
  int64_t panels;
  atomic_int failed; /* by any of its threads */
} Work;

/* What is wrong with the shapes, NULL if nothing is; sets the sizes of the GEMM. */
static const char *check(const Tensor *in, int64_t channels, HalfGemm *gemm) {
  if (in[X].rank == 0) return "HalfGemm: x must have at least one dimension";
  gemm->k = in[X].dims[in[X].rank - 1], gemm->n = channels;
  if (gemm->k <= 0 || gemm->n <= 0) return "HalfGemm: x and the output must have channels";
  gemm->rows = in[X].count / gemm->k;
  int64_t panels = (gemm->n + HALF_PANEL - 1) / HALF_PANEL;
  if (in[WEIGHT].count != panels * gemm->k * HALF_PANEL) return "HalfGemm: weight must be [panels, k, 16]";
  if (in[BIAS].data && in[BIAS].count != gemm->n) return "HalfGemm: bias must have one number a channel";
  return NULL;
}

static void run_task(void *data, size_t index) {
  Work *work = data;
  const HalfGemm *gemm = &work->gemm;
  int64_t first = (int64_t)index / work->panels * HALF_ROWS, last = first + HALF_ROWS;
  void *scratch = take_scratch(half_gemm_scratch(gemm));
  if (!scratch) {
    work->failed = 1;
    return;
  }
  half_gemm_panel(gemm, (int64_t)index % work->panels, first, last < gemm->rows ? last : gemm->rows, scratch);
  give_scratch(scratch);
}

static Status *compute(void *data, KernelContext *context) {
  const Kernel *kernel = data;
  const Api *api = kernel->api;
  Work work = {0};
  HalfGemm *gemm = &work.gemm;
  Tensor in[INPUTS];
  for (size_t i = 0; i < INPUTS; i++) TRY(read_tensor(api, context, i, &in[i]));
  const char *wrong = check(in, kernel->channels, gemm);
  if (wrong) return invalid(api, wrong);
  gemm->x = in[X].data, gemm->weight = in[WEIGHT].data, gemm->bias = in[BIAS].data;
  TRY(make_output(api, context, 0, &in[X], gemm->n, 0, &gemm->y));
  if (!gemm->rows || !gemm->y) return NULL;
  work.panels = (gemm->n + HALF_PANEL - 1) / HALF_PANEL;
  int64_t blocks = (gemm->rows + HALF_ROWS - 1) / HALF_ROWS;
  TRY(CALL(api, parallel_for)(context, run_task, (size_t)(blocks * work.panels), 0, &work));
  return work.failed ? CALL(api, create_status)(FAIL, "HalfGemm: out of memory") : NULL;
}

static Status *create_kernel(const CustomOp *op, const Api *api, const KernelInfo *info, void **out) {
  (void)op;
  int64_t channels = 0;
  TRY(CALL(api, attribute_int)(info, "channels", &channels));
  Kernel *kernel = malloc(sizeof *kernel);
  if (!kernel) return CALL(api, create_status)(FAIL, "HalfGemm: out of memory");
  *kernel = (Kernel){api, channels};
  *out = kernel;
  return NULL;
}

static const char *op_name(const CustomOp *op) { return (void)op, "HalfGemm"; }
static size_t input_count(const CustomOp *op) { return (void)op, INPUTS; }
static size_t output_count(const CustomOp *op) { return (void)op, 1; }
static int input_type(const CustomOp *op, size_t index) {
  return (void)op, index == WEIGHT ? TYPE_FLOAT16 : TYPE_FLOAT;
}
static int output_type(const CustomOp *op, size_t index) { return (void)op, (void)index, TYPE_FLOAT; }

const CustomOp HALF_GEMM = {
    OP_DEFAULTS,
    .name = op_name,
    .input_type = input_type,
    .input_count = input_count,
    .output_type = output_type,
    .output_count = output_count,
    .create_kernel = create_kernel,
    .compute = compute,
};
