"""Open a trained editor and edit pictures with it. The command line and other programs need only this file.

An editor's folder (a run's `final/`, or what `npedit export` wrote) holds `npedit.json`, `scheduler/` and
`transformer/`, or `pytorch_lora_weights.safetensors` if it was trained with LoRA. `npedit.json` names the base model
that the editor was trained from:
`{"format": 1, "family": "flux", "base": "embedded", "steps": 4, "sizes": [[32, 32]], "recipe": "toy"}`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from npedit import generator
from npedit.data._photos import crop_to_fill, nearest_size, resize, to_tensor
from npedit.errors import UserError
from npedit.families._decode import check_tile
from npedit.families.base import Family
from npedit.full_size import Finish, keep_unchanged, scale_back
from npedit.input_pictures import to_rgb
from npedit.nets.device import offload_device, pick_device
from npedit.nets.lora import WEIGHTS_FILE as LORA_FILE
from npedit.nets.lora import LoraAdapter, weights_module
from npedit.nets.offload import OffloadedModule
from npedit.nets.quantised import quantise_linear_layers
from npedit.recipe import config
from npedit.runs.editor_facts import FACTS_FILE, EditorFacts
from npedit.runs.editor_weights import load_ema_weights, read_recipe, require_finite_weights
from npedit.runs.resolve import resolve_editor

log = logging.getLogger(__name__)

WINDOW_PIXELS = 64_000_000  # of the pictures that `edit_each` holds at a time, at their full size
MOST_WARNED = 1000  # instructions that are remembered, so that each is reported once
NOT_QUANTISED = ("lm_head", "visual")  # parts of text encoders that editing does not call


class Editor:
    """A few-step editor. Build it with `Editor.open`, or from a family and a net that are already in memory.

    For a small GPU: `tile` is the side in pixels of tiles that pictures are decoded in (0: no tiles). With `offload`,
    text encoders, VAE and net are in the CPU's memory, and each is on `family.device` only while it works.

    Raises:
        UserError: the tile is smaller than the family's decoder can take.
    """

    def __init__(
        self,
        family: Family,
        net: nn.Module,
        steps: int,
        sizes: Sequence[tuple[int, int]],
        tile: int = 0,
        offload: bool = False,
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
        self._offloaded: dict[str, list[OffloadedModule]] = {}
        if offload:
            parts = {"text": family.text_encoders(), "vae": [family.pipe.vae], "net": [weights_module(self.net)]}
            self._offloaded = {n: [OffloadedModule(m, family.device) for m in ms] for n, ms in parts.items()}
            for part in self._offloaded.values():
                for module in part:
                    module.unload()

    @classmethod
    def open(
        cls,
        path: str | Path = "embedded",
        device: str | torch.device = "",
        tile: int | None = None,
        base: str = "",
        offload: bool = False,
        bits: int = 0,
    ) -> Self:
        """Open RUN, RUN/final, RUN/checkpoint-N, an exported folder, or "embedded", the toy editor in the package.

        `device` "" is the one in NPEDIT_DEVICE, else the GPU if there is one, else the CPU. `tile` None is the one
        that the editor was trained with. `base` replaces the base model's Hub id or folder that is written in
        npedit.json. For small GPUs: `offload` (see `Editor`), and `bits` 8 or 4 for the weights of the net's blocks and
        of the text encoders (0: as trained). The weights are packed on the CPU before they are moved to the device.

        A fully fine-tuned editor takes the place of the base model's denoiser, which is not loaded.

        Raises:
            UserError: there is no editor at this path, one of its parts is missing or broken, a weight is NaN or
                infinite, the tile is too small, or `bits` is another number.
        """
        if bits not in (0, 4, 8):
            raise UserError(f"expected bits 0, 4 or 8; got {bits}. With 0 weights are as trained.")
        source = resolve_editor(path)
        recipe = read_recipe(source) if source.is_checkpoint else None
        facts = EditorFacts.from_recipe(recipe) if recipe else EditorFacts.read(source.folder)
        facts = replace(facts, base=base) if base else facts
        target = pick_device(device or None)
        opened_on = offload_device() if offload or bits else target
        with _explain_opening_errors(source.folder, facts.base):
            family, net = _open_models(source.folder, facts, recipe, opened_on)
        require_finite_weights(net, source.folder)
        if bits:
            _quantise(family, net, bits)
        family.device = target
        if bits and not offload:
            for module in (*family.text_encoders(), family.pipe.vae, weights_module(net)):
                module.to(target)
        return cls(family, net, facts.steps, facts.sizes, facts.tile if tile is None else tile, offload)

    @classmethod
    def open_untrained(cls, path: str | Path = "embedded", device: str | torch.device = "") -> Self:
        """The editor at this path as it was before training: its base model, used as a few-step editor. Arguments and
        errors as in `open`."""
        source = resolve_editor(path)
        facts = EditorFacts.read(source.folder)
        with _explain_opening_errors(source.folder, facts.base):
            family = _open_family(facts, pick_device(device or None))
        return cls(family, family.base_as_editor(), facts.steps, facts.sizes, facts.tile)

    @contextmanager
    def _on_device(self, part: str) -> Iterator[None]:
        """Inside the block the part ("text", "vae" or "net") is on the device."""
        modules = self._offloaded.get(part, [])
        try:
            for module in modules:
                module.load()
            yield
        finally:
            for module in modules:
                module.unload()

    def edit_tensor(
        self,
        references: Tensor,
        instructions: Sequence[str],
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        extra_references: Tensor | None = None,
    ) -> Tensor:
        """Edit references (b, 3, H, W) in [0, 1] at their own size; returns the same shape in [0, 1].
        `extra_references` (b, k, 3, H, W) are further reference images, for an editor that was trained with them.

        One seed gives every picture the same noise, so that a picture's edit does not depend on the rest of the batch;
        a list gives each its own. H and W must be multiples of the family's `facts.multiple`.

        Raises:
            ValueError: another shape, another number of instructions or seeds, more references than the family takes,
                or fewer than one step.
            UserError: a pixel of the result is NaN or infinite.
        """
        multiple, steps = self.family.facts.multiple, self.steps if steps is None else steps
        seeds = [seed] * len(references) if isinstance(seed, int) else list(seed)
        if references.ndim != 4 or references.shape[1] != 3 or any(s < 1 or s % multiple for s in references.shape[2:]):
            raise ValueError(f"expected (b, 3, H, W), H and W multiples of {multiple}; got {tuple(references.shape)}")
        if not len(references) == len(instructions) == len(seeds):
            got = f"{len(instructions)} instructions and {len(seeds)} seeds"
            raise ValueError(f"expected {len(references)} of each; got {got}")
        if steps < 1:
            raise ValueError(f"expected at least one step; got {steps}")
        done, count = [], generator.items_per_pass(*references.shape[2:])
        for i in range(0, len(references), count):
            part = slice(i, i + count)
            given = references[part].to(self.family.device)
            extra = None if extra_references is None else extra_references[part]
            edited = generator.edit_images(
                self.family, self.net, given, list(instructions[part]), seeds[part], steps, self.tile,
                self._on_device, extra,
            )  # fmt: skip
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
        references: Sequence[Image.Image] = (),
        keep_resolution: bool = False,
    ) -> list[Image.Image]:
        """Edit pictures of any mode, size and orientation; each comes back as RGB in its upright size. `references` are
        further pictures that the editor sees beside each of them.

        Images and instructions pair up; one of either goes with all of the other. Each picture is scaled to the size
        nearest to its own among those trained, edited there, and scaled back. With `keep_resolution` only what the edit
        changed is scaled back, and the rest comes from the picture at full size: see `full_size.py`. Where most of a
        picture changed, all of it is scaled back, and a warning is logged.

        Raises:
            UserError: their numbers do not match, an instruction is empty, or a picture cannot be used.
        """
        images = [images] if isinstance(images, Image.Image) else list(images)
        instructions = [instructions] if isinstance(instructions, str) else list(instructions)
        pairs = pair_up(images, instructions)
        finish = _finish_at_full_size if keep_resolution else scale_back
        texts = [text for _, text in pairs]
        return list(self.edit_each((im for im, _ in pairs), texts, seed, steps, references, finish))

    def edit_each(
        self,
        images: Iterable[Image.Image],
        instructions: Sequence[str],
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        references: Sequence[Image.Image] = (),
        finish: Finish = scale_back,
    ) -> Iterator[Image.Image]:
        """Edit pictures one after the other in bounded memory: yields each result in order, as soon as it is ready.

        `images` is read a few at a time (`BATCH_ITEMS`, `WINDOW_PIXELS`), so it may open files when asked for them.
        It has one picture for each instruction. A list of seeds has one for each picture.
        `finish(picture, reference, edited)` makes each result, in order, from the upright RGB picture and its edit at
        working size. Errors are those of `edit`.
        """
        steps = self.steps if steps is None else steps
        if steps < 1:
            raise UserError(f"expected at least one step; got {steps}. Leave steps out to edit as in training.")
        most = self.family.most_references
        if 1 + len(references) > most:
            raise UserError(f"expected at most {most - 1} further references; got {len(references)}; give fewer")
        extra = [to_rgb(image) for image in references]
        self._warn_of_truncation(instructions)
        seeds = [seed] * len(instructions) if isinstance(seed, int) else seed
        window: list[tuple[Image.Image, str, int]] = []
        for image, text, number in zip(images, instructions, seeds, strict=True):
            image = to_rgb(image)
            pixels = sum(im.width * im.height for im, *_ in window) + image.width * image.height
            if window and (len(window) == generator.BATCH_ITEMS or pixels > WINDOW_PIXELS):
                yield from self._edit_window(window, steps, extra, finish)
                window = []
            window.append((image, text, number))
        yield from self._edit_window(window, steps, extra, finish)

    def _warn_of_truncation(self, instructions: Sequence[str]) -> None:
        """Report, once for each instruction, the part that the text encoder does not read."""
        for text in dict.fromkeys(instructions):
            (lost,) = self.family.truncated_part([text])
            if lost and text not in self._warned:
                if len(self._warned) >= MOST_WARNED:
                    self._warned.clear()
                self._warned.add(text)
                log.warning(
                    "the instruction is longer than the text encoder takes; this part of it is not read: %r", lost
                )

    def _edit_window(
        self,
        window: Sequence[tuple[Image.Image, str, int]],
        steps: int,
        extra: Sequence[Image.Image],
        finish: Finish,
    ) -> Iterator[Image.Image]:
        """Edit (upright RGB picture, instruction, seed), those of one working size together; yields the results in
        their order."""
        sizes = [nearest_size((image.height, image.width), self.sizes) for image, *_ in window]
        edited: dict[int, tuple[Tensor, Tensor]] = {}
        for size in sorted(set(sizes)):
            members = [i for i, s in enumerate(sizes) if s == size]
            references = torch.stack([to_tensor(resize(window[i][0], size)) for i in members])
            more = [to_tensor(crop_to_fill(image, size)) for image in extra]
            extra_references = torch.stack(more).expand(len(members), -1, -1, -1, -1) if more else None
            texts, seeds = [window[i][1] for i in members], [window[i][2] for i in members]
            out = self.edit_tensor(references, texts, seeds, steps, extra_references)
            edited |= {i: (before, after) for i, before, after in zip(members, references, out)}
        for i, (image, *_) in enumerate(window):
            yield finish(image, *edited.pop(i))


def _finish_at_full_size(original: Image.Image, reference: Tensor, edited: Tensor) -> Image.Image:
    picture, change = keep_unchanged(original, reference, edited)
    if warning := change.warning("the picture"):
        log.warning("%s", warning)
    return picture


@contextmanager
def _explain_opening_errors(folder: Path, base: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"expected the editor in {folder} and its base model {base!r} to open; got: {error}. "
            "Check that both are complete. If the base model is somewhere else, say where with --base. "
            "'npedit doctor' checks the embedded parts."
        ) from None


def _open_models(
    folder: Path, facts: EditorFacts, recipe: config.Recipe | None, device: torch.device
) -> tuple[Family, nn.Module]:
    """The family and the trained net of an editor's folder; `recipe` is given for a checkpoint. The net is an adapter
    of the family's base, or it is the family's base itself."""
    lora = recipe.lora if recipe else None
    if recipe is None and not (folder / LORA_FILE).is_file():
        kind = config.find_class("families", facts.family)
        net = kind.load_net(folder / "transformer", facts.dtypes()["transformer"], device)
        return _open_family(facts, device, net), net
    family = _open_family(facts, device)
    if recipe is None:
        return family, LoraAdapter.open(family.lora_base(), "student", folder)
    if lora:
        net = LoraAdapter.create(family.lora_base(), "student", lora.rank, lora.alpha, recipe.seed)
    else:
        net = family.base_as_editor().requires_grad_(True)  # `load_ema_weights` fills what is trainable
    load_ema_weights(folder, net)
    return family, net


def _open_family(facts: EditorFacts, device: torch.device, net: nn.Module | None = None) -> Family:
    """The editor's base model; with `net`, that net in the place of the base's denoiser."""
    folder = config.embedded_weights("base") if facts.base == config.EMBEDDED else facts.base
    family = config.find_class("families", facts.family).load(folder, facts.dtypes(), device, net)
    if facts.isolated_references:
        family.isolate_references()
    return family


def _quantise(family: Family, net: nn.Module, bits: int) -> None:
    """Hold the linear layers of the net's blocks and of the text encoders in 8 or 4 bits, in place."""
    quantise_linear_layers([weights_module(net).get_submodule(name) for name in family.facts.blocks], bits)
    quantise_linear_layers(family.text_encoders(), bits, NOT_QUANTISED)


def pair_up(images: Sequence[Any], instructions: Sequence[str]) -> list[tuple[Any, str]]:
    """Pair images and instructions; one of either goes with all of the other.

    Raises:
        UserError: none of either, different numbers (both above one), or an empty instruction.
    """
    images, instructions = list(images), list(instructions)
    if not images or not instructions:
        counts = f"{len(images)} images and {len(instructions)} instructions"
        raise UserError(f"expected at least one image and one instruction; got {counts}. Give both.")
    if len(images) != len(instructions) and 1 not in (len(images), len(instructions)):
        raise UserError(
            f"expected one instruction, or one an image; got {len(images)} images and "
            f"{len(instructions)} instructions. Give as many of one as of the other."
        )
    for text in instructions:
        if not text.strip():
            raise UserError("expected an instruction; got an empty one. Say it as in 'paint the circle red'.")
    n = max(len(images), len(instructions))
    return list(zip(images * (n if len(images) == 1 else 1), instructions * (n if len(instructions) == 1 else 1)))
