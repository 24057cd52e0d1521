"""An editor as ComfyUI opens it: the weights, a workflow, and a file of nodes for the families that need them.

ComfyUI recognises a model by the names and shapes of its weights. In ComfyUI the number of heads, the position code and
the scale of the latents are fixed for each family. An editor with other values, such as the embedded toy, would be
opened as the wrong model, so the export refuses it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from npedit.editor import Editor
from npedit.errors import UserError
from npedit.export import comfyui_node
from npedit.export.comfyui_keys import LAYOUTS, Layout, convert_weights, find_layout, unknown_lora_modules
from npedit.export.comfyui_workflow import FAMILY_NODES, WorkflowSettings, build_workflow, format_sigmas
from npedit.export.lora_file import write_lora
from npedit.families.base import Family
from npedit.flow import few_step_times
from npedit.nets.lora import LoraAdapter
from npedit.runs.final import public_name

CHANNELS, STRIDE = 16, 8  # of the latents of every family that ComfyUI has
NODE_FILE = "npedit_comfyui.py"
# What ComfyUI 0.33.0 assumes (comfy/model_detection.py), as the settings of diffusers' models.
FIXED_SETTINGS: dict[str, dict[str, Any]] = {
    "flux": {"attention_head_dim": 128, "axes_dims_rope": (16, 56, 56), "in_channels": 64},
    "sd3": {"attention_head_dim": 64, "in_channels": 16, "patch_size": 2},
    "z_image": {"dim": 3840, "n_heads": 30, "n_refiner_layers": 2, "in_channels": 16, "axes_dims": (32, 48, 48)},
    "qwen_image": {
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "axes_dims_rope": (16, 56, 56),
        "in_channels": 64,
    },
    "krea2": {
        "attention_head_dim": 128,
        "axes_dims_rope": (32, 48, 48),
        "text_num_attention_heads": 20,
        "num_layerwise_text_blocks": 2,
        "num_refiner_text_blocks": 2,
        "in_channels": 64,
    },
}
# (scaling_factor, shift_factor) of the VAE, from comfy/latent_formats.py. Qwen-Image's VAE has a mean per channel.
LATENT_SCALES = {"flux": (0.3611, 0.1159), "z_image": (0.3611, 0.1159), "sd3": (1.5305, 0.0609)}
BASE_FILES = {  # the file that ComfyUI's users have of a published model
    "black-forest-labs/FLUX.1-dev": "flux1-dev.safetensors",
    "black-forest-labs/FLUX.1-schnell": "flux1-schnell.safetensors",
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3_medium.safetensors",
    "stabilityai/stable-diffusion-3.5-medium": "sd3.5_medium.safetensors",
    "stabilityai/stable-diffusion-3.5-large": "sd3.5_large.safetensors",
    "Tongyi-MAI/Z-Image": "z_image_bf16.safetensors",
    "Tongyi-MAI/Z-Image-Turbo": "z_image_turbo_bf16.safetensors",
    "Qwen/Qwen-Image": "qwen_image_bf16.safetensors",
    "krea/Krea-2-Raw": "krea2_raw_bf16.safetensors",
    "krea/Krea-2-Turbo": "krea2_turbo_bf16.safetensors",
}


def write_comfyui(editor: Editor, facts: Mapping[str, Any], folder: Path) -> list[str]:
    """Write the editor to an existing folder, with ComfyUI's names of folders; returns lines that say where the files
    go. `facts` are those of npedit.json. For an adapter a LoRA file is written, for another net the transformer.

    Raises:
        UserError: ComfyUI has no such model.
    """
    name = str(facts["family"])
    require_known_model(name, editor.family, editor.net)
    layout = find_layout(name, _count_layers(editor.net))
    weights = _write_weights(editor, facts, layout, folder)
    settings = workflow_settings(editor, facts, weights.name)
    workflow = build_workflow(settings)
    _write_json(folder / "workflow.json", workflow.for_browser())
    _write_json(folder / "workflow_api.json", workflow.for_api())
    (folder / "custom_nodes").mkdir()
    shutil.copyfile(comfyui_node.__file__, folder / "custom_nodes" / NODE_FILE)
    return _usage_lines(settings, weights.relative_to(folder))


def is_comfyui_folder(folder: Path) -> bool:
    """Whether this is what `write_comfyui` wrote."""
    return (folder / "workflow.json").is_file() and (folder / "custom_nodes" / NODE_FILE).is_file()


def require_known_model(name: str, family: Family, net: nn.Module) -> None:
    """Check that ComfyUI would open this net, with this family's VAE, as the right model.

    Raises:
        UserError: ComfyUI would not; the message says what differs.
    """
    if name not in LAYOUTS:
        known = ", ".join(sorted(LAYOUTS))
        raise UserError(
            f"expected an editor of a family that ComfyUI has ({known}); got {name}. Export it with --as diffusers."
        )
    config: Any = net.config
    if config.get("_references"):
        raise UserError(
            "expected a Z-Image editor whose references are separate images; this one was converted from another "
            "trainer and takes frames, which ComfyUI's model does not. Use npedit edit."
        )
    if family.isolates_references:
        raise UserError(
            "expected an editor whose references are beside the picture; this one was trained with "
            "family.isolated_references, which ComfyUI's model does not have. Export it with --as diffusers."
        )
    if different := [*_different_settings(name, config), *_different_latents(name, family)]:
        raise UserError(
            f"expected a model of the size that ComfyUI knows for {name}; got another: {', '.join(different)}. ComfyUI "
            "would open it as another model. Export it with --as diffusers."
        )


def _different_settings(name: str, config: Mapping[str, Any]) -> list[str]:
    found = [
        f"{key} {config[key]} instead of {wanted}"
        for key, wanted in FIXED_SETTINGS[name].items()
        if (tuple(config[key]) if isinstance(wanted, tuple) else config[key]) != wanted
    ]
    if name == "sd3" and config["num_layers"] != config["num_attention_heads"]:
        found.append(f"{config['num_layers']} blocks with {config['num_attention_heads']} heads")
    return found


def _different_latents(name: str, family: Family) -> list[str]:
    if (family.facts.channels, family.facts.stride) != (CHANNELS, STRIDE):
        return [f"latents of {family.facts.channels} channels and stride {family.facts.stride}"]
    if name not in LATENT_SCALES:
        return []
    vae: Any = family.pipe.vae
    scale = (vae.config.scaling_factor, vae.config.shift_factor)
    return [] if scale == LATENT_SCALES[name] else [f"a VAE with scale and shift {scale}"]


def _count_layers(net: nn.Module) -> int:
    config: Any = net.config
    return int(config.get("num_layers") or config["n_layers"])


def _write_weights(editor: Editor, facts: Mapping[str, Any], layout: Layout, folder: Path) -> Path:
    """Write the LoRA file, or the transformer under ComfyUI's keys; returns the path of the file."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"npedit-{facts.get('recipe') or facts['family']}") + ".safetensors"
    if isinstance(editor.net, LoraAdapter):
        (folder / "loras").mkdir()
        path = write_lora(editor.net, folder / "loras", facts)
        _require_known_keys(path, layout)
        return path.rename(path.with_name(name))
    (folder / "diffusion_models").mkdir()
    weights = {key: tensor.contiguous() for key, tensor in convert_weights(editor.net.state_dict(), layout).items()}
    path = folder / "diffusion_models" / name
    safetensors.torch.save_file(weights, path, {"format": "pt", "npedit_base": public_name(str(facts["base"]))})
    return path


