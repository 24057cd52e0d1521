"""A critic without its published weights: the real class at real size, from `config.json` and
`preprocessor_config.json` alone. On the meta device there are no weights; elsewhere they are random. Tokenizer and chat
template are those of the critic's `tiny`: one token a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from npedit.critics.base import Critic
from npedit.nets.meta_device import META, read_model_config


def critic_without_weights(
    kind: Any, folder: Path, dtype: torch.dtype, resolution: int, device: torch.device = META
) -> Critic:
    """The critic `kind` as the configs in `folder` describe it; weights and tokenizer need not lie there.

    Raises:
        FileNotFoundError: a config is missing.
        ValueError: it describes a model of another kind.
    """
    like = kind.tiny(0)
    raw, seen = read_model_config(folder / "config.json"), read_model_config(folder / "preprocessor_config.json")
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    config.image_token_id = like.model.config.image_token_id  # as the tokenizer here has it
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    fitting = getattr(kind, "kinds", {like.model.config.model_type: type(like.model)})
    if not isinstance(model, tuple(fitting.values())):
        raise ValueError(f"expected a model of {' or '.join(fitting)} in {folder}; got {config.model_type}")
    processor = type(like.processor)(**{k: v for k, v in seen.items() if not k.endswith("_type")})
    return kind(model, like.tokenizer, processor, like.template, device, resolution)
