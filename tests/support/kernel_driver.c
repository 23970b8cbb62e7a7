/* One kernel of plugins/cpu without onnxruntime, so that it runs under sanitizers and emulators: numbers and arrays in
 * on standard input, each array in memory of just its size, float32 results out on standard output. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "half_gemm.h"
#include "packed_gemm.h"

static void *read_bytes(size_t size) {
  void *data = malloc(size);
  if (!data || fread(data, 1, size, stdin) != size) exit(3);
  return data;
}

static void write_floats(const float *data, int64_t count) {
  if (fwrite(data, sizeof *data, (size_t)count, stdout) != (size_t)count) exit(4);
}

static int packed_gemm(const char *variant) {
  int64_t *number = read_bytes(10 * sizeof *number), rows = number[0], n = number[1], k = number[2];
  PackedGemm gemm = {.rows = rows, .n = n, .k = k, .group = number[3], .zero = (int32_t)number[4]};
  gemm.limb_weight = (int32_t)number[5], gemm.largest_code = (int32_t)number[6], gemm.sums = number[9];
  int64_t panels = (n + PANEL - 1) / PANEL, octets = (k + OCTET - 1) / OCTET;
  gemm.codes = read_bytes((size_t)(rows * k));
  if (number[7]) gemm.low_codes = read_bytes((size_t)(rows * k));
  gemm.weight = read_bytes((size_t)(panels * octets * PANEL * QUAD));
  if (number[8]) gemm.multipliers = read_bytes((size_t)(panels * (k / gemm.group) * PANEL));
  gemm.table = read_bytes(16);
  gemm.scale = read_bytes((size_t)(gemm.sums * n) * sizeof(float));
  gemm.weight_sum = read_bytes((size_t)(gemm.sums * n) * sizeof(int32_t));
  gemm.product = malloc((size_t)(rows * n) * sizeof(float));
  void *scratch = aligned_alloc(64, (size_t)packed_gemm_scratch(&gemm));
  if (!packed_gemm_force(variant)) return 2;
  if (!gemm.product || !scratch || packed_gemm_misfit(&gemm)) return 5;
  for (int64_t panel = 0; panel < panels; panel++)
    for (int64_t first = 0; first < rows; first += MAX_ROWS)
      packed_gemm_panel(&gemm, panel, first, rows - first < MAX_ROWS ? rows : first + MAX_ROWS, scratch);
  write_floats(gemm.product, rows * n);
  return 0;
}

static int attention(void) {
  int64_t *number = read_bytes(9 * sizeof *number);
  Attention it = {.samples = number[0], .heads = number[1], .queries = number[2], .keys = number[3], .size = number[4]};
  size_t floats = (size_t)(it.samples * it.heads * it.size);
  memcpy(it.mask_step, number + 5, sizeof it.mask_step);
  it.scale = *(float *)read_bytes(sizeof it.scale);
  it.q = read_bytes(floats * (size_t)it.queries * sizeof(float));
  it.k = read_bytes(floats * (size_t)it.keys * sizeof(float));
  it.v = read_bytes(floats * (size_t)it.keys * sizeof(float));
  int64_t masked = 1;
  const int64_t extent[] = {it.samples, it.heads, it.queries, it.keys};
  for (int i = 0; i < 4; i++) masked += it.mask_step[i] * (extent[i] - 1);
  if (masked > 1) it.mask = read_bytes((size_t)masked * sizeof(float));
  it.out = malloc(floats * (size_t)it.queries * sizeof(float));
  void *scratch = aligned_alloc(64, (size_t)attention_scratch(&it));
  if (!it.out || !scratch) return 5;
  for (int64_t part = 0; part < it.samples * it.heads; part++)
    for (int64_t first = 0; first < it.queries; first += QUERIES) {
      int64_t count = it.queries - first < QUERIES ? it.queries - first : QUERIES;
      attention_block(&it, part / it.heads, part % it.heads, first, count, scratch);
    }
  write_floats(it.out, (int64_t)floats * it.queries);
  return 0;
}

static int half_gemm(void) {
  int64_t *number = read_bytes(3 * sizeof *number), rows = number[0], n = number[1], k = number[2];
  int64_t panels = (n + HALF_PANEL - 1) / HALF_PANEL;
  HalfGemm gemm = {.rows = rows, .n = n, .k = k};
  gemm.x = read_bytes((size_t)(rows * k) * sizeof(float));
  gemm.weight = read_bytes((size_t)(panels * k * HALF_PANEL) * sizeof(uint16_t));
  gemm.bias = read_bytes((size_t)n * sizeof(float));
  gemm.y = malloc((size_t)(rows * n) * sizeof(float));
  void *scratch = aligned_alloc(64, (size_t)half_gemm_scratch(&gemm));
  if (!gemm.y || !scratch) return 5;
  for (int64_t panel = 0; panel < panels; panel++)
    for (int64_t first = 0; first < rows; first += HALF_ROWS)
      half_gemm_panel(&gemm, panel, first, rows - first < HALF_ROWS ? rows : first + HALF_ROWS, scratch);
  write_floats(gemm.y, rows * n);
  return 0;
}

/* packed_gemm VARIANT, half_gemm or attention. */
int main(int count, char **argument) {
  if (count == 2 && !strcmp(argument[1], "half_gemm")) return half_gemm();
  if (count == 3 && !strcmp(argument[1], "packed_gemm")) return packed_gemm(argument[2]);
  return count == 2 && !strcmp(argument[1], "attention") ? attention() : 1;
}
