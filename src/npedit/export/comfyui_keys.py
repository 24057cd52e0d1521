"""ComfyUI's names for the weights of each family's denoiser.

ComfyUI keeps the names and the layout of each model's first publication; diffusers has other names, and holds some
stacked weights as separate ones. Read from ComfyUI 0.33.0: `comfy/model_detection.py` (the keys by which a model is
recognised), the models under `comfy/ldm/`, and `comfy/lora.py` (the keys of LoRA files that it knows). No code of
ComfyUI is copied here: it has another licence.

- FLUX, SD3 and Z-Image: queries, keys and values are rows of one weight; in FLUX's single blocks the input of the MLP
  is stacked below them. The shift and scale of the last norm have the other order, and so have those of the text norm
  in SD3's last block.
- Krea 2: other names; a block's table of six rows is one row.
- Qwen-Image: the names are equal.
- Sana: ComfyUI has no such model.

A LoRA file needs none of this: ComfyUI itself knows the diffusers names with the prefix `transformer.`, and adds the
LoRA of a stacked weight's part to its rows. `unknown_lora_modules` says which modules it would not find.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

SWAPPED = "swapped"  # the first and the second half of the rows change places
FLAT = "flat"  # the rows become one row


@dataclass(frozen=True)
class Place:
    """Where ComfyUI holds a weight: under `key`, as number `part` of `parts` weights stacked along the rows. `suffix`
    replaces "weight" or "bias" where the last word of the key is another one."""

    key: str
    part: int = 0
    parts: int = 1
    suffix: str = ""
    change: str = ""  # "", SWAPPED or FLAT


@dataclass(frozen=True)
class Layout:
    """The names of one model. `blocks` has, for each list of blocks in diffusers, its name in ComfyUI and the names
    inside a block; `outside` has all others. A name is that of a module, or of a parameter that is no module's weight
    or bias. `same` means that all names are equal."""

    outside: Mapping[str, Place] = field(default_factory=dict)
    blocks: Mapping[str, tuple[str, Mapping[str, Place]]] = field(default_factory=dict)
    same: bool = False

    def find(self, name: str) -> Place | None:
        """The place of the parameter that diffusers calls `name`; None if ComfyUI has none for it."""
        if self.same:
            return Place(name)
        for block, (target, inside) in self.blocks.items():
            match = re.fullmatch(rf"{re.escape(block)}\.(\d+)\.(.+)", name)
            if match and name.rpartition(".")[0] not in self.outside:
                return _look_up(inside, match[2], f"{target}.{match[1]}.")
        return _look_up(self.outside, name, "")


def _look_up(table: Mapping[str, Place], name: str, prefix: str) -> Place | None:
    if name in table:
        return replace(table[name], key=prefix + table[name].key)
    module, _, kind = name.rpartition(".")
    if module not in table:
        return None
    place = table[module]
    return replace(place, key=f"{prefix}{place.key}.{place.suffix or kind}")


def _stack(key: str, *names: str) -> dict[str, Place]:
    return {name: Place(key, i, len(names)) for i, name in enumerate(names)}


def _rename(names: Mapping[str, str]) -> dict[str, Place]:
    return {name: Place(key) for name, key in names.items()}


def _scales(names: Mapping[str, str]) -> dict[str, Place]:
    return {name: Place(key, suffix="scale") for name, key in names.items()}


# ------------------------------------------------------------------------------------------------------------- FLUX

FLUX = Layout(
    outside={
        **_rename(
            {
                "x_embedder": "img_in",
                "context_embedder": "txt_in",
                "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
                "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
                "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
                "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
                "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
                "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
                "proj_out": "final_layer.linear",
            }
        ),
        "norm_out.linear": Place("final_layer.adaLN_modulation.1", change=SWAPPED),
    },
    blocks={
        "transformer_blocks": (
            "double_blocks",
            {
                **_stack("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
                **_stack("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                **_scales(
                    {
                        "attn.norm_q": "img_attn.norm.query_norm",
                        "attn.norm_k": "img_attn.norm.key_norm",
                        "attn.norm_added_q": "txt_attn.norm.query_norm",
                        "attn.norm_added_k": "txt_attn.norm.key_norm",
                    }
                ),
                **_rename(
                    {
                        "norm1.linear": "img_mod.lin",
                        "norm1_context.linear": "txt_mod.lin",
                        "attn.to_out.0": "img_attn.proj",
                        "attn.to_add_out": "txt_attn.proj",
                        "ff.net.0.proj": "img_mlp.0",
                        "ff.net.2": "img_mlp.2",
                        "ff_context.net.0.proj": "txt_mlp.0",
                        "ff_context.net.2": "txt_mlp.2",
                    }
                ),
            },
        ),
        "single_transformer_blocks": (
            "single_blocks",
            {
                **_stack("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                **_scales({"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}),
                **_rename({"norm.linear": "modulation.lin", "proj_out": "linear2"}),
            },
        ),
    },
)

# -------------------------------------------------------------------------------------------------------------- SD3

SD3 = Layout(
    outside={
        **_rename(
            {
                "pos_embed.pos_embed": "pos_embed",
                "pos_embed.proj": "x_embedder.proj",
                "context_embedder": "context_embedder",
                "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
                "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
                "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
                "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
                "proj_out": "final_layer.linear",
            }
        ),
        "norm_out.linear": Place("final_layer.adaLN_modulation.1", change=SWAPPED),
    },
    blocks={
        "transformer_blocks": (
            "joint_blocks",
            {
                **_stack("x_block.attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
                **_stack("x_block.attn2.qkv", "attn2.to_q", "attn2.to_k", "attn2.to_v"),
                **_stack("context_block.attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
                **_rename(
                    {
                        "norm1.linear": "x_block.adaLN_modulation.1",
                        "norm1_context.linear": "context_block.adaLN_modulation.1",
                        "attn.norm_q": "x_block.attn.ln_q",
                        "attn.norm_k": "x_block.attn.ln_k",
                        "attn.norm_added_q": "context_block.attn.ln_q",
                        "attn.norm_added_k": "context_block.attn.ln_k",
                        "attn.to_out.0": "x_block.attn.proj",
                        "attn.to_add_out": "context_block.attn.proj",
                        "attn2.norm_q": "x_block.attn2.ln_q",
                        "attn2.norm_k": "x_block.attn2.ln_k",
                        "attn2.to_out.0": "x_block.attn2.proj",
                        "ff.net.0.proj": "x_block.mlp.fc1",
                        "ff.net.2": "x_block.mlp.fc2",
                        "ff_context.net.0.proj": "context_block.mlp.fc1",
                        "ff_context.net.2": "context_block.mlp.fc2",
                    }
                ),
            },
        ),
    },
)


def _sd3_layout(layers: int) -> Layout:
    """SD3's names; the text norm of the last block is of another kind than that of the others."""
    last = layers - 1
    swapped = Place(f"joint_blocks.{last}.context_block.adaLN_modulation.1", change=SWAPPED)
    return replace(SD3, outside={**SD3.outside, f"transformer_blocks.{last}.norm1_context.linear": swapped})


