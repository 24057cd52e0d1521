"""Model cards: what the Hub reads, and only statements that a file supports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from npedit.benchmarks._headlines import ScoreScale, summarise_score
from npedit.benchmarks._outputs import hash_editor
from npedit.cli.own import PictureSource
from npedit.errors import UserError
from npedit.export.base_licences import LICENCES
from npedit.export.card import CardFacts, model_card, set_repository, write_card
from npedit.export.measured_scores import MeasuredScore, last_evaluation, read_scores
from npedit.nets.lora import WEIGHTS_FILE as LORA_FILE
from npedit.recipe.config import Recipe, make_recipe
from npedit.runs.resolve import resolve_editor
from npedit.toy.edits import EDIT_TYPES

SCORES = {"n": 90, "applied": {"value": 0.5, "ci95": [0.4, 0.6]}, "preserved": {"value": 0.7, "ci95": [0.6, 0.8]},
          "both": {"value": 0.4, "ci95": [0.3, 0.5]}}  # fmt: skip


def editor(**changes: Any) -> dict[str, Any]:
    facts = {"format": 1, "family": "flux", "base": "black-forest-labs/FLUX.1-dev", "steps": 4, "sizes": [[512, 768]]}
    return facts | changes


def recipe(data: dict[str, Any] | None = None, step: str = "reference_copy", **changes: Any) -> Recipe:
    stage = {"step": step, "updates": 3, "batch_size": 2, "settings": {"steps": 4, "student": {"lr": 1e-3}}}
    made = {"name": "mine", "family": {"name": "flux"}, "data": data or {"name": "toy"}, "stages": [stage]}
    return make_recipe(made | changes)


def card(folder: Path, made: Recipe | None = None, without_pairs: bool | None = None, **changes: Any) -> ModelCard:
    """The card of a folder that npedit opens."""
    (folder / "npedit.json").touch()
    return ModelCard(write_card(CardFacts(folder, editor(**changes), made, without_pairs, [])))


def test_the_head_names_base_licence_and_kind(tmp_path: Path) -> None:
    found = card(tmp_path).data
    assert found.base_model == "black-forest-labs/FLUX.1-dev" and found.license == "other"
    assert found.license_name == "flux-1-dev-non-commercial-license" and found.license_link.startswith("https://")
    assert found.base_model_relation == "finetune" and found.pipeline_tag == "image-to-image"
    assert found.library_name == "npedit" and "no-pairs" not in found.tags
    (tmp_path / LORA_FILE).touch()
    (tmp_path / "pipeline.py").touch()
    found = card(tmp_path, recipe(), without_pairs=True).data
    assert found.base_model_relation == "adapter" and found.library_name == "diffusers"
    assert {"lora", "no-pairs", "flux"} <= set(found.tags)


def test_an_unknown_base_is_said_to_be_unknown_and_a_folder_is_no_hub_id(tmp_path: Path) -> None:
    told = card(tmp_path, base="/somewhere/private/FLUX.1-dev")
    assert told.data.license == "unknown" and told.data.base_model is None
    assert "npedit does not know the licence" in told.text and "private" not in str(told)
    assert card(tmp_path, base="someone/else").data.base_model == "someone/else"


@pytest.mark.parametrize("base", LICENCES)
def test_every_known_licence_makes_a_head_that_the_hub_reads(base: str, tmp_path: Path) -> None:
    found, known = card(tmp_path, base=base), LICENCES[base]
    assert found.data.license == known.licence and known.source in found.text and known.consequence in found.text
    assert (found.data.license == "other") == bool(known.name and known.link)


def test_pairs_are_stated_only_where_they_are_known(tmp_path: Path) -> None:
    assert "No pairs were used" in card(tmp_path, recipe(), without_pairs=True).text
    assert "is not known" in card(tmp_path).text
    assert "is not known" in card(tmp_path, recipe(), without_pairs=False).text  # it starts from an unknown editor
    paired = recipe({"name": "toy_pairs"}, "supervised")
    assert "Training saw edited images" in card(tmp_path, paired, without_pairs=False).text


def test_data_licences_come_from_the_set(tmp_path: Path) -> None:
    facts = {"licences": {"CC0": 3}, "sources": {"me": 3}, "writer": {"name": "/models/big-writer"}}
    (tmp_path / "prepare.json").write_text(json.dumps(facts))
    made = recipe({"name": "imagefolder", "path": str(tmp_path), "sizes": [[32, 32]]})
    text = card(tmp_path, made).text
    assert "CC0 (3 photos)" in text and "me (3 photos)" in text and "`big-writer`" in text
    assert str(tmp_path) not in text and "/models" not in text
    assert "not stated in the data" in card(tmp_path, recipe()).text


def test_scores_are_those_that_were_measured(tmp_path: Path) -> None:
    assert "No measured scores" in card(tmp_path).text
    (tmp_path / "toy.json").write_text(json.dumps(SCORES))
    rows = [{"task": "recolour", "scores": {"overall": float(i % 3), "broken": None}} for i in range(9)]
    scale, sizes = ScoreScale(0, 10, 0.99), {"recolour": 9}
    summary = {f"npedit-edit-v1/{name}": summarise_score(rows, name, sizes, scale) for name in ("overall", "broken")}
    summary["npedit-edit-v1/overall_micro"] = summarise_score(rows, "overall", sizes, scale, micro=True)
    (tmp_path / "gedit").mkdir()
    (tmp_path / "gedit" / "summary.json").write_text(json.dumps(summary))
    settings = {"protocol": {"name": "npedit-edit-v1"}, "judge": {"name": "/models/a-judge"}}
    (tmp_path / "gedit" / "settings.json").write_text(json.dumps(settings))
    scores = read_scores([tmp_path / "toy.json", tmp_path / "gedit"])
    assert [(s.metric, s.value, s.low, s.high, s.items) for s in scores[:2]] == [
        ("both", 0.4, 0.3, 0.5, 90), ("applied", 0.5, 0.4, 0.6, 90)]  # fmt: skip
    assert [s.metric for s in scores[3:]] == ["overall"]
    assert scores[3].benchmark == "npedit-edit-v1, judge a-judge"
    assert scores[3].low <= scores[3].value == 1.0 <= scores[3].high
    text = write_card(CardFacts(tmp_path, editor(), None, None, scores))
    assert "| toy benchmark | both | 0.400 | 0.300 to 0.500 | 90 |" in text
    with pytest.raises(UserError, match="expected a folder of results"):
        read_scores([tmp_path])


def test_the_last_evaluation_of_training_gets_its_interval(tmp_path: Path) -> None:
    rows = [{"step": n, "eval/both": n / 10, "eval/applied": 0.5, "eval/preserved": 1.0} for n in (0, 1, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = recipe(trainer={"benchmark": "toy", "evaluate_items": 90})
    both, _, preserved = last_evaluation(tmp_path, made)
    assert both.value == pytest.approx(0.3) and 0.2 < both.low < 0.3 < both.high < 0.41 and both.items == 90
    assert preserved.value == preserved.high == 1.0 and preserved.low < 1
    assert last_evaluation(tmp_path, made, update=1)[0].value == pytest.approx(0.1)
    assert not last_evaluation(tmp_path, made, update=2) and not last_evaluation(tmp_path, recipe())


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run with a checkpoint and a finished editor, which are of different weights."""
    folder = tmp_path / "run"
    for name in ("final", "checkpoint-000010"):
        (folder / name).mkdir(parents=True)
        (folder / name / "weights").write_text(name)
    (folder / "final" / "npedit.json").write_text(json.dumps(editor(base="embedded")))
    (folder / "checkpoint-000010" / "COMPLETE").touch()
    (folder / "config.resolved.yaml").write_text(json.dumps(recipe().as_dict()))
    return folder


