"""A judge in this process: a vision-language model of transformers, opened by the classes in critics/.

It reads greedily, one question at a time, so the same question gets the same answer. Pictures are scaled as the
model's own image processor does it. With `answer_choices` it writes nothing: the probabilities of those words as the
answer are read from its logits.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor

from npedit.critics._chat import read_model_type
from npedit.critics.base import Critic
from npedit.errors import UserError
from npedit.judges.base import OK, JudgeModel, Reply, RequestSettings
from npedit.nets.device import default_dtype, pick_device
from npedit.recipe import config

DOWNLOAD_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # files that are fetched from the Hub


class LocalJudge(JudgeModel):
    """A judge with open weights. `family` is the file in critics/ that opens the model. `revision` identifies the
    weights: the Hub's commit, or a hash of the files."""

    def __init__(self, critic: Critic, name: str, family: str, revision: str):
        self.critic, self.name, self.family, self.revision = critic, name, family, revision
        self._dtype = str(next(critic.model.parameters()).dtype).removeprefix("torch.")

    @classmethod
    def open(cls, weights: str) -> Self:
        """A folder, "embedded", or a Hub id, with @ and a revision behind it if need be. bfloat16 on CUDA, float32 on a
        CPU.

        Raises:
            UserError: it cannot be opened.
        """
        device = pick_device()
        dtype = default_dtype(device)
        try:
            folder, revision = _resolve_weights(weights)
            family = _family_by_model_type()[read_model_type(folder, _family_by_model_type())]
            critic = config.find_class("critics", family).load(folder, dtype, device)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"expected a judge: a folder or Hub id of one of {', '.join(sorted(_family_by_model_type()))}, "
                f"or a server's address; got {weights}, where {error}; correct the name, or choose another judge"
            ) from None
        return cls(critic, weights, family, revision)

    @property
    def identity(self) -> dict[str, Any]:
        """See `JudgeModel.identity`. Not the name: a folder that moves is the same judge."""
        return {"kind": "local", "family": self.family, "revision": self.revision, "dtype": self._dtype}

    def check_supported(self, settings: RequestSettings) -> None:
        """See `JudgeModel.check_supported`."""
        if settings.text_first or settings.max_tokens is None:
            raise UserError(
                "expected a protocol that shows pictures before the text and limits the answer, as a local judge needs "
                "it; got one for servers; choose another --protocol"
            )
        if settings.answer_choices:
            self._choice_token_ids(settings)

    def ask(self, prompt: str, images: Sequence[Image.Image], settings: RequestSettings) -> Reply:
        """See `JudgeModel.ask`. With `answer_choices`, the text is {"probabilities": {word: number}}; the probabilities
        are over the whole vocabulary."""
        start, pictures = time.monotonic(), [_to_tensor(im) for im in images]
        if settings.answer_choices:
            with torch.no_grad():
                visual_tokens = [self.critic.encode_images(p[None].to(self.critic.device))[0] for p in pictures]
                probabilities = self.critic.logits([prompt], [visual_tokens])[0].double().softmax(0)
            ids = self._choice_token_ids(settings)
            found = {word: float(probabilities[i]) for word, i in zip(settings.answer_choices, ids)}
            text = json.dumps({"probabilities": found})
        else:
            assert settings.max_tokens is not None  # `check_supported` has refused the others
            (text,) = self.critic.generate_text([prompt], [pictures], settings.max_tokens)
        return Reply(OK, text, detail=f"{time.monotonic() - start:.1f} s", served_by=self.name)

    def _choice_token_ids(self, settings: RequestSettings) -> list[int]:
        try:
            return [self.critic.answer_id(word) for word in settings.answer_choices]
        except ValueError as error:
            raise UserError(
                f"expected a judge that answers {settings.answer_choices} in one token each; got: {error}; "
                "choose another judge, or another protocol"
            ) from None


def _family_by_model_type() -> dict[str, str]:
    """The `model_type` in config.json -> the file in critics/ that opens such models."""
    kinds = {"llava_onevision": "llava_onevision"}
    for name in config.available_names("critics"):
        kinds |= dict.fromkeys(getattr(config.find_class("critics", name), "kinds", ()), name)
    return kinds


def _resolve_weights(weights: str) -> tuple[Path, str]:
    """The folder of the weights, and their revision: the Hub's commit, or a hash of the files."""
    if weights == config.EMBEDDED:
        folder = config.embedded_weights("critic")
    elif Path(weights).is_dir():
        folder = Path(weights)
    else:
        hub_id, _, revision = weights.partition("@")
        folder = Path(snapshot_download(hub_id, revision=revision or None, allow_patterns=DOWNLOAD_PATTERNS))
        return folder, folder.name
    return folder, hash_folder(folder)


def hash_folder(folder: Path) -> str:
    """A hash of the names and contents of all files in a folder."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {digest}\n".encode())
    return total.hexdigest()


def _to_tensor(image: Image.Image) -> Tensor:
    """RGB -> (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
