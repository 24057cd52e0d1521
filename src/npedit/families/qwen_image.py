"""Qwen-Image (QwenImagePipeline).

- time: the net is given t itself; its output is v, no sign change.
- layout: latents are packed 2 x 2 into tokens; `img_shapes` lists (1, rows, columns) of every picture, and from that
  the net makes its positions, centred.
- text: the last hidden states of Qwen2.5-VL after the pipeline's own template, and their mask. `EncodedText` holds them
  padded to `TEXT_LENGTH`, so that prompts of any length can be put together; `velocity` leaves out what is padding in
  all of them. Padding comes after the words, is masked, and does not change their positions, so the answer for a prompt
  does not depend on the length of the others.
- references: packed likewise and appended after the picture's tokens, each one more entry of `img_shapes`; the net's
  output on them is dropped. This is how Qwen-Image-Edit (arXiv 2508.02324, QwenImageEditPipeline) does it; no new
  weight is needed. That pipeline also gives Qwen2.5-VL the reference too, with the instruction and another template.
  Here the text stays as the text-to-image teacher learnt it, and the reference enters through its latents alone.
  With isolated references (`_isolated.py`) the text's positions follow the picture's size alone, as in text-to-image.
- guidance: the net embeds none. The pipeline's classifier-free guidance (4, with a negative prompt) rescales its result
  to the norm of the conditional one; `np_edit`'s teacher is guided without that.
- schedule: exp(mu), mu from the number of tokens. The released scheduler also stretches its times so that the last one
  is 0.02 (`shift_terminal`). A few-step editor does not: with four steps that would leave the last one nothing to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Self

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    ByT5Tokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from npedit.families._isolated import (
    QwenReferenceAttnProcessor,
    ReferenceKVCache,
    attend_to_references,
    cache_references,
)
from npedit.families._prompts import count_tokens
from npedit.families._shared import (
    decode_with_qwen_vae,
    encode_with_qwen_vae,
    pack_latents,
    trim_padding,
    unpack_latents,
)
from npedit.families.base import EncodedText, Family, ModelProperties, References
from npedit.nets.distributed import compute_dtype
from npedit.nets.lora import weights_module

PARTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
TEXT_LENGTH = 512  # the pipeline's own limit, in tokens


class QwenImage(Family):
    """One Qwen-Image pipeline, opened once; `families/base.py` describes the interface."""

    pipeline, denoiser = QwenImagePipeline, QwenImageTransformer2DModel
    part_names = PARTS
    can_isolate_references = True

    def __init__(self, pipe: QwenImagePipeline, device: torch.device):
        self.pipe = pipe
        self.base = pipe.transformer
        self.device = device
        for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
            part.requires_grad_(False).eval().to(device)
        stride = 2 ** len(pipe.vae.config.temperal_downsample)
        self.facts = ModelProperties(
            channels=pipe.vae.config.z_dim,
            stride=stride,
            multiple=2 * stride,
            guidance=4.0,
            blocks=("transformer_blocks",),
        )

    @classmethod
    def tiny(cls, seed: int) -> Self:
        """Random weights: a factor-4 VAE with 4 channels, 2 blocks of width 32, text by bytes."""
        torch.manual_seed(seed)
        words = {
            "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048, "pad_token_id": 0,
            "bos_token_id": 2, "eos_token_id": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        }  # fmt: skip
        eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
        vae = AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 2], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.9, 1.1, 1.3, 0.7],
        )  # fmt: skip
        net = QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        pipe = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192,
                                                      shift_terminal=0.02),
            vae=vae, text_encoder=Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(text_config=words, vision_config=eyes)
            ),
            tokenizer=ByT5Tokenizer(model_max_length=1024), transformer=net,
        )  # fmt: skip
        return cls(pipe, torch.device("cpu"))

    def prompt_tokenizer_and_limit(self) -> tuple[PreTrainedTokenizerBase, int]:
        """Qwen2.5-VL's tokenizer, and the place that the pipeline's template leaves for the prompt."""
        before = self.pipe.prompt_template_encode.split("{}")[0]
        kept = self.pipe.prompt_template_encode_start_idx + TEXT_LENGTH
        return self.pipe.tokenizer, kept - count_tokens(self.pipe.tokenizer, before)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> EncodedText:
        """Qwen2.5-VL's states (b, TEXT_LENGTH, d), zero where padded, and their mask (b, TEXT_LENGTH)."""
        states, mask = self.pipe.encode_prompt(list(prompts), device=self.device, max_sequence_length=TEXT_LENGTH)
        if mask is None:  # the pipeline's way to say that nothing is padding
            mask = torch.ones(states.shape[:2], device=states.device)
        rest = TEXT_LENGTH - states.shape[1]
        return EncodedText((F.pad(states, (0, 0, 0, rest)), F.pad(mask.bool(), (0, rest))))

    def encode(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) in [0, 1] -> (b, c, h, w), normalised per channel as Qwen-Image does, in float32."""
        return encode_with_qwen_vae(self.pipe.vae, images)

    def decode(self, latents: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, 3, H, W), not clamped."""
        return decode_with_qwen_vae(self.pipe.vae, latents)

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, text: EncodedText, references: References = ()) -> Tensor:
        """v (b, c, h, w); see the head of this file."""
        given = self.prepare_references(net, references, text)
        states, mask = trim_padding(*text.parts)
        if isinstance(given, ReferenceKVCache):
            call = partial(_run, net, [x], t, states, mask)
            out = attend_to_references(weights_module(net), QwenReferenceAttnProcessor, given, call)
        else:
            out = _run(net, [x, *given], t, states, mask)
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        return unpack_latents(out[:, : rows * columns], rows, columns).to(x.dtype)

    def _reference_pass(self, net: nn.Module, references: Sequence[Tensor], text: EncodedText) -> ReferenceKVCache:
        """Without text. The net is given the shape of one picture more, since the first one is the edited picture's."""
        states = text.parts[0][:, :0]
        clean, before = torch.zeros(len(states), device=states.device), references[:1]
        call = partial(_run, net, references, clean, states, None, before)
        return cache_references(weights_module(net), QwenReferenceAttnProcessor, len(references), call)


def _run(
    net: nn.Module,
    planes: Sequence[Tensor],
    t: Tensor,
    states: Tensor,
    mask: Tensor | None,
    before: Sequence[Tensor] = (),
) -> Tensor:
    """The net's output (b, n, 4c) on the tokens of all planes (b, c, h, w). `before` are planes that are counted before
    these in the positions."""
    x, dtype = planes[0], compute_dtype(net)
    tokens = torch.cat([pack_latents(p.to(x.dtype)) for p in planes], 1)
    return net(
        hidden_states=tokens.to(dtype),
        timestep=t.to(dtype),
        encoder_hidden_states=states.to(dtype),
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, p.shape[2] // 2, p.shape[3] // 2) for p in (*before, *planes)]] * len(x),
        return_dict=False,
    )[0]
