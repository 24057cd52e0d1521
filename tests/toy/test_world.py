"""The toy world and its oracle, which must know every answer: it is what all other figures rest on."""

import random
import re
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from npedit.questions import questions_for
from npedit.toy import edits as language
from npedit.toy import oracle, world
from npedit.toy.edits import EDIT_TYPES, sample_edit
from npedit.toy.oracle import expected_reading, judge_edit, read_scene
from npedit.toy.world import render, sample_scene, sample_thing

EACH = 60  # edits of each type


@pytest.fixture(scope="module")
def edits():
    return [sample_edit(random.Random(f"test/{t}/{i}"), t, i % 2 == 1) for t in EDIT_TYPES for i in range(EACH)]


@pytest.fixture(scope="module")
def targets(edits):
    return render([e.target for e in edits])


def verdicts(edits, images):
    return [judge_edit(e, r) for e, r in zip(edits, read_scene(images), strict=True)]


def share(answers):
    answers = list(answers)
    return sum(answers) / len(answers)


# ---- drawing


def test_pictures_are_small_floats_between_0_and_1(edits, targets):
    assert targets.shape == (len(edits), 3, world.SIDE, world.SIDE)
    assert targets.dtype is torch.float32
    assert targets.min() >= 0
    assert targets.max() <= 1


def test_drawing_together_is_drawing_one_by_one(edits):
    scenes = [e.reference for e in edits[::30]]
    assert torch.equal(render(scenes), torch.cat([render([s]) for s in scenes]))


def test_drawing_is_anti_aliased_and_jittered():
    scenes = [sample_scene(random.Random(i), 1) for i in range(50)]
    for scene, picture in zip(scenes, render(scenes), strict=True):
        assert len(torch.unique(picture.flatten(1), dim=1).T) > 4  # background, paint, white, and blends
        (cell,) = scene.filled
        assert abs(scene.cells[cell].dx) <= world.JITTER
    assert len({s.cells[s.filled[0]].dx for s in scenes}) == 50


def test_one_seed_one_edit():
    assert sample_edit(random.Random("7/3")) == sample_edit(random.Random("7/3"))
    assert sample_edit(random.Random("7/3")) != sample_edit(random.Random("7/4"))


def test_things_in_a_scene_can_be_told_apart(edits):
    for edit in edits:
        for scene in (edit.reference, edit.target):
            looks = [(scene.cells[i].shape, scene.cells[i].colour) for i in scene.filled]
            assert len(set(looks)) == len(looks)


# ---- the oracle accepts


def test_accepts_every_true_edit(edits, targets):
    wrong = [e.instruction for e, v in zip(edits, verdicts(edits, targets), strict=True) if v != (True, True)]
    assert wrong == []


def test_reads_every_scene(edits):
    scenes = [e.reference for e in edits]
    for scene, reading in zip(scenes, read_scene(render(scenes)), strict=True):
        assert replace(reading, residual=0.0) == expected_reading(scene)


def test_tolerates_noise(edits, targets):
    noise = torch.randn(targets.shape, generator=torch.Generator().manual_seed(0))
    assert share(v == (True, True) for v in verdicts(edits, (targets + 0.03 * noise).clamp(0, 1))) >= 0.98


