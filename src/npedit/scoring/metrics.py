"""How near an edited picture is to its reference, without a judge. An editor that does nothing is best at most of
these: they say what an edit cost, not whether it was done. `docs/metrics.md` has ranges and directions.

Pictures are (3, h, w) in [0, 1]. `kept` (h, w) says which pixels count: all of them, or those outside a mask. There,
means are over the counted pixels alone, not over the frame with the rest blackened as in PIE-Bench's code, which makes
a large mask look like good preservation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from npedit.scoring.encoders import Clip, Dino, MissingEncoder
from npedit.scoring.lpips import MIN_SIDE, Lpips
from npedit.scoring.results import Metrics, MissingScore, UndefinedMetric

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # of SSIM
CHANGE_THRESHOLD = 0.1  # a pixel has changed if a channel differs by more, after a mean over its neighbours
COPY_AREA = 0.001  # share of changed pixels below which a picture counts as a copy
ASPECT_TOLERANCE = 0.02  # relative difference of aspect from which pixels cannot be compared
OUTSIDE, TARGET = "_outside", "_target"
T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------- of two tensors


def l1(a: Float[Tensor, "3 h w"], b: Float[Tensor, "3 h w"], kept: Bool[Tensor, "h w"]) -> float:
    """Mean absolute difference, in [0, 1]."""
    return _masked_mean((a - b).abs().mean(0), kept)


def l2(a: Float[Tensor, "3 h w"], b: Float[Tensor, "3 h w"], kept: Bool[Tensor, "h w"]) -> float:
    """Mean squared difference, in [0, 1], without a root (as MagicBrush)."""
    return _masked_mean((a.double() - b.double()).square().mean(0), kept)


def psnr(a: Float[Tensor, "3 h w"], b: Float[Tensor, "3 h w"], kept: Bool[Tensor, "h w"]) -> float:
    """10 log10(1 / L2), in dB. Undefined for equal pictures, where it is infinite."""
    error = l2(a, b, kept)
    if error == 0:
        raise UndefinedMetric("the pictures are equal, so that PSNR is infinite")
    return -10 * float(np.log10(error))


def ssim(a: Float[Tensor, "3 h w"], b: Float[Tensor, "3 h w"], kept: Bool[Tensor, "h w"]) -> float:
    """Structural similarity (Wang et al., 2004), the mean over channels and over the pixels whose whole window of 11 x
    11 lies in the picture and in `kept`; at most 1."""
    if min(a.shape[1:]) < WINDOW:
        raise UndefinedMetric(f"SSIM needs pictures of {WINDOW} x {WINDOW} pixels; got {a.shape[2]} x {a.shape[1]}")
    left_out = F.max_pool2d((~kept).float()[None], WINDOW, stride=1)[0] > 0
    return _masked_mean(ssim_map(a, b).mean(0), ~left_out)


def ssim_map(a: Float[Tensor, "3 h w"], b: Float[Tensor, "3 h w"]) -> Float[Tensor, "3 h2 w2"]:
    """SSIM at each whole window: Gaussian weights, population variances, as in the paper; 10 pixels fewer a side."""
    line = torch.exp(-(torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2).square() / (2 * SIGMA**2))
    line = line / line.sum()

    def local(x: Tensor) -> Tensor:
        x = F.conv2d(x[:, None], line[None, None, :, None])
        return F.conv2d(x, line[None, None, None, :])[:, 0]

    a, b = a.double(), b.double()
    mean_a, mean_b = local(a), local(b)
    var_a, var_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    covariance = local(a * b) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    above = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return above / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))


def changed_area(a: Float[Tensor, "3 h w"], b: Float[Tensor, "3 h w"], kept: Bool[Tensor, "h w"]) -> float:
    """The share of pixels that differ by more than .1 in a channel, in [0, 1]: how much of the picture was changed at
    all. The difference is first averaged over windows of 5 x 5 for a short side of 512 pixels, larger and smaller in
    proportion (1 x 1 below 256, where five pixels can be a whole object)."""
    around = min(a.shape[1:]) // 256
    near = F.avg_pool2d((a - b)[None], 2 * around + 1, stride=1, padding=around, count_include_pad=False)[0]
    differs = near.abs().amax(0) > CHANGE_THRESHOLD
    return _masked_mean(differs.float(), kept)


def is_copy(a: Float[Tensor, "3 h w"], b: Float[Tensor, "3 h w"], kept: Bool[Tensor, "h w"]) -> float:
    """1 if less than a thousandth of the pixels changed (see `changed_area`), else 0. Its mean is the copy rate."""
    return float(changed_area(a, b, kept) < COPY_AREA)


def _masked_mean(values: Float[Tensor, "h w"], kept: Bool[Tensor, "h w"]) -> float:
    if not kept.any():
        raise UndefinedMetric("nothing is left outside the mask")
    return float(values[kept].double().mean())


PIXEL_METRICS: Mapping[str, Callable[..., float]] = {"l1": l1, "l2": l2, "psnr": psnr, "ssim": ssim}
WHOLE_IMAGE_METRICS = {**PIXEL_METRICS, "changed_area": changed_area, "copied": is_copy}

# --------------------------------------------------------------------------------------------------- of two features


def cosine_similarity(a: Float[Tensor, "d"], b: Float[Tensor, "d"]) -> float:
    """The cosine between two features, in [-1, 1]."""
    return float(F.cosine_similarity(a.double(), b.double(), dim=0).clamp(-1, 1))


def directional_similarity(images: Float[Tensor, "2 d"], texts: Float[Tensor, "2 d"]) -> float:
    """CLIP directional similarity (StyleGAN-NADA, InstructPix2Pix): the cosine between the change of the picture and
    that of its caption; first the reference, then the edited. Undefined where either did not change."""
    for what, (before, after) in (("picture", images), ("caption", texts)):
        if float((after - before).norm()) < 1e-6:
            raise UndefinedMetric(f"the {what} is unchanged, so that it has no direction")
    return cosine_similarity(images[1] - images[0], texts[1] - texts[0])


# ------------------------------------------------------------------------------------------------------ of two files
# Pictures are given as functions that open them: one that cannot be opened is then the reason why every metric of it
# is missing.

ImageOpener = Callable[[], Image.Image]


def resize_to_reference(edited: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An edited picture at the reference's (width, height), with Pillow's bicubic filter.

    Raises:
        MissingScore: its shape is not the reference's.
    """
    if abs(edited.width * size[1] / (edited.height * size[0]) - 1) > ASPECT_TOLERANCE:
        raise MissingScore(f"expected the reference's shape {size[0]}x{size[1]}; got {edited.width}x{edited.height}")
    return edited.resize(size, Image.Resampling.BICUBIC) if edited.size != size else edited


