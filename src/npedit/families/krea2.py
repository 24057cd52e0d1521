"""Krea 2 (Krea2Pipeline), base and distilled.

This family was chosen in addition to SD3 and Qwen-Image because it is a recent text-to-image model, diffusers has no
editing model of it, and it is simple: one stream of blocks, to which the caller gives positions and mask, so references
need no change of the net. (HunyuanImage 2.1 and Lumina 2 compute positions inside the net, and LongCat-Image has an
editing model.)

- time: the net is given t itself, in float32; its output is v, no sign change.
- layout: latents of Qwen-Image's VAE, packed 2 x 2 into tokens; `position_ids` holds (0, row, column) for each, and
  zeros for each token of text.
- text: several layers of Qwen3-VL's hidden states, which the pipeline puts into a fixed length with the padding in the
  middle, and their mask. All text has position zero, so `velocity` can leave out what is padding in every prompt; the
  rest is masked. The result for a prompt does not depend on the length of the others.
- references: packed likewise and appended after the picture's tokens with the ids' first coordinate 1, 2, ..., which is
  0 in every picture that the base model has seen; the net's output on them is dropped. This is what FLUX.1-Kontext
  (arXiv 2506.15742) did to FLUX.1, whose ids are the same; no new weight is needed. Isolated references
  (`_isolated.py`) have the same ids; their pass has no text.
- guidance: the pipeline's 4.5 means cond + 4.5 (cond - uncond), which is 5.5 for `dmd.classifier_free_guidance`. A
  distilled checkpoint has none, which is 1.
- schedule: exp(mu), mu from the number of tokens; a distilled checkpoint's mu is 1.15 at every size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Self

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
from torch import Tensor, nn
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, Qwen3VLConfig, Qwen3VLModel

from npedit.families._isolated import (
    Krea2ReferenceAttnProcessor,
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
TEXT_LENGTH = 512  # the pipeline's own, in tokens
DISTILLED_MU = 1.15  # the pipeline's own


class Krea2(Family):
    """One Krea 2 pipeline, opened once; `families/base.py` describes the interface."""

    pipeline, denoiser = Krea2Pipeline, Krea2Transformer2DModel
    part_names = PARTS
    can_isolate_references = True

    def __init__(self, pipe: Krea2Pipeline, device: torch.device):
        self.pipe = pipe
        self.base = pipe.transformer
        self.device = device
        for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
            part.requires_grad_(False).eval().to(device)
        if pipe.config.patch_size != 2:
            raise ValueError(f"expected Krea 2 with patches of 2 x 2 latents; got {pipe.config.patch_size}")
        stride = 2 ** len(pipe.vae.config.temperal_downsample)
        self.text_length = min(TEXT_LENGTH, pipe.tokenizer.model_max_length)
        self.facts = ModelProperties(
            channels=pipe.vae.config.z_dim,
            stride=stride,
            multiple=2 * stride,
            guidance=1.0 if pipe.config.is_distilled else 5.5,
            blocks=("transformer_blocks",),
        )

    @classmethod
    def tiny(cls, seed: int) -> Self:
        """Random weights: a factor-4 VAE with 4 channels, 2 blocks of width 32, text by bytes; odd seeds are marked as
        distilled."""
        torch.manual_seed(seed)
        words = {
            "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 16,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024, "pad_token_id": 0,
            "bos_token_id": 2, "eos_token_id": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        }  # fmt: skip
        eyes = {
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        }  # fmt: skip
        vae = AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 2], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.9, 1.1, 1.3, 0.7],
        )  # fmt: skip
        net = Krea2Transformer2DModel(
            in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=48, timestep_embed_dim=32, text_hidden_dim=32, num_text_layers=2,
            text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=48,
            num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        pipe = Krea2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400), vae=vae,
            text_encoder=Qwen3VLModel(Qwen3VLConfig(text_config=words, vision_config=eyes)),
            tokenizer=ByT5Tokenizer(model_max_length=224), transformer=net, text_encoder_select_layers=(1, 3),
            is_distilled=seed % 2 == 1,
        )  # fmt: skip
        return cls(pipe, torch.device("cpu"))

    def noise_shift(self, height: int, width: int) -> float:
        """exp(mu) of the scheduler's resolution-dependent shift or of the distilled model's own, or the fixed one."""
        config = self.pipe.scheduler.config
        if config.use_dynamic_shifting and self.pipe.config.is_distilled:
            return math.exp(DISTILLED_MU)
        return super().noise_shift(height, width)

    def prompt_tokenizer_and_limit(self) -> tuple[PreTrainedTokenizerBase, int]:
        """Qwen3-VL's tokenizer, and the place that the pipeline's template leaves for the prompt."""
        pipe = self.pipe
        taken = self.text_length + pipe.prompt_template_encode_start_idx - pipe.prompt_template_encode_num_suffix_tokens
        taken -= pipe.tokenizer.num_special_tokens_to_add()
        return pipe.tokenizer, taken - count_tokens(pipe.tokenizer, pipe.prompt_template_encode_prefix)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> EncodedText:
        """The tapped states (b, length, layers, d) and their mask (b, length); the length is always the same."""
        states, mask = self.pipe.encode_prompt(list(prompts), device=self.device, max_sequence_length=self.text_length)
        return EncodedText((states, mask))

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
            out = attend_to_references(weights_module(net), Krea2ReferenceAttnProcessor, given, call)
        else:
            out = _run(net, [x, *given], t, states, mask)
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        return unpack_latents(out[:, : rows * columns], rows, columns).to(x.dtype)

    def _reference_pass(self, net: nn.Module, references: Sequence[Tensor], text: EncodedText) -> ReferenceKVCache:
        """Without text."""
        states = text.parts[0][:, :0]
        clean = torch.zeros(len(states), device=states.device)
        call = partial(_run, net, references, clean, states, None, first_frame=1)
        return cache_references(weights_module(net), Krea2ReferenceAttnProcessor, len(references), call)


def _run(
    net: nn.Module,
    planes: Sequence[Tensor],
    t: Tensor,
    states: Tensor,
    mask: Tensor | None,
    first_frame: int = 0,
) -> Tensor:
    """The net's output (b, n, 4c) on the tokens of all planes (b, c, h, w), whose ids begin with the number
    `first_frame` and the numbers after it."""
    x, dtype, frames = planes[0], compute_dtype(net), enumerate(planes, first_frame)
    tokens = torch.cat([pack_latents(p.to(x.dtype)) for p in planes], 1)
    ids = [_position_ids(p.shape[2] // 2, p.shape[3] // 2, i, x.device) for i, p in frames]
    return net(
        hidden_states=tokens.to(dtype),
        encoder_hidden_states=states.to(dtype),
        timestep=t.float(),
        position_ids=torch.cat([torch.zeros(states.shape[1], 3, device=x.device), *ids]),
        encoder_attention_mask=mask,
        return_dict=False,
    )[0]


def _position_ids(rows: int, columns: int, frame: int, device: torch.device) -> Tensor:
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 0] = frame
    ids[..., 1] = torch.arange(rows, device=device)[:, None]
    ids[..., 2] = torch.arange(columns, device=device)[None, :]
    return ids.view(-1, 3)