def test_tolerates_slight_blur(edits, targets):
    kernel = torch.tensor([0.1, 0.8, 0.1])
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(targets, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    assert share(v == (True, True) for v in verdicts(edits, blurred)) >= 0.98


def test_a_reading_does_not_depend_on_the_other_pictures(targets):
    together = read_scene(targets[:130])
    alone = [read_scene(t[None])[0] for t in targets[:130:13]]
    assert [replace(r, residual=0.0) for r in together[::13]] == [replace(r, residual=0.0) for r in alone]


# ---- the oracle rejects


def test_rejects_copies(edits):
    copies = verdicts(edits, render([e.reference for e in edits]))
    assert not any(applied for applied, _ in copies)
    assert all(preserved for _, preserved in copies)


def test_rejects_wrong_values(edits):
    """The right thing, changed to something that was not asked for."""
    kinds = {
        "recolour": ("colour", world.COLOURS),
        "replace": ("shape", world.SHAPES),
        "pattern": ("pattern", world.PATTERNS),
    }
    tried, scenes = [], []
    for edit in edits:
        if edit.edit_type in kinds:
            key, values = kinds[edit.edit_type]
            thing = edit.target.cells[edit.cell]
            for value in values:
                if value not in (edit.value, getattr(edit.reference.cells[edit.cell], key)):
                    tried.append(edit)
                    scenes.append(edit.target.with_cell(edit.cell, replace(thing, **{key: value})))
    assert len(tried) > 3 * EACH
    assert not any(applied for applied, _ in verdicts(tried, render(scenes)))


def test_rejects_wrong_backgrounds_and_styles(edits):
    tried, scenes = [], []
    for edit in edits:
        if edit.edit_type in ("background", "style"):
            values = world.BACKGROUNDS if edit.edit_type == "background" else world.STYLES
            for value in values:
                if value != edit.value:
                    tried.append(edit)
                    scenes.append(replace(edit.target, **{edit.edit_type: value}))
    assert tried
    assert not any(applied for applied, _ in verdicts(tried, render(scenes)))


def test_rejects_the_edit_of_another_thing():
    """Paint, remove or reshape a thing other than the one that was named."""
    tried, scenes = [], []
    for i in range(300):
        edit = sample_edit(random.Random(f"other/{i}"), ("recolour", "remove", "replace")[i % 3])
        others = [c for c in edit.reference.filled if c != edit.cell]
        if not others:
            continue
        other = edit.reference.cells[others[0]]
        key = {"recolour": "colour", "replace": "shape"}.get(edit.edit_type)
        change = replace(other, **{key: edit.value}) if key else None
        if change != other:
            tried.append(edit)
            scenes.append(edit.reference.with_cell(others[0], change))
    assert len(tried) > 150
    assert set(verdicts(tried, render(scenes))) == {(False, False)}


def test_rejects_a_disturbed_rest(edits):
    """The right edit, with something else lost, added or repainted."""
    tried, scenes = [], []
    for edit in edits:
        rng = random.Random(edit.instruction)
        for cell in (c for c in edit.target.filled if c not in (edit.cell, edit.to_cell)):
            if edit.target.cells[cell] == edit.reference.cells[cell]:
                thing = edit.target.cells[cell]
                colour = rng.choice([c for c in world.COLOURS if c != thing.colour])
                for change in (None, replace(thing, colour=colour)):
                    tried.append(edit)
                    scenes.append(edit.target.with_cell(cell, change))
        if edit.edit_type not in ("background", "style"):
            back = rng.choice([b for b in world.BACKGROUNDS if b != edit.target.background])
            tried.append(edit)
            scenes.append(replace(edit.target, background=back))
            for cell in [c for c in edit.target.empty if c != edit.cell][:1]:
                tried.append(edit)
                scenes.append(edit.target.with_cell(cell, sample_thing(rng)))
    assert len(tried) > 5 * EACH
    assert not any(preserved for _, preserved in verdicts(tried, render(scenes)))


def test_rejects_a_thing_moved_or_added_elsewhere(edits):
    tried, scenes = [], []
    for edit in edits:
        if edit.to_cell >= 0:
            thing = edit.target.cells[edit.to_cell]
            for cell in (c for c in edit.target.empty if c != edit.cell):
                tried.append(edit)
                scenes.append(edit.target.with_cell(edit.to_cell, None).with_cell(cell, thing))
    assert {e.edit_type for e in tried} == {"add", "move"}
    assert not any(applied for applied, _ in verdicts(tried, render(scenes)))


def test_a_thing_may_be_added_anywhere_if_no_place_is_named(edits):
    tried, scenes = [], []
    for edit in (e for e in edits if e.edit_type == "add" and e.to_cell < 0):
        (home,) = edit.changed_cells
        for cell in edit.reference.empty:
            tried.append(edit)
            scenes.append(edit.reference.with_cell(cell, edit.target.cells[home]))
    assert set(verdicts(tried, render(scenes))) == {(True, True)}


def test_rejects_noise_and_smears(edits):
    n = len(edits)
    noise = torch.rand(n, 3, world.SIDE, world.SIDE, generator=torch.Generator().manual_seed(1))
    assert not any(applied and preserved for applied, preserved in verdicts(edits, noise))
    plain = render([e.target for e in edits]).mean((2, 3), keepdim=True).expand(-1, -1, world.SIDE, world.SIDE)
    both = [v == (True, True) for e, v in zip(edits, verdicts(edits, plain), strict=True) if e.target.filled]
    assert not any(both)


def test_a_picture_under_heavy_noise_is_unreadable(edits, targets):
    noise = torch.randn(targets.shape, generator=torch.Generator().manual_seed(0))
    assert (True, True) not in verdicts(edits, targets + 0.3 * noise)


def test_rejects_a_third_of_an_edit(edits, targets):
    """A picture nearer to the reference than to the target is not an edit of it."""
    third = torch.lerp(render([e.reference for e in edits]), targets, 1 / 3)
    assert (True, True) not in verdicts(edits, third)


def test_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"expected images \(b, 3, 32, 32\)"):
        read_scene(torch.zeros(1, 3, 64, 64))


