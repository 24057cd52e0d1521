"""ComfyUI's workflow of a few-step editor, in the form of the editor in the browser and in that of the API.

The steps are those of training: at each time t of the schedule the model predicts x0, and the next input is
x = (1 - t) x0 + t eps with fresh noise. ComfyUI's sampler `lcm` does this on a flow model: its `noise_scaling`
(`CONST` in `comfy/model_sampling.py`) is this mixture. The times stand in the node ManualSigmas. There is no
classifier-free guidance, so the node is BasicGuider. The picture's own latents set the size of the result; at the first
time, which is 1, their share is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NODE_WIDTH, COLUMN, ROW = 330, 390, 230  # in the pixels of ComfyUI's canvas


@dataclass(frozen=True)
class Output:
    """One output of a node."""

    node: int
    slot: int = 0


@dataclass(frozen=True)
class NodeType:
    """A kind of node: the types of the inputs that are linked, the names of the values, the types of the outputs."""

    links: Mapping[str, str] = field(default_factory=dict)
    values: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    browser_values: tuple[Any, ...] = ()  # values after these that exist in the browser only


LATENT, MODEL, IMAGE, CLIP, VAE, TEXT = "LATENT", "MODEL", "IMAGE", "CLIP", "VAE", "CONDITIONING"
SAMPLING = {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": LATENT}
NODE_TYPES = {
    "CheckpointLoaderSimple": NodeType(values=("ckpt_name",), outputs=(MODEL, CLIP, VAE)),
    "UNETLoader": NodeType(values=("unet_name", "weight_dtype"), outputs=(MODEL,)),
    "LoraLoaderModelOnly": NodeType({"model": MODEL}, ("lora_name", "strength_model"), (MODEL,)),
    "CLIPLoader": NodeType(values=("clip_name", "type", "device"), outputs=(CLIP,)),
    "DualCLIPLoader": NodeType(values=("clip_name1", "clip_name2", "type", "device"), outputs=(CLIP,)),
    "TripleCLIPLoader": NodeType(values=("clip_name1", "clip_name2", "clip_name3"), outputs=(CLIP,)),
    "T5TokenizerOptions": NodeType({"clip": CLIP}, ("min_padding", "min_length"), (CLIP,)),
    "VAELoader": NodeType(values=("vae_name",), outputs=(VAE,)),
    "LoadImage": NodeType(values=("image",), outputs=(IMAGE, "MASK"), browser_values=("image",)),
    "ImageScale": NodeType({"image": IMAGE}, ("upscale_method", "width", "height", "crop"), (IMAGE,)),
    "VAEEncode": NodeType({"pixels": IMAGE, "vae": VAE}, outputs=(LATENT,)),
    "CLIPTextEncode": NodeType({"clip": CLIP}, ("text",), (TEXT,)),
    "FluxGuidance": NodeType({"conditioning": TEXT}, ("guidance",), (TEXT,)),
    "ReferenceLatent": NodeType({"conditioning": TEXT, "latent": LATENT}, outputs=(TEXT,)),
    "FluxKontextMultiReferenceLatentMethod": NodeType(
        {"conditioning": TEXT}, ("reference_latents_method",), (TEXT,)
    ),
    "NpeditReference": NodeType({"model": MODEL, "latent": LATENT}, outputs=(MODEL,)),
    "NpeditSampler": NodeType(outputs=("SAMPLER",)),
    "BasicGuider": NodeType({"model": MODEL, "conditioning": TEXT}, outputs=("GUIDER",)),
    "KSamplerSelect": NodeType(values=("sampler_name",), outputs=("SAMPLER",)),
    "ManualSigmas": NodeType(values=("sigmas",), outputs=("SIGMAS",)),
    "RandomNoise": NodeType(values=("noise_seed",), outputs=("NOISE",), browser_values=("fixed",)),
    "SamplerCustomAdvanced": NodeType(SAMPLING, outputs=(LATENT, LATENT)),
    "VAEDecode": NodeType({"samples": LATENT, "vae": VAE}, outputs=(IMAGE,)),
    "SaveImage": NodeType({"images": IMAGE}, ("filename_prefix",)),
}  # fmt: skip


class Workflow:
    """A graph of nodes. `add` puts a node into it; `for_api` and `for_browser` write it in ComfyUI's two forms."""

    def __init__(self, note: str = "") -> None:
        self.note = note
        self.nodes: list[tuple[str, dict[str, Any]]] = []

    def add(self, kind: str, **inputs: Any) -> Output:
        """The first output of a new node; `inputs` are outputs of earlier nodes, and values.

        Raises:
            ValueError: other inputs than this kind of node has.
        """
        known = {*NODE_TYPES[kind].links, *NODE_TYPES[kind].values}
        if set(inputs) != known:
            raise ValueError(f"expected the inputs {sorted(known)} of {kind}; got {sorted(inputs)}")
        self.nodes.append((kind, inputs))
        return Output(len(self.nodes))

    def for_api(self) -> dict[str, Any]:
        """The form that ComfyUI's server takes at /prompt, as "prompt"."""
        return {
            str(number): {
                "class_type": kind,
                "inputs": {k: [str(v.node), v.slot] if isinstance(v, Output) else v for k, v in inputs.items()},
            }
            for number, (kind, inputs) in enumerate(self.nodes, 1)
        }

    def for_browser(self) -> dict[str, Any]:
        """The form that ComfyUI opens in the browser."""
        links = self._links()
        places = self._places()
        nodes = [self._browser_node(number, links, places[number]) for number in range(1, len(self.nodes) + 1)]
        if self.note:
            nodes.append(_note_node(len(nodes) + 1, self.note))
        return {
            "last_node_id": len(nodes),
            "last_link_id": len(links),
            "nodes": nodes,
            "links": links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def _links(self) -> list[list[Any]]:
        """[number of the link, from node, from output, to node, to input, type] of every link."""
        links: list[list[Any]] = []
        for number, (kind, inputs) in enumerate(self.nodes, 1):
            for slot, (name, type_name) in enumerate(NODE_TYPES[kind].links.items()):
                source = inputs[name]
                links.append([len(links) + 1, source.node, source.slot, number, slot, type_name])
        return links

    def _places(self) -> dict[int, tuple[int, int]]:
        """The position of each node: a column right of all nodes that it depends on."""
        depths: dict[int, int] = {}
        for number, (_, inputs) in enumerate(self.nodes, 1):
            sources = [v.node for v in inputs.values() if isinstance(v, Output)]
            depths[number] = 1 + max((depths[s] for s in sources), default=-1)
        rows: dict[int, int] = {}
        places = {}
        for number, depth in depths.items():
            places[number] = (depth * COLUMN, rows.get(depth, 0) * ROW)
            rows[depth] = rows.get(depth, 0) + 1
        return places

    def _browser_node(self, number: int, links: Sequence[Sequence[Any]], place: tuple[int, int]) -> dict[str, Any]:
        kind, inputs = self.nodes[number - 1]
        node_type = NODE_TYPES[kind]
        into = {link[4]: link[0] for link in links if link[3] == number}
        out = [[link[0] for link in links if (link[1], link[2]) == (number, i)] for i in range(len(node_type.outputs))]
        return {
            "id": number,
            "type": kind,
            "pos": list(place),
            "size": [NODE_WIDTH, 60 + 26 * (len(inputs) + len(out))],
            "flags": {},
            "order": number - 1,
            "mode": 0,
            "inputs": [
                {"name": name, "type": type_name, "link": into[slot]}
                for slot, (name, type_name) in enumerate(node_type.links.items())
            ],
            "outputs": [
                {"name": type_name, "type": type_name, "links": found, "slot_index": slot}
                for slot, (type_name, found) in enumerate(zip(node_type.outputs, out))
            ],
            "properties": {"Node name for S&R": kind},
            "widgets_values": [*(inputs[name] for name in node_type.values), *node_type.browser_values],
        }


def _note_node(number: int, text: str) -> dict[str, Any]:
    return {
        "id": number, "type": "MarkdownNote", "pos": [0, -420], "size": [2 * NODE_WIDTH, 360], "flags": {},
        "order": number - 1, "mode": 0, "inputs": [], "outputs": [], "properties": {}, "widgets_values": [text],
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------- the workflow


@dataclass(frozen=True)
class FamilyNodes:
    """What a family needs in ComfyUI. The names are those of the files that ComfyUI's own workflows use.

    `text_files` are in `models/text_encoders`, `vae` in `models/vae`; "" where the base model's checkpoint holds it.
    `method` is how ComfyUI places references; "" where the node "npedit reference" is needed.
    """

    text_files: tuple[str, ...]
    text_type: str
    vae: str
    method: str = ""


T5_FILE, CLIP_L_FILE, CLIP_G_FILE = "t5xxl_fp16.safetensors", "clip_l.safetensors", "clip_g.safetensors"
FAMILY_NODES = {
    "flux": FamilyNodes((CLIP_L_FILE, T5_FILE), "flux", "ae.safetensors", "index"),
    "sd3": FamilyNodes((CLIP_L_FILE, CLIP_G_FILE, T5_FILE), "sd3", ""),
    "z_image": FamilyNodes(("qwen_3_4b.safetensors",), "lumina2", "ae.safetensors"),
    "qwen_image": FamilyNodes(("qwen_2.5_vl_7b.safetensors",), "qwen_image", "qwen_image_vae.safetensors", "index"),
    "krea2": FamilyNodes(("qwen3vl_4b_bf16.safetensors",), "krea2", "qwen_image_vae.safetensors", "index"),
}


@dataclass(frozen=True)
class WorkflowSettings:
    """`base_file` is the base model's file in ComfyUI, `editor_file` the editor's; `size` is (H, W) in pixels; `times`
    are the few-step times from 1 down, without the 0 at the end. `guidance` is the scale that FLUX.1-dev takes as an
    input, and `t5_length` is the length that texts are padded to for T5; 0 for none."""

    family: str
    base_file: str
    editor_file: str
    is_lora: bool
    size: tuple[int, int]
    times: Sequence[float]
    guidance: float = 0.0
    t5_length: int = 0
    note: str = ""
    instruction: str = "make it night"


def build_workflow(settings: WorkflowSettings) -> Workflow:
    """The workflow that loads the models, encodes a picture as the reference, and edits it."""
    workflow = Workflow(settings.note)
    model, text, vae = _add_models(workflow, settings)
    picture = workflow.add("LoadImage", image="example.png")
    height, width = settings.size
    scaled = workflow.add(
        "ImageScale", image=picture, upscale_method="lanczos", width=width, height=height, crop="disabled"
    )
    latent = workflow.add("VAEEncode", pixels=scaled, vae=vae)
    model, text = _add_reference(workflow, settings, model, text, latent)
    sampled = workflow.add(
        "SamplerCustomAdvanced",
        noise=workflow.add("RandomNoise", noise_seed=0),
        guider=workflow.add("BasicGuider", model=model, conditioning=text),
        sampler=workflow.add("KSamplerSelect", sampler_name="lcm"),
        sigmas=workflow.add("ManualSigmas", sigmas=format_sigmas(settings.times)),
        latent_image=latent,
    )
    edited = workflow.add("VAEDecode", samples=sampled, vae=vae)
    workflow.add("SaveImage", images=edited, filename_prefix="npedit")
    return workflow


def _add_models(workflow: Workflow, settings: WorkflowSettings) -> tuple[Output, Output, Output]:
    """(the editor's denoiser, the encoded instruction, the VAE)."""
    needs = FAMILY_NODES[settings.family]
    checkpoint = None
    if not needs.vae:
        checkpoint = workflow.add("CheckpointLoaderSimple", ckpt_name=settings.base_file)
    if settings.is_lora:
        base = checkpoint or workflow.add("UNETLoader", unet_name=settings.base_file, weight_dtype="default")
        model = workflow.add("LoraLoaderModelOnly", model=base, lora_name=settings.editor_file, strength_model=1.0)
    else:
        model = workflow.add("UNETLoader", unet_name=settings.editor_file, weight_dtype="default")
    clip = _add_text_encoder(workflow, needs)
    if settings.t5_length:
        clip = workflow.add("T5TokenizerOptions", clip=clip, min_padding=0, min_length=settings.t5_length)
    text = workflow.add("CLIPTextEncode", clip=clip, text=settings.instruction)
    if settings.guidance:
        text = workflow.add("FluxGuidance", conditioning=text, guidance=settings.guidance)
    vae = Output(checkpoint.node, 2) if checkpoint else workflow.add("VAELoader", vae_name=needs.vae)
    return model, text, vae


def _add_text_encoder(workflow: Workflow, needs: FamilyNodes) -> Output:
    names = needs.text_files
    if len(names) == 3:
        return workflow.add("TripleCLIPLoader", clip_name1=names[0], clip_name2=names[1], clip_name3=names[2])
    if len(names) == 2:
        return workflow.add(
            "DualCLIPLoader", clip_name1=names[0], clip_name2=names[1], type=needs.text_type, device="default"
        )
    return workflow.add("CLIPLoader", clip_name=names[0], type=needs.text_type, device="default")


def _add_reference(
    workflow: Workflow, settings: WorkflowSettings, model: Output, text: Output, latent: Output
) -> tuple[Output, Output]:
    """The denoiser and the instruction, one of which knows the reference."""
    method = FAMILY_NODES[settings.family].method
    if not method:
        return workflow.add("NpeditReference", model=model, latent=latent), text
    text = workflow.add("ReferenceLatent", conditioning=text, latent=latent)
    return model, workflow.add(
        "FluxKontextMultiReferenceLatentMethod", conditioning=text, reference_latents_method=method
    )


def format_sigmas(times: Sequence[float]) -> str:
    """The times as the node ManualSigmas reads them, with the 0 at the end; float32 values come back unchanged."""
    return ", ".join([*(f"{time:.12f}" for time in times), "0"])
