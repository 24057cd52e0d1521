"""Frozen encoders whose features are compared: DINO for pictures, CLIP for pictures and text.

Each takes 8-bit RGB pictures through the *original* transform of its paper's code, which is not what the weights' own
processor does: the short side is scaled with Pillow's bicubic filter and the centre is cut. All work is in float32.

- DINO (arXiv 2104.14294): short side 8/7 of the net's input (256 for 224), ImageNet's mean and deviation; the feature
  is the CLS token after the last LayerNorm. It is never `pooler_output`, a layer that DINO does not have.
- CLIP (arXiv 2103.00020): short side equal to the net's input; the projected features.

An encoder that cannot be opened is a `MissingEncoder`, every use of which raises `MissingScore` with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer, CLIPModel, PreTrainedTokenizerBase, ViTModel

from npedit.errors import UserError
from npedit.hub_access import hub_error_text, is_local_only
from npedit.nets.device import pick_device
from npedit.scoring.results import MissingScore

IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, standard deviation
CLIP_MEAN_STD = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIZE_LETTERS = {192: "t", 384: "s", 768: "b", 1024: "l", 1280: "h"}


class Dino:
    """DINO features of pictures. `tag` names the net in the names of metrics: vits16."""

    default_weights = "facebook/dino-vits16"

    def __init__(self, model: ViTModel, device: torch.device):
        self.model = model.requires_grad_(False).eval().to(device)
        self.side = model.config.image_size
        self.tag = _architecture_tag(model.config)

    @classmethod
    def load(cls, weights: str, device: torch.device) -> Self:
        """Open a Hub id or a local folder.

        Raises:
            OSError, ValueError: nothing is there, or another model, or one without all of its weights.
        """
        return cls(_load_model(ViTModel, "vit", weights, add_pooling_layer=False), device)

    @torch.no_grad()
    def encode_images(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "n d"]:
        """Unit features of RGB pictures, on the CPU."""
        pixels = torch.stack([_resize_and_crop(p, round(self.side * 8 / 7), self.side) for p in pictures])
        output = self.model(pixel_values=_normalise(pixels, IMAGENET_MEAN_STD).to(self.model.device))
        return F.normalize(output.last_hidden_state[:, 0].float(), dim=1).cpu()


class Clip:
    """CLIP features of pictures and texts. `tag` names the net in the names of metrics: vitb32."""

    default_weights = "openai/clip-vit-base-patch32"

    def __init__(self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase, device: torch.device):
        self.model = model.requires_grad_(False).eval().to(device)
        self.tokenizer = tokenizer
        self.side = model.config.vision_config.image_size
        self.tag = _architecture_tag(model.config.vision_config)

    @classmethod
    def load(cls, weights: str, device: torch.device) -> Self:
        """Open a Hub id or a local folder. Errors as in `Dino.load`."""
        model = _load_model(CLIPModel, "clip", weights)
        tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=is_local_only(weights))
        return cls(model, tokenizer, device)

    def encode_images(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "n d"]:
        """Unit features of RGB pictures, on the CPU."""
        return self._encode_pixels(torch.stack([_resize_and_crop(p, self.side, self.side) for p in pictures]))

    def encode_resized(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "n d"]:
        """The same of whole pictures, squeezed to the net's square (bicubic, no antialias) and not cut: the transform
        of InstructPix2Pix's directional similarity."""
        size = (self.side, self.side)
        pixels = [F.interpolate(_to_tensor(p)[None], size, mode="bicubic", align_corners=False) for p in pictures]
        return self._encode_pixels(torch.cat(pixels))

    @torch.no_grad()
    def _encode_pixels(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        output = self.model.get_image_features(pixel_values=_normalise(pixels, CLIP_MEAN_STD).to(self.model.device))
        return F.normalize(output.pooler_output.float(), dim=1).cpu()

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Unit features of texts, on the CPU. What exceeds the model's length (77 tokens) is cut off, as CLIP does."""
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        inputs = {k: tokens[k].to(self.model.device) for k in ("input_ids", "attention_mask")}
        return F.normalize(self.model.get_text_features(**inputs).pooler_output.float(), dim=1).cpu()


class MissingEncoder:
    """An encoder that could not be opened: every use raises `MissingScore` with the reason."""

    def __init__(self, tag: str, reason: str):
        self.tag = tag
        self.reason = reason

    def encode_images(self, given: Sequence[Image.Image] | Sequence[str]) -> Tensor:
        """Raises MissingScore."""
        raise MissingScore(self.reason)

    encode_resized = encode_texts = encode_images


def open_encoder(kind: type[Dino] | type[Clip], weights: str = "") -> Dino | Clip | MissingEncoder:
    """An encoder with `weights`, a Hub id or a local folder; "" is the default of the literature, "none" leaves it out.

    If the default weights cannot be opened, the result is a `MissingEncoder` with the reason.

    Raises:
        UserError: named weights that cannot be opened.
    """
    name, tag = kind.__name__.upper(), {Dino: "vits16", Clip: "vitb32"}[kind]
    if weights == "none":
        return MissingEncoder(tag, f"{name} was left out")
    try:
        return kind.load(weights or kind.default_weights, pick_device())
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        said = hub_error_text(error)
        if weights:
            raise UserError(
                f"expected {name} weights, a Hub id or a folder; got {weights!r}: {said}; name others, or 'none'"
            ) from None
        option = f"--{name.lower()}"
        return MissingEncoder(
            tag, f"{kind.default_weights} cannot be opened: {said}; give {option} FOLDER, or {option} none"
        )


def _load_model(kind: Any, expected: str, weights: str, **options: Any) -> Any:
    """Open a model in float32 and refuse one of another type, or with weights missing, which would be random."""
    if Path(weights).is_dir() and not (Path(weights) / "config.json").is_file():
        raise FileNotFoundError(f"expected a transformers folder with config.json; {weights} has none")
    options["local_files_only"] = local = is_local_only(weights)
    found = AutoConfig.from_pretrained(weights, local_files_only=local).model_type
    if found != expected:
        raise ValueError(f"expected a model of type {expected!r}; got {found!r}")
    model, loading_info = kind.from_pretrained(weights, dtype=torch.float32, output_loading_info=True, **options)
    if loading_info["missing_keys"]:
        raise ValueError(
            f"expected all of its weights; {', '.join(sorted(loading_info['missing_keys'])[:3])}, ... are missing"
        )
    return model


def _architecture_tag(config: Any) -> str:
    width = SIZE_LETTERS.get(config.hidden_size, f"{config.hidden_size}x{config.num_hidden_layers}-")
    return f"vit{width}{config.patch_size}"


def _resize_and_crop(picture: Image.Image, short: int, side: int) -> Float[Tensor, "3 s s"]:
    """Scale the short side to `short` and cut the central square, both as the torchvision transforms of the original
    code do it."""
    w, h = picture.size
    size = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    scaled = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((n - side) / 2) for n in scaled.size)
    return _to_tensor(scaled.crop((left, top, left + side, top + side)))


def _to_tensor(picture: Image.Image) -> Float[Tensor, "3 h w"]:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def _normalise(pixels: Float[Tensor, "n 3 h w"], moments: Sequence[Sequence[float]]) -> Float[Tensor, "n 3 h w"]:
    mean, deviation = (torch.tensor(m)[:, None, None] for m in moments)
    return (pixels - mean) / deviation
