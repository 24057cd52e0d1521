"""LLaVA-OneVision (arXiv 2408.03326), the paper's critic; the embedded toy critic is the same classes at toy size.

Each image is resized to the vision tower's square without tiles, as the model's own processor makes the base patch of
a single image. The question and the images are laid out by the model's own chat template; the padding on the right,
under causal attention, cannot reach the answer position, so no mask is needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from npedit.critics._bits import freeze_on, quantisation_arguments
from npedit.critics._chat import chat_template, without_marks
from npedit.critics._packing import PackedRow, answer_positions, can_pack, pack_rows, packed_inputs
from npedit.critics.base import Critic, answer_token
from npedit.hub_access import is_local_only
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


class LlavaOnevision(Critic):
    """One frozen model; see `critics/base.py` for the contract."""

    def __init__(
        self,
        model: LlavaOnevisionForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        processor: LlavaOnevisionImageProcessorPil,
        template: str,
        device: torch.device,
        resolution: int = 0,
    ):
        self.model = freeze_on(model, device)
        self.tokenizer = tokenizer
        self.processor = processor
        self.template = template
        self.device = device
        self.side = model.config.vision_config.image_size
        if resolution not in (0, self.side):
            raise ValueError(f"expected resolution 0 or {self.side}, the vision tower's own; got {resolution}")
        self.image_token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
        prompt = self._prompt("is it?", 1)
        self.yes, self.no = answer_token(tokenizer, prompt, "Yes"), answer_token(tokenizer, prompt, "No")
        if self._prompt_ids("is it?", (1, 1)).count(model.config.image_token_id) != 2:
            raise ValueError("expected the chat template to place two images for a question about two; it does not")

    @classmethod
    def load(
        cls, weights: str | Path, dtype: torch.dtype, device: torch.device, resolution: int = 0, bits: int = 0
    ) -> Self:
        """Open a Hub id or a local folder. Errors as in `Critic.load`."""
        how = quantisation_arguments(bits, dtype, device)
        if Path(weights).is_dir():
            config = Path(weights) / "config.json"
            if not config.is_file():
                raise FileNotFoundError(f"expected a transformers folder with config.json; {weights} has none")
            kind = json.loads(config.read_text()).get("model_type")
            if kind != "llava_onevision":
                raise ValueError(
                    f"expected a llava_onevision model in {weights}; got {kind}. Choose that critic instead."
                )
        local = is_local_only(weights)
        how |= {"dtype": dtype, "local_files_only": local}
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(weights, **how)
        tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=local)
        processor = LlavaOnevisionImageProcessorPil.from_pretrained(weights, local_files_only=local)
        return cls(model, tokenizer, processor, chat_template(weights, tokenizer), device, resolution)

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
        together = torch.tensor([max(2, len(pixels))])  # "several images": one square each, no tiles
        return list(self.model.model.get_image_features(pixels, sizes, batch_num_images=together).pooler_output)

    def pixels(self, images: Tensor) -> Tensor:
        """The image processor's work in torch, differentiable: bicubic with antialias to the square, then normalise.

        As Pillow does it: the width first, then the height, each result held to [0, 1]. (From version 13 on, Pillow
        takes some tall pictures' height first; that differs where a hard edge overshoots.)
        """
        images = images.clamp(0, 1)
        for size in ((images.shape[-2], self.side), (self.side, self.side)):
            if images.shape[-2:] != size:
                images = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False).clamp(
                    0, 1
                )
        mean = torch.tensor(self.processor.image_mean, device=images.device)[:, None, None]
        std = torch.tensor(self.processor.image_std, device=images.device)[:, None, None]
        return (images - mean) / std

    def logits(
        self,
        questions: Sequence[str],
        visual_tokens: Sequence[Sequence[Tensor]],
        packed: bool = False,
        answers: Sequence[tuple[str, ...]] = (),
    ) -> Tensor:
        """(b, vocabulary) float32; see `Critic.logits`. No token stands before an answer."""
        if packed and can_pack(self.model):
            rows = self._prompt_rows(questions, visual_tokens)
            packed_rows = pack_rows(rows, visual_tokens, self.model.config.image_token_id)
            if len(packed_rows) < len(rows):
                return self.model.lm_head(self._packed_states(packed_rows)).float()
        hidden, last = self.hidden_states(questions, visual_tokens)
        return self.model.lm_head(hidden[-1][torch.arange(len(last)), last]).float()

    def _packed_states(self, rows: Sequence[PackedRow]) -> Tensor:
        """The last hidden state at the last token of each question, (questions, dim)."""
        embedded = self._embed([row.ids for row in rows], [row.pictures for row in rows])
        extras = packed_inputs(rows, {}, self.device)
        out = self.model.model.language_model(inputs_embeds=embedded, use_cache=False, **extras)
        return out.last_hidden_state[answer_positions(rows, self.device)]

    def hidden_states(
        self, questions: Sequence[str], visual_tokens: Sequence[Sequence[Tensor]]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Hidden states of every layer, each (b, length, dim), and each question's answer position (b,)."""
        rows = self._prompt_rows(questions, visual_tokens)
        last = torch.tensor([len(r) - 1 for r in rows], device=self.device)
        embedded = self._embed(rows, visual_tokens)
        out = self.model.model.language_model(inputs_embeds=embedded, use_cache=False, output_hidden_states=True)
        return out.hidden_states, last

    def _prompt_rows(self, questions: Sequence[str], visual_tokens: Sequence[Sequence[Tensor]]) -> list[list[int]]:
        return [self._prompt_ids(q, tuple(len(s) for s in looks)) for q, looks in zip(questions, visual_tokens)]

    def _embed(self, rows: Sequence[list[int]], visual_tokens: Sequence[Sequence[Tensor]]) -> Tensor:
        """Embeddings (b, length, dim) of rows of token ids, with the visual tokens in place. Padding is on the
        right."""
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=0)
        ids = padded.to(self.device)
        embedded = self.model.get_input_embeddings()(ids)
        holes = ids == self.model.config.image_token_id
        visual = torch.cat([s for looks in visual_tokens for s in looks]).to(embedded.dtype)
        return embedded.masked_scatter(holes[:, :, None], visual)

    def answer_id(self, word: str) -> int:
        """See `Critic.answer_id`."""
        return answer_token(self.tokenizer, self._prompt("is it?", 1), word)

    @torch.no_grad()
    def generate_text(self, prompts: Sequence[str], images: Sequence[Sequence[Tensor]], max_tokens: int) -> list[str]:
        """Greedy text, one prompt after the other; keys and values of what was read are kept."""
        texts, embed = [], self.model.get_input_embeddings()
        for prompt, pictures in zip(prompts, images):
            visual_tokens = [self.encode_images(p[None].to(self.device))[0] for p in pictures]
            row = torch.tensor([self._prompt_ids(prompt, tuple(len(s) for s in visual_tokens))], device=self.device)
            holes = row == self.model.config.image_token_id
            embedded = embed(row)
            embedded = embedded.masked_scatter(holes[:, :, None], torch.cat(visual_tokens).to(embedded.dtype))
            ids: list[int] = []
            kept = None
            while len(ids) < max_tokens and not (ids and ids[-1] == self.tokenizer.eos_token_id):
                out = self.model.model.language_model(inputs_embeds=embedded, past_key_values=kept, use_cache=True)
                kept = out.past_key_values
                scores = self.model.lm_head(out.last_hidden_state[0, -1])
                scores[self.model.config.image_token_id] = -torch.inf  # a mark is no word
                ids.append(int(scores.argmax()))
                embedded = embed(torch.tensor([ids[-1:]], device=self.device))
            texts.append(self.tokenizer.decode(ids, skip_special_tokens=True))
        return texts

    def save(self, folder: Path) -> None:
        """Write an ordinary transformers folder."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(self.template)

    def _prompt(self, question: str, images: int) -> str:
        content = [{"type": "image"}] * images + [{"type": "text", "text": without_marks(question, self.tokenizer)}]
        chat = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(
            chat, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )

    def _prompt_ids(self, question: str, visual_tokens: tuple[int, ...]) -> list[int]:
        """Token ids of the prompt with each image's mark repeated for its visual tokens."""
        ids, image = [], 0
        for token in self.tokenizer(self._prompt(question, len(visual_tokens)), add_special_tokens=False).input_ids:
            if token == self.model.config.image_token_id:
                ids += [token] * visual_tokens[image]
                image += 1
            else:
                ids.append(token)
        return ids
