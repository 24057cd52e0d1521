"""One string names an editor everywhere: a run, a checkpoint of it, its final folder, or the embedded one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from npedit.cli.export import run_export
from npedit.editor import Editor
from npedit.errors import UserError
from npedit.families.flux import Flux
from npedit.recipe.config import make_recipe
from npedit.runs.editor_weights import load_ema_weights
from npedit.runs.resolve import resolve_editor
from npedit.steps.base import Parts
from npedit.training import trainer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    Flux.tiny(0).pipe.save_pretrained(folder)
    return folder


def recipe(base: Path, lr: float = 0.01, **changes):
    stage = {"step": "reference_copy", "updates": 2, "batch_size": 2, "settings": {"steps": 2, "student": {"lr": lr}}}
    given = {"name": "small", "family": {"name": "flux", "weights": str(base)}, "data": {"name": "toy"}}
    looks = {"save_every": 1, "sample_items": 1, "steps": 2, "sample_every": 0, "evaluate_every": 0}
    return make_recipe({**given, "stages": [stage], "trainer": looks} | changes)


def train(made, run: Path) -> Path:
    return trainer.train(made, run, parts=lambda r: Parts(Flux.tiny(0), None, "plain", torch.device("cpu"), r.lora))


@pytest.fixture(scope="module", params=[None, {"rank": 2, "alpha": 3.0}], ids=["full", "lora"])
def run(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(recipe(base, lora=request.param), tmp_path_factory.mktemp("runs") / "r")


def test_the_last_checkpoint_opens_as_the_final_folder_does(run: Path) -> None:
    """Both hold the EMA weights, so their edits are the same; those of an earlier checkpoint are not."""
    x, words = torch.rand(1, 3, 32, 32, generator=torch.manual_seed(0)), ["make it night"]
    edited = {name: Editor.open(run / name, device="cpu").edit_tensor(x, words) for name in
              ("", "final", "checkpoint-000002", "checkpoint-2", "checkpoint-1")}  # fmt: skip
    for name in ("final", "checkpoint-000002", "checkpoint-2"):
        assert torch.allclose(edited[""], edited[name], rtol=0, atol=1e-5), name  # the same but for rounding
    assert not torch.allclose(edited[""], edited["checkpoint-1"], rtol=0, atol=1e-3)


def test_a_stopped_run_is_its_latest_checkpoint(run: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    for name in ("config.resolved.yaml", "checkpoint-000001", "checkpoint-000002"):
        (stopped / name).symlink_to(run / name)
    source = resolve_editor(stopped)
    assert source.is_checkpoint and source.run == stopped and source.folder == stopped / "checkpoint-000002"
    assert "EMA weights after update 2" in str(source)
    editor = Editor.open(stopped, device="cpu")
    assert editor.steps == 2 and editor.sizes == ((32, 32),)
    assert editor.edit(Image.new("RGB", (40, 40)), "make it night")[0].size == (40, 40)


def test_a_recipe_starts_from_a_checkpoint_and_from_an_export(run: Path, base: Path, tmp_path: Path) -> None:
    lora = {"rank": 2, "alpha": 3.0} if (run / "final" / "pytorch_lora_weights.safetensors").is_file() else None
    exported = tmp_path / "exported"
    exported.symlink_to(run / "final")
    for start in (run / "checkpoint-1", run / "final", exported):
        made = recipe(base, lr=1e-12, lora=lora, start=str(start))  # it stays where it starts
        second = train(made, tmp_path / f"from-{start.name}")
        first = run / "checkpoint-000001" if start.name == "checkpoint-1" else run / "checkpoint-000002"
        nets = []
        for folder in (first, second / "checkpoint-000002"):
            parts = Parts(Flux.tiny(0), None, "plain", torch.device("cpu"), made.lora)
            nets.append(parts.create_trainable("student", 0))
            load_ema_weights(folder, nets[-1])
        pairs = zip(nets[0].parameters(), nets[1].parameters(), strict=True)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in pairs)


def test_what_is_no_editor_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Complete ones .*: checkpoint-1, checkpoint-2"):
        resolve_editor(run / "checkpoint-7")
    (tmp_path / "config.resolved.yaml").write_text("name: x\n")
    with pytest.raises(UserError, match="neither final/ nor a complete checkpoint"):
        resolve_editor(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        resolve_editor(tmp_path / "nowhere")
    assert resolve_editor("embedded").run is None


def test_a_checkpoint_of_another_net_and_weights_that_are_not_finite_are_refused(run: Path, tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="checkpoint of another model"):
        load_ema_weights(run / "checkpoint-000002", net)


def test_an_exported_checkpoint_is_an_editor_like_the_final_folder(run: Path, tmp_path: Path) -> None:
    lines = run_export(str(run / "checkpoint-1"), tmp_path / "mine")
    assert "EMA weights after update 1" in lines[0]
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {p.name for p in (run / "final").iterdir()}
    x = torch.rand(1, 3, 32, 32, generator=torch.manual_seed(0))
    one, other = (
        Editor.open(p, device="cpu").edit_tensor(x, ["make it night"])
        for p in (tmp_path / "mine", run / "checkpoint-1")
    )
    assert torch.allclose(one, other, rtol=0, atol=1e-5)
