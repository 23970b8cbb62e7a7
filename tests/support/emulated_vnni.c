/* packed_gemm.c and packed_gemm_vnni.c with AVX-VNNI's one instruction made of AVX2's: its variant runs without it. */
#include <immintrin.h>
#include <string.h>

/* sum + four products of unsigned a with signed b in each lane. */
static inline __attribute__((always_inline, target("avx2"))) __m256i dot_of_quads(__m256i sum, __m256i a, __m256i b) {
  const __m256i even = _mm256_set1_epi16(255), ones = _mm256_set1_epi16(1);
  __m256i low = _mm256_mullo_epi16(_mm256_and_si256(a, even), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  __m256i high = _mm256_mullo_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, ones));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(high, ones));
}

#define _mm256_dpbusd_avx_epi32 dot_of_quads
#include "packed_gemm_vnni.c"

#define packed_gemm_force force_one_that_is_here
#include "packed_gemm.c"
#undef packed_gemm_force

int packed_gemm_force(const char *name) {
  if (name && !strcmp(name, "avx_vnni") && __builtin_cpu_supports("avx2")) return forced = &PACKED_GEMM_AVX_VNNI, 1;
  return force_one_that_is_here(name);
}
