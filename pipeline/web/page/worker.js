// The engine, beside the page so that it stays alive: opens the model once, draws what the page asks for.
// In: {id, prompt, seed, steps, guidance} or {stop: id}. Out: {ready}, {id, step, steps, pixels}, {id, done}, {id, error}.

import * as ort from "./ort/ort.wasm.min.mjs";
import { standardNormal } from "./noise.js";
import { tokenIds } from "./prompts.js";
import { makeSampler, sample, toPixels } from "./sampler.js";

// One thread needs no memory that is shared between threads, which only pages with certain headers may have.
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;

const stopped = new Set();
let engine = null;

async function fetched(name, as) {
  const answer = await fetch(new URL(`./model/${name}`, import.meta.url));
  if (!answer.ok) throw new Error(`${name} cannot be fetched (HTTP ${answer.status})`);
  return answer[as]();
}

async function open() {
  const [settings, model, data, embedding] = await Promise.all([
    fetched("settings.json", "json"), fetched("model.onnx", "arrayBuffer"), fetched("model.onnx.data", "arrayBuffer"),
    fetched("embedding.bin", "arrayBuffer"),
  ]);
  const session = await ort.InferenceSession.create(new Uint8Array(model), {
    executionProviders: ["wasm"],
    externalData: [{ path: "model.onnx.data", data: new Uint8Array(data) }],
    // Pairs of QuantizeLinear and DequantizeLinear split an integer into limbs here, and are not to be fused.
    extra: { session: { disable_quant_qdq: "1" } },
  });
  return { settings, session, embedding: new Float32Array(embedding) };
}

/** Token embeddings of a batch: of the prompt, and under guidance of the empty one. */
function conditioning({ settings, embedding }, prompt, isGuided) {
  const { slots, grammar, null_token: nothing, width } = settings;
  const rows = [tokenIds(prompt, slots, grammar), ...(isGuided ? [slots.map(() => nothing)] : [])];
  const states = new Float32Array(rows.length * slots.length * width);
  rows.flat().forEach((id, i) => states.set(embedding.subarray(id * width, (id + 1) * width), i * width));
  return {
    encoder_hidden_states: new ort.Tensor("float32", states, [rows.length, slots.length, width]),
    encoder_attention_mask: new ort.Tensor(
      "float32", new Float32Array(rows.length * slots.length).fill(1), [rows.length, slots.length]),
  };
}

async function draw({ id, prompt, seed, steps, guidance }) {
  const { settings, session } = engine;
  const { channels, height, width: columns } = settings.picture;
  const sampler = makeSampler(settings.sampler, steps, settings.timestep_scale);
  const isGuided = guidance !== 1, batch = isGuided ? 2 : 1;
  const constant = conditioning({ ...engine, settings: settings.conditioning }, prompt, isGuided);
  const noise = standardNormal(seed, channels * height * columns, settings.ziggurat);
  const call = async (latents, timestep) => {
    const states = new Float32Array(batch * latents.length);
    for (let i = 0; i < batch; i++) states.set(latents, i * latents.length);
    const { sample: output } = await session.run({
      ...constant,
      hidden_states: new ort.Tensor("float32", states, [batch, channels, height, columns]),
      timestep: new ort.Tensor("float32", new Float32Array(batch).fill(timestep), [batch]),
    });
    return predicted(output, batch, channels);
  };
  const onStep = async (step, estimate) => {
    postMessage({ id, step, steps, pixels: toPixels(estimate, channels) });
    await new Promise((resolve) => setTimeout(resolve)); // lets a message to stop in
    return !stopped.has(id);
  };
  const picture = await sample(call, noise, sampler, guidance, onStep);
  postMessage({ id, done: true, stopped: picture === null, pixels: picture && toPixels(picture, channels) });
}

/** The first channels of each sample: a model may predict more, a learned sigma. */
function predicted(output, batch, channels) {
  const [, all, height, width] = output.dims, size = height * width;
  if (all === channels) return output.data;
  const taken = new Float32Array(batch * channels * size);
  for (let i = 0; i < batch; i++)
    taken.set(output.data.subarray(i * all * size, (i * all + channels) * size), i * channels * size);
  return taken;
}

onmessage = async ({ data }) => {
  if (data.stop !== undefined) return void stopped.add(data.stop);
  try {
    await draw(data);
  } catch (error) {
    postMessage({ id: data.id, error: error.message });
  }
};

open().then(
  (opened) => {
    engine = opened;
    postMessage({ ready: true, settings: opened.settings });
  },
  (error) => postMessage({ error: error.message }),
);
