"""Keep what an edit left unchanged as it is in the original picture, at the original's full size.

An editor works at 512 to 1024 pixels a side. Its result, scaled up, is blurred everywhere. Here the unchanged part
comes from the original, and only the changed part from the edited image.

A pixel counts as changed by the difference between the reference and the edited image, both at working size. That
difference is zero nowhere: the VAE shifts all colours a little, and loses detail where the picture has much. So

1. the shift, which is the same everywhere, is subtracted;
2. detail of single pixels is left out, since a VAE loses it, and the local difference of the rest is divided by the
   error expected from a VAE, a constant plus a share of the local contrast;
3. the threshold of this ratio depends on its own distribution in this picture;
4. a weak difference counts as changed where it touches a strong one, and small isolated spots do not count;
5. a weak difference over a wide area (a tone) counts as changed too.

Around the changed part the mask falls to zero over a border, so that there is no visible seam.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from npedit.data._photos import resize, to_pil

Finish = Callable[[Image.Image, Tensor, Tensor], Image.Image]  # as `scale_back`
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

MOST_CHANGED = 0.7  # the largest changed share of a picture for which the rest is taken from the original
LARGEST_SHIFT = 4 / 255  # of all colours together; a larger one is an edit
FINEST = 1.0  # pixels: what is finer is not compared, since a VAE loses it
FLAT_ERROR = 2.5 / 255  # root mean square error expected from a VAE where the picture is flat
CONTRAST_ERROR = 0.4  # the share of the local contrast that is added to it
STRONG = 1.2, 2.0  # the least and the largest threshold of the ratio; between them it is ...
UNCHANGED_QUANTILE, ABOVE_QUANTILE = 0.25, 2.5  # ... this multiple of this quantile, which the unchanged part has
WEAK = 0.65  # a ratio above this share of the threshold is changed where it touches a strong one
TONE = 4 / 255  # a difference over a wide area that counts as changed
STRIP_ROWS = 256  # of the full picture that are merged at a time


@dataclass(frozen=True)
class Change:
    """What an edit changed. `mask` (h, w) in [0, 1], at working size, is 1 where the edited image is taken and 0 where
    the original is. `share` is the share of the picture that changed. `shift` (3,) is how much brighter the edited
    image's colours are everywhere."""

    mask: Floats
    share: float
    shift: Floats

    def is_most(self) -> bool:
        """Whether too much changed to keep the rest: a style, a tone, another scene."""
        return self.share > MOST_CHANGED

    def warning(self, name: str) -> str:
        """A sentence that says why the edit of the picture `name` was scaled up; "" if it was not."""
        if not self.is_most():
            return ""
        return f"{self.share:.0%} of {name} changed, so no part is kept at full size: the edit is scaled up"


def scale_back(original: Image.Image, reference: Tensor, edited: Tensor) -> Image.Image:
    """The edited image, scaled to the original's size. Arguments are those of `keep_unchanged`."""
    return resize(to_pil(edited), (original.height, original.width))


def keep_unchanged(original: Image.Image, reference: Tensor, edited: Tensor) -> tuple[Image.Image, Change]:
    """The result of an edit in the original's size, with the unchanged part from the original; and what changed. Where
    most of the picture changed, the result is that of `scale_back`.

    `original` is an upright RGB picture of any size, `reference` (3, h, w) is `original` at working size, and `edited`
    (3, h, w) is its edit; values in [0, 1].
    """
    change = find_change(reference, edited)
    picture = scale_back(original, reference, edited) if change.is_most() else merge(original, edited, change)
    return picture, change


# ------------------------------------------------------------------------------------------------------ what changed


def find_change(reference: Tensor, edited: Tensor) -> Change:
    """What changed between two pictures (3, h, w) in [0, 1]."""
    before, after = _to_array(reference), _to_array(edited)
    difference = after - before
    shift = _common_shift(difference)
    difference -= shift
    unit = max(0.25, min(before.shape[:2]) / 256)  # pixels: 2 at a size of 512, 4 at 1024
    changed = _changed_pixels(before, difference, unit)
    return Change(_soft_mask(changed, unit), float(changed.mean()), shift)


def _to_array(image: Tensor) -> Floats:
    return np.ascontiguousarray(image.detach().float().cpu().permute(1, 2, 0).numpy())


def _common_shift(difference: Floats) -> Floats:
    """The median of each channel (3,) over the pixels that can be unchanged. It is zero if these are few, or if the
    median is so large that it is part of the edit."""
    small = np.abs(difference).max(-1) <= 3 * LARGEST_SHIFT
    if small.mean() < 1 - MOST_CHANGED:
        return np.zeros(3, np.float32)
    shift = np.median(difference[small], axis=0).astype(np.float32)
    return shift if np.abs(shift).max() <= LARGEST_SHIFT else np.zeros_like(shift)


