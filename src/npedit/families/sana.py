"""Sana (arXiv 2410.10629), 1.0 and 1.5: linear attention on the latents of a DC-AE with stride 32.

- time: the net is given 1000 t times its own `timestep_scale`; its output is v. The pipeline's DPM solver rounds 1000 t
  down to an integer; nothing here does.
- layout: latents as they are; where the net predicts a variance too, its second half of channels is dropped.
- text: Gemma 2, lower case, after the long instruction that the pipeline puts before each prompt; of that sequence
  the first and the last 299 states, with a mask. A negative prompt is encoded without that instruction.
- references: stacked on the channels of x, as InstructPix2Pix does (arXiv 2211.09800). Sana has no position ids: places
  are distinguished only by the 3 x 3 convolutions of its feed-forward layers, and its linear attention keeps one small
  matrix per head. A reference next to the picture on one larger canvas would need no new weight, but a token cannot
  find the matching token of the reference there. A trial with one seed: six untrained blocks were trained to return
  6 x 6 latents of unit variance at t = 1. After 450 updates of 16 items the mean squared error was .0007 with stacked
  references and .97 on a canvas; it is 1 without any reference. So `trainable_net()` widens the input's 1 x 1
  convolution by REFERENCES slots of zero weights, and the student's output equals the base model's at the start, with
  or without references. Slots without a reference get zeros. A reference of another size is resampled to the picture's
  grid, so encode it at the picture's size if you can. The base has no slot and refuses references. LoRA adapters are
  added to a frozen net that is widened in the same way, `lora_base()`. So the base's own pipeline does not open them;
  npedit's editor does.
"""

from __future__ import annotations

import copy
import inspect
import string
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer, PreTrainedTokenizerBase

from npedit.families._published import find_published
from npedit.families.base import Dtypes, EncodedText, Family, ModelProperties, References, require_latents
from npedit.nets.distributed import compute_dtype

PARTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
TEXT_LENGTH = 300  # the pipeline's own
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
FLOAT16_MAX = 65504.0
REFERENCES = 4  # slots of a net that `trainable_net()` makes