# ---------------------------------------------------------------------------------------------------------- Z-Image

_Z_IMAGE_BLOCK = {
    **_stack("attention.qkv", "attention.to_q", "attention.to_k", "attention.to_v"),
    **_rename(
        {
            "attention.norm_q": "attention.q_norm",
            "attention.norm_k": "attention.k_norm",
            "attention.to_out.0": "attention.out",
            **{name: name for name in ("adaLN_modulation.0", "attention_norm1", "attention_norm2")},
            **{name: name for name in ("ffn_norm1", "ffn_norm2")},
            **{f"feed_forward.w{i}": f"feed_forward.w{i}" for i in (1, 2, 3)},
        }
    ),
}
Z_IMAGE = Layout(
    outside=_rename(
        {
            "all_x_embedder.2-1": "x_embedder",
            "all_final_layer.2-1.linear": "final_layer.linear",
            "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
            **{name: name for name in ("x_pad_token", "cap_pad_token", "cap_embedder.0", "cap_embedder.1")},
            **{name: name for name in ("t_embedder.mlp.0", "t_embedder.mlp.2")},
        }
    ),
    blocks={name: (name, _Z_IMAGE_BLOCK) for name in ("noise_refiner", "context_refiner", "layers")},
)

# ----------------------------------------------------------------------------------------------------------- Krea 2

