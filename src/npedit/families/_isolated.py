"""Isolated references: one pass of a net over the references serves all later calls of the net.

In the reference pass the net sees the references' tokens alone, at time 0, which is the time of a clean picture. The
keys and values of each attention layer are cached. In a later call, which sees the noised picture and the text, each
layer appends the cached keys and values to its keys and values. So picture and text attend to the references, and the
references attend to themselves alone. Keys are cached after the rotary embedding.

Precedent: `Flux2KleinKVPipeline` of diffusers. `npedit export` copies the code below into an exported editor's
`pipeline.py`, so this file imports nothing of npedit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

# Where `patchify_and_embed` of diffusers' Z-Image returns the ids of picture and caption, and the picture's padding:
Z_IMAGE_PARTS = (3, 4, 5)


class ReferenceKVCache:
    """The KV cache of `count` references: the keys and values of their tokens, each (b, tokens, heads, width), by
    attention layer. `output` is the output of the reference pass, whose values are not used."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.by_layer: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.output: Tensor = torch.empty(0)


class ReferenceAttnProcessor:
    """Replaces the attention processor of one layer during a call. A family's class adds `__call__`, which computes
    what the replaced processor computes, with `_attend` in the place of the attention function."""

    _parallel_config = None  # diffusers reads this attribute of every processor

    def __init__(self, cache: ReferenceKVCache, is_reference_pass: bool, replaced: Any) -> None:
        self.cache, self.is_reference_pass = cache, is_reference_pass
        self._attention_backend = getattr(replaced, "_attention_backend", None)

    def _attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention's output (b, n, heads * width) of query, key and value (b, n, heads, width). Keys and values may
        have fewer heads, which the queries' heads share. The mask (b, n) says which tokens are no padding."""
        if not query.numel():  # a layer of the text, in the reference pass
            return query.flatten(2, 3)
        if self.is_reference_pass:
            self.cache.by_layer.setdefault(layer, (key, value))  # a recomputed block must not replace what is in use
        elif layer in self.cache.by_layer:
            cached_key, cached_value = self.cache.by_layer[layer]
            key, value = torch.cat([key, cached_key], 1), torch.cat([value, cached_value], 1)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(cached_key.shape[:2])], 1)
        if mask is not None:
            mask = mask[:, None, None, :]
        if (shared := query.shape[2] // key.shape[2]) > 1:
            key, value = key.repeat_interleave(shared, 2), value.repeat_interleave(shared, 2)
        out = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=self._attention_backend)
        return out.flatten(2, 3).to(query.dtype)


class FluxReferenceAttnProcessor(ReferenceAttnProcessor):
    """For FLUX.1. A layer of two streams gets the text's tokens separately, and a layer of one stream gets all."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        query, key, value = _project_heads(hidden_states, attn.to_q, attn.to_k, attn.to_v, width=attn.head_dim)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_query, text_key, text_value = _project_heads(encoder_hidden_states, *added, width=attn.head_dim)
            query = torch.cat([attn.norm_added_q(text_query), query], 1)
            key = torch.cat([attn.norm_added_k(text_key), key], 1)
            value = torch.cat([text_value, value], 1)
        query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        out = self._attend(attn, query, key, value, attention_mask)
        if encoder_hidden_states is None:
            return out
        length = encoder_hidden_states.shape[1]
        return attn.to_out[1](attn.to_out[0](out[:, length:])), attn.to_add_out(out[:, :length])


class Krea2ReferenceAttnProcessor(ReferenceAttnProcessor):
    """For Krea 2. Layers that see the text alone have no rotary embedding and no cache."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        query, key, value = _project_heads(hidden_states, attn.to_q, attn.to_k, attn.to_v, width=attn.head_dim)
        query, key, gate = attn.norm_q(query), attn.norm_k(key), attn.to_gate(hidden_states)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        mask = None if attention_mask is None else attention_mask[:, 0, 0]
        return attn.to_out[0](self._attend(attn, query, key, value, mask) * torch.sigmoid(gate))


class QwenReferenceAttnProcessor(ReferenceAttnProcessor):
    """For Qwen-Image. In the reference pass the last rotary embeddings are those of the references, because the first
    are of a picture that is not there."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        width, (count, length) = attn.inner_dim // attn.heads, (hidden_states.shape[1], encoder_hidden_states.shape[1])
        query, key, value = _project_heads(hidden_states, attn.to_q, attn.to_k, attn.to_v, width=width)
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_query, text_key, text_value = _project_heads(encoder_hidden_states, *added, width=width)
        rotary, text_rotary = image_rotary_emb
        rotary = rotary[len(rotary) - count :]
        text_query, text_key = attn.norm_added_q(text_query), attn.norm_added_k(text_key)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query = torch.cat([_rotate(text_query, text_rotary), _rotate(query, rotary)], 1)
        key = torch.cat([_rotate(text_key, text_rotary), _rotate(key, rotary)], 1)
        mask = encoder_hidden_states_mask
        if mask is not None:
            mask = torch.cat([mask.bool(), mask.new_ones(len(mask), count, dtype=torch.bool)], 1)
        out = self._attend(attn, query, key, torch.cat([text_value, value], 1), mask)
        return attn.to_out[1](attn.to_out[0](out[:, length:])), attn.to_add_out(out[:, :length])


class ZImageReferenceAttnProcessor(ReferenceAttnProcessor):
    """For Z-Image. Layers that see the caption alone have no cache."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Any = None,
    ) -> Tensor:
        width = attn.inner_dim // attn.heads
        query, key, value = _project_heads(hidden_states, attn.to_q, attn.to_k, attn.to_v, width=width)
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        query, key = _rotate(query, freqs_cis), _rotate(key, freqs_cis)
        return attn.to_out[0](self._attend(attn, query, key, value, attention_mask))


