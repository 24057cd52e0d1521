"""Pictures that a base model makes from a prompt alone, without a photo: the baseline that cannot know the subject."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from npedit import flow
from npedit.data._photos import nearest_size, resize, to_pil
from npedit.families._published import sampling_guidance
from npedit.families.base import Family
from npedit.generator import generate_images, seeded_generator

BASE_STEPS = 20  # of the base model, where the command line names no other number
CHUNK = 8  # pictures of one pass


class TextToImage:
    """The base model of a family, in the place of an editor. `sizes` are those that the editor was trained at, as
    (H, W); each picture gets the size nearest to its photo's and is scaled to the photo's size, as an edit is.

    Euler steps with the guidance that the family's own pipeline uses (`sampling_guidance`).
    """

    def __init__(self, family: Family, sizes: Sequence[tuple[int, int]], steps: int | None = None):
        self.family, self.sizes, self.steps = family, sizes, steps or BASE_STEPS

    def __call__(self, photos: Sequence[Image.Image], prompts: Sequence[str], seed: int) -> list[Image.Image]:
        """One picture for each prompt; of a photo only the size is used. One seed gives every picture the same
        noise."""
        groups: dict[tuple[int, int], list[int]] = {}
        for place, photo in enumerate(photos):
            groups.setdefault(nearest_size((photo.height, photo.width), self.sizes), []).append(place)
        made: dict[int, Image.Image] = {}
        for size, places in groups.items():
            for start in range(0, len(places), CHUNK):
                part = places[start : start + CHUNK]
                made |= zip(part, self._generate([prompts[k] for k in part], size, seed), strict=True)
        return [resize(made[k], (photo.height, photo.width)) for k, photo in enumerate(photos)]

    def _generate(self, prompts: Sequence[str], size: tuple[int, int], seed: int) -> list[Image.Image]:
        family = self.family
        times = flow.few_step_times(self.steps, family.noise_shift(*size)).tolist()
        shape = (1, family.facts.channels, *(side // family.facts.stride for side in size))
        noise = torch.randn(shape, generator=seeded_generator(seed, "text to image")).to(family.device)
        noise = noise.expand(len(prompts), -1, -1, -1)
        return [to_pil(image) for image in generate_images(family, prompts, noise, times, sampling_guidance(family))]
