/* A panel is decoded once and then meets all rows, six at a time; one or two rows decode it on their way. */
#include "half_gemm.h"

#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "variants.h"

#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

typedef struct Loops {
  void (*decode)(const uint16_t *, int64_t, float *);
  void (*product)(int, const float *, const uint16_t *, const float *, int64_t, float *); /* 6 rows, 2 or 1 */
} Loops;

/* float16 -> float32, without a branch and without a denormal float32 on the way. */
INLINE float widened(uint16_t half) {
  uint32_t magnitude = half & 0x7fff, sign = (uint32_t)(half & 0x8000) << 16, narrow;
  uint32_t wide = (magnitude << 13) + (112u << 23) + (magnitude < 0x7c00 ? 0 : 112u << 23);
  float small = (float)(int32_t)magnitude * 0x1p-24f;
  memcpy(&narrow, &small, sizeof narrow);
  wide = (magnitude < 0x400 ? narrow : wide) | sign;
  memcpy(&small, &wide, sizeof small);
  return small;
}

#define TARGET
#undef LANES
#define LANES 4
#define NAME(x) plain_##x
#include "half_gemm_tiles.h"
#undef NAME
#undef LANES
#undef TARGET

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define NAME(x) avx2_##x
#include "half_gemm_tiles.h"
#undef NAME
#undef LANES
#undef TARGET

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define LANES 16
#define NAME(x) avx512_##x
#include "half_gemm_tiles.h"
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
  /* Every processor with AVX2 has F16C, which not every compiler can ask for. */
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2_loops;
#endif
  return &plain_loops;
}

int64_t half_gemm_scratch(const HalfGemm *gemm) { return gemm->k * HALF_PANEL * (int64_t)sizeof(float); }

void half_gemm_panel(const HalfGemm *gemm, int64_t panel, int64_t first, int64_t last, void *scratch) {
  const Loops *use = loops();
  int64_t channel = panel * HALF_PANEL, left = gemm->n - channel, channels = left < HALF_PANEL ? left : HALF_PANEL;
  const uint16_t *weight = gemm->weight + panel * gemm->k * HALF_PANEL, *half = last - first > 2 ? NULL : weight;
  float *weights = scratch, sums[6 * HALF_PANEL];
  if (!half) use->decode(weight, gemm->k * HALF_PANEL, weights);
  for (int64_t row = first, count; row < last; row += count) {
    count = last - row >= 6 ? 6 : last - row >= 2 ? 2 : 1;
    use->product((int)count, gemm->x + row * gemm->k, half, weights, gemm->k, sums);
    for (int64_t i = 0; i < count; i++) {
      float *y = gemm->y + (row + i) * gemm->n + channel;
      for (int64_t j = 0; j < channels; j++)
        y[j] = sums[i * HALF_PANEL + j] + (gemm->bias ? gemm->bias[channel + j] : 0.0f);
    }
  }
}
