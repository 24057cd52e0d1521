"""Nodes for ComfyUI: copy this file to ComfyUI/custom_nodes/ and restart ComfyUI. npedit is not needed.

- "npedit reference" gives a reference picture to a denoiser of SD3 or Z-Image, at the positions that the editor was
  trained with. ComfyUI's own node "Set Reference Latent" does nothing for SD3. For Z-Image it puts 32 tokens of padding
  before each reference, which the editor has not seen. FLUX, Qwen-Image and Krea 2 need ComfyUI's own nodes only.
- "npedit sampler" samples like `npedit edit`: with the same seed it draws the same noise at every step. ComfyUI's
  sampler "lcm" makes the same steps, and draws other noise after the first one.

Tried with ComfyUI 0.33.0.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

MOST_REFERENCES = 4  # of SD3: one on each side of the picture


class NpeditReference:
    """A node that gives a denoiser one more reference picture."""

    CATEGORY = "npedit"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "add_reference"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs, as ComfyUI asks for them."""
        return {"required": {"model": ("MODEL",), "latent": ("LATENT",)}}

    def add_reference(self, model: Any, latent: dict[str, Tensor]) -> tuple[Any]:
        """A copy of the model that sees the latent, after those that earlier nodes gave it."""
        options = model.model_options.get("transformer_options", {})
        references = [*options.get("npedit_references", []), latent["samples"]]
        changed = model.clone()
        changed.model_options = {
            **changed.model_options,
            "transformer_options": {**changed.model_options["transformer_options"], "npedit_references": references},
        }
        changed.remove_wrappers_with_key("apply_model", "npedit")
        changed.add_wrapper_with_key("apply_model", "npedit", _ReferenceWrapper(references))
        return (changed,)


class NpeditSampler:
    """A node that gives the sampler of `npedit edit`."""

    CATEGORY = "npedit"
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "make_sampler"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The node's inputs: none."""
        return {"required": {}}

    def make_sampler(self) -> tuple[Any]:
        """The sampler, for the node SamplerCustomAdvanced."""
        return (importlib.import_module("comfy.samplers").KSAMPLER(sample_few_step),)


NODE_CLASS_MAPPINGS = {"NpeditReference": NpeditReference, "NpeditSampler": NpeditSampler}
NODE_DISPLAY_NAME_MAPPINGS = {"NpeditReference": "npedit reference", "NpeditSampler": "npedit sampler"}


@torch.no_grad()
def sample_few_step(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
) -> Tensor:
    """The clean latents after a step at each sigma but the last, which is 0: predict x0, then x = (1 - t) x0 + t eps
    with fresh noise. The noise comes from the generator that the node RandomNoise drew the first noise from."""
    extra_args = extra_args or {}
    stream = torch.Generator("cpu").manual_seed(int(extra_args.get("seed") or 0))
    torch.randn(x.shape, generator=stream)  # the first noise, which is in x already
    x0 = x
    for i, (now, then) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        x0 = model(x, now * x.new_ones(len(x)), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": now, "sigma_hat": now, "denoised": x0})
        if then > 0:
            noise = torch.randn(x.shape, generator=stream).to(x)
            x = (1 - then) * x0 + then * noise
    return x0


class _ReferenceWrapper:
    """Called around each call of ComfyUI's model."""

    def __init__(self, references: Sequence[Tensor]) -> None:
        self.references = references

    def __call__(self, executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the model, which sees the references."""
        model = executor.class_obj
        net = model.diffusion_model
        dtype = model.get_dtype_inference()
        references = [model.process_latent_in(r.to(x.device)).to(dtype) for r in self.references]
        if hasattr(net, "embed_cap"):
            with _omit_empty_captions(net):
                out: Tensor = executor(x, *args, ref_latents=references, **kwargs)
            return out
        if hasattr(net, "joint_blocks"):
            with _attach_references(net, x.shape[2], x.shape[3], references):
                result: Tensor = executor(x, *args, **kwargs)
            return result
        raise ValueError(
            "expected a model of SD3 or Z-Image; for FLUX, Qwen-Image and Krea 2 use the node 'Set Reference Latent'"
        )


# ---------------------------------------------------------------------------------------------------------- Z-Image


@contextmanager
def _omit_empty_captions(net: Any) -> Iterator[None]:
    """Inside the block the captions of references, which are empty, have no tokens: the references are frames 1, 3,
    ..., then follow the caption and the picture."""
    unchanged = net.embed_cap

    def embed(
        cap_feats: Tensor | None = None, offset: int = 0, bsz: int = 1, device: Any = None, dtype: Any = None
    ) -> Any:
        if cap_feats is not None:
            return unchanged(cap_feats, offset=offset, bsz=bsz, device=device, dtype=dtype)
        places = net.rope_embedder(torch.zeros(bsz, 0, 3, device=device)).movedim(1, 2)
        return (torch.zeros(bsz, 0, net.dim, device=device, dtype=dtype),), (places,), 0

    net.embed_cap = embed
    try:
        yield
    finally:
        del net.embed_cap


# -------------------------------------------------------------------------------------------------------------- SD3


@contextmanager
def _attach_references(net: Any, height: int, width: int, references: Sequence[Tensor]) -> Iterator[None]:
    """Inside the block the tokens of the references follow those of the picture, whose latents have this height and
    width; they have the codes of places beside the picture."""
    patch, table = net.patch_size, net.pos_embed_max_size
    sizes = [(r.shape[2] // patch, r.shape[3] // patch) for r in references]
    corners = place_references(height // patch, width // patch, sizes, table)
    unchanged = net.forward_core_with_concat

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        codes = net.pos_embed.view(table, table, -1)
        tokens = [x]
        for reference, (top, left), (high, wide) in zip(references, corners, sizes):
            places = codes[top : top + high, left : left + wide].flatten(0, 1).to(x)
            tokens.append((net.x_embedder(reference) + places).expand(len(x), -1, -1))
        out: Tensor = unchanged(torch.cat(tokens, 1), *args, **kwargs)
        return out[:, : x.shape[1]]

    net.forward_core_with_concat = forward
    try:
        yield
    finally:
        del net.forward_core_with_concat


def place_references(rows: int, columns: int, sizes: Sequence[tuple[int, int]], table: int) -> list[tuple[int, int]]:
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
            raise ValueError(f"expected at most {MOST_REFERENCES} references that fit beside the picture; got {sizes}")
        free.remove(fitting[0])
        corners.append(at[fitting[0]])
    return corners
