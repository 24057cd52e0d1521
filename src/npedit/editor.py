"""Open a trained editor and edit pictures with it: the only door that the command line and other programs need.

An editor's folder (a run's `final/`, or what `npedit export` wrote) holds `npedit.json`, `scheduler/` and
`transformer/`, or `pytorch_lora_weights.safetensors` if it was trained with LoRA. `npedit.json` names the base model
that the editor was trained from:
`{"format": 1, "family": "flux", "base": "embedded", "steps": 4, "sizes": [[32, 32]], "recipe": "toy"}`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from npedit import generator
from npedit.data._photos import BadImage, decoding, to_srgb
from npedit.errors import UserError
from npedit.families._decode import check_tile
from npedit.families.base import Family
from npedit.nets.device import pick_device
from npedit.nets.lora import WEIGHTS_FILE as LORA_FILE
from npedit.nets.lora import LoraAdapter
from npedit.recipe import config

FORMAT = 1
CHUNK = 16  # pictures edited at a time
MAX_PIXELS = 100_000_000
MAX_SIDE_RATIO = 64
FACTS_FILE = "npedit.json"


@dataclass(frozen=True)
class Facts:
    """What `npedit.json` says. `sizes` are (height, width) in pixels; `base` is a Hub id, a folder or "embedded";
    `tile` is the side in pixels of the tiles that it was trained to be decoded in, 0 for the whole."""

    family: str
    base: str
    steps: int
    sizes: tuple[tuple[int, int], ...]
    dtype: str = "float32"
    tile: int = 0

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read and check a folder's `npedit.json`.

        Raises:
            UserError: it is missing, is not JSON, is of another format, or lacks a field.
        """
        path = folder / FACTS_FILE
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(
                f"expected {FACTS_FILE} in {folder}; there is none. Give a run, its final/ folder, or 'embedded'."
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(
                f"expected JSON in {path}; got: {error}. Export the run again: npedit export RUN DIR."
            ) from None
        try:
            if found["format"] != FORMAT:
                raise UserError(
                    f"expected an editor of format {FORMAT} in {path}; got {found['format']}; update npedit."
                )
            sizes = tuple((int(h), int(w)) for h, w in found["sizes"])
            family, base = (str(found[key]) for key in ("family", "base"))
            facts = cls(family, base, int(found["steps"]), sizes, found.get("dtype", "float32"), int(found.get("tile", 0)))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"expected format, family, base, steps and sizes in {path}; got a bad one: {error!r}."
            ) from None
        if facts.steps < 1 or facts.tile < 0 or not sizes or min(min(s) for s in sizes) < 1:
            got = f"{facts.steps} steps, tile {facts.tile}, sizes {sizes}"
            raise UserError(f"expected steps >= 1, tile >= 0 and sizes >= 1 in {path}; got {got}.")
        return facts


