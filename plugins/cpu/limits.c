/* What this processor can do at best, measured: products of bytes by the instruction that PackedGemm's variant uses,
 * and fused multiply-adds of float32. */
#include "limits.h"

#include <string.h>
#include <time.h>

#include "packed_gemm.h"
#include "variants.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

enum { SUMS = 10, TURNS = 4096 }; /* independent sums: latency times instructions at once; between looks at the clock */

static double now(void) {
  struct timespec time;
  timespec_get(&time, TIME_UTC);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* work() until `seconds` have gone; turns of it per second. */
static double rate(void (*work)(void), double seconds) {
  double started = now(), gone;
  int64_t turns = 0;
  do {
    work();
    turns++;
    gone = now() - started;
  } while (gone < seconds);
  return (double)turns / gone;
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void bytes_avx2(void) {
  __m256i sum[SUMS], x = _mm256_setzero_si256(), y = x;
#pragma GCC unroll 16
  for (int i = 0; i < SUMS; i++) sum[i] = x;
  for (int turn = 0; turn < TURNS; turn++)
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) {
      __m256i product;
      __asm__ volatile("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0" : "+x"(sum[i]), "=&x"(product) : "x"(x), "x"(y));
    }
}
__attribute__((target("avx2,fma"))) static void floats_avx2(void) {
  __m256 sum[SUMS], x = _mm256_setzero_ps(), y = x;
#pragma GCC unroll 16
  for (int i = 0; i < SUMS; i++) sum[i] = x;
  for (int turn = 0; turn < TURNS; turn++)
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) __asm__ volatile("vfmadd231ps %1, %2, %0" : "+x"(sum[i]) : "x"(x), "x"(y));
}
__attribute__((target("avx512f,avx512vnni"))) static void bytes_vnni(void) {
  __m512i sum[SUMS], x = _mm512_setzero_si512(), y = x;
#pragma GCC unroll 16
  for (int i = 0; i < SUMS; i++) sum[i] = x;
  for (int turn = 0; turn < TURNS; turn++)
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) __asm__ volatile("vpdpbusd %1, %2, %0" : "+v"(sum[i]) : "v"(x), "v"(y));
}
__attribute__((target("avx2,avxvnni"))) static void bytes_vnni_256(void) {
  __m256i sum[SUMS], x = _mm256_setzero_si256(), y = x;
#pragma GCC unroll 16
  for (int i = 0; i < SUMS; i++) sum[i] = x;
  for (int turn = 0; turn < TURNS; turn++)
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) __asm__ volatile("%{vex%} vpdpbusd %1, %2, %0" : "+x"(sum[i]) : "x"(x), "x"(y));
}
__attribute__((target("avx512f"))) static void floats_avx512(void) {
  __m512 sum[SUMS], x = _mm512_setzero_ps(), y = x;
#pragma GCC unroll 16
  for (int i = 0; i < SUMS; i++) sum[i] = x;
  for (int turn = 0; turn < TURNS; turn++)
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) __asm__ volatile("vfmadd231ps %1, %2, %0" : "+v"(sum[i]) : "v"(x), "v"(y));
}
#elif defined(__aarch64__)
__attribute__((target("arch=armv8.2-a+dotprod"))) static void bytes_dot(void) {
  int32x4_t sum[SUMS];
  int8x16_t x = vdupq_n_s8(0), y = x;
#pragma GCC unroll 16
  for (int i = 0; i < SUMS; i++) sum[i] = vdupq_n_s32(0);
  for (int turn = 0; turn < TURNS; turn++)
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) __asm__ volatile("sdot %0.4s, %1.16b, %2.16b" : "+w"(sum[i]) : "w"(x), "w"(y));
}
static void floats_neon(void) {
  float32x4_t sum[SUMS], x = vdupq_n_f32(0), y = x;
#pragma GCC unroll 16
  for (int i = 0; i < SUMS; i++) sum[i] = x;
  for (int turn = 0; turn < TURNS; turn++)
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) __asm__ volatile("fmla %0.4s, %1.4s, %2.4s" : "+w"(sum[i]) : "w"(x), "w"(y));
}
#endif

EXPORT double byte_products_per_second(double seconds) {
  const char *variant = packed_gemm_variant();
  double turns = (double)SUMS * TURNS;
  (void)seconds, (void)turns;
#if defined(__x86_64__)
  if (!strcmp(variant, "avx512_vnni")) return 64 * turns * rate(bytes_vnni, seconds);
  if (!strcmp(variant, "avx_vnni")) return 32 * turns * rate(bytes_vnni_256, seconds);
  if (!strcmp(variant, "avx2")) return 32 * turns * rate(bytes_avx2, seconds);
#elif defined(__aarch64__)
  if (!strcmp(variant, "dotprod")) return 16 * turns * rate(bytes_dot, seconds);
#endif
  (void)variant;
  return 0;
}

EXPORT double float_products_per_second(double seconds) {
  double turns = (double)SUMS * TURNS;
  (void)seconds, (void)turns;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return 16 * turns * rate(floats_avx512, seconds);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8 * turns * rate(floats_avx2, seconds);
#elif defined(__aarch64__)
  return 4 * turns * rate(floats_neon, seconds);
#endif
  return 0;
}
