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

from npedit.export.pipelines.few_step import FewStepEditing


class NPEditPipeline(FewStepEditing, QwenImagePipeline):
    """Qwen-Image as a few-step image editor; see `__call__`."""

    _most_references = 16
    _text_length = 512  # in tokens

    def __init__(
        self, scheduler: Any, vae: Any, text_encoder: Any, tokenizer: Any, transformer: Any, editor: Any = None
    ) -> None:
        super().__init__(scheduler, vae, text_encoder, tokenizer, transformer)
        self.register_to_config(editor=editor)

    @property
    def _multiple(self) -> int:
        return 2 * self.vae_scale_factor

    def _encode_text(self, prompts: list[str], device: torch.device) -> Any:
        """Qwen2.5-VL's states (b, length, d) and their mask (b, length), None where nothing is padding."""
        states, mask = self.encode_prompt(prompts, device, max_sequence_length=self._text_length)
        return states, None if mask is None else mask.bool()

    def _encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """(b, 3, H, W) in [0, 1] -> latents (b, c, h, w) in float32, the posterior's mean, normalised per channel."""
        frames = (images * 2 - 1).to(self.vae.dtype).unsqueeze(2)
        latents = self.vae.encode(frames).latent_dist.mean[:, :, 0].float()
        middle, deviation = self._latent_statistics(latents)
        return (latents - middle) / deviation

    def _decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """(b, c, h, w) -> (b, 3, H, W) in [-1, 1]."""
        middle, deviation = self._latent_statistics(latents)
        frames = (latents * deviation + middle).to(self.vae.dtype).unsqueeze(2)
        return self.vae.decode(frames).sample[:, :, 0]

    def _latent_statistics(self, like: torch.Tensor) -> list[torch.Tensor]:
        """The mean and standard deviation of the latents in the data, each (1, c, 1, 1)."""
        config = self.vae.config
        return [torch.tensor(s).to(like).view(1, -1, 1, 1) for s in (config.latents_mean, config.latents_std)]

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
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        out = out[:, : rows * columns].view(len(x), rows, columns, x.shape[1], 2, 2)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
