/* Attention of codes: softmax(scale * q k' + mask) v, where q, k, v and the weights are small integers. */
#ifndef FPQ_QUANTIZED_ATTENTION_H
#define FPQ_QUANTIZED_ATTENTION_H

#include "attention.h"

/* How numbers become integers: the largest becomes kmax, see round_row in token_chain.c. */
typedef struct Grid {
  float max_value, kmax, rounding_factor;
} Grid;

/* As fpq.QuantizedAttention has it: q and k less its mean over the tokens are quantized by token, v by channel over the
 * tokens, the weights exp(score - largest of the row) in steps of 1 / 255; all sums of products are exact. NaN and
 * infinity: a query gives NaN for itself, a key or a value for all that it can reach. There must be a key. */
typedef struct QuantizedAttention {
  Attention tensors;
  Grid qk, pv;
  float absmax_floor;
} QuantizedAttention;

enum { WEIGHT_STEPS = 255 };
/* As export/dialect/reference.py has it: sums of weights, 255 * MOST_KEYS < 2^24, are exact in float32, and those of
 * their products with bytes in 32 bits. */
enum { MOST_KEYS = 65793 };

/* Keys and values of one head as the products read them: filled up with zeros, keys to whole panels of 16 and values
 * to whole octets of keys. */
typedef struct HeadOperands {
  int8_t *keys, *values; /* [panels of keys, size / 4, 16, 4] and [panels of channels, keys / 4, 16, 4] */
  float *key_scale, *value_scale; /* by key, by channel; that of the format's unit is in them */
  int32_t *key_sum;               /* of the integers of a key */
} HeadOperands;

/* Bytes of the operands of a head, a multiple of LABEL_BYTES. */
int64_t quantized_attention_head(const QuantizedAttention *);
/* Where they lie in such memory. */
HeadOperands quantized_attention_operands(const QuantizedAttention *, void *memory);
/* Fills them in for head `part` of samples * heads. work: quantized_attention_work bytes. */
void quantized_attention_prepare(const QuantizedAttention *, int64_t part, const HeadOperands *, void *work);
int64_t quantized_attention_work(const QuantizedAttention *);

/* Operands that leave a call are a tensor of bytes. In it each head has a line of the cache that says what follows, its
 * label: how many keys of which size, in which formats. */
enum { LABEL_BYTES = 64, MOST_WORDS = 256 };
/* Bytes of a head in the tensor: of its label and its operands (as in plugins/cpu/attention_operands.py). */
int64_t quantized_attention_labelled(const QuantizedAttention *);
/* Writes the label of a head whose memory begins here. */
void quantized_attention_label(const QuantizedAttention *, void *memory);
/* Are these, `bytes` for each head, no operands for an attention whose keys are not known yet? Then `why` says what is
 * wrong; else its keys are set. Without any head there is no label, and no keys. */
int quantized_attention_misfit(
    QuantizedAttention *, const char *tensor, int64_t heads, int64_t bytes, char why[MOST_WORDS]);

/* What is added to the integers of queries, so that they are codes without a sign. */
static inline int32_t quantized_attention_zero(const QuantizedAttention *attention) {
  return (int32_t)attention->qk.kmax;
}
/* Codes [count, size filled up to octets] of queries, in memory for a span more, and the scale of each, NaN where one is
 * not finite. zeros: `size` floats filled up to spans. */
void quantized_attention_queries(
    const QuantizedAttention *, const float *q, int64_t count, uint8_t *codes, float *scale, float *zeros);

/* Rows of scores, `stride` floats apart and at least so long that whole spans of 16 fit -> rows of weights, filled up with 0
 * to whole spans. scale: 1 / the sum of a row's weights, NaN where it has no largest score that is finite; its weights
 * are 0 then. */
void quantized_attention_weigh(
    float *scores, int64_t stride, int64_t rows, int64_t keys, uint8_t *weights, float *scale);

/* As packed_gemm_chosen() has them: queries that make up whole tiles; the most of a block, a multiple of these, so that
 * scores stay in the second-level cache; and bytes of scratch for one. */
int64_t quantized_attention_at_once(void);
int64_t quantized_attention_rows(const QuantizedAttention *);
int64_t quantized_attention_scratch(const QuantizedAttention *);
/* Queries first..first + count - 1 of head `part`. */
void quantized_attention_block(
    const QuantizedAttention *, int64_t part, const HeadOperands *, int64_t first, int64_t count, void *scratch);

#if defined(__x86_64__)
/* The same where packed_gemm_chosen() is PACKED_GEMM_AVX512_VNNI. */
int64_t quantized_attention_vnni_rows(const QuantizedAttention *);
int64_t quantized_attention_vnni_scratch(const QuantizedAttention *);
void quantized_attention_vnni_block(
    const QuantizedAttention *, int64_t part, const HeadOperands *, int64_t first, int64_t count, void *scratch);
#endif

#endif
