/* The custom ops of domain fpq.native. */
#include "ort_op.h"
#include "variants.h"

/* Called by SessionOptions.register_custom_ops_library. The domain lives as long as the process: sessions refer to it,
 * and onnxruntime does not say when the last one is gone. */
EXPORT Status *RegisterCustomOps(SessionOptions *options, const ApiBase *base) {
  const Api *api = base->get_api(API_VERSION);
  OpDomain *domain = NULL;
  if (!api) return base->get_api(1) ? CALL(base->get_api(1), create_status)(FAIL, "onnxruntime is too old") : NULL;
  TRY(CALL(api, create_domain)("fpq.native", &domain));
  TRY(CALL(api, domain_add)(domain, &TOKEN_CHAIN));
  TRY(CALL(api, domain_add)(domain, &PACKED_GEMM));
  TRY(CALL(api, domain_add)(domain, &HALF_GEMM));
  TRY(CALL(api, domain_add)(domain, &ATTENTION));
  TRY(CALL(api, domain_add)(domain, &ATTENTION_OPERANDS));
  TRY(CALL(api, domain_add)(domain, &QUANTIZED_ATTENTION));
  return CALL(api, options_add_domain)(options, domain);
}
