"""Model cards: what the Hub reads, and only statements that a file supports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from npedit.benchmarks._headlines import ScoreScale, summarise_score
from npedit.errors import UserError
from npedit.export.base_licences import LICENCES
from npedit.export.card import CardFacts, model_card, set_repository, write_card
from npedit.export.measured_scores import MeasuredScore, last_evaluation, read_scores
from npedit.nets.lora import WEIGHTS_FILE as LORA_FILE
from npedit.recipe.config import Recipe, make_recipe
from npedit.runs.resolve import resolve_editor

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


def test_results_in_the_runs_folder_count_if_they_are_of_this_editor(tmp_path: Path) -> None:
    for name in ("final", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "npedit.json").write_text(json.dumps(editor(base="embedded")))
    (tmp_path / "config.resolved.yaml").write_text(json.dumps(recipe().as_dict()))
    (tmp_path / "mine.json").write_text(json.dumps(SCORES | {"model": str(tmp_path)}))
    (tmp_path / "other.json").write_text(json.dumps(SCORES | {"n": 91, "model": str(tmp_path / "other")}))
    (tmp_path / "embedded.json").write_text(json.dumps(SCORES | {"n": 92, "model": "embedded"}))
    text = model_card(tmp_path / "final", resolve_editor(tmp_path))
    assert "| 90 |" in text and "| 91 |" not in text and "| 92 |" not in text
    assert "No pairs were used" in text


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
