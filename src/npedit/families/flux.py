"""FLUX.1 (dev, schnell) and the embedded toy, which is the same classes at toy size.

- time: the net is given t itself; its output is v, no sign change.
- layout: latents are packed 2 x 2 into tokens; `img_ids` holds (0, row, column) for each.
- text: T5 sequence (padding attended to, as FLUX does) and CLIP's pooled vector; dev embeds a guidance scale.
- references: packed likewise and appended after the picture's tokens, with the ids' first coordinate 1, 2, ...; the
  net's output on them is dropped. This is how FLUX.1-Kontext (arXiv 2506.15742) does it; no new weight is needed.
  Isolated references (`_isolated.py`) have the same ids; their pass has no tokens of the text.
- guidance, a choice: dev is a distilled model with the scale as an input, and every call here (student, teacher, fake)
  gives it 3.5, its pipeline's default. DMD's teacher adds classifier-free guidance (`guidance` of `np_edit`) ON TOP of
  that: two calls, both at 3.5. So with dev the teacher is guided twice; `guidance: 1.0` leaves the distilled one alone.
  Schnell and the toy embed no scale, and there `guidance` is all there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)

from npedit.families._isolated import (
    FluxReferenceAttnProcessor,
    ReferenceKVCache,
    attend_to_references,
    cache_references,
)
from npedit.families._shared import decode_with_kl_vae, encode_with_kl_vae, pack_latents, unpack_latents
from npedit.families.base import EncodedText, Family, ModelProperties, References
from npedit.nets.distributed import compute_dtype
from npedit.nets.lora import weights_module

PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")
T5_LENGTH = 512  # the longest prompt that FLUX.1 takes; schnell and the toy take less


class Flux(Family):
    """One FLUX pipeline, opened once; `families/base.py` describes the interface."""

    pipeline, denoiser = FluxPipeline, FluxTransformer2DModel
    part_names = PARTS
    can_isolate_references = True

    def __init__(self, pipe: FluxPipeline, device: torch.device):
        self.pipe = pipe
        self.base = pipe.transformer
        self.device = device
        for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
            part.requires_grad_(False).eval().to(device)
        vae = pipe.vae.config
        stride = 2 ** (len(vae.block_out_channels) - 1)
        self.text_length = min(T5_LENGTH, pipe.tokenizer_2.model_max_length)
        if not pipe.transformer.config.guidance_embeds:
            self.text_length = min(256, self.text_length)
        self.facts = ModelProperties(
            channels=vae.latent_channels,
            stride=stride,
            multiple=2 * stride,
            guidance=3.5,
            blocks=("transformer_blocks", "single_transformer_blocks"),
        )

    @classmethod
    def tiny(cls, seed: int) -> Self:
        """Random weights: a factor-4 VAE with 4 channels, 2 + 1 blocks of width 32, text by bytes."""
        torch.manual_seed(seed)
        marks = {"vocab_size": 384, "pad_token_id": 0, "eos_token_id": 1}
        clip = CLIPTextConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=128,
            bos_token_id=2, **marks,
        )  # fmt: skip
        t5 = T5Config(d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=3, dropout_rate=0.0, **marks)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
            shift_factor=0.1, scaling_factor=1.3, use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        net = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24, pooled_projection_dim=16, guidance_embeds=seed % 2 == 1, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=CLIPTextModel(clip),
            tokenizer=ByT5Tokenizer(model_max_length=128), text_encoder_2=T5EncoderModel(t5),
            tokenizer_2=ByT5Tokenizer(model_max_length=128), transformer=net,
        )  # fmt: skip
        return cls(pipe, torch.device("cpu"))

    def prompt_tokenizer_and_limit(self) -> tuple[PreTrainedTokenizerBase, int]:
        """T5's tokenizer and length; CLIP reads less, for the pooled vector alone."""
        tokenizer = self.pipe.tokenizer_2
        return tokenizer, self.text_length - tokenizer.num_special_tokens_to_add()

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> EncodedText:
        """T5 states (b, length, d) and CLIP's pooled vector (b, p)."""
        sequence, pooled, _ = self.pipe.encode_prompt(
            prompt=list(prompts), prompt_2=None, device=self.device, max_sequence_length=self.text_length
        )
        return EncodedText((sequence, pooled))

    def encode(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) in [0, 1] -> (b, c, h, w), shifted and scaled, in float32."""
        return encode_with_kl_vae(self.pipe.vae, images)

    def decode(self, latents: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, 3, H, W), not clamped."""
        return decode_with_kl_vae(self.pipe.vae, latents)

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, text: EncodedText, references: References = ()) -> Tensor:
        """v (b, c, h, w); see the head of this file."""
        given = self.prepare_references(net, references, text)
        if isinstance(given, ReferenceKVCache):
            call = partial(self._run, net, [x], t, text.parts)
            out = attend_to_references(weights_module(net), FluxReferenceAttnProcessor, given, call)
        else:
            out = self._run(net, [x, *given], t, text.parts)
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        return unpack_latents(out[:, : rows * columns], rows, columns).to(x.dtype)

    def _reference_pass(self, net: nn.Module, references: Sequence[Tensor], text: EncodedText) -> ReferenceKVCache:
        """Without the text's tokens. The pooled text and the guidance scale modulate the references too."""
        sequence, pooled = text.parts
        parts, clean = (sequence[:, :0], pooled), torch.zeros(len(pooled), device=pooled.device)
        call = partial(self._run, net, references, clean, parts, first_frame=1)
        return cache_references(weights_module(net), FluxReferenceAttnProcessor, len(references), call)

    def _run(
        self, net: nn.Module, planes: Sequence[Tensor], t: Tensor, text: tuple[Tensor, ...], first_frame: int = 0
    ) -> Tensor:
        """The net's output (b, n, 4c) on the tokens of all planes (b, c, h, w), whose ids begin with the number
        `first_frame` and the numbers after it."""
        (sequence, pooled), x = text, planes[0]
        tokens = torch.cat([pack_latents(p.to(x.dtype)) for p in planes], 1)
        frames = enumerate(planes, first_frame)
        ids = torch.cat([_position_ids(p.shape[2] // 2, p.shape[3] // 2, i, x) for i, p in frames])
        guidance = None
        config: Any = net.config
        if config.guidance_embeds:
            guidance = torch.full((len(x),), self.facts.guidance, device=x.device, dtype=torch.float32)
        dtype = compute_dtype(net)
        return net(
            hidden_states=tokens.to(dtype),
            timestep=t.to(dtype),
            guidance=guidance,
            pooled_projections=pooled.to(dtype),
            encoder_hidden_states=sequence.to(dtype),
            txt_ids=torch.zeros(sequence.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=ids,
            return_dict=False,
        )[0]


def _position_ids(rows: int, columns: int, frame: int, like: Tensor) -> Tensor:
    ids = torch.zeros(rows, columns, 3, device=like.device, dtype=like.dtype)
    ids[..., 0] = frame
    ids[..., 1] = torch.arange(rows, device=like.device)[:, None]
    ids[..., 2] = torch.arange(columns, device=like.device)[None, :]
    return ids.view(-1, 3)