def cache_references(net: nn.Module, processor: Any, count: int, call: Callable[[], Tensor]) -> ReferenceKVCache:
    """The KV cache that the reference pass `call()` fills. The pass calls `net`, or an adapter of it, on `count`
    references alone. `processor` is the family's subclass of `ReferenceAttnProcessor`."""
    cache = ReferenceKVCache(count)
    with _replace_processors(net, processor, cache, is_reference_pass=True):
        cache.output = call()
    return cache


def attend_to_references(net: nn.Module, processor: Any, cache: ReferenceKVCache, call: Callable[[], Tensor]) -> Tensor:
    """The output of `call()`, which calls `net`, or an adapter of it, on a picture. The net attends to the cached
    references too. Gradient flows to them.

    Raises:
        ValueError: the cache is that of another net.
    """
    if not set(cache.by_layer) <= set(net.modules()):
        raise ValueError("expected references that this net has read; got those of another net; read them again")
    with _replace_processors(net, processor, cache, is_reference_pass=False):
        out = call()
    return _BackwardThrough.apply(out, cache.output)


@contextmanager
def z_image_frames_after(net: Any, count: int) -> Iterator[None]:
    """Inside the `with` block, a call of a Z-Image net without references gives caption and picture the frames that
    they have after `count` references, each of which takes two."""
    unchanged, (picture, caption, padding) = net.patchify_and_embed, Z_IMAGE_PARTS

    def patchify(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        parts = list(unchanged(*args, **kwargs))
        moved = parts[picture][0].new_tensor([2 * count, 0, 0])
        parts[picture] = [ids + moved * ~pad[:, None] for ids, pad in zip(parts[picture], parts[padding])]
        parts[caption] = [ids + moved for ids in parts[caption]]
        return tuple(parts)

    net.patchify_and_embed = patchify
    try:
        yield
    finally:
        del net.patchify_and_embed


class _BackwardThrough(torch.autograd.Function):
    """Returns its first argument, and gives the second a gradient of zero. FSDP2 gathers the weights of a block for the
    backward pass when a gradient arrives at the block's output. Without this function none would arrive at the last
    block of a reference pass, although its keys and values have one."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, other: Tensor) -> Tensor:
        ctx.like = (other.shape, other.dtype, other.device)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        shape, dtype, device = ctx.like
        return gradients[0], torch.zeros(shape, dtype=dtype, device=device)


class _WithProcessors(nn.Module):
    """A block whose attention layers have the processors of a call, also when gradient checkpointing runs the block
    again in the backward pass."""

    def __init__(self, block: nn.Module, processor: Any, cache: ReferenceKVCache, is_reference_pass: bool) -> None:
        super().__init__()
        self.block, self.choice = block, (processor, cache, is_reference_pass)

    def forward(self, *args: Any) -> Any:
        with _replace_processors(self.block, *self.choice):
            return self.block(*args)


@contextmanager
def _replace_processors(net: Any, processor: Any, cache: ReferenceKVCache, is_reference_pass: bool) -> Iterator[None]:
    """Inside the `with` block every attention layer of the net has a processor of the given class, and so have the
    blocks that gradient checkpointing runs again later."""
    layers = [layer for layer in net.modules() if hasattr(layer, "processor")]
    before = [layer.processor for layer in layers]
    checkpoint = getattr(net, "_gradient_checkpointing_func", None)
    for layer, replaced in zip(layers, before):
        layer.processor = processor(cache, is_reference_pass, replaced)
    if checkpoint is not None:
        net._gradient_checkpointing_func = lambda block, *args: checkpoint(
            _WithProcessors(block, processor, cache, is_reference_pass), *args
        )
    try:
        yield
    finally:
        for layer, replaced in zip(layers, before):
            layer.processor = replaced
        if checkpoint is not None:
            net._gradient_checkpointing_func = checkpoint


def _project_heads(tokens: Tensor, *layers: Any, width: int) -> list[Tensor]:
    """The outputs (b, n, heads, width) of linear layers."""
    return [layer(tokens).unflatten(-1, (-1, width)) for layer in layers]


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """x (b, n, heads, width), each pair of numbers turned by a complex number of `rotary`, (n, width / 2) or
    (b, n, width / 2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary.unsqueeze(-2)).flatten(3).type_as(x)