class Sana(Family):
    """One Sana pipeline, opened once; `families/base.py` describes the interface."""

    most_references, has_wider_input = REFERENCES, True
    pipeline, denoiser = SanaPipeline, SanaTransformer2DModel
    part_names = PARTS

    def __init__(self, pipe: SanaPipeline, device: torch.device):
        self.pipe = pipe
        self.base = pipe.transformer
        self.device = device
        for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
            part.requires_grad_(False).eval().to(device)
        self.facts = ModelProperties(
            channels=pipe.vae.config.latent_channels,
            stride=pipe.vae_scale_factor,
            multiple=pipe.vae_scale_factor * pipe.transformer.config.patch_size,
            guidance=4.5,
            blocks=("transformer_blocks",),
        )

    @classmethod
    def load(cls, weights: str | Path, dtype: Dtypes, device: torch.device, net: nn.Module | None = None) -> Self:
        """See `Family.load`. The attention of checkpoints that were trained in float16 is clipped in every number
        type."""
        family = super().load(weights, dtype, device, net)
        known = find_published(weights)
        if known is not None and known.clips_attention:
            _clip_attention(family.base)
        return family

    @classmethod
    def tiny(cls, seed: int) -> Self:
        """Random weights: a factor-4 DC-AE with 4 channels, 2 blocks of width 32, text by characters; an odd seed
        has queries and keys normalised, as Sana 1.5."""
        torch.manual_seed(seed)
        words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *string.printable]
        tokenizer = GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=4096)
        tokenizer.add_bos_token = True
        encoder = Gemma2Config(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, sliding_window=64, max_position_embeddings=4096,
        )  # fmt: skip
        blocks = {"block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8, 16),
                  "layers_per_block": (1, 1, 1), "qkv_multiscales": ((), (), (5,))}  # fmt: skip
        vae = AutoencoderDC(
            latent_channels=4, attention_head_dim=8, scaling_factor=0.4,
            **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in blocks.items()},
        )  # fmt: skip
        net = SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=16,
            sample_size=8, qk_norm="rms_norm_across_heads" if seed % 2 else None,
        )  # fmt: skip
        scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        pipe = SanaPipeline(
            tokenizer=tokenizer, text_encoder=Gemma2Model(encoder), vae=vae, transformer=net, scheduler=scheduler
        )
        return cls(pipe, torch.device("cpu"))

    def trainable_net(self) -> nn.Module:
        """A trainable copy of the base transformer, its input widened for references."""
        return _widen_input(copy.deepcopy(self.base)).requires_grad_(True).train()

    def lora_base(self) -> nn.Module:
        """The base with its input widened for references, frozen; it shares all other weights with the base."""
        return self._widened_base

    def base_as_editor(self) -> nn.Module:
        """The base, its input widened for references in place."""
        return _widen_input(self.base)

    @cached_property
    def _widened_base(self) -> nn.Module:
        return _widen_input(copy.deepcopy(self.base, {id(p): p for p in self.base.parameters()})).requires_grad_(False)

    def noise_shift(self, height: int, width: int) -> float:
        """The scheduler's shift, of a DPM solver or of flow matching's Euler; the same for all sizes."""
        config = self.pipe.scheduler.config
        return float(config.flow_shift if "flow_shift" in config else config.shift)

    def prompt_tokenizer_and_limit(self) -> tuple[PreTrainedTokenizerBase, int]:
        """Gemma's tokenizer; the pipeline leaves two tokens of the length to marks."""
        return self.pipe.tokenizer, TEXT_LENGTH - 2

    def encode_text(self, prompts: Sequence[str]) -> EncodedText:
        """Gemma 2's states (b, 300, d) and their mask (b, 300), of prompts after the pipeline's long instruction."""
        return self._encode_after(INSTRUCTION, prompts)

    def encode_negative_text(self, prompts: Sequence[str]) -> EncodedText:
        """Gemma 2's states (b, 300, d) and their mask (b, 300), of negative prompts. The pipeline puts no instruction
        before these."""
        return self._encode_after(None, prompts)

    @torch.no_grad()
    def _encode_after(self, instruction: list[str] | None, prompts: Sequence[str]) -> EncodedText:
        states, mask, *_ = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device, max_sequence_length=TEXT_LENGTH,
            complex_human_instruction=instruction,
        )  # fmt: skip
        return EncodedText((states, mask))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) in [0, 1] -> (b, c, h, w), scaled; a DC-AE has no posterior. Float32 whatever its type, so that
        neither x_t nor DMD's gap is rounded."""
        vae: AutoencoderDC = self.pipe.vae
        return vae.encode((images * 2 - 1).to(vae.dtype)).latent.float() * vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, 3, H, W), not clamped."""
        vae: AutoencoderDC = self.pipe.vae
        return (vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample + 1) / 2

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, text: EncodedText, references: References = ()) -> Tensor:
        """v (b, c, h, w); see the head of this file.

        Raises:
            ValueError: more references than the net has slots for; the base has none.
        """
        config: Any = net.config
        slots, given = config.in_channels // x.shape[1] - 1, require_latents(references)
        if len(given) > slots:
            raise ValueError(
                f"expected at most {slots} references, the slots of this net; got {len(given)}. Nets of "
                f"`trainable_net()` have {REFERENCES}."
            )
        planes = [x, *(_resampled_reference(reference, x) for reference in given)]
        planes += [torch.zeros_like(x)] * (slots - len(given))
        dtype = compute_dtype(net)
        sequence, mask = text.parts
        out = net(
            torch.cat(planes, 1).to(dtype),
            encoder_hidden_states=sequence.to(dtype),
            encoder_attention_mask=mask,
            timestep=t.float() * 1000 * config.timestep_scale,
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]].to(x.dtype)


def _clip_attention(net: nn.Module) -> None:
    """Clip the outputs of all self-attention layers of the net, in place, to the range of float16. diffusers does so
    in float16 only."""
    for name, layer in net.named_modules():
        if name.endswith("attn1"):
            layer.register_forward_hook(_clip_output)


def _clip_output(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.clip(-FLOAT16_MAX, FLOAT16_MAX)


def _widen_input(net: Any) -> nn.Module:
    """The net, in place, with REFERENCES further slots of zero weights in its input."""
    old = net.patch_embed.proj
    width = old.in_channels * (1 + REFERENCES)
    new = nn.Conv2d(width, old.out_channels, old.kernel_size, old.stride, bias=old.bias is not None).to(old.weight)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        if new.bias is not None:
            new.bias.copy_(old.bias)
    net.patch_embed.proj = new
    net.register_to_config(in_channels=width, out_channels=net.proj_out.out_features // net.config.patch_size**2)
    return net


def _resampled_reference(reference: Tensor, x: Tensor) -> Tensor:
    if reference.shape[2:] == x.shape[2:]:
        return reference.to(x.dtype)
    return F.interpolate(reference.to(x.dtype), x.shape[2:], mode="bilinear", antialias=True)
