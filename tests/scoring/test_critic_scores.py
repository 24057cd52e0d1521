"""A critic's verdict on finished edits: what it asks, how answers are joined, and that nothing flows back."""

from __future__ import annotations

import pytest
import torch

from npedit.critics.llava_onevision import LlavaOnevision
from npedit.questions import questions_for
from npedit.scoring.critic_scores import score_with_critic
from tests.support.parts import batch


@pytest.fixture(scope="module")
def critic() -> LlavaOnevision:
    return LlavaOnevision.tiny(0)


def test_critic_scores_are_the_probabilities_of_the_wanted_answers(critic: LlavaOnevision) -> None:
    given = batch(0, 1, 2, nothing=(2,))
    edited = given.references.flip(0)
    found = score_with_critic(critic, "short", given, edited)
    assert found.items == (0, 0, 1, 1, 2) and found.kinds == ("edit", "identity", "edit", "identity", "identity")
    wanted = []
    for i in range(3):
        for q in questions_for(given.edit_types[i], given.instructions[i], given.objects[i], "short"):
            see = {
                "reference": critic.encode_images(given.references[i : i + 1])[0],
                "edited": critic.encode_images(edited[i : i + 1])[0],
            }
            margin = critic.margin([q.text], [[see[n] for n in q.looks_at]])
            wanted.append((q.answer * margin).sigmoid())
    torch.testing.assert_close(found.p, torch.cat(wanted).detach(), atol=1e-5, rtol=1e-5)
    joint = torch.tensor([found.p[0] * found.p[1], found.p[2] * found.p[3], found.p[4]])
    torch.testing.assert_close(found.joint_probability(), joint)


def test_critic_scores_do_not_depend_on_the_chunk_and_pixels_are_clamped(critic: LlavaOnevision) -> None:
    given = batch(0, 1, 2)
    edited = 3 * given.references - 1
    edited.requires_grad_(True)
    found = score_with_critic(critic, "short", given, edited)
    again = score_with_critic(critic, "short", given, edited.detach().clamp(0, 1), chunk=2)
    torch.testing.assert_close(found.p, again.p, atol=1e-5, rtol=1e-5)
    assert found.items == again.items and not found.p.requires_grad


def test_logged_means_are_by_kind_and_edit_type(critic: LlavaOnevision) -> None:
    given = batch(0, 1, 2, nothing=(2,))
    found = score_with_critic(critic, "short", given, given.references)
    logged = found.mean_by_kind("judge", given.edit_types)
    assert set(logged) == {"judge/p_edit", "judge/p_identity", "judge/p_yes/recolour", "judge/p_yes/remove"}
    assert logged["judge/p_edit"] == pytest.approx(float((found.p[0] + found.p[2]) / 2))
    assert logged["judge/p_identity"] == pytest.approx(float((found.p[1] + found.p[3] + found.p[4]) / 3))
    assert logged["judge/p_yes/remove"] == pytest.approx(float(found.p[2]))
