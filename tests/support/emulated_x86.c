/* What PackedGemm's variants for AVX-VNNI, AVX-512 VNNI and AMX compute, where the processor lacks them.
 *
 * Of the first two the source is compiled with their instructions made of AVX2's. Of AMX the machine code itself runs:
 * where it stops at an instruction, that is done in C. One whose operands do not fit aborts, as it would fault. */
#define _GNU_SOURCE /* names of registers */
#include <immintrin.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include "packed_gemm_variant.h"

#include "emulated_avx512.h"

/* --- AVX-VNNI ----------------------------------------------------------------------------------------------------- */

#define _mm256_dpbusd_avx_epi32 dot_of_quads

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

/* Where the operand in memory of the instruction at `at` is, ModRM being its fifth byte; *end: what follows it. */
static uint8_t *address(const uint8_t *at, const greg_t *reg, int64_t *stride, const uint8_t **end) {
  static const int names[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  int mod = at[4] >> 6, low = at[4] & 7, base = low, absolute = mod == 0 && low == 5;
  const uint8_t *next = at + 5;
  int64_t sum = 0;
  int32_t offset = 0;
  if (absolute || mod == 3) abort(); /* relative to the instruction, or no memory: no compiler makes that here */
  if (low == 4) {
    int index = (*next >> 3 & 7) | (~at[1] >> 6 & 1) << 3;
    base = *next & 7;
    if (index != 4) *stride = (int64_t)((uint64_t)reg[names[index]] << (*next >> 6));
    next++;
  }
  if (mod == 0 && base == 5) abort();
  sum = reg[names[base | (~at[1] >> 5 & 1) << 3]];
  if (mod == 1) offset = (int8_t)*next, next++;
  if (mod == 2) memcpy(&offset, next, 4), next += 4;
  *end = next;
  return (uint8_t *)(uintptr_t)(uint64_t)(sum + offset);
}

/* A processor without tiles stops at each instruction of theirs: it is done here, and the next one is gone on with. */
static void on_illegal_instruction(int number, siginfo_t *info, void *context) {
  greg_t *reg = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *at = (const uint8_t *)(uintptr_t)reg[REG_RIP], *end = at + 5;
  (void)number, (void)info;
  if (at[0] != 0xc4 || (at[1] & 31) != 2 || (at[2] & 0x84)) abort(); /* VEX, map 0F38, W0, 128 */
  enum { NONE, IS_66, IS_F3, IS_F2 };
  int prefix = at[2] & 3, last = ~at[2] >> 3 & 15, tile = at[4] >> 3 & 7;
  int64_t stride = 0;
  if (at[3] == 0x49 && prefix == NONE && at[4] == 0xc0) tiles.configured = 0;
  else if (at[3] == 0x49 && prefix == NONE) load_config(address(at, reg, &stride, &end));
  else if (at[3] == 0x4b && prefix == IS_F2 && (at[4] & 7) == 4) {
    const uint8_t *from = address(at, reg, &stride, &end);
    load_tile(tile, from, stride);
  } else if (at[3] == 0x4b && prefix == IS_F3 && (at[4] & 7) == 4) {
    uint8_t *to = address(at, reg, &stride, &end);
    store_tile(tile, to, stride);
  } else if (at[3] == 0x5e && prefix == IS_66 && at[4] >> 6 == 3) multiply_tiles(tile, at[4] & 7, last);
  else abort();
  reg[REG_RIP] = (greg_t)(uintptr_t)end;
}

static void take_traps(void) {
  struct sigaction action = {.sa_sigaction = on_illegal_instruction, .sa_flags = SA_SIGINFO};
  if (packed_gemm_has_amx()) return;
  if (sigaction(SIGILL, &action, NULL)) abort();
}

/* --- the variants by AVX, compiled for AVX2 whatever they ask for --------------------------------------------------- */

#define target(instruction_sets) target("avx2,fma")
#include "packed_gemm_vnni.c"
#undef target

#define packed_gemm_force force_one_that_is_here
#include "packed_gemm.c"
#undef packed_gemm_force

int packed_gemm_force(const char *name) {
  const Variant *emulated[] = {&PACKED_GEMM_AVX_VNNI, &PACKED_GEMM_AVX512_VNNI, &PACKED_GEMM_AMX};
  for (int i = 0; i < 3 && name; i++)
    if (!strcmp(name, emulated[i]->name)) {
      chosen = emulated[i];
      take_traps();
      return __builtin_cpu_supports("avx2") != 0;
    }
  return force_one_that_is_here(name);
}
