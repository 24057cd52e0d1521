"""Open a trained editor and edit pictures with it: the only door that the command line and other programs need.

An editor's folder (a run's `final/`, or what `npedit export` wrote) holds `npedit.json`, `scheduler/` and
`transformer/`, or `pytorch_lora_weights.safetensors` if it was trained with LoRA. `npedit.json` names the base model
that the editor was trained from:
`{"format": 1, "family": "flux", "base": "embedded", "steps": 4, "sizes": [[32, 32]], "recipe": "toy"}`.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
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
from npedit.runs.editor_facts import FACTS_FILE, EditorFacts
from npedit.runs.editor_weights import load_ema_weights, read_recipe, require_finite_weights
from npedit.runs.resolve import resolve_editor

log = logging.getLogger(__name__)

BATCH_PIXELS = 16 * 512 * 512  # of one pass through the editor, counted at the size that it works at
BATCH_ITEMS = 16  # the most pictures in one pass
WINDOW_PIXELS = 64_000_000  # of the pictures that `edit_each` holds at a time, at their full size
MAX_PIXELS = 100_000_000
MAX_SIDE_RATIO = 64


class Editor:
    """A few-step editor. Build it with `Editor.open`, or from a family and a net that are already in memory. `tile` is
    the side in pixels of tiles that pictures are decoded in, for a small GPU; 0 is the whole.

    Raises:
        UserError: the tile is smaller than the family's decoder can take.
    """

    def __init__(
        self, family: Family, net: nn.Module, steps: int, sizes: Sequence[tuple[int, int]], tile: int = 0
    ) -> None:
        check_tile(family.facts, tile)
        multiple = family.facts.multiple
        if bad := [f"{w}x{h}" for h, w in sizes if h % multiple or w % multiple]:
            raise UserError(
                f"expected sizes that are multiples of {multiple}, as this editor's family takes them; got "
                f"{', '.join(bad)}. Correct 'sizes' in its {FACTS_FILE}."
            )
        self.family = family
        self.tile = tile
        self.net = net.eval().requires_grad_(False)
        self.steps = steps
        self._warned: set[str] = set()
        self.sizes = tuple((int(h), int(w)) for h, w in sizes)

    @classmethod
    def open(
        cls, path: str | Path = "embedded", device: str | torch.device = "", tile: int | None = None, base: str = ""
    ) -> Self:
        """Open RUN, RUN/final, RUN/checkpoint-N, an exported folder, or "embedded", the toy editor in the package.

        `device` "" is the one in NPEDIT_DEVICE, else the GPU if there is one, else the CPU. `tile` None is the one
        that the editor was trained with. `base` replaces the base model's Hub id or folder that is written in
        npedit.json.

        Raises:
            UserError: there is no editor at this path, one of its parts is missing or broken, a weight is NaN or
                infinite, or the tile is too small.
        """
        source = resolve_editor(path)
        recipe = read_recipe(source) if source.is_checkpoint else None
        facts = EditorFacts.from_recipe(recipe) if recipe else EditorFacts.read(source.folder)
        weights = base or facts.base
        kind, device = config.find_class("families", facts.family), pick_device(device or None)
        try:
            folder = config.embedded_weights("base") if weights == "embedded" else weights
            family = kind.load(folder, config.torch_dtype(facts.dtype), device)
            net = _open_checkpoint_net(family, source.folder, recipe) if recipe else _open_net(family, source.folder)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"expected the editor in {source.folder} and its base model {weights!r} to open; got: {error}. "
                "Check that both are complete. If the base model is somewhere else, say where with --base. "
                "'npedit doctor' checks the embedded parts."
            ) from None
        require_finite_weights(net, source.folder)
        return cls(family, net, facts.steps, facts.sizes, facts.tile if tile is None else tile)

    def edit_tensor(
        self, references: Tensor, instructions: Sequence[str], seed: int | Sequence[int] = 0, steps: int | None = None
    ) -> Tensor:
        """Edit references (b, 3, H, W) in [0, 1] at their own size; returns the same shape in [0, 1].

        One seed gives every picture the same noise, so that a picture's edit does not depend on the rest of the batch;
        a list gives each its own. H and W must be multiples of the family's `facts.multiple`.

        Raises:
            ValueError: another shape, another number of instructions or seeds, or fewer than one step.
            UserError: a pixel of the result is NaN or infinite.
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
        done, count = [], max(1, min(BATCH_ITEMS, BATCH_PIXELS // (references.shape[2] * references.shape[3])))
        for i in range(0, len(references), count):
            part = slice(i, i + count)
            given = references[part].to(self.family.device)
            edited = generator.edit_images(
                self.family, self.net, given, list(instructions[part]), seeds[part], steps, self.tile
            )
            if not bool(torch.isfinite(edited).all()):
                raise UserError(
                    "expected finite pixels; got NaN or infinity from the editor. Use an earlier checkpoint "
                    "(RUN/checkpoint-N), or dtype float32 if the editor was trained in float16."
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
        pairs = pair_up(images, instructions)
        return list(self.edit_each((im for im, _ in pairs), [text for _, text in pairs], seed, steps))

    def edit_each(
        self, images: Iterable[Image.Image], instructions: Sequence[str], seed: int = 0, steps: int | None = None
    ) -> Iterator[Image.Image]:
        """Edit pictures one after the other in bounded memory: yields each result in order, as soon as it is ready.

        `images` is read a few at a time (`BATCH_ITEMS`, `WINDOW_PIXELS`), so it may open files when asked for them.
        It has one picture for each instruction. Errors are those of `edit`.
        """
        steps = self.steps if steps is None else steps
        if steps < 1:
            raise UserError(f"expected at least one step; got {steps}.")
        self._warn_of_truncation(instructions)
        window: list[tuple[Image.Image, str]] = []
        for image, text in zip(images, instructions, strict=True):
            image = to_rgb(image)
            pixels = sum(im.width * im.height for im, _ in window) + image.width * image.height
            if window and (len(window) == BATCH_ITEMS or pixels > WINDOW_PIXELS):
                yield from self._edit_window(window, seed, steps)
                window = []
            window.append((image, text))
        yield from self._edit_window(window, seed, steps)

    def _warn_of_truncation(self, instructions: Sequence[str]) -> None:
        """Report, once for each instruction, the part that the text encoder does not read."""
        for text in dict.fromkeys(instructions):
            (lost,) = self.family.truncated_part([text])
            if lost and text not in self._warned:
                self._warned.add(text)
                log.warning(
                    "the instruction is longer than the text encoder takes; this part of it is not read: %r", lost
                )

    def _edit_window(self, window: Sequence[tuple[Image.Image, str]], seed: int, steps: int) -> list[Image.Image]:
        """Edit upright RGB pictures, those of one working size together; returns the results in their order."""
        sizes = [nearest_size((image.height, image.width), self.sizes) for image, _ in window]
        edited: dict[int, Image.Image] = {}
        for size in sorted(set(sizes)):
            members = [i for i, s in enumerate(sizes) if s == size]
            references = torch.stack([to_tensor(resize(window[i][0], size)) for i in members])
            out = self.edit_tensor(references, [window[i][1] for i in members], seed, steps)
            for i, picture in zip(members, out):
                edited[i] = resize(to_pil(picture), (window[i][0].height, window[i][0].width))
        return [edited[i] for i in range(len(window))]


def _open_net(family: Family, folder: Path) -> nn.Module:
    """The trained net of an editor's folder: an adapter of the family's base, or a net of its own."""
    if (folder / LORA_FILE).is_file():
        return LoraAdapter.open(family.lora_base(), "student", folder)
    return family.open_net(folder / "transformer").to(family.device)


def _open_checkpoint_net(family: Family, checkpoint: Path, recipe: config.Recipe) -> nn.Module:
    """The student of a checkpoint with its EMA weights, in the base's number type as `_open_net` gives it."""
    if recipe.lora:
        adapter = LoraAdapter.create(family.lora_base(), "student", recipe.lora.rank, recipe.lora.alpha, recipe.seed)
        load_ema_weights(checkpoint, adapter)
        return adapter
    net = family.trainable_net().to(family.device)
    load_ema_weights(checkpoint, net)
    return net


def pair_up(images: Sequence[Any], instructions: Sequence[str]) -> list[tuple[Any, str]]:
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
