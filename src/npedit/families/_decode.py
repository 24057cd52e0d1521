"""Decode large pictures in little memory, for every family alike: blocks that are computed again, and tiles.

- again: the backward pass computes each residual, attention and upsampling block of the VAE's decoder once more from
  its input, instead of keeping what is inside. Values are the same bit for bit. It works on what all decoders of
  diffusers share, a list `up_blocks` and perhaps a `mid_block`; diffusers' own switch is not offered for AutoencoderDC
  and AutoencoderKLQwenImage.
- tiles: windows of the latents, all of one size and evenly spread, are decoded one after the other and blended. Each is
  computed again as a whole in the backward pass, for which the picture's latents alone are kept. Neighbours overlap by
  a quarter of a tile or more, as in diffusers' `tiled_decode`; but the outer quarter of that overlap, where zeros stand
  in for what lies beyond the tile, is dropped, and the weight rises evenly over its middle half.

A tile's result differs from the whole's. Convolutions alone give the same but for rounding where their reach, in
pixels, is at most a sixteenth of a tile; where it is more, the difference is near the seams (below a twentieth of the
picture's standard deviation for random weights that reach four times as far: tests/families/test_decode.py). What looks
at all of its input differs everywhere: group norm (AutoencoderKL) takes its mean and variance from the tile,
attention (the middle block of AutoencoderKL and AutoencoderKLQwenImage, the linear attention in the deep stages of
AutoencoderDC) sees the tile alone. Colour and contrast can shift from tile to tile, blended at the seams. How much
depends on weights and picture, so no bound is given; compare with the whole before you trust small tiles.
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


def decode_latents(family: Family, latents: Tensor, tile: int = 0, again: bool = False) -> Tensor:
    """The family's `decode` of (b, c, h, w) to (b, 3, H, W), not clamped, with gradient.

    `tile` is the side of the tiles in pixels, rounded down to whole latents, and 0 the whole at once; a side of the
    picture that is no longer is not cut. `again` has the decoder's blocks computed again in the backward pass.

    Raises:
        UserError: the tile is too small, see `check_tile`.
    """
    check_tile(family.facts, tile)

    def run(part: Tensor) -> Tensor:
        if not again:
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
