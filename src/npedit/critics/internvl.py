"""InternVL3 (arXiv 2504.10479) and its relatives, in transformers' own classes (weights whose names end in -hf).

Each image is resized to one square tile, without the further tiles that the model's own processor may cut (its
`crop_to_patches`): what NP-Edit's public code does too. The tile's side may be another than the model's own 448; then
the vision tower interpolates its positions. The cost grows with the side's square.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor
from torch.nn.init import normal_
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from npedit.critics._chat import ChatCritic, normalise, resize_bicubic, word_tokenizer

TINY_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
TINY_TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class InternVL(ChatCritic):
    """One frozen model; see `critics/base.py` for the contract."""

    kinds = {"internvl": InternVLForConditionalGeneration}
    image_processor = GotOcr2ImageProcessorPil
    resample = 3  # bicubic

    @classmethod
    def tiny(cls, seed: int) -> Self:
        """Random weights: vision tower of 2 layers on 32 x 32 pixels, language model of 2 layers, words as tokens."""
        torch.manual_seed(seed)
        named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
        tokenizer = word_tokenizer(TINY_MARKS, "<|im_end|>", named | {"video_token": "<video>"})
        tower = InternVLVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32,
            patch_size=8,
        )  # fmt: skip
        language = Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        config = InternVLConfig(
            vision_config=tower, text_config=language, image_token_id=TINY_MARKS.index("<IMG_CONTEXT>"),
            image_seq_length=4, tie_word_embeddings=False,
        )  # fmt: skip
        model = InternVLForConditionalGeneration(config)
        normal_(model.model.vision_tower.embeddings.position_embeddings, std=0.5)  # they begin as zeros
        processor = GotOcr2ImageProcessorPil(
            size={"height": 32, "width": 32}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
        )
        return cls(model, tokenizer, processor, TINY_TEMPLATE, torch.device("cpu"))

    def encode_images(self, images: Tensor) -> list[Tensor]:
        """(n, 3, H, W) in [0, 1] -> n tensors (tokens, dim)."""
        return list(self.model.model.get_image_features(self.pixels(images), return_dict=True).pooler_output)

    def pixels(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> (n, 3, side, side), scaled and normalised."""
        return normalise(resize_bicubic(images, self.side, self.side), self.processor)

    def _set_resolution(self, resolution: int) -> None:
        unit = round(self.model.config.vision_config.patch_size[0] / self.model.config.downsample_ratio)
        if resolution % unit:
            raise ValueError(f"expected resolution 0 or a multiple of {unit}, one token's side; got {resolution}")
        self.side = resolution or self.processor.size["height"]

    def _image_placeholder_text(self, visual_tokens: Tensor) -> str:
        return self.tokenizer.start_image_token + self.image_token * len(visual_tokens) + self.tokenizer.end_image_token
