// Schedulers of whole pipelines, chosen by their scheduler_config.json, in the float32 arithmetic of
// pipeline/generate/schedulers: every operation of float32 numbers in double precision, rounded once.
// pipeline/web/page_schedulers.py refuses configurations that ask for more than is done here.

import { linspace } from "./sampler.js";

const f32 = Math.fround;
const root = (x) => f32(Math.sqrt(x)), log = (x) => f32(Math.log(x)), exp = (x) => f32(Math.exp(x));
// Of fewer steps the last ones of DPM-Solver++ are of lower order, where lower_order_final says so.
const FEW_STEPS = 15;
const KARRAS_RHO = 7;

/** To the nearest whole number, halves to the even one. */
function rint(x) {
  const below = Math.floor(x), rest = x - below;
  return rest === 0.5 ? below + (below % 2) : Math.round(x);
}

// --- noise schedules and timesteps -----------------------------------------------------------------------------------

/** `count` float32 numbers as torch.linspace gives them: the second half from the end. */
function torchLinspace(start, stop, count) {
  const first = f32(start), last = f32(stop), step = f32(f32(last - first) / f32(count - 1));
  const one = (i) => f32(i < Math.floor(count / 2) ? first + step * i : last - step * (count - 1 - i));
  return Array.from({ length: count }, (_, i) => one(i));
}

function betas({ beta_schedule: schedule, beta_start: start, beta_end: end, num_train_timesteps: count }) {
  if (schedule === "linear") return torchLinspace(start, end, count);
  if (schedule === "scaled_linear")
    return torchLinspace(Math.sqrt(start), Math.sqrt(end), count).map((beta) => f32(beta * beta));
  const left = (i) => Math.cos((((i / count + 0.008) / 1.008) * Math.PI) / 2) ** 2;
  const kept = Array.from({ length: count + 1 }, (_, i) => left(i));
  return Array.from({ length: count }, (_, i) => f32(Math.min(1 - kept[i + 1] / kept[i], 0.999)));
}

/** The share of data in the variance of the noisy picture, of every training step. */
function cumulated(config) {
  let product = 1;
  return betas(config).map((beta) => f32((product *= f32(1 - beta))));
}

/** Timesteps from high to low. spare: one more is spaced, and the lowest left out; they lie below `end`. */
function spaced(config, steps, spare, end) {
  const { num_train_timesteps: trained, timestep_spacing: spacing, steps_offset: offset } = config;
  if (steps > trained) throw new Error(`${steps} steps: this model has ${trained}; use at most that many`);
  const points = steps + spare;
  if (spacing === "trailing") {
    const stride = trained / steps, step = end - stride - end; // rounded as numpy.arange rounds it
    const times = Array.from({ length: Math.ceil(end / stride) }, (_, i) => rint(end + i * step) - 1);
    return times.filter((time) => time >= 0);
  }
  if (spacing === "linspace") return linspace(0, end - 1, points).map(rint).reverse().slice(0, steps);
  const stride = Math.floor(end / points);
  if (stride === 0) throw new Error(`${steps} steps: this model spaces at most ${end - spare}; use fewer`);
  return Array.from({ length: points }, (_, i) => i * stride + offset).reverse().slice(0, steps);
}

/** Sigmas from the largest to the smallest, even in sigma ** (1 / 7). */
function karras(least, most, steps) {
  const low = least ** (1 / KARRAS_RHO), high = most ** (1 / KARRAS_RHO);
  return linspace(0, 1, steps).map((share) => (high + share * (low - high)) ** KARRAS_RHO);
}

/** Timesteps of sigmas, between training steps by their logarithms. */
function timesOf(sigmas, logs) {
  return sigmas.map((sigma) => {
    const wanted = Math.log(Math.max(sigma, 1e-10));
    const after = logs.findIndex((value) => value > wanted);
    const low = Math.min(Math.max((after < 0 ? logs.length : after) - 1, 0), logs.length - 2);
    const share = Math.min(Math.max((logs[low] - wanted) / f32(logs[low] - logs[low + 1]), 0), 1);
    return (1 - share) * low + share * (low + 1);
  });
}

// --- predictions -----------------------------------------------------------------------------------------------------

