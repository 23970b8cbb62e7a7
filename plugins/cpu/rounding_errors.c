/* The inner loop of the search for weight scales: squared rounding errors of magnitudes at given scales.
 *
 * Compile with -ffp-contract=off. NumPy does the same operations in the same order (pipeline/calibrate/scales.py), so
 * that a scale does not depend on whether there is a compiler.
 */
#include <stdint.h>

#include "variants.h"

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

static inline float group_error(const float *x, int64_t n, float inverse, Grid grid) {
  float part[LANES] = {0};
  int64_t whole = n - n % LANES;
  for (int64_t k = 0; k < whole; k += LANES)
    ELEMENTWISE for (int j = 0; j < LANES; j++) part[j] += squared_error(x[k + j], inverse, grid);
  for (int64_t k = whole; k < n; k++) part[k - whole] += squared_error(x[k], inverse, grid);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int j = 0; j < width; j++) part[j] += part[j + width];
  return part[0];
}

/* x [rows, groups, n], scales [rows] -> errors [rows, groups]. */
VARIANTS EXPORT void fpq_rounding_errors(const float *x, const float *scales, int64_t rows, int64_t groups, int64_t n,
                                         float slope, float least, float max_value, float *errors) {
  Grid grid = {slope, least, max_value};
  for (int64_t row = 0; row < rows; row++)
    for (int64_t group = 0; group < groups; group++) {
      int64_t place = row * groups + group;
      float sum = group_error(x + place * n, n, 1.0f / scales[row], grid);
      errors[place] = sum * (scales[row] * scales[row]);
    }
}
