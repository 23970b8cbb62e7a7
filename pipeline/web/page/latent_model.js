// A whole pipeline: a text encoder, a denoiser of latents and a decoder, with its tokenizer and its scheduler; as
// pipeline/generate/latent_model.py. Parts are fetched when they are needed, and let go in turn unless they are small.

import { fetched, firstChannels, opened, repeated, tensor } from "./engine.js";
import { standardNormal } from "./noise.js";
import { LatentPreview } from "./preview.js";
import { sample, toPixels } from "./sampler.js";
import { makeScheduler } from "./schedulers.js";
import { Tokenizer, plainCaption } from "./tokenizer.js";

const f32 = Math.fround, MB = 1e6;
const CHANNELS = 3;

export class LatentModel {
  /** Nothing is loaded yet but the tokenizer. */
  static async open(settings) {
    const document = await fetched("tokenizer.json", "json");
    const tokenizer = new Tokenizer(document, settings.prompt.tokens);
    const preview = new LatentPreview(settings.latent, settings.picture.height / settings.latent.height);
    return Object.assign(new LatentModel(), { settings, tokenizer, preview, sessions: new Map() });
  }

  /** The outputs of a part. onText is told of its loading, in words. */
  async run(name, inputs, onText) {
    if (!this.sessions.has(name)) {
      if (!this.settings.keep_loaded) await this.release();
      const all = this.settings.parts[name];
      let loaded = 0;
      const onBytes = (count) => {
        loaded += count;
        onText(`${name}: ${(loaded / MB).toFixed(1)} of ${(all / MB).toFixed(1)} MB loaded`);
      };
      this.sessions.set(name, await opened(`${name}/`, onBytes));
    }
    const session = this.sessions.get(name), known = new Set(session.inputNames);
    return session.run(Object.fromEntries(Object.entries(inputs).filter(([key]) => known.has(key))));
  }

  /** Let all parts go. */
  async release() {
    for (const session of this.sessions.values()) await session.release();
    this.sessions.clear();
  }

  /** Inputs of the denoiser that are the same in every call, for texts; leftOut: tokens of each that did not fit. */
  async encode(texts, onText) {
    const { prompt, inputs, conditions } = this.settings;
    const tokens = texts.map((text) => this.tokenizer.tokens(prompt.plain ? plainCaption(text) : text));
    const dims = [texts.length, prompt.tokens], masks = tokens.flatMap(({ mask }) => mask);
    const { last_hidden_state: states } = await this.run(prompt.component, {
      input_ids: tensor("int64", tokens.flatMap(({ ids }) => ids), dims),
      attention_mask: tensor("int64", masks, dims),
    }, onText);
    const condition = {
      [prompt.states]: states,
      [prompt.mask]: tensor(inputs[prompt.mask], masks, dims),
    };
    for (const [name, { dims: [, ...rest], values, shared }] of Object.entries(conditions)) {
      const count = shared ? 1 : texts.length;
      const all = Array.from({ length: count }, () => values).flat();
      condition[name] = tensor(inputs[name], all, shared ? conditions[name].dims : [count, ...rest]);
    }
    return { condition, leftOut: tokens.map((row) => row.leftOut) };
  }

  /** Noise, denoised to its end; null once onStep(steps done, estimate) returns false. scale: of guidance, 1: none. */
  async denoise(condition, seed, scheduler, scale, onStep, onText) {
    const { channels, height, width } = this.settings.latent, batch = scale === 1 ? 1 : 2;
    const noise = standardNormal(seed, channels * height * width, this.settings.ziggurat);
    const call = async (latents, timestep) => {
      const { sample: output } = await this.run("transformer", {
        ...condition,
        hidden_states: tensor("float32", repeated(latents, batch), [batch, channels, height, width]),
        timestep: tensor("float32", new Float32Array(batch).fill(timestep), [batch]),
      }, onText);
      return firstChannels(output, channels);
    };
    return sample(call, noise, scheduler, scale, onStep);
  }

  /** The picture of latents, [3, H, W] about from -1 to 1. */
  async decode(latents, onText) {
    const { channels, height, width, factor, shift } = this.settings.latent;
    const scaled = latents.map((value) => f32(f32(value / f32(factor)) + f32(shift)));
    const inputs = { latents: tensor("float32", scaled, [1, channels, height, width]) };
    const picture = (await this.run("vae_decoder", inputs, onText)).sample.data;
    this.preview.learn(latents, picture);
    return picture;
  }

  /**
   * The same as pixels, roughly and at once; the first of all is decoded, for the others to be learned from, or, where
   * that would take the denoiser's place in memory, not shown.
   */
  async look(latents, onText) {
    if (this.preview.isReady) return toPixels(this.preview.picture(latents), CHANNELS);
    return this.settings.keep_loaded ? toPixels(await this.decode(latents, onText), CHANNELS) : undefined;
  }

  /** RGBA bytes; null once onProgress, which is told {step, steps, pixels}, {text} or {note}, returns false. */
  async draw(asked, onProgress) {
    try {
      return await this.picture(asked, onProgress);
    } finally {
      if (!this.settings.keep_loaded) await this.release();
    }
  }

  async picture({ prompt, negative, seed, steps, guidance }, onProgress) {
    const isGuided = guidance > 1, onText = (text) => onProgress({ text });
    if (negative && !isGuided)
      throw new Error(`a negative prompt has no effect at a guidance of ${guidance}; use one above 1`);
    const scheduler = makeScheduler(this.settings.scheduler, steps), count = scheduler.timesteps.length;
    const goesOn = async (text) => (await onText(text)) !== false;
    if (!(await goesOn("the prompt is encoded"))) return null;
    const { condition, leftOut } = await this.encode(isGuided ? [prompt, negative] : [prompt], onText);
    leftOut.forEach((tokens, i) => {
      if (tokens) onProgress({ note: `${tokens} tokens of the ${i ? "negative prompt" : "prompt"} do not fit` });
    });
    if (!(await goesOn("the first step is made"))) return null;
    const onStep = async (step, estimate) =>
      onProgress({ step, steps: count, pixels: await this.look(estimate, onText) });
    const latents = await this.denoise(condition, seed, scheduler, isGuided ? guidance : 1, onStep, onText);
    if (latents === null || !(await goesOn("the picture is decoded"))) return null;
    return toPixels(await this.decode(latents, onText), CHANNELS);
  }
}
