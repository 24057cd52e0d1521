"""Z-Image (arXiv 2511.22699), the base model and Turbo: the same classes, other weights and schedule.

- time: the net is given 1 - t, in float32; its output is x0 - eps, so the sign is turned.
- layout: a list of (c, 1, h, w), one an item; the net cuts it into 2 x 2 patches with ids (frame, row, column).
- text: the states of the last layer but one of a Qwen3, as the chat template lays the prompt out. The net takes
  captions of different lengths. `EncodedText` holds them padded to 512, with their true lengths, so that any two
  batches of prompts can be joined; the padding is cut off again before each call. The model itself pads each caption to
  a multiple of 32.
- references: the net's *omni* mode, as diffusers' `ZImageOmniPipeline` uses it: each reference is a separate frame. Its
  tokens are modulated with the clean time and the picture's with the true one. Frames are
  1, 3, 5, ... for the references, then the caption, then the picture; diffusers puts each frame after a piece of
  the caption, and here the pieces before references are empty. References may have any size, and no new weight is
  needed. The SigLIP states, which the omni checkpoint sees in addition to the latents, are left out: Z-Image and Turbo
  have no weights for them. One thing differs from the omni pipeline. Without references the net puts the picture's
  frame after the caption *with its padding* to a multiple of 32 tokens; in the omni mode it puts the frame after the
  caption without padding. `_picture_after_padded_caption` keeps the text-to-image distance in both, so that adding a
  reference does not move the picture relative to its caption. Isolated references (`_isolated.py`) have the same
  frames: their pass is in the omni mode, and later calls are those of text-to-image with other frames.
- frames: a net that `npedit convert` made from NP-Edit's public reimplementation was trained otherwise, and its config
  says so (`_references`): caption first, then one reference and the picture as two frames of one film, and an empty
  thought at the prompt's end. `open_net` and `velocity` follow it; see `_modulate_frames`.
- guidance: the pipeline adds g (cond - uncond) to the *conditional*. Its default of 5 is 6 for
  `dmd.classifier_free_guidance`. Turbo is distilled and needs none: give a recipe `guidance: 1.0`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer, Qwen3Config, Qwen3Model

from npedit.families._isolated import (
    ReferenceKVCache,
    ZImageReferenceAttnProcessor,
    attend_to_references,
    cache_references,
    z_image_frames_after,
)
from npedit.families._prompts import count_tokens
from npedit.families._shared import check_pipeline_folder, decode_with_kl_vae, encode_with_kl_vae
from npedit.families.base import EncodedText, Family, ModelProperties, References
from npedit.hub_access import is_local_only
from npedit.nets.distributed import compute_dtype
from npedit.nets.lora import weights_module

PARTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
TEXT_LENGTH = 512  # the pipeline's own
OMNI_PICTURE_IDS = 4  # where `patchify_and_embed_omni` of diffusers returns the position ids of all images
FRAMES = {"_references": "frames"}  # in a net's config; diffusers keeps what begins with an underscore
TINY_TEMPLATE = (  # Qwen3's, for one turn
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


class ZImage(Family):
    """One Z-Image pipeline, opened once; `families/base.py` describes the interface."""

    pipeline, denoiser = ZImagePipeline, ZImageTransformer2DModel
    part_names = PARTS
    can_isolate_references = True

    def __init__(self, pipe: ZImagePipeline, device: torch.device):
        self.pipe = pipe
        self.base = pipe.transformer
        self.device = device
        self.most_references = 1 if _takes_frames(pipe.transformer) else ZImage.most_references
        self.can_isolate_references = not _takes_frames(pipe.transformer)
        self.thinking = not _takes_frames(pipe.transformer)  # else prompts are encoded as for such a net
        for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
            part.requires_grad_(False).eval().to(device)
        stride = pipe.vae_scale_factor
        self.facts = ModelProperties(
            channels=pipe.vae.config.latent_channels,
            stride=stride,
            multiple=2 * stride,
            guidance=6.0,
            blocks=("noise_refiner", "context_refiner", "layers"),
        )

    @classmethod
    def tiny(cls, seed: int) -> Self:
        """Random weights: a factor-4 VAE with 4 channels, 1 + 1 + 2 blocks of width 32, text by bytes."""
        torch.manual_seed(seed)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Qwen2Tokenizer(
            vocab={symbol: i for i, symbol in enumerate(alphabet)}, model_max_length=TEXT_LENGTH,
            extra_special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=TINY_TEMPLATE,
        )  # fmt: skip
        encoder = Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=12, max_position_embeddings=TEXT_LENGTH,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
            shift_factor=0.1, scaling_factor=1.3, use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        net = ZImageTransformer2DModel(
            in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
            axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64],
        )  # fmt: skip
        nn.init.normal_(net.x_pad_token)  # learned in a trained model; zero in a new one, which would hide them
        nn.init.normal_(net.cap_pad_token)
        pipe = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0), vae=vae, text_encoder=Qwen3Model(encoder),
            tokenizer=tokenizer, transformer=net,
        )  # fmt: skip
        return cls(pipe, torch.device("cpu"))

    def open_net(self, folder: Path) -> nn.Module:
        """A transformer saved with `save_pretrained`, in the base's number type. After one that was trained with
        frames, prompts are encoded as for it."""
        net = super().open_net(folder)
        self.thinking = not _takes_frames(net)
        return net

    def prompt_tokenizer_and_limit(self) -> tuple[PreTrainedTokenizerBase, int]:
        """Qwen3's tokenizer, and the place that the chat template leaves for the prompt."""
        tokenizer, prompt = self.pipe.tokenizer, "prompt"
        turn = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": self.thinking}
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **turn)
        return tokenizer, TEXT_LENGTH - count_tokens(tokenizer, text[: text.rindex(prompt)])

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> EncodedText:
        """States (b, 512, d), zero after each prompt's end, and the true lengths (b,)."""
        if self.thinking:
            ragged, _ = self.pipe.encode_prompt(
                list(prompts), self.device, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH
            )
        else:
            ragged = self._encode_without_thinking(prompts)
        padded = ragged[0].new_zeros(len(ragged), TEXT_LENGTH, ragged[0].shape[1])
        for row, states in zip(padded, ragged):
            row[: len(states)] = states
        return EncodedText((padded, torch.tensor([len(states) for states in ragged], device=padded.device)))

    def _encode_without_thinking(self, prompts: Sequence[str]) -> list[Tensor]:
        """The states of each prompt as the pipeline takes them, but with a template that has an empty thought."""
        tokenizer, turn = self.pipe.tokenizer, {"add_generation_prompt": True, "enable_thinking": False}
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, **turn) for p in prompts
        ]
        found = tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
        ids, mask = found.input_ids.to(self.device), found.attention_mask.to(self.device).bool()
        states = self.pipe.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        return [row[kept] for row, kept in zip(states, mask)]

    def encode(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) in [0, 1] -> (b, c, h, w), shifted and scaled, in float32."""
        return encode_with_kl_vae(self.pipe.vae, images)

    def decode(self, latents: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, 3, H, W), not clamped."""
        return decode_with_kl_vae(self.pipe.vae, latents)

    def velocity(self, net: nn.Module, x: Tensor, t: Tensor, text: EncodedText, references: References = ()) -> Tensor:
        """v (b, c, h, w); see the head of this file.

        Raises:
            ValueError: not one prompt and one of each reference for each item, whose lists would be cut short; or a net
                trained with frames is given other than one reference of the picture's size, or isolated ones.
        """
        self._check_batch(x, text, references)
        given = self.prepare_references(net, references, text)
        dtype = compute_dtype(net)
        padded, lengths = text.parts
        captions = [states[:n] for states, n in zip(padded.to(dtype), lengths.tolist())]
        if isinstance(given, ReferenceKVCache):
            with z_image_frames_after(weights_module(net), given.count):
                call = partial(_run_alone, net, x.to(dtype), t, captions)
                out = attend_to_references(weights_module(net), ZImageReferenceAttnProcessor, given, call)
        elif given and _takes_frames(net):
            out = _run_film(net, x.to(dtype), t, captions, [r.to(dtype) for r in given])
        elif given:
            out = _run_omni(net, x.to(dtype), t, captions, [r.to(dtype) for r in given])
        else:
            out = _run_alone(net, x.to(dtype), t, captions)
        return -out.squeeze(2).to(x.dtype)

    def _check_batch(self, x: Tensor, text: EncodedText, references: References) -> None:
        counts = [] if isinstance(references, ReferenceKVCache) else [len(r) for r in references]
        if len(text) != len(x) or any(count != len(x) for count in counts):
            raise ValueError(f"expected {len(x)} of each; got {len(text)} prompts, references for {counts} items")

    def _reference_pass(self, net: nn.Module, references: Sequence[Tensor], text: EncodedText) -> ReferenceKVCache:
        """In the omni mode, with empty captions and without a picture. The references' frames are 1, 3, 5, ..."""
        if _takes_frames(net):
            raise ValueError("expected a net that takes separate references; got one that was trained with frames")
        padded, dtype = text.parts[0], compute_dtype(net)
        frames = [plane.to(dtype).unsqueeze(2).unbind() for plane in references]
        empty, clean = padded[0, :0].to(dtype), torch.ones(len(padded), device=padded.device)

        def call() -> Tensor:
            out = net(
                x=[list(item) for item in zip(*frames)],
                t=clean,
                cap_feats=[[empty] * len(references)] * len(padded),
                siglip_feats=[None] * len(padded),
                image_noise_mask=[[0] * len(references)] * len(padded),
                return_dict=False,
            )[0]
            return torch.stack(out)

        return cache_references(weights_module(net), ZImageReferenceAttnProcessor, len(references), call)


