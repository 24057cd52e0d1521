"""Photos that cannot be used, and photos of unusual kinds that can: each a file in a folder."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (64, 48)  # width, height of the good pictures
RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
Colours = tuple[tuple[int, int, int], tuple[int, int, int]]  # of the left and of the right half


def halves(mode: str, left: Any, right: Any, size: tuple[int, int] = SIZE) -> Image.Image:
    """A picture with a colour on the left and one on the right."""
    picture = Image.new(mode, size, right)
    picture.paste(left, (0, 0, size[0] // 2, size[1]))
    return picture


def noise(size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(kind: str, picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, with no pixels to match."""

    def chunk(name: bytes, content: bytes = b"") -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND")


def animation(kind: str) -> bytes:
    return encoded(kind, noise(), save_all=True, append_images=[noise(seed=1)])


def floats() -> bytes:
    return encoded("TIFF", Image.fromarray(np.ones(SIZE[::-1], np.float32)))


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


# File name -> its content, or what makes the file.
BAD: dict[str, bytes | Callable[[Path], None]] = {
    "missing.png": lambda path: None,
    "empty.jpg": b"",
    "page.jpg": b"<html>404 Not Found</html>",
    "folder.png": lambda path: path.mkdir(),
    "loop.png": link_to_itself,
    "cut.jpg": encoded("JPEG", noise((256, 256)))[:9000],
    "cut.png": encoded("PNG", noise((256, 256)))[:9000],
    "moving.gif": animation("GIF"),
    "moving.png": animation("PNG"),
    "moving.webp": animation("WEBP"),
    "pixel.png": encoded("PNG", noise((1, 1))),
    "strip.png": encoded("PNG", noise((40_000, 20))),
    "huge.png": png_header(40_000, 40_000),
    "nothing.png": png_header(0, 64),
    "floats.tif": floats(),
}


def write_bad(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = BAD[name]
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        content(folder / name)
    return folder / name


def write_good(folder: Path) -> dict[str, Colours]:
    """One file of each unusual kind; returns the colours that each shows when it is read rightly."""
    folder.mkdir(parents=True, exist_ok=True)
    rotated, exif = halves("RGB", RED, BLUE).transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # it must be turned by 90 degrees clockwise
    deep = np.full(SIZE[::-1], 65535, np.uint16)
    deep[:, : SIZE[0] // 2] = 32768
    palette = halves("P", 0, 1)
    palette.putpalette([*RED, *BLUE])
    made: dict[str, tuple[Image.Image, dict[str, Any], Colours]] = {
        "sixteen.png": (Image.fromarray(deep), {}, ((128, 128, 128), WHITE)),
        "sixteen.tif": (Image.fromarray(deep), {}, ((128, 128, 128), WHITE)),
        "cmyk.tif": (halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), {}, (RED, BLUE)),
        "palette.png": (palette, {}, (RED, BLUE)),
        "palette_clear.png": (palette, {"transparency": 1}, (RED, WHITE)),
        "palette.gif": (palette, {}, (RED, BLUE)),
        "alpha.png": (halves("RGBA", (*RED, 255), (*BLUE, 128)), {}, (RED, (127, 127, 255))),
        "grey_alpha.png": (halves("LA", (0, 255), (0, 0)), {}, (BLACK, WHITE)),
        "bits.png": (halves("1", 0, 1), {}, (BLACK, WHITE)),
        "rotated.jpg": (rotated, {"exif": exif, "quality": 95, "subsampling": 0}, (RED, BLUE)),
        "rotated.png": (rotated, {"exif": exif}, (RED, BLUE)),
    }
    for name, (picture, options, _) in made.items():
        picture.save(folder / name, **options)
    return {name: colours for name, (_, _, colours) in made.items()}


def colours_of(picture: Image.Image) -> tuple[list[float], list[float]]:
    """The mean colours of the left and of the right half, away from the border between them."""
    pixels = np.asarray(picture.convert("RGB"), np.float64)
    quarter = pixels.shape[1] // 4
    left, right = pixels[:, : quarter + 1], pixels[:, -quarter - 1 :]
    return left.mean((0, 1)).tolist(), right.mean((0, 1)).tolist()
