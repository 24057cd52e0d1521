"""Scenes in `npedit check`: known answers of their three questions, and whether subjects have other photos."""

from dataclasses import replace

import pytest
import torch

from npedit.check.critic_answers import ask_critic
from npedit.check.findings import Section
from npedit.check.known_edits import COPY, OTHER_SUBJECT, make_known_edits
from npedit.check.scenes import report_scenes
from npedit.check.subject import read_examples
from npedit.critics.llava_onevision import LlavaOnevision
from npedit.data import Example, collate, toy


def scene(number, thing):
    picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(number))
    return Example(str(number), picture, f"put the {thing} on it", "scene", thing, f"a {thing}", f"a {thing} on it")


EXAMPLES = [scene(0, "dog"), scene(1, "circle"), scene(2, "red dog"), scene(3, "square")]


@pytest.fixture(scope="module")
def critic():
    return LlavaOnevision.tiny(0)


def test_a_returned_photo_carries_out_no_scene_and_keeps_the_subject(critic):
    copies = [e for e in make_known_edits(EXAMPLES) if e.probe == COPY]
    assert len(copies) == len(EXAMPLES)
    answers = ask_critic(critic, "short", copies)
    assert [(a.kind, a.truth) for a in answers] == 4 * [("edit", False), ("identity", True), ("returned", False)]
    texts = {"is this in the picture : put the dog on it ?", "is the dog the same ?", "is it the same picture ?"}
    seen = {"reference": critic.encode_images(EXAMPLES[0].reference[None])[0]}
    seen["edited"] = seen["reference"]
    margins = {t: float(critic.margin([t], [[seen["edited"]] * (1 if "this in" in t else 2)])) for t in texts}
    wanted = [margins["is this in the picture : put the dog on it ?"], margins["is the dog the same ?"]]
    wanted.append(-margins["is it the same picture ?"])
    assert [a.p for a in answers[:3]] == pytest.approx(torch.tensor(wanted).sigmoid().tolist(), abs=1e-5)


def test_a_photo_of_another_subject_has_lost_the_subject_and_is_not_the_photo(critic):
    edits = make_known_edits(EXAMPLES)
    others = [e for e in edits if e.probe == OTHER_SUBJECT]
    assert {e.example.id for e in others} == {"0", "1", "2", "3"}
    for edit in others:
        assert not any(torch.equal(edit.edited, e.reference) for e in EXAMPLES if "dog" in e.object) or (
            "dog" not in edit.example.object
        )
    answers = ask_critic(critic, "short", others)
    assert {(a.kind, a.truth) for a in answers} == {("identity", False), ("returned", True)}
    probes = {e.probe for e in edits if e.example.edit_type == "scene"}
    assert probes == {COPY, OTHER_SUBJECT}, "a scene may change all of the photo"


@pytest.mark.parametrize(("count", "severity"), [(0, "warning"), (1, "warning"), (2, "ok"), (4, "ok")])
def test_subjects_without_other_photos_are_told(count, severity):
    section = Section("data", "Data")
    report_scenes(section, [replace(e, other_photo=e.reference) if k < count else e for k, e in enumerate(EXAMPLES)])
    (finding,) = section.findings
    assert finding.severity == severity and f"{count} of 4 scenes" in finding.measured
    empty = Section("data", "Data")
    report_scenes(empty, [replace(EXAMPLES[0], edit_type="style")])
    assert not empty.findings


def test_the_examples_of_a_check_have_the_photos_that_the_critic_sees_in_training():
    source = toy.Source(toy.Settings(edit_types=("scene", "add"), nothing_share=0.0), 3)
    examples = read_examples(source, 12)
    assert {e.edit_type for e in examples} == {"scene", "add"}
    for example in examples:
        assert (example.other_photo is None) == (example.edit_type == "add")
    batch = source.batch(0, 1)
    assert torch.equal(batch.references, collate(examples[:1]).references)
    first, own = collate(examples[:1]).other_photos, batch.other_photos
    assert (first is None and own is None) or torch.equal(first, own)
    section = Section("data", "Data")
    report_scenes(section, examples)
    assert [f.severity for f in section.findings] == ["ok"]
