/* PackedGemm's variants for AVX-VNNI, AVX-512 VNNI and AMX, their instructions made of AVX2's and of plain C: what they
 * compute, where the processor lacks them. A tile instruction whose operands do not fit aborts, as it would fault. */
#define _DEFAULT_SOURCE
#include <cpuid.h>
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* 64 bytes are returned, by functions of this file alone */
#endif
#define EMULATED static inline __attribute__((always_inline, target("avx2")))

/* --- AVX-VNNI ----------------------------------------------------------------------------------------------------- */

/* sum + four products of unsigned a with signed b in each lane. */
EMULATED __m256i dot_of_quads(__m256i sum, __m256i a, __m256i b) {
  const __m256i even = _mm256_set1_epi16(255), ones = _mm256_set1_epi16(1);
  __m256i low = _mm256_mullo_epi16(_mm256_and_si256(a, even), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  __m256i high = _mm256_mullo_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, ones));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(high, ones));
}
#define _mm256_dpbusd_avx_epi32 dot_of_quads

/* --- AVX-512: two halves of 32 bytes ------------------------------------------------------------------------------ */

typedef struct Wide {
  __m256i half[2];
} Wide;
#define __m512i Wide

#define HALVES(name, parameters, of_half)                                                                              \
  EMULATED Wide emulated_##name parameters {                                                                           \
    Wide result;                                                                                                       \
    for (int i = 0; i < 2; i++) result.half[i] = of_half;                                                              \
    return result;                                                                                                     \
  }
HALVES(mullo_epi16, (Wide x, Wide y), _mm256_mullo_epi16(x.half[i], y.half[i]))
HALVES(mullo_epi32, (Wide x, Wide y), _mm256_mullo_epi32(x.half[i], y.half[i]))
HALVES(and, (Wide x, Wide y), _mm256_and_si256(x.half[i], y.half[i]))
HALVES(or, (Wide x, Wide y), _mm256_or_si256(x.half[i], y.half[i]))
HALVES(shuffle_epi8, (Wide x, Wide y), _mm256_shuffle_epi8(x.half[i], y.half[i]))
HALVES(srli_epi16, (Wide x, int count), _mm256_srli_epi16(x.half[i], count))
HALVES(slli_epi16, (Wide x, int count), _mm256_slli_epi16(x.half[i], count))
HALVES(set1_epi8, (char x), (_mm256_set1_epi8(x) + 0 * i))
HALVES(set1_epi16, (short x), (_mm256_set1_epi16(x) + 0 * i))
HALVES(set1_epi32, (int x), (_mm256_set1_epi32(x) + 0 * i))
HALVES(broadcast_i32x4, (__m128i x), (_mm256_broadcastsi128_si256(x) + 0 * i))
HALVES(cvtepu8_epi32, (__m128i x), _mm256_cvtepu8_epi32(i ? _mm_unpackhi_epi64(x, x) : x))
HALVES(loadu, (const void *from), _mm256_loadu_si256((const __m256i *)from + i))
HALVES(dpbusd, (Wide sum, Wide a, Wide b), dot_of_quads(sum.half[i], a.half[i], b.half[i]))
EMULATED void emulated_storeu(void *to, Wide x) {
  for (int i = 0; i < 2; i++) _mm256_storeu_si256((__m256i *)to + i, x.half[i]);
}
EMULATED void emulated_store(void *to, Wide x) {
  if ((uintptr_t)to % 64) abort();
  emulated_storeu(to, x);
}
#define _mm512_mullo_epi16 emulated_mullo_epi16
#define _mm512_mullo_epi32 emulated_mullo_epi32
#define _mm512_and_si512 emulated_and
#define _mm512_or_si512 emulated_or
#define _mm512_shuffle_epi8 emulated_shuffle_epi8
#undef _mm512_srli_epi16
#undef _mm512_slli_epi16
#define _mm512_srli_epi16 emulated_srli_epi16
#define _mm512_slli_epi16 emulated_slli_epi16
#define _mm512_set1_epi8 emulated_set1_epi8
#define _mm512_set1_epi16 emulated_set1_epi16
#define _mm512_set1_epi32 emulated_set1_epi32
#define _mm512_broadcast_i32x4 emulated_broadcast_i32x4
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#define _mm512_loadu_si512 emulated_loadu
#define _mm512_storeu_si512 emulated_storeu
#define _mm512_store_si512 emulated_store
#define _mm512_dpbusd_epi32 emulated_dpbusd

