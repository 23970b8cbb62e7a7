"""The generate command: pictures, sheets, files, refusals. That it needs no torch: tests/test_alone.py."""

from __future__ import annotations

import errno
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import pipeline
from export.errors import ContractError, EnvironmentLacksError, RecipeError
from pipeline import recipe as recipes
from pipeline.generate.__main__ import arrange, default_scale, main, open_pixels, read_image, save
from pipeline.generate.__main__ import draw as draw_with
from pipeline.generate.draw import DrawRequest, to_pixels
from pipeline.generate.pixel_model import makes_pixels, picture_shape
from tests.support.bundles import stand_in

DIGITS = {"kind": "classes", "names": [str(i) for i in range(10)], "null_class": 10}
GENERATION = {"sampler": "flow_euler", "n_steps": 4, "guidance_scale": 2.0, "output": "pixels", "conditioning": DIGITS}


class LevelEngine:
    """Draws a flat picture as bright as its class: the velocity that leads from the noise to that level."""

    def __init__(self):
        self.calls, self.closed = [], False

    def run(self, inputs):
        self.calls.append({name: value.copy() for name, value in inputs.items()})
        labels = inputs["class_labels"]
        level = np.where(labels == 10, 0.0, labels / 4.5 - 1)[:, None, None, None]
        time = inputs["timestep"][:, None, None, None] / 1000
        return {"sample": ((inputs["hidden_states"] - level) / time).astype(np.float32)}

    def close(self):
        self.closed = True


def make_bundle(tmp_path, generation=GENERATION, channels=1, **sampling):
    path = tmp_path / "bundle"
    path.mkdir(exist_ok=True)
    if generation is not None:
        (path / "generation.json").write_text(json.dumps(generation))
    (path / "config.json").write_text(json.dumps({"in_channels": channels, "sample_size": 8}))
    stated = recipes.Recipe(name="digits", model="none", sampling=recipes.Sampling(**sampling))
    engine = LevelEngine()
    return stand_in(path, stated, {"family": "dit", "source": str(tmp_path / "nowhere")}, lambda: engine)


def draw(bundle, request):
    with open_pixels(bundle, request.prompts) as opened:
        return draw_with(opened, request)[0]


def test_pictures_are_those_of_the_prompts(tmp_path):
    bundle = make_bundle(tmp_path)
    pictures = draw(bundle, DrawRequest(("0", "9", "a 3"), guidance_scale=1.0))
    assert pictures.shape == (3, 8, 8, 1) and pictures.dtype == np.uint8
    levels = np.rint((np.array([0, 9, 3]) / 4.5) * 127.5)
    assert (np.abs(pictures - levels[:, None, None, None]) <= 1).all()  # four float32 steps, then rounding to bytes
    assert bundle.engine().closed and len(bundle.engine().calls) == 4


def test_model_s_own_steps_and_guidance_unless_given(tmp_path):
    bundle = make_bundle(tmp_path)
    draw(bundle, DrawRequest(("1",)))
    assert len(bundle.engine().calls) == 4 and len(bundle.engine().calls[0]["class_labels"]) == 2
    draw(bundle, DrawRequest(("1",), n_steps=2, guidance_scale=1.0))
    assert len(bundle.engine().calls) == 6 and len(bundle.engine().calls[4]["class_labels"]) == 1


def test_every_picture_has_its_own_seed_whatever_is_drawn_beside_it(tmp_path):
    bundle = make_bundle(tmp_path)

    def noise(request):
        bundle.engine().calls.clear()
        draw(bundle, request)
        first = [call["hidden_states"] for call in bundle.engine().calls if call["timestep"][0] == 1000]
        return np.concatenate(first)

    together = noise(DrawRequest(("1", "2"), seed=5, num_images=3, guidance_scale=1.0))
    assert len(together) == 6 and len(np.unique(together.reshape(6, -1)[:, 0])) == 3
    for index in range(3):
        alone = noise(DrawRequest(("2",), seed=5 + index, guidance_scale=1.0))
        np.testing.assert_array_equal(alone[0], together[index])
        np.testing.assert_array_equal(alone[0], together[3 + index])


