"""An exported editor in diffusers makes the pictures that npedit makes, for every family, with whole nets and LoRA."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from npedit import flow
from npedit.cli.export import run_export
from npedit.editor import Editor
from npedit.export.diffusers_folder import pipeline_source
from npedit.export.export import export_editor
from npedit.families.flux import Flux
from npedit.generator import generate_few_step, seeded_noise
from tests.support.exported import SIZES, STEPS, load, noise, seeds, write_editor
from tests.support.grey_profile import grey_profile
from tests.support.hub_downloads import serve_repositories

FAMILIES = ("flux", "krea2", "qwen_image", "sana", "sd3", "z_image")
WORDS = ["paint the circle red", "make it night"]


@pytest.fixture(scope="module", params=[(f, lora) for f in FAMILIES for lora in (False, True)], ids=str)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Editor]:
    """(the pipeline as diffusers opens the export, the editor as npedit opens the run)"""
    folder = tmp_path_factory.mktemp(request.param[0])
    final = write_editor(request.param[0], folder, request.param[1])
    export_editor(str(final), folder / "out", "diffusers")
    return load(folder / "out"), Editor.open(final, device="cpu")


# ------------------------------------------------------------------------------------------------------ every family


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_pipeline_makes_the_pictures_of_the_editor(exported: tuple[Any, Editor], size: tuple[int, int]) -> None:
    pipe, editor = exported
    pictures = [noise(size, 1), noise(size, 2)]
    tensors = torch.stack([torch.from_numpy(np.array(im)).permute(2, 0, 1) / 255 for im in pictures])
    wanted = editor.edit_tensor(tensors, WORDS, [5, 6])
    given = {"image": pictures, "prompt": WORDS, "output_type": "pt"}
    found = pipe(**given, generator=seeds(5, 6), num_inference_steps=STEPS).images
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (pipe(**given, generator=seeds(7, 6)).images - wanted).abs().amax((1, 2, 3))[0] > 1e-3
    assert (wanted - editor.edit_tensor(tensors, WORDS[::-1], [5, 6])).abs().max() > 1e-5  # the text is seen


def test_the_pipeline_samples_as_training_does(exported: tuple[Any, Editor]) -> None:
    pipe, editor = exported
    family, size = editor.family, SIZES[1]
    x = torch.from_numpy(np.array(noise(size))).permute(2, 0, 1)[None] / 255
    latents, times = family.encode(x), flow.few_step_times(4, family.noise_shift(*size))
    with torch.no_grad():
        drawn = seeded_noise(latents, [9], 4)
        wanted = generate_few_step(
            family, editor.net, family.encode_text(WORDS[:1]), latents, times.tolist(), drawn
        )  # fmt: skip
    given = {"image": noise(size), "prompt": WORDS[0], "generator": seeds(9), "num_inference_steps": 4}
    found = pipe(**given, output_type="latent").images
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
    torch.testing.assert_close(pipe.scheduler.sigmas[:-1], times, atol=1e-6, rtol=0)


def test_further_references_are_seen(exported: tuple[Any, Editor]) -> None:
    pipe, editor = exported
    if editor.family.most_references < 2:
        with pytest.raises(ValueError, match="at most 0 references"):
            pipe(image=noise(SIZES[0]), prompt="x", references=[noise((40, 50))])
        return
    more = [noise((40, 50), 3)]
    (wanted,) = editor.edit(noise(SIZES[0]), WORDS[0], seed=2, references=more)
    found = pipe(image=noise(SIZES[0]), prompt=WORDS[0], references=more, generator=seeds(2)).images[0]
    assert largest_difference(found, wanted) <= 1
    alone = pipe(image=noise(SIZES[0]), prompt=WORDS[0], generator=seeds(2), output_type="pt").images
    both = pipe(image=noise(SIZES[0]), prompt=WORDS[0], generator=seeds(2), output_type="pt", references=more).images
    assert (alone - both).abs().max() > 1e-6


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    assert one.size == other.size
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_written_file_imports_nothing_of_npedit(family: str) -> None:
    tree = ast.parse(pipeline_source(family))
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    known = {"__future__", "collections", "contextlib", "functools", "inspect", "io", "math", "typing"}
    known |= {"diffusers", "PIL", "torch", "transformers"}
    assert {name.split(".")[0] for name in names} <= known


# ---------------------------------------------------------------------------------------------------------- one family


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Editor]:
    folder = tmp_path_factory.mktemp("one")
    final = write_editor("flux", folder, False)
    export_editor(str(final), folder / "out", "diffusers")
    return load(folder / "out"), Editor.open(folder / "out", device="cpu")


@pytest.mark.parametrize("size", [(32, 32), (50, 37), (64, 64), (20, 90)], ids=str)
def test_a_picture_of_any_size_comes_back_as_from_the_editor(flux: tuple[Any, Editor], size: tuple[int, int]) -> None:
    pipe, editor = flux
    (wanted,) = editor.edit(noise(size), WORDS[0], seed=3)
    found = pipe(image=noise(size), prompt=WORDS[0], generator=seeds(3)).images[0]
    assert found.size == size[::-1] and largest_difference(found, wanted) <= 1


def test_a_transparent_turned_or_grey_picture_is_read_as_by_the_editor(
    flux: tuple[Any, Editor], tmp_path: Path
) -> None:
    pipe, editor = flux
    exif = Image.Exif()
    exif[0x0112] = 6
    noise((32, 64)).save(tmp_path / "turned.png", exif=exif)
    clear = noise((64, 32)).convert("RGBA")
    clear.putalpha(noise((64, 32), 4).convert("L"))
    for kind in ("L", "RGB"):  # a profile for grey pictures holds for grey ones alone
        noise((32, 32)).convert(kind).save(tmp_path / f"{kind}.png", icc_profile=grey_profile(1.0))
    files = [Image.open(tmp_path / name) for name in ("turned.png", "L.png", "RGB.png")]
    for picture in (*files, clear, noise((32, 32)).convert("L")):
        (wanted,) = editor.edit(picture.copy(), WORDS[0], seed=3)
        assert largest_difference(pipe(image=picture, prompt=WORDS[0], generator=seeds(3)).images[0], wanted) <= 1


def test_height_and_width_are_the_size_of_the_result(flux: tuple[Any, Editor]) -> None:
    pipe, editor = flux
    found = pipe(image=noise((100, 100)), prompt="x", height=40, width=48, generator=seeds(0)).images[0]
    assert found.size == (48, 40)
    shrunk = Editor(editor.family, editor.net, STEPS, [(40, 48)])
    (wanted,) = shrunk.edit(noise((100, 100)).resize((48, 40), Image.Resampling.LANCZOS), "x", seed=0)
    assert largest_difference(found, wanted) <= 1


def test_a_batch_is_its_pictures_one_by_one(flux: tuple[Any, Editor]) -> None:
    pipe, _ = flux
    pictures = [noise(SIZES[0], i) for i in range(2)]
    both = pipe(image=pictures, prompt=WORDS, generator=seeds(1, 2), output_type="pt").images
    for i, picture in enumerate(pictures):
        alone = pipe(image=picture, prompt=WORDS[i], generator=seeds(1 + i), output_type="pt").images
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-5, rtol=0)
    assert len(pipe(image=pictures[0], prompt=WORDS).images) == len(pipe(image=pictures, prompt="x").images) == 2


def test_the_callback_sees_every_step_and_may_change_the_latents(flux: tuple[Any, Editor]) -> None:
    pipe, seen = flux[0], []

    def note(of: Any, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append((of is pipe, step, round(float(timestep), 2), tuple(tensors["latents"].shape)))
        return {"latents": tensors["latents"] * 0} if step == STEPS - 1 else {}

    found = pipe(image=noise(SIZES[0]), prompt="x", callback_on_step_end=note, output_type="latent").images
    times = 1000 * flow.few_step_times(STEPS, 3.0)
    assert seen == [(True, i, round(float(t), 2), (1, 4, 8, 8)) for i, t in enumerate(times)]
    assert not found.any()
    first = pipe(image=noise(SIZES[0]), prompt="x", return_dict=False)
    assert isinstance(first, tuple) and first[0][0].size == (32, 32)


def test_what_does_not_fit_together_is_refused(flux: tuple[Any, Editor]) -> None:
    pipe, picture = flux[0], noise(SIZES[0])
    for wrong, words in [
        ({"prompt": ["a", "b", "c"], "image": [picture] * 2}, "2 pictures and 3"),
        ({"prompt": 3}, "an instruction"),
        ({"height": 32}, "both height and width"),
        ({"height": 30, "width": 32}, "multiples of 8"),
        ({"num_inference_steps": 0}, "at least one step"),
        ({"generator": seeds(1, 2)}, "a generator for each of 1"),
        ({"references": [picture] * 16}, "at most 15"),
        ({"image": [picture, noise(SIZES[1])]}, "one working size"),
        ({"image": Image.new("F", (32, 32))}, "8 bits a channel"),
    ]:
        with pytest.raises(ValueError, match=words):
            pipe(**{"image": picture, "prompt": "x", **wrong})


def test_parts_work_in_the_order_in_which_offloading_loads_them(exported: tuple[Any, Editor]) -> None:
    """With `enable_model_cpu_offload` a part leaves the GPU when the next one of `model_cpu_offload_seq` is called."""
    pipe, called = exported[0], []
    order = [name for name in pipe.model_cpu_offload_seq.split("->") if getattr(pipe, name) is not None]
    hooks = []
    for name in order:
        module = getattr(pipe, name) if name != "vae" else pipe.vae.decoder
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: called.append(name)))
    pipe(image=noise(SIZES[0]), prompt="x")
    for hook in hooks:
        hook.remove()
    assert list(dict.fromkeys(called)) == order


def test_a_number_type_is_that_of_all_parts(tmp_path: Path) -> None:
    """Also of the parts that come from the base model; the latents stay in float32."""
    final = write_editor("flux", tmp_path, True)
    export_editor(str(final), tmp_path / "out", "diffusers")
    pipe = load(tmp_path / "out", torch.bfloat16)
    assert {m.dtype for m in pipe.components.values() if isinstance(m, torch.nn.Module)} == {torch.bfloat16}
    given = {"image": noise(SIZES[0]), "prompt": WORDS[0], "generator": seeds(3)}
    assert pipe(**given, output_type="latent").images.dtype is torch.float32
    facts = json.loads((final / "npedit.json").read_text())
    (final / "npedit.json").write_text(json.dumps({**facts, "dtype": "bfloat16"}))
    (wanted,) = Editor.open(final, device="cpu").edit(noise(SIZES[0]), WORDS[0], seed=3)
    assert largest_difference(pipe(**{**given, "generator": seeds(3)}).images[0], wanted) <= 8


@pytest.mark.parametrize("types", [{"vae_dtype": "float32"}, {"text_dtype": "float32"}], ids=str)
def test_card_and_command_open_each_part_in_its_number_type(tmp_path: Path, types: dict[str, str]) -> None:
    final = write_editor("flux", tmp_path, False)
    facts = json.loads((final / "npedit.json").read_text())
    (final / "npedit.json").write_text(json.dumps({**facts, "dtype": "bfloat16", **types}))
    printed = run_export(str(final), tmp_path / "out", form="diffusers")[-1].removeprefix("In diffusers: ")
    card = (tmp_path / "out" / "README.md").read_text().replace("USER/NAME", str(tmp_path / "out"))
    shown = card[card.index("DiffusionPipeline.from_pretrained(") :].split("generator =")[0]
    (wanted,) = Editor.open(final, device="cpu").edit(noise(SIZES[0]), WORDS[0], seed=3)
    for source in (printed, shown):
        pipe = eval(source, {"torch": torch, "DiffusionPipeline": DiffusionPipeline})
        assert pipe.transformer.dtype is torch.bfloat16
        assert pipe.vae.dtype is (torch.float32 if "vae_dtype" in types else torch.bfloat16)
        for encoder in (pipe.text_encoder, pipe.text_encoder_2):
            assert encoder.dtype is (torch.float32 if "text_dtype" in types else torch.bfloat16)
        made = pipe(image=noise(SIZES[0]), prompt=WORDS[0], generator=seeds(3)).images[0]
        assert largest_difference(made, wanted) <= 8


def test_sd3_without_t5(tmp_path: Path) -> None:
    final = write_editor("sd3", tmp_path, False)
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(tmp_path / "base" / part)
        index[part] = [None, None]
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    export_editor(str(final), tmp_path / "out", "diffusers")
    (wanted,) = Editor.open(final, device="cpu").edit(noise(SIZES[0]), WORDS[0], seed=3)
    made = load(tmp_path / "out")(image=noise(SIZES[0]), prompt=WORDS[0], generator=seeds(3)).images[0]
    assert largest_difference(made, wanted) <= 1


def test_attention_of_a_base_of_float16_is_clipped(tmp_path: Path) -> None:
    """Sana's checkpoints that were trained in float16, as in `families/sana.py`."""
    final = write_editor("sana", tmp_path, False, base_name="Sana_1600M_512px_diffusers")
    export_editor(str(final), tmp_path / "out", "diffusers")
    pipe = load(tmp_path / "out")
    block = pipe.transformer.transformer_blocks[0].attn1
    torch.nn.init.constant_(block.to_out[0].bias, 1e6)
    states = torch.zeros(1, 64, block.to_out[0].out_features)
    assert float(block(states).detach().max()) == 65504.0


