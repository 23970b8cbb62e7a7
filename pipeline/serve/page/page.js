// The page of `ditc serve`: asks for pictures as a stream of events, and shows previews and pictures as they come.
"use strict";

const at = (id) => document.getElementById(id);
const SMALL_PIXELS = 128; // smaller pictures are enlarged in squares, not blurred
const MOST_PREVIEWS = 50; // of one request
const MOST_SHOWN = 200; // pictures of the gallery; the oldest go
let model = null; // what the server draws with, and by default
let running = null; // AbortController of the request that runs

function headers() {
  const key = at("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answers ${response.status}`;
  }
}

function complain(text) {
  at("error").textContent = text;
  at("error").hidden = !text;
}

function warn(sentences) {
  at("warning").textContent = sentences.join("\n");
  at("warning").hidden = !sentences.length;
}

// --- what the server draws with ---

async function loadModel() {
  const response = await fetch("v1/models", { headers: headers() });
  at("key-row").hidden = response.status !== 401 && !at("key").value;
  if (!response.ok) throw new Error(await failure(response));
  model = (await response.json()).data[0];
  const facts = model.ditc;
  document.title = at("model").textContent = model.id;
  at("facts").textContent = `${facts.size.replace("x", " × ")} pixels, ${facts.steps} steps, guidance ${facts.guidance}`;
  at("steps").placeholder = facts.steps;
  at("guidance").placeholder = facts.guidance;
  at("steps").max = facts.most.steps;
  at("guidance").max = facts.most.guidance;
  at("count").max = facts.most.n;
  at("prompt").maxLength = at("negative").maxLength = facts.most.prompt;
  if (facts.report) at("report").hidden = false;
  at("examples").replaceChildren(...facts.examples.slice(0, 4).map(example));
  if (!at("prompt").value && facts.examples.length) at("prompt").value = facts.examples[0];
}

function example(text) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", () => { at("prompt").value = text; });
  return button;
}

// --- pictures ---

function settings() {
  const number = (id) => (at(id).value === "" ? null : Number(at(id).value));
  return {
    prompt: at("prompt").value.trim(),
    negative_prompt: at("negative").value.trim() || null,
    steps: number("steps"),
    guidance: number("guidance"),
    n: number("count") || 1,
    seed: number("seed"),
  };
}

function tile(asked) {
  const figure = document.createElement("figure");
  figure.className = "unfinished";
  figure.innerHTML = "<button type='button' disabled><img alt='' hidden></button><figcaption><b></b><span></span></figcaption>";
  figure.querySelector("b").textContent = asked.prompt;
  figure.querySelector("span").textContent = "waiting";
  return figure;
}

function show(figure, event) {
  const image = figure.querySelector("img");
  image.src = `data:image/png;base64,${event.b64_json}`;
  image.alt = figure.querySelector("b").textContent;
  image.className = Number(event.size.split("x")[0]) < SMALL_PIXELS ? "small" : "";
  image.hidden = false;
}

function finish(figure, event, asked) {
  figure.className = "";
  figure.querySelector("span").textContent = `seed ${event.seed}`;
  const button = figure.querySelector("button");
  button.disabled = false;
  button.setAttribute("aria-label", `${asked.prompt}, seed ${event.seed}: enlarge`);
  button.addEventListener("click", () => enlarge(figure.querySelector("img"), { ...asked, n: 1, seed: event.seed }));
}

function enlarge(image, asked) {
  at("large-image").src = at("download").href = image.src;
  at("large-image").alt = image.alt;
  at("large-image").className = image.className;
  const away = asked.negative_prompt ? `, away from ${asked.negative_prompt}` : "";
  at("large-text").textContent = `${asked.prompt}${away}, seed ${asked.seed}`;
  at("download").download = `${model.id}-${asked.seed}.png`;
  at("again").onclick = () => { fill(asked); at("large").close(); };
  at("large").showModal();
}

function fill(asked) {
  at("prompt").value = asked.prompt;
  at("negative").value = asked.negative_prompt ?? "";
  at("steps").value = asked.steps ?? "";
  at("guidance").value = asked.guidance ?? "";
  at("count").value = asked.n;
  at("seed").value = asked.seed;
}

// --- a request ---

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}

async function draw() {
  if (!model) await loadModel();
  const asked = settings();
  const steps = asked.steps ?? model.ditc.steps;
  const tiles = Array.from({ length: asked.n }, () => tile(asked));
  at("empty").hidden = true;
  at("gallery").prepend(...tiles);
  tiles[0].scrollIntoView({ block: "nearest", behavior: "smooth" }); // on a phone it is below the form
  while (at("gallery").children.length > MOST_SHOWN) at("gallery").lastChild.remove();
  const done = tiles.map(() => 0); // steps of each picture
  const progress = () => {
    at("progress").value = done.reduce((sum, count) => sum + count, 0) / (steps * asked.n);
  };
  try {
    const response = await fetch("v1/images/generations", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify({ ...asked, stream: true, partial_images: Math.min(steps - 1, MOST_PREVIEWS) }),
      signal: running.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response.body)) {
      if (event.type === "error") throw new Error(event.error.message);
      warn(event.warnings);
      const figure = tiles[event.index];
      show(figure, event);
      if (event.type === "image_generation.completed") {
        done[event.index] = steps;
        finish(figure, event, asked);
      } else {
        done[event.index] = event.steps_done;
        figure.querySelector("span").textContent = `step ${event.steps_done} of ${event.steps}`;
        at("status").textContent = `step ${event.steps_done} of ${event.steps}`;
      }
      progress();
    }
    if (done.some((count) => count < steps)) throw new Error("the connection ended before all pictures were drawn");
  } finally {
    tiles.filter((figure) => figure.className).forEach((figure) => figure.remove());
    at("empty").hidden = at("gallery").children.length > 0;
  }
}

function busy(is) {
  at("draw").disabled = is;
  at("stop").disabled = at("progress").hidden = !is;
  at("progress").value = 0;
}

at("form").addEventListener("submit", async (submit) => {
  submit.preventDefault();
  if (running) return;
  running = new AbortController();
  const started = performance.now();
  complain("");
  warn([]);
  at("status").textContent = "waiting";
  busy(true);
  try {
    await draw();
    at("status").textContent = `drawn in ${((performance.now() - started) / 1000).toFixed(1)} s`;
  } catch (error) {
    at("status").textContent = error.name === "AbortError" ? "stopped" : "";
    if (error.name !== "AbortError") complain(error.message);
  }
  running = null;
  busy(false);
});
at("stop").addEventListener("click", () => running?.abort());
at("close").addEventListener("click", () => at("large").close());
at("key").addEventListener("change", () => loadModel().then(() => complain(""), (error) => complain(error.message)));
at("prompt").addEventListener("keydown", (press) => {
  if (press.key === "Enter" && (press.ctrlKey || press.metaKey)) at("form").requestSubmit();
});
loadModel().catch((error) => complain(error.message));
