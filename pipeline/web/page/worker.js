// The engine, beside the page so that it stays alive: opens the model once, draws what the page asks for.
// In: {id, prompt, negative, seed, steps, guidance} or {stop: id}. Out: {ready}, {text} while it is opened,
// {id, step, steps, pixels}, {id, text}, {id, note}, {id, done}, {id, error}.

import { fetched } from "./engine.js";
import { LatentModel } from "./latent_model.js";
import { PixelModel } from "./pixel_model.js";

const MODELS = { pixels: PixelModel, pipeline: LatentModel };
const stopped = new Set();
let model = null;

async function open() {
  const settings = await fetched("settings.json", "json");
  let loaded = 0;
  const onLoad = (bytes) => {
    loaded += bytes;
    postMessage({ text: `the model is opened, ${(loaded / 1e6).toFixed(1)} MB loaded` });
  };
  model = await MODELS[settings.kind].open(settings, onLoad);
  return settings;
}

async function draw(asked) {
  const { id } = asked;
  const onProgress = async (news) => {
    postMessage({ id, ...news });
    await new Promise((resolve) => setTimeout(resolve)); // lets a message to stop in
    return !stopped.has(id);
  };
  const pixels = await model.draw(asked, onProgress);
  postMessage({ id, done: true, stopped: pixels === null, pixels });
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
  (settings) => postMessage({ ready: true, settings }),
  (error) => postMessage({ error: error.message }),
);
