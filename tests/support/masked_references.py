"""Isolated references computed in one call without a cache: all tokens at once, with an attention mask that keeps
the references to themselves, and with modulation by token. The closed form that `families/_isolated.py` must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.models.transformers import (
    transformer_flux,
    transformer_krea2,
    transformer_qwenimage,
    transformer_z_image,
)
from torch import Tensor, nn

from npedit.families import krea2, qwen_image, z_image
from npedit.families._shared import pack_latents, trim_padding, unpack_latents
from npedit.families.base import EncodedText, Family
from npedit.families.flux import Flux, _position_ids
from npedit.families.krea2 import Krea2
from npedit.families.qwen_image import QwenImage
from npedit.families.z_image import ZImage
from npedit.nets.lora import LoraAdapter, _activate_adapters, weights_module

Places = Callable[[int], Sequence[range]]  # number of tokens of a call -> the references' tokens, of each item


def masked_velocity(
    family: Family, net: nn.Module, x: Tensor, t: Tensor, text: EncodedText, references: Sequence[Tensor]
) -> Tensor:
    """v (b, c, h, w), as `family.velocity` gives it after `family.isolate_references()`."""
    how: dict[type, Any] = {Flux: _flux, Krea2: _krea2, QwenImage: _qwen, ZImage: _z_image}
    return how[type(family)](family, net, x, t, text, references)


@contextmanager
def _references_alone(module: Any, places: Places) -> Iterator[None]:
    """Inside, attention in a module of diffusers lets references attend to themselves alone."""
    unchanged = module.dispatch_attention_fn

    def dispatch(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **more: Any) -> Tensor:
        n = query.shape[1]
        is_reference = torch.zeros(len(query), n, dtype=torch.bool)
        for row, place in zip(is_reference, places(n)):
            row[list(place)] = True
        allowed = ~is_reference[:, None, :, None] | is_reference[:, None, None, :]
        if attn_mask is not None:
            allowed = allowed & attn_mask
        return unchanged(query, key, value, attn_mask=allowed, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "dispatch_attention_fn", dispatch)
        yield


# --------------------------------------------------------------------------------------------------------------- FLUX


def _flux(family: Flux, net: Any, x: Tensor, t: Tensor, text: EncodedText, references: Sequence[Tensor]) -> Tensor:
    roles = [net.role] if isinstance(net, LoraAdapter) else []
    inner, planes = weights_module(net), [x, *references]
    first = text.parts[0].shape[1] + x.shape[2] * x.shape[3] // 4
    with (
        _activate_adapters(inner, roles),
        _references_alone(transformer_flux, lambda n: [range(first, n)] * len(x)),
    ):
        out = _flux_by_hand(family, inner, planes, t, *text.parts)
    return unpack_latents(out, x.shape[2] // 2, x.shape[3] // 2)


def _flux_by_hand(family: Flux, net: Any, planes: list[Tensor], t: Tensor, sequence: Tensor, pooled: Tensor) -> Tensor:
    """FLUX's forward pass with one time for text and picture and time 0 for the references."""
    count = planes[0].shape[2] * planes[0].shape[3] // 4
    scale = (1000 * torch.full_like(t, family.facts.guidance),) if net.config.guidance_embeds else ()
    now, clean = (net.time_text_embed(1000 * time, *scale, pooled) for time in (t, torch.zeros_like(t)))
    picture = net.x_embedder(torch.cat([pack_latents(p) for p in planes], 1))
    words = net.context_embedder(sequence)
    ids = [_position_ids(p.shape[2] // 2, p.shape[3] // 2, i, p) for i, p in enumerate(planes)]
    rotary = net.pos_embed(torch.cat([torch.zeros(sequence.shape[1], 3), *ids]))
    for block in net.transformer_blocks:
        words, picture = _flux_double(block, words, picture, count, now, clean, rotary)
    for block in net.single_transformer_blocks:
        both, first = torch.cat([words, picture], 1), words.shape[1] + count
        states, gate = _by_token(block.norm, both, first, now, clean)
        seen = block.attn(hidden_states=states, image_rotary_emb=rotary)
        both = both + gate * block.proj_out(torch.cat([seen, block.act_mlp(block.proj_mlp(states))], 2))
        words, picture = both[:, : words.shape[1]], both[:, words.shape[1] :]
    return net.proj_out(net.norm_out(picture[:, :count], now))


def _flux_double(
    block: Any, words: Tensor, picture: Tensor, count: int, now: Tensor, clean: Tensor, rotary: Any
) -> Any:
    states, gate, shift, scale, last = _by_token(block.norm1, picture, count, now, clean)
    of_words, *rest = block.norm1_context(words, emb=now)
    word_gate, word_shift, word_scale, word_last = (value[:, None] for value in rest)
    seen, read = block.attn(hidden_states=states, encoder_hidden_states=of_words, image_rotary_emb=rotary)
    picture, words = picture + gate * seen, words + word_gate * read
    picture = picture + last * block.ff(block.norm2(picture) * (1 + scale) + shift)
    return words + word_last * block.ff_context(block.norm2_context(words) * (1 + word_scale) + word_shift), picture


def _by_token(norm: Any, tokens: Tensor, count: int, now: Tensor, clean: Tensor) -> list[Tensor]:
    """What an adaptive norm returns, by token: the first `count` tokens have one time, the others another."""
    parts = [(tokens[:, :count], now), (tokens[:, count:], clean)]
    found = [norm(part, emb=time) for part, time in parts]
    rows = [[values[0], *(v[:, None].expand_as(values[0]) for v in values[1:])] for values in found]
    return [torch.cat(pair, 1) for pair in zip(*rows)]


# --------------------------------------------------------------------------------------------------------- Qwen-Image


def _qwen(family: QwenImage, net: Any, x: Tensor, t: Tensor, text: EncodedText, references: Sequence[Tensor]) -> Tensor:
    """diffusers' net has a switch for time 0 of the references, made for Qwen-Image-Edit-2511."""
    states, mask = trim_padding(*text.parts)
    inner: Any = weights_module(net)
    first = states.shape[1] + x.shape[2] * x.shape[3] // 4
    switched = [inner, *inner.transformer_blocks]
    with (
        pytest.MonkeyPatch.context() as patch,
        _references_alone(transformer_qwenimage, lambda n: [range(first, n)] * len(x)),
    ):
        for module in switched:
            patch.setattr(module, "zero_cond_t", True)
        out = qwen_image._run(net, [x, *references], t, states, mask)
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    return unpack_latents(out[:, : rows * columns], rows, columns)


# ------------------------------------------------------------------------------------------------------------- Krea 2


def _krea2(family: Krea2, net: Any, x: Tensor, t: Tensor, text: EncodedText, references: Sequence[Tensor]) -> Tensor:
    """The net's modulation has a dimension for tokens, of size 1, so it can be given one for each token."""
    states, mask = trim_padding(*text.parts)
    inner: Any = weights_module(net)
    first, total = states.shape[1] + x.shape[2] * x.shape[3] // 4, states.shape[1]
    total += sum(p.shape[2] * p.shape[3] // 4 for p in (x, *references))

    def by_token(layer: Any, given: Any, now: Tensor) -> Tensor:
        clean = inner.time_embed(torch.zeros_like(t), dtype=x.dtype)
        clean = layer.forward(nn.functional.gelu(clean, approximate="tanh"))
        return torch.cat([now.expand(-1, first, -1), clean.expand(-1, total - first, -1)], 1)

    hook = inner.time_mod_proj.register_forward_hook(by_token)
    try:
        with _references_alone(transformer_krea2, lambda n: [range(first, n)] * len(x) if n == total else []):
            out = krea2._run(net, [x, *references], t, states, mask)
    finally:
        hook.remove()
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    return unpack_latents(out[:, : rows * columns], rows, columns)


# ------------------------------------------------------------------------------------------------------------ Z-Image


def _z_image(family: ZImage, net: Any, x: Tensor, t: Tensor, text: EncodedText, references: Sequence[Tensor]) -> Tensor:
    """diffusers' omni mode modulates by token: references with the clean time."""
    padded, lengths = text.parts
    captions = [states[:n] for states, n in zip(padded, lengths.tolist())]
    of_references = sum(z_image._round_up(r.shape[2] * r.shape[3] // 4) for r in references)
    inner: Any = weights_module(net)
    before = [z_image._round_up(len(caption)) for caption in captions]
    alone, none = [range(of_references)] * len(x), [range(0)] * len(x)
    after_captions = [range(first, first + of_references) for first in before]
    layers = iter([alone] * len(inner.noise_refiner) + [none] * len(inner.context_refiner))

    def places(n: int) -> list[range]:
        return next(layers, after_captions)

    with _references_alone(transformer_z_image, places):
        return -z_image._run_omni(net, x, t, captions, list(references)).squeeze(2)