def test_a_bad_prompt_is_refused_before_the_engine_is_loaded(tmp_path):
    bundle = replace(make_bundle(tmp_path), make_engine=lambda: pytest.fail("the engine was loaded"))
    with pytest.raises(RecipeError, match="'horse' is not a class"):
        draw(bundle, DrawRequest(("horse",)))


def test_the_engine_s_size_is_drawn(tmp_path):
    assert picture_shape(make_bundle(tmp_path, channels=3)) == (3, 8, 8)
    assert picture_shape(make_bundle(tmp_path, height=16, width=24)) == (1, 16, 24)


WRONG = [
    ({"num_images": 0}, "number of pictures of a prompt 0; it must be a whole number from 1 to 4096"),
    ({"num_images": 2.0}, "number of pictures of a prompt 2.0; it must be a whole number"),
    ({"prompts": ("1",) * 2049, "num_images": 2}, "2049 x 2 pictures in one request; ask for at most 4096"),
    ({"seed": -1}, "seed -1; it must be a whole number from 0"),
    ({"seed": 2**63}, f"seed {2**63}; it must be a whole number"),
    ({"seed": True}, "seed True; it must be a whole number"),
    ({"n_steps": 0}, "number of denoising steps 0; it must be a whole number from 1 to 10000"),
    ({"n_steps": 10**5}, "number of denoising steps 100000; it must be"),
    ({"n_steps": "9"}, "number of denoising steps '9'; it must be"),
    ({"guidance_scale": float("nan")}, "guidance scale nan is not a number"),
    ({"guidance_scale": float("inf")}, "guidance scale inf is not a number"),
    ({"guidance_scale": "2"}, "guidance scale '2' is not a number"),
    ({"guidance_scale": 1.0, "negative_prompts": ("2",)}, "no effect at a guidance scale of 1"),
    ({"negative_prompts": ("2", "3")}, "2 negative prompts for 1 prompts; give one, or one for each"),
    ({"prompts": (b"1",)}, "prompt b'1' is no text"),
    ({"prompts": ("\udcff",)}, "is not text in the terminal's encoding"),
    ({"negative_prompts": ("\udcff",)}, "is not text in the terminal's encoding"),
]


@pytest.mark.parametrize(("fields", "words"), WRONG)
def test_what_no_engine_can_draw_is_refused(fields, words):
    with pytest.raises(RecipeError, match=re.escape(words)):
        DrawRequest(**({"prompts": ("1",)} | fields))


def test_bytes_are_rounded_and_bounded():
    values = np.array([-2, -1, -1 + 1 / 255, 0, 1 - 1.2 / 255, 1, 5], np.float32).reshape(1, 1, 1, 7)
    assert to_pixels(values)[0, 0, :, 0].tolist() == [0, 0, 0, 128, 254, 255, 255]


def test_broken_pictures_are_refused():
    with pytest.raises(ContractError, match="NaN or Inf"):
        to_pixels(np.full((1, 1, 2, 2), np.nan, np.float32))


