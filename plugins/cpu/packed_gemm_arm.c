/* PackedGemm by the dot product of Arm: four products of signed bytes in 32 bits. */
#include "packed_gemm_variant.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <string.h>

#define TARGET_DOT __attribute__((target("arch=armv8.2-a+dotprod")))

TARGET_DOT static const int8_t *decode_dot(const Block *block, int8_t *decoded) {
  if (!block->gemm->table) return stored_bytes(block);
  const int8x16_t table = vld1q_s8(block->gemm->table);
  const uint8_t *codes = block->weight + block->k0 / OCTET * BYTES;
  for (int64_t octet = 0; octet < block->k / OCTET; octet++)
    for (int part = 0; part < BYTES; part += 16) {
      uint8x16_t both = vld1q_u8(codes + octet * BYTES + part);
      int8x16_t first = vqtbl1q_s8(table, vandq_u8(both, vdupq_n_u8(15)));
      int8x16_t second = vqtbl1q_s8(table, vshrq_n_u8(both, 4));
      int8_t factors[16], *out = decoded + octet * 2 * BYTES + part;
      for (int i = 0; i < 16; i++)
        factors[i] = (int8_t)multiplier(block, block->k0 + octet * OCTET, (part + i) / QUAD);
      vst1q_s8(out, vmulq_s8(first, vld1q_s8(factors)));
      vst1q_s8(out + BYTES, vmulq_s8(second, vld1q_s8(factors)));
    }
  return decoded;
}

/* a - 128 is a signed byte; what it takes off, 128 times the weights, is added to what the sums start with. */
TARGET_DOT INLINE void tile_dot(
    const int rows, const uint8_t *a, int64_t stride, int64_t k, const int8_t *decoded, int32_t *sums) {
  const int8x16_t ones = vdupq_n_s8(64);
  int32x4_t total[4][4], offset[4];
  for (int row = 0; row < rows; row++)
    for (int part = 0; part < 4; part++) total[row][part] = vld1q_s32(sums + row * PANEL + 4 * part);
  for (int part = 0; part < 4; part++) offset[part] = vdupq_n_s32(0);
  for (int64_t i = 0; i < k; i += QUAD) {
    const int8_t *w = decoded + i / QUAD * BYTES;
    int8x16_t weight[4];
    for (int part = 0; part < 4; part++) {
      weight[part] = vld1q_s8(w + 16 * part);
      offset[part] = vdotq_s32(offset[part], weight[part], ones);
    }
    for (int row = 0; row < rows; row++) {
      uint32_t quad;
      memcpy(&quad, a + row * stride + i, sizeof quad);
      int8x16_t same = vreinterpretq_s8_u32(vdupq_n_u32(quad ^ 0x80808080u));
      for (int part = 0; part < 4; part++) total[row][part] = vdotq_s32(total[row][part], weight[part], same);
    }
  }
  for (int row = 0; row < rows; row++)
    for (int part = 0; part < 4; part++)
      vst1q_s32(sums + row * PANEL + 4 * part, vaddq_s32(total[row][part], vshlq_n_s32(offset[part], 1)));
}

TARGET_DOT static void add_dot(
    const Block *block, const uint8_t *a, int64_t stride, int64_t rows, int32_t *sums) {
  const int8_t *w = block->w[0];
  int64_t k = block->k;
  start_sums(block, rows, sums);
  for (; rows >= 4; rows -= 4, a += 4 * stride, sums += 4 * PANEL) tile_dot(4, a, stride, k, w, sums);
  for (; rows; rows--, a += stride, sums += PANEL) tile_dot(1, a, stride, k, w, sums);
}

const Variant PACKED_GEMM_DOT = {"dotprod", 0, 0, 1, 64, decode_dot, add_dot, NULL, NULL};
#endif
