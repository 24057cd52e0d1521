"""Stable Diffusion 3 and 3.5 (StableDiffusion3Pipeline).

- time: the net is given 1000 t, in float32; its output is v, no sign change.
- layout: the net takes latents (b, c, h, w) and makes patches of 2 x 2 itself.
- text: the two CLIPs concatenated along features, T5 after them (padding attended to, as SD3 does; zeros where
  the folder has no T5), and the two pooled vectors. Always the same length.
- references: the net takes one picture. Its patch embedding adds to each patch the position code of its place, cut from
  the middle of a table (192 x 192 patches, SD3.5 medium 384 x 384). A reference goes through the same embedding, with
  the codes of places next to the picture: right, else below, left, above, on the first free side where the table has
  room. So there can be four references at most. The tokens of references follow those of the picture, and are removed
  before the last norm. Two hooks, which exist during one call only, do this around the net's own forward: no new
  weight, and no copied code of diffusers. Reasons for this choice:
  - As in a diptych, every token has a different position, so the net can distinguish the picture, the references and
    their order at every t. With the picture's codes for all of them it could not.
  - The picture has the same place as in text-to-image, and without references the call equals the base model's. On one
    common canvas the picture would move, and references of another size would need padding.
  SD3 was not trained on these places at 1024 pixels, as FLUX.1 was not trained on the new ids of FLUX.1-Kontext's
  references. Whether these places are good ones has not been measured.
- guidance: the net embeds none; the pipeline's classifier-free guidance is 7.
- schedule: the scheduler's fixed shift (3), or exp(mu). The pipeline's own four times before the shift are not 1, 3/4,
  1/2, 1/4: diffusers takes its ends from the shifted range and shifts once more. A few-step editor takes the method's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)

from npedit.families._shared import decode_with_kl_vae, encode_with_kl_vae
from npedit.families.base import EncodedText, Family, ModelProperties, References, require_latents
from npedit.nets.distributed import compute_dtype

PARTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")
T5 = ("text_encoder_3", "tokenizer_3")  # often left out to save memory
T5_LENGTH = 256  # the pipeline's own, in tokens


class SD3(Family):
    """One SD3 or SD3.5 pipeline, opened once; `families/base.py` describes the interface."""

    most_references = 4  # one on each side of the picture
    pipeline, denoiser = StableDiffusion3Pipeline, SD3Transformer2DModel
    part_names = PARTS
    optional_part_names = T5

    def __init__(self, pipe: StableDiffusion3Pipeline, device: torch.device):
        self.pipe = pipe
        self.base = pipe.transformer
        self.device = device
        for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
            if part is not None:  # SD3 may be saved without T5
                part.requires_grad_(False).eval().to(device)
        stride = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        longest = pipe.tokenizer_3.model_max_length if pipe.tokenizer_3 is not None else T5_LENGTH
        self.text_length = min(T5_LENGTH, longest)
        self.facts = ModelProperties(
            channels=pipe.vae.config.latent_channels,
            stride=stride,
            multiple=stride * pipe.transformer.config.patch_size,
            guidance=7.0,
            blocks=("transformer_blocks",),
        )

    @classmethod
    def tiny(cls, seed: int) -> Self:
        """Random weights: a factor-4 VAE with 4 channels, 2 blocks of width 32, text by bytes."""
        torch.manual_seed(seed)
        marks = {"vocab_size": 384, "pad_token_id": 0, "eos_token_id": 1}
        clips = [
            CLIPTextModelWithProjection(
                CLIPTextConfig(
                    hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                    max_position_embeddings=64, projection_dim=8, bos_token_id=2, **marks,
                )
            )
            for width in (8, 16)
        ]  # fmt: skip
        t5 = T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, dropout_rate=0.0, **marks)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
            shift_factor=0.1, scaling_factor=1.3, use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        net = SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16,
            pos_embed_max_size=24, dual_attention_layers=(0,), qk_norm="rms_norm",
        )  # fmt: skip
        pipe = StableDiffusion3Pipeline(
            transformer=net, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
            text_encoder=clips[0], tokenizer=ByT5Tokenizer(model_max_length=64),
            text_encoder_2=clips[1], tokenizer_2=ByT5Tokenizer(model_max_length=64),
            text_encoder_3=T5EncoderModel(t5), tokenizer_3=ByT5Tokenizer(model_max_length=128),
        )  # fmt: skip
        return cls(pipe, torch.device("cpu"))

    def prompt_tokenizer_and_limit(self) -> tuple[PreTrainedTokenizerBase, int]:
        """T5's tokenizer and length, or CLIP's where the folder has no T5."""
        tokenizer, length = self.pipe.tokenizer_3, self.text_length
        if tokenizer is None:
            tokenizer, length = self.pipe.tokenizer, self.pipe.tokenizer.model_max_length
        return tokenizer, length - tokenizer.num_special_tokens_to_add()

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> EncodedText:
        """CLIPs' and T5's states (b, length, d) and the CLIPs' pooled vectors (b, p)."""
        sequence, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), None, None, device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )  # fmt: skip
        return EncodedText((sequence, pooled))

    def encode(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) in [0, 1] -> (b, c, h, w), shifted and scaled, in float32."""
        return encode_with_kl_vae(self.pipe.vae, images)

    def decode(self, latents: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, 3, H, W), not clamped."""
        return decode_with_kl_vae(self.pipe.vae, latents)

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, text: EncodedText, references: References = ()) -> Tensor:
        """v (b, c, h, w); see the head of this file.

        Raises:
            ValueError: the net's table of places has no room for the pictures.
        """
        sequence, pooled = text.parts
        dtype = compute_dtype(net)
        with _attach_references(net, x, [r.to(dtype) for r in require_latents(references)]):
            out = net(
                hidden_states=x.to(dtype),
                timestep=1000 * t.float(),
                encoder_hidden_states=sequence.to(dtype),
                pooled_projections=pooled.to(dtype),
                return_dict=False,
            )[0]
        return out.to(x.dtype)