def write_toy(path: Path, scored: str | Path, items: int = 90, **changes: Any) -> None:
    """What `npedit evaluate toy --json` writes, with `items` as the mark of this file."""
    path.write_text(json.dumps(SCORES | {"n": items, "model": str(scored), "weights": hash_editor(scored)} | changes))


def write_own(folder: Path, source: dict[str, Any]) -> None:
    """What `npedit evaluate own` writes for pictures of this source."""
    folder.mkdir()
    summary = {"ssim": {"value": 0.5, "n": 77, "coverage": 1.0, "undefined": 0, "ci95": [0.4, 0.6]}}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "settings.json").write_text(json.dumps({"source": source, "protocol": {"benchmark": "own"}}))


def shown(source: Path) -> str:
    """The scores in the card of an editor of a run."""
    return model_card(source, resolve_editor(source), editor()).split("## Scores")[1].split("## Limits")[0]


def test_results_in_the_runs_folder_count_if_they_are_of_these_weights(trained: Path) -> None:
    write_toy(trained / "early.json", trained / "checkpoint-000010", 91)
    write_toy(trained / "mine.json", trained)
    write_toy(trained / "elsewhere.json", trained, 92, model="a/path/that/is/gone")
    write_toy(trained / "embedded.json", "embedded", 93)
    write_toy(trained / "old.json", trained, 94, weights="")
    final, early = shown(trained), shown(trained / "checkpoint-000010")
    assert [n for n in range(90, 95) if f"| {n} |" in final] == [90, 92]
    assert [n for n in range(90, 95) if f"| {n} |" in early] == [91]
    assert "No pairs were used" in model_card(trained / "final", resolve_editor(trained))


@pytest.mark.parametrize("name", ["summary.json", "settings.json"])
@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_a_damaged_file_of_scores_is_left_out_of_a_card(trained: Path, name: str, content: str) -> None:
    write_toy(trained / "mine.json", trained)
    write_own(trained / "own", PictureSource(str(trained), None, False, "", 0, None).facts())
    (trained / "own" / name).write_text(content)
    assert "| 90 |" in shown(trained) and "| 77 |" not in shown(trained)
    with pytest.raises(UserError, match="damaged"):
        read_scores([trained / "own"])


