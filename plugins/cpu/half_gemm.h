/* Rows times a weight that is stored in float16: y = x w' + bias, in float32. */
#ifndef FPQ_HALF_GEMM_H
#define FPQ_HALF_GEMM_H

#include <stdint.h>

enum { HALF_PANEL = 16, HALF_ROWS = 96 }; /* channels of a panel; rows that one decoding of it serves at a time */

/* x [rows, k]; weight [n / 16 rounded up, k, 16] in float16, channels filled up with 0; bias [n] or
 * NULL; y [rows, n]. Each product is summed in the order of k, whatever rows it is computed beside. */
typedef struct HalfGemm {
  const float *x, *bias;
  const uint16_t *weight;
  float *y;
  int64_t rows, k, n;
} HalfGemm;

/* Bytes of scratch, aligned to 64, that a call of half_gemm_panel needs: the weights of one panel in float32. */
int64_t half_gemm_scratch(const HalfGemm *gemm);
/* Channels of one panel of the rows first..last - 1. */
void half_gemm_panel(const HalfGemm *gemm, int64_t panel, int64_t first, int64_t last, void *scratch);

#endif
