// From noise to a picture by repeated calls of the denoiser, in the float32 arithmetic of pipeline/generate/sampling.py:
// a sum or product of two float32 numbers in double precision, rounded once, is that of float32.

const f32 = Math.fround;
const TRAIN_STEPS = 1000, BETA_FIRST = 1e-4, BETA_LAST = 2e-2;

/** `count` numbers from `first` to `last`, as numpy.linspace. */
export function linspace(first, last, count) {
  if (count === 1) return [first];
  const step = (last - first) / (count - 1);
  return Array.from({ length: count }, (_, i) => (i === count - 1 ? last : i * step + first));
}

/** x + factor * y, number by number. */
const plus = (x, factor, y) => x.map((value, i) => f32(value + f32(factor * y[i])));

function flowEuler(steps, scale) {
  const times = linspace(1, 0, steps + 1);
  return {
    timesteps: Float32Array.from(times.slice(0, -1), (time) => time * scale),
    advance: (x, velocity, i) => plus(x, f32(times[i + 1] - times[i]), velocity),
    estimate: (x, velocity, i) => plus(x, -f32(times[i]), velocity),
  };
}

/** The same steps of a model that counts time from noise to data, and predicts data - noise. */
function flowEulerRising(steps, scale) {
  const falling = flowEuler(steps, 1), negative = (velocity) => velocity.map((value) => -value);
  return {
    timesteps: Float32Array.from(linspace(0, 1, steps + 1).slice(0, -1), (time) => time * scale),
    advance: (x, velocity, i) => falling.advance(x, negative(velocity), i),
    estimate: (x, velocity, i) => falling.estimate(x, negative(velocity), i),
  };
}

function ddim(steps, scale) {
  if (steps > TRAIN_STEPS) throw new Error(`${steps} steps: this model has ${TRAIN_STEPS}; use at most that many`);
  let product = 1;
  const kept = linspace(BETA_FIRST, BETA_LAST, TRAIN_STEPS).map((beta) => (product *= 1 - beta));
  const stride = Math.floor(TRAIN_STEPS / steps);
  const times = Array.from({ length: steps }, (_, i) => (steps - 1 - i) * stride);
  const estimate = (x, noise, i) => {
    const signal = f32(Math.sqrt(kept[times[i]])), rest = f32(Math.sqrt(1 - kept[times[i]]));
    return x.map((value, j) => f32(f32(value - f32(rest * noise[j])) / signal));
  };
  const advance = (x, noise, i) => {
    const then = times[i] >= stride ? kept[times[i] - stride] : 1;
    const signal = f32(Math.sqrt(then)), rest = f32(Math.sqrt(1 - then));
    return estimate(x, noise, i).map((value, j) => f32(f32(signal * value) + f32(rest * noise[j])));
  };
  return { timesteps: Float32Array.from(times, (time) => time * (scale / TRAIN_STEPS)), advance, estimate };
}

/** The sampler of a name, of so many steps: {timesteps, advance(x, prediction, i), estimate(x, prediction, i)}. */
export const makeSampler = (name, steps, scale) =>
  ({ flow_euler: flowEuler, flow_euler_rising: flowEulerRising, ddim })[name](steps, scale);

/** Both halves of a prediction, with the prompt and without it, as one: without + scale * (with - without). */
export function guided(prediction, scale) {
  const half = prediction.length / 2, factor = f32(scale);
  return prediction.subarray(0, half).map((prompted, i) => {
    const plain = prediction[half + i];
    return f32(plain + f32(factor * f32(prompted - plain)));
  });
}

/**
 * Denoise `noise` to its end. call(latents, timestep): the prediction of a batch, of two halves under guidance.
 * onStep(steps done, what the picture is about to become) may return false to stop; then null is returned. Schedulers
 * of schedulers.js remember it, as `data`.
 */
export async function sample(call, noise, sampler, scale, onStep) {
  let latents = noise;
  for (let i = 0; i < sampler.timesteps.length; i++) {
    const both = await call(latents, sampler.timesteps[i]);
    const prediction = scale === 1 ? both : guided(both, scale);
    const estimate = sampler.estimate?.(latents, prediction, i);
    latents = sampler.advance(latents, prediction, i);
    if ((await onStep(i + 1, estimate ?? sampler.data)) === false) return null;
  }
  return latents;
}

/** [3 or 1, H, W] from -1 to 1 -> RGBA bytes of H x W, halves to even. Throws an Error for NaN. */
export function toPixels(picture, channels) {
  const size = picture.length / channels, pixels = new Uint8ClampedArray(4 * size).fill(255);
  for (let i = 0; i < size; i++)
    for (let c = 0; c < 3; c++) {
      const value = picture[(channels === 1 ? 0 : c) * size + i];
      if (!Number.isFinite(value)) throw new Error("the model's picture has NaN or Inf");
      pixels[4 * i + c] = f32(f32(Math.min(Math.max(value, -1), 1) + 1) * 127.5); // rounds halves to even
    }
  return pixels;
}