def test_dynamic_shift_follows_the_size(tmp_path: Path) -> None:
    family = Flux.tiny(1)
    family.pipe.scheduler.register_to_config(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=16, max_image_seq_len=64
    )
    final = write_editor("flux", tmp_path, False)
    family.pipe.scheduler.save_pretrained(tmp_path / "base" / "scheduler")
    export_editor(str(final), tmp_path / "out", "diffusers")
    pipe = load(tmp_path / "out")
    for height, width in ((32, 32), (64, 64)):
        pipe(image=noise(SIZES[0]), prompt="x", height=height, width=width, num_inference_steps=4)
        times = flow.few_step_times(4, family.noise_shift(height, width))
        torch.testing.assert_close(pipe.scheduler.sigmas[:-1], times, atol=1e-6, rtol=0)
    assert family.noise_shift(32, 32) != family.noise_shift(64, 64)


# ---------------------------------------------------------------------------------------------------------- the toy


SCRIPT = """
import sys, torch
from diffusers import DiffusionPipeline
from PIL import Image
folder, picture, out = sys.argv[1:]
wanted = {"trust_remote_code": True, "torch_dtype": torch.float32}
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, **wanted)
generator = torch.Generator("cpu").manual_seed(7)
pipe(image=Image.open(picture), prompt="make it night", num_inference_steps=4, generator=generator).images[0].save(out)
assert not [name for name in sys.modules if name.split(".")[0] == "npedit"]
"""


