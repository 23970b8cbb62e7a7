/* The part of onnxruntime's C interface that a custom op needs.
 *
 * The wheels ship no headers. The interface is a table of function pointers that only grows at its end, so a function
 * is known for good by its place. The places below are those of version API_VERSION of the table (onnxruntime 1.18
 * and newer give it out); tests/kernels/test_native_library.py calls every one of them.
 */
#ifndef FPQ_ORT_ABI_H
#define FPQ_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

#define API_VERSION 18

typedef struct Status Status; /* NULL: no error */
typedef struct SessionOptions SessionOptions;
typedef struct OpDomain OpDomain;
typedef struct KernelInfo KernelInfo;
typedef struct KernelContext KernelContext;
typedef struct Value Value;
typedef struct TensorInfo TensorInfo;

typedef void (*AnyFunction)(void);
typedef struct Api {
  AnyFunction slot[275];
} Api;
typedef struct ApiBase {
  const Api *(*get_api)(uint32_t version);
  const char *(*version_text)(void);
} ApiBase;

enum { FAIL = 1, INVALID_ARGUMENT = 2 };         /* error codes */
enum { TYPE_FLOAT = 1, TYPE_UINT8 = 2, TYPE_INT8 = 3, TYPE_INT32 = 6, TYPE_FLOAT16 = 10 }; /* element types, numbered as in ONNX */
enum { OPTIONAL = 1 }; /* inputs and outputs */
enum { DEFAULT_MEMORY = 0 };

/* Name, place in the table, and type of each function used. All but create_status return NULL or an error. */
#define API_FUNCTIONS(F)                                                                                              \
  F(create_status, 0, Status *, (int code, const char *message))                                                      \
  F(create_domain, 26, Status *, (const char *name, OpDomain **))                                                     \
  F(domain_add, 27, Status *, (OpDomain *, const struct CustomOp *))                                                  \
  F(options_add_domain, 28, Status *, (SessionOptions *, OpDomain *))                                                 \
  F(tensor_data, 51, Status *, (Value *, void **))                                                                    \
  F(dimensions_count, 61, Status *, (const TensorInfo *, size_t *))                                                   \
  F(dimensions, 62, Status *, (const TensorInfo *, int64_t *, size_t))                                                \
  F(tensor_info, 65, Status *, (const Value *, TensorInfo **))                                                        \
  F(attribute_float, 85, Status *, (const KernelInfo *, const char *, float *))                                       \
  F(attribute_int, 86, Status *, (const KernelInfo *, const char *, int64_t *))                                       \
  F(kernel_input, 90, Status *, (const KernelContext *, size_t, const Value **))                                      \
  F(kernel_output, 91, Status *, (KernelContext *, size_t, const int64_t *, size_t, Value **))                        \
  F(release_tensor_info, 99, void, (TensorInfo *))                                                                    \
  F(parallel_for, 274, Status *, (const KernelContext *, void (*)(void *, size_t), size_t total, size_t batches, void *))

struct CustomOp;
#define TYPE_OF(name, place, result, arguments) typedef result(*name##_fn) arguments;
API_FUNCTIONS(TYPE_OF)
#undef TYPE_OF
#define PLACE_OF(name, place, result, arguments) name##_place = place,
enum { API_FUNCTIONS(PLACE_OF) };
#undef PLACE_OF
#define CALL(api, name) ((name##_fn)(api)->slot[name##_place])

/* What a custom op tells onnxruntime, as of version 18 of the structure. NULL where the default will do. */
typedef struct CustomOp {
  uint32_t version;
  void *(*create_kernel_1)(const struct CustomOp *, const Api *, const KernelInfo *);
  const char *(*name)(const struct CustomOp *);
  const char *(*execution_provider)(const struct CustomOp *);
  int (*input_type)(const struct CustomOp *, size_t);
  size_t (*input_count)(const struct CustomOp *);
  int (*output_type)(const struct CustomOp *, size_t);
  size_t (*output_count)(const struct CustomOp *);
  void (*compute_1)(void *kernel, KernelContext *);
  void (*destroy_kernel)(void *kernel);
  int (*input_kind)(const struct CustomOp *, size_t);
  int (*output_kind)(const struct CustomOp *, size_t);
  int (*input_memory)(const struct CustomOp *, size_t);
  int (*variadic_input_min)(const struct CustomOp *);
  int (*variadic_input_homogeneous)(const struct CustomOp *);
  int (*variadic_output_min)(const struct CustomOp *);
  int (*variadic_output_homogeneous)(const struct CustomOp *);
  Status *(*create_kernel)(const struct CustomOp *, const Api *, const KernelInfo *, void **kernel);
  Status *(*compute)(void *kernel, KernelContext *);
  Status *(*infer_shape)(const struct CustomOp *, void *);
  int (*start_version)(const struct CustomOp *);
  int (*end_version)(const struct CustomOp *);
  size_t (*may_inplace)(int **, int **);
  void (*release_may_inplace)(int *, int *);
  size_t (*alias_map)(int **, int **);
  void (*release_alias_map)(int *, int *);
} CustomOp;

#endif
