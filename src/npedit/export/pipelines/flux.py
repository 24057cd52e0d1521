"""An image editor on FLUX.1, trained with npedit: `DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER,
trust_remote_code=True)`.

The picture's and the references' latents are packed 2 x 2 into tokens. The references' tokens follow the picture's, and
the first coordinate of their position ids is 1, 2, ..., as in FLUX.1-Kontext. The net's output on them is dropped.
Isolated references attend to themselves alone, and one pass over them serves all steps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import FluxPipeline

from npedit.export.pipelines.few_step import FewStepEditing, _unpack_tokens
from npedit.families._isolated import (
    FluxReferenceAttnProcessor,
    ReferenceKVCache,
    attend_to_references,
    cache_references,
)


class NPEditPipeline(FewStepEditing, FluxPipeline):
    """FLUX.1 as a few-step image editor; see `__call__`."""

    _most_references = 16
    _guidance = 3.5  # the input of models that were distilled with a guidance scale

    def __init__(
        self,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        transformer: Any,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        editor: Any = None,
    ) -> None:
        super().__init__(
            scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer, image_encoder,
            feature_extractor,
        )  # fmt: skip
        self.register_to_config(editor=editor)

    def _encode_text(self, prompts: list[str], device: torch.device) -> Any:
        """T5 states (b, length, d) and CLIP's pooled vector (b, p)."""
        longest = 512 if self.transformer.config.guidance_embeds else 256
        length = min(longest, self.tokenizer_2.model_max_length)
        return self.encode_prompt(prompts, None, device, max_sequence_length=length)[:2]

    def _prepare_references(self, references: list[torch.Tensor], text: Any) -> Any:
        """The latents, or the KV cache of isolated references."""
        if not self.config.editor.get("isolated_references"):
            return references
        sequence, pooled = text
        clean, words = torch.zeros(len(pooled), device=pooled.device), (sequence[:, :0], pooled)
        call = partial(self._run, references, clean, words, first_frame=1)
        return cache_references(self.transformer, FluxReferenceAttnProcessor, len(references), call)

    def _velocity(self, x: torch.Tensor, t: torch.Tensor, text: Any, references: Any) -> torch.Tensor:
        """v (b, c, h, w) at x and the times t (b,) in [0, 1]."""
        if not isinstance(references, ReferenceKVCache):
            return _unpack_tokens(self._run([x, *references], t, text), x)
        call = partial(self._run, [x], t, text)
        return _unpack_tokens(attend_to_references(self.transformer, FluxReferenceAttnProcessor, references, call), x)

    def _run(self, planes: list[torch.Tensor], t: torch.Tensor, text: Any, first_frame: int = 0) -> torch.Tensor:
        """The net's output (b, n, 4c) on the tokens of all planes (b, c, h, w), numbered from `first_frame`."""
        (sequence, pooled), x, dtype = text, planes[0], self.transformer.dtype
        tokens = torch.cat([self._pack_latents(p, *p.shape) for p in planes], 1)
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((len(x),), self._guidance, device=x.device, dtype=torch.float32)
        return self.transformer(
            hidden_states=tokens.to(dtype),
            timestep=t.to(dtype),
            guidance=guidance,
            pooled_projections=pooled.to(dtype),
            encoder_hidden_states=sequence.to(dtype),
            txt_ids=torch.zeros(sequence.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=torch.cat([self._position_ids(p, i) for i, p in enumerate(planes, first_frame)]),
            return_dict=False,
        )[0]

    def _position_ids(self, plane: torch.Tensor, frame: int) -> torch.Tensor:
        """(tokens, 3): the number of the picture, then row and column."""
        rows, columns = plane.shape[2] // 2, plane.shape[3] // 2
        ids = self._prepare_latent_image_ids(1, rows, columns, plane.device, plane.dtype)
        ids[:, 0] = frame
        return ids
