/* softmax(scale * q k' + mask) v, a block of queries against a block of keys at a time: no tensor of all pairs. */
#ifndef FPQ_ATTENTION_H
#define FPQ_ATTENTION_H

#include <stdint.h>

/* Of a block of attention_block: its queries and sums, and some keys and values, stay in the second-level cache. */
enum { QUERIES = 288, KEYS = 128 };
enum { MOST_LANES = 16 }; /* of the widest vectors; a divisor of QUERIES */

/* n filled up to a multiple of `to`. */
static inline int64_t filled(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* float32 [samples, heads, tokens, size], `queries` tokens of q and out, `keys` of k and v. mask: added to the scores,
 * NULL for none; its element of (sample, head, query, key) is at the sum of these indices times mask_step.
 *
 * A score more than 87 below the largest of its query has the weight 0, so nothing denormal is multiplied. A query
 * whose scores are all minus infinity, or that meets NaN, gives NaN; without any key, out is 0. */
typedef struct Attention {
  const float *q, *k, *v, *mask;
  float *out;
  float scale;
  int64_t samples, heads, queries, keys, size;
  int64_t mask_step[4];
} Attention;

/* Bytes of scratch, aligned to 64, that a call of attention_block needs. */
int64_t attention_scratch(const Attention *attention);
/* Queries first..first + count - 1 (count at most QUERIES) of one head of one sample. */
void attention_block(const Attention *, int64_t sample, int64_t head, int64_t first, int64_t count, void *scratch);

#endif
