"""An image editor on Sana, trained with npedit: `DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER,
trust_remote_code=True)`.

The net's input has more channels than Sana's: the references' latents are stacked on the picture's, as in
InstructPix2Pix. Slots without a reference get zeros.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import SanaPipeline

from npedit.export.pipelines.few_step import FewStepEditing


class NPEditPipeline(FewStepEditing, SanaPipeline):
    """Sana 1.0 and 1.5 as a few-step image editor; see `__call__`."""

    _text_length = 300  # in tokens, SanaPipeline's own
    _float16_max = 65504.0

    def __init__(
        self, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any, scheduler: Any, editor: Any = None
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.register_to_config(editor=editor)
        if editor and editor.get("clips_attention"):
            self._clip_attention()

    @property
    def _most_references(self) -> int:
        return self.transformer.config.in_channels // self.vae.config.latent_channels - 1

    @property
    def _multiple(self) -> int:
        return self.vae_scale_factor * self.transformer.config.patch_size

    def _clip_attention(self) -> None:
        """Clip the outputs of self-attention to the range of float16, which the base model was trained in."""
        for name, layer in self.transformer.named_modules():
            if name.endswith("attn1"):
                layer.register_forward_hook(lambda _, args, out: out.clip(-self._float16_max, self._float16_max))

    def _encode_text(self, prompts: list[str], device: torch.device) -> Any:
        """Gemma 2's states (b, 300, d) and their mask (b, 300), of prompts after SanaPipeline's long instruction."""
        instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        states, mask, *_ = self.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=device, max_sequence_length=self._text_length,
            complex_human_instruction=instruction,
        )  # fmt: skip
        return states, mask

    def _encode_images(self, images: torch.Tensor) -> torch.Tensor:
        return self.vae.encode((images * 2 - 1).to(self.vae.dtype)).latent.float() * self.vae.config.scaling_factor

    def _decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample

    def _velocity(self, x: torch.Tensor, t: torch.Tensor, text: Any, references: list[torch.Tensor]) -> torch.Tensor:
        (states, mask), net = text, self.transformer
        planes = [x, *references] + [torch.zeros_like(x)] * (self._most_references - len(references))
        out = net(
            torch.cat(planes, 1).to(net.dtype),
            encoder_hidden_states=states.to(net.dtype),
            encoder_attention_mask=mask,
            timestep=t.float() * 1000 * net.config.timestep_scale,
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]
