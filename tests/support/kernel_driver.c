/* One kernel of plugins/cpu without onnxruntime, so that it runs under sanitizers and emulators: numbers and arrays in
 * on standard input, each array in memory of just its size, float32 results out on standard output. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "half_gemm.h"
#include "packed_gemm.h"
#include "quantized_attention.h"
#include "token_chain.h"

#if defined(_WIN32)
#include <fcntl.h>
#include <io.h>
#include <malloc.h>
#define aligned_alloc(alignment, size) _aligned_malloc(size, alignment)
#endif

static void *read_bytes(size_t size) {
  void *data = malloc(size);
  if (!data || fread(data, 1, size, stdin) != size) exit(3);
  return data;
}

/* Bytes need no alignment: they begin at an odd address. */
static void *read_codes(size_t size) {
  char *data = malloc(size + 1);
  if (!data || fread(data + 1, 1, size, stdin) != size) exit(3);
  return data + 1;
}

static void write_floats(const float *data, int64_t count) {
  if (fwrite(data, sizeof *data, (size_t)count, stdout) != (size_t)count) exit(4);
}

static float *read_floats(int64_t count) { return read_bytes((size_t)count * sizeof(float)); }

static float *floats(int64_t count) {
  float *data = malloc((size_t)count * sizeof *data);
  if (!data) exit(5);
  return data;
}

static PackedGemm read_packed_gemm(void) {
  int64_t *number = read_bytes(13 * sizeof *number), rows = number[0], n = number[1], k = number[2];
  PackedGemm gemm = {.rows = rows, .n = n, .k = k, .group = number[3], .zero = (int32_t)number[4]};
  gemm.limb_weight = (int32_t)number[5], gemm.largest_code = (int32_t)number[6], gemm.sums = number[9];
  gemm.largest_weight = (int32_t)number[10]; /* 0: with a table */
  gemm.scales = number[11], gemm.group_scales = number[12] ? number[12] : 1; /* 0: none */
  int packed = !gemm.largest_weight;
  int64_t panels = (n + PANEL - 1) / PANEL, octets = (k + OCTET - 1) / OCTET;
  gemm.codes = read_codes((size_t)(rows * k));
  if (number[7]) gemm.low_codes = read_codes((size_t)(rows * k));
  gemm.weight = read_codes((size_t)(panels * octets * PANEL * (packed ? QUAD : OCTET)));
  if (number[8]) gemm.multipliers = read_codes((size_t)(panels * (k / gemm.group) * PANEL));
  if (packed) gemm.table = read_codes(16);
  gemm.scale = read_floats(gemm.scales * n);
  gemm.weight_sum = read_bytes((size_t)(gemm.sums * n) * sizeof(int32_t));
  if (number[12]) gemm.group_scale = read_floats(rows * gemm.group_scales);
  gemm.epilogue.n = n;
  return gemm;
}

static void multiply(const PackedGemm *gemm) {
  void *scratch = aligned_alloc(64, (size_t)packed_gemm_scratch(gemm));
  if (!scratch || packed_gemm_misfit(gemm)) exit(5);
  for (int64_t first = 0; first < gemm->rows; first += MAX_ROWS)
    packed_gemm_panels(
        gemm, 0, (gemm->n + PANEL - 1) / PANEL, first, gemm->rows - first < MAX_ROWS ? gemm->rows : first + MAX_ROWS,
        scratch);
}

static int packed_gemm(const char *variant) {
  PackedGemm gemm = read_packed_gemm();
  if (!packed_gemm_force(variant)) return 2;
  gemm.product = floats(gemm.rows * gemm.n);
  multiply(&gemm);
  write_floats(gemm.product, gemm.rows * gemm.n);
  return 0;
}

/* A GEMM with its epilogue, then without one and the rows of its product in a chain: linear and y of each. */
static int epilogue(const char *variant) {
  PackedGemm gemm = read_packed_gemm();
  int64_t *number = read_bytes(5 * sizeof *number), size = gemm.rows * gemm.n;
  Epilogue it = {.n = gemm.n, .tokens = number[0], .rows_per_gate = number[1], .heads_out = number[2]};
  it.activation = (Activation)number[3];
  it.token_scale = read_floats(gemm.rows), it.bias = read_floats(gemm.n);
  if (number[4]) it.gate = read_floats(gemm.rows / it.rows_per_gate * gemm.n), it.residual = read_floats(size);
  it.linear = floats(size), it.y = floats(size);
  if (!packed_gemm_force(variant)) return 2;
  PackedGemm fused = gemm;
  fused.epilogue = it;
  multiply(&fused);
  write_floats(it.linear, size), write_floats(it.y, size);
  gemm.product = floats(size);
  multiply(&gemm);
  TokenChain chain = {.x = gemm.product, .epilogue = it, .n = gemm.n, .tokens = it.tokens};
  chain.epilogue.linear = floats(size), chain.epilogue.y = floats(size);
  token_chain_rows(&chain, 0, gemm.rows, floats(gemm.n));
  write_floats(chain.epilogue.linear, size), write_floats(chain.epilogue.y, size);
  return 0;
}