/* --- AMX ---------------------------------------------------------------------------------------------------------- */

static _Thread_local struct {
  int configured, rows[8], bytes[8];
  uint8_t data[8][16][64];
} tiles;

static inline void load_config(const void *from) {
  uint8_t config[64];
  memcpy(config, from, sizeof config);
  memset(&tiles, 0, sizeof tiles);
  if (config[0] != 1 || config[1]) abort();
  for (int i = 2; i < 16; i++)
    if (config[i]) abort();
  for (int i = 0; i < 16; i++) {
    int bytes = config[16 + 2 * i] | config[17 + 2 * i] << 8, rows = config[48 + i];
    if (bytes > 64 || rows > 16 || (i >= 8 && (bytes || rows)) || !bytes != !rows) abort();
    if (i < 8) tiles.bytes[i] = bytes, tiles.rows[i] = rows;
  }
  tiles.configured = 1;
}

static inline void check_tile(int tile) {
  if (!tiles.configured || tile > 7 || !tiles.rows[tile]) abort();
}

static inline void load_tile(int tile, const void *from, int64_t stride) {
  check_tile(tile);
  memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
  for (int row = 0; row < tiles.rows[tile]; row++)
    memcpy(tiles.data[tile][row], (const uint8_t *)from + row * stride, (size_t)tiles.bytes[tile]);
}

static inline void store_tile(int tile, void *to, int64_t stride) {
  check_tile(tile);
  for (int row = 0; row < tiles.rows[tile]; row++)
    memcpy((uint8_t *)to + row * stride, tiles.data[tile][row], (size_t)tiles.bytes[tile]);
}

/* sums [rows, columns] of 32 bits += unsigned codes [rows, 4 k] times signed weight [k, 4 columns]. */
static inline void multiply_tiles(int sums, int codes, int weight) {
  check_tile(sums), check_tile(codes), check_tile(weight);
  if (sums == codes || sums == weight || codes == weight) abort();
  if (tiles.rows[sums] != tiles.rows[codes] || tiles.bytes[sums] != tiles.bytes[weight]) abort();
  if (tiles.bytes[codes] != 4 * tiles.rows[weight] || tiles.bytes[sums] % 4) abort();
  for (int row = 0; row < tiles.rows[sums]; row++)
    for (int column = 0; column < tiles.bytes[sums] / 4; column++) {
      uint32_t sum;
      memcpy(&sum, tiles.data[sums][row] + 4 * column, sizeof sum);
      for (int k = 0; k < tiles.bytes[codes]; k++)
        sum += (uint32_t)(tiles.data[codes][row][k] * (int8_t)tiles.data[weight][k / 4][4 * column + k % 4]);
      memcpy(tiles.data[sums][row] + 4 * column, &sum, sizeof sum);
    }
}

static inline void release_tiles(void) { tiles.configured = 0; }

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#define _tile_loadconfig load_config
#define _tile_release release_tiles
#define _tile_loadd load_tile
#define _tile_stored store_tile
#define _tile_dpbusd multiply_tiles

/* --- the variants, compiled for AVX2 whatever they ask for --------------------------------------------------------- */

#define target(instruction_sets) target("avx2")
#include "packed_gemm_vnni.c"
#include "packed_gemm_amx.c"
#undef target

#define packed_gemm_force force_one_that_is_here
#include "packed_gemm.c"
#undef packed_gemm_force

int packed_gemm_force(const char *name) {
  const Variant *emulated[] = {&PACKED_GEMM_AVX_VNNI, &PACKED_GEMM_AVX512_VNNI, &PACKED_GEMM_AMX};
  for (int i = 0; i < 3 && name; i++)
    if (!strcmp(name, emulated[i]->name)) return forced = emulated[i], __builtin_cpu_supports("avx2") != 0;
  return force_one_that_is_here(name);
}
