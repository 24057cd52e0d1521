"""Scenes in an NP-Edit update: three questions, one of them about another photo of the subject."""

from dataclasses import replace

import pytest
import torch

from npedit.data import collate
from npedit.questions import questions_for
from npedit.steps import np_edit
from npedit.steps._critic_gradient import CriticGradient, CriticGradientSettings
from tests.support.parts import example, parts, weights


def scene(number):
    other = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(90 + number))
    return replace(example(number), edit_type="scene", object="dog", other_photo=other)


def x0_of(frozen, count):
    channels, stride = frozen.family.facts.channels, frozen.family.facts.stride
    shape = (count, channels, 16 // stride, 16 // stride)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def written_out(frozen, batch, x0, identity_weight):
    """The critic's loss from its formula, one question at a time."""
    critic, images, total = frozen.critic, frozen.family.decode(x0), 0.0
    for i in range(len(batch)):
        pictures = {"reference": batch.references[i], "other": batch.other_photos[i], "edited": images[i]}
        about = (batch.edit_types[i], batch.instructions[i], batch.objects[i])
        for q in questions_for(*about, "short", has_other=True):
            seen = [critic.encode_images(pictures[name][None])[0] for name in q.looks_at]
            weight = 1.0 if q.kind == "edit" else identity_weight
            total = total - weight * torch.sigmoid(q.answer * critic.margin([q.text], [seen])).log().sum()
    return total / len(batch)


@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_is_that_of_the_written_out_loss(packed):
    frozen = parts(packed_questions=packed)
    batch = collate([scene(0), example(1), scene(2)])  # a removal between two scenes
    x0 = x0_of(frozen, 3).requires_grad_(True)
    (wanted,) = torch.autograd.grad(written_out(frozen, batch, x0, 0.6), x0)
    settings = CriticGradientSettings(critic_weight=0.5, identity_weight=0.6, ramp_updates=0)
    found = CriticGradient(settings, frozen)(batch, x0.detach(), 0)
    assert torch.allclose(found.gradient, 0.5 * wanted, atol=1e-6, rtol=1e-4)
    assert {"critic/p_yes/scene", "critic/p_yes/remove", "critic/p_identity"} <= found.metrics.keys()


def test_only_the_identity_question_sees_the_other_photo():
    frozen, batch = parts(), collate([scene(0), scene(2)])
    x0, moved = x0_of(frozen, 2), replace(batch, other_photos=batch.other_photos.flip(0))

    def gradient(given, identity_weight):
        settings = CriticGradientSettings(critic_weight=1.0, identity_weight=identity_weight, ramp_updates=0)
        return CriticGradient(settings, frozen)(given, x0, 0).gradient

    assert not torch.equal(gradient(batch, 1.0), gradient(moved, 1.0))
    assert torch.equal(gradient(batch, 0.0), gradient(moved, 0.0))
    own = replace(batch, other_photos=batch.references)
    assert torch.allclose(gradient(own, 1.0), gradient(replace(batch, other_photos=None), 1.0), atol=1e-7)


def test_a_step_trains_on_scenes():
    frozen = parts()
    step = np_edit.Step(np_edit.NpEditSettings(fake_updates=1, steps=8), frozen, frozen.family.trainable_net(), 1, 0)
    before = weights(step.learners["student"].net)
    logged = step.step([collate([scene(0), scene(1).as_identity_edit("do nothing")])], 0)
    assert not torch.equal(before, weights(step.learners["student"].net))
    assert logged["loss/critic_edit"] > 0 and logged["loss/critic_identity"] > 0
