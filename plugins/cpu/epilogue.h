/* What follows a product on its way to the next layer: PackedGemm does it to tiles, TokenChain to rows.
 *
 * Every span of a row goes through the same float operations, one rounding each, so both give the same bits. */
#ifndef FPQ_EPILOGUE_H
#define FPQ_EPILOGUE_H

#include <stdint.h>
#include <string.h>

#include "exponential.h"
#include "span.h"
#include "variants.h"

/* What attribute `activation` says; pipeline/backends/cpu/token_chain.py has the same numbers. */
typedef enum Activation { NO_ACTIVATION, GELU, SILU, ACTIVATIONS } Activation;

/* Stages in order; a NULL input or output leaves its stage out. All floats are binary32, nothing is contracted:
 *
 *   linear = x * token_scale, then + bias         x [rows, n], token_scale [rows], bias [n]
 *   y      = linear, or its GELU or SiLU          GELU in the tanh form
 *   y      = y * gate, then + residual            gate [rows / rows_per_gate, n], residual [rows, n]
 *
 * Attention keeps a row in parts: with heads_out y is [samples, heads_out, tokens, n / heads_out].
 */
typedef struct Epilogue {
  const float *token_scale, *bias, *gate, *residual;
  Activation activation;
  int64_t n, rows_per_gate, tokens, heads_out; /* tokens: rows of a sample; heads_out 0: rows in one piece */
  float *linear, *y;
} Epilogue;

/* x / (1 + exp(t)). `bound`, EXP_BOUND, must be no constant to the compiler: of one, it makes branches with results
 * computed beforehand, and then no vectors. */
static inline float times_logistic(float x, float t, float bound) {
  t = t < bound ? t : bound;
  t = t > -bound ? t : -bound;
  return x / (1.0f + exponential(t));
}

/* GELU: x (1 + tanh(u)) / 2 = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3). SiLU: x / (1 + exp(-x)). */
INLINE void activate(Activation activation, float bound, Span *x) {
  float numbers[SPAN], exponents[SPAN];
  *(Span *)numbers = *x;
  if (activation == GELU) *(Span *)exponents = *x * (-1.5957691216f - 0.0713548163f * (*x * *x));
  else *(Span *)exponents = -*x;
  FEW_ELEMENTS
  for (int i = 0; i < SPAN; i++) numbers[i] = times_logistic(numbers[i], exponents[i], bound);
  *x = *(Span *)numbers;
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

/* Where the channels of a span lie among heads. */
typedef struct HeadSpan {
  int64_t head, skip, size; /* of the first one: its head, its place in it, and the channels of a head */
} HeadSpan;

INLINE HeadSpan head_span(const Epilogue *it, int64_t channel) {
  HeadSpan of = {0};
  if (it->heads_out) of.size = it->n / it->heads_out, of.head = channel / of.size, of.skip = channel % of.size;
  return of;
}

/* Of the span's first channel in y. */
INLINE float *head_place(const Epilogue *it, const EpilogueRow *at, const HeadSpan *of) {
  return it->y + ((at->sample * it->heads_out + of->head) * it->tokens + at->token) * of->size + of->skip;
}

INLINE void store_heads(
    const Epilogue *it, const EpilogueRow *at, const HeadSpan *of, const int64_t count, const Span *x) {
  enum { HALF = SPAN / 2 };
  int64_t skip = of->skip, apart = it->tokens * of->size;
  float *to = head_place(it, at, of);
  const float *from = (const float *)x;
  if (count == SPAN && of->size - skip >= SPAN) {
    *(Span *)to = *x;
  } else if (count == SPAN && of->size - skip == HALF && of->size >= HALF) { /* heads of whole halves */
    memcpy(to, from, HALF * sizeof *to);
    memcpy(to + apart - skip, from + HALF, HALF * sizeof *to);
  } else {
    for (int64_t left = count, part; left; left -= part, from += part, to += apart - skip, skip = 0) {
      part = of->size - skip < left ? of->size - skip : left;
      memcpy(to, from, (size_t)part * sizeof *to);
    }
  }
}

/* All stages of channels channel.. of rows row.., a span x of each, which lie in heads as `of` says. One stage after the
 * other: asked for each span, which stages there are would take longer than they do. at: the first row. count: a constant
 * where this is inlined for whole spans. */
INLINE void finish_spans(
    const Epilogue *it, EpilogueRow at, const HeadSpan *of, int64_t row, const int64_t rows, int64_t channel,
    const int64_t count, float bound, Span *x) {
  const int64_t n = it->n, place = row * n + channel;
  Span bias, other;
  if (it->token_scale)
    for (int64_t i = 0; i < rows; i++) x[i] *= it->token_scale[row + i];
  if (it->bias) {
    load_span(&bias, it->bias + channel, count);
    for (int64_t i = 0; i < rows; i++) x[i] += bias;
  }
  if (it->linear)
    for (int64_t i = 0; i < rows; i++) store_span(&x[i], it->linear + place + i * n, count);
  if (it->activation == GELU)
    for (int64_t i = 0; i < rows; i++) activate(GELU, bound, &x[i]);
  else if (it->activation == SILU)
    for (int64_t i = 0; i < rows; i++) activate(SILU, bound, &x[i]);
  if (it->gate) {
    EpilogueRow gated = at;
    for (int64_t i = 0; i < rows; i++, next_row(it, &gated))
      load_span(&other, it->gate + gated.gate * n + channel, count), x[i] *= other;
  }
  if (it->residual)
    for (int64_t i = 0; i < rows; i++) load_span(&other, it->residual + place + i * n, count), x[i] += other;
  if (!it->y) return;
  if (it->heads_out)
    for (int64_t i = 0; i < rows; i++, next_row(it, &at)) store_heads(it, &at, of, count, &x[i]);
  else
    for (int64_t i = 0; i < rows; i++) store_span(&x[i], it->y + place + i * n, count);
}

#endif