static Attention read_attention(void) {
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
  if (!it.out) exit(5);
  return it;
}

static void write_attention(const Attention *it) {
  write_floats(it->out, it->samples * it->heads * it->queries * it->size);
}

static int attention(void) {
  Attention it = read_attention();
  void *scratch = aligned_alloc(64, (size_t)attention_scratch(&it));
  if (!scratch) return 5;
  for (int64_t part = 0; part < it.samples * it.heads; part++)
    for (int64_t first = 0; first < it.queries; first += QUERIES) {
      int64_t count = it.queries - first < QUERIES ? it.queries - first : QUERIES;
      attention_block(&it, part / it.heads, part % it.heads, first, count, scratch);
    }
  write_attention(&it);
  return 0;
}

static void *blocks_of(int64_t bytes) { return aligned_alloc(64, (size_t)((bytes + 63) / 64 * 64)); }

static int quantized_attention(const char *variant) {
  float *grids = read_bytes(7 * sizeof *grids);
  QuantizedAttention it = {read_attention(), {grids[0], grids[1], grids[2]}, {grids[3], grids[4], grids[5]}, grids[6]};
  if (!packed_gemm_force(variant)) return 2; /* before its scratch, whose size is the variant's own */
  void *head = blocks_of(quantized_attention_head(&it)), *work = blocks_of(quantized_attention_work(&it));
  void *scratch = blocks_of(quantized_attention_scratch(&it));
  if (!head || !work || !scratch) return 5;
  HeadOperands operands = quantized_attention_operands(&it, head);
  int64_t rows = quantized_attention_rows(&it), queries = it.tensors.queries;
  for (int64_t part = 0; part < it.tensors.samples * it.tensors.heads; part++) {
    quantized_attention_prepare(&it, part, &operands, work);
    for (int64_t first = 0; first < queries; first += rows)
      quantized_attention_block(&it, part, &operands, first, queries - first < rows ? queries - first : rows, scratch);
  }
  write_attention(&it.tensors);
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

static void write_codes(const uint8_t *codes, int64_t count) {
  float *values = floats(count);
  for (int64_t i = 0; i < count; i++) values[i] = codes[i];
  write_floats(values, count);
}

/* Norm, where its rows are given, and quantizer: what is quantized, scales, codes and, of two limbs, low codes. */
static int token_chain(void) {
  int64_t *number = read_bytes(5 * sizeof *number), rows = number[0], n = number[1];
  TokenChain chain = {.n = n, .tokens = rows, .zero = (int32_t)number[2], .limb_base = (int32_t)number[3]};
  chain.rows_per_norm = number[4]; /* 0: no norm */
  float *option = read_floats(5);
  chain.epsilon = option[0], chain.absmax_floor = option[1];
  chain.max_value = option[2], chain.kmax = option[3], chain.rounding_factor = option[4];
  chain.x = read_floats(rows * n);
  if (chain.rows_per_norm) {
    chain.norm_scale = read_floats(rows / chain.rows_per_norm * n);
    chain.norm_shift = read_floats(rows / chain.rows_per_norm * n);
  }
  chain.quantized = floats(rows * n), chain.scale = floats(rows), chain.codes = malloc((size_t)(rows * n));
  if (chain.limb_base) chain.low_codes = malloc((size_t)(rows * n));
  if (!chain.codes || (chain.limb_base && !chain.low_codes)) return 5;
  token_chain_rows(&chain, 0, rows, floats(n));
  write_floats(chain.quantized, rows * n), write_floats(chain.scale, rows), write_codes(chain.codes, rows * n);
  if (chain.low_codes) write_codes(chain.low_codes, rows * n);
  return 0;
}

/* packed_gemm VARIANT, epilogue VARIANT, quantized_attention VARIANT, half_gemm, token_chain or attention. */
int main(int count, char **argument) {
#if defined(_WIN32)
  _setmode(_fileno(stdin), _O_BINARY), _setmode(_fileno(stdout), _O_BINARY);
#endif
  if (count == 2 && !strcmp(argument[1], "half_gemm")) return half_gemm();
  if (count == 2 && !strcmp(argument[1], "token_chain")) return token_chain();
  if (count == 3 && !strcmp(argument[1], "packed_gemm")) return packed_gemm(argument[2]);
  if (count == 3 && !strcmp(argument[1], "epilogue")) return epilogue(argument[2]);
  if (count == 3 && !strcmp(argument[1], "quantized_attention")) return quantized_attention(argument[2]);
  return count == 2 && !strcmp(argument[1], "attention") ? attention() : 1;
}
