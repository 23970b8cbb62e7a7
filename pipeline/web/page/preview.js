// What latents look like, roughly and at once, as pipeline/generate/latent_preview.py: one colour for each cell, by a
// linear map of its channels that is learned, by least squares, from every picture that the decoder makes.

// Of the mean square of latents: keeps the map finite where a channel never changes.
const RIDGE = 1e-4;
const COLOURS = 3;

export class LatentPreview {
  /** latent: {channels, height, width}; cell: pixels of a latent's side. */
  constructor({ channels, height, width }, cell) {
    Object.assign(this, { channels, height, width, cell, isReady: false });
    this.squares = Array.from({ length: channels + 1 }, () => new Float64Array(channels + 1));
    this.products = Array.from({ length: channels + 1 }, () => new Float64Array(COLOURS));
  }

  /** The channels of a cell, and a one. */
  features(latents, place) {
    const size = this.height * this.width;
    return [...Array.from({ length: this.channels }, (_, c) => latents[c * size + place]), 1];
  }

  /** The mean colour of the pixels of a cell, each from -1 to 1. */
  colour(picture, place) {
    const { cell, width, height } = this, columns = width * cell, size = columns * height * cell;
    const start = Math.floor(place / width) * cell * columns + (place % width) * cell;
    return Array.from({ length: COLOURS }, (_, c) => {
      let sum = 0;
      for (let y = 0; y < cell; y++)
        for (let x = 0; x < cell; x++) sum += Math.min(Math.max(picture[c * size + start + y * columns + x], -1), 1);
      return sum / (cell * cell);
    });
  }

  /** See the picture [3, H, W] that was decoded of latents [C, h, w]; such as are not finite teach nothing. */
  learn(latents, picture) {
    if (!latents.every(Number.isFinite) || !picture.every(Number.isFinite)) return;
    for (let place = 0; place < this.height * this.width; place++) {
      const row = this.features(latents, place), colour = this.colour(picture, place);
      row.forEach((value, i) => {
        row.forEach((other, j) => (this.squares[i][j] += value * other));
        colour.forEach((part, k) => (this.products[i][k] += value * part));
      });
    }
    this.isReady = true;
  }

  /** A picture [3, H, W] of latents [C, h, w]. */
  picture(latents) {
    const { cell, width, height } = this, columns = width * cell, size = columns * height * cell;
    const weights = this.weights(), picture = new Float32Array(COLOURS * size);
    for (let place = 0; place < height * width; place++) {
      const row = this.features(latents, place);
      const start = Math.floor(place / width) * cell * columns + (place % width) * cell;
      for (let c = 0; c < COLOURS; c++) {
        const colour = row.reduce((sum, value, i) => sum + value * weights[i][c], 0);
        const shown = Math.min(Math.max(colour, -1), 1);
        for (let y = 0; y < cell; y++) {
          const left = c * size + start + y * columns;
          picture.fill(shown, left, left + cell);
        }
      }
    }
    return picture;
  }

  /** The map, [C + 1][3]: the normal equations, damped, by elimination; they are symmetric and positive definite. */
  weights() {
    const count = this.squares.length;
    const damping = (RIDGE * this.squares.reduce((sum, row, i) => sum + row[i], 0)) / count;
    const rows = this.squares.map((row, i) => [...row, ...this.products[i]]);
    rows.forEach((row, i) => (row[i] += damping));
    for (let i = 0; i < count; i++)
      for (let j = 0; j < count; j++) {
        if (j === i) continue;
        const factor = rows[j][i] / rows[i][i];
        rows[j].forEach((_, k) => (rows[j][k] -= factor * rows[i][k]));
      }
    return rows.map((row, i) => row.slice(count).map((value) => value / row[i]));
  }
}