class Editor:
    """A few-step editor. Build it with `Editor.open`, or from a family and a net that are already in memory. `tile` is
    the side in pixels of tiles that pictures are decoded in, for a small GPU; 0 is the whole.

    Raises:
        UserError: the tile is smaller than the family's decoder can take.
    """

    def __init__(self, family: Family, net: nn.Module, steps: int, sizes: Sequence[tuple[int, int]], tile: int = 0):
        check_tile(family.facts, tile)
        self.family = family
        self.tile = tile
        self.net = net.eval().requires_grad_(False)
        self.steps = steps
        self.sizes = tuple((int(h), int(w)) for h, w in sizes)

    @classmethod
    def open(cls, path: str | Path = "embedded", device: str | torch.device = "", tile: int | None = None) -> Self:
        """Open a run, an editor's folder, or "embedded", the trained toy editor that ships in the package.

        `device` "" is the one in NPEDIT_DEVICE, else the GPU if there is one, else the CPU. `tile` None is the one that it was trained with.

        Raises:
            UserError: there is no editor at this path, one of its parts is missing or broken, or the tile is too small.
        """
        folder = locate(path)
        facts = Facts.read(folder)
        base = config.embedded_weights("base") if facts.base == "embedded" else facts.base
        kind, device = config.find_class("families", facts.family), pick_device(device or None)
        try:
            family = kind.load(base, config.torch_dtype(facts.dtype), device)
            if (folder / LORA_FILE).is_file():
                net = LoraAdapter.open(family.lora_base(), "student", folder)
            else:
                net = family.open_net(folder / "transformer").to(device)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"expected the editor in {folder} and its base model {facts.base!r} to open; got: {error}. "
                "Check that both are complete; 'npedit doctor' looks at the embedded parts."
            ) from None
        return cls(family, net, facts.steps, facts.sizes, facts.tile if tile is None else tile)

    def edit_tensor(
        self, references: Tensor, instructions: Sequence[str], seed: int | Sequence[int] = 0, steps: int | None = None
    ) -> Tensor:
        """Edit references (b, 3, H, W) in [0, 1] at their own size; returns the same shape in [0, 1].

        One seed gives every picture the same noise, so that a picture's edit does not depend on the rest of the batch;
        a list gives each its own. H and W must be multiples of the family's `facts.multiple`.

        Raises:
            ValueError: another shape, another number of instructions or seeds, or fewer than one step.
        """
        multiple, steps = self.family.facts.multiple, self.steps if steps is None else steps
        seeds = [seed] * len(references) if isinstance(seed, int) else list(seed)
        if references.ndim != 4 or references.shape[1] != 3 or any(s < 1 or s % multiple for s in references.shape[2:]):
            raise ValueError(f"expected (b, 3, H, W), H and W multiples of {multiple}; got {tuple(references.shape)}")
        if not len(references) == len(instructions) == len(seeds):
            came = f"{len(instructions)} instructions and {len(seeds)} seeds"
            raise ValueError(f"expected {len(references)} of each; got {came}")
        if steps < 1:
            raise ValueError(f"expected at least one step; got {steps}")
        done = []
        for i in range(0, len(references), CHUNK):
            part = slice(i, i + CHUNK)
            given = references[part].to(self.family.device)
            edited = generator.edit_images(
                self.family, self.net, given, list(instructions[part]), seeds[part], steps, self.tile
            )
            done.append(edited.float().clamp(0, 1).to(references.device))
        return torch.cat(done)

    def edit(
        self,
        images: Image.Image | Sequence[Image.Image],
        instructions: str | Sequence[str],
        seed: int = 0,
        steps: int | None = None,
    ) -> list[Image.Image]:
        """Edit pictures of any mode, size and orientation; each comes back as RGB in its own (upright) size.

        Images and instructions pair up; one of either goes with all of the other. Each picture is scaled to the size
        nearest to its own among those trained, edited there, and scaled back.

        Raises:
            UserError: their numbers do not match, an instruction is empty, or a picture cannot be used.
        """
        images = [images] if isinstance(images, Image.Image) else list(images)
        instructions = [instructions] if isinstance(instructions, str) else list(instructions)
        pairs = paired(images, instructions)
        steps = self.steps if steps is None else steps
        if steps < 1:
            raise UserError(f"expected at least one step; got {steps}.")
        upright = [to_rgb(image) for image, _ in pairs]
        sizes = [nearest_size((im.height, im.width), self.sizes) for im in upright]
        edited: dict[int, Image.Image] = {}
        for size in sorted(set(sizes)):
            members = [i for i, s in enumerate(sizes) if s == size]
            references = torch.stack([to_tensor(resized(upright[i], size)) for i in members])
            out = self.edit_tensor(references, [pairs[i][1] for i in members], seed, steps)
            for i, picture in zip(members, out):
                edited[i] = resized(to_pil(picture), (upright[i].height, upright[i].width))
        return [edited[i] for i in range(len(pairs))]


