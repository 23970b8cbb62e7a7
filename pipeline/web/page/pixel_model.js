// A model that denoises pixels, of prompts by a vocabulary; as pipeline/generate/pixel_model.py.

import { fetched, firstChannels, opened, repeated, tensor } from "./engine.js";
import { standardNormal } from "./noise.js";
import { tokenIds } from "./prompts.js";
import { makeSampler, sample, toPixels } from "./sampler.js";

export class PixelModel {
  /** Everything is loaded. onLoad(bytes) is told of every part of a file that arrives. */
  static async open(settings, onLoad) {
    const [session, embedding] = await Promise.all([opened("", onLoad), fetched("embedding.bin", "arrayBuffer")]);
    return Object.assign(new PixelModel(), { settings, session, embedding: new Float32Array(embedding) });
  }

  /** Token embeddings of a batch: of the prompt, and under guidance of the empty one. */
  condition(prompt, isGuided) {
    const { slots, grammar, null_token: nothing, width } = this.settings.conditioning;
    const rows = [tokenIds(prompt, slots, grammar), ...(isGuided ? [slots.map(() => nothing)] : [])];
    const states = new Float32Array(rows.length * slots.length * width);
    rows.flat().forEach((id, i) => states.set(this.embedding.subarray(id * width, (id + 1) * width), i * width));
    return {
      encoder_hidden_states: tensor("float32", states, [rows.length, slots.length, width]),
      encoder_attention_mask: tensor(
        "float32", new Float32Array(rows.length * slots.length).fill(1), [rows.length, slots.length]),
    };
  }

  /** RGBA bytes; null once onProgress, which is told {step, steps, pixels}, returns false. */
  async draw({ prompt, seed, steps, guidance }, onProgress) {
    const { channels, height, width } = this.settings.picture;
    const sampler = makeSampler(this.settings.sampler, steps, this.settings.timestep_scale);
    const isGuided = guidance !== 1, batch = isGuided ? 2 : 1;
    const constant = this.condition(prompt, isGuided);
    const noise = standardNormal(seed, channels * height * width, this.settings.ziggurat);
    const call = async (latents, timestep) => {
      const { sample: output } = await this.session.run({
        ...constant,
        hidden_states: tensor("float32", repeated(latents, batch), [batch, channels, height, width]),
        timestep: tensor("float32", new Float32Array(batch).fill(timestep), [batch]),
      });
      return firstChannels(output, channels);
    };
    const onStep = (step, estimate) => onProgress({ step, steps, pixels: toPixels(estimate, channels) });
    const picture = await sample(call, noise, sampler, guidance, onStep);
    return picture && toPixels(picture, channels);
  }
}
