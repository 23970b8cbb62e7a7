// onnxruntime-web: models that are fetched, with a word about how far that is, and run on one thread.

import * as ort from "./ort/ort.wasm.min.mjs";

// One thread needs no memory that is shared between threads, which only pages with certain headers may have.
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;

const MODEL = "model.onnx", DATA = "model.onnx.data";

async function answered(name) {
  const answer = await fetch(new URL(`./model/${name}`, import.meta.url));
  if (!answer.ok) throw new Error(`${name} cannot be fetched (HTTP ${answer.status})`);
  return answer;
}

/** A file of the export, as "json", "text" or "arrayBuffer". */
export const fetched = async (name, as) => (await answered(name))[as]();

/** The bytes of one; onBytes is told of every part that arrives, by its length. */
async function fetchedBytes(name, onBytes) {
  const reader = (await answered(name)).body.getReader(), parts = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    onBytes(value.length);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

/** A model in a folder of the export ("" for its top), opened; call its run and, at the end, release. */
export async function opened(folder, onBytes = () => {}) {
  const [model, data] = await Promise.all([MODEL, DATA].map((name) => fetchedBytes(folder + name, onBytes)));
  return ort.InferenceSession.create(model, {
    executionProviders: ["wasm"],
    externalData: [{ path: DATA, data }],
    // Pairs of QuantizeLinear and DequantizeLinear split an integer into limbs here, and are not to be fused.
    extra: { session: { disable_quant_qdq: "1" } },
  });
}

const ARRAYS = { float32: Float32Array, int64: BigInt64Array };

/** Numbers as a model takes them. */
export function tensor(dtype, values, dims) {
  const array = ARRAYS[dtype];
  const own = values instanceof array ? values : array.from(values, dtype === "int64" ? BigInt : Number);
  return new ort.Tensor(dtype, own, dims);
}

/** The first channels of each sample [B, C, H, W]: a model may predict more, a learned sigma. */
export function firstChannels(output, channels) {
  const [batch, all, height, width] = output.dims, size = height * width;
  if (all === channels) return output.data;
  const taken = new Float32Array(batch * channels * size);
  for (let i = 0; i < batch; i++)
    taken.set(output.data.subarray(i * all * size, (i * all + channels) * size), i * channels * size);
  return taken;
}

/** The same numbers, so many times. */
export function repeated(values, count) {
  const all = new values.constructor(count * values.length);
  for (let i = 0; i < count; i++) all.set(values, i * values.length);
  return all;
}
