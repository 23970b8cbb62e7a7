/* What the custom ops share: tensors of a call, and the parts of an op's description that are the same for all. */
#ifndef FPQ_ORT_OP_H
#define FPQ_ORT_OP_H

#include <stdlib.h>
#include <string.h>

#include "ort_abi.h"

#define MAX_RANK 8

typedef struct Tensor {
  void *data; /* NULL: not given */
  int64_t dims[MAX_RANK];
  size_t rank;
  int64_t count;
} Tensor;

#define TRY(call)                                                                                                     \
  do {                                                                                                                \
    Status *status_ = (call);                                                                                         \
    if (status_) return status_;                                                                                      \
  } while (0)

static inline Status *invalid(const Api *api, const char *message) {
  return CALL(api, create_status)(INVALID_ARGUMENT, message);
}

static inline Status *read_tensor(const Api *api, KernelContext *context, size_t index, Tensor *tensor) {
  const Value *value = NULL;
  TensorInfo *info = NULL;
  memset(tensor, 0, sizeof *tensor);
  TRY(CALL(api, kernel_input)(context, index, &value));
  if (!value) return NULL;
  TRY(CALL(api, tensor_data)((Value *)value, &tensor->data));
  TRY(CALL(api, tensor_info)(value, &info));
  Status *status = CALL(api, dimensions_count)(info, &tensor->rank);
  if (!status && tensor->rank > MAX_RANK) status = invalid(api, "an input has more than 8 dimensions");
  if (!status) status = CALL(api, dimensions)(info, tensor->dims, tensor->rank);
  CALL(api, release_tensor_info)(info);
  tensor->count = 1;
  for (size_t i = 0; !status && i < tensor->rank; i++) tensor->count *= tensor->dims[i];
  if (!tensor->count && !tensor->data) tensor->data = tensor; /* given, of no element: perhaps of no memory */
  return status;
}

/* An output [..., last] for rows of dims [..., n], or with heads [samples, heads, tokens, last / heads]. Its memory goes
 * into the pointer, of whatever type, that `out` points to; NULL where nobody reads it. */
static inline Status *make_output(
    const Api *api, KernelContext *context, size_t index, const Tensor *rows, int64_t last, int64_t heads, void *out) {
  Value *value = NULL;
  void *data = NULL;
  Tensor shape = *rows;
  shape.dims[shape.rank - 1] = last;
  if (heads) {
    int64_t parts[] = {rows->dims[0], heads, rows->dims[1], last / heads};
    memcpy(shape.dims, parts, sizeof parts);
    shape.rank = 4;
  }
  TRY(CALL(api, kernel_output)(context, index, shape.dims, shape.rank, &value));
  if (value) TRY(CALL(api, tensor_data)(value, &data));
  memcpy(out, &data, sizeof data);
  return NULL;
}

/* What ops tell onnxruntime alike: they run on the CPU, inputs and outputs are optional, create_kernel made `free`. */
static inline const char *op_provider(const CustomOp *op) { return (void)op, "CPUExecutionProvider"; }
static inline int op_optional(const CustomOp *op, size_t index) { return (void)op, (void)index, OPTIONAL; }
static inline int op_memory(const CustomOp *op, size_t index) { return (void)op, (void)index, DEFAULT_MEMORY; }
static inline int op_no(const CustomOp *op) { return (void)op, 0; }
static inline int op_version(const CustomOp *op) { return (void)op, 1; }

#define OP_DEFAULTS                                                                                                    \
  .version = API_VERSION, .execution_provider = op_provider, .destroy_kernel = free, .input_kind = op_optional,        \
  .output_kind = op_optional, .input_memory = op_memory, .variadic_input_min = op_no,                                  \
  .variadic_input_homogeneous = op_no, .variadic_output_min = op_no, .variadic_output_homogeneous = op_no,             \
  .start_version = op_version, .end_version = op_version

extern const CustomOp TOKEN_CHAIN, PACKED_GEMM, HALF_GEMM, ATTENTION, ATTENTION_OPERANDS, QUANTIZED_ATTENTION;

#endif
