"""Reading pictures: one module for training, editing, benchmarks and judges.

Every picture that is read becomes upright, 8 bits a channel, sRGB, and RGB (or RGBA where transparency is asked for):

- Orientation comes from EXIF. Broken EXIF data count as none.
- An embedded colour profile (ICC) is converted to sRGB. A profile that cannot be used is reported in the log, and the
  picture counts as sRGB. A picture without a profile counts as sRGB.
- Values of more than 8 bits are scaled by the range that the file declares (12 or 16 bits, signed or not). A 32-bit
  integer TIFF declares none that is of use, see `_to_8_bits`.
- Transparent pictures are composited on white; with `keep_alpha` they keep their alpha channel.

Deviation from the reimplementation, which resizes the short side and pads with black: a crop here fills its size.
"""

from __future__ import annotations

import io
import logging
import math
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile
from torch import Tensor

from npedit.errors import UserError

log = logging.getLogger(__name__)

MAX_PIXELS = 100_000_000
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")  # formats whose files with several frames are animations
ORIENTATION = 0x0112  # EXIF; the TIFF tags below are those of the TIFF 6.0 specification
NOT_OPENED = ("EPS",)  # Pillow would run Ghostscript on such a file: the program that stands in it
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
UPRIGHT = {  # EXIF orientation -> the transposition that turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = (5, 6, 7, 8)


class BadImage(Exception):
    """A picture that cannot be used; the message is the reason."""


# --------------------------------------------------------------------------------------------------------- decoding


@contextmanager
def decoding() -> Iterator[None]:
    """A boundary around decoders: inside the block, whatever a decoder raises becomes a `BadImage`, and Pillow's
    warnings are not shown. Lack of memory and interruptions pass.

    Raises:
        BadImage: the decoder failed.
    """
    try:
        with _quiet_pillow:
            yield
    except (BadImage, UserError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImage("not a picture, or a format that is unknown here") from error
    except Exception as error:  # noqa: BLE001 - decoders are foreign code and raise what they like; no list is complete
        raise BadImage(f"{type(error).__name__}: {error}") from error


class _QuietPillow:
    """A context manager that hides the warnings and log messages of Pillow's modules. Many threads may be inside at
    once, where `warnings.catch_warnings` alone would leave its filters behind."""

    def __init__(self) -> None:
        self._lock, self._depth = threading.Lock(), 0
        self._log, self._level = logging.getLogger("PIL"), logging.NOTSET
        self._filters: warnings.catch_warnings[Any] | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._level = self._log.level
                self._log.setLevel(logging.CRITICAL)
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0 and self._filters is not None:
                self._filters.__exit__(None, None, None)
                self._log.setLevel(self._level)


_quiet_pillow = _QuietPillow()


def read_photo(source: Path | bytes, max_pixels: int = MAX_PIXELS, keep_alpha: bool = False) -> Image.Image:
    """A picture at its full size: upright, 8 bits, sRGB; RGB, or RGBA with `keep_alpha` if anything is transparent.

    `source` is a file or a file's bytes.

    Raises:
        BadImage: missing, empty, not an image, too large, or broken.
    """
    with decoding():
        with _open_image(source) as image:
            _check_pixels(image, max_pixels)
            refuse_animation(image)
            image.load()
            return to_srgb(image, keep_alpha)


def read_photo_size(source: Path | bytes | IO[bytes], max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(H, W) of a photo as it is shown, read from its header. `source` is a file's path, its bytes, or the open file.

    Raises:
        BadImage: missing, empty, not an image, too large, or broken as far as the header tells.
    """
    with decoding():
        with _open_image(source) as image:
            _check_pixels(image, max_pixels)
            width, height = image.size
            # A PNG's orientation may be stored after its pixels. It is not read: any photo fits any bucket, cropped.
            # Pillow gives the size of a TIFF as it is shown, that of every other format as it is stored.
            is_shown = image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info)
            swapped = not is_shown and _orientation(image) in SWAPS_SIDES
            refuse_animation(image)
            image.verify()
    return (width, height) if swapped else (height, width)


def load_photo(source: Path | bytes, size: tuple[int, int]) -> Tensor:
    """A photo as a training reference: (3, H, W) in [0, 1], `to_srgb`, cropped and scaled to `size` = (H, W). `source`
    is a file or a file's bytes.

    Raises:
        BadImage: it cannot be decoded.
    """
    with decoding():
        with _open_image(source) as image:
            image.draft(None, (2 * max(size), 2 * max(size)))  # JPEG alone: decode a large photo at a fraction of it
            pixels = np.array(crop_to_fill(to_srgb(image), size))
    # Plain numpy: torch would wake all its threads for each of these small steps, which takes several times as long.
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32, order="C") / np.float32(255))


def open_image(source: Path | bytes | IO[bytes]) -> ImageFile.ImageFile:
    """A picture whose pixels are not decoded yet, as Pillow opens it, but not of a format in `NOT_OPENED`: its name may
    end in .jpg. To be called within `decoding`."""
    Image.init()
    formats = [name for name in Image.OPEN if name not in NOT_OPENED]
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)


def _open_image(source: Path | bytes | IO[bytes]) -> Image.Image:
    if isinstance(source, Path):
        _require_file(source)
    elif source == b"":
        raise BadImage("an empty file")
    return open_image(source)


def _require_file(path: Path) -> None:
    try:
        if not path.is_file():
            raise BadImage("no such file")
        if not path.stat().st_size:
            raise BadImage("an empty file")
    except (OSError, ValueError) as error:  # a name that the file system does not take
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise BadImage(f"zero-sized: {width} x {height}")
    if width * height > max_pixels:
        raise BadImage(f"{width} x {height} pixels are more than max_pixels = {max_pixels}")


def refuse_animation(image: Image.Image) -> None:
    """Do nothing for an open picture of one frame. The pages of a TIFF and the views of a stereo JPEG are no frames.

    Raises:
        BadImage: it is an animation: which frame is meant is not known.
    """
    if image.format in ANIMATED and getattr(image, "is_animated", False):
        frames = getattr(image, "n_frames", 1)
        raise BadImage(f"an animation of {frames} frames; save the frame that is meant as a picture of its own")


# ----------------------------------------------------------------------------------------------------------- cutting


def crop_and_scale(photo: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """(share of the photo's area that a crop to the shape of `size` keeps, factor by which its sides are enlarged);
    both sizes are (H, W)."""
    scale = min(photo[1] / size[1], photo[0] / size[0])
    return size[0] * size[1] * scale**2 / (photo[0] * photo[1]), 1 / scale


def crop_to_fill(
    image: Image.Image, size: tuple[int, int], filter_: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """The largest centred crop of the shape `size` = (H, W), scaled to it. Every pixel comes from the picture."""
    height, width = size
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    box = (max(left, 0), max(top, 0), min(left + width * scale, image.width), min(top + height * scale, image.height))
    return image.resize((width, height), filter_, box=box)


def nearest_size(size: tuple[int, int], trained: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The trained (height, width) of the nearest shape; of those, the nearest in area."""
    shape, area = math.log(size[0] / size[1]), math.log(size[0] * size[1])
    return min(trained, key=lambda s: (round(abs(math.log(s[0] / s[1]) - shape), 3), abs(math.log(s[0] * s[1]) - area)))


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale to (height, width): whole-number reductions by averaging (the inverse of a pixel-block enlargement), others
    with Lanczos."""
    h, w = size
    if (image.height, image.width) == size:
        return image
    whole = image.height % h == 0 and image.width % w == 0
    return image.resize((w, h), Image.Resampling.BOX if whole else Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture -> (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) -> an RGB picture; values outside [0, 1] are clipped."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu()
    return Image.fromarray(pixels.numpy())


# --------------------------------------------------------------------------------------------------------- to sRGB


def to_srgb(image: Image.Image, keep_alpha: bool = False) -> Image.Image:
    """Any picture as 8-bit sRGB, upright: RGB composited on white, or RGBA with `keep_alpha` if anything is
    transparent. EXIF data and colour profile are removed.

    Raises:
        BadImage: it cannot be decoded, holds floating-point values, or 32-bit integers of unknown range.
    """
    with decoding():
        image.load()  # a PNG's EXIF data may stand behind its pixels
        icc, name = image.info.get("icc_profile"), str(getattr(image, "filename", "") or "a picture")
        turn = UPRIGHT.get(_orientation(image))
        image = _to_8_bits(image)
        if turn is not None:
            image = image.transpose(turn)
        if image.has_transparency_data:
            out = _convert_transparent(image, keep_alpha, icc, name)
        else:
            out = _convert_colours(image, icc, name)
        out.info = {}
        return out


def _convert_transparent(image: Image.Image, keep_alpha: bool, icc: bytes | None, name: str) -> Image.Image:
    image = image.convert("LA" if image.mode in ("L", "LA", "La") else "RGBA")
    alpha = image.getchannel("A")
    colours = _convert_colours(image.convert("L" if image.mode == "LA" else "RGB"), icc, name)
    if alpha.getextrema() == (255, 255):
        return colours
    colours.putalpha(alpha)
    return colours if keep_alpha else composite_on_white(colours)


def composite_on_white(image: Image.Image) -> Image.Image:
    """An RGBA picture composited on white, as RGB."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


@lru_cache(maxsize=1)
def srgb_profile() -> bytes:
    """The ICC profile of sRGB, to be written into a picture's file; the same bytes at every call."""
    made = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    made[24:36] = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)  # the date in its header (ICC.1:2022, 7.2.10): else today's
    return bytes(made)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where EXIF data are missing or broken."""
    try:
        with decoding():
            found = image.getexif().get(ORIENTATION, 1)
    except BadImage:
        return 1
    return found if found in UPRIGHT else 1


def _to_8_bits(image: Image.Image) -> Image.Image:
    """The picture with 8 bits a channel. Integers of more bits are scaled by the range that the file declares.

    A 32-bit integer TIFF says 32 bits whatever its values are. Values up to 255 count as 8 bits, up to 65535 as 16
    bits, and those that reach 2^24 as 32 bits.

    Raises:
        BadImage: floating-point values, negative ones, or 32-bit values between these ranges.
    """
    if image.mode == "F":
        raise BadImage("expected integer values; got floating-point ones, whose range is unknown; save it with 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    tags = getattr(image, "tag_v2", {})
    signed = _first_int(tags.get(SAMPLE_FORMAT), 1) == 2
    bits = _first_int(tags.get(BITS_PER_SAMPLE), 16)
    if bits == 32:
        values, bits = _guess_range(values, signed)
    if values.min(initial=0) < 0:
        raise BadImage(f"expected values from 0; got {values.min()}, below black; save it with 16 bits, unsigned")
    most = 2 ** (bits - (signed and bits > 8)) - 1
    if _first_int(tags.get(PHOTOMETRIC), 1) == 0:  # 0 is white; Pillow turns this round for 8 bits alone
        values = most - values
    return Image.fromarray((values.clip(0, most) * (255 / most)).round().astype(np.uint8))


def _guess_range(values: np.ndarray, signed: bool) -> tuple[np.ndarray, int]:
    """32-bit values and how many bits of them are in use; see `_to_8_bits`."""
    values = values if signed else values % 2**32  # Pillow reads unsigned ones as signed
    most = int(values.max(initial=0))
    for bits in (8, 16):
        if most < 2**bits:
            return values, bits + (signed and bits > 8)
    if most < 2**24:
        raise BadImage(f"expected values of 8, 16 or 32 bits; got a maximum of {most}; save it with 16 bits")
    return values, 32


def _first_int(value: Any, default: int) -> int:
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else default


def _convert_colours(image: Image.Image, icc: bytes | None, name: str) -> Image.Image:
    """The picture as RGB in sRGB; `icc` is its colour profile, `name` is its name in a message."""
    if not icc:
        return image.convert("RGB")
    kind = {"CMYK": "CMYK", "L": "GRAY", "1": "GRAY"}.get(image.mode, "RGB")
    mode, transform = _transform_to_srgb(icc, kind, name)
    if transform is None:
        return image.convert("RGB")
    converted = ImageCms.applyTransform(image.convert(mode), transform)
    assert converted is not None  # it would be with inPlace alone
    return converted


@lru_cache(maxsize=64)
def _transform_to_srgb(icc: bytes, kind: str, name: str) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """(mode of the pictures that a profile is for, its transform to sRGB); None where that changes no colour by more
    than one step of 255, and where the profile cannot be used, which is reported."""
    try:
        with decoding():
            return _build_transform(icc, kind)
    except BadImage as error:
        log.warning("%s: its colour profile cannot be used (%s); it is read as sRGB", name, error)
        return "RGB", None


def _build_transform(icc: bytes, kind: str) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """`kind` is RGB, GRAY or CMYK. A grey picture may have an RGB profile too."""
    profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    space = profile.profile.xcolor_space.strip()
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space)
    if mode is None or space not in (kind, "RGB" if kind == "GRAY" else kind):
        raise BadImage(f"it is for {space} pictures")
    transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode != "CMYK":
        steps = np.arange(0, 256, 15, dtype=np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
        probe = Image.fromarray(grid if mode == "RGB" else grid[..., 0])
        moved = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int) - np.asarray(probe.convert("RGB"))
        if abs(moved).max() <= 1:
            return mode, None
    return mode, transform
