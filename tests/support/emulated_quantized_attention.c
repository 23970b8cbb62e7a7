/* What QuantizedAttention's blocks for AVX-512 VNNI compute, where the processor lacks it: their source compiled for AVX2. */
#include "emulated_avx512.h"

#include <math.h>

#include "packed_gemm_variant.h"
#include "quantized_attention.h"

#define target(instruction_sets) target("avx2,fma")
#include "quantized_attention_vnni.c"
