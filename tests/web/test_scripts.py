"""The page's scripts in node, beside what they are to equal: noise, prompts and samplers of the run time in Python."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.zoo import scenes
from export.errors import RecipeError
from pipeline.generate.draw import to_pixels
from pipeline.generate.latent_preview import LatentPreview
from pipeline.generate.sampling import make_sampler, sample
from pipeline.generate.scene_grammar import GRAMMAR, token_ids
from pipeline.web import ziggurat
from tests.support.node import NEEDS_NODE, node

pytestmark = [pytest.mark.process, NEEDS_NODE]
SLOTS = [{"name": name, "words": list(words)} for name, words in scenes.SLOTS.items()]
# NumPy's stream of a seed is drawn anew for each; seeds of two words and the largest of a request are among them.
SEEDS = ("0", "1", "42", str(2**32), str(2**40 + 5), str(2**63 - 1))


def test_noise_is_numpy_s(tmp_path: Path) -> None:
    count = 20_000
    script = """
import { standardNormal } from "./noise.js";
console.log(JSON.stringify(given.seeds.map((seed) => Array.from(standardNormal(seed, given.count, given.tables)))));
"""
    rows = node(tmp_path / "n", script, {"seeds": SEEDS, "count": count, "tables": ziggurat.tables()})
    for seed, row in zip(SEEDS, rows, strict=True):
        expected = np.random.default_rng(int(seed)).standard_normal(count).astype(np.float32)
        np.testing.assert_array_equal(np.array(row, np.float32), expected)


def prompts() -> list[str]:
    """Of every form that the grammar has, right and wrong."""
    firsts = ["a red circle", "The  BLUE ring,", "orange cross", "a red", "a circle red", "", "a constructor circle"]
    relations = ["left of", "right of", "above", "below", "under", "alone"]
    seconds = ["a yellow cross", "the green square", "none none", "toString square"]
    ends = [" on white", " on a grey", " on sky.", "", " on red", " on white please"]
    singles = [first + end for first, end in itertools.product(firsts, ends)]
    return singles + [f"{a} {b} {c}{d}" for a, b, c, d in itertools.product(firsts, relations, seconds, ends)]


def test_prompts_have_the_same_numbers_or_are_refused_as_well(tmp_path: Path) -> None:
    script = """
import { tokenIds } from "./prompts.js";
console.log(JSON.stringify(given.prompts.map((prompt) => {
  try { return tokenIds(prompt, given.slots, given.grammar); } catch (error) { return error.message; }
})));
"""
    texts = prompts()
    rows = node(tmp_path / "p", script, {"prompts": texts, "slots": SLOTS, "grammar": GRAMMAR})
    taken = 0
    for prompt, row in zip(texts, rows, strict=True):
        try:
            expected: list[int] | None = token_ids(prompt, SLOTS).tolist()  # type: ignore[arg-type]
        except RecipeError:
            expected = None
        taken += expected is not None
        assert row == expected if expected is not None else isinstance(row, str) and "prompt '" in row, (prompt, row)
    assert 50 < taken < len(texts) - 50


def test_previews_are_the_run_time_s(tmp_path: Path) -> None:
    """Colours from -1 to 1, but for other roundings of a least-squares problem."""
    rng, (channels, height, width, cell) = np.random.default_rng(0), (4, 6, 5, 4)
    latents = rng.standard_normal((3, channels, height, width)).astype(np.float32)
    pictures = rng.uniform(-1.2, 1.2, (3, 3, cell * height, cell * width)).astype(np.float32)
    latents[1, 0, 0, 0] = np.inf  # teaches nothing
    script = """
import { LatentPreview } from "./preview.js";
const preview = new LatentPreview(given.latent, given.cell);
const [first, second, third] = given.latents.map((row) => Float32Array.from(row, Number));
preview.learn(first, given.pictures[0]);
preview.learn(second, given.pictures[1]);
console.log(JSON.stringify([preview.isReady, Array.from(preview.picture(third))]));
"""
    given = {"latent": {"channels": channels, "height": height, "width": width}, "cell": cell}
    given |= {"latents": [[str(value) for value in row.ravel().tolist()] for row in latents]}
    given |= {"pictures": [row.ravel().tolist() for row in pictures]}
    ready, shown = node(tmp_path / "v", script, given)
    expected = LatentPreview(channels, cell)
    for row in range(2):
        expected.learn(latents[row : row + 1], pictures[row : row + 1])
    assert ready
    np.testing.assert_allclose(np.reshape(shown, pictures[2].shape), expected(latents[2:])[0], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "steps", "scale"),
    [("flow_euler", 7, 2.0), ("flow_euler", 20, 1.0), ("flow_euler_rising", 7, 2.0), ("ddim", 9, 3.5)],
)
def test_samplers_are_equal_bit_by_bit(name: str, steps: int, scale: float, tmp_path: Path) -> None:
    """Around a denoiser that both can compute exactly."""
    noise = np.random.default_rng(3).standard_normal((1, 3, 8, 8)).astype(np.float32)

    def run(inputs: dict[str, Any]) -> dict[str, Any]:
        halves = np.arange(len(inputs["timestep"]), dtype=np.float32).reshape(-1, 1, 1, 1)
        times = inputs["timestep"].reshape(-1, 1, 1, 1) / np.float32(1024)
        return {"sample": inputs["hidden_states"] * np.float32(0.5) + times * (halves + np.float32(1))}

    script = """
import { makeSampler, sample, toPixels } from "./sampler.js";
const f32 = Math.fround, sampler = makeSampler(given.name, given.steps, 1000);
const batch = given.scale === 1 ? 1 : 2;
const call = (latents, time) => {
  const output = new Float32Array(batch * latents.length);
  for (let half = 0; half < batch; half++)
    for (let i = 0; i < latents.length; i++)
      output[half * latents.length + i] = f32(f32(latents[i] * 0.5) + f32(f32(time / 1024) * (half + 1)));
  return output;
};
const seen = [];
const onStep = (step) => { seen.push(step); };
const picture = await sample(call, Float32Array.from(given.noise), sampler, given.scale, onStep);
console.log(JSON.stringify({ picture: Array.from(picture), pixels: Array.from(toPixels(picture, 3)), seen }));
"""
    given = {"name": name, "steps": steps, "scale": scale, "noise": noise.ravel().tolist()}
    row = node(tmp_path / "s", script, given)
    expected = sample(run, ({}, {}), noise, make_sampler(name, steps), scale)
    np.testing.assert_array_equal(np.array(row["picture"], np.float32), expected.ravel())
    pixels = np.array(row["pixels"], np.uint8).reshape(8, 8, 4)
    np.testing.assert_array_equal(pixels[:, :, :3], to_pixels(expected)[0])
    assert row["seen"] == list(range(1, steps + 1)) and (pixels[:, :, 3] == 255).all()
