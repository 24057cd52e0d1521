"""Dense captions state everything. The teacher knows the wanted picture from the target caption alone."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from npedit.data import toy
from npedit.flow import few_step_times
from npedit.generator import generate_images
from npedit.recipe.config import load_recipe
from npedit.toy.edits import (
    CAPTION_WORDS,
    EDIT_TYPES,
    Edit,
    sample_dense_caption,
    sample_dense_target_caption,
    sample_edit,
)  # fmt: skip
from npedit.toy.oracle import judge_edit, read_scene
from npedit.toy.world import PLACES, Scene, sample_scene
from npedit.training.parts import build_parts


def described_things(scene: Scene) -> list[tuple[str, str]]:
    """Of each thing: all that a dense caption says about it, and its place."""
    found = []
    for cell in scene.filled:
        thing = scene.thing(cell)
        pattern = "" if thing.pattern == "solid" else f"{thing.pattern} "
        found.append((f"{thing.size} {pattern}{thing.colour} {thing.shape}", f" at the {PLACES[cell]}"))
    return found


def test_a_dense_caption_states_everything_in_few_words():
    with_places = {1: [], 2: [], 3: []}
    for i in range(2000):
        scene = sample_scene(random.Random(i))
        caption = sample_dense_caption(scene, random.Random(f"c/{i}"))
        things = described_things(scene)
        assert len(caption.split()) <= CAPTION_WORDS
        assert scene.background in caption and all(thing in caption for thing, _ in things)
        assert any(word in caption for word in ("night", "dark")) == (scene.style == "night")
        assert any(word in caption for word in ("fog", "mist")) == (scene.style == "fog")
        with_places[len(things)].append(all(thing + place in caption for thing, place in things))
    shares = {count: sum(has) / len(has) for count, has in with_places.items()}
    assert shares[1] == 1 and shares[2] > 0.95


def test_what_the_instruction_leaves_open_about_an_added_thing_is_not_stated():
    stated = {True: [], False: []}  # by whether the instruction names the place
    for i in range(600):
        edit = sample_edit(random.Random(i), "add")
        caption = sample_dense_target_caption(edit, random.Random(f"c/{i}"))
        (cell,) = (c for c in range(4) if edit.target.cells[c] != edit.reference.cells[c])
        words, thing = caption.split(), edit.target.thing(cell)
        at = next(i for i in range(len(words)) if words[i : i + 2] == [thing.colour, thing.shape])
        sized = thing.size in words[at - 2 : at]
        placed = " ".join(words[at + 2 : at + 6]) == f"at the {PLACES[cell]}"
        stated[edit.to_cell >= 0].append((placed, sized, len(edit.target.filled)))
    named, free = stated[True], stated[False]
    assert sum(placed for placed, _, _ in free) / len(free) < 0.2
    assert sum(placed for placed, _, things in named if things == 2) / sum(n == 2 for _, _, n in named) > 0.95
    assert sum(sized for _, sized, _ in named + free) / 600 < 0.2


def test_only_the_target_captions_of_local_edits_change():
    plain, dense = (toy.Source(toy.Settings(dense_captions=wanted), 3) for wanted in (False, True))
    a, b = plain.batch(0, 16), dense.batch(0, 16)
    assert (a.instructions, a.source_captions) == (b.instructions, b.source_captions)
    assert a.references.equal(b.references) and a.target_captions != b.target_captions
    assert plain.fingerprint() == toy.Source(toy.Settings(), 3).fingerprint() != dense.fingerprint()
    scenes = [toy.Source(toy.Settings(dense_captions=wanted, edit_types=("scene",)), 3) for wanted in (False, True)]
    assert scenes[0].batch(0, 4).target_captions == scenes[1].batch(0, 4).target_captions


def test_two_kinds_of_captions_at_once_are_refused():
    with pytest.raises(ValueError, match="got both; set one of them to false"):
        toy.Settings(dense_captions=True, paired_captions=True)


@pytest.mark.slow
def test_the_teacher_draws_the_edit_from_a_dense_caption_and_not_from_the_usual_one():
    """The share of right edits among pictures that the text-to-image model draws without the reference."""
    family, rng = build_parts(load_recipe("demo")).family, random.Random(5)
    edits = [sample_edit(rng, EDIT_TYPES[i % len(EDIT_TYPES)]) for i in range(45)]
    size = family.encode(torch.zeros(1, 3, 32, 32)).shape[1:]
    noise = torch.randn(len(edits), *size, generator=torch.Generator().manual_seed(0))

    def share_right(caption: Callable[[Edit], str]) -> float:
        times = few_step_times(16, family.noise_shift(32, 32)).tolist()
        drawn = read_scene(generate_images(family, [caption(e) for e in edits], noise, times, guidance=4.0))
        return sum(all(judge_edit(e, seen)) for e, seen in zip(edits, drawn, strict=True)) / len(edits)

    assert share_right(lambda e: e.target_caption) < 0.2
    assert share_right(lambda e: sample_dense_target_caption(e, rng)) > 0.5
