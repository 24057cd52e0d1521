"""LLaVA-OneVision (arXiv 2408.03326), the paper's critic; the embedded toy critic is the same classes at toy size.

Each image is padded to a square with the mean colour and resized to the vision tower's square, without tiles, as the
model's own processor prepares several images. A question about one image is asked in this form too. So an image has
one set of tokens, whatever its questions are, and their number does not depend on its size. The question and the images
are laid out by the model's own chat template.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Self

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from npedit.critics._chat import ChatCritic, at_least_float32, normalise, resize_bicubic
from npedit.questions import GRADES, WORDINGS

TINY_WORDS = (
    *("yes", "no", "answer", "paint", "make", "remove", "add", "a", "the"),
    *("red", "blue", "circle", "square", "dog", "fence", "it"),
    *GRADES,
)
QUESTION_FIRST = (  # the chat template of the models that `new` makes
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% for part in message['content'] %}{% if part['type'] == 'image' %} <image>{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} answer {% endif %}"
)


class LlavaOnevision(ChatCritic):
    """One frozen model; see `critics/base.py` for the contract."""

    kinds = {"llava_onevision": LlavaOnevisionForConditionalGeneration}
    image_processor = LlavaOnevisionImageProcessorPil
    resample = 3  # bicubic

    @classmethod
    def tiny(cls, seed: int) -> Self:
        """Random weights: vision tower of 2 layers on 32 x 32 pixels, language model of 2 layers, words as tokens."""
        text = " ".join(WORDINGS["plain"].values()).replace("{", " ").replace("}", " ")
        return cls.untrained(
            sorted({*re.findall(r"[a-z]+", text.lower()), *TINY_WORDS}), seed, vision=(32, 64, 2), text=(48, 96, 2)
        )

    @classmethod
    def untrained(
        cls, words: Sequence[str], seed: int, vision: tuple[int, int, int], text: tuple[int, int, int]
    ) -> Self:
        """An untrained model for 32 x 32 pixels in patches of 8, with one token a word (lower case, no punctuation).

        `vision` and `text` are (width, feed-forward width, layers), four heads each. The chat template puts the
        question before the images, so that under causal attention they can be read with it in mind.
        """
        torch.manual_seed(seed)
        side, marks = 32, ["<pad>", "<eos>", "<unk>", "<image>"]
        vocabulary = [*marks, *words]
        inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
        inner.normalizer = normalizers.Lowercase()
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^a-z0-9<>]+"), "removed")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
            additional_special_tokens=["<image>"], model_max_length=256,
        )  # fmt: skip
        tower = SiglipVisionConfig(
            hidden_size=vision[0], intermediate_size=vision[1], num_hidden_layers=vision[2], num_attention_heads=4,
            image_size=side, patch_size=8, vision_use_head=False,
        )  # fmt: skip
        language = Qwen2Config(
            vocab_size=len(vocabulary), hidden_size=text[0], intermediate_size=text[1], num_hidden_layers=text[2],
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, pad_token_id=0, eos_token_id=1,
            bos_token_id=None, tie_word_embeddings=False,
        )  # fmt: skip
        config = LlavaOnevisionConfig(
            vision_config=tower, text_config=language, image_token_index=marks.index("<image>"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="full", image_grid_pinpoints=[[side, side]], tie_word_embeddings=False,
        )  # fmt: skip
        processor = LlavaOnevisionImageProcessorPil(
            size={"height": side, "width": side},
            image_grid_pinpoints=[[side, side]],
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        model = LlavaOnevisionForConditionalGeneration(config)
        return cls(model, tokenizer, processor, QUESTION_FIRST, torch.device("cpu"))

    def encode_images(self, images: Tensor) -> list[Tensor]:
        """(n, 3, H, W) in [0, 1] -> n tensors (tokens, dim): one per patch and the newline."""
        pixels = self.pixels(images).to(self.model.dtype)
        sizes = torch.full((len(pixels), 2), self.side, device=pixels.device)
        together = torch.tensor([max(2, len(pixels))])  # "several images": the model would take one alone for tiles
        return list(self.model.model.get_image_features(pixels, sizes, batch_num_images=together).pooler_output)

    def pixels(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> (n, 3, side, side), padded to a square, scaled and normalised."""
        colour = [int(mean * 255) / 255 for mean in self.processor.image_mean]  # rounded down, as the processor does
        return normalise(resize_bicubic(pad_to_square(images, colour), self.side, self.side), self.processor)

    def hidden_states(
        self, questions: Sequence[str], visual_tokens: Sequence[Sequence[Tensor]]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Hidden states of every layer, each (b, length, dim), and each question's answer position (b,)."""
        rows = [self._prompt_ids(question, looks) for question, looks in zip(questions, visual_tokens)]
        last = torch.tensor([len(r) - 1 for r in rows], device=self.device)
        embedded, _ = self._embed(rows, visual_tokens)
        out = self.model.get_decoder()(inputs_embeds=embedded, use_cache=False, output_hidden_states=True)
        return out.hidden_states, last

    def _set_resolution(self, resolution: int) -> None:
        self.side = self.model.config.vision_config.image_size
        if resolution not in (0, self.side):
            raise ValueError(f"expected resolution 0 or {self.side}, the vision tower's own; got {resolution}")

    def _image_placeholder_text(self, visual_tokens: Tensor) -> str:
        return self.image_token * len(visual_tokens)

    def _answer_text(self, prompt: str, word: str) -> str:
        """The answer follows the prompt at once. The model's own template has a space before the line's end in an
        answered turn and none in the prompt, and that of the toy critic has no answered turns."""
        return word


def pad_to_square(images: Tensor, colour: Sequence[float]) -> Tensor:
    """(n, 3, H, W) in [0, 1] -> (n, 3, longer side, longer side), differentiable: each image in the middle of a square
    of this colour. Of an odd number of added lines, the greater part is below or on the right."""
    height, width = images.shape[-2:]
    if height == width:
        return images
    images, side = at_least_float32(images), max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = torch.tensor(colour, dtype=images.dtype, device=images.device)[:, None, None]
    square = square.repeat(len(images), 1, side, side)
    square[..., top : top + height, left : left + width] = images
    return square
