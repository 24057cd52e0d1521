"""An editor for ComfyUI: names of weights, the workflow, the files, the nodes. `test_in_comfyui.py` runs ComfyUI."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from npedit import flow, generator
from npedit.cli.export import run_export
from npedit.editor import Editor
from npedit.errors import UserError
from npedit.export import comfyui_node
from npedit.export.comfyui import NODE_FILE, require_known_model, workflow_settings, write_comfyui
from npedit.export.comfyui_keys import LAYOUTS, convert_weights, find_layout, unknown_lora_modules
from npedit.export.comfyui_workflow import NODE_TYPES, build_workflow
from npedit.export.lora_file import merged_transformer
from npedit.families import sd3
from npedit.nets.lora import LoraAdapter, linear_layer_names
from npedit.recipe.config import find_class
from tests.support.comfyui_editors import ALPHA, RANK, SIZE, facts, open_editor, open_family
from tests.support.parts import nudge

FAMILIES = sorted(LAYOUTS)
BOTH = ("weight", "bias")
LORA_LAYER = "lora_layers.x_embedder/lora_B.weight"


def tiny(name: str) -> Any:
    return find_class("families", name).tiny(1)


def layout_of(name: str, net: nn.Module) -> Any:
    config: Any = net.config
    return find_layout(name, config.get("num_layers") or config["n_layers"])


# -------------------------------------------------------------------------------------------------- names of weights


def flux_keys(double: int, single: int) -> Iterator[str]:
    """The keys of FLUX's first publication, as its code names the modules."""
    mlps = ("time_in", "vector_in", "guidance_in")
    for module in ("img_in", "txt_in", *(f"{m}.{part}_layer" for m in mlps for part in ("in", "out"))):
        yield from (f"{module}.{kind}" for kind in BOTH)
    for i in range(double):
        for stream in ("img", "txt"):
            for module in (f"{stream}_mod.lin", f"{stream}_attn.qkv", f"{stream}_attn.proj"):
                yield from (f"double_blocks.{i}.{module}.{kind}" for kind in BOTH)
            yield from (f"double_blocks.{i}.{stream}_mlp.{n}.{kind}" for n in (0, 2) for kind in BOTH)
            yield from (f"double_blocks.{i}.{stream}_attn.norm.{x}_norm.scale" for x in ("query", "key"))
    for i in range(single):
        for module in ("linear1", "linear2", "modulation.lin"):
            yield from (f"single_blocks.{i}.{module}.{kind}" for kind in BOTH)
        yield from (f"single_blocks.{i}.norm.{x}_norm.scale" for x in ("query", "key"))
    yield from (f"final_layer.{module}.{kind}" for module in ("linear", "adaLN_modulation.1") for kind in BOTH)


def z_image_keys(blocks: dict[str, int]) -> Iterator[str]:
    """The keys of Z-Image's first publication."""
    for module in ("x_embedder", "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2"):
        yield from (f"{module}.{kind}" for kind in BOTH)
    yield from ("x_pad_token", "cap_pad_token", "cap_embedder.0.weight")
    for part, count in blocks.items():
        for i in range(count):
            modules = ["qkv", "out", "q_norm", "k_norm"]
            yield from (f"{part}.{i}.attention.{module}.weight" for module in modules)
            yield from (f"{part}.{i}.feed_forward.w{n}.weight" for n in (1, 2, 3))
            yield from (f"{part}.{i}.{kind}_norm{n}.weight" for kind in ("attention", "ffn") for n in (1, 2))
            if part != "context_refiner":
                yield from (f"{part}.{i}.adaLN_modulation.0.{kind}" for kind in BOTH)
    yield from (f"final_layer.{module}.{kind}" for module in ("linear", "adaLN_modulation.1") for kind in BOTH)


def test_flux_gets_the_keys_of_its_first_publication() -> None:
    state = tiny("flux").base.state_dict()
    assert set(convert_weights(state, find_layout("flux", 2))) == set(flux_keys(double=2, single=1))


