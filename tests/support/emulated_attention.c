/* What Attention's loops for AVX-512 compute, where the processor lacks it: their source compiled for AVX2, with vectors
 * of 64 bytes made of two. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "attention.h"
#include "exponential.h"
#include "variants.h"

#pragma GCC diagnostic ignored "-Wpsabi" /* 64 bytes are returned, by functions of this file alone */
#define target(instruction_sets) target("avx2,fma")
#define __builtin_cpu_supports(name) 1 /* so the widest loops are taken */
#include "attention.c"