def run_script(folder: str, place: Path, **environment: str) -> Image.Image:
    """The picture that the script makes in a process of its own, from `in.png` in the folder `place`."""
    names = [folder, str(place / "in.png"), str(place / "edited.png")]
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and "proxy" not in name.lower()}
    subprocess.run([sys.executable, "-c", SCRIPT, *names], cwd=place, env=known | environment, check=True)
    return Image.open(place / "edited.png")


def test_the_embedded_editor_in_a_process_without_npedit(tmp_path: Path) -> None:
    """The export names no folder of this package, and nothing imports it: same picture as `npedit edit --seed 7`."""
    export_editor("embedded", tmp_path / "out", "diffusers")
    texts = [p.read_text(encoding="utf-8") for p in (tmp_path / "out").rglob("*.json")]
    assert not any(str(Path(__file__).parents[2]) in text for text in texts)
    noise((32, 32)).save(tmp_path / "in.png")
    made = run_script(str(tmp_path / "out"), tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    for model in ("embedded", tmp_path / "out"):
        (wanted,) = Editor.open(model, device="cpu").edit(noise((32, 32)), "make it night", seed=7)
        assert largest_difference(made, wanted) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_an_editor_on_the_hub_loads_its_base_from_the_hub(tmp_path: Path, lora: bool) -> None:
    """diffusers downloads what it knows; the LoRA file and the base's parts are downloaded by `base_part.py`."""
    final = write_editor("flux", tmp_path, lora)
    export_editor(str(final), tmp_path / "out", "diffusers", base="someone/base")
    noise((32, 32)).save(tmp_path / "in.png")
    with serve_repositories({"me/mine": tmp_path / "out", "someone/base": tmp_path / "base"}) as address:
        made = run_script("me/mine", tmp_path, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="0")
    (wanted,) = Editor.open(final, device="cpu").edit(noise((32, 32)), "make it night", seed=7, steps=4)
    assert largest_difference(made, wanted) <= 1
