/* Attention with running maxima and sums: what earlier keys have added is scaled whenever a larger score appears.
 *
 * All is turned: queries lie side by side in the lanes of vectors, keys and channels one below the other. So maxima and
 * sums over keys need no step across lanes, keys and values are read where they lie, and no channel is filled up. */
#include "attention.h"

#include <math.h>
#include <string.h>

#include "exponential.h"
#include "span.h"
#include "variants.h"

#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

/* A weight of a score so far below the largest that its power of 2 is LEAST or less is 0; that of LEAST + 1 still makes
 * normal numbers. LEAST_EXPONENT: the natural exponent of that. */
enum { LEAST = -126 };
static const float LEAST_EXPONENT = -87.33655f;
/* 2 exp(r) for |r| <= ln(2) / 2, from the highest power of r down: fitted to the least relative error, 2^-29; with all
 * roundings it is below 2^-23, contracted or not. */
static const float TWICE_EXP[] = {2.767359e-3f, 1.6749714e-2f, 8.333646e-2f, 0.3333284f, 0.9999998f, 2.0f, 2.0f};
enum { VECTORS = 3 }; /* of queries, at most, that a panel has: with as many rows of a tile as there are registers for */

typedef struct Loops {
  int lanes;
  void (*turn)(const float *, int64_t, int64_t, int64_t, float *, int64_t);
  void (*scale)(float *, float, int64_t);
  void (*turn_back)(const float *, int64_t, const float *, int64_t, int64_t, float *);
  void (*scores)(const float *, int64_t, int64_t, const float *, int64_t, float *);
  void (*weigh)(float *, int64_t, int64_t, float *, float *, float *);
  void (*add)(const float *, int64_t, int64_t, const float *, const float *, int64_t, float *);
} Loops;

#define TARGET
#undef LANES
#define LANES 4
#if defined(__aarch64__)
#define ROWS 8
#else
#define ROWS 4
#endif
#define NAME(x) plain_##x
#include "attention_tiles.h"
#undef NAME
#undef ROWS
#undef LANES
#undef TARGET

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define ROWS 4
#define NAME(x) avx2_##x
#include "attention_tiles.h"
#undef NAME
#undef ROWS
#undef LANES
#undef TARGET

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define LANES 16
#define ROWS 8
#define NAME(x) avx512_##x
#include "attention_tiles.h"
#undef NAME
#undef ROWS
#undef LANES
#undef TARGET
#endif

static const Loops *loops(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return &avx512_loops;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2_loops;
#endif
  return &plain_loops;
}

enum { WIDEST = VECTORS * MOST_LANES };

/* A panel is up to WIDEST queries, filled up to whole vectors. */
typedef struct Scratch {
  float *q, *sums;               /* panel by panel, [size, width] */
  float *largest, *total;        /* of each query */
  float *scores, *mask, *factor; /* of one panel: [KEYS, width] twice, and [width] */
} Scratch;

static int64_t lay_out(int64_t size, float *memory, Scratch *scratch) {
  int64_t sizes[] = {QUERIES * size, QUERIES * size, QUERIES, QUERIES, KEYS * WIDEST, KEYS * WIDEST, WIDEST}, used = 0;
  float *parts[7];
  for (int i = 0; i < 7; i++) parts[i] = memory ? memory + used : NULL, used += filled(sizes[i], MOST_LANES);
  if (scratch) *scratch = (Scratch){parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], parts[6]};
  return used;
}

int64_t attention_scratch(const Attention *attention) {
  return lay_out(attention->size, NULL, NULL) * (int64_t)sizeof(float);
}

/* Queries of the panel that begins where `left` of a block are left: panels of a block are alike within a vector. */
static int64_t panel_width(int64_t left, int64_t lanes) {
  int64_t vectors = (left + lanes - 1) / lanes, panels = (vectors + VECTORS - 1) / VECTORS;
  return (vectors + panels - 1) / panels * lanes;
}

/* Adds to scores [keys, width] of `count` queries their mask, which begins at `mask`. */
static void add_mask(
    const Loops *use, const float *mask, const int64_t *step, int64_t keys, int64_t count, int64_t width, float *turned,
    float *scores) {
  if (step[2] && step[3] == 1) {
    use->turn(mask, step[2], count, keys, turned, width);
    ELEMENTWISE
    for (int64_t i = 0; i < keys * width; i++) scores[i] += turned[i];
    return;
  }
  for (int64_t key = 0; key < keys; key++, mask += step[3], scores += width) {
    ELEMENTWISE
    for (int64_t query = 0; query < count; query++) scores[query] += mask[query * step[2]];
  }
}

void attention_block(
    const Attention *attention, int64_t sample, int64_t head, int64_t first, int64_t count, void *memory) {
  const Loops *use = loops();
  const int64_t size = attention->size, *step = attention->mask_step;
  const int64_t part = sample * attention->heads + head, row = (part * attention->queries + first) * size;
  const float *mask = attention->mask;
  Scratch scratch;
  lay_out(size, memory, &scratch);
  if (mask) mask += sample * step[0] + head * step[1] + first * step[2];
  for (int64_t at = 0, width; at < count; at += width) {
    width = panel_width(count - at, use->lanes);
    int64_t queries = count - at < width ? count - at : width;
    use->turn(attention->q + row + at * size, size, queries, size, scratch.q + at * size, width);
    use->scale(scratch.q + at * size, attention->scale, size * width);
    memset(scratch.sums + at * size, 0, (size_t)(size * width) * sizeof(float));
    for (int64_t i = at; i < at + width; i++) scratch.largest[i] = -INFINITY, scratch.total[i] = 0;
  }
  for (int64_t key = 0; key < attention->keys; key += KEYS) {
    int64_t keys = attention->keys - key < KEYS ? attention->keys - key : KEYS;
    const float *k = attention->k + (part * attention->keys + key) * size;
    const float *v = attention->v + (part * attention->keys + key) * size;
    for (int64_t at = 0, width; at < count; at += width) {
      width = panel_width(count - at, use->lanes);
      int64_t queries = count - at < width ? count - at : width;
      use->scores(k, keys, size, scratch.q + at * size, width, scratch.scores);
      if (mask)
        add_mask(use, mask + at * step[2] + key * step[3], step, keys, queries, width, scratch.mask, scratch.scores);
      use->weigh(scratch.scores, keys, width, scratch.largest + at, scratch.total + at, scratch.factor);
      use->add(v, keys, size, scratch.scores, scratch.factor, width, scratch.sums + at * size);
    }
  }
  /* Of no keys 0 / 1, as the standard ops that this stands for give it: their last product is a sum of nothing. */
  for (int64_t i = 0; i < filled(count, use->lanes); i++)
    scratch.total[i] = attention->keys ? 1.0f / scratch.total[i] : 1.0f;
  for (int64_t at = 0, width; at < count; at += width) {
    width = panel_width(count - at, use->lanes);
    int64_t queries = count - at < width ? count - at : width;
    use->turn_back(
        scratch.sums + at * size, width, scratch.total + at, queries, size, attention->out + row + at * size);
  }
}
