"""An image editor on Krea 2, trained with npedit: `DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER,
trust_remote_code=True)`.

The picture's and the references' latents are packed 2 x 2 into tokens. The references' tokens follow the picture's, and
the first coordinate of their position ids is 1, 2, ...; it is 0 for the picture and for text. The net's output on the
references is dropped. Isolated references attend to themselves alone, and one pass over them serves all steps.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from diffusers import Krea2Pipeline

from npedit.export.pipelines.few_step import VideoVaeEditing
from npedit.families._isolated import (
    Krea2ReferenceAttnProcessor,
    ReferenceKVCache,
    attend_to_references,
    cache_references,
)


class NPEditPipeline(VideoVaeEditing, Krea2Pipeline):
    """Krea 2 as a few-step image editor; see `__call__`."""

    _most_references = 16
    _text_length = 512  # in tokens, Krea2Pipeline's own
    _distilled_mu = 1.15  # Krea2Pipeline's own

    def __init__(
        self,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        transformer: Any,
        text_encoder_select_layers: Any = None,
        is_distilled: bool = False,
        patch_size: int = 2,
        editor: Any = None,
    ) -> None:
        super().__init__(
            scheduler, vae, text_encoder, tokenizer, transformer, text_encoder_select_layers, is_distilled, patch_size
        )
        self.register_to_config(editor=editor)

    @property
    def _multiple(self) -> int:
        return self.patch_size * self.vae_scale_factor

    def _noise_shift(self, height: int, width: int) -> float:
        """The base model's noise shift; a distilled model has one for all sizes."""
        if self.config.editor["schedule"].get("use_dynamic_shifting") and self.config.is_distilled:
            return math.exp(self._distilled_mu)
        return super()._noise_shift(height, width)

    def _encode_text(self, prompts: list[str], device: torch.device) -> Any:
        """Qwen3-VL's states (b, length, layers, d) without what is padding in all prompts, and their mask (b, length),
        None where no padding is left."""
        length = min(self._text_length, self.tokenizer.model_max_length)
        states, mask = self.encode_prompt(prompts, device, max_sequence_length=length)
        kept = mask.any(0)
        states, mask = states[:, kept], mask[:, kept]
        return states, None if bool(mask.all()) else mask

    def _prepare_references(self, references: list[torch.Tensor], text: Any) -> Any:
        """The latents, or the KV cache of isolated references."""
        if not self.config.editor.get("isolated_references"):
            return references
        states = text[0][:, :0]
        clean = torch.zeros(len(states), device=states.device)
        call = partial(self._run, references, clean, (states, None), first_frame=1)
        return cache_references(self.transformer, Krea2ReferenceAttnProcessor, len(references), call)

    def _velocity(self, x: torch.Tensor, t: torch.Tensor, text: Any, references: Any) -> torch.Tensor:
        """v (b, c, h, w) at x and the times t (b,) in [0, 1]."""
        if isinstance(references, ReferenceKVCache):
            call = partial(self._run, [x], t, text)
            out = attend_to_references(self.transformer, Krea2ReferenceAttnProcessor, references, call)
        else:
            out = self._run([x, *references], t, text)
        rows, columns = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        size = [side * self.vae_scale_factor for side in x.shape[2:]]
        return self._unpack_latents(out[:, : rows * columns], *size).squeeze(2)

    def _run(self, planes: list[torch.Tensor], t: torch.Tensor, text: Any, first_frame: int = 0) -> torch.Tensor:
        """The net's output (b, n, 4c) on the tokens of all planes (b, c, h, w), numbered from `first_frame`."""
        (states, mask), dtype = text, self.transformer.dtype
        tokens = torch.cat([self._pack_latents(p, *p.shape) for p in planes], 1)
        return self.transformer(
            hidden_states=tokens.to(dtype),
            encoder_hidden_states=states.to(dtype),
            timestep=t.float(),
            position_ids=self._position_ids(states.shape[1], planes, first_frame),
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]

    def _position_ids(self, text_length: int, planes: list[torch.Tensor], first_frame: int) -> torch.Tensor:
        """(tokens, 3): zeros for text; for each image its number, then row and column."""
        text, device = torch.zeros(text_length, 3, device=planes[0].device), planes[0].device
        ids = [self.prepare_position_ids(0, p.shape[2] // 2, p.shape[3] // 2, device) for p in planes]
        for number, each in enumerate(ids, first_frame):
            each[:, 0] = number
        return torch.cat([text, *ids])
