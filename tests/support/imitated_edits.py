"""Real photographs at full size, edits of them with a known region, and imitations of what a VAE does to a picture."""

import io

import numpy as np
import skimage.data
import torch
from PIL import Image

from npedit.data._photos import resize, to_tensor

PHOTOS = ("astronaut", "coffee", "chelsea", "rocket")
SHIFT = np.array([1.5, -1.0, 2.0]) / 255  # of an imitated VAE's colours


def photograph(name, megapixels=1.5, enlarged=True):
    """One of scikit-image's photographs. Enlarged, it gets a grain that is finer than any working size shows."""
    image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    if not enlarged:
        return image
    scale = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(0).integers(-3, 4, (image.height, image.width, 1))
    return Image.fromarray((np.asarray(image).astype(np.int16) + grain).clip(0, 255).astype(np.uint8))


def at_working_size(image, short=512):
    """The photograph (3, h, w) as an editor gets it: the short side is `short`, both are multiples of 16."""
    scale = short / min(image.size)
    return to_tensor(resize(image, (round(image.height * scale / 16) * 16, round(image.width * scale / 16) * 16)))


def edited(reference, kind):
    """(edited picture (3, h, w), the pixels that the edit was applied to (h, w))."""
    x = reference.permute(1, 2, 0).numpy().astype(np.float64)
    h, w = x.shape[:2]
    rows, columns = np.mgrid[:h, :w]
    disc = ((rows - 0.5 * h) / (0.18 * h)) ** 2 + ((columns - 0.45 * w) / (0.15 * w)) ** 2 < 1
    everywhere = np.ones_like(disc)
    small = (rows - 0.5 * h) ** 2 + (columns - 0.45 * w) ** 2 < 36
    new, where = {
        "nothing": (x, ~everywhere),
        "recolour": (x[..., [2, 0, 1]] * 0.9 + 0.05, disc),
        "remove": (np.roll(x, w // 3, 1), disc),
        "small": (x * 0 + [0.9, 0.1, 0.1], small),
        "tone": (x * 0.8, everywhere),
        "style": (np.round(x.mean(-1, keepdims=True) * 4) / 4 * [1, 0.8, 0.6], everywhere),
    }[kind]
    return _to_tensor(np.where(where[..., None], new, x)), where


def decoded(picture, kind):
    """The picture (3, h, w) as a VAE may give it back, with its colours shifted by `SHIFT`: "noise" of 42 dB, or "loss"
    of fine detail, 35 dB; or "jpeg" of quality 50, 33 dB, which loses colour detail as well."""
    x, noise = picture.permute(1, 2, 0).numpy(), np.random.default_rng(0)
    h, w = x.shape[:2]
    image = Image.fromarray((x * 255).round().astype(np.uint8))
    if kind == "noise":
        x = x + noise.normal(0, 2 / 255, x.shape)
    elif kind == "jpeg":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=50)
        x = np.asarray(Image.open(file)) / 255
    else:
        few = image.resize((w * 5 // 8, h * 5 // 8), Image.Resampling.LANCZOS)
        x = np.asarray(few.resize((w, h), Image.Resampling.BICUBIC)) / 255 + noise.normal(0, 1.5 / 255, x.shape)
    return _to_tensor(x + SHIFT)


def _to_tensor(pixels):
    return torch.from_numpy(pixels.clip(0, 1)).permute(2, 0, 1).float()
