"""The family of a class that the table has no row for, learned from recordings of its diffusers pipeline.

Each recording differs from the first in one thing: how many pictures, how many tokens, the picture's size, the noise,
the prompts, the guidance. So it is seen which arguments of the transformer hold what, and which of their axes count
what; those that hang on the picture's size alone are part of the compiled model, and no inputs of it. What no rule here
understands is refused by its name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from export.documents import read_json, shown
from export.errors import ModelError, RecipeError
from export.models.config import FILE as CONFIG
from export.models.config import RULES, defaults_of
from export.models.families import MOST_TOKENS, PATCH_EMBED, RECORDED, Config, Family, Input, Tensors
from export.models.recording import BLOCK, Drawing, Place, Recorded, Recorder, leaves, mapped, recorder_of
from export.models.torch_modules import use_tabled_timesteps
from export.models.traceable_forms import traceable_forms, use_forms_in_blocks, use_prefix, use_real_tables

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)
INDEX = "model_index.json"  # of a pipeline
LATENTS, TIMESTEP = "hidden_states", "timestep"
TOKENS, MORE_TOKENS, PICTURES, MORE_PICTURES = 10, 13, 2, 3
GUIDANCE, MORE_GUIDANCE = 1.0, 1.75
# Sizes that are recorded, in cells: no side like another, and even, as many models take two cells by two for a token.
CELLS, HIGHER, WIDER = (8, 12), (10, 12), (8, 14)
LATENTS_HANG = "latents, which hang on the noise"
PACKED_CELLS = 2  # of a side of the squares that pipelines make a token of before the model sees it
SEVERAL = "runs several times in a call: a layer is compiled where it runs"
Size = tuple[int, int]  # of a picture, in cells of its latents
# Ending of a linear's path -> layer kind; the first row that fits counts (`cross_attn` ends in `attn`), the last takes
# the rest.
ENDINGS = (
    (r".*(attn2|cross_attn)\.to_q", "cross.q"),
    (r".*(attn2|cross_attn)\.to_[kv]", "cross.kv"),
    (r".*(attn2|cross_attn)\.to_out\.0", "cross.out"),
    (r".*(attn1?|attention)\.(to_[qkv]|to_qkv|add_[qkv]_proj)", "attn.qkv"),
    (r".*(attn1?|attention)\.(to_out\.0|to_add_out)", "attn.out"),
    (r".*(ff|ffn|mlp)(_context)?\.(net\.0\.proj|fc1|linear_[12]|linear_in)", "ff.in"),
    (r".*feed_forward\.w[13]", "ff.in"),
    (r".*feed_forward\.w2", "ff.out"),
    (r".*(ff|ffn|mlp)(_context)?\.(net\.2|fc2|out_projection|linear_out)", "ff.out"),
    (r".*", "other"),
)


@dataclass(frozen=True)
class Learned:
    """An input of the engine: `row`, and the place among the transformer's arguments, where it has another type."""

    row: Input
    place: Place
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """How a transformer is called for pictures of one size: `tree` are its arguments, with names of inputs in their
    places and with what all pictures share; of what has a row for each picture one row, of what has one for each token
    one, or the rows of as many tokens as a prompt may have, where they differ. sizes: how many rows the axes that are
    named after the picture's size have. pipeline: its class. single: as of Recordings. listed: whether the transformer
    gives a list with a tensor for each picture."""

    tree: Mapping[str, object]
    inputs: Mapping[Place, Learned]
    per_picture: frozenset[Place]
    per_token: frozenset[Place]
    sizes: Mapping[str, int]
    pipeline: str
    single: Callable[[Mapping[str, object]], Mapping[str, object]]
    listed: bool

    def arguments(self, inputs: Tensors) -> dict[str, object]:
        """The arguments for inputs of a batch."""
        batch, dtype = inputs[LATENTS].shape[0], inputs[LATENTS].dtype
        tokens = next(
            (
                inputs[each.row.name].shape[each.row.shape.index("tokens")]
                for each in self.inputs.values()
                if "tokens" in each.row.shape
            ),
            0,
        )

        def filled(place: Place, leaf: object) -> object:
            if place in self.inputs:
                learned = self.inputs[place]
                value = inputs[learned.row.name]  # floats have the precision that the caller chose
                whole = not learned.dtype.is_floating_point and learned.row.name != TIMESTEP
                return value.to(learned.dtype) if whole else value
            if not isinstance(leaf, torch.Tensor):
                return leaf
            tensor = leaf.to(dtype) if leaf.is_floating_point() else leaf
            if place in self.per_token:
                axis = 1 if place in self.per_picture else 0
                if tensor.shape[axis] > 1:
                    tensor = tensor.narrow(axis, 0, tokens)
                else:
                    tensor = tensor.expand(*tensor.shape[:axis], tokens, *tensor.shape[axis + 1 :])
            return tensor.expand(batch, *tensor.shape[1:]) if place in self.per_picture else tensor

        result: dict[str, object] = mapped(self.tree, filled)
        return result

    def named(self, arguments: Mapping[str, object]) -> dict[str, object]:
        """The engine's inputs among the transformer's arguments. Raises RecipeError where another one is not what the
        engine was compiled with."""
        result, known = {}, dict(leaves(self.tree))
        for place, leaf in leaves(self.single(arguments)):
            if place in self.inputs:
                result[self.inputs[place].row.name] = leaf
            elif leaf is not None and not _agrees(leaf, self._rows_for(leaf, place, known.get(place))):
                raise RecipeError(
                    f"{_name(place)} is not what the engine was compiled with, which is what {self.pipeline} gives for "
                    "this size; call the pipeline with its own settings, or use the float transformer"
                )
        return result

    def _rows_for(self, leaf: object, place: Place, known: object) -> object:
        """Of what is known at a place, the rows of as many tokens as a caller's leaf has."""
        axis = 1 if place in self.per_picture else 0
        if place not in self.per_token or not isinstance(known, torch.Tensor) or known.shape[axis] == 1:
            return known
        shape = _shape(leaf)
        fits = len(shape) == known.ndim and shape[axis] <= known.shape[axis]
        return known.narrow(axis, 0, shape[axis]) if fits else known


