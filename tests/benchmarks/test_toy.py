"""The toy benchmark gives full marks to true edits and none to copies, nonsense or broken numbers."""

import io
import json
import random
import re

import pytest
import torch
from rich.console import Console

from npedit.benchmarks import toy
from npedit.scoring.tables import rich_table
from npedit.toy.edits import EDIT_TYPES, INSTRUCTIONS, sample_edit
from npedit.toy.world import render

N = 45


@pytest.fixture(scope="module")
def edits():
    return toy.sample_items(N, seed=3)


def targets(edits):
    """An editor that knows the answers, in the order in which the items come."""
    waiting = iter(render([e.target for e in edits]))
    return lambda references, instructions: torch.stack([next(waiting) for _ in instructions])


def test_items_are_balanced_held_out_and_reproducible(edits):
    assert [e.edit_type for e in edits] == list(EDIT_TYPES) * (N // len(EDIT_TYPES))
    assert toy.sample_items(N, seed=3) == edits
    assert toy.sample_items(2 * N, seed=3)[:N] == edits
    assert toy.sample_items(N, seed=4) != edits
    for e in edits:
        key = "add_at" if e.edit_type == "add" and e.to_cell >= 0 else e.edit_type
        phrasings = [re.sub(r"\\{\w\\}", ".+", re.escape(s)) for s in INSTRUCTIONS[key][-2:]]
        assert any(re.fullmatch(p, e.instruction) for p in phrasings)


def test_training_never_draws_held_out_instructions(edits):
    trained = {sample_edit(random.Random(f"{seed}/{i}")).instruction for seed in range(4) for i in range(200)}
    held = {e.instruction for e in edits if e.edit_type == "background"}
    assert held and not held & trained


def test_true_edits_get_full_marks(edits):
    scores = toy.score(targets(edits), edits, chunk=16)
    assert scores["n"] == N
    assert [scores[m]["value"] for m in toy.METRICS] == [1.0, 1.0, 1.0]
    assert set(scores["by_type"]) == set(EDIT_TYPES)
    assert all(row["n"] == N // len(EDIT_TYPES) and row["both"]["value"] == 1 for row in scores["by_type"].values())
    assert scores["copy_rate"] == 0 and scores["outside_change"] < 1e-6
    assert json.loads(json.dumps(scores)) == scores


def test_a_copy_preserves_everything_and_applies_nothing(edits):
    scores = toy.score(lambda references, _: references, edits)
    assert scores["applied"]["value"] == 0 and scores["both"]["value"] == 0
    assert scores["preserved"]["value"] == 1 and scores["copy_rate"] == 1
    low, high = scores["both"]["ci95"]
    assert low == 0 and 0.05 < high < 0.1


def test_the_right_edit_of_another_item_is_wrong(edits):
    """The right pictures in the wrong places must not pass."""
    scores = toy.score(targets(edits[1:] + edits[:1]), edits)
    assert scores["both"]["value"] == 0 and scores["outside_change"] > 0.02


def test_outputs_that_are_not_finite_count_as_failures(edits):
    def half_broken(references, instructions):
        out = render([e.target for e in edits[: len(references)]])
        out[0] = float("nan")
        return out

    scores = toy.score(half_broken, edits[:9])
    assert scores["not_finite"] == 1 and scores["both"]["value"] == pytest.approx(8 / 9)


def test_a_wrong_shape_is_an_error(edits):
    with pytest.raises(ValueError, match="expected edited images"):
        toy.score(lambda references, _: references[:, :, :16], edits[:2])
    with pytest.raises(ValueError, match="at least one item"):
        toy.score(lambda references, _: references, [])
    with pytest.raises(ValueError, match="at least one item"):
        toy.sample_items(0)


def test_causes_of_wrong_edits_are_counted(edits):
    """Right edits, then copies with: a critic that accepts them; one that rejects them and a teacher that can draw
    the target, or cannot."""
    items = edits[:9] * 4
    references, wanted = (render([getattr(e, k) for e in items]) for k in ("reference", "target"))
    edited = torch.cat([wanted[:9], references[9:]])
    is_accepted = [True] * 18 + [False] * 18
    teacher_images = torch.cat([wanted[:27], torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))])
    counts = toy.attribute_failures(items, edited, is_accepted, teacher_images)
    assert list(counts) == list(EDIT_TYPES)
    assert all(row == {"n": 4, "right": 1, "critic": 1, "student": 1, "teacher": 1} for row in counts.values())


def test_wilson_against_published_values():
    """Newcombe (1998), table I: 81 of 263 and 15 of 148, score method without continuity correction."""
    assert toy.wilson_interval(81, 263)["ci95"] == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert toy.wilson_interval(15, 148)["ci95"] == pytest.approx([0.0624, 0.1605], abs=1e-4)
    assert toy.wilson_interval(0, 20)["ci95"] == pytest.approx([0.0, 0.1611], abs=1e-4)
    with pytest.raises(ValueError, match="hits 3, n 2"):
        toy.wilson_interval(3, 2)


def test_pictures_are_saved_in_the_layout_of_samples(edits, tmp_path):
    toy.score(targets(edits), edits, chunk=16, save_to=tmp_path / "p", save=20)
    listed = json.loads((tmp_path / "p" / "items.json").read_text())
    assert len(listed) == 20 == len(list((tmp_path / "p").glob("reference-*.png")))
    assert listed[18]["instruction"] == edits[18].instruction and listed[18]["applied"] is True
    assert all((tmp_path / "p" / row["file"]).is_file() for row in listed)


def test_the_table_shows_before_and_after(edits):
    before = toy.score(lambda references, _: references, edits)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(rich_table(toy.results_table(toy.score(targets(edits), edits), before)))
    text = console.export_text()
    assert "0.0 % [0.0, 7.9]" in text and "100.0 % [92.1, 100.0]" in text
    assert all(t in text for t in EDIT_TYPES)
