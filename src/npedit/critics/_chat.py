"""What critics with a chat template share: opening, the prompt with its images, answers, and text.

A family adds how its images become visual tokens (`pixels`, `encode_images`), which text stands for one image
(`_image_placeholder_text`), and the further inputs of its language model (`_decoder_inputs`). Rows of a batch are
padded on the right: under causal attention the padding cannot reach the answer position, so no mask is needed.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.image_processing_backends import PilBackend
from transformers.utils import cached_file

from npedit.critics._bits import freeze_on, quantisation_arguments
from npedit.critics._packing import PackedRow, answer_positions, can_pack, pack_rows, packed_inputs
from npedit.critics.base import Critic, answer_scale, answer_token
from npedit.hub_access import is_local_only
from npedit.questions import GRADES, WORDINGS

TINY_TEXTS = (
    "Yes No is it ? user assistant User Assistant : \n",
    "paint make remove add a the red blue circle square dog fence it",
    " ".join(GRADES),
    *(text.replace("{", " ").replace("}", " ") for wording in WORDINGS.values() for text in wording.values()),
)


class ChatCritic(Critic):
    """One frozen model; see `critics/base.py` for the contract."""

    kinds: ClassVar[Mapping[str, type[PreTrainedModel]]]  # config.json's model_type -> the class that opens it
    image_processor: ClassVar[type[PilBackend]]
    resample: ClassVar[int]  # Pillow's number of the filter that `pixels` imitates

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        processor: PilBackend,
        template: str,
        device: torch.device,
        resolution: int = 0,
    ):
        self.model = freeze_on(model, device)
        self.tokenizer, self.processor, self.template, self.device = tokenizer, processor, template, device
        if processor.resample != self.resample:
            raise ValueError(
                f"expected an image processor with Pillow's filter {self.resample}; got {processor.resample}. "
                "Its images would be scaled in another way than the model has learned."
            )
        self._scales: dict[tuple[str, ...], tuple[list[int], list[int]]] = {}
        self._set_resolution(resolution)
        image = model.config.image_token_id
        self.image_token = tokenizer.convert_ids_to_tokens(image)
        if tokenizer(self._prompt("is it?", 2), add_special_tokens=False).input_ids.count(image) != 2:
            raise ValueError("expected the chat template to place two images for a question about two; it does not")
        prompt = self._prompt("is it?", 1)
        self.yes, self.no = (answer_token(tokenizer, prompt, self._answer_text(prompt, word)) for word in ("Yes", "No"))
        ends = model.generation_config.eos_token_id
        self.stop_tokens = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    @classmethod
    def load(
        cls, weights: str | Path, dtype: torch.dtype, device: torch.device, resolution: int = 0, bits: int = 0
    ) -> Self:
        """Open a Hub id or a local folder. Errors as in `Critic.load`."""
        how = quantisation_arguments(bits, dtype, device)
        kind, local = read_model_type(weights, cls.kinds), is_local_only(weights)
        tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=local)
        processor = cls.image_processor.from_pretrained(weights, local_files_only=local)
        template = chat_template(weights, tokenizer)
        model = cls.kinds[kind].from_pretrained(weights, dtype=dtype, **how, local_files_only=local)
        return cls(model, tokenizer, processor, template, device, resolution)

    @abstractmethod
    def pixels(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] -> what the image processor makes of it, differentiable: scaled and normalised."""

    @abstractmethod
    def _set_resolution(self, resolution: int) -> None:
        """Set the side in pixels that images are scaled to; 0 is the default of the model. ValueError for a side that
        the model does not take."""

    @abstractmethod
    def _image_placeholder_text(self, visual_tokens: Tensor) -> str:
        """The text that stands for one image: `mark` once for each visual token, and what the model has around it."""

    def _visual_tokens(self, visual_tokens: Tensor) -> Tensor:
        """The visual tokens (tokens, dim) of one image that take the place of its marks."""
        return visual_tokens

    def _decoder_inputs(
        self, rows: Sequence[Sequence[int]], holes: Tensor, visual_tokens: Sequence[Sequence[Tensor]]
    ) -> dict[str, Any]:
        """Inputs of the language model beside the embeddings. `holes` (b, length) is true where image tokens are."""
        return {}

    def logits(
        self,
        questions: Sequence[str],
        visual_tokens: Sequence[Sequence[Tensor]],
        packed: bool = False,
        answers: Sequence[tuple[str, ...]] = (),
    ) -> Tensor:
        """(b, vocabulary) float32; see `Critic.logits`."""
        return self.model.lm_head(self.states(questions, visual_tokens, packed, answers)).float()

    def states(
        self,
        questions: Sequence[str],
        visual_tokens: Sequence[Sequence[Tensor]],
        packed: bool = False,
        answers: Sequence[tuple[str, ...]] = (),
    ) -> Tensor:
        """The language model's last hidden state at each question's answer position, (b, dim)."""
        rows = [self._prompt_ids(question, looks) for question, looks in zip(questions, visual_tokens)]
        if answers:
            rows = [row + self._answer_scale(words)[0] for row, words in zip(rows, answers, strict=True)]
        if packed and can_pack(self.model):
            packed_rows = pack_rows(rows, visual_tokens, self.model.config.image_token_id)
            if len(packed_rows) < len(rows):
                return self._packed_states(packed_rows)
        return self._last_states(rows, visual_tokens)

    def _packed_states(self, rows: Sequence[PackedRow]) -> Tensor:
        """The last hidden state at the last token of each question, (questions, dim)."""
        embedded, extras = self._embed([row.ids for row in rows], [row.pictures for row in rows])
        extras = packed_inputs(rows, extras, self.device)
        hidden = self.model.get_decoder()(inputs_embeds=embedded, use_cache=False, **extras).last_hidden_state
        return hidden[answer_positions(rows, self.device)]

    def answer_id(self, word: str) -> int:
        """See `Critic.answer_id`."""
        prompt = self._prompt("is it?", 1)
        return answer_token(self.tokenizer, prompt, self._answer_text(prompt, word))

    def answer_ids(self, answers: Sequence[str]) -> list[int]:
        """See `Critic.answer_ids`."""
        return self._answer_scale(tuple(answers))[1]

    def _answer_scale(self, answers: tuple[str, ...]) -> tuple[list[int], list[int]]:
        """The tokens before a question's answers, and the token of each answer; see `answer_scale`."""
        if answers not in self._scales:
            prompt = self._prompt("is it?", 1)
            words = [self._answer_text(prompt, word) for word in answers]
            self._scales[answers] = answer_scale(self.tokenizer, prompt, words)
        return self._scales[answers]

    def _last_states(self, rows: Sequence[Sequence[int]], visual_tokens: Sequence[Sequence[Tensor]]) -> Tensor:
        """The last hidden state at the last token of each row of token ids, (b, dim)."""
        last = torch.tensor([len(r) - 1 for r in rows], device=self.device)
        embedded, extras = self._embed(rows, visual_tokens)
        hidden = self.model.get_decoder()(inputs_embeds=embedded, use_cache=False, **extras).last_hidden_state
        return hidden[torch.arange(len(rows), device=self.device), last]

    def _embed(
        self, rows: Sequence[Sequence[int]], visual_tokens: Sequence[Sequence[Tensor]]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Embeddings (b, length, dim) of rows of token ids, visual tokens in place, and what goes with them."""
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True).to(self.device)
        embedded = self.model.get_input_embeddings()(ids)
        holes = ids == self.model.config.image_token_id
        visual = torch.cat([self._visual_tokens(s) for looks in visual_tokens for s in looks]).to(embedded.dtype)
        marks = sum(row.count(self.model.config.image_token_id) for row in rows)
        if marks != len(visual):
            raise ValueError(f"expected one mark in the prompts for each of {len(visual)} visual tokens; got {marks}")
        return embedded.masked_scatter(holes[:, :, None], visual), self._decoder_inputs(rows, holes, visual_tokens)

    @torch.no_grad()
    def generate_text(self, prompts: Sequence[str], images: Sequence[Sequence[Tensor]], max_tokens: int) -> list[str]:
        """Greedy text, one prompt after the other."""
        texts = []
        for prompt, pictures in zip(prompts, images):
            visual_tokens = [self.encode_images(p[None].to(self.device))[0] for p in pictures]
            words = self._generate(self._prompt_ids(prompt, visual_tokens), visual_tokens, max_tokens)
            texts.append(self.tokenizer.decode(words, skip_special_tokens=True).strip())
        return texts

    def _generate(self, row: Sequence[int], visual_tokens: Sequence[Tensor], max_tokens: int) -> list[int]:
        """The likeliest tokens after a row, one by one up to an end; keys and values of what was read are kept."""
        words: list[int] = []
        kept = None
        embedded, extras = self._embed([row], [visual_tokens])
        while len(words) < max_tokens and not (words and words[-1] in self.stop_tokens):
            decoder = self.model.get_decoder()
            out = decoder(inputs_embeds=embedded, past_key_values=kept, use_cache=True, **extras)
            kept = out.past_key_values
            scores = self.model.lm_head(out.last_hidden_state[0, -1])
            scores[self.model.config.image_token_id] = -torch.inf  # a mark is no word
            words.append(int(scores.argmax()))
            embedded = self.model.get_input_embeddings()(torch.tensor([words[-1:]], device=self.device))
            extras = self._next_decoder_inputs(extras)
        return words

    def _next_decoder_inputs(self, extras: dict[str, Any]) -> dict[str, Any]:
        """The further inputs for one more token, after a call with `extras`."""
        return {}

    def save(self, folder: Path) -> None:
        """Write an ordinary transformers folder."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(self.template)

    def _prompt(self, question: str, images: int) -> str:
        turn = _chat_turn("user", without_marks(question, self.tokenizer), images)
        return self._chat([turn], add_generation_prompt=True)

    def _chat(self, turns: list[dict[str, Any]], **options: bool) -> str:
        return self.tokenizer.apply_chat_template(turns, chat_template=self.template, tokenize=False, **options)

    def _answer_text(self, prompt: str, word: str) -> str:
        """An answer as the template writes it after the prompt "is it?": with the space before it, if any."""
        whole = self._chat([_chat_turn("user", "is it?", 1), _chat_turn("assistant", word, 0)])
        before, found, _ = whole.removeprefix(prompt).partition(word)
        if not (whole.startswith(prompt) and found) or before.strip():
            raise ValueError(
                f"expected the chat template to put an answer right after its prompt, which ends in {prompt[-40:]!r}; "
                f"got {whole[-80:]!r}. A model that thinks first cannot be asked Yes/No questions: choose its sibling "
                "that answers at once."
            )
        return before + word

    def _prompt_ids(self, question: str, looks: Sequence[Tensor]) -> list[int]:
        """Token ids of the prompt about these images' visual tokens."""
        first, *others = self._prompt(question, len(looks)).split(self.image_token)
        text = first + "".join(self._image_placeholder_text(s) + piece for s, piece in zip(looks, others))
        return self.tokenizer(text, add_special_tokens=False).input_ids


def without_marks(question: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """A question without the texts that stand for special tokens: the instruction in it must not place images, nor end
    the user's turn."""
    for mark in tokenizer.get_added_vocab():
        question = question.replace(mark, " ")
    return question


def _chat_turn(role: str, text: str, images: int) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def read_model_type(weights: str | Path, known: Mapping[str, Any]) -> str:
    """The model_type in config.json of a folder or Hub id.

    Raises:
        FileNotFoundError: there is no config.json in the folder.
        ValueError: it is none of `known`.
    """
    if Path(weights).is_dir() and not (Path(weights) / "config.json").is_file():
        raise FileNotFoundError(f"expected a transformers folder with config.json; {weights} has none")
    config, _ = PreTrainedConfig.get_config_dict(weights, local_files_only=is_local_only(weights))
    kind = config.get("model_type")
    if kind not in known:
        raise ValueError(
            f"expected a model of {' or '.join(known)} in {weights}; got {kind}. Choose that critic instead, or the "
            "weights in transformers' own format (where there are two, their name ends in -hf)."
        )
    return kind


def chat_template(weights: str | Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """The processor's chat template, which knows images, before the tokenizer's own."""
    local = is_local_only(weights)
    for name in ("chat_template.jinja", "chat_template.json"):
        path = cached_file(weights, name, _raise_exceptions_for_missing_entries=False, local_files_only=local)
        if path is not None:
            text = Path(path).read_text(encoding="utf-8")
            return json.loads(text)["chat_template"] if name.endswith(".json") else text
    if tokenizer.chat_template is None:
        raise FileNotFoundError(f"expected a chat template (chat_template.jinja) in {weights}; found none")
    return tokenizer.chat_template


def at_least_float32(images: Tensor) -> Tensor:
    """Images held to [0, 1], in float32 or better."""
    return images.clamp(0, 1).to(torch.promote_types(images.dtype, torch.float32))


def resize_bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """(n, 3, H, W) in [0, 1] -> (n, 3, height, width), bicubic with antialias, differentiable.

    As Pillow does it: the width first, then the height, each result held to [0, 1]. (From version 13 on, Pillow takes
    some tall pictures' height first; that differs where a hard edge overshoots.)
    """
    images = at_least_float32(images)
    for size in ((images.shape[-2], width), (height, width)):
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return images


def normalise(images: Tensor, processor: PilBackend) -> Tensor:
    """(n, 3, H, W) less each channel's mean, divided by its deviation."""
    mean = torch.tensor(processor.image_mean, device=images.device)[:, None, None]
    std = torch.tensor(processor.image_std, device=images.device)[:, None, None]
    return (images - mean) / std


def word_tokenizer(special: Sequence[str], eos: str, named: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """A tokenizer for tests with one token a word, the space before it included, as real ones have it.

    `special` are tokens of their own, the first one for padding; `named` makes some known by a name.
    """
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {w.removeprefix("Ġ") for text in TINY_TEXTS for w, _ in cut.pre_tokenize_str(text)}
    vocabulary = [*special, "<unk>", *sorted(words), *("Ġ" + w for w in sorted(words))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = cut, decoders.ByteLevel()
    inner.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=special[0], eos_token=eos, unk_token="<unk>", extra_special_tokens=dict(named)
    )
