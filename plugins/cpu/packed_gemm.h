/* A GEMM of bytes: 4-bit weights stay packed, a panel of 16 channels is decoded at a time, for a block of rows; weights
 * of bytes are read where they are. */
#ifndef FPQ_PACKED_GEMM_H
#define FPQ_PACKED_GEMM_H

#include <stdint.h>

#include "epilogue.h"

enum {
  PANEL = 16,  /* channels that are decoded together */
  QUAD = 4,    /* products that one lane of 32 bits adds at once */
  OCTET = 8,   /* input channels of 64 bytes of a panel */
  K_BLOCK = 1152 /* input channels that are decoded at a time: 18 KiB, half of a first-level cache */
};

/* product[m, n] = sum over s of float(sum over the k of s of a[m, k] * w[n, k]) * scale[s, n] * group_scale[m, s], with
 * `sums` stretches s of k / sums input channels each; the inner sum in 32 bits and exact, the rest in float32 from left
 * to right, in the order of s. A scale may span several stretches. What follows is done to a tile while it is in the
 * cache. With
 *   a = codes - zero; with low_codes limb_weight * (codes - zero) + (low_codes - zero)     uint8 [rows, k]
 *   w = table[code of (n, k)] * multiplier of (n, k / group), or without a table the byte of (n, k)
 *
 * weight: with a table [panels, k / 8, 64]; byte 4 c + i of the 64 holds the codes of channel c at k = i (low half) and
 * 4 + i. Without one [panels, k / 4, 64]; byte 4 c + i is the weight of channel c at k = i. What fills up k (to a
 * multiple of 8) and n is 0. multipliers: [panels, k / group, 16], NULL for none. weight_sum: [sums, n], the inner sums
 * of w, which `zero` is a factor of.
 *
 * Exact on every instruction set: |w| <= 127, so that decoded weights are bytes, and |sum| < 2^31. Where products of
 * bytes are added in pairs in saturating 16 bits (x86 without dot products), the factors are table's own integers, or
 * bytes of at most largest_weight: a run of `run` pairs stays below 2^15, since 2 * run * largest_code * largest_weight
 * does, and the multiplier comes after it, in 32 bits. A block whose own weights are small enough is added in runs of
 * twice as many pairs (packed_gemm_avx2.c derives the bound). Where not even one pair does, factors are widened to 16 bits and
 * their products added in 32. Sums that leave 32 bits on the way come back, as integers modulo 2^32 do.
 */
typedef struct PackedGemm {
  const uint8_t *codes, *low_codes; /* low_codes: NULL for one limb */
  const uint8_t *weight, *multipliers;
  const int8_t *table; /* [16], NULL for a weight of bytes */
  const float *scale;       /* [scales, n] */
  const float *group_scale; /* of tokens, [rows, group_scales], NULL for none */
  const int32_t *weight_sum;
  int32_t zero, limb_weight, largest_code;
  int32_t largest_weight; /* largest |byte| of the weight; of no meaning with a table */
  int64_t group; /* a multiple of 8 that divides k; k where there are no multipliers */
  int64_t rows, n, k, sums; /* k / sums is a multiple of 8 unless sums is 1 */
  int64_t scales, group_scales; /* each divides `sums` */
  Epilogue epilogue;
  float *product; /* [rows, n], NULL: nobody reads it */
  float *integer_sums; /* [sums, rows, n], the inner sums as float32; NULL: nobody reads them */
} PackedGemm;

/* Rows of the call that share a decoded panel. The codes of more would leave the second-level cache, and every panel
 * would fetch them anew, which costs more than to decode it again. */
enum { MAX_ROWS = 256 };

/* Bytes of scratch, aligned to 64, that one call of packed_gemm_panels needs. */
int64_t packed_gemm_scratch(const PackedGemm *gemm);
/* Rows first..last-1 (at most MAX_ROWS) of the channels of panels panel..end-1. */
void packed_gemm_panels(const PackedGemm *gemm, int64_t panel, int64_t end, int64_t first, int64_t last, void *scratch);
/* For tests: let this variant make all products from now on, NULL: the fastest one. 0 if this processor lacks it. */
int packed_gemm_force(const char *name);
const char *packed_gemm_variant(void);
/* NULL, or why these sizes are not for this kernel. */
const char *packed_gemm_misfit(const PackedGemm *gemm);

#endif