def _changed_pixels(before: Floats, difference: Floats, unit: float) -> Bools:
    ratio = _error_ratio(before, difference, unit)
    threshold = float(np.clip(ABOVE_QUANTILE * np.quantile(ratio, UNCHANGED_QUANTILE), *STRONG))
    changed = _strong_regions(ratio > threshold, ratio > WEAK * threshold)
    changed = _remove_spots(changed, ratio / threshold, unit)
    changed |= _wide_difference(difference, ~changed, unit) > TONE
    return _close_gaps(changed, max(2, round(2 * unit)))


def _error_ratio(before: Floats, difference: Floats, unit: float) -> Floats:
    """The local difference (h, w) in units of the error that is expected of a VAE."""
    size = np.sqrt(_blur((_blur(difference, FINEST) ** 2).mean(-1), unit))
    contrast = np.sqrt(_blur(((before - _blur(before, unit)) ** 2).mean(-1), unit))
    return (size / (FLAT_ERROR + CONTRAST_ERROR * contrast)).astype(np.float32)


def _strong_regions(strong: Bools, weak: Bools) -> Bools:
    """The connected parts of `weak` in which a pixel is strong."""
    return ndimage.binary_propagation(strong, np.ones((3, 3)), mask=weak)


def _remove_spots(changed: Bools, weight: Floats, unit: float) -> Bools:
    """The connected parts whose summed weight is more than that of a spot just above the threshold."""
    labels, count = ndimage.label(changed, np.ones((3, 3)))
    sums = ndimage.sum_labels(weight, labels, np.arange(count + 1))
    is_kept = np.asarray(sums) > (4 * unit) ** 2
    is_kept[0] = False
    return is_kept[labels]


def _wide_difference(difference: Floats, unchanged: Bools, unit: float) -> Floats:
    """The mean difference (h, w) over a wide area, of the pixels that count as unchanged so far."""
    weight = unchanged.astype(np.float32)
    total = _blur(difference * weight[..., None], 6 * unit)
    return np.sqrt((total**2).mean(-1)) / np.maximum(_blur(weight, 6 * unit), 0.05)


def _close_gaps(changed: Bools, width: int) -> Bools:
    padded = np.pad(changed, width, "edge")
    return ndimage.binary_closing(padded, iterations=width)[width:-width, width:-width]


def _blur(values: Floats, sigma: float) -> Floats:
    sigmas = (sigma, sigma, 0)[: values.ndim]
    return ndimage.gaussian_filter(values, sigmas, output=np.float32, mode="nearest", truncate=3)


def _soft_mask(changed: Bools, unit: float) -> Floats:
    """1 at the changed pixels and a little around them, then down to 0 over the border's width."""
    if not changed.any():
        return np.zeros(changed.shape, np.float32)
    distance = ndimage.distance_transform_edt(~changed).astype(np.float32)
    x = np.clip((distance - max(1, 2 * unit)) / max(2, 6 * unit), 0, 1)
    return 1 - x * x * (3 - 2 * x)


# ------------------------------------------------------------------------------------------------------------ merge


def merge(original: Image.Image, edited: Tensor, change: Change) -> Image.Image:
    """The original with the changed part of `edited` (3, h, w) over it. Pixels where the mask is 0 are the original's,
    bit by bit. The full picture is merged in strips: beside original and result, only one strip is in memory."""
    out = original.copy()
    small = to_pil(edited - edited.new_tensor(change.shift.tolist())[:, None, None])
    mask = mask_image(change)
    if (box := mask.getbbox()) is None:
        return out
    across, down = original.width / mask.width, original.height / mask.height
    left, right = _span(box[0], box[2], across, original.width)
    top, bottom = _span(box[1], box[3], down, original.height)
    for y in range(top, bottom, STRIP_ROWS):
        end = min(y + STRIP_ROWS, bottom)
        part = (left / across, y / down, right / across, min(end / down, mask.height))
        size = (right - left, end - y)
        layer = small.resize(size, Image.Resampling.LANCZOS, box=part)
        out.paste(layer, (left, y), mask.resize(size, Image.Resampling.BILINEAR, box=part))
    return out


def _span(start: int, end: int, scale: float, most: int) -> tuple[int, int]:
    """First and last pixel at full size that the mask's pixels `start` to `end` can reach."""
    return max(0, int((start - 1) * scale)), min(most, int(np.ceil((end + 1) * scale)))


def mask_image(change: Change, size: tuple[int, int] | None = None) -> Image.Image:
    """The mask as a grey picture, white where the edited image is taken; in (width, height), or at working size."""
    image = Image.fromarray(np.round(change.mask * 255).astype(np.uint8))
    return image if size is None else image.resize(size, Image.Resampling.BILINEAR)