def as_tensor(picture: Image.Image) -> Float[Tensor, "3 h w"]:
    """An RGB picture -> [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def pixel_metrics(reference: ImageOpener, edited: ImageOpener, suffix: str = "") -> Metrics:
    """L1, L2, PSNR, SSIM of whole pictures; without a suffix the changed area and whether it is a copy besides."""

    def measure(what: Callable[..., float]) -> float:
        a = reference()
        kept = torch.ones(a.height, a.width, dtype=torch.bool)
        return what(as_tensor(a), as_tensor(resize_to_reference(edited(), a.size)), kept)

    return {
        f"{name}{suffix}": partial(measure, what)
        for name, what in (PIXEL_METRICS if suffix else WHOLE_IMAGE_METRICS).items()
    }


def _similarity(encoder: Dino | Clip | MissingEncoder, reference: ImageOpener, edited: ImageOpener) -> float:
    return cosine_similarity(*encoder.encode_images([reference(), edited()]))


def feature_metrics(
    reference: ImageOpener,
    edited: ImageOpener,
    dino: Dino | MissingEncoder,
    clip: Clip | MissingEncoder,
    suffix: str = "",
) -> Metrics:
    """DINO and CLIP similarity of two pictures."""
    return {
        f"{name}_{encoder.tag}{suffix}": partial(_similarity, encoder, reference, edited)
        for name, encoder in (("dino", dino), ("clip_i", clip))
    }


def perceptual_metrics(reference: ImageOpener, edited: ImageOpener, lpips: Lpips, suffix: str = "") -> Metrics:
    """LPIPS of whole pictures."""

    def measure() -> float:
        a = reference()
        return _lpips_of(lpips.distance, a, resize_to_reference(edited(), a.size))

    return {f"lpips_{lpips.tag}{suffix}": measure}


def _lpips_of(what: Callable[[Tensor, Tensor], T], a: Image.Image, b: Image.Image) -> T:
    if min(a.size) < MIN_SIDE:
        raise UndefinedMetric(f"LPIPS needs pictures of {MIN_SIDE} x {MIN_SIDE} pixels; got {a.width} x {a.height}")
    return what(as_tensor(a), as_tensor(b))


def metrics_outside_mask(
    reference: ImageOpener,
    edited: ImageOpener,
    mask: ImageOpener,
    dino: Dino | MissingEncoder,
    clip: Clip | MissingEncoder,
    lpips: Lpips | None = None,
) -> Metrics:
    """L1, L2, PSNR, SSIM and LPIPS over the pixels outside the mask (white is the edit), and DINO and CLIP similarity
    with the reference put back inside it, so that only what changed outside is left to see."""

    def inside() -> Image.Image:
        scaled = mask().resize(reference().size, Image.Resampling.NEAREST).convert("L")
        return scaled.point(lambda value: 255 * (value >= 128))

    def measure(what: Callable[..., float]) -> float:
        a = reference()
        kept = torch.from_numpy(np.array(inside()) == 0)
        return what(as_tensor(a), as_tensor(resize_to_reference(edited(), a.size)), kept)

    def paste_back() -> Image.Image:
        a = reference()
        return Image.composite(a, resize_to_reference(edited(), a.size), inside())

    def perceptual_distance(net: Lpips) -> float:
        a = reference()
        kept = torch.from_numpy(np.array(inside()) == 0)
        return _masked_mean(_lpips_of(net.distance_map, a, resize_to_reference(edited(), a.size)), kept)

    pixels: dict[str, Callable[[], float]] = {
        f"{name}{OUTSIDE}": partial(measure, what) for name, what in PIXEL_METRICS.items()
    }
    if lpips:
        pixels[f"lpips_{lpips.tag}{OUTSIDE}"] = partial(perceptual_distance, lpips)
    return pixels | dict(feature_metrics(reference, paste_back, dino, clip, OUTSIDE))


def text_metrics(
    reference: ImageOpener, edited: ImageOpener, source_caption: str, target_caption: str, clip: Clip | MissingEncoder
) -> Metrics:
    """CLIP-T, the similarity of the edited picture to the wanted caption, and CLIP directional similarity. A caption ""
    is none, and what needs it is undefined."""

    def to_caption() -> float:
        if not target_caption:
            raise UndefinedMetric("no caption of the wanted result is given")
        return cosine_similarity(clip.encode_images([edited()])[0], clip.encode_texts([target_caption])[0])

    def direction() -> float:
        if not (source_caption and target_caption):
            raise UndefinedMetric("captions of both pictures are not given")
        return directional_similarity(
            clip.encode_resized([reference(), edited()]), clip.encode_texts([source_caption, target_caption])
        )

    return {f"clip_t_{clip.tag}": to_caption, f"clip_dir_{clip.tag}": direction}