def test_z_image_gets_the_keys_of_its_first_publication() -> None:
    state = tiny("z_image").base.state_dict()
    wanted = set(z_image_keys({"noise_refiner": 1, "context_refiner": 1, "layers": 2}))
    assert set(convert_weights(state, find_layout("z_image", 2))) == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_has_a_place_and_no_value_is_lost(name: str) -> None:
    net = tiny(name).base
    state = {k: torch.full_like(v, i + 1) for i, (k, v) in enumerate(net.state_dict().items())}
    converted = convert_weights(state, layout_of(name, net))
    assert sum(v.numel() for v in converted.values()) == sum(v.numel() for v in state.values())
    found = {float(x) for tensor in converted.values() for x in tensor.unique()}
    assert found == {float(i + 1) for i in range(len(state))}


@pytest.mark.parametrize("name", FAMILIES)
def test_comfyui_knows_every_layer_that_gets_lora(name: str) -> None:
    net = tiny(name).base
    keys = [f"transformer.{layer}.lora_{part}.weight" for layer in linear_layer_names(net) for part in "AB"]
    assert unknown_lora_modules(keys, layout_of(name, net)) == []
    if name != "qwen_image":
        extra = [*keys, "transformer.new_layer.lora_A.weight"]
        assert unknown_lora_modules(extra, layout_of(name, net)) == ["new_layer"]


@pytest.mark.parametrize("name", ["flux", "sd3", "z_image"])
def test_a_stacked_weight_has_its_parts_in_order(name: str) -> None:
    net = tiny(name).base
    state = net.state_dict()
    layout = layout_of(name, net)
    converted = convert_weights(state, layout)
    stacked: dict[str, list[tuple[int, Tensor]]] = {}
    for key, value in state.items():
        place = layout.find(key)
        if place.parts > 1:
            stacked.setdefault(place.key, []).append((place.part, value))
    assert stacked
    for key, parts in stacked.items():
        row = 0
        for _, value in sorted(parts, key=lambda p: p[0]):
            assert torch.equal(converted[key][row : row + len(value)], value)
            row += len(value)
        assert row == len(converted[key])


def test_scale_and_shift_of_the_last_norm_change_places() -> None:
    for name in ("flux", "sd3"):
        net = tiny(name).base
        state = net.state_dict()
        converted = convert_weights(state, layout_of(name, net))
        scale, shift = state["norm_out.linear.weight"].chunk(2)
        assert torch.equal(converted["final_layer.adaLN_modulation.1.weight"], torch.cat([shift, scale]))
    last = converted["joint_blocks.2.context_block.adaLN_modulation.1.bias"]
    scale, shift = state["transformer_blocks.2.norm1_context.linear.bias"].chunk(2)
    assert torch.equal(last, torch.cat([shift, scale]))


def test_a_missing_part_and_an_unknown_weight_are_reported() -> None:
    state = tiny("flux").base.state_dict()
    with pytest.raises(ValueError, match="that ComfyUI's model has; got something.weight"):
        convert_weights({**state, "something.weight": torch.zeros(1)}, LAYOUTS["flux"])
    del state["transformer_blocks.0.attn.to_k.weight"]
    with pytest.raises(ValueError, match=r"stacked in double_blocks.0.img_attn.qkv.weight; got 2"):
        convert_weights(state, LAYOUTS["flux"])


# ------------------------------------------------------------------------------------------------------ the workflow


def workflow(name: str, lora: bool = True, guidance: bool = True) -> Any:
    if name == "z_image":  # of its real width even a small one is slow
        editor = Editor(tiny(name), tiny(name).base, 4, [SIZE])
    else:
        editor = open_editor(name, lora, guidance)
    return build_workflow(workflow_settings(editor, facts(name), "own.safetensors"))


def kinds(name: str, **settings: bool) -> dict[str, dict[str, Any]]:
    return {node["class_type"]: node["inputs"] for node in workflow(name, **settings).for_api().values()}


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_link_leads_to_an_output_of_its_type(name: str, lora: bool) -> None:
    graph = workflow(name, lora)
    api, browser = graph.for_api(), graph.for_browser()
    nodes = {node["id"]: node for node in browser["nodes"]}
    for number, source, slot, target, place, type_name in browser["links"]:
        out, into = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
        assert out["type"] == into["type"] == type_name
        assert number in out["links"]
        assert into["link"] == number
        assert api[str(target)]["inputs"][into["name"]] == [str(source), slot]
        assert source < target
    linked = [v for node in api.values() for v in node["inputs"].values() if isinstance(v, list)]
    assert len(linked) == len(browser["links"])
    for number, node in api.items():
        values = [node["inputs"][name] for name in NODE_TYPES[node["class_type"]].values]
        assert nodes[int(number)]["widgets_values"][: len(values)] == values


