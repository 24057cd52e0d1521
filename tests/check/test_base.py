"""The base section: the toy's base model draws what captions say; one with other weights does not."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from npedit import generator
from npedit.check.base import captioned_objects, check_base
from npedit.check.subject import CheckOptions, Subject, read_examples
from npedit.data import Example
from npedit.families.flux import Flux
from npedit.nets.device import CPU
from npedit.recipe.config import MemorySettings, embedded_weights
from npedit.steps.base import Parts
from tests.check.conftest import severities


@pytest.fixture(scope="module")
def subject(demo) -> Subject:
    """The demo with enough examples to judge the base model."""
    return Subject(demo.recipe, demo.data, demo.parts, CheckOptions(samples=18), read_examples(demo.data, 18))


def with_weights(subject: Subject, change) -> Subject:
    """The subject with the base model's weights changed."""
    family = Flux.load(embedded_weights("base"), torch.float32, CPU)
    with torch.no_grad():
        change(family.base)
    parts = Parts(family, subject.parts.critic, "short", CPU)
    return Subject(subject.recipe, subject.data, parts, subject.options, subject.examples)


@pytest.mark.slow
def test_the_toys_base_model_is_silent(subject) -> None:
    section = check_base(subject)
    assert severities(section) == {}
    rows = {row[0]: row[2] for row in section.tables[0].rows}
    assert rows["base model, 20 steps, guidance 4"] > 0.7 > 0.5 > rows["photos of other rows"]
    assert len(section.pictures) == 1


def test_a_base_model_that_ignores_its_captions_is_found(subject) -> None:
    def forget_text(net) -> None:
        net.context_embedder.weight.zero_()
        net.time_text_embed.text_embedder.linear_1.weight.zero_()

    assert severities(check_base(with_weights(subject, forget_text)))["base-agreement"] == "will not learn"


def test_pictures_that_are_not_finite_are_found(subject) -> None:
    small = copy.copy(subject)
    small.examples = subject.examples[:2]
    broken = with_weights(small, lambda net: net.proj_out.weight.fill_(float("nan")))
    broken.parts = replace(broken.parts, critic=None)
    assert severities(check_base(broken)) == {"base-not-finite": "will not learn", "no-critic": "note"}


def test_large_pictures_are_made_one_by_one_and_in_the_recipes_tiles(subject, monkeypatch) -> None:
    small = copy.copy(subject)
    small.examples = subject.examples[:3]
    small.parts = replace(subject.parts, critic=None, memory=MemorySettings(decode_tile=16))
    monkeypatch.setattr(generator, "BATCH_PIXELS", 32 * 32)
    decoded, decode = [], subject.parts.family.decode
    monkeypatch.setattr(subject.parts.family, "decode", lambda x: (decoded.append(tuple(x.shape)), decode(x))[1])
    check_base(small)
    stride = subject.parts.family.facts.stride
    assert {(shape[0], *shape[2:]) for shape in decoded} == {(1, 16 // stride, 16 // stride)}


def example(kind: str, thing: str, before: str, after: str) -> Example:
    return Example("1", torch.zeros(3, 8, 8), "do it", kind, thing, before, after)


def test_captions_count_only_if_they_name_the_object() -> None:
    rows = [
        example("remove", "red car", "a red car on a street", "a street"),
        example("remove", "red car", "a blue car", "a street"),
        example("add", "dog", "a street", "a street with a dog"),
        example("style", "", "a street", "a street at night"),
    ]
    assert [(c.caption, c.is_source) for c in captioned_objects(rows)] == [
        ("a red car on a street", True),
        ("a street with a dog", False),
    ]


def test_rows_without_objects_are_a_note(subject) -> None:
    bare = copy.copy(subject)
    bare.examples = [replace(e, object="") for e in subject.examples[:2]]
    assert severities(check_base(bare)) == {"base-not-checked": "note"}