def test_sheets_have_rows_of_pictures_with_white_lines():
    pictures = np.arange(1, 6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    sheet = arrange(pictures, columns=2)
    assert sheet.shape == (3 * 3 - 1, 2 * 4 - 1, 3)
    assert (sheet[0:2, 4:7] == 2).all() and (sheet[6:8, 0:3] == 5).all()
    assert (sheet[2] == 255).all() and (sheet[:, 3] == 255).all() and (sheet[6:8, 4:7] == 255).all()


@pytest.mark.parametrize(
    ("size", "scale"), [((32, 32), 8), ((16, 16), 16), ((33, 99), 8), ((256, 999), 1), ((512, 512), 1)]
)
def test_small_pictures_are_shown_large(size, scale):
    assert default_scale(*size) == scale


def run_main(bundle, monkeypatch, *flags):
    monkeypatch.setattr(pipeline, "load", lambda path, threads=None: bundle)
    return main([str(bundle.path), *flags])


def test_a_pipeline_is_refused_where_none_is_needed(tmp_path, monkeypatch, capsys):
    flags = ("--prompt", "9", "-o", str(tmp_path / "out.png"), "--pipeline", "PixArt-alpha/PixArt-XL-2-512x512")
    assert run_main(make_bundle(tmp_path), monkeypatch, *flags) == 2
    assert "draws by itself" in capsys.readouterr().err and not (tmp_path / "out.png").exists()


def test_command_writes_one_picture_enlarged_without_blur(tmp_path, monkeypatch, capsys):
    target = tmp_path / "new" / "out.png"
    assert run_main(make_bundle(tmp_path), monkeypatch, "--prompt", "9", "-o", str(target), "--seed", "3") == 0
    image = Image.open(target)
    assert image.size == (256, 256) and image.mode == "L"
    assert image.text["engine"] == "digits" and json.loads(image.text["prompts"]) == ["9"] and image.text["seed"] == "3"
    answer = capsys.readouterr().out
    assert "1 picture(s), 256 x 256 pixels, every pixel shown 32 x 32 (--scale)" in answer


def test_command_writes_a_sheet_at_the_asked_scale(tmp_path, monkeypatch, capsys):
    target = tmp_path / "out.png"
    flags = ["--prompt", "1", "--prompt", "2", "--num-images", "3", "--scale", "2", "-o", str(target), "--json"]
    assert run_main(make_bundle(tmp_path), monkeypatch, *flags) == 0
    assert Image.open(target).size == (2 * (3 * 9 - 1), 2 * (2 * 9 - 1))
    assert json.loads(capsys.readouterr().out)["width"] == 52


def test_a_picture_that_is_not_written_whole_leaves_the_one_that_was_there(tmp_path, monkeypatch):
    (tmp_path / "kept.png").write_bytes(b"before")
    (tmp_path / "out.png").symlink_to("kept.png")

    def half_written(image, path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", half_written)
        with pytest.raises(OSError, match="No space left"):
            save(np.zeros((1, 8, 8, 3), np.uint8), tmp_path / "out.png", 1, 1, {})
    assert (tmp_path / "kept.png").read_bytes() == b"before"
    save(np.zeros((1, 8, 8, 3), np.uint8), tmp_path / "out.png", 1, 1, {})
    assert Image.open(tmp_path / "kept.png").size == (8, 8), "a link is written through"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.png", "out.png"]


def test_an_animation_is_no_picture_to_begin_with(tmp_path):
    frames = [Image.new("L", (8, 8), level) for level in (0, 255)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(RecipeError, match="image of 2 frames; give one picture"):
        read_image(tmp_path / "two.gif")


def test_the_same_command_writes_the_same_bytes(tmp_path, monkeypatch):
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for target in files:
        run_main(make_bundle(tmp_path), monkeypatch, "--prompt", "4", "-o", str(target))
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("flags", [("-o", "out.jpg"), ("--scale", "-1"), ("--num-images", "0"), ("--prompt", "horse")])
def test_command_refuses_with_exit_code_2_and_writes_nothing(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_main(make_bundle(tmp_path), monkeypatch, "--prompt", "1", *flags) == RecipeError.exit_code
    assert not list(tmp_path.glob("*.png"))


def test_a_latent_bundle_without_its_pipeline_says_what_is_missing(tmp_path, monkeypatch):
    bundle = make_bundle(tmp_path, generation=None)
    assert not makes_pixels(bundle) and not makes_pixels(make_bundle(tmp_path, GENERATION | {"output": "latents"}))
    code = run_main(bundle, monkeypatch, "--prompt", "a cat", "-o", str(tmp_path / "out.png"))
    assert code == EnvironmentLacksError.exit_code
