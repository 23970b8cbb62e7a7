/* A block of QuantizedAttention by AVX-512 VNNI: the numbers of quantized_attention.c, turned as in attention.c. Queries lie
 * side by side in the lanes, so that neither the largest score nor the sum of weights needs a step across lanes, weights
 * become the next product's codes where they are, and no channel is filled up.
 *
 * No contraction here: scores are rounded at each step, as the other variants round them. */
#include "quantized_attention.h"

#if defined(__x86_64__)
#include <math.h>
#include <string.h>

#include "packed_gemm_variant.h"
#include "quantized_weights.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#undef LANES
#define LANES 16
#define NAME(x) vnni_##x
#include "attention_turn.h"
#undef NAME

/* A panel is some vectors of queries; a tile of products is ROWS keys or channels of it: with 3 vectors 24 sums, codes
 * and a factor, of 32 registers. Scores of a panel stay in the second-level cache, and weights of QUADS in the first. */
enum { ROWS = 8, MOST_VECTORS = 3, SCORES_BYTES = 768 << 10, BLOCK = 288, QUADS = 128 };

/* Keys as their operands have them, and whole tiles. */
static int64_t score_rows(int64_t keys) { return filled(keys, ROWS); }

static int64_t most_vectors(int64_t keys) {
  int64_t vectors = SCORES_BYTES / (score_rows(keys) * LANES * (int64_t)sizeof(float));
  return vectors < 1 ? 1 : vectors > MOST_VECTORS ? MOST_VECTORS : vectors;
}

typedef struct Memory {
  uint8_t *q;                  /* codes of a panel's queries, one after another, and a span more */
  int32_t *quads;              /* the same, [size / 4, width] */
  float *scores;               /* [keys filled up, width] */
  int32_t *weights;            /* [QUADS, width]: of four keys */
  int32_t *sums;               /* [channels filled up, width], then as floats */
  float *mask;                 /* [PANEL, width] */
  float *scale, *work;         /* of queries, then 1 / sum of the weights; [size filled up to spans] */
} Memory;

static int64_t lay_out(const QuantizedAttention *attention, char *memory, Memory *parts) {
  int64_t size = attention->tensors.size, keys = attention->tensors.keys, width = most_vectors(keys) * LANES, used = 0;
  int64_t wide = filled(size, OCTET);
  int64_t sizes[] = {width * wide + SPAN, width * wide, score_rows(keys) * width * 4, QUADS * width * 4,
                     filled(size, ROWS) * width * 4, PANEL * width * 4, width * 4, filled(size, SPAN) * 4};
  void *at[8];
  for (int i = 0; i < 8; i++) at[i] = memory ? memory + used : NULL, used += filled(sizes[i], 64);
  if (parts) *parts = (Memory){at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7]};
  return used;
}

int64_t quantized_attention_vnni_rows(const QuantizedAttention *attention) { return (void)attention, BLOCK; }

int64_t quantized_attention_vnni_scratch(const QuantizedAttention *attention) { return lay_out(attention, NULL, NULL); }

/* out[ROWS, width] = products of four codes each, those of `codes` [quads, width] and of rows of a panel [quads, 16, 4], of
 * which `panel` is the first; added to start[row], or, if that is NULL and `add`, to what is in `out`. */
TARGET INLINE void tile(
    const int vectors, const int32_t *codes, const int8_t *panel, int64_t quads, const int32_t *start, int add,
    int32_t *out) {
  __m512i sum[ROWS][MOST_VECTORS];
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 3
    for (int part = 0; part < vectors; part++)
      sum[row][part] = start ? _mm512_set1_epi32(start[row])
                             : _mm512_maskz_loadu_epi32(add ? 0xffff : 0, out + (row * vectors + part) * LANES);
  for (int64_t i = 0; i < quads; i++, codes += vectors * LANES, panel += PANEL * QUAD) {
    __m512i column[MOST_VECTORS];
#pragma GCC unroll 3
    for (int part = 0; part < vectors; part++) column[part] = _mm512_loadu_si512(codes + part * LANES);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
      int32_t four;
      memcpy(&four, panel + row * QUAD, sizeof four);
      const __m512i same = _mm512_set1_epi32(four);
#pragma GCC unroll 3
      for (int part = 0; part < vectors; part++)
        sum[row][part] = _mm512_dpbusd_epi32(sum[row][part], column[part], same);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 3
    for (int part = 0; part < vectors; part++)
      _mm512_storeu_si512(out + (row * vectors + part) * LANES, sum[row][part]);
}

/* By themselves: among other code compilers do not keep so many sums in registers. */
#define TILE(vectors)                                                                                                  \
  TARGET __attribute__((noinline)) static void tile_##vectors(                                                         \
      const int32_t *codes, const int8_t *panel, int64_t quads, const int32_t *start, int add, int32_t *out) {         \
    tile(vectors, codes, panel, quads, start, add, out);                                                               \
  }
