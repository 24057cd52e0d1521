"""The toy's language as ordinary tokenizers: one token a word, punctuation dropped, every word of the world known."""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from npedit.questions import IDENTITY_INSTRUCTIONS, WORDINGS
from npedit.toy.edits import CAPTIONS, INSTRUCTIONS
from npedit.toy.world import BACKGROUNDS, COLOURS, PATTERNS, PLACES, SHAPES, SIZES, STYLES

SPECIAL_TOKENS = PAD, EOS, UNKNOWN, IMAGE = "<pad>", "<eos>", "<unk>", "<image>"
SPARE_ROWS = 24  # vocabulary rows left free for words to come
SYNONYMS = {
    "color": "colour",
    "recolor": "recolour",
    "gray": "grey",
    "foggy": "fog",
    "violet": "purple",
    "daytime": "day",
}

VALUES = (*SHAPES, *COLOURS, *PATTERNS, *SIZES, *BACKGROUNDS, *STYLES, *PLACES, "")  # what an edit may ask for


def vocabulary() -> list[str]:
    """Every word of captions, instructions and short questions, after the special tokens."""
    text = [t for templates in INSTRUCTIONS.values() for t in templates]
    text += [t for templates in CAPTIONS.values() for t in templates]
    text += [
        *IDENTITY_INSTRUCTIONS,
        *WORDINGS["short"].values(),
        *SHAPES,
        *COLOURS,
        *PATTERNS,
        *SIZES,
        *BACKGROUNDS,
        *STYLES,
        *PLACES,
    ]
    text.append(
        "a and on background at night in fog shape yes no answer the is there which what cell holds nothing from"
    )
    words = sorted({w for line in text for w in re.findall(r"[a-z]+", re.sub(r"{\w+}", "", line))})
    return [*SPECIAL_TOKENS, *words, *(f"<spare{i}>" for i in range(SPARE_ROWS))]


def new_tokenizer(max_length: int, add_eos: bool) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; with `add_eos` it closes each text with the end token, as T5 and CLIP do."""
    ids = {w: i for i, w in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    synonyms = [normalizers.Replace(Regex(rf"\b{a}\b"), b) for a, b in SYNONYMS.items()]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *synonyms])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^a-z<>]+"), "removed")
    if add_eos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, ids[EOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[] if add_eos else [IMAGE],
        model_max_length=max_length,
    )
