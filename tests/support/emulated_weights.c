/* What the weights of QuantizedAttention are by AVX-512, where the processor lacks it: their source compiled for AVX2. */
#include "emulated_avx512.h"

#include <math.h>

#include "quantized_attention.h"
#include "variants.h"

#define target(instruction_sets) target("avx2,fma")
#define __builtin_cpu_supports(name) 1 /* so the widest loops are taken */
#include "quantized_weights.c"