def test_the_sigmas_are_the_editors_times_to_the_last_bit() -> None:
    editor = open_editor("qwen_image", True)
    sigmas = kinds("qwen_image")["ManualSigmas"]["sigmas"]
    read = torch.tensor([float(part) for part in sigmas.split(",")], dtype=torch.float32)
    assert torch.equal(read[:-1], flow.few_step_times(editor.steps, editor.family.noise_shift(*SIZE)))
    assert read[-1] == 0


def test_what_each_family_needs() -> None:
    for name in ("flux", "qwen_image", "krea2"):
        found = kinds(name)
        assert found["FluxKontextMultiReferenceLatentMethod"]["reference_latents_method"] == "index"
        assert "ReferenceLatent" in found
        assert "NpeditReference" not in found
    for name in ("sd3", "z_image"):
        found = kinds(name)
        assert "NpeditReference" in found
        assert "ReferenceLatent" not in found
    assert kinds("sd3")["T5TokenizerOptions"]["min_length"] == sd3.T5_LENGTH


def test_flux_dev_gets_its_guidance_and_512_tokens_and_schnell_neither() -> None:
    found = kinds("flux", guidance=True)
    assert found["FluxGuidance"]["guidance"] == 3.5
    assert found["T5TokenizerOptions"]["min_length"] == 512
    assert not {"FluxGuidance", "T5TokenizerOptions"} & set(kinds("flux", guidance=False))


def test_the_note_has_the_sigmas_of_every_size() -> None:
    editor = open_editor("flux", True)
    editor.sizes = (SIZE, (96, 64))
    (note,) = [n for n in build_workflow(workflow_settings(editor, facts("flux"), "own")).for_browser()["nodes"]
               if n["type"] == "MarkdownNote"]  # fmt: skip
    assert "| 96 x 64 | 1.0" in note["widgets_values"][0]
    assert "| 64 x 96 | 1.0" in note["widgets_values"][0]


# --------------------------------------------------------------------------------------------------------- the files


def test_a_lora_editor_as_files(tmp_path: Path) -> None:
    editor = open_editor("flux", lora=True)
    lines = write_comfyui(editor, facts("flux"), tmp_path)
    assert "loras/npedit-a-recipe.safetensors" in lines[0]
    saved = safetensors.torch.load_file(tmp_path / "loras" / "npedit-a-recipe.safetensors")
    assert all(key.startswith("transformer.") for key in saved)
    name = "x_embedder"
    added = saved[f"transformer.{name}.lora_B.weight"] @ saved[f"transformer.{name}.lora_A.weight"]
    before = editor.family.base.get_submodule(name).base_layer.weight.clone()
    assert isinstance(editor.net, LoraAdapter)
    merged = merged_transformer(editor.net)
    torch.testing.assert_close(merged.get_submodule(name).weight, before + added)
    graph = json.loads((tmp_path / "workflow_api.json").read_text())
    (loader,) = [n["inputs"] for n in graph.values() if n["class_type"] == "LoraLoaderModelOnly"]
    assert loader["lora_name"] == "npedit-a-recipe.safetensors"
    (base,) = [n["inputs"] for n in graph.values() if n["class_type"] == "UNETLoader"]
    assert base["unet_name"] == "flux1-dev.safetensors"
    assert json.loads((tmp_path / "workflow.json").read_text())["nodes"]
    assert (tmp_path / "custom_nodes" / NODE_FILE).is_file()


def test_a_fully_fine_tuned_editor_as_files(tmp_path: Path) -> None:
    editor = open_editor("sd3", lora=False)
    write_comfyui(editor, facts("sd3", base="/somewhere/private"), tmp_path)
    path = tmp_path / "diffusion_models" / "npedit-a-recipe.safetensors"
    saved = safetensors.torch.load_file(path)
    assert torch.equal(saved["pos_embed"], editor.net.state_dict()["pos_embed.pos_embed"])
    everything = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"/somewhere" not in everything