# ---- what an edit touches


def test_touched_cells_are_those_that_change(edits, targets):
    references = render([e.reference for e in edits])
    for edit, a, b in zip(edits, references, targets, strict=True):
        change = (a - b).abs().amax(0).view(2, world.CELL, 2, world.CELL).amax((1, 3)).flatten()
        changed = {i for i in range(4) if change[i] > 0.02}
        assert changed == set(edit.changed_cells)


def test_outside_change_counts_only_the_rest(edits, targets):
    references = render([e.reference for e in edits])
    for edit, a, b in zip(edits, references, targets, strict=True):
        if edit.edit_type in ("background", "style"):
            assert oracle.change_outside_edit(edit, b, a) is None
        else:
            assert oracle.change_outside_edit(edit, b, a) == 0
            assert oracle.change_outside_edit(edit, b + 0.1, a) == pytest.approx(0.1, abs=1e-5)


# ---- language


def words_of(text):
    return set(re.sub(r"\{\w\}", " ", text).split())


def test_held_out_phrasings_are_others_of_the_same_words():
    known = set().union(*(words_of(t) for ts in language.INSTRUCTIONS.values() for t in ts[: -language.HELD_OUT]))
    training = {(k, t) for k, ts in language.INSTRUCTIONS.items() for t in ts[: -language.HELD_OUT]}
    for kind, templates in language.INSTRUCTIONS.items():
        assert len(set(templates)) == len(templates) > 2 * language.HELD_OUT - 1
        for template in templates[-language.HELD_OUT :]:
            assert (kind, template) not in training
            assert words_of(template) <= known, template


def test_sampled_instructions_come_from_their_own_half():
    def shapes(held_out):
        found = set()
        for kind in EDIT_TYPES:
            for i in range(200):
                edit = sample_edit(random.Random(f"words/{kind}/{i}"), kind, held_out)
                place = world.PLACES[edit.to_cell] if edit.to_cell >= 0 and kind == "add" else ""
                key = "add_at" if place else kind
                fits = {
                    (key, t)
                    for t in language.INSTRUCTIONS[key]
                    if t.format(x=edit.object, v=edit.value, p=place) == edit.instruction
                }
                assert fits, edit.instruction
                found |= fits
        return found

    training, held_out = shapes(False), shapes(True)
    assert not training & held_out
    assert held_out == {(k, t) for k, ts in language.INSTRUCTIONS.items() for t in ts[-language.HELD_OUT :]}