/** The picture without noise, number by number: x = alpha data + sigma noise. */
function toData(kind, prediction, x, alpha, sigma) {
  const one = {
    epsilon: (value, p) => f32(f32(value - f32(sigma * p)) / alpha),
    v_prediction: (value, p) => f32(f32(alpha * value) - f32(sigma * p)),
    flow_prediction: (value, p) => f32(value - f32(sigma * p)),
    sample: (value, p) => p,
  }[kind];
  return x.map((value, i) => one(value, prediction[i]));
}

/** The noise in x. */
function toNoise(kind, prediction, x, alpha, sigma) {
  const one = {
    epsilon: (value, p) => p,
    v_prediction: (value, p) => f32(f32(alpha * p) + f32(sigma * value)),
    sample: (value, p) => f32(f32(value - f32(alpha * p)) / sigma),
  }[kind];
  return x.map((value, i) => one(value, prediction[i]));
}

// --- DPM-Solver++ ----------------------------------------------------------------------------------------------------

/** Timesteps, whole numbers, and one sigma more. */
function dpmSchedule(config, steps) {
  const kept = cumulated(config), trained = kept.map((a) => root(f32(f32(1 - a) / a)));
  const least = config.lambda_min_clipped ?? -Infinity;
  const clipped = kept.filter((a) => f32(log(root(a)) - log(root(f32(1 - a)))) < f32(least)).length;
  const count = config.num_train_timesteps;
  let times = spaced(config, steps, 1, count - clipped), sigmas;
  if (config.use_karras_sigmas) {
    sigmas = karras(trained[0], trained[count - 1], steps);
    times = timesOf(sigmas, trained.map(log));
    if (config.beta_schedule !== "squaredcos_cap_v2") times = times.map(rint);
  } else if (config.use_flow_sigmas) {
    const shift = config.flow_shift, even = linspace(1, 1 / count, steps + 1).map((value) => 1 - value);
    sigmas = even.map((sigma) => (shift * sigma) / (1 + (shift - 1) * sigma)).reverse().slice(0, -1);
    times = sigmas.map((sigma) => sigma * count);
  } else sigmas = times.map((time) => trained[Math.min(time, count - 1)]);
  const last = config.final_sigmas_type === "sigma_min" ? trained[0] : 0;
  return { times: times.map(Math.trunc), sigmas: [...sigmas, last].map(f32) };
}

/** DPM-Solver++ (Lu et al., 2022), multistep, of orders 1 to 3. Belongs to one drawing. */
class DpmSolver {
  constructor(config, steps) {
    const { times, sigmas } = dpmSchedule(config, steps);
    Object.assign(this, { config, sigmas, history: [], timesteps: Float32Array.from(times) });
    this.updates = times.map((_, i) => this.update(i, this.order(i)));
    const broken = this.updates.findIndex((update) => !Object.values(update).every(Number.isFinite));
    if (broken >= 0) throw new Error(`${steps} steps: step ${broken} has no finite coefficients; use fewer steps`);
  }

  /** x = alpha data + sigma noise; lam = log(alpha / sigma). */
  signal(i) {
    const level = this.sigmas[i], flow = this.config.use_flow_sigmas;
    const alpha = flow ? f32(1 - level) : f32(1 / root(f32(f32(level * level) + 1)));
    const sigma = flow ? level : f32(level * alpha);
    return { alpha, sigma, lam: f32(log(alpha) - log(sigma)) };
  }

  order(i) {
    const { solver_order: most, lower_order_final, euler_at_final, final_sigmas_type } = this.config;
    const count = this.timesteps.length, lower = lower_order_final && count < FEW_STEPS;
    if (i === count - 1 && (lower || euler_at_final || final_sigmas_type === "zero")) return 1;
    const order = Math.min(i + 1, most);
    return lower && i === count - 2 ? Math.min(order, 2) : order;
  }

  /** Coefficients of a step: x' = x x + data D0 + slope D1 + bend D2, as pipeline/generate/schedulers/dpmsolver.py. */
  update(i, order) {
    const after = this.signal(i + 1), now = this.signal(i);
    const h = f32(after.lam - now.lam), gone = f32(exp(-h) - 1), scaled = f32(after.alpha * gone);
    const update = { order, x: f32(after.sigma / now.sigma), data: -scaled, slope: 0 };
    if (order === 1) return update;
    const first = this.signal(i - 1), r0 = f32(f32(now.lam - first.lam) / h);
    const heun = f32(after.alpha * f32(f32(gone / h) + 1));
    update.nearer = f32(1 / r0);
    update.slope = order === 3 || this.config.solver_type === "heun" ? heun : -f32(0.5 * scaled);
    if (order === 2) return update;
    const r1 = f32(f32(first.lam - this.signal(i - 2).lam) / h), both = f32(r0 + r1);
    const bend = -f32(after.alpha * f32(f32(f32(gone + h) / f32(h * h)) - 0.5));
    return { ...update, bend, farther: f32(1 / r1), mix: f32(r0 / both), over: f32(1 / both) };
  }