def _run_alone(net: nn.Module, x: Tensor, t: Tensor, captions: list[Tensor]) -> Tensor:
    """The net's output (b, c, 1, h, w) on the picture x (b, c, h, w) and the captions."""
    return torch.stack(net(x=list(x.unsqueeze(2).unbind()), t=1 - t.float(), cap_feats=captions, return_dict=False)[0])


def _run_omni(net: nn.Module, x: Tensor, t: Tensor, captions: list[Tensor], references: list[Tensor]) -> Tensor:
    """The net's output (b, c, 1, h, w) on references, captions and the picture x, in the omni mode."""
    frames, count = [plane.unsqueeze(2).unbind() for plane in (*references, x)], len(references)
    with _picture_after_padded_caption(net, x.shape[2] * x.shape[3] // 4, [len(caption) for caption in captions]):
        out = net(
            x=[list(item) for item in zip(*frames)],
            t=1 - t.float(),
            cap_feats=[[caption[:0]] * count + [caption] for caption in captions],
            siglip_feats=[None] * len(x),
            image_noise_mask=[[0] * count + [1]] * len(x),
            return_dict=False,
        )[0]
    return torch.stack(out)


def _run_film(net: nn.Module, x: Tensor, t: Tensor, captions: list[Tensor], references: list[Tensor]) -> Tensor:
    """The output (b, c, 1, h, w) of a net that was trained with frames."""
    if len(references) > 1 or references[0].shape != x.shape:
        sizes = [tuple(r.shape) for r in references]
        raise ValueError(f"expected one reference of shape {tuple(x.shape)}, as this net was trained; got {sizes}")
    films = list(torch.stack([references[0], x], 2).unbind())
    with _modulate_frames(net, x.shape[2] * x.shape[3] // 4, t):
        out = net(x=films, t=1 - t.float(), cap_feats=captions, return_dict=False)[0]
    return torch.stack([film[:, 1:] for film in out])


def empty_frames_net(base: str | Path) -> nn.Module:
    """A net like that of the base (a Hub id or a folder), without weights, on the meta device; its config says that it
    takes frames. Errors as in `Family.load`."""
    check_pipeline_folder(base, "z_image", "ZImagePipeline", ("scheduler", "transformer"))
    config = ZImageTransformer2DModel.load_config(base, subfolder="transformer", local_files_only=is_local_only(base))
    with torch.device("meta"):
        net = ZImageTransformer2DModel.from_config(config)
    net.register_to_config(**FRAMES)
    return net


def load_base_scheduler(base: str | Path) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of the base model (a Hub id or a folder)."""
    local = is_local_only(base)
    return FlowMatchEulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler", local_files_only=local)


def _takes_frames(net: Any) -> bool:
    return net.config.get("_references") == FRAMES["_references"]


@contextmanager
def _picture_after_padded_caption(net: Any, tokens: int, lengths: Sequence[int]) -> Iterator[None]:
    """Inside the block, a call of the net in omni mode gives the picture, the last image of each item, the frame after
    the padded caption, as text-to-image does. `tokens` is the picture's number of tokens; `lengths` are the numbers of
    tokens of the captions without padding."""
    inner: Any = net.patchify_and_embed_omni.__self__  # the net itself, also where `net` is an adapter of it
    unchanged = inner.patchify_and_embed_omni
    padded_tokens = _round_up(tokens)

    def patchify(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        parts = list(unchanged(*args, **kwargs))
        places: list[Tensor] = []
        for ids, length in zip(parts[OMNI_PICTURE_IDS], lengths, strict=True):
            first = len(ids) - padded_tokens
            ids = ids.clone()
            ids[first : first + tokens, 0] += _round_up(length) - length
            places.append(ids)
        parts[OMNI_PICTURE_IDS] = places
        return tuple(parts)

    inner.patchify_and_embed_omni = patchify
    try:
        yield
    finally:
        del inner.patchify_and_embed_omni


def _round_up(tokens: int) -> int:
    return -(-tokens // SEQ_MULTI_OF) * SEQ_MULTI_OF


@contextmanager
def _modulate_frames(net: nn.Module, tokens: int, t: Tensor) -> Iterator[None]:
    """Inside the block, a call of the net modulates the first `tokens` tokens of each film, which are the reference's,
    with the clean time, and all others with the film's time, as the omni mode does for separate images. For use, not
    for training with gradient checkpointing."""
    model: Any = net  # diffusers sets these attributes at run time
    clean = model.t_embedder(torch.ones_like(t, dtype=torch.float32) * model.t_scale)

    def modulation(x: Tensor, noisy_time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        noisy = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
        noisy[:, :tokens] = 0
        return noisy, noisy_time, clean.to(noisy_time)

    def block(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return *args[:4], *modulation(args[0], args[3])

    def last(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask, noisy_time, clean_time = modulation(args[0], kwargs["c"])
        return args, {"noise_mask": mask, "c_noisy": noisy_time, "c_clean": clean_time}

    hooks = [layer.register_forward_pre_hook(block) for layer in (*model.noise_refiner, *model.layers)]
    hooks += [layer.register_forward_pre_hook(last, with_kwargs=True) for layer in model.all_final_layer.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