def test_the_export_command_writes_the_files(tmp_path: Path) -> None:
    editor, base, made = open_editor("flux", lora=True), tmp_path / "base", tmp_path / "editor"
    assert isinstance(editor.net, LoraAdapter)
    open_family("flux").pipe.save_pretrained(base)
    made.mkdir()
    editor.net.save(made)
    about = {"format": 1, "steps": 4, "sizes": [list(SIZE)], **facts("flux", str(base))}
    (made / "npedit.json").write_text(json.dumps(about))
    printed = run_export(str(made), tmp_path / "out", base="black-forest-labs/FLUX.1-dev", form="comfyui")
    assert any("ComfyUI/models/loras" in line for line in printed)
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    weights = "loras/npedit-a-recipe.safetensors"
    assert names >= {weights, "workflow.json", "workflow_api.json", f"custom_nodes/{NODE_FILE}"}
    assert "flux1-dev.safetensors" in (tmp_path / "out" / "workflow_api.json").read_text()
    saved = safetensors.torch.load_file(tmp_path / "out" / weights)
    name, scale = "transformer.x_embedder.lora_B.weight", ALPHA / RANK
    torch.testing.assert_close(saved[name], editor.net.state_dict()[LORA_LAYER] * scale)


@pytest.mark.parametrize(("name", "told"), [("sana", "family that ComfyUI has"), ("flux", "attention_head_dim 16")])
def test_a_model_that_comfyui_has_not_is_refused(name: str, told: str, tmp_path: Path) -> None:
    family = tiny(name)
    editor = Editor(family, family.base, 4, [(32, 32)])
    with pytest.raises(UserError, match=told):
        write_comfyui(editor, facts(name), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_z_image_editor_that_takes_frames_is_refused() -> None:
    family = tiny("z_image")
    family.base.register_to_config(_references="frames")
    with pytest.raises(UserError, match="takes frames"):
        require_known_model("z_image", family, family.base)


def test_other_latents_are_refused() -> None:
    family = open_family("sd3")
    family.pipe.vae.register_to_config(shift_factor=0.5)
    with pytest.raises(UserError, match="scale and shift"):
        require_known_model("sd3", family, family.base)


# --------------------------------------------------------------------------------------------------------- the nodes


def test_the_file_of_nodes_imports_nothing_of_npedit() -> None:
    tree = ast.parse(Path(comfyui_node.__file__).read_text())
    found = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    found |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {name.split(".")[0] for name in found} == {
        "__future__", "collections", "contextlib", "importlib", "torch", "typing"
    }  # fmt: skip


def test_the_sampler_makes_the_editors_steps_with_the_editors_noise() -> None:
    family = tiny("flux")
    net = family.trainable_net()
    nudge(net, by=0.1)
    text, reference = family.encode_text(["make it night"]), torch.randn(1, 4, 8, 8)
    times = flow.few_step_times(4, 3.0)
    noise = generator.seeded_noise(reference, [11], 4)

    def model(x: Tensor, t: Tensor, **_: Any) -> Tensor:
        return flow.predict_x0(x, family.velocity(net, x, t, text, (reference,)), t)

    sigmas = torch.cat([times, torch.zeros(1)])
    with torch.no_grad():
        found = comfyui_node.sample_few_step(model, noise[0], sigmas, {"seed": 11})
        wanted = generator.generate_few_step(family, net, text, reference, times.tolist(), noise)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("sizes", [[(8, 8)], [(8, 4), (4, 8), (8, 8)], [(8, 8)] * 4, [(20, 4)]])
def test_the_node_places_sd3s_references_as_the_family_does(sizes: list[tuple[int, int]]) -> None:
    wanted = sd3._place_references(6, 10, sizes, 32)
    assert comfyui_node.place_references(6, 10, sizes, 32) == wanted


def test_the_node_reports_references_without_room() -> None:
    with pytest.raises(ValueError, match="fit beside the picture"):
        comfyui_node.place_references(6, 10, [(8, 8)] * 5, 32)
