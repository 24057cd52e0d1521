"""An image editor on Qwen-Image, trained with npedit: `DiffusionPipeline.from_pretrained(FOLDER,
custom_pipeline=FOLDER, trust_remote_code=True)`.

The picture's and the references' latents are packed 2 x 2 into tokens. The references' tokens follow the picture's, and
`img_shapes` lists the sizes of all, as in Qwen-Image-Edit. The net's output on the references is dropped. Prompts are
encoded as `QwenImagePipeline` encodes them: Qwen2.5-VL does not see the pictures. Isolated references attend to
themselves alone, and one pass over them serves all steps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import QwenImagePipeline

from npedit.export.pipelines.few_step import VideoVaeEditing, _unpack_tokens
from npedit.families._isolated import (
    QwenReferenceAttnProcessor,
    ReferenceKVCache,
    attend_to_references,
    cache_references,
)


class NPEditPipeline(VideoVaeEditing, QwenImagePipeline):
    """Qwen-Image as a few-step image editor; see `__call__`."""

    _most_references = 16
    _text_length = 512  # in tokens

    def __init__(
        self, scheduler: Any, vae: Any, text_encoder: Any, tokenizer: Any, transformer: Any, editor: Any = None
    ) -> None:
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        self.register_to_config(editor=editor)

    def _encode_text(self, prompts: list[str], device: torch.device) -> Any:
        """Qwen2.5-VL's states (b, length, d) and their mask (b, length), None where nothing is padding."""
        states, mask = self.encode_prompt(prompts, device, max_sequence_length=self._text_length)
        return states, None if mask is None else mask.bool()

    def _prepare_references(self, references: list[torch.Tensor], text: Any) -> Any:
        """The latents, or the KV cache of isolated references. The positions count the edited picture too."""
        if not self.config.editor.get("isolated_references"):
            return references
        states = text[0][:, :0]
        clean = torch.zeros(len(states), device=states.device)
        call = partial(self._run, references, clean, (states, None), references[:1])
        return cache_references(self.transformer, QwenReferenceAttnProcessor, len(references), call)

    def _velocity(self, x: torch.Tensor, t: torch.Tensor, text: Any, references: Any) -> torch.Tensor:
        """v (b, c, h, w) at x and the times t (b,) in [0, 1]."""
        if not isinstance(references, ReferenceKVCache):
            return _unpack_tokens(self._run([x, *references], t, text), x)
        call = partial(self._run, [x], t, text)
        return _unpack_tokens(attend_to_references(self.transformer, QwenReferenceAttnProcessor, references, call), x)

    def _run(
        self, planes: list[torch.Tensor], t: torch.Tensor, text: Any, before: list[torch.Tensor] | tuple[()] = ()
    ) -> torch.Tensor:
        """The net's output (b, n, 4c) on the tokens of all planes (b, c, h, w). The positions count `before` first."""
        (states, mask), x, dtype = text, planes[0], self.transformer.dtype
        tokens = torch.cat([self._pack_latents(p, *p.shape) for p in planes], 1)
        return self.transformer(
            hidden_states=tokens.to(dtype),
            timestep=t.to(dtype),
            encoder_hidden_states=states.to(dtype),
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, p.shape[2] // 2, p.shape[3] // 2) for p in (*before, *planes)]] * len(x),
            return_dict=False,
        )[0]