def locate(path: str | Path) -> Path:
    """The folder of the editor that `path` means.

    Raises:
        UserError: nothing is there, or it is a run that has no finished editor yet.
    """
    if str(path) == "embedded":
        return Path(config.embedded_weights("editor"))
    folder = Path(path)
    if not os.path.isdir(folder):  # unlike Path.is_dir, it does not fail on a name that is too long
        raise UserError(f"expected a run or an editor's folder; {folder} is not a folder. Give a run, or 'embedded'.")
    for candidate in (folder, folder / "final"):
        if (candidate / FACTS_FILE).is_file():
            return candidate
    if (folder / "config.resolved.yaml").is_file():
        raise UserError(f"the run {folder} has no finished editor yet (no final/ in it). Go on with 'npedit train'.")
    raise UserError(f"expected a run or an editor's folder; {folder} has no {FACTS_FILE} and no final/.")


def paired(images: Sequence[Any], instructions: Sequence[str]) -> list[tuple[Any, str]]:
    """Pair images and instructions; one of either goes with all of the other.

    Raises:
        UserError: none of either, different numbers (both above one), or an empty instruction.
    """
    images, instructions = list(images), list(instructions)
    if not images or not instructions:
        counts = f"{len(images)} images and {len(instructions)} instructions"
        raise UserError(f"expected at least one image and one instruction; got {counts}.")
    if len(images) != len(instructions) and 1 not in (len(images), len(instructions)):
        raise UserError(
            f"expected one instruction, or one an image; got {len(images)} images and {len(instructions)} instructions."
        )
    for text in instructions:
        if not text.strip():
            raise UserError("expected an instruction; got an empty one. Say it as in 'paint the circle red'.")
    n = max(len(images), len(instructions))
    return list(zip(images * (n if len(images) == 1 else 1), instructions * (n if len(instructions) == 1 else 1)))


def open_picture(path: Path) -> Image.Image:
    """Read a picture completely and check it before any work is done.

    Raises:
        UserError: it is missing, a folder, empty, not a picture, truncated, or too large.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise UserError(f"expected a picture; {path} is a folder. Name the pictures in it.")
    if not os.path.exists(path):
        raise UserError(f"expected a picture; there is no {path}.")
    try:
        with decoding():
            if path.stat().st_size == 0:
                raise UserError(f"expected a picture; {path} is empty (0 bytes).")
            with Image.open(path) as image:
                _check_size(image, str(path))
                return to_srgb(image, keep_alpha=True)
    except BadImage as error:
        if isinstance(error.__cause__, Image.UnidentifiedImageError):
            raise UserError(
                f"expected a picture (PNG, JPEG, WebP, ...); {path} is not one, or its format is unknown here."
            ) from None
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise UserError(
                f"expected at most {MAX_PIXELS // 10**6} megapixels; {path} has more. Scale it down first."
            ) from None
        raise UserError(f"expected a readable picture; {path} is broken or truncated: {error}.") from None


def _check_size(image: Image.Image, name: str) -> None:
    w, h = image.size
    if w < 1 or h < 1:
        raise UserError(f"expected a picture with pixels; {name} is {w}x{h}.")
    if w * h > MAX_PIXELS:
        raise UserError(f"expected at most {MAX_PIXELS // 10**6} megapixels; {name} is {w}x{h}. Scale it down first.")
    if max(w, h) > MAX_SIDE_RATIO * min(w, h):
        raise UserError(f"expected sides within 1:{MAX_SIDE_RATIO}; {name} is {w}x{h}. Crop it first.")


def to_rgb(image: Image.Image) -> Image.Image:
    """An upright RGB picture in sRGB: see `to_srgb`; transparency is laid on white.

    Raises:
        UserError: it has no pixels, is too large, or holds floating-point values.
    """
    _check_size(image, "the picture")
    try:
        return to_srgb(image)
    except BadImage as error:
        raise UserError(f"expected a readable picture of 8 or 16 bits a channel; got: {error}.") from None


def nearest_size(size: tuple[int, int], trained: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The trained (height, width) of the nearest shape; of those, the nearest in area."""
    shape, area = math.log(size[0] / size[1]), math.log(size[0] * size[1])
    return min(trained, key=lambda s: (round(abs(math.log(s[0] / s[1]) - shape), 3), abs(math.log(s[0] * s[1]) - area)))


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
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
