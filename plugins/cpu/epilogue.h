/* What follows a product on its way to the next layer: PackedGemm does it to tiles, TokenChain to rows.
 *
 * Every span of a row goes through the same float operations, one rounding each, so both give the same bits. */
#ifndef FPQ_EPILOGUE_H
#define FPQ_EPILOGUE_H

#include <stdint.h>
#include <string.h>

#include "exponential.h"
#include "variants.h"

/* Stages in order; a NULL input or output leaves its stage out. All floats are binary32, nothing is contracted:
 *
 *   linear = x * token_scale, then + bias         x [rows, n], token_scale [rows], bias [n]
 *   y      = linear, or gelu(linear)              the tanh form
 *   y      = y * gate, then + residual            gate [rows / rows_per_gate, n], residual [rows, n]
 *
 * Attention keeps a row in parts: with heads_out y is [samples, heads_out, tokens, n / heads_out].
 */
typedef struct Epilogue {
  const float *token_scale, *bias, *gate, *residual;
  int gelu;
  int64_t n, rows_per_gate, tokens, heads_out; /* tokens: rows of a sample; heads_out 0: rows in one piece */
  float *linear, *y;
} Epilogue;

/* x (1 + tanh(u)) / 2 = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3). `bound`, EXP_BOUND, must be no constant
 * to the compiler: of one, it makes branches with results computed beforehand, and then no vectors. */
static inline float gelu(float x, float bound) {
  float t = x * (-1.5957691216f - 0.0713548163f * (x * x));
  t = t < bound ? t : bound;
  t = t > -bound ? t : -bound;
  return x / (1.0f + exponential(t));
}

/* Where a row lies in its sample and among those that share a gate. Counted: divisions for each row of each tile would
 * take as long as the rest. */
typedef struct EpilogueRow {
  int64_t sample, token, gate, row_of_gate;
} EpilogueRow;

INLINE EpilogueRow epilogue_row(const Epilogue *it, int64_t row) {
  EpilogueRow at = {0};
  if (it->heads_out) at.sample = row / it->tokens, at.token = row % it->tokens;
  if (it->gate) at.gate = row / it->rows_per_gate, at.row_of_gate = row % it->rows_per_gate;
  return at;
}

INLINE void next_row(const Epilogue *it, EpilogueRow *at) {
  if (++at->token == it->tokens) at->token = 0, at->sample++;
  if (++at->row_of_gate == it->rows_per_gate) at->row_of_gate = 0, at->gate++;
}

/* x[rows, count] -> channels channel.. of rows [.., n] of `to`. */
INLINE void store_rows(const float *x, int64_t rows, const int64_t count, float *to, int64_t n) {
  for (int64_t row = 0; row < rows; row++) {
    FEW_ELEMENTS
    for (int64_t i = 0; i < count; i++) to[row * n + i] = x[row * count + i];
  }
}

INLINE void store_heads(
    const Epilogue *it, int64_t first, int64_t rows, int64_t channel, const int64_t count, const float *x) {
  int64_t heads = it->heads_out, size = it->n / heads, first_head = channel / size, skipped = channel % size;
  EpilogueRow at = epilogue_row(it, first);
  for (int64_t row = 0; row < rows; row++, x += count, next_row(it, &at)) {
    float *to = it->y + ((at.sample * heads + first_head) * it->tokens + at.token) * size;
    for (int64_t done = 0, skip = skipped, part; done < count; done += part, skip = 0, to += it->tokens * size) {
      part = size - skip < count - done ? size - skip : count - done;
      for (int64_t i = 0; i < part; i++) to[skip + i] = x[done + i];
    }
  }
}

/* All stages of x[rows, count], channels channel.. of rows first.., in place. count: a constant where this is inlined
 * for a whole panel. */
INLINE void finish_tile(
    const Epilogue *it, int64_t first, int64_t rows, int64_t channel, const int64_t count, float bound, float *x) {
  int64_t n = it->n, place = first * n + channel;
  if (it->token_scale)
    for (int64_t row = 0; row < rows; row++) {
      float scale = it->token_scale[first + row];
      FEW_ELEMENTS
      for (int64_t i = 0; i < count; i++) x[row * count + i] *= scale;
    }
  if (it->bias)
    for (int64_t row = 0; row < rows; row++) {
      const float *bias = it->bias + channel;
      FEW_ELEMENTS
      for (int64_t i = 0; i < count; i++) x[row * count + i] += bias[i];
    }
  if (it->linear) store_rows(x, rows, count, it->linear + place, n);
  if (it->gelu) {
    ELEMENTWISE
    for (int64_t i = 0; i < rows * count; i++) x[i] = gelu(x[i], bound);
  }
  if (it->gate) {
    EpilogueRow at = epilogue_row(it, first);
    for (int64_t row = 0; row < rows; row++, next_row(it, &at)) {
      const float *gate = it->gate + at.gate * n + channel;
      FEW_ELEMENTS
      for (int64_t i = 0; i < count; i++) x[row * count + i] *= gate[i];
    }
  }
  if (it->residual)
    for (int64_t row = 0; row < rows; row++) {
      const float *residual = it->residual + place + row * n;
      FEW_ELEMENTS
      for (int64_t i = 0; i < count; i++) x[row * count + i] += residual[i];
    }
  if (!it->y) return;
  if (it->heads_out) store_heads(it, first, rows, channel, count, x);
  else store_rows(x, rows, count, it->y + place, n);
}

#endif
