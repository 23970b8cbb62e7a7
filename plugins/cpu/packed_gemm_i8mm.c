/* PackedGemm by the matrix product of Arm (i8mm): two rows of 8 bytes times two channels of 8, four sums at once. */
#include "packed_gemm_variant.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <string.h>

#define TARGET_I8MM __attribute__((target("arch=armv8.2-a+i8mm")))

/* Eight input channels of four channels, four after four as they are stored: those of a channel come together. */
TARGET_I8MM INLINE void store_octets(int8_t *out, int8x16_t first, int8x16_t second) {
  int32x4_t low = vreinterpretq_s32_s8(first), high = vreinterpretq_s32_s8(second);
  vst1q_s8(out, vreinterpretq_s8_s32(vzip1q_s32(low, high)));
  vst1q_s8(out + 16, vreinterpretq_s8_s32(vzip2q_s32(low, high)));
}

/* The multipliers of four channels, each four times. */
TARGET_I8MM INLINE int8x16_t spread(const uint8_t *multipliers) {
  static const uint8_t places[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  uint32_t four;
  memcpy(&four, multipliers, sizeof four);
  return vreinterpretq_s8_u8(vqtbl1q_u8(vreinterpretq_u8_u32(vdupq_n_u32(four)), vld1q_u8(places)));
}

/* [k / 8, 16, 8]: 8 input channels of 16 channels. */
TARGET_I8MM static const int8_t *decode_i8mm(const Block *block, int8_t *decoded) {
  const int8_t *table = block->gemm->table, *stored = table ? NULL : stored_bytes(block);
  const uint8_t *codes = block->weight + block->k0 / OCTET * BYTES;
  for (int64_t octet = 0; octet < block->k / OCTET; octet++)
    for (int part = 0; part < BYTES; part += 16) {
      int8_t *out = decoded + octet * 2 * BYTES + part * 2;
      if (!table) {
        const int8_t *w = stored + octet * 2 * BYTES + part;
        store_octets(out, vld1q_s8(w), vld1q_s8(w + BYTES));
        continue;
      }
      uint8x16_t both = vld1q_u8(codes + octet * BYTES + part);
      int8x16_t first = vqtbl1q_s8(vld1q_s8(table), vandq_u8(both, vdupq_n_u8(15)));
      int8x16_t second = vqtbl1q_s8(vld1q_s8(table), vshrq_n_u8(both, 4));
      if (block->multipliers) {
        int64_t group = (block->k0 + octet * OCTET) / block->gemm->group;
        int8x16_t factors = spread(block->multipliers + group * PANEL + part / QUAD);
        first = vmulq_s8(first, factors), second = vmulq_s8(second, factors);
      }
      store_octets(out, first, second);
    }
  return decoded;
}

/* `pairs` pairs of rows; `alone`: a single row, which stands in for its own neighbour. */
TARGET_I8MM INLINE void tile_i8mm(
    const int pairs, const uint8_t *a, int64_t stride, int alone, int64_t k, const int8_t *w, int32_t *sums) {
  int32x4_t total[3][8];
  for (int pair = 0; pair < pairs; pair++)
    for (int part = 0; part < 8; part++) total[pair][part] = vdupq_n_s32(0);
  for (int64_t i = 0; i < k; i += OCTET, w += 2 * BYTES) {
    uint8x16_t rows[3];
    for (int pair = 0; pair < pairs; pair++) {
      const uint8_t *row = a + 2 * pair * stride + i;
      rows[pair] = vcombine_u8(vld1_u8(row), vld1_u8(alone ? row : row + stride));
    }
    for (int part = 0; part < 8; part++) {
      int8x16_t weight = vld1q_s8(w + 16 * part);
      for (int pair = 0; pair < pairs; pair++)
        total[pair][part] = vusmmlaq_s32(total[pair][part], rows[pair], weight);
    }
  }
  for (int pair = 0; pair < pairs; pair++)
    for (int part = 0; part < 8; part += 2)
      for (int row = 0; row < 2 - alone; row++) {
        int32_t *sum = sums + (2 * pair + row) * PANEL + 2 * part;
        int64x2_t left = vreinterpretq_s64_s32(total[pair][part]), right = vreinterpretq_s64_s32(total[pair][part + 1]);
        int64x2_t both = row ? vzip2q_s64(left, right) : vzip1q_s64(left, right);
        vst1q_s32(sum, vaddq_s32(vld1q_s32(sum), vreinterpretq_s32_s64(both)));
      }
}

TARGET_I8MM static void add_i8mm(const Block *block, const uint8_t *a, int64_t stride, int64_t rows, int32_t *sums) {
  const int8_t *w = block->w[0];
  int64_t k = block->k;
  start_sums(block, rows, sums);
  for (; rows >= 6; rows -= 6, a += 6 * stride, sums += 6 * PANEL) tile_i8mm(3, a, stride, 0, k, w, sums);
  for (; rows >= 2; rows -= 2, a += 2 * stride, sums += 2 * PANEL) tile_i8mm(1, a, stride, 0, k, w, sums);
  if (rows) tile_i8mm(1, a, stride, 1, k, w, sums);
}

const Variant PACKED_GEMM_I8MM = {"i8mm", 0, 0, 1, 60, decode_i8mm, add_i8mm, NULL, NULL};
#endif