TILE(1)
TILE(2)
TILE(3)
#undef TILE
typedef void Tile(const int32_t *, const int8_t *, int64_t, const int32_t *, int, int32_t *);
static Tile *const TILES[] = {tile_1, tile_2, tile_3};

/* The largest score of each query so far, and whether one was no number. */
typedef struct Largest {
  __m512 score[MOST_VECTORS];
  __mmask16 unordered[MOST_VECTORS];
} Largest;

/* What is added to the scores of a panel of keys, NULL for nothing: `key` floats from key to key, one number for all queries
 * or one for each. */
typedef struct Masked {
  const float *at;
  int64_t key;
  int by_query;
} Masked;

/* Sums of one key, at `at` -> scores; the larger ones are kept. */
TARGET INLINE void finish_scores(
    const int vectors, float *at, const __m512 *factor, float key_scale, const float *mask, int mask_by_query,
    Largest *largest) {
  const __m512 of_key = _mm512_set1_ps(key_scale);
#pragma GCC unroll 3
  for (int part = 0; part < vectors; part++, at += LANES) {
    __m512 score = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(at)), factor[part]), of_key);
    if (mask) score = _mm512_add_ps(score, mask_by_query ? _mm512_loadu_ps(mask + part * LANES) : _mm512_set1_ps(*mask));
    _mm512_storeu_ps(at, score);
    largest->unordered[part] |= _mm512_cmp_ps_mask(score, score, _CMP_UNORD_Q);
    largest->score[part] = _mm512_max_ps(score, largest->score[part]); /* the second where the first is no number */
  }
}

/* Scores of keys first..first + ROWS - 1; those from `keys` on are minus infinity. */
TARGET INLINE void score_tile(
    const int vectors, const HeadOperands *operands, int64_t first, int64_t keys, int64_t wide, int32_t zero,
    const Memory *memory, const Masked mask, Largest *largest) {
  const int64_t width = vectors * LANES;
  float *scores = memory->scores + first * width;
  int32_t start[ROWS];
  for (int row = 0; row < ROWS; row++) /* modulo 2^32: operands that were damaged may be anything */
    start[row] = (int32_t)(0 - (uint32_t)zero * (uint32_t)operands->key_sum[first + row]);
  const int8_t *panel = operands->keys + first / PANEL * PANEL * wide + first % PANEL * QUAD;
  TILES[vectors - 1](memory->quads, panel, wide / QUAD, start, 0, (int32_t *)scores);
  Largest so_far = *largest;
  __m512 factor[MOST_VECTORS];
#pragma GCC unroll 3
  for (int part = 0; part < vectors; part++) factor[part] = _mm512_loadu_ps(memory->scale + part * LANES);
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; row++) {
    if (first + row >= keys)
      for (int part = 0; part < vectors; part++)
        _mm512_storeu_ps(scores + row * width + part * LANES, _mm512_set1_ps(-INFINITY));
    else
      finish_scores(
          vectors, scores + row * width, factor, operands->key_scale[first + row],
          mask.at ? mask.at + (first + row) % PANEL * mask.key : NULL, mask.by_query, &so_far);
  }
  *largest = so_far;
}

/* Scores -> weights of `quads` quads of keys, and their sums. */
TARGET INLINE void weigh(
    const int vectors, const float *scores, int64_t quads, const __m512 *largest, int32_t *weights, __m512i *total) {
  for (int64_t i = 0; i < quads; i++, scores += QUAD * vectors * LANES, weights += vectors * LANES)
#pragma GCC unroll 3
    for (int part = 0; part < vectors; part++) {
      __m512i codes[QUAD];
#pragma GCC unroll 4
      for (int key = 0; key < QUAD; key++)
        codes[key] = weight_codes_avx512(_mm512_loadu_ps(scores + (key * vectors + part) * LANES), largest[part]);
      const __m512i low = _mm512_or_si512(codes[0], _mm512_slli_epi32(codes[1], 8));
      const __m512i high = _mm512_or_si512(_mm512_slli_epi32(codes[2], 16), _mm512_slli_epi32(codes[3], 24));
      const __m512i four = _mm512_or_si512(low, high);
      _mm512_storeu_si512(weights + part * LANES, four);
      total[part] = _mm512_dpbusd_epi32(total[part], four, _mm512_set1_epi8(1));
    }
}

/* Sums [channels, vectors] of `quads` quads of keys from `quad` on, added to those before. */
TARGET INLINE void add_values(
    const int vectors, const HeadOperands *operands, int64_t size, int64_t long_row, int64_t quad, int64_t quads,
    const Memory *memory) {
  for (int64_t channel = 0; channel < size; channel += ROWS) {
    const int8_t *panel = operands->values + channel / PANEL * PANEL * long_row + channel % PANEL * QUAD;
    int32_t *sums = memory->sums + channel * vectors * LANES;
    TILES[vectors - 1](memory->weights, panel + quad * PANEL * QUAD, quads, NULL, quad > 0, sums);
  }
}

