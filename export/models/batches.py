"""Transformers of diffusers that take a list with a tensor for each picture, called with one tensor of all pictures.

Their code makes lists and numbers of the lengths of prompts, which no graph has for any number of pictures and tokens.
What is done here gives the same numbers but for roundings: tokens that a shorter prompt lacks are masked in attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from export.errors import RecipeError
from export.models.families import MOST_TOKENS
from export.models.traceable_forms import ComplexPair, joined

LATENTS, PROMPTS, MASK, TIMESTEP = "hidden_states", "encoder_hidden_states", "encoder_attention_mask", "timestep"
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Batches:
    """How a class is called with tensors. packed: the arguments of its forward with tensors in the places of lists.
    call: its forward on these, whose result has a row for each picture. prepare: what is done to a module before that.
    """

    packed: Callable[[Arguments], dict[str, object]]
    call: Callable[..., Tensor]
    prepare: Callable[[nn.Module], None]


# --- Z-Image -------------------------------------------------------------------------------------------------------

PATCH, FRAMES = 2, 1  # of a token, as its pipeline calls it
MULTIPLE = 32  # of which the number of tokens of a picture, and of a prompt, is filled up to one with learned tokens


def _packed_z_image(arguments: Arguments) -> dict[str, object]:
    """x: a list of [C, F, H, W]; cap_feats: a list of [tokens, C]. A prompt of all pictures is as long as the longest,
    and its mask says which tokens of it there are. Raises RecipeError for lists of other things."""
    known = ("x", "t", "cap_feats")
    others = {name: value for name, value in arguments.items() if name not in known and value is not None}
    latents, prompts = list(arguments["x"]), list(arguments["cap_feats"])
    if not all(isinstance(part, Tensor) for part in (*latents, *prompts)) or len({row.shape for row in latents}) != 1:
        raise RecipeError(
            "x is not a list of latents of one size, or cap_feats not one of prompts; pictures that go into others are "
            "not compiled, use the float transformer"
        )
    ones = [prompt.new_ones(len(prompt)) for prompt in prompts]
    return {
        LATENTS: torch.stack(latents),
        TIMESTEP: arguments["t"],
        PROMPTS: pad_sequence(prompts, batch_first=True),
        MASK: pad_sequence(ones, batch_first=True),
        **others,
    }


def _prepare_z_image(module: Any) -> None:
    """Tables of positions are computed at the first call otherwise; those of a prompt's tokens, and of a picture behind
    it, go on to MOST_TOKENS."""
    embedder = module.rope_embedder
    ends = [max(embedder.axes_lens[0], MOST_TOKENS + 2 * MULTIPLE), *embedder.axes_lens[1:]]
    tables = embedder.precompute_freqs_cis(embedder.axes_dims, ends, theta=embedder.theta)
    module.position_tables = [ComplexPair(table.real.clone(), table.imag.clone()) for table in tables]


def _call_z_image(
    module: Any, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor
) -> Tensor:
    """[B, C, F, H, W] for latents of that shape, timesteps [B], prompts [B, tokens, C] and their mask [B, tokens]."""
    condition = module.t_embedder(timestep * module.t_scale).type_as(hidden_states)
    # A prompt has its tokens and learned ones up to a multiple; behind it, nothing.
    count = encoder_attention_mask.sum(dim=1).to(torch.int64)
    filled = (count + MULTIPLE - 1) // MULTIPLE * MULTIPLE
    tokens = encoder_hidden_states.shape[1] + MULTIPLE - 1
    places = torch.arange(tokens, device=count.device)[None]
    padding = module.cap_pad_token
    prompts = module.cap_embedder(encoder_hidden_states)
    more = padding.expand(prompts.shape[0], MULTIPLE - 1, padding.shape[-1])
    prompts = torch.where((places < count[:, None])[..., None], torch.cat([prompts, more], dim=1), padding)
    there = places < filled[:, None]

    frames = hidden_states.shape[2]
    of_prompts, of_picture = _positions(module, tokens, filled + 1, (frames, *hidden_states.shape[3:]))
    x = module.all_x_embedder[f"{PATCH}-{FRAMES}"](_patches(hidden_states))
    cells = x.shape[1]
    if more_cells := -cells % MULTIPLE:
        x = torch.cat([x, module.x_pad_token.expand(x.shape[0], more_cells, x.shape[-1])], dim=1)

    for layer in module.noise_refiner:
        x = layer(x, None, of_picture, condition)
    for layer in module.context_refiner:
        prompts = layer(prompts, there, of_prompts)
    rows = torch.cat([there.new_ones(x.shape[:2]), there], dim=1)
    positions = joined([of_picture, of_prompts.expand(x.shape[0], -1, -1)], dim=1)
    both = torch.cat([x, prompts], dim=1)
    for layer in module.layers:
        both = layer(both, rows, positions, condition)
    result = module.all_final_layer[f"{PATCH}-{FRAMES}"](both, c=condition)
    return _pictures(result[:, :cells], hidden_states.shape)


def _patches(latents: Tensor) -> Tensor:
    """[B, C, F, H, W] -> [B, cells, channels of a token]."""
    batch, channels, frames, height, width = latents.shape
    split = latents.view(batch, channels, frames, FRAMES, height // PATCH, PATCH, width // PATCH, PATCH)
    return split.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(batch, -1, FRAMES * PATCH * PATCH * channels)


def _pictures(tokens: Tensor, shape: torch.Size) -> Tensor:
    """[B, cells, channels of a token] -> the shape of latents, [B, C, F, H, W]."""
    batch, channels, frames, height, width = shape
    split = tokens.view(batch, frames, height // PATCH, width // PATCH, FRAMES, PATCH, PATCH, channels)
    return split.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(shape)


def _positions(module: Any, tokens: int, first: Tensor, size: tuple[int, int, int]) -> tuple[ComplexPair, ComplexPair]:
    """Rotary positions [1, tokens, D] of a prompt and [B, cells, D] of pictures, whose first frames are `first` [B],
    filled up to a multiple. Prompts go along the axis of frames."""
    by_frame, by_row, by_column = module.position_tables
    frames, rows, columns = size[0] // FRAMES, size[1] // PATCH, size[2] // PATCH
    zero = [table[:1].expand(tokens, -1) for table in (by_row, by_column)]
    of_prompts = joined([by_frame[1 : tokens + 1], *zero], dim=-1).unsqueeze(0)

    batch = first.shape[0]
    of_frames = by_frame[first[:, None] + torch.arange(frames, device=first.device)]  # [B, frames, D]
    grid = (
        of_frames.view(batch, frames, 1, 1, -1),
        by_row[:rows].view(1, 1, rows, 1, -1),
        by_column[:columns].view(1, 1, 1, columns, -1),
    )
    parts = [part.expand(batch, frames, rows, columns, -1) for part in grid]
    cells = frames * rows * columns
    of_picture = joined(parts, dim=-1).reshape(batch, cells, -1)
    if more_cells := -cells % MULTIPLE:
        origin = joined([table[:1] for table in module.position_tables], dim=-1)
        of_picture = joined([of_picture, origin.unsqueeze(0).expand(batch, more_cells, -1)], dim=1)
    return of_prompts, of_picture


Z_IMAGE = Batches(_packed_z_image, _call_z_image, _prepare_z_image)
