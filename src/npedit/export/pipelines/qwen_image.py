"""An image editor on Qwen-Image, trained with npedit: `DiffusionPipeline.from_pretrained(FOLDER,
custom_pipeline=FOLDER, trust_remote_code=True)`.

The picture's and the references' latents are packed 2 x 2 into tokens. The references' tokens follow the picture's, and
`img_shapes` lists the sizes of all, as in Qwen-Image-Edit. The net's output on the references is dropped. Prompts are
encoded as `QwenImagePipeline` encodes them: Qwen2.5-VL does not see the pictures.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImagePipeline

from npedit.export.pipelines.few_step import VideoVaeEditing, _unpack_tokens


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

    def _velocity(self, x: torch.Tensor, t: torch.Tensor, text: Any, references: list[torch.Tensor]) -> torch.Tensor:
        """v (b, c, h, w) at x and the times t (b,) in [0, 1]."""
        (states, mask), planes, dtype = text, [x, *references], self.transformer.dtype
        tokens = torch.cat([self._pack_latents(p, *p.shape) for p in planes], 1)
        out = self.transformer(
            hidden_states=tokens.to(dtype),
            timestep=t.to(dtype),
            encoder_hidden_states=states.to(dtype),
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, p.shape[2] // 2, p.shape[3] // 2) for p in planes]] * len(x),
            return_dict=False,
        )[0]
        return _unpack_tokens(out, x)
