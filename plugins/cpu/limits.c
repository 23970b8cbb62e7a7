/* What this processor can do at best, measured: products of bytes by the instruction that PackedGemm's variant uses,
 * fused multiply-adds of float32, and bytes read from memory one after the other. */
#if !defined(_WIN32)
#define _POSIX_C_SOURCE 199309L /* clock_gettime */
#endif
#include "limits.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "packed_gemm_variant.h"
#include "variants.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(_WIN32)
#include <windows.h>
#endif

enum {
  TURNS = 4096, /* between looks at the clock */
  /* Independent sums. Latency times instructions at once, 10 at most, would do if each instruction began when it could, which
   * they do not. FEW: as many as leave room for the factors among 16 registers. */
  FEW = 12,
  SUMS = 16
};

#if defined(_WIN32)
double seconds_now(void) {
  LARGE_INTEGER ticks, per_second;
  QueryPerformanceCounter(&ticks), QueryPerformanceFrequency(&per_second);
  return (double)ticks.QuadPart / (double)per_second.QuadPart;
}
#else
double seconds_now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}
#endif

/* work() until `seconds` have gone; turns of it per second. */
static double rate(void (*work)(void), double seconds) {
  double started = seconds_now(), gone;
  int64_t turns = 0;
  do {
    work();
    turns++;
    gone = seconds_now() - started;
  } while (gone < seconds);
  return (double)turns / gone;
}

/* A function that adds TURNS products to each of `count` sums, which stay in registers: in memory they would be half as
 * fast. `text` works on %0, a sum, with the factors %2 and %3; %1 is a register of its own. */
#define LOOP(name, instructions, Vector, count, kind, text)                                                            \
  __attribute__((target(instructions))) static void name(void) {                                                       \
    Vector sum[count], x = {0}, y = {0};                                                                               \
    _Pragma("GCC unroll 16") for (int i = 0; i < count; i++) sum[i] = x;                                               \
    for (int turn = 0; turn < TURNS; turn++)                                                                           \
      _Pragma("GCC unroll 16") for (int i = 0; i < count; i++) {                                                       \
        Vector product;                                                                                                \
        __asm__ volatile(text : "+" kind(sum[i]), "=&" kind(product) : kind(x), kind(y));                              \
      }                                                                                                                \
  }

#if defined(__x86_64__)

enum { PAIRED = 6, AHEAD = 4 }; /* sums, and as many products; how far products are made ahead of their additions */

/* Products two by two, and the additions of earlier ones behind them: an addition that follows its own product at once
 * takes a multiplier's place on Zen 3, and every tenth product is not made. */
__attribute__((target("avx2"))) static void bytes_avx2(void) {
  __m256i sum[PAIRED], product[PAIRED], x = {0};
  _Pragma("GCC unroll 16") for (int i = 0; i < PAIRED; i++) sum[i] = product[i] = x;
  for (int turn = 0; turn < TURNS; turn++)
    _Pragma("GCC unroll 16") for (int i = 0; i < PAIRED; i += 2) {
      __m256i *next = product + (i + AHEAD) % PAIRED;
      __asm__ volatile("vpmaddubsw %2, %2, %0\n\tvpmaddubsw %2, %2, %1" : "=&x"(next[0]), "=&x"(next[1]) : "x"(x));
      __asm__ volatile("vpaddw %2, %0, %0\n\tvpaddw %3, %1, %1"
                       : "+x"(sum[i]), "+x"(sum[i + 1])
                       : "x"(product[i]), "x"(product[i + 1]));
    }
}
LOOP(floats_avx2, "avx2,fma", __m256, FEW, "x", "vfmadd231ps %2, %3, %0")
LOOP(bytes_vnni_256, "avx2,avxvnni", __m256i, FEW, "x", "%{vex%} vpdpbusd %2, %3, %0")
LOOP(bytes_vnni, "avx512f,avx512vnni", __m512i, SUMS, "v", "vpdpbusd %2, %3, %0")
static void bytes_amx(void) { packed_gemm_amx_products(TURNS); }
LOOP(floats_avx512, "avx512f", __m512, SUMS, "v", "vfmadd231ps %2, %3, %0")
#elif defined(__aarch64__)
LOOP(bytes_dot, "arch=armv8.2-a+dotprod", int32x4_t, SUMS, "w", "sdot %0.4s, %2.16b, %3.16b")
LOOP(bytes_i8mm, "arch=armv8.2-a+i8mm", int32x4_t, SUMS, "w", "usmmla %0.4s, %2.16b, %3.16b")
LOOP(floats_neon, "arch=armv8-a", float32x4_t, SUMS, "w", "fmla %0.4s, %2.4s, %3.4s")
#endif

EXPORT double byte_products_per_second(double seconds) {
  const char *variant = packed_gemm_variant();
  (void)seconds;
#if defined(__x86_64__)
  if (!strcmp(variant, "amx_int8")) return (double)packed_gemm_amx_products(1) * TURNS * rate(bytes_amx, seconds);
  if (!strcmp(variant, "avx512_vnni")) return 64.0 * SUMS * TURNS * rate(bytes_vnni, seconds);
  if (!strcmp(variant, "avx_vnni")) return 32.0 * FEW * TURNS * rate(bytes_vnni_256, seconds);
  if (!strcmp(variant, "avx2")) return 32.0 * PAIRED * TURNS * rate(bytes_avx2, seconds);
#elif defined(__aarch64__)
  if (!strcmp(variant, "i8mm")) return 32.0 * SUMS * TURNS * rate(bytes_i8mm, seconds);
  if (!strcmp(variant, "dotprod")) return 16.0 * SUMS * TURNS * rate(bytes_dot, seconds);
#endif
  (void)variant;
  return 0;
}

EXPORT double float_products_per_second(double seconds) {
  (void)seconds;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return 16.0 * SUMS * TURNS * rate(floats_avx512, seconds);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8.0 * FEW * TURNS * rate(floats_avx2, seconds);
#elif defined(__aarch64__)
  return 4.0 * SUMS * TURNS * rate(floats_neon, seconds);
#endif
  return 0;
}

VARIANTS uint64_t folded(const uint64_t *words, int64_t count) {
  uint64_t all = 0;
  for (int64_t i = 0; i < count; i++) all ^= words[i];
  return all;
}

EXPORT double memory_bytes_per_second(double seconds, int64_t bytes) {
  int64_t count = bytes / (int64_t)sizeof(uint64_t), turns = 0;
  uint64_t *words = malloc((size_t)bytes);
  volatile uint64_t read = 0;
  if (!words) return 0;
  for (int64_t i = 0; i < count; i++) words[i] = (uint64_t)i; /* pages that nobody wrote are all one page of zeros */
  double started = seconds_now(), gone;
  do {
    __asm__ volatile("" : : "r"(words) : "memory"); /* may have changed, so it is read again */
    read = folded(words, count);
    turns++;
    gone = seconds_now() - started;
  } while (gone < seconds);
  (void)read;
  free(words);
  return (double)(turns * count) * sizeof(uint64_t) / gone;
}
