"""A family without its published weights: real classes at real size, from the configs of a diffusers folder alone. On
the meta device there are no weights; elsewhere they are random.

Tokenizers are those of the family's `tiny`. They divide a text into more tokens than real tokenizers do, so a short
prompt has as many tokens as a usual prompt has with a real tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from npedit.families.base import Dtypes, Family
from npedit.nets.meta_device import META, read_model_config


def family_without_weights(kind: Any, folder: Path, dtype: Dtypes, device: torch.device = META) -> Family:
    """The family `kind` as the configs in `folder` describe it; the folder needs no weights and no tokenizers.

    Raises:
        FileNotFoundError: the index or a part's config is missing.
        ValueError: it describes another family's pipeline.
    """
    like = kind.tiny(0).pipe
    index = read_model_config(folder / "model_index.json")
    if index["_class_name"] != type(like).__name__:
        raise ValueError(f"expected a {type(like).__name__} in {folder}; got {index['_class_name']}")
    parts: dict[str, Any] = {}
    for name in like.components:
        library, made_by = index.get(name, (None, None))
        if made_by is None:
            parts[name] = None
        elif name.startswith("tokenizer"):
            parts[name] = like.components[name]
            limits = folder / name / "tokenizer_config.json"
            if limits.is_file():
                parts[name].model_max_length = read_model_config(limits).get(
                    "model_max_length", parts[name].model_max_length
                )
        elif name == "scheduler":
            parts[name] = getattr(diffusers, made_by).from_config(
                read_model_config(folder / name / "scheduler_config.json")
            )
        else:
            parts[name] = _empty_model(
                library, made_by, read_model_config(folder / name / "config.json"), _part_dtype(dtype, name), device
            )
    return kind(type(like)(**parts), device)


def _part_dtype(dtype: Dtypes, part: str) -> torch.dtype:
    """The number type of a part, as diffusers' `from_pretrained` chooses it."""
    return dtype.get(part, dtype["default"]) if isinstance(dtype, dict) else dtype


def _empty_model(
    library: str, made_by: str, config: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> nn.Module:
    with device, _default_dtype(dtype):
        if library == "diffusers":
            model = getattr(diffusers, made_by).from_config(config)
        else:
            kind = getattr(transformers, made_by)
            model = kind(kind.config_class.from_dict(config))
    return nn.Module.to(model, dtype)  # diffusers' own `to` warns of layers that it would keep in float32


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors have this type, so that a large model never exists in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
