"""Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL (arXiv 2511.21631).

Images keep their aspect ratio: sides are rounded to multiples of a visual token's side, and the area is kept between
two bounds, as the model's own processor does it; with `resolution`, the area becomes about its square.

The language model needs each image's grid, for its positions in time, rows and columns; so an image's visual tokens
are kept as (rows, columns, dim). Qwen3-VL adds features of earlier layers of its vision tower to the first layers of
its language model (DeepStack); here they stand behind the tokens' own features in `dim`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from npedit.critics._chat import ChatCritic, normalise, resize_bicubic, word_tokenizer

TINY_MARKS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
TINY_TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class QwenVL(ChatCritic):
    """One frozen model; see `critics/base.py` for the contract. `encode_images` gives (rows, columns, dim) an image."""

    kinds = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen3_vl": Qwen3VLForConditionalGeneration}
    image_processor = Qwen2VLImageProcessorPil
    resample = 3  # bicubic

    @classmethod
    def tiny(cls, seed: int, kind: str = "qwen3_vl") -> Self:
        """Random weights: vision tower of 3 layers, language model of 3 layers, words as tokens, 16 pixels a visual
        token, up to 48 x 48 pixels an image. `kind` is one of `kinds`."""
        torch.manual_seed(seed)
        tokenizer = word_tokenizer(TINY_MARKS, "<|im_end|>", {"image_token": "<|image_pad|>"})
        tower: dict[str, Any] = {
            "depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 8,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 48,
        }  # fmt: skip
        language: dict[str, Any] = {
            "vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None,
            "eos_token_id": 2, "pad_token_id": 0,
        }  # fmt: skip
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
        marks = {
            "image_token_id": TINY_MARKS.index("<|image_pad|>"), "video_token_id": TINY_MARKS.index("<|video_pad|>"),
            "vision_start_token_id": 3, "vision_end_token_id": 4, "tie_word_embeddings": False,
        }  # fmt: skip
        if kind == "qwen3_vl":
            tower |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
            language |= {"head_dim": 12, "rope_parameters": rope | {"mrope_interleaved": True}}
            model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=tower, text_config=language, **marks))
        else:
            tower |= {"window_size": 32, "fullatt_block_indexes": [1]}
            language |= {"rope_parameters": rope}
            model = Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(vision_config=tower, text_config=language, **marks)
            )
        size = {"shortest_edge": 32 * 32, "longest_edge": 48 * 48}
        processor = Qwen2VLImageProcessorPil(size=size, patch_size=8, merge_size=2, temporal_patch_size=2)
        return cls(model, tokenizer, processor, TINY_TEMPLATE, torch.device("cpu"))

    def encode_images(self, images: Tensor) -> list[Tensor]:
        """(n, 3, H, W) in [0, 1] -> n tensors (rows, columns, dim), `dim` with the features for DeepStack, if any."""
        patches, grid = self.patches(self.pixels(images))
        out = self.model.model.get_image_features(patches, grid, return_dict=True)
        layers = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
        rows, columns = (grid[0, 1:] // self.processor.merge_size).tolist()
        return [torch.cat(parts, 1).unflatten(0, (rows, columns)) for parts in zip(*layers)]

    def pixels(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> (n, 3, height, width), scaled and normalised."""
        height, width = smart_resize(*images.shape[-2:], self.unit, self.least, self.most)
        return normalise(resize_bicubic(images, height, width), self.processor)

    def patches(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 3, height, width) -> the vision tower's input (n * patches, numbers in one) and its grids (n, 3).

        The patches of a visual token stand together; a still image is two equal frames of a film.
        """
        p, m, frames = self.processor.patch_size, self.processor.merge_size, self.processor.temporal_patch_size
        n, channels, height, width = pixels.shape
        cut = pixels.reshape(n, channels, height // p // m, m, p, width // p // m, m, p)
        cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)[..., None, :, :]  # n, token's row and column, patch's, channel
        cut = cut.expand(*(-1,) * 6, frames, -1, -1)
        grid = torch.tensor([[1, height // p, width // p]] * n, device=pixels.device)
        return cut.reshape(-1, channels * frames * p * p), grid

    def _set_resolution(self, resolution: int) -> None:
        self.unit = self.processor.patch_size * self.processor.merge_size
        if resolution and resolution < self.unit:
            raise ValueError(f"expected resolution 0 or at least {self.unit}, one token's side; got {resolution}")
        size = self.processor.size
        self.least, self.most = size["shortest_edge"], size["longest_edge"]
        if resolution:  # half a pixel either way, so that rounding does not take a token from an exact square
            self.least, self.most = resolution**2 - 0.5, resolution**2 + 0.5

    def _image_placeholder_text(self, visual_tokens: Tensor) -> str:
        return self.image_token * (visual_tokens.shape[0] * visual_tokens.shape[1])

    def _visual_tokens(self, visual_tokens: Tensor) -> Tensor:
        return self._split_deepstack(visual_tokens)[0]

    def _split_deepstack(self, visual_tokens: Tensor) -> tuple[Tensor, ...]:
        """The tokens' own features and those for DeepStack, each (tokens, dim of the language model)."""
        return visual_tokens.flatten(0, 1).split(self.model.config.text_config.hidden_size, dim=1)

    def _decoder_inputs(
        self, rows: Sequence[Sequence[int]], holes: Tensor, visual_tokens: Sequence[Sequence[Tensor]]
    ) -> dict[str, Any]:
        ids = torch.zeros(3, *holes.shape, dtype=torch.long)
        for i, (row, looks) in enumerate(zip(rows, visual_tokens)):
            ids[:, i, : len(row)] = self._rope_positions(row, iter(looks))
        extras: dict[str, Any] = {"position_ids": ids.to(self.device)}
        _, *deep = zip(*(self._split_deepstack(s) for looks in visual_tokens for s in looks))
        if deep:
            extras |= {"visual_pos_masks": holes, "deepstack_visual_embeds": [torch.cat(layer) for layer in deep]}
        return extras

    def _next_decoder_inputs(self, extras: dict[str, Any]) -> dict[str, Any]:
        return {"position_ids": (extras["position_ids"].amax() + 1).expand(3, 1, 1)}

    def _rope_positions(self, row: Sequence[int], looks: Iterator[Tensor]) -> Tensor:
        """Positions (3, length) in time, rows and columns. Words count on from the largest number so far; an image is
        one moment of rows and columns that begin there."""
        parts, start, at = [], 0, 0
        while at < len(row):
            height, width = next(looks).shape[:2] if row[at] == self.model.config.image_token_id else (1, 1)
            parts.append(start + torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width)).T)
            start += max(height, width)
            at += height * width
        return torch.cat(parts, 1)
