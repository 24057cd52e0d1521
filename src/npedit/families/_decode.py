"""Decode large pictures with little memory. Works for every family, in two ways that can be combined.

Checkpointing: the backward pass computes each residual, attention and upsampling block of the VAE's decoder again from
the block's input, so that the values inside the block are not kept. The decoded pictures are equal bit for bit. This
works for all decoders of diffusers, which have a list `up_blocks` and in some cases a `mid_block`. diffusers' own
gradient checkpointing does not exist for AutoencoderDC and AutoencoderKLQwenImage.

Tiles: windows of the latents, all of one size and evenly spaced, are decoded one after the other and blended. The
backward pass computes each tile again, so only the latents of the picture are kept. Neighbouring tiles overlap by a
quarter of a tile or more, as in diffusers' `tiled_decode`. The outer quarter of the overlap is not used, because zero
padding affects it. The weight of a tile rises linearly over the middle half of the overlap.

A picture that is decoded in tiles differs from one that is decoded at once:
- Convolutions give the same result except for rounding, if their receptive field in pixels is at most a sixteenth of a
  tile. Otherwise the pictures differ near the seams. For random weights with a receptive field four times as large, the
  difference is below a twentieth of the picture's standard deviation (tests/families/test_decode.py).
- Group norm (AutoencoderKL) takes its mean and variance from the tile, and attention (middle block of AutoencoderKL and
  AutoencoderKLQwenImage, linear attention in the deep stages of AutoencoderDC) uses the tile only. So colour and
  contrast can change from tile to tile; blending makes the change gradual. The size of this effect depends on weights
  and picture, and no bound is known. Compare with a picture that is decoded at once before you use small tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from npedit.errors import UserError
from npedit.families.base import Family, ModelProperties

MIN_TILE_LATENTS = 4  # latents along a tile's side: fewer leave no overlap
recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # a frozen decoder draws nothing


def decode_latents(family: Family, latents: Tensor, tile: int = 0, checkpointing: bool = False) -> Tensor:
    """The family's `decode` of (b, c, h, w) to (b, 3, H, W), not clamped, with gradient.

    `tile` is the side of the tiles in pixels, rounded down to a whole number of latents; 0 decodes the picture at once.
    A side of the picture that is not longer than a tile is not divided. With `checkpointing` the backward pass computes
    the decoder's blocks again.

    Raises:
        UserError: the tile is too small, see `check_tile`.
    """
    check_tile(family.facts, tile)

    def run(part: Tensor) -> Tensor:
        if not checkpointing:
            return family.decode(part)
        with _gradient_checkpointing(family.pipe.vae.decoder):
            return family.decode(part)

    stride, size = family.facts.stride, tuple(latents.shape[2:])
    sides = [min(side, tile // stride) if tile else side for side in size]
    if tuple(sides) == size:
        return run(latents)
    (rows, down), (columns, across) = (
        _tile_layout(side, length, stride, latents.device) for side, length in zip(size, sides, strict=True)
    )
    out = latents.new_zeros(len(latents), 3, *(stride * side for side in size), dtype=torch.float32)
    for top, high in zip(rows, down, strict=True):
        for left, wide in zip(columns, across, strict=True):
            piece = recompute(run, latents[:, :, top : top + sides[0], left : left + sides[1]])
            place = out[:, :, stride * top : stride * (top + sides[0]), stride * left : stride * (left + sides[1])]
            place += piece.float() * (high[:, None] * wide)
    return out.to(piece.dtype)


def check_tile(facts: ModelProperties, tile: int) -> None:
    """Refuse tiles that a family cannot overlap.

    Raises:
        UserError: the side in pixels is neither 0 nor at least `MIN_TILE_LATENTS` latents.
    """
    least = MIN_TILE_LATENTS * facts.stride
    if tile and tile < least:
        raise UserError(
            f"expected tiles of at least {least} pixels, {MIN_TILE_LATENTS} of this family's latents, or 0 for the "
            f"whole picture; got {tile}; change memory.decode_tile (or --tile)"
        )


def _tile_layout(side: int, length: int, stride: int, device: torch.device) -> tuple[list[int], list[Tensor]]:
    """Where tiles of `length` latents begin along a side of `side` latents, and the weight of each tile's pixels
    (length * stride,) in float32; at every pixel the weights sum to 1."""
    if length == side:
        return [0], [torch.ones(side * stride, device=device)]
    overlap = length // 4
    count = -(-(side - overlap) // (length - overlap))
    starts = [i * (side - length) // (count - 1) for i in range(count)]
    pixels = torch.arange(length * stride, dtype=torch.float32, device=device) + 0.5
    rise = ((pixels / (overlap * stride)) * 2 - 0.5).clamp(0, 1)
    weights, total = [], torch.zeros(side * stride, device=device)
    for i, start in enumerate(starts):
        weight = torch.ones_like(rise) if i == 0 else rise
        weights.append(weight if i + 1 == count else weight * rise.flip(0))
        total[start * stride : (start + length) * stride] += weights[-1]
    return starts, [w / total[s * stride : (s + length) * stride] for s, w in zip(starts, weights, strict=True)]


def _decoder_blocks(decoder: Any) -> Iterator[nn.Module]:
    """The residual, attention and upsampling blocks of a decoder: what is in its stages' lists, or in a stage that is
    itself a sequence."""
    middle = [decoder.mid_block] if hasattr(decoder, "mid_block") else []
    for stage in (*middle, *decoder.up_blocks):
        for blocks in [stage] if isinstance(stage, nn.Sequential) else stage.children():
            yield from blocks.children()


@contextmanager
def _gradient_checkpointing(decoder: nn.Module) -> Iterator[None]:
    """Inside the block, a call of one of the decoder's blocks keeps its input alone for the backward pass."""
    blocks = list(_decoder_blocks(decoder))
    for block in blocks:
        block.forward = partial(recompute, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
