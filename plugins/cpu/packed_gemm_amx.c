/* PackedGemm by AMX: a tile of 16 rows of 64 bytes times 16 input channels of 4 bytes of a panel, 16384 products at once.
 * A decoded panel is such tiles one after the other, and rows of codes are read where they are. */
#if !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE /* syscall */
#endif
#include "packed_gemm_variant.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#if defined(__linux__)
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* --- is it here? -------------------------------------------------------------------------------------------------- */

#if defined(__linux__)
/* The system keeps tiles for a process that has asked: they are 8 KiB of every thread's state. */
static int may_use_tiles(void) {
  enum { ASK = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM of asm/prctl.h, and the state's number */
  unsigned a = 0, b = 0, c = 0, d = 0, low = 0, high = 0;
  if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0; /* OSXSAVE: xgetbv is there */
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return 0; /* AMX-TILE, AMX-INT8 */
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return 0; /* the system knows both parts of the state */
  return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}

int packed_gemm_has_amx(void) {
  enum { UNKNOWN, NO, YES };
  static atomic_int known = UNKNOWN;
  int answer = atomic_load(&known);
  if (answer == UNKNOWN) atomic_store(&known, answer = may_use_tiles() ? YES : NO);
  return answer == YES;
}
#else
int packed_gemm_has_amx(void) { return 0; } /* no other system here says how to ask for them */
#endif

/* --- products ----------------------------------------------------------------------------------------------------- */

#define TARGET_AMX __attribute__((target("amx-tile,amx-int8")))

enum { TILE_ROWS = 16, TILE_BYTES = 64 };
/* Registers: four of sums; codes and weights, and those of what is left of the input channels. */
enum { SUMS = 0, CODES = 4, CODES_LEFT = 5, WEIGHT = 6, WEIGHT_LEFT = 7 };

/* As ldtilecfg reads it. */
typedef struct Shapes {
  uint8_t palette, start, unused[14];
  uint16_t bytes[16]; /* of a row */
  uint8_t rows[16];
} Shapes;

TARGET_AMX INLINE void configure(int64_t rows, int64_t left) {
  Shapes shapes = {.palette = 1};
  for (int i = SUMS; i <= CODES_LEFT; i++) shapes.rows[i] = (uint8_t)rows, shapes.bytes[i] = TILE_BYTES;
  shapes.rows[WEIGHT] = TILE_ROWS, shapes.bytes[WEIGHT] = TILE_BYTES;
  if (left) shapes.rows[WEIGHT_LEFT] = (uint8_t)(left / QUAD), shapes.bytes[WEIGHT_LEFT] = TILE_BYTES;
  if (left) shapes.bytes[CODES_LEFT] = (uint16_t)left;
  __asm__ volatile("" : : "r"(&shapes) : "memory"); /* all of it is read, which not every compiler knows */
  _tile_loadconfig(&shapes);
}

/* `tiles` (1 or 4) times as many rows as are configured, 16 if there are four. Registers are named by numbers, since
 * they become part of instructions. */
TARGET_AMX INLINE void tiles_amx(
    const int tiles, const uint8_t *a, int64_t stride, int64_t k, const int8_t *w, int32_t *sums) {
  const int64_t step = TILE_ROWS * stride, part = TILE_ROWS * PANEL;
  _tile_loadd(0, sums, TILE_BYTES);
  if (tiles == 4) {
    _tile_loadd(1, sums + part, TILE_BYTES);
    _tile_loadd(2, sums + 2 * part, TILE_BYTES);
    _tile_loadd(3, sums + 3 * part, TILE_BYTES);
  }
#define MULTIPLY(codes, weight)                                                                                        \
  do {                                                                                                                 \
    _tile_loadd(weight, w, BYTES);                                                                                     \
    _tile_loadd(codes, a, stride);                                                                                     \
    _tile_dpbusd(0, codes, weight);                                                                                    \
    if (tiles == 4) {                                                                                                  \
      _tile_loadd(codes, a + step, stride);                                                                            \
      _tile_dpbusd(1, codes, weight);                                                                                  \
      _tile_loadd(codes, a + 2 * step, stride);                                                                        \
      _tile_dpbusd(2, codes, weight);                                                                                  \
      _tile_loadd(codes, a + 3 * step, stride);                                                                        \
      _tile_dpbusd(3, codes, weight);                                                                                  \
    }                                                                                                                  \
  } while (0)
  for (; k >= TILE_BYTES; k -= TILE_BYTES, a += TILE_BYTES, w += TILE_BYTES * PANEL) MULTIPLY(4, 6);
  if (k) MULTIPLY(5, 7);
#undef MULTIPLY
  _tile_stored(0, sums, TILE_BYTES);
  if (tiles == 4) {
    _tile_stored(1, sums + part, TILE_BYTES);
    _tile_stored(2, sums + 2 * part, TILE_BYTES);
    _tile_stored(3, sums + 3 * part, TILE_BYTES);
  }
}

TARGET_AMX static void add_amx(const Block *block, const uint8_t *a, int64_t stride, int64_t rows, int32_t *sums) {
  const int8_t *w = block->w[0];
  int64_t k = block->k, left = k % TILE_BYTES;
  const int64_t four = 4 * TILE_ROWS;
  start_sums(block, rows, sums);
  if (rows >= TILE_ROWS) configure(TILE_ROWS, left);
  for (; rows >= four; rows -= four, a += four * stride, sums += four * PANEL) tiles_amx(4, a, stride, k, w, sums);
  for (; rows >= TILE_ROWS; rows -= TILE_ROWS, a += TILE_ROWS * stride, sums += TILE_ROWS * PANEL)
    tiles_amx(1, a, stride, k, w, sums);
  if (rows) {
    configure(rows, left);
    tiles_amx(1, a, stride, k, w, sums);
  }
  _tile_release();
  __asm__ volatile("" : : : "memory");
}

TARGET_AMX int64_t packed_gemm_amx_products(int64_t turns) {
  configure(TILE_ROWS, 0); /* tiles of zeros */
  for (int64_t turn = 0; turn < turns; turn++) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 6);
    _tile_dpbusd(2, 4, 6);
    _tile_dpbusd(3, 4, 6);
  }
  _tile_release();
  return turns * 4 * TILE_ROWS * TILE_BYTES * PANEL;
}

const Variant PACKED_GEMM_AMX = {"amx_int8", 0, 0, 1, 4 * TILE_ROWS, packed_gemm_decode_vnni, add_amx, NULL, NULL};
#endif
