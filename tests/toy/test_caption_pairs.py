"""Captions in the same words before and after an edit."""

import random
from collections import Counter

import pytest

from npedit.data import toy
from npedit.toy.caption_pairs import SOMETIMES_STATED, with_paired_captions
from npedit.toy.edits import CAPTION_WORDS, EDIT_TYPES, sample_edit
from npedit.toy.oracle import expected_reading, matches_caption
from npedit.toy.world import BACKGROUNDS, COLOURS, PATTERNS, PLACES, SHAPES, SIZES

VALUES = {"replace": SHAPES, "recolour": COLOURS, "pattern": PATTERNS, "background": BACKGROUNDS, "resize": SIZES}
PLACE_WORDS = {word for place in PLACES for word in place.split()}


@pytest.fixture(scope="module", params=EDIT_TYPES)
def edits(request):
    return [
        with_paired_captions(sample_edit(random.Random(i), request.param), random.Random(f"c/{i}")) for i in range(150)
    ]


def changed_words(edit) -> tuple[Counter, Counter]:
    source, target = Counter(edit.source_caption.split()), Counter(edit.target_caption.split())
    return source - target, target - source


def test_each_caption_is_true_of_its_scene_and_short_enough(edits):
    for edit in edits:
        assert matches_caption(edit.source_caption, expected_reading(edit.reference)), edit
        assert matches_caption(edit.target_caption, expected_reading(edit.target)), edit
        assert max(len(c.split()) for c in (edit.source_caption, edit.target_caption)) <= CAPTION_WORDS


def test_the_captions_differ_by_the_edit_alone(edits):
    for edit in edits:
        gone, new = changed_words(edit)
        if edit.edit_type in VALUES and edit.edit_type != "pattern":
            assert set(new) <= {edit.value} and set(gone) <= set(VALUES[edit.edit_type])
            assert sum(new.values()) == sum(gone.values()) <= 1
        elif edit.edit_type == "pattern":
            assert set(gone) | set(new) <= {*PATTERNS, "a"}
        elif edit.edit_type == "move":
            assert set(gone) | set(new) <= PLACE_WORDS
        elif edit.edit_type == "add":
            assert not gone and new
        elif edit.edit_type == "remove":
            assert gone and not new


def test_only_sizes_and_places_may_stay_unsaid(edits):
    equal = sum(edit.source_caption == edit.target_caption for edit in edits) / len(edits)
    assert 0.3 < equal < 0.6 if edits[0].edit_type in SOMETIMES_STATED else equal == 0


def test_the_toys_data_have_them_if_asked_for():
    plain, paired = (toy.Source(toy.Settings(paired_captions=wanted), 3) for wanted in (False, True))
    a, b = plain.batch(0, 16), paired.batch(0, 16)
    assert a.instructions == b.instructions and a.references.equal(b.references)
    assert a.target_captions != b.target_captions
    assert plain.fingerprint() == toy.Source(toy.Settings(), 3).fingerprint() != paired.fingerprint()
    scenes = [toy.Source(toy.Settings(paired_captions=wanted, edit_types=("scene",)), 3) for wanted in (False, True)]
    assert scenes[0].batch(0, 4).target_captions == scenes[1].batch(0, 4).target_captions
