// Fields, progress and canvas; the engine is worker.js.

const of = (id) => document.getElementById(id);
const form = of("form"), canvas = of("picture"), bar = of("progress"), state = of("state");
const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
let settings = null, asked = 0, drawing = null;

function show(pixels) {
  const { width, height } = settings.picture;
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
}

function say(text, isError = false) {
  state.textContent = text;
  state.classList.toggle("error", isError);
}

function rest() {
  drawing = null;
  of("draw").disabled = false;
  of("stop").disabled = true;
}

worker.onmessage = ({ data }) => {
  if (data.ready) {
    settings = data.settings;
    Object.assign(canvas, { width: settings.picture.width, height: settings.picture.height });
    of("name").textContent = settings.name;
    of("hint").textContent = settings.hint;
    of("negative-row").hidden = !settings.takes_negative;
    of("prompt").value ||= settings.examples[0] ?? "";
    of("steps").max = settings.most.n_steps;
    Object.assign(of("guidance"), { min: -settings.most.guidance_scale, max: settings.most.guidance_scale });
    of("steps").value ||= settings.n_steps;
    of("guidance").value ||= settings.guidance_scale;
    say("ready");
    rest();
  } else if (data.text && data.id === undefined) {
    say(data.text);
  } else if (data.error && data.id === undefined) {
    say(`the model cannot be opened: ${data.error}`, true);
  } else if (data.id !== drawing?.id) {
    return; // of a drawing that was given up
  } else if (data.error) {
    say(data.error, true);
    rest();
  } else if (data.done) {
    if (data.pixels) show(data.pixels);
    const seconds = ((performance.now() - drawing.start) / 1000).toFixed(1);
    say(data.stopped ? "stopped" : [`drawn in ${seconds} s`, ...drawing.notes].join("; "));
    canvas.dataset.drawn = data.id;
    rest();
  } else if (data.note) {
    drawing.notes.push(data.note);
  } else if (data.text) {
    say(data.text);
  } else {
    bar.max = data.steps;
    bar.value = data.step;
    say(`step ${data.step} of ${data.steps}`);
    if (data.pixels) show(data.pixels);
  }
};
worker.onerror = (event) => say(`the engine cannot be started: ${event.message || "see the browser's console"}`, true);

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!settings || drawing) return;
  drawing = { id: ++asked, start: performance.now(), notes: [] };
  of("draw").disabled = true;
  of("stop").disabled = false;
  bar.value = 0;
  worker.postMessage({
    id: asked,
    prompt: of("prompt").value,
    negative: of("negative").value,
    seed: of("seed").value.trim() || "0",
    steps: of("steps").valueAsNumber,
    guidance: of("guidance").valueAsNumber,
  });
});
of("stop").addEventListener("click", () => drawing && worker.postMessage({ stop: drawing.id }));