  advance(x, prediction, i) {
    const update = this.updates[i], { alpha, sigma } = this.signal(i), kind = this.config.prediction_type;
    const data = toData(kind, prediction, x, alpha, kind === "flow_prediction" ? this.sigmas[i] : sigma);
    this.data = data;
    this.history = [data, ...this.history].slice(0, this.config.solver_order);
    const [newest, before, oldest] = this.history;
    return x.map((value, j) => {
      let stepped = f32(f32(update.x * value) + f32(update.data * newest[j]));
      if (update.order === 1) return stepped;
      const nearer = f32(update.nearer * f32(newest[j] - before[j]));
      if (update.order === 2) return f32(stepped + f32(update.slope * nearer));
      const farther = f32(update.farther * f32(before[j] - oldest[j])), rise = f32(nearer - farther);
      stepped = f32(stepped + f32(update.slope * f32(nearer + f32(update.mix * rise))));
      return f32(stepped + f32(update.bend * f32(update.over * rise)));
    });
  }
}

// --- DDIM and flow matching ------------------------------------------------------------------------------------------

/** DDIM (Song et al., 2020) without new noise. */
class Ddim {
  constructor(config, steps) {
    const times = spaced(config, steps, 0, config.num_train_timesteps);
    if (times[0] >= config.num_train_timesteps) throw new Error(`${steps} steps begin beyond training; use fewer`);
    Object.assign(this, { config, times, kept: cumulated(config), timesteps: Float32Array.from(times) });
    this.stride = Math.floor(config.num_train_timesteps / steps);
  }

  advance(x, prediction, i) {
    const { config, kept, times } = this, now = kept[times[i]], then = times[i] - this.stride;
    const left = then >= 0 ? kept[then] : config.set_alpha_to_one ? 1 : kept[0];
    const alpha = root(now), sigma = root(f32(1 - now)), kind = config.prediction_type;
    const limit = config.clip_sample ? config.clip_sample_range : Infinity;
    const data = toData(kind, prediction, x, alpha, sigma).map((value) => Math.min(Math.max(value, -limit), limit));
    const noise = toNoise(kind, prediction, x, alpha, sigma);
    const signal = root(left), rest = root(f32(1 - left));
    this.data = data;
    return data.map((value, j) => f32(f32(signal * value) + f32(rest * noise[j])));
  }
}

/** Euler's method for flow matching: x = (1 - sigma) data + sigma noise, and the model predicts noise - data. */
class FlowEuler {
  constructor({ num_train_timesteps: count, shift }, steps) {
    const shifted = (sigma) => (shift * sigma) / (1 + (shift - 1) * sigma);
    const end = (sigma) => f32(f32(f32(shift) * sigma) / f32(1 + f32(f32(shift - 1) * sigma)));
    const [most, least] = [end(1), end(f32(1 / count))];
    const sigmas = linspace(most * count, least * count, steps).map((time) => f32(shifted(time / count)));
    this.sigmas = [...sigmas, 0];
    this.timesteps = Float32Array.from(sigmas, (sigma) => f32(sigma * count));
  }

  advance(x, velocity, i) {
    const step = f32(this.sigmas[i + 1] - this.sigmas[i]);
    this.data = x.map((value, j) => f32(value - f32(this.sigmas[i] * velocity[j])));
    return x.map((value, j) => f32(value + f32(step * velocity[j])));
  }
}

const CLASSES = {
  DPMSolverMultistepScheduler: DpmSolver, DDIMScheduler: Ddim, FlowMatchEulerDiscreteScheduler: FlowEuler,
};

/**
 * The scheduler of a configuration, of so many steps, for one drawing: {timesteps, advance(x, prediction, i), data};
 * data: what the model took the picture to become at the last step.
 */
export function makeScheduler(config, steps) {
  if (!Number.isInteger(steps) || steps < 1) throw new Error(`${steps} steps; give a whole number from 1`);
  return new CLASSES[config.class_name](config, steps);
}
