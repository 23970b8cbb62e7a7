/* Attention with running maxima and sums: what earlier keys have added is scaled whenever a larger score appears. */
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

/* x or 0, without a branch. */
INLINE float kept_bits(float x, int32_t keep) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return from_bits(bits & -keep);
}

typedef struct Loops {
  int lanes;
  void (*product)(int, const float *, int64_t, const float *, int64_t, int64_t, float *, int64_t, int64_t, int64_t);
  float (*weights)(float *, float, float, int64_t);
  float (*largest)(const float *, float, int64_t);
  void (*add)(float *, const float *, int64_t);
  void (*scale)(const float *, float, int64_t, float *);
  void (*divide)(const float *, float, int64_t, float *);
  void (*turn)(const float *, int64_t, int64_t, float *);
} Loops;

#define TARGET
#undef LANES
#define LANES 4
#define NAME(x) plain_##x
#include "attention_tiles.h"
#undef NAME
#undef LANES
#undef TARGET

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define NAME(x) avx2_##x
#include "attention_tiles.h"
#undef NAME
#undef LANES
#undef TARGET

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define LANES 16
#define NAME(x) avx512_##x
#include "attention_tiles.h"
#undef NAME
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

enum { MAX_LANES = 16 };

typedef struct Scratch {
  float *q, *k, *v, *scores, *sums; /* [QUERIES, size], [size, KEYS], [KEYS, wide], [QUERIES, KEYS], [QUERIES, wide] */
  float *largest, *total;           /* [QUERIES] */
} Scratch;

static int64_t lay_out(int64_t size, float *memory, Scratch *scratch) {
  int64_t wide = filled(size, MAX_LANES), used = 0;
  int64_t sizes[] = {QUERIES * size, size * KEYS, KEYS * wide, QUERIES * KEYS, QUERIES * wide, QUERIES, QUERIES};
  float *parts[7];
  for (int i = 0; i < 7; i++) parts[i] = memory ? memory + used : NULL, used += filled(sizes[i], MAX_LANES);
  if (scratch) *scratch = (Scratch){parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], parts[6]};
  return used;
}

int64_t attention_scratch(const Attention *attention) {
  return lay_out(attention->size, NULL, NULL) * (int64_t)sizeof(float);
}

/* What a weight becomes whose largest score has grown by -x; 0 where there was none so far, or no number comes of it. */
static float rescaled(float x) { return x >= -EXP_BOUND ? exponential(x) : 0; }

/* Scores of a query, masked, -> weights; the query's sums are scaled where its largest score has grown. What fills up
 * the last vector weighs nothing. */
static void weigh(const Loops *use, float *scores, int64_t keys, float *largest, float *total, float *sums, int64_t wide) {
  int64_t columns = filled(keys, use->lanes);
  for (int64_t i = keys; i < columns; i++) scores[i] = -INFINITY;
  float before = *largest, now = use->largest(scores, before, columns);
  if (now == -INFINITY && scores[0] == -INFINITY) { /* no key so far: the weights of these are 0 */
    int64_t some = 0;
    for (int64_t i = 0; i < keys; i++) some += scores[i] != -INFINITY;
    if (!some) {
      memset(scores, 0, (size_t)keys * sizeof *scores);
      return;
    }
  }
  float factor = rescaled(before - now);
  float sum = use->weights(scores, now, EXP_BOUND, columns);
  *largest = now;
  *total = *total * factor + sum;
  if (factor != 1.0f) use->scale(sums, factor, wide, sums);
}

static void add_mask(const Loops *use, const Attention *attention, const float *mask, float *scores, int64_t keys) {
  int64_t step = attention->mask_step[3];
  if (step == 1) use->add(scores, mask, keys);
  else
    for (int64_t i = 0; i < keys; i++) scores[i] += mask[i * step];
}

void attention_block(
    const Attention *attention, int64_t sample, int64_t head, int64_t first, int64_t count, void *memory) {
  const Loops *use = loops();
  int64_t size = attention->size, wide = filled(size, use->lanes), part = sample * attention->heads + head;
  const float *q = attention->q + (part * attention->queries + first) * size, *mask = NULL;
  const int64_t *step = attention->mask_step;
  Scratch scratch;
  lay_out(size, memory, &scratch);
  use->scale(q, attention->scale, count * size, scratch.q);
  memset(scratch.sums, 0, (size_t)(count * wide) * sizeof(float));
  /* Of no keys 0 / 1, as the standard ops that this stands for give it: their last product is a sum of nothing. */
  for (int64_t row = 0; row < count; row++) scratch.largest[row] = -INFINITY, scratch.total[row] = attention->keys == 0;
  for (int64_t key = 0; key < attention->keys; key += KEYS) {
    int64_t keys = attention->keys - key < KEYS ? attention->keys - key : KEYS, columns = filled(keys, use->lanes);
    const float *k = attention->k + (part * attention->keys + key) * size;
    const float *v = attention->v + (part * attention->keys + key) * size;
    use->turn(k, keys, size, scratch.k);
    for (int64_t i = 0; columns > keys && i < size; i++)
      memset(scratch.k + i * KEYS + keys, 0, (size_t)(columns - keys) * sizeof(float));
    for (int64_t i = 0; i < keys; i++) {
      memcpy(scratch.v + i * wide, v + i * size, (size_t)size * sizeof(float));
      memset(scratch.v + i * wide + size, 0, (size_t)(wide - size) * sizeof(float));
    }
    use->product(0, scratch.q, size, scratch.k, KEYS, size, scratch.scores, KEYS, count, columns);
    for (int64_t row = 0; row < count; row++) {
      float *scores = scratch.scores + row * KEYS;
      if (attention->mask) {
        mask = attention->mask + sample * step[0] + head * step[1] + (first + row) * step[2] + key * step[3];
        add_mask(use, attention, mask, scores, keys);
      }
      weigh(use, scores, keys, scratch.largest + row, scratch.total + row, scratch.sums + row * wide, wide);
    }
    use->product(1, scratch.scores, KEYS, scratch.v, wide, keys, scratch.sums, wide, count, wide);
  }
  for (int64_t row = 0; row < count; row++) {
    float *out = attention->out + (part * attention->queries + first + row) * size;
    use->divide(scratch.sums + row * wide, scratch.total[row], size, out);
  }
}
