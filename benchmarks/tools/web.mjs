// onnxruntime-web on one model: in Node by itself (`node web.mjs FOLDER`), in a browser imported by the page.

const ARRAYS = { float32: Float32Array, int64: BigInt64Array };

// Outputs by name as [dims, data]. feeds: by name {type, dims, data}.
async function outputs(ort, provider, model, weights, feeds) {
  ort.env.wasm.numThreads = 1;
  const session = await ort.InferenceSession.create(model, {
    executionProviders: [provider],
    externalData: [{ path: "model.onnx.data", data: weights }],
  });
  const tensors = {};
  for (const [name, { type, dims, data }] of Object.entries(feeds)) {
    const numbers = type === "int64" ? data.map(BigInt) : data;
    tensors[name] = new ort.Tensor(type, ARRAYS[type].from(numbers), dims);
  }
  const results = Object.entries(await session.run(tensors));
  return Object.fromEntries(results.map(([name, tensor]) => [name, [tensor.dims, Array.from(tensor.data)]]));
}

// In a page whose server has the model: with one file of the package's folder.
export async function fetched(folder, file, provider) {
  const ort = await import(folder + file);
  ort.env.wasm.wasmPaths = folder;
  const bytes = async (name) => new Uint8Array(await (await fetch(name)).arrayBuffer());
  const feeds = await (await fetch("feeds.json")).json();
  return outputs(ort, provider, await bytes("model.onnx"), await bytes("model.onnx.data"), feeds);
}

if (globalThis.process?.versions?.node) {
  const { readFileSync, writeFileSync } = await import("node:fs");
  const ort = await import("onnxruntime-web");
  const folder = process.argv[2];
  const bytes = (name) => new Uint8Array(readFileSync(`${folder}/${name}`));
  const feeds = JSON.parse(readFileSync(`${folder}/feeds.json`, "utf-8"));
  const made = await outputs(ort, "wasm", bytes("model.onnx"), bytes("model.onnx.data"), feeds);
  writeFileSync(`${folder}/outputs.json`, JSON.stringify(made));
}
