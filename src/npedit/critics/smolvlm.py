"""SmolVLM2 (arXiv 2504.05299), the small critic: 0.25, 0.5 and 2.2 thousand million weights.

Each image is resized to the vision tower's square, the "global image" of the model's own processor without
`do_image_splitting`. That processor scales twice with Lanczos' filter: the longer side to `size`, then both sides to
the square; so does `pixels`, as products with the matrices of Pillow's own coefficients.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor
from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import (
    SmolVLMImageProcessorPil,
    get_resize_output_image_size,
)

from npedit.critics._chat import ChatCritic, at_least_float32, normalise, word_tokenizer

AROUND, GLOBAL = "<fake_token_around_image>", "<global-img>"
TINY_MARKS = ("<|im_end|>", "<|im_start|>", "<end_of_utterance>", AROUND, GLOBAL, "<image>")
TINY_TEMPLATE = (
    "<|im_start|>{% for turn in messages %}{{ turn['role'] | capitalize }}"
    "{% if turn['content'][0]['type'] == 'image' %}:{% else %}{{ ': ' }}{% endif %}{% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


class SmolVLM(ChatCritic):
    """One frozen model; see `critics/base.py` for the contract."""

    kinds = {"smolvlm": SmolVLMForConditionalGeneration}
    image_processor = SmolVLMImageProcessorPil
    resample = 1  # Lanczos

    @classmethod
    def tiny(cls, seed: int) -> Self:
        """Random weights: vision tower of 2 layers on 32 x 32 pixels, language model of 2 layers, words as tokens."""
        torch.manual_seed(seed)
        tokenizer = word_tokenizer(TINY_MARKS, "<end_of_utterance>", {})
        tower = SmolVLMVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32,
            patch_size=8,
        )  # fmt: skip
        language = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        config = SmolVLMConfig(
            vision_config=tower, text_config=language, image_token_id=TINY_MARKS.index("<image>"), pad_token_id=0
        )
        model = SmolVLMForConditionalGeneration(config)
        processor = SmolVLMImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 32})
        return cls(model, tokenizer, processor, TINY_TEMPLATE, torch.device("cpu"))

    def encode_images(self, images: Tensor) -> list[Tensor]:
        """(n, 3, H, W) in [0, 1] -> n tensors (tokens, dim)."""
        inner = self.model.model  # its own get_image_features takes an evenly grey image for padding and drops it
        hidden = inner.vision_model(self.pixels(images).to(self.model.dtype), return_dict=True).last_hidden_state
        return list(inner.connector(hidden))

    def pixels(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> (n, 3, side, side), scaled twice and normalised."""
        longest = self.processor.size["longest_edge"]
        images = resize_lanczos(at_least_float32(images), *get_resize_output_image_size(images, longest))
        return normalise(resize_lanczos(images, self.side, self.side), self.processor)

    def _set_resolution(self, resolution: int) -> None:
        self.side = self.processor.max_image_size["longest_edge"]
        if resolution not in (0, self.side):
            raise ValueError(f"expected resolution 0 or {self.side}, the vision tower's own; got {resolution}")

    def _image_placeholder_text(self, visual_tokens: Tensor) -> str:
        return AROUND + GLOBAL + self.image_token * len(visual_tokens) + AROUND


def resize_lanczos(images: Tensor, height: int, width: int) -> Tensor:
    """(n, 3, H, W) in [0, 1] -> (n, 3, height, width), differentiable.

    As Pillow does it: the width first, then the height, each result held to [0, 1]. (From version 13 on, Pillow takes
    some tall pictures' height first; that differs where a hard edge overshoots.)
    """
    if images.shape[-1] != width:
        images = (images @ _lanczos_weights(images.shape[-1], width).T.to(images)).clamp(0, 1)
    if images.shape[-2] != height:
        images = (_lanczos_weights(images.shape[-2], height).to(images) @ images).clamp(0, 1)
    return images


@lru_cache(maxsize=32)
def _lanczos_weights(old: int, new: int) -> Tensor:
    """Pillow's coefficients (new, old) for a line of `old` pixels scaled to `new`, float64.

    Lanczos' window has three lobes each way, widened where the line gets shorter; pixels that lie outside of the line
    do not count. Source: ImagingPrecompute in Pillow's Resample.c.
    """
    scale = old / new
    widened = max(scale, 1.0)
    weights = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre, reach = (i + 0.5) * scale, 3 * widened
        first, end = max(0, math.floor(centre - reach + 0.5)), min(old, math.floor(centre + reach + 0.5))
        x = (torch.arange(first, end, dtype=torch.float64) - centre + 0.5) / widened
        row = torch.sinc(x) * torch.sinc(x / 3) * (x.abs() < 3)
        weights[i, first:end] = row / row.sum()
    return weights
