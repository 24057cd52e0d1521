"""What a request may be: bytes, formats, pixels, lengths. Bad input is refused before it reaches the queue."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

from PIL import Image

from npedit.data._photos import BadImage, decoding, refuse_animation
from npedit.errors import UserError
from npedit.input_pictures import check_size, to_rgb
from npedit.serve.memory import MemoryFull, PictureMemory, memory_needed

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # that are decoded; Pillow is not asked for any other
MOST_PROFILE_BYTES = 4 * 2**20  # of a colour profile; profiles are kept in a cache
MOST_SCANS = (
    100  # of a JPEG file. Each scan goes over all pixels, and needs few bytes; cameras and tools write up to 15
)
START_OF_SCAN = b"\xff\xda"


@dataclass(frozen=True)
class Limits:
    """The largest request: bytes of its body, pixels of one picture, characters of an instruction, steps, results of
    one request, further references. `memory` counts the pictures of all requests."""

    bytes: int = 32 * 2**20
    pixels: int = 50_000_000
    characters: int = 2000
    steps: int = 16
    results: int = 4
    references: int = 3
    memory: PictureMemory = field(default_factory=PictureMemory)


class BadRequest(UserError):
    """A request that cannot be served: `status` is the HTTP status, `param` the field that is wrong."""

    def __init__(self, message: str, param: str = "", status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


def read_picture(data: bytes, limits: Limits, param: str = "image", results: int = 1) -> Image.Image:
    """The upright RGB picture in a file's bytes. The size is read from the file's head, and the pixels are decoded only
    if they are few enough. `results` is the number of edits of this picture that are asked for.

    Raises:
        BadRequest: it is no picture of `FORMATS`, broken, an animation, or too large; or the pictures of other requests
            need the memory.
    """
    if not data:
        raise BadRequest(f"expected a picture in {param!r}; got an empty file", param)
    try:
        with decoding():
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            refuse_animation(image)
            _check_pixels(image, limits, param)
            _check_cost(image, data, param)
            _check_memory(image, limits, param, results)
        return limits.memory.decode(lambda: to_rgb(image), image.width * image.height, results)
    except BadRequest:
        raise
    except MemoryFull:
        raise BadRequest("too many large pictures wait; try again later", param, 429) from None
    except (BadImage, UserError) as error:
        raise BadRequest(f"expected a picture ({', '.join(FORMATS)}) in {param!r}; got: {error}", param) from None


def _check_pixels(image: Image.Image, limits: Limits, param: str) -> None:
    pixels = image.width * image.height
    if pixels > limits.pixels:
        found = f"{image.width}x{image.height}"
        raise BadRequest(
            f"expected at most {limits.pixels / 1e6:g} megapixels in {param!r}; got {found}; scale it down", param, 413
        )
    check_size(image, f"the picture in {param!r}")


def _check_memory(image: Image.Image, limits: Limits, param: str, results: int) -> None:
    """Refuse a picture that would never find room, however long it waits."""
    if memory_needed(image.width * image.height, results) > limits.memory.most:
        raise BadRequest(
            f"expected a picture in {param!r} with room for {results} results of its size; got {image.width}x"
            f"{image.height}; ask for fewer results, or scale it down",
            param,
            413,
        )


def _check_cost(image: Image.Image, data: bytes, param: str) -> None:
    """Refuse a file that needs far more time or memory than its pixels do."""
    if image.format in ("JPEG", "MPO") and data.count(START_OF_SCAN) > MOST_SCANS:
        raise BadRequest(f"expected at most {MOST_SCANS} scans in {param!r}; got more; save it as a plain JPEG", param)
    if len(image.info.get("icc_profile") or b"") > MOST_PROFILE_BYTES:
        raise BadRequest(
            f"expected a colour profile of at most {MOST_PROFILE_BYTES / 2**20:g} MiB in {param!r}; got a larger one; "
            "convert the picture to sRGB",
            param,
        )


def read_instruction(text: str | None, limits: Limits, param: str) -> str:
    """The instruction without spaces around it.

    Raises:
        BadRequest: it is missing, empty or too long.
    """
    text = (text or "").strip()
    if not text:
        raise BadRequest(f"expected an instruction in {param!r}; got none", param)
    if len(text) > limits.characters:
        got = f"expected at most {limits.characters} characters in {param!r}; got {len(text)}"
        raise BadRequest(got, param)
    return text


def read_int(value: str | None, param: str, default: int | None, least: int, most: int) -> int | None:
    """The whole number in a field; `default` if the field is missing or empty.

    Raises:
        BadRequest: it is no whole number, or outside [least, most].
    """
    if value is None or not value.strip():
        return default
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise BadRequest(f"expected a whole number from {least} to {most} in {param!r}; got {value[:40]!r}", param)
    return number


def read_bool(value: str, param: str) -> bool:
    """The truth value in a field.

    Raises:
        BadRequest: it is neither "true" nor "false".
    """
    if value not in ("true", "false"):
        raise BadRequest(f"expected true or false in {param!r}; got {value[:40]!r}", param)
    return value == "true"