/* Of the panel that begins with `key`, for `count` queries whose mask begins at `mask`. */
TARGET static Masked mask_of_panel(
    const float *mask, const int64_t *step, int64_t key, int64_t keys, int64_t count, int64_t width, float *turned) {
  if (!mask || !step[2]) return (Masked){mask ? mask + key * step[3] : NULL, step[3], 0};
  int64_t here = keys - key < PANEL ? keys - key : PANEL;
  mask += key * step[3];
  if (step[3] == 1) vnni_turn(mask, step[2], count, here, turned, width);
  else
    for (int64_t i = 0; i < here * width; i++) {
      int64_t query = i % width < count ? i % width : count - 1;
      turned[i] = mask[query * step[2] + i / width * step[3]];
    }
  return (Masked){turned, width, 1};
}

/* `count` queries, at most vectors * LANES, whose mask begins at `mask`. */
TARGET INLINE void attend(
    const int vectors, const QuantizedAttention *attention, const HeadOperands *operands, const float *q, int64_t count,
    const float *mask, const Memory *memory, float *out) {
  const Attention *tensors = &attention->tensors;
  const int64_t size = tensors->size, keys = tensors->keys, wide = filled(size, OCTET), width = vectors * LANES;
  const int64_t quads = (keys + QUAD - 1) / QUAD;
  const int32_t zero = quantized_attention_zero(attention);
  quantized_attention_queries(attention, q, count, memory->q, memory->scale, memory->work);
  for (int64_t i = 0; i < width; i++) /* lanes of no query do as the last one */
    memory->scale[i] = i < count ? memory->scale[i] * tensors->scale : memory->scale[count - 1];
  vnni_turn((const float *)memory->q, wide / QUAD, count, wide / QUAD, (float *)memory->quads, width);

  Largest largest;
#pragma GCC unroll 3
  for (int part = 0; part < vectors; part++) largest.score[part] = _mm512_set1_ps(-INFINITY), largest.unordered[part] = 0;
  Masked of_panel = {0};
  for (int64_t key = 0; key < keys; key += ROWS) {
    if (key % PANEL == 0)
      of_panel = mask_of_panel(mask, tensors->mask_step, key, keys, count, width, memory->mask);
    score_tile(vectors, operands, key, keys, wide, zero, memory, of_panel, &largest);
  }

  __m512i total[MOST_VECTORS];
#pragma GCC unroll 3
  for (int part = 0; part < vectors; part++) total[part] = _mm512_setzero_si512();
  for (int64_t quad = 0; quad < quads; quad += QUADS) {
    const int64_t here = quads - quad < QUADS ? quads - quad : QUADS;
    weigh(vectors, memory->scores + quad * QUAD * width, here, largest.score, memory->weights, total);
    add_values(vectors, operands, size, filled(keys, OCTET), quad, here, memory);
  }
#pragma GCC unroll 3
  for (int part = 0; part < vectors; part++) {
    const __m512 of_weights = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_cvtepi32_ps(total[part]));
    const __mmask16 finite =
        _mm512_cmp_ps_mask(_mm512_abs_ps(largest.score[part]), _mm512_set1_ps(INFINITY), _CMP_LT_OQ) &
        (__mmask16)~largest.unordered[part];
    _mm512_storeu_ps(memory->scale + part * LANES, _mm512_mask_mov_ps(_mm512_set1_ps(NAN), finite, of_weights));
  }
  for (int64_t channel = 0; channel < size; channel++) {
    const __m512 value_scale = _mm512_set1_ps(operands->value_scale[channel]);
#pragma GCC unroll 3
    for (int part = 0; part < vectors; part++) {
      int32_t *sum = memory->sums + channel * width + part * LANES;
      _mm512_storeu_ps(sum, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sum)), value_scale));
    }
  }
  vnni_turn_back((const float *)memory->sums, width, memory->scale, count, size, out);
}

TARGET void quantized_attention_vnni_block(
    const QuantizedAttention *attention, int64_t part, const HeadOperands *operands, int64_t first, int64_t count,
    void *scratch) {
  const Attention *tensors = &attention->tensors;
  const int64_t *step = tensors->mask_step, size = tensors->size, most = most_vectors(tensors->keys);
  const float *mask = tensors->mask;
  Memory memory;
  lay_out(attention, scratch, &memory);
  if (mask) mask += part / tensors->heads * step[0] + part % tensors->heads * step[1];
  for (int64_t vectors, here; count > 0; first += here, count -= here) {
    int64_t left = (count + LANES - 1) / LANES, panels = (left + most - 1) / most;
    vectors = (left + panels - 1) / panels, here = count < vectors * LANES ? count : vectors * LANES;
    const float *q = tensors->q + (part * tensors->queries + first) * size, *of_panel = mask ? mask + first * step[2] : NULL;
    float *out = tensors->out + (part * tensors->queries + first) * size;
    if (vectors == 1) attend(1, attention, operands, q, here, of_panel, &memory, out);
    else if (vectors == 2) attend(2, attention, operands, q, here, of_panel, &memory, out);
    else attend(3, attention, operands, q, here, of_panel, &memory, out);
  }
}
#endif
