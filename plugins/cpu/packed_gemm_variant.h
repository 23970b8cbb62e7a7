/* What the variants of PackedGemm share: packed_gemm.c calls them, each brings a panel into its own form. */
#ifndef FPQ_PACKED_GEMM_VARIANT_H
#define FPQ_PACKED_GEMM_VARIANT_H

#include <string.h>

#include "packed_gemm.h"
#include "variants.h"

enum { BYTES = PANEL * QUAD, MAX_RUN = 8, STRETCH = 16, MOST_PANELS = 2 };

/* Where panels are worked on: a block of decoded weights, its multipliers, and the sums of all rows. */
typedef struct Scratch {
  int32_t *sums[2];  /* [rows, panels, 16] of each limb */
  float *totals;     /* [rows, panels, 16], over the stretches so far; of no size where there is one */
  int8_t *decoded;   /* [panels, k / 4, 64]: 4 input channels of 16 channels; twice as much where a variant widens them */
  int16_t *factors;  /* [runs, 32]: the multiplier of each channel twice */
  uint8_t *tail[2];  /* [rows, k filled up] of each limb, where k is no multiple of 8 */
} Scratch;

enum { LINE = 64 }; /* bytes that come from memory together */
enum { ENDS = 5, MOST_STREAMS = ENDS * MOST_PANELS }; /* an epilogue's matrices with a number for each of a product */

/* What is needed next, to be on its way while some rows are multiplied. Of their epilogue: `streams` lines of each row,
 * `apart` bytes from row to row. Of the weights that are read after the block's, `lines` of each panel. */
typedef struct Fetch {
  const char *stream[MOST_STREAMS];
  int64_t apart[MOST_STREAMS];
  int streams; /* 0: none of this block's */
  const uint8_t *weight[MOST_PANELS];
  int64_t lines;
} Fetch;

/* One block of input channels: k0..k0 + k - 1 of a panel, or of some that lie side by side. */
typedef struct Block {
  const PackedGemm *gemm;
  const uint8_t *weight, *multipliers; /* of the panel that is decoded */
  int64_t k0, k;
  int panels; /* that `add` is for */
  Fetch fetch; /* for an `add` that does that */
  int fresh;  /* the first block of some sums: there are none yet that `add` could add to */
  int run;                 /* quads whose sums of pairs fit 16 bits; 0: not even one's */
  const int8_t *w[MOST_PANELS]; /* what `decode` has returned, for `add` */
  const int16_t *factors;  /* [runs, 32], where the variant adds pairs */
  /* [rows, stretches of 16 input channels], rows `heavy_row` bytes apart: 1 where that row's codes may leave 16 bits, see
   * mark_heavy. NULL: nobody has looked. There are no multipliers where it is given. */
  const uint8_t *heavy;
  int64_t heavy_row;
  int channels; /* of the panel that are read where `heavy` is given */
} Block;

typedef struct Variant {
  const char *name;
  int adds_pairs; /* in 16 bits: it reads `run`, and applies multipliers to sums of runs; else they are in the weight */
  int fetches;    /* `add` brings on its way what the block's `fetch` says */
  int panels;     /* at most, that `add` takes */
  int rows;       /* that `add` and what follows are done to before the next ones: of few, sums stay in the nearest cache */
  /* The block's weight as `add` reads it: decoded into the scratch, or, of a weight of bytes, where it is stored. */
  const int8_t *(*decode)(const Block *, int8_t *decoded);
  /* sums[rows, panels, 16] = or += a[rows, k] * weight; a row of `a` is `stride` bytes long. */
  void (*add)(const Block *, const uint8_t *a, int64_t stride, int64_t rows, int32_t *sums);
  /* NULL, or: a run for a decoded block, at least its `run`, by the weights that it has. */
  int (*longer_run)(const Block *);
  /* NULL, or: marks for codes [rows, k] the stretches of 16 where a sum of those that one lane adds exceeds `most`, k / 16
   * rounded up for each row; returns how many. */
  int64_t (*mark_heavy)(const uint8_t *codes, int64_t stride, int64_t rows, int64_t k, int32_t most, uint8_t *heavy);
} Variant;

INLINE uint8_t multiplier(const Block *block, int64_t k, int channel) {
  return block->multipliers ? block->multipliers[k / block->gemm->group * PANEL + channel] : 1;
}

/* Of a weight of bytes, [k / 4, 64]. */
INLINE const int8_t *stored_bytes(const Block *block) { return (const int8_t *)block->weight + block->k0 * PANEL; }

/* For an `add` that has no other way to begin. */
INLINE void start_sums(const Block *block, int64_t rows, int32_t *sums) {
  if (block->fresh) memset(sums, 0, (size_t)(rows * block->panels * PANEL) * sizeof *sums);
}

const Variant *packed_gemm_chosen(void);

#if defined(__x86_64__)
extern const Variant PACKED_GEMM_AVX2, PACKED_GEMM_AVX_VNNI, PACKED_GEMM_AVX512_VNNI, PACKED_GEMM_AMX;
const int8_t *packed_gemm_decode_vnni(const Block *, int8_t *decoded);
/* `turns` times the products of four tiles, for limits.c; their number. */
int64_t packed_gemm_amx_products(int64_t turns);
int packed_gemm_has_amx(void); /* where it has, this process may use it from now on */
void packed_gemm_decode_avx2(const Block *, int8_t *decoded); /* without multipliers */
#elif defined(__aarch64__)
extern const Variant PACKED_GEMM_DOT, PACKED_GEMM_I8MM;
#endif

#endif
