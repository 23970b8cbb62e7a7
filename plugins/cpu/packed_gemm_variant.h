/* What the variants of PackedGemm share: packed_gemm.c calls them, each decodes a panel in its own way. */
#ifndef FPQ_PACKED_GEMM_VARIANT_H
#define FPQ_PACKED_GEMM_VARIANT_H

#include "packed_gemm.h"

#define INLINE static inline __attribute__((always_inline))
enum { BYTES = PANEL * QUAD, MAX_RUN = 8 };

/* Where one panel is worked on: a block of decoded weights, its multipliers, and the sums of all rows. */
typedef struct Scratch {
  int32_t *sums;     /* [rows, 16] */
  int8_t *decoded;   /* [k / 4, 64]: 4 input channels of 16 channels */
  int16_t *factors;  /* [runs, 32]: the multiplier of each channel twice; NULL: all are 1 */
  uint8_t *tail[2];  /* [rows, k filled up] of each limb, where k is no multiple of 8 */
} Scratch;

/* One block of input channels: k0..k0 + k - 1 of the panel. */
typedef struct Block {
  const PackedGemm *gemm;
  const uint8_t *weight, *multipliers; /* of the panel */
  int64_t k0, k;
} Block;

typedef struct Variant {
  const char *name;
  int multiplies_sums; /* multipliers are applied to sums of runs, else they are in the decoded weight */
  void (*decode)(const Block *, Scratch *);
  /* sums[rows, 16] += a[rows, k] * decoded; a row of `a` is `stride` bytes long. run: quads of a run; without factors 2, 1,
   * or 0 where not even a pair of products fits 16 bits. */
  void (*add)(const uint8_t *a, int64_t stride, int64_t rows, int64_t k, int run, const Scratch *, int32_t *sums);
} Variant;

INLINE uint8_t multiplier(const Block *block, int64_t k, int channel) {
  return block->multipliers ? block->multipliers[k / block->gemm->group * PANEL + channel] : 1;
}

const Variant *packed_gemm_chosen(void);

#if defined(__x86_64__)
extern const Variant PACKED_GEMM_AVX2, PACKED_GEMM_AVX_VNNI, PACKED_GEMM_AVX512_VNNI;
void packed_gemm_decode_avx2(const Block *, Scratch *); /* without multipliers */
#elif defined(__aarch64__)
extern const Variant PACKED_GEMM_DOT;
#endif

#endif
