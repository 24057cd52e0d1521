"""Tiny DINO and CLIP weights, saved as ordinary folders: the real classes with random weights."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, ViTConfig, ViTModel

WORDS = ("a", "red", "blue", "circle", "dog", "can", "snow", "in", "the", "on", "toy")


def dino(folder: Path, seed: int = 0) -> str:
    """A ViT of width 32 on 28 x 28 pixels in patches of 7; the weights are wide enough that pictures differ."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=28, patch_size=7,
        initializer_range=0.2,
    )  # fmt: skip
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def clip(folder: Path, seed: int = 0) -> str:
    """A CLIP of width 32 on 28 x 28 pixels, texts of at most 8 tokens, one a word."""
    torch.manual_seed(seed)
    vocabulary = ["<start>", "<end>", "<unk>", *WORDS]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<start>", eos_token="<end>", unk_token="<unk>", pad_token="<end>"
    )
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config=dict(
            tower, vocab_size=len(vocabulary), max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1
        ),
        vision_config=dict(tower, image_size=28, patch_size=7),
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
