/* The inner loop of the search for weight scales: squared rounding errors of magnitudes at given scales.
 *
 * Compile with -ffp-contract=off. NumPy does the same operations in the same order (pipeline/calibrate/scales.py), so
 * that a scale does not depend on whether there is a compiler.
 */
#include <stdint.h>

#include "variants.h"

#define BLOCK 16 /* scales that are tried at once: one or more whole vectors */

typedef struct Grid {
  float slope, least, max_value; /* 2^(23 - M), 2^(23 - f) and the largest value of the format */
} Grid;

/* (round(u) - u)^2 of u = x * inverse; rounding is the addition of `magic`, whose last place is the grid's step at u. */
static inline float squared_error(float x, float inverse, Grid grid) {
  float u = x * inverse, magic = u * grid.slope;
  magic = magic > grid.least ? magic : grid.least;
  float rounded = (u + magic) - magic;
  float error = (rounded < grid.max_value ? rounded : grid.max_value) - u;
  return error * error;
}

/* Squared errors of x [n] at BLOCK scales: LANES partial sums each, then added in pairs. */
static inline void group_errors(const float *x, int64_t n, const float *inverse, Grid grid, float *sums) {
  float part[LANES][BLOCK] = {{0}};
  for (int64_t k = 0; k < n; k++) {
    float *sum = part[k % LANES];
    ELEMENTWISE for (int j = 0; j < BLOCK; j++) sum[j] += squared_error(x[k], inverse[j], grid);
  }
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++)
      ELEMENTWISE for (int j = 0; j < BLOCK; j++) part[i][j] += part[i + width][j];
  for (int j = 0; j < BLOCK; j++) sums[j] = part[0][j];
}

/* x [rows, groups, n], scales [rows, tried] -> errors [rows, tried, groups]. */
VARIANTS void rounding_errors(
    const float *x, const float *scales, int64_t rows, int64_t groups, int64_t n, int64_t tried, Grid grid,
    float *errors) {
  for (int64_t row = 0; row < rows; row++)
    for (int64_t first = 0; first < tried; first += BLOCK) {
      const float *scale = scales + row * tried + first;
      int count = tried - first < BLOCK ? (int)(tried - first) : BLOCK;
      float inverse[BLOCK] = {0}, sums[BLOCK];
      for (int j = 0; j < count; j++) inverse[j] = 1.0f / scale[j];
      for (int64_t group = 0; group < groups; group++) {
        group_errors(x + (row * groups + group) * n, n, inverse, grid, sums);
        for (int j = 0; j < count; j++)
          errors[(row * tried + first + j) * groups + group] = sums[j] * (scale[j] * scale[j]);
      }
    }
}

/* A function of its own, since Clang exports none that has copies for several processors. */
EXPORT void fpq_rounding_errors(
    const float *x, const float *scales, int64_t rows, int64_t groups, int64_t n, int64_t tried, float slope, float least,
    float max_value, float *errors) {
  Grid grid = {slope, least, max_value};
  rounding_errors(x, scales, rows, groups, n, tried, grid, errors);
}
