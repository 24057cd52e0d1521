"""The exported workflow, run by ComfyUI's own code on a CPU, gives the editor's picture.

Skipped unless the environment variable NPEDIT_COMFYUI names a folder with ComfyUI's sources, and its requirements are
installed beside npedit. The last run: see "ComfyUI" in docs/log.md. ComfyUI validates the workflow, loads the exported
weights and samples. Not ComfyUI's are the text encoders (their sizes are fixed there, billions of weights) and, in most
tests, the VAE: encoded texts and latents are put into the graph in their place.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from npedit import flow, generator
from npedit.editor import Editor
from npedit.export import comfyui
from npedit.export.comfyui import LATENT_SCALES, NODE_FILE, write_comfyui
from npedit.export.comfyui_workflow import FAMILY_NODES
from npedit.families.base import EncodedText
from npedit.nets.lora import LoraAdapter
from tests.support.comfyui_editors import DEVIATIONS, MEANS, SIZE, facts, open_editor

log = logging.getLogger(__name__)
SOURCES = os.environ.get("NPEDIT_COMFYUI", "")
pytestmark = pytest.mark.skipif(not SOURCES, reason="needs the sources of ComfyUI in NPEDIT_COMFYUI")
FAMILIES = sorted(FAMILY_NODES)
EXTRAS = ("nodes_custom_sampler", "nodes_flux", "nodes_edit_model", "nodes_cond", "nodes_sd3")
SEED = 7
EMBEDDED_CHANNELS = 8
Outputs = dict[str, tuple[Any, ...]]


@pytest.fixture(scope="module")
def nodes() -> Any:
    """ComfyUI's module `nodes`, with the extra nodes that the workflow uses."""
    sys.path.insert(0, SOURCES)
    given, sys.argv = sys.argv, ["comfyui", "--cpu", "--force-fp32", "--fp32-vae"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # reads sys.argv
    import nodes as found

    sys.argv = given
    for name in EXTRAS:
        path = os.path.join(SOURCES, "comfy_extras", f"{name}.py")
        assert asyncio.run(found.load_custom_node(path, module_parent="comfy_extras"))
    return found


@pytest.fixture(autouse=True)
def _models_of_other_widths(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ComfyUI recognise Z-Image, Qwen-Image and the embedded editor, whose sizes differ from what it takes for
    granted."""
    import comfy.model_detection

    real = comfy.model_detection.detect_unet_config

    def detect(state: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        found = real(state, *args, **kwargs)
        if found and found.get("image_model") == "lumina2":
            width = state["layers.0.attention.out.weight"].shape[0]
            found |= {"n_heads": width // 128, "n_kv_heads": width // 128, "axes_dims": [32, 48, 48]}
            found |= {"axes_lens": [1536, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3}
            found |= {"z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32}
            found["n_refiner_layers"] = 1
        elif found and found.get("image_model") == "qwen_image":
            found["num_attention_heads"] = state["img_in.weight"].shape[0] // 128
            found["joint_attention_dim"] = state["txt_norm.weight"].shape[0]
        elif found and found.get("image_model") == "flux" and found["in_channels"] == EMBEDDED_CHANNELS:
            found |= {"axes_dim": [8, 16, 16], "num_heads": found["hidden_size"] // 40}
            found["out_channels"] = EMBEDDED_CHANNELS
        return found

    monkeypatch.setattr(comfy.model_detection, "detect_unet_config", detect)
    monkeypatch.setitem(comfyui.FIXED_SETTINGS, "z_image", {})
    monkeypatch.setitem(comfyui.FIXED_SETTINGS, "qwen_image", {})


# ------------------------------------------------------------------------------------------------- the editor's side


def encode_instruction(editor: Editor, name: str) -> EncodedText:
    """An instruction as the family encodes it; for Krea 2, whose tiny encoder has another width, random states."""
    if name == "krea2":
        stream = torch.Generator().manual_seed(5)
        return EncodedText((torch.randn(1, 9, 2, 40, generator=stream), torch.ones(1, 9, dtype=torch.bool)))
    return editor.family.encode_text(["make it night"])


def picture(seed: int = 2) -> Tensor:
    """A picture (1, 3, H, W) with 8-bit values."""
    stream = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, 3, *SIZE), generator=stream) / 255


@torch.no_grad()
def editors_latents(editor: Editor, text: EncodedText, references: list[Tensor], noise: list[Tensor]) -> Tensor:
    """The clean latents of the edited picture, as npedit computes them; the first reference is the picture."""
    times = flow.few_step_times(editor.steps, editor.family.noise_shift(*SIZE)).tolist()
    extra = torch.stack(references[1:], 1) if len(references) > 1 else None
    return generator.generate_few_step(editor.family, editor.net, text, references[0], times, noise, extra)


def noise_of_lcm(like: Tensor, steps: int) -> list[Tensor]:
    """The noise that ComfyUI draws with its sampler `lcm` on a CPU."""
    first, later = torch.Generator().manual_seed(SEED), torch.Generator().manual_seed(SEED + 1)
    return [torch.randn(like.shape, generator=first if i == 0 else later) for i in range(steps)]


# ---------------------------------------------------------------------------------------------------- ComfyUI's side


def raw_latents(name: str, x: Tensor) -> Tensor:
    """Normalised latents as ComfyUI's VAE returns them."""
    if name in LATENT_SCALES:
        scale, shift = LATENT_SCALES[name]
        return x / scale + shift
    return (x * torch.tensor(DEVIATIONS).view(1, -1, 1, 1) + torch.tensor(MEANS).view(1, -1, 1, 1)).unsqueeze(2)


def conditioning(name: str, text: EncodedText) -> list[Any]:
    """Encoded text in the form of ComfyUI's CONDITIONING."""
    first, second = text.parts
    if name in ("flux", "sd3"):
        return [[first, {"pooled_output": second}]]
    if name == "z_image":
        return [[first[:, : int(second[0])], {}]]
    kept = first[:, second[0].bool()]
    return [[kept.flatten(2) if name == "krea2" else kept, {}]]


def prepare_folders(nodes: Any, out: Path, editor: Editor, name: str) -> None:
    """Put the exported files, the base model and empty files of the other models where ComfyUI looks for them."""
    import folder_paths

    for kind in ("loras", "diffusion_models", "text_encoders", "vae", "checkpoints"):
        (out / kind).mkdir(exist_ok=True)
        folder_paths.add_model_folder_path(kind, str(out / kind), is_default=True)
        folder_paths.folder_names_and_paths[kind] = ([str(out / kind)], {".safetensors"})
    folder_paths.filename_list_cache.clear()
    folder_paths.set_input_directory(str(out))
    pixels = (picture()[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(out / "example.png")
    settings = comfyui.workflow_settings(editor, facts(name), "own")
    (out / "checkpoints" / settings.base_file).touch()
    for file in FAMILY_NODES[name].text_files:
        (out / "text_encoders" / file).touch()
    if FAMILY_NODES[name].vae:
        (out / "vae" / FAMILY_NODES[name].vae).touch()
    if isinstance(editor.net, LoraAdapter):
        own = {k.replace(".base_layer", ""): v for k, v in editor.family.base.state_dict().items() if ".lora_" not in k}
        layers = comfyui._count_layers(editor.net)
        weights = comfyui.convert_weights(own, comfyui.find_layout(name, layers))
        safetensors.torch.save_file(
            {k: v.contiguous() for k, v in weights.items()}, out / "diffusion_models" / settings.base_file
        )
    assert asyncio.run(nodes.load_custom_node(str(out / "custom_nodes" / NODE_FILE), module_parent="custom_nodes"))


def validate(graph: dict[str, Any]) -> None:
    """ComfyUI's own check of a workflow: kinds of nodes, inputs, types of links, values."""
    import execution

    valid, error, _, node_errors = asyncio.run(execution.validate_prompt("1", graph, None))
    assert valid, (error, node_errors)


def run(nodes: Any, graph: dict[str, Any], instead: dict[str, Callable[..., tuple[Any, ...]]]) -> Outputs:
    """The outputs of all nodes, each run once; kinds of nodes in `instead` are replaced."""
    done: Outputs = {}
    for number, node in graph.items():
        inputs = {k: done[v[0]][v[1]] if isinstance(v, list) else v for k, v in node["inputs"].items()}
        kind = node["class_type"]
        if kind in instead:
            done[number] = instead[kind](**inputs)
            continue
        cls = nodes.NODE_CLASS_MAPPINGS[kind]
        if hasattr(cls, "define_schema"):
            done[number] = tuple(cls.execute(**inputs).result)
        else:
            done[number] = getattr(cls(), cls.FUNCTION)(**inputs)
    return done


def replaced_nodes(nodes: Any, name: str, text: EncodedText, latent: Tensor) -> dict[str, Any]:
    """What stands in the place of text encoders and VAE. Of SD3's checkpoint the denoiser alone is opened."""
    nothing = dict.fromkeys(
        ("CLIPLoader", "DualCLIPLoader", "TripleCLIPLoader", "T5TokenizerOptions", "VAELoader", "LoadImage"),
        lambda **_: (None, None),
    )
    return {
        **nothing,
        "CheckpointLoaderSimple": lambda ckpt_name: (
            nodes.UNETLoader().load_unet(ckpt_name, "default")[0] if _is_there(ckpt_name) else None, None, None,
        ),
        "ImageScale": lambda **_: (None,),
        "VAEEncode": lambda **_: ({"samples": raw_latents(name, latent)},),
        "CLIPTextEncode": lambda **_: (conditioning(name, text),),
        "VAEDecode": lambda **_: (None,),
        "SaveImage": lambda **_: (),
    }  # fmt: skip


def _is_there(file: str) -> bool:
    import folder_paths

    return folder_paths.get_full_path("diffusion_models", file) is not None


def exported_graph(nodes: Any, editor: Editor, name: str, out: Path) -> dict[str, Any]:
    write_comfyui(editor, facts(name), out)
    prepare_folders(nodes, out, editor, name)
    graph: dict[str, Any] = json.loads((out / "workflow_api.json").read_text())
    validate(graph)
    return graph


def sampled(graph: dict[str, Any], done: Outputs) -> Tensor:
    (number,) = [n for n, node in graph.items() if node["class_type"] == "SamplerCustomAdvanced"]
    found: Tensor = done[number][0]["samples"]
    return found


def use_sampler_of_npedit(graph: dict[str, Any]) -> None:
    (node,) = [node for node in graph.values() if node["class_type"] == "KSamplerSelect"]
    node.update(class_type="NpeditSampler", inputs={})


def set_seed(graph: dict[str, Any]) -> None:
    (node,) = [node for node in graph.values() if node["class_type"] == "RandomNoise"]
    node["inputs"]["noise_seed"] = SEED


def add_second_reference(graph: dict[str, Any], name: str) -> None:
    """Chain one more node for a second reference; it gets the latents of the first VAEEncode, see the caller."""
    kind = "ReferenceLatent" if FAMILY_NODES[name].method else "NpeditReference"
    (number,) = [n for n, node in graph.items() if node["class_type"] == kind]
    users = [(node, k) for node in graph.values() for k, v in node["inputs"].items() if v == [number, 0]]
    chained = "conditioning" if FAMILY_NODES[name].method else "model"
    second = {"class_type": kind, "inputs": {chained: [number, 0], "latent": ["900", 0]}}
    for node, key in users:
        node["inputs"][key] = ["901", 0]
    order = list(graph.items())
    place = [n for n, _ in order].index(number) + 1
    order[place:place] = [("900", {"class_type": "SecondLatent", "inputs": {}}), ("901", second)]
    graph.clear()
    graph.update(order)


# ------------------------------------------------------------------------------------------------------------- tests


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """Equal up to the rounding of float32 through four steps; logs the difference (--log-cli-level=INFO)."""
    log.info("largest difference %.1e of %.2f", (ours - theirs).abs().max(), ours.abs().max())
    torch.testing.assert_close(theirs, ours, atol=4e-5, rtol=1e-5)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_comfyui_gives_the_editors_latents(nodes: Any, name: str, lora: bool, tmp_path: Path) -> None:
    editor = open_editor(name, lora)
    text, latent = encode_instruction(editor, name), editor.family.encode(picture())
    graph = exported_graph(nodes, editor, name, tmp_path)
    set_seed(graph)
    done = run(nodes, graph, replaced_nodes(nodes, name, text, latent))
    ours = editors_latents(editor, text, [latent], noise_of_lcm(latent, editor.steps))
    assert_near(raw_latents(name, ours), sampled(graph, done))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sampler_of_npedit_draws_the_editors_noise(nodes: Any, name: str, tmp_path: Path) -> None:
    editor = open_editor(name, True)
    text, latent = encode_instruction(editor, name), editor.family.encode(picture())
    graph = exported_graph(nodes, editor, name, tmp_path)
    set_seed(graph)
    use_sampler_of_npedit(graph)
    done = run(nodes, graph, replaced_nodes(nodes, name, text, latent))
    ours = editors_latents(editor, text, [latent], generator.seeded_noise(latent, [SEED], editor.steps))
    assert_near(raw_latents(name, ours), sampled(graph, done))


@pytest.mark.parametrize("name", FAMILIES)
def test_two_references(nodes: Any, name: str, tmp_path: Path) -> None:
    editor = open_editor(name, True)
    text, latent = encode_instruction(editor, name), editor.family.encode(picture())
    second = editor.family.encode(picture(seed=3))
    graph = exported_graph(nodes, editor, name, tmp_path)
    set_seed(graph)
    add_second_reference(graph, name)
    instead = replaced_nodes(nodes, name, text, latent)
    instead["SecondLatent"] = lambda: ({"samples": raw_latents(name, second)},)
    done = run(nodes, graph, instead)
    ours = editors_latents(editor, text, [latent, second], noise_of_lcm(latent, editor.steps))
    assert_near(raw_latents(name, ours), sampled(graph, done))


def test_pictures_with_fluxs_real_vae(nodes: Any, tmp_path: Path) -> None:
    """From the file of the picture to the edited pixels, with a VAE of FLUX's real size and random weights."""
    editor = open_editor("flux", True)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, shift_factor=0.1159,
        scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
    editor.family.pipe.vae = vae
    text = encode_instruction(editor, "flux")
    graph = exported_graph(nodes, editor, "flux", tmp_path)
    safetensors.torch.save_file(vae.state_dict(), tmp_path / "vae" / FAMILY_NODES["flux"].vae)
    set_seed(graph)
    use_sampler_of_npedit(graph)
    instead = replaced_nodes(nodes, "flux", text, torch.zeros(1))
    for kind in ("VAELoader", "LoadImage", "ImageScale", "VAEEncode", "VAEDecode"):
        del instead[kind]
    done = run(nodes, graph, instead)
    (number,) = [n for n, node in graph.items() if node["class_type"] == "VAEDecode"]
    ours = generator.edit_images(editor.family, editor.net, picture(), ["make it night"], SEED)
    assert_near(ours, done[number][0].permute(0, 3, 1, 2))


def test_the_embedded_editor(nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trained toy editor, whose sizes ComfyUI does not know: its denoiser and its steps run in ComfyUI, its text
    encoders and VAE here. The picture equals that of `Editor.edit`."""
    monkeypatch.setitem(comfyui.FIXED_SETTINGS, "flux", {})
    monkeypatch.setattr(comfyui, "_different_latents", lambda *_: [])
    editor = Editor.open("embedded", "cpu")
    scene = torch.rand(1, 3, *editor.sizes[0], generator=torch.Generator().manual_seed(4))
    instruction = "paint the circle red"
    text, latent = editor.family.encode_text([instruction]), editor.family.encode(scene)
    graph = exported_graph(nodes, editor, "flux", tmp_path)
    set_seed(graph)
    use_sampler_of_npedit(graph)
    found = sampled(graph, run(nodes, graph, replaced_nodes(nodes, "flux", text, latent)))
    scale, shift = LATENT_SCALES["flux"]
    shown = editor.family.decode((found - shift) * scale).clamp(0, 1)
    assert_near(editor.edit_tensor(scene, [instruction], SEED), shown)