def test_scores_of_a_checkpoint_are_not_those_of_the_later_end(trained: Path) -> None:
    """A run's name means its latest checkpoint until there is final/."""
    (trained / "final").rename(trained / "aside")
    write_toy(trained / "toy.json", trained)
    assert "| 90 |" in shown(trained / "checkpoint-000010")
    (trained / "aside").rename(trained / "final")
    assert "No measured scores" in shown(trained)


def test_scores_are_found_from_any_folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    write_toy(trained / "toy.json", ".")
    write_own(trained / "own", PictureSource("../run", None, False, "", 0, None).facts())
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    for name in (Path("../run"), trained):
        assert "| 90 |" in shown(name) and "| 77 |" in shown(name)


def test_scores_of_pictures_that_the_editor_did_not_make_are_left_out(trained: Path) -> None:
    run = str(trained)
    write_own(trained / "text", PictureSource(run, None, False, "", 0, None, text_only=True).facts())
    write_own(trained / "copy", PictureSource("embedded", None, True, "", 0, None).facts())
    write_own(trained / "edited", PictureSource("embedded", trained, False, "", 0, None).facts())
    assert "No measured scores" in shown(trained)
    write_own(trained / "own", PictureSource(run, None, False, "", 0, None).facts())
    assert "| own | ssim |" in shown(trained)


def test_a_title_states_the_settings_that_are_not_the_default(trained: Path) -> None:
    write_toy(trained / "a.json", trained, 1, steps=4, edit_types=list(EDIT_TYPES))
    write_toy(trained / "b.json", trained, 2, steps=1, edit_types=["add"])
    write_toy(trained / "c.json", trained, 3, steps=4, edit_types=["scene", "add"], base="/private/FLUX.1-dev")
    for steps in (None, 1, 4):
        write_own(trained / f"own-{steps}", PictureSource(str(trained), None, False, "", 0, steps).facts())
    found = shown(trained)
    assert "| toy benchmark | both | 0.400 | 0.300 to 0.500 | 1 |" in found
    assert "| toy benchmark; edit types add; steps 1 | both | 0.400 | 0.300 to 0.500 | 2 |" in found
    assert "| toy benchmark; edit types scene, add; base model FLUX.1-dev | both |" in found and "private" not in found
    assert found.count("| own | ssim |") == 2 and found.count("| own; steps 1 | ssim |") == 1


def test_an_editor_without_a_run_keeps_what_its_card_said(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "npedit.json").write_text(json.dumps(editor()))
    score = MeasuredScore("toy benchmark", "both", 0.4, 0.3, 0.5, 90)
    facts = CardFacts(first, editor(), recipe(), True, [score])
    (first / "README.md").write_text(write_card(facts))
    (second / "pipeline.py").touch()
    again = ModelCard(model_card(second, resolve_editor(first)))
    assert "No pairs were used" in again.text and "0.300 to 0.500" in again.text and "no-pairs" in again.data.tags
    assert "trust_remote_code" in again.text and "trust_remote_code" not in write_card(facts)
    short = "---\ntags: [x]\n---\n# mine: an editor\n\nSaid of its training.\n\n## Use\n\nold use\n"
    (first / "README.md").write_text(short)
    again = ModelCard(model_card(second, resolve_editor(first)))
    assert "Said of its training." in again.text and "old use" not in again.text and "no-pairs" not in again.data.tags


def test_how_to_use_it_depends_on_what_is_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / LORA_FILE).touch()
    assert "load_lora_weights" in card(tmp_path).text
    assert "load_lora_weights" not in card(tmp_path, family="sana").text
    (tmp_path / "pipeline.py").touch()
    text = set_repository(card(tmp_path).text, "me/mine")
    assert "### npedit" in text and "no files for ComfyUI" in text
    assert '"me/mine", custom_pipeline="me/mine"' in text and "USER/NAME" not in text
    assert "torch_dtype=torch.float32" in text and "torch_dtype=torch.bfloat16" in card(tmp_path, dtype="bfloat16").text


@pytest.mark.parametrize("types", [{}, {"vae_dtype": "bfloat16"}, {"text_dtype": "", "vae_dtype": ""}], ids=str)
def test_one_number_type_is_named_once(tmp_path: Path, types: dict[str, str]) -> None:
    (tmp_path / "pipeline.py").touch()
    assert "torch_dtype=torch.bfloat16,\n" in card(tmp_path, dtype="bfloat16", **types).text


def test_an_unknown_number_type_is_told(tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").touch()
    with pytest.raises(UserError, match=r"expected float32, bfloat16 or float16 .* got 'int4'"):
        card(tmp_path, vae_dtype="int4")


def test_a_folder_for_comfyui_names_no_other_tool(tmp_path: Path) -> None:
    (tmp_path / "workflow.json").touch()
    (tmp_path / "loras").mkdir()
    found = ModelCard(write_card(CardFacts(tmp_path, editor(), None, None, [])))
    assert "open `workflow.json`" in found.text and "### npedit" not in found.text and "### diffusers" not in found.text
    assert found.data.base_model_relation == "adapter"