def test_captions_leave_things_out_and_never_lie(edits):
    """Shares over many scenes. If captions told all, distribution matching alone would solve the toy."""
    rng = random.Random(0)
    scenes = [sample_scene(rng) for _ in range(1500)]
    captions = [language.sample_caption(s, rng) for s in scenes]
    assert all(oracle.matches_caption(c, expected_reading(s)) for c, s in zip(captions, scenes, strict=True))
    told = [sum(c.split().count(shape) for shape in world.SHAPES) for c in captions]
    several = [(t, len(s.filled)) for t, s in zip(told, scenes, strict=True) if len(s.filled) > 1]
    assert 0.1 < share(t < n for t, n in several) < 0.5
    assert 0.5 < share(bool(set(world.BACKGROUNDS) & set(c.split())) for c in captions) < 0.7
    assert share(" at the " in c for c in captions) < 0.35
    assert share(bool({"small", "large"} & set(c.split())) for c in captions) < 0.35
    patterned = [c for s, c in zip(scenes, captions, strict=True) if all(t.pattern != "solid" for t in s.cells if t)]
    assert 0.2 < share(not {"striped", "dotted"} & set(c.split()) for c in patterned) < 0.6
    assert all(len(c.split()) <= language.CAPTION_WORDS for c in captions)


def test_an_edits_captions_are_true_and_the_targets_tells_of_the_edit(edits):
    for edit in edits:
        assert oracle.matches_caption(edit.source_caption, expected_reading(edit.reference))
        assert oracle.matches_caption(edit.target_caption, expected_reading(edit.target))
        if edit.edit_type in ("recolour", "replace", "background", "pattern") and edit.value not in ("solid",):
            assert edit.value in edit.target_caption.split()
        if edit.edit_type == "style" and edit.value != "day":
            assert edit.target_caption.endswith(language.CAPTIONS[edit.value][:-1])


def test_captions_have_paraphrases_and_some_are_held_out():
    """Training never sees the last phrasing of each part, and evaluation of captions sees nothing else."""
    rng = random.Random(1)
    scenes = [sample_scene(rng) for _ in range(600)]
    usual = [language.sample_caption(s, rng) for s in scenes] + [language.sample_full_caption(s, rng) for s in scenes]
    held_out = [language.sample_caption(s, rng, held_out=True) for s in scenes]
    assert all(oracle.matches_caption(c, expected_reading(s)) for c, s in zip(held_out, scenes, strict=True))
    for part, templates in language.CAPTIONS.items():
        for template in templates:
            words = re.escape(template).replace(r"\{x\}", "").replace(r"\{b\}", rf"(?:{'|'.join(world.BACKGROUNDS)})")
            said = re.compile({"all": rf"^{words}", "joined": words}.get(part, rf" {words}(?: (?:at|in) .*)?$"))
            if template == templates[-1]:
                assert any(said.search(c) for c in held_out) and not any(said.search(c) for c in usual), template
            else:
                assert any(said.search(c) for c in usual), template


def test_described_sees_a_false_caption(edits):
    scene = next(e.reference for e in edits if len(e.reference.filled) == 1)
    thing = scene.cells[scene.filled[0]]
    other = next(c for c in world.COLOURS if c != thing.colour)
    back = next(b for b in world.BACKGROUNDS if b != scene.background)
    place = next(p for i, p in enumerate(world.PLACES) if i not in scene.filled)
    name = f"{thing.colour} {thing.shape}"
    assert oracle.matches_caption(f"a {name}", expected_reading(scene))
    lies = (f"a {other} {thing.shape}", f"a {name} on a {back} background", f"a {name} at the {place}")
    for lie in (*lies, f"a {name} and a {name}"):
        assert not oracle.matches_caption(lie, expected_reading(scene)), lie
    for style, words in (("night", " at night"), ("fog", " in fog")):
        assert oracle.matches_caption(f"a {name}{words}", expected_reading(replace(scene, style=style)))
        assert not oracle.matches_caption(f"a {name}{words}", expected_reading(replace(scene, style="day")))


def test_every_edit_can_be_asked_about(edits):
    for edit in edits:
        assert questions_for(edit.edit_type, edit.instruction, edit.object, "short")


def test_unknown_edit_type_is_refused():
    with pytest.raises(ValueError, match="expected an edit type among"):
        sample_edit(random.Random(0), "sharpen")
