"""An editor with isolated references: npedit, the exported pipeline and the sampler of training make one picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from npedit import flow
from npedit.editor import Editor
from npedit.errors import UserError
from npedit.export.comfyui import require_known_model
from npedit.export.export import export_editor
from npedit.generator import generate_few_step, seeded_noise
from tests.support.exported import SIZES, STEPS, load, noise, seeds, write_editor
from tests.support.family_checks import record_calls

WORDS = ["paint the circle red", "make it night, and leave all else as it is"]
KINDS = ("flux", "krea2", "qwen_image", "z_image")


@pytest.fixture(scope="module", params=[(f, lora) for f in KINDS for lora in (False, True)], ids=str)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Editor, Path]:
    """(the pipeline as diffusers opens the export, the editor as npedit opens the run, the editor's folder)"""
    folder = tmp_path_factory.mktemp(request.param[0])
    final = write_editor(request.param[0], folder, request.param[1], isolated=True)
    export_editor(str(final), folder / "out", "diffusers")
    return load(folder / "out"), Editor.open(final, device="cpu"), final


def test_editor_pipeline_and_training_make_the_same_pictures(exported: tuple[Any, Editor, Path]) -> None:
    pipe, editor, _ = exported
    family, pictures = editor.family, [noise(SIZES[1], 1), noise(SIZES[1], 2)]
    tensors = torch.stack([torch.from_numpy(np.array(im)).permute(2, 0, 1) / 255 for im in pictures])
    wanted = editor.edit_tensor(tensors, WORDS, [5, 6])
    calls, found = record_calls(
        pipe.transformer,
        lambda: pipe(image=pictures, prompt=WORDS, output_type="pt", generator=seeds(5, 6)).images,
    )
    assert len(calls) == 1 + STEPS  # one pass over the references
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    latents, times = family.encode(tensors), flow.few_step_times(STEPS, family.noise_shift(*SIZES[1])).tolist()
    given = (family.encode_text(WORDS), latents, times, seeded_noise(latents, [5, 6], STEPS))
    with torch.no_grad():
        trained = family.decode(generate_few_step(family, editor.net, *given)).clamp(0, 1)
        family.isolates_references = False
        joint = family.decode(generate_few_step(family, editor.net, *given)).clamp(0, 1)
        family.isolates_references = True
    torch.testing.assert_close(trained, wanted, atol=1e-5, rtol=0)
    assert (joint - wanted).abs().max() > 1e-3


def test_further_references_are_seen(exported: tuple[Any, Editor, Path]) -> None:
    pipe, editor, _ = exported
    more = [noise((40, 50), 3)]
    (wanted,) = editor.edit(noise(SIZES[0]), WORDS[0], seed=2, references=more)
    found = pipe(image=noise(SIZES[0]), prompt=WORDS[0], references=more, generator=seeds(2)).images[0]
    assert np.abs(np.asarray(found, int) - np.asarray(wanted, int)).max() <= 1
    given = {"image": noise(SIZES[0]), "prompt": WORDS[0], "output_type": "pt"}
    alone = pipe(**given, generator=seeds(2)).images
    assert (alone - pipe(**given, generator=seeds(2), references=more).images).abs().max() > 1e-6


def test_a_batch_is_its_pictures_one_by_one(exported: tuple[Any, Editor, Path]) -> None:
    """Also where captions of different lengths make a mask."""
    editor = exported[1]
    pictures = torch.rand(3, 3, *SIZES[0], generator=torch.Generator().manual_seed(4))
    texts = ["x", WORDS[1] + " and every leaf of the tree", WORDS[0]]
    together = editor.edit_tensor(pictures, texts, [1, 2, 3])
    for i in range(3):
        alone = editor.edit_tensor(pictures[i : i + 1], texts[i : i + 1], [i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


def test_the_facts_decide(exported: tuple[Any, Editor, Path], tmp_path: Path) -> None:
    """The same weights without the setting are another editor; the base model follows the setting too."""
    _, editor, final = exported
    assert editor.family.isolates_references and Editor.open_untrained(final, "cpu").family.isolates_references
    assert json.loads((final.parents[1] / "out" / "npedit.json").read_text())["isolated_references"] is True
    with pytest.raises(UserError, match=r"isolated_references, which ComfyUI's model does not have"):
        require_known_model(json.loads((final / "npedit.json").read_text())["family"], editor.family, editor.net)


@pytest.mark.parametrize("kind", ["sd3", "sana"])
def test_an_editor_of_another_family_cannot_say_so(kind: str, tmp_path: Path) -> None:
    final = write_editor(kind, tmp_path, False, isolated=True)
    with pytest.raises(UserError, match=r"family\.isolated_references: expected false"):
        Editor.open(final, device="cpu")