class Recordings:
    """Of one class and configuration; each is made once, when it is asked for."""

    def __init__(self, class_name: str, config: Config) -> None:
        self.class_name, self.config = class_name, config
        self.recorder: Recorder = recorder_of(class_name, config)
        self.pixels = self.recorder.pixels_per_cell
        self._recorded: dict[Drawing, Recorded] = {}
        self._calls: dict[Size, Call] = {}

    @property
    def own_cells(self) -> Size:
        """Of the size that the pipeline draws where its caller names none."""
        height, width = self.recorder.own_size
        return height // self.pixels, width // self.pixels

    def cells(self, height: int, width: int) -> Size:
        """Of a picture of so many pixels; 0 stands for the pipeline's own. Raises RecipeError for a size that the
        pipeline does not draw: it draws the next one below then."""
        own = self.recorder.own_size
        height, width = height or own[0], width or own[1]
        if min(height, width) <= 0 or height % self.unit or width % self.unit:
            name = self.recorder.pipeline_class.__name__
            raise RecipeError(f"image size {height} x {width}: {name} needs multiples of {self.unit} pixels")
        return height // self.pixels, width // self.pixels

    @cached_property
    def unit(self) -> int:
        """Pixels that a picture's sides are multiples of: of a token, which is a cell or a square of cells."""
        patch = self.config.get("patch_size", self.recorder.row.patch)
        side = max(patch[1:]) if isinstance(patch, list | tuple) else patch
        (latents,) = self._one(self.noise, LATENTS_HANG)
        packed = not {"height", "width"} <= set(self.axes[latents])
        return self.pixels * max(PACKED_CELLS if packed else 1, side if isinstance(side, int) else 1)

    def recorded(self, drawing: Drawing) -> Recorded:
        """The calls of a drawing."""
        if drawing not in self._recorded:
            self._recorded[drawing] = self.recorder.record(drawing)
        return self._recorded[drawing]

    def leaves(self, drawing: Drawing, step: int = 0) -> dict[Place, object]:
        """What the transformer is given at a step."""
        return dict(leaves(self.single(self.recorded(drawing).calls[step])))

    def single(self, arguments: Mapping[str, object]) -> dict[str, object]:
        """The arguments with tensors in the places of lists, and one item where the code reads one of several equal
        ones."""
        batches = self.recorder.row.batches
        result = dict(arguments) if batches is None else batches.packed(arguments)
        for name in self.recorder.row.single:
            items = result.get(name)
            if isinstance(items, list | tuple):
                if any(item != items[0] for item in items):
                    raise ModelError(f"{self.class_name}: {name} is not the same for every picture")
                result[name] = items[:1]
        return result

    def drawing(self, cells: Size = CELLS, **changes: int | float | bool) -> Drawing:
        """The first recording, or one that differs from it."""
        height, width = cells[0] * self.pixels, cells[1] * self.pixels
        return replace(Drawing(PICTURES, TOKENS, height, width, guidance_scale=GUIDANCE), **changes)  # type: ignore[arg-type]

    # --- what is learned of them -------------------------------------------------------------------------------------

    @cached_property
    def first(self) -> dict[Place, object]:
        """Leaves of the first call of the first recording."""
        return self.leaves(self.drawing())

    def _changed(self, other: Mapping[Place, object]) -> frozenset[Place]:
        """Places of leaves that differ from the first recording's. Raises ModelError where there are others."""
        if other.keys() != self.first.keys():
            name = ".".join(map(str, min(other.keys() ^ self.first.keys(), key=str)))
            raise ModelError(
                f"{self.class_name}: whether its argument {name} is there hangs on how it is called; only models whose "
                "arguments are always the same ones are compiled"
            )
        return frozenset(place for place, leaf in self.first.items() if not _equal(leaf, other[place]))

    @cached_property
    def noise(self) -> frozenset[Place]:
        """Places of what hangs on the noise: latents."""
        return self._changed(self.leaves(self.drawing(noise_seed=1)))

    @cached_property
    def prompts(self) -> frozenset[Place]:
        return self._changed(self.leaves(self.drawing(prompt_seed=1)))

    @cached_property
    def masks(self) -> frozenset[Place]:
        return self._changed(self.leaves(self.drawing(ragged=False)))

    @cached_property
    def steps(self) -> frozenset[Place]:
        """Places of what changes from step to step, which latents need not: the model gave zeros."""
        return self._changed(self.leaves(self.drawing(), step=1)) - self.noise

    @cached_property
    def guidance(self) -> frozenset[Place]:
        """Places of what hangs on the guidance scale, where the model is given it."""
        if "guidance_scale" not in self.recorder.arguments:
            return frozenset()
        other = self.leaves(self.drawing(guidance_scale=MORE_GUIDANCE))
        # With guidance many pipelines give the model each picture twice, without and with its prompt.
        halves = {place: _half(leaf, self.first.get(place)) for place, leaf in other.items()}
        told = self.prompts | self.masks | self.noise
        return self._changed(halves) - (
            told if any(halves[place] is not leaf for place, leaf in other.items()) else set()
        )

    @cached_property
    def axes(self) -> Mapping[Place, tuple[int | str, ...]]:
        """Place of a tensor -> what each of its axes counts: "batch", "tokens", "height" and "width" of latents in
        cells, other sizes of the picture by names of their own, or always the same number."""
        others = {
            "batch": self.leaves(self.drawing(pictures=MORE_PICTURES)),
            "tokens": self.leaves(self.drawing(tokens=MORE_TOKENS)),
            "height": self.leaves(self.drawing(HIGHER)),
            "width": self.leaves(self.drawing(WIDER)),
        }
        for other in others.values():
            self._changed(other)  # refuses other places
        for key in ("batch", "tokens"):
            for place, leaf in self.first.items():
                if not isinstance(leaf, torch.Tensor) and not _equal(leaf, others[key][place]):
                    raise ModelError(
                        f"{self.class_name}: its argument {_name(place)} is {leaf!r} for {PICTURES} pictures of "
                        f"{TOKENS} tokens and {others[key][place]!r} for more; what is compiled in is the same for all"
                    )
        return {
            place: tuple(self._axis(place, axis, {key: other[place] for key, other in others.items()})
                         for axis in range(leaf.ndim))
            for place, leaf in self.first.items() if isinstance(leaf, torch.Tensor)
        }  # fmt: skip

    def _axis(self, place: Place, axis: int, others: Mapping[str, object]) -> int | str:
        size = _shape(self.first[place])[axis]
        sizes = {key: _shape(other)[axis] for key, other in others.items()}
        changed = {key for key, other in sizes.items() if other != size}
        if not changed:
            return size
        if changed == {"batch"} and size * MORE_PICTURES == sizes["batch"] * PICTURES:
            return "batch"
        if changed == {"tokens"} and (size, sizes["tokens"]) == (TOKENS, MORE_TOKENS):
            return "tokens"
        if changed == {"height"} and (size, sizes["height"]) == (CELLS[0], HIGHER[0]):
            return "height"
        if changed == {"width"} and (size, sizes["width"]) == (CELLS[1], WIDER[1]):
            return "width"
        if changed <= {"height", "width"}:
            return f"{_name(place)}.{axis}"
        raise ModelError(
            f"{self.class_name}: axis {axis} of its argument {_name(place)} has {size} rows, which hang on "
            f"{' and '.join(sorted(changed))}; an axis counts pictures, tokens of a prompt, or parts of a picture"
        )

    @cached_property
    def learned(self) -> tuple[Learned, ...]:
        """The inputs of the engine, in the order of the arguments."""
        (latents,) = self._one(self.noise, LATENTS_HANG)
        self._refuse_other_output(_shape(self.first[latents]))
        (timestep,) = self._one(self.steps & _tensors(self.first), "a timestep, which changes from step to step")
        rows = []
        for place in self.first:
            if place == latents:
                rows.append(self._row(place, LATENTS, "normal"))
            elif place == timestep:
                rows.append(self._row(place, TIMESTEP, self._timestep(place)))
            elif place in self.prompts:
                rows.append(self._row(place, _name(place), "normal"))
            elif place in self.masks:
                self._refuse_bias(place)
                rows.append(self._row(place, _name(place), "mask:1" if self.recorder.row.prompted else "mask"))
            elif place in self.guidance:
                rows.append(self._row(place, _name(place), "upto:10"))
        return tuple(rows)

    def _refuse_bias(self, place: Place) -> None:
        leaf = self.first[place]
        if isinstance(leaf, torch.Tensor) and not bool(((leaf == 0) | (leaf == 1)).all()):
            raise ModelError(
                f"{self.class_name}: its argument {_name(place)} hangs on masks and has other numbers than 0 and 1; an "
                "engine takes masks themselves"
            )

    def _refuse_other_output(self, latents: tuple[int, ...]) -> None:
        """What a model gives is of its latents' shape, or has as many channels again: a variance that it learned."""
        output = self.recorded(self.drawing()).output
        more = (*latents[:1], 2 * latents[1], *latents[2:])
        if output not in (latents, more):
            raise ModelError(
                f"{self.class_name} gives {output} for latents {latents}: it takes channels beside noise, or gives "
                "others; models that draw from text alone are compiled"
            )

    def _one(self, places: frozenset[Place], what: str) -> frozenset[Place]:
        if len(places) != 1:
            names = ", ".join(sorted(map(_name, places))) or "none"
            raise ModelError(f"{self.class_name} takes {what}, in one argument; these do: {names}")
        return places

    def _row(self, place: Place, name: str, fill: str) -> Learned:
        leaf = self.first[place]
        if not isinstance(leaf, torch.Tensor):
            raise ModelError(
                f"{self.class_name}: its argument {_name(place)} is {leaf!r} and hangs on what is drawn; an engine's "
                "input is a tensor"
            )
        return Learned(Input(name, self.axes[place], fill), place, leaf.dtype)

    @property
    def sampler(self) -> tuple[str, float]:
        """What takes steps like the pipeline's scheduler, and the timestep of pure noise (`sampling.make_sampler`)."""
        import diffusers

        flows = isinstance(self.recorder.pipe.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
        (row,) = (each.row for each in self.learned if each.row.name == TIMESTEP)
        scale = 1000.0 if row.fill == "timestep" else 1.0
        if not (flows or self.recorder.row.flows):
            return "ddim", scale
        (timestep,) = (each.place for each in self.learned if each.row is row)
        first, second = (float(torch.as_tensor(self.leaves(self.drawing(), step)[timestep]).max()) for step in (0, 1))
        return "flow_euler" if first > second else "flow_euler_rising", scale

    @property
    def is_told_guidance(self) -> bool:
        """Whether the guidance scale is an input: no call is made without the prompt then."""
        return bool(self.guidance)

    def _timestep(self, place: Place) -> str:
        """Whole steps of training, or parts of the way from noise to data."""
        both = (self.first[place], self.leaves(self.drawing(), step=1)[place])
        most = max(float(leaf.max()) for leaf in both if isinstance(leaf, torch.Tensor))
        return "timestep" if most > 1 else "timestep:1"

    def call(self, cells: Size) -> Call:
        """The call for pictures of a size. Raises ModelError for what the pipeline does not draw."""
        if cells not in self._calls:
            self._calls[cells] = self._call(cells)
        return self._calls[cells]

    def _call(self, cells: Size) -> Call:
        inputs = {each.place: each for each in self.learned}
        recorded = self.recorded(self.drawing(cells, pictures=1, ragged=False))
        tree = self.single(recorded.calls[0])
        per_picture, per_token = set[Place](), set[Place]()

        def kept(place: Place, leaf: object) -> object:
            if place in inputs or not isinstance(leaf, torch.Tensor):
                return leaf if place not in inputs else None
            names = self.axes[place]
            if "batch" in names[1:] or "tokens" in names[names[:1] == ("batch",) :][1:]:
                raise ModelError(
                    f"{self.class_name}: its argument {_name(place)} counts pictures and tokens in axes {names}; one "
                    "that all pictures share has pictures first, then tokens"
                )
            if names[:1] == ("batch",):
                per_picture.add(place)
            if "tokens" in names:
                per_token.add(place)
                leaf = self._of_tokens(cells, place, leaf)
            self._refuse_differing(place)
            return leaf

        sizes = {
            name: _shape(leaf)[axis]
            for place, leaf in leaves(tree) if place in self.axes for axis, name in enumerate(self.axes[place])
            if isinstance(name, str) and name not in ("batch", "tokens")
        }  # fmt: skip
        name = self.recorder.pipeline_class.__name__
        listed = self.recorder.row.batches is not None
        filled = mapped(tree, kept)
        return Call(filled, inputs, frozenset(per_picture), frozenset(per_token), sizes, name, self.single, listed)

    def _of_tokens(self, cells: Size, place: Place, leaf: Tensor) -> Tensor:
        """What stands at a place for one token where all share it, else for as many as a prompt may have."""
        axis = self.axes[place].index("tokens")
        one = leaf.narrow(axis, 0, 1)
        if torch.equal(one.expand_as(leaf), leaf):
            return one
        whole = self.leaves(self.drawing(cells, pictures=1, ragged=False, tokens=MOST_TOKENS))[place]
        assert isinstance(whole, torch.Tensor)
        return whole

    def _refuse_differing(self, place: Place) -> None:
        """Raise ModelError unless all pictures share what stands at a place, and prompts of any length what stands
        there for their first tokens."""
        more = (self.drawing(), self.drawing(pictures=MORE_PICTURES), self.drawing(tokens=MORE_TOKENS))
        rows = []
        for leaf in (self.leaves(drawing)[place] for drawing in more):
            assert isinstance(leaf, torch.Tensor)
            row = leaf
            for axis, name in enumerate(self.axes[place]):
                row = row.narrow(axis, 0, 1) if name == "batch" else row
            same = torch.equal(row.expand_as(leaf), leaf)
            if "tokens" in self.axes[place]:
                row = row.narrow(self.axes[place].index("tokens"), 0, TOKENS)
            rows.append((row, same))
        if not all(same and torch.equal(row, rows[0][0]) for row, same in rows):
            raise ModelError(
                f"{self.class_name}: its argument {_name(place)} differs from picture to picture, or for a token with "
                "the prompt's length; only one that is the same for all is compiled"
            )

    def make_traceable(self, module: nn.Module) -> None:
        """Put parts whose code no graph has a form for in forms that one has; call it before weights are given."""
        use_tabled_timesteps(module)
        use_real_tables(module)
        use_forms_in_blocks(module)
        for prefix in self.recorder.row.prefixes:
            use_prefix(module, prefix)
        if self.recorder.row.batches is not None:
            self.recorder.row.batches.prepare(module)

    def sizes(self, cells: Size) -> Mapping[str, int]:
        """As of the call."""
        return self.call(cells).sizes


def _tensors(known: Mapping[Place, object]) -> frozenset[Place]:
    return frozenset(place for place, leaf in known.items() if isinstance(leaf, torch.Tensor))


def _shape(leaf: object) -> tuple[int, ...]:
    return tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else ()


def _half(leaf: object, known: object) -> object:
    """The first half of a tensor that has twice as many rows as the known one; any other leaf as it is."""
    shapes = _shape(leaf), _shape(known)
    if isinstance(leaf, torch.Tensor) and shapes[1] and shapes[0] == (2 * shapes[1][0], *shapes[1][1:]):
        return leaf[: shapes[1][0]]
    return leaf


def _equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and one == other


def _agrees(leaf: object, known: object) -> bool:
    """Whether a leaf says the same as the known one, of which one row may stand for many."""
    if not (isinstance(leaf, torch.Tensor) and isinstance(known, torch.Tensor)):
        return _equal(leaf, known)
    if leaf.ndim != known.ndim or any(a not in (1, b) for a, b in zip(known.shape, leaf.shape, strict=True)):
        return False
    return torch.equal(leaf.cpu(), known.to(leaf.dtype).expand_as(leaf))


def _name(place: Place) -> str:
    return ".".join(map(str, place))


# --- the family ------------------------------------------------------------------------------------------------------


def recorded_family(class_name: str, config: Config, source: Path) -> Family:
    """The row of a class with a pipeline of diffusers. Raises ModelError naming what cannot be learned of it.

    source: the file of the configuration, for messages; what it leaves to the class is filled in.
    """
    import diffusers

    cls = getattr(diffusers, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ModelError(f"{source}: diffusers {diffusers.__version__} has no model {class_name!r}; check the name")
    try:
        recordings = Recordings(class_name, {**defaults_of(class_name), **config})
        _refuse_other_pipeline(source.parent.parent, recordings)
        family = _family(recordings)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error
    logger.info("%s: inputs are learned from %s", class_name, recordings.recorder.pipeline_class.__name__)
    return family


def _refuse_other_pipeline(root: Path, recordings: Recordings) -> None:
    """Raise ModelError where the model lies in a pipeline that calls it otherwise than the one it is learned from."""
    index, name = root / INDEX, recordings.recorder.pipeline_class.__name__
    if not index.is_file():
        return
    stated = read_json(index, dict[str, object], RULES)
    if stated.get("_class_name") != name:
        raise ModelError(f"{index} is of {shown(stated.get('_class_name'))}; what is known of the class is {name}'s")
    if stated.get("expand_timesteps"):
        raise ModelError(
            f"{index}: expand_timesteps gives each token a timestep; a model of one for each picture is built"
        )
    vae = root / "vae" / CONFIG
    if vae.is_file() and (pixels := _pixels_of(read_json(vae, dict[str, object], RULES))) not in (
        None,
        recordings.pixels,
    ):
        raise ModelError(
            f"{vae}: {pixels} pixels of a side of a cell, and {name} takes {recordings.pixels} where it has no "
            "autoencoder; only such ones are compiled"
        )


def _pixels_of(config: Mapping[str, object]) -> object:
    """Of a side of a latent's cell, by the configuration of an autoencoder; None where no known key says so."""
    for key in ("scale_factor_spatial", "spatial_compression_ratio"):
        if config.get(key) is not None:
            return config[key]
    levels = config.get("block_out_channels") if config.get("_class_name") == "AutoencoderKL" else None
    return 2 ** (len(levels) - 1) if isinstance(levels, list) else None


def _family(recordings: Recordings) -> Family:
    rows = tuple(each.row for each in recordings.learned)
    recorder, batches = recordings.recorder, recordings.recorder.row.batches
    quantized, once = _by_kind({path: rows for path, rows in recorder.rows.items() if path not in recorder.repeated})

    def call(module: nn.Module, inputs: Tensors) -> Tensor:
        call = recordings.call(module.drawn_cells)
        with traceable_forms():
            if batches is not None:
                return batches.call(module, **call.arguments(inputs))
            output: Tensor = module(**call.arguments(inputs), return_dict=False)[0]
            return output

    return Family(
        name=RECORDED,
        class_name=recordings.class_name,
        matches=lambda _: True,
        quantized=tuple((_but(recorder.idle, pattern), kind) for pattern, kind in quantized),
        kept=(
            PATCH_EMBED,
            *((re.escape(path), "no output hangs on what it gives") for path in recorder.idle),
            *((pattern, "runs once per picture: its error reaches every token") for pattern in once),
            *((pattern, "not run when its pipeline draws") for pattern in _patterns(recorder.not_run)),
            *((pattern, SEVERAL) for pattern in _patterns(sorted(recorder.repeated))),
            (BLOCK.pattern, "convolution or table of a block: these are computed in float"),
            (".*", "outside the repeated blocks"),
        ),
        inputs=lambda _: rows,
        call=call,
        conditioning=f"as {recorder.pipeline_class.__name__} gives them",
        tokens=recorder.most_tokens,
        binned="use_resolution_binning" in recorder.arguments,
        recordings=recordings,
    )


def _by_kind(rows: Mapping[str, bool]) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """(pattern, kind) of the linears in repeated blocks that see every token, and patterns of those that do not."""
    quantized, once = dict[str, str](), dict[str, None]()
    for path, sees_tokens in rows.items():
        if not BLOCK.fullmatch(path):
            continue
        pattern = any_block(path)
        if sees_tokens:
            quantized[pattern] = next(kind for ending, kind in ENDINGS if re.fullmatch(ending, path))
        else:
            once[pattern] = None
    return tuple(quantized.items()), tuple(once)


def _but(paths: Iterable[str], pattern: str) -> str:
    """The pattern, of all but these paths."""
    left_out = "|".join(rf"{re.escape(path)}$" for path in paths if re.fullmatch(pattern, path))
    return f"(?!{left_out}){pattern}" if left_out else pattern


def _patterns(paths: Iterable[str]) -> list[str]:
    """Of those in repeated blocks, each once."""
    return list(dict.fromkeys(any_block(path) for path in paths if BLOCK.fullmatch(path)))


def any_block(path: str) -> str:
    """Pattern of a linear's path in every block of its kind; numbers behind the block's stay as they are.

    >>> any_block("transformer_blocks.3.ff.net.2")
    'transformer_blocks\\\\.\\\\d+\\\\.ff\\\\.net\\\\.2'
    """
    block, _, rest = re.split(r"\.(\d+)\.", path, maxsplit=1)
    return rf"{re.escape(block)}\.\d+\.{re.escape(rest)}"