def _require_known_keys(path: Path, layout: Layout) -> None:
    with safetensors.safe_open(path, "pt") as file:
        unknown = unknown_lora_modules(file.keys(), layout)
    if unknown:
        raise UserError(
            f"expected LoRA layers that ComfyUI knows; it would ignore {', '.join(unknown[:5])}. Export with --merge."
        )


def workflow_settings(editor: Editor, facts: Mapping[str, Any], editor_file: str) -> WorkflowSettings:
    """What the workflow needs to know of an editor; the size is the first of the editor's sizes."""
    name, base = str(facts["family"]), str(facts["base"])
    config: Any = editor.net.config
    has_guidance = bool(config.get("guidance_embeds"))
    lengths = {"flux": 512 if has_guidance else 0, "sd3": 256}
    return WorkflowSettings(
        family=name,
        base_file=BASE_FILES.get(base, f"{public_name(base).rpartition('/')[2]}.safetensors"),
        editor_file=editor_file,
        is_lora=isinstance(editor.net, LoraAdapter),
        size=editor.sizes[0],
        times=_times(editor, editor.sizes[0]),
        guidance=editor.family.facts.guidance if has_guidance else 0.0,
        t5_length=lengths.get(name, 0),
        note=_note(editor, name),
    )


def _times(editor: Editor, size: tuple[int, int]) -> list[float]:
    return few_step_times(editor.steps, editor.family.noise_shift(*size)).tolist()


def _note(editor: Editor, name: str) -> str:
    """The text of the workflow's note, in Markdown."""
    rows = [f"| {w} x {h} | {format_sigmas(_times(editor, (h, w)))} |" for h, w in editor.sizes]
    node = "npedit reference" if not FAMILY_NODES[name].method else "Set Reference Latent"
    return "\n".join(
        [
            "**A few-step image editor.** Choose a picture in *Load Image*, write the instruction, and run. The editor "
            + f"was trained with {editor.steps} steps, without a negative prompt. "
            + "Choose the files that you have in the loaders.",
            "",
            "Set width and height in *Upscale Image* to the size of the same shape as your picture, and copy its "
            "sigmas to *ManualSigmas*.",
            "",
            "| size | sigmas |",
            "| --- | --- |",
            *rows,
            "",
            f"For one more reference picture, add one more *{node}* after the first.",
        ]
    )


def _usage_lines(settings: WorkflowSettings, weights: Path) -> list[str]:
    needs_node = not FAMILY_NODES[settings.family].method
    nodes = (
        f"custom_nodes/{NODE_FILE} (needed by the workflow)" if needs_node else f"custom_nodes/{NODE_FILE} (optional)"
    )
    lines = [
        f"Copy {weights} to ComfyUI/models/{weights.parent}, and {nodes} to ComfyUI/custom_nodes.",
        "Open workflow.json in ComfyUI; workflow_api.json is the same for scripts.",
    ]
    if settings.is_lora:
        lines.insert(1, f"The LoRA belongs to the base model, {settings.base_file} in the workflow.")
    return lines


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