_KREA2_BLOCK = {
    **_scales(
        {
            "norm1": "prenorm",
            "norm2": "postnorm",
            "attn.norm_q": "attn.qknorm.qnorm",
            "attn.norm_k": "attn.qknorm.knorm",
        }
    ),
    **_rename(
        {
            "attn.to_q": "attn.wq",
            "attn.to_k": "attn.wk",
            "attn.to_v": "attn.wv",
            "attn.to_gate": "attn.gate",
            "attn.to_out.0": "attn.wo",
            "ff.gate": "mlp.gate",
            "ff.up": "mlp.up",
            "ff.down": "mlp.down",
        }
    ),
}
KREA2 = Layout(
    outside={
        **_rename(
            {
                "img_in": "first",
                "time_embed.linear_1": "tmlp.0",
                "time_embed.linear_2": "tmlp.2",
                "time_mod_proj": "tproj.1",
                "txt_in.linear_1": "txtmlp.1",
                "txt_in.linear_2": "txtmlp.3",
                "text_fusion.projector": "txtfusion.projector",
                "final_layer.linear": "last.linear",
                "final_layer.scale_shift_table": "last.modulation.lin",
            }
        ),
        **_scales({"txt_in.norm": "txtmlp.0", "final_layer.norm": "last.norm"}),
    },
    blocks={
        "transformer_blocks": ("blocks", {**_KREA2_BLOCK, "scale_shift_table": Place("mod.lin", change=FLAT)}),
        "text_fusion.layerwise_blocks": ("txtfusion.layerwise_blocks", _KREA2_BLOCK),
        "text_fusion.refiner_blocks": ("txtfusion.refiner_blocks", _KREA2_BLOCK),
    },
)

# ------------------------------------------------------------------------------------------------------------- use

LAYOUTS = {"flux": FLUX, "sd3": SD3, "z_image": Z_IMAGE, "krea2": KREA2, "qwen_image": Layout(same=True)}


def find_layout(family: str, layers: int) -> Layout:
    """The names of a family whose denoiser has `layers` blocks in its main list.

    Raises:
        KeyError: ComfyUI has no model of this family.
    """
    return _sd3_layout(layers) if family == "sd3" else LAYOUTS[family]


def convert_weights(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """A denoiser's weights, named by diffusers, under ComfyUI's keys.

    Raises:
        ValueError: ComfyUI has no place for a weight, or a part of a stacked weight is missing.
    """
    found: dict[str, dict[int, Tensor]] = {}
    sizes: dict[str, int] = {}
    for name, tensor in state.items():
        place = layout.find(name)
        if place is None:
            raise ValueError(f"expected weights that ComfyUI's model has; got {name}")
        found.setdefault(place.key, {})[place.part] = _change(tensor, place.change)
        sizes[place.key] = place.parts
    if short := [key for key, parts in found.items() if len(parts) != sizes[key]]:
        raise ValueError(f"expected all weights that are stacked in {short[0]}; got {len(found[short[0]])} of them")
    return {key: _stacked(parts) for key, parts in found.items()}


def _change(tensor: Tensor, change: str) -> Tensor:
    if change == SWAPPED:
        return torch.cat(tensor.chunk(2)[::-1])
    return tensor.flatten() if change == FLAT else tensor


def _stacked(parts: Mapping[int, Tensor]) -> Tensor:
    return torch.cat([parts[i] for i in sorted(parts)]) if len(parts) > 1 else next(iter(parts.values()))


def unknown_lora_modules(keys: Iterable[str], layout: Layout) -> list[str]:
    """The modules of a LoRA file, of keys such as `transformer.proj_out.lora_A.weight`, that ComfyUI would ignore."""
    modules = {re.sub(r"\.lora_[AB]\.weight$", "", key).removeprefix("transformer.") for key in keys}
    return sorted(module for module in modules if layout.find(f"{module}.weight") is None)