@contextmanager
def _attach_references(net: nn.Module, x: Tensor, references: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block, a call of the net on x (b, c, h, w) sees the references (b, c, h', w') beside it; see the
    module's head."""
    embed: Any = net.pos_embed
    norm_out: Any = net.norm_out
    config: Any = net.config
    patch = config.patch_size
    rows, columns = x.shape[2] // patch, x.shape[3] // patch
    corners = _place_references(rows, columns, [(r.shape[2] // patch, r.shape[3] // patch) for r in references],
                       embed.pos_embed_max_size)  # fmt: skip

    def append(_: nn.Module, args: tuple[Any, ...], tokens: Tensor) -> Tensor:
        table = embed.pos_embed.view(embed.pos_embed_max_size, embed.pos_embed_max_size, -1)
        for reference, (top, left) in zip(references, corners):
            grid = embed.proj(reference).permute(0, 2, 3, 1)
            grid = grid + table[top : top + grid.shape[1], left : left + grid.shape[2]]
            tokens = torch.cat([tokens, grid.flatten(1, 2).to(tokens.dtype)], 1)
        return tokens

    def drop(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args[0][:, : rows * columns], *args[1:]

    hooks = [embed.register_forward_hook(append), norm_out.register_forward_pre_hook(drop)] if references else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _place_references(rows: int, columns: int, sizes: Sequence[tuple[int, int]], table: int) -> list[tuple[int, int]]:
    """Where in the table of places (a square of so many patches) each reference's top left patch lies; the picture of
    rows x columns is in the middle. Each reference takes the first side of it that is free and has room.

    Raises:
        ValueError: there is no such side.
    """
    top, left = (table - rows) // 2, (table - columns) // 2
    free, corners = ["right", "below", "left", "above"], []
    for high, wide in sizes:
        middle = (table - high) // 2, (table - wide) // 2
        at = {
            "right": (middle[0], left + columns),
            "below": (top + rows, middle[1]),
            "left": (middle[0], left - wide),
            "above": (top - high, middle[1]),
        }
        fitting = [s for s in free if min(at[s]) >= 0 and at[s][0] + high <= table and at[s][1] + wide <= table]
        if not fitting:
            raise ValueError(
                f"expected references that fit beside a picture of {rows} x {columns} patches, one on each side, in "
                f"this net's table of {table} x {table}; got sizes {list(sizes)}; take smaller pictures or fewer"
            )
        free.remove(fitting[0])
        corners.append(at[fitting[0]])
    return corners
