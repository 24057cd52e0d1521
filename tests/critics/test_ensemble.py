"""Several critics as one: the mean of real members, each opened by its own name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from npedit.critics.base import answer_loss, vocabulary_loss
from npedit.critics.ensemble import Ensemble
from npedit.critics.llava_onevision import LlavaOnevision
from npedit.critics.smolvlm import SmolVLM
from npedit.errors import UserError
from npedit.questions import questions_for
from npedit.recipe.config import find_class, make_recipe
from npedit.steps.np_edit import NpEditSettings, Step
from tests.support.parts import batch, parts

LONG, SHORT = "was this edit done : paint the red circle blue ?", "is there a fence ?"
CPU = torch.device("cpu")


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def critic() -> Ensemble:
    return Ensemble.tiny(0)


@pytest.fixture(scope="module")
def listed(critic, tmp_path_factory):
    """A file that lists the members of `critic`, saved beside it."""
    place = tmp_path_factory.mktemp("ensemble")
    for member, name in zip(critic.members, "ab"):
        member.save(place / name)
    file = place / "critics.yaml"
    file.write_text(
        f"- {{name: llava_onevision, weights: {place / 'a'}, resolution: 32}}\n"
        f"- {{name: smolvlm, weights: {place / 'b'}}}\n"
    )
    return file


def member_margins(critic: Ensemble) -> Tensor:
    """Each member's last margins (members, b)."""
    return torch.stack([own[:, critic.yes] - own[:, critic.no] for own in critic.member_logits.values()])


def test_the_margin_is_the_members_mean(critic):
    a, b = critic.encode_images(images(2))
    asked, looks = [LONG, SHORT], [[a, b], [b]]
    each = []
    for member in (LlavaOnevision.tiny(0), SmolVLM.tiny(0)):
        c, d = member.encode_images(images(2))
        each.append(member.margin(asked, [[c, d], [d]]))
    torch.testing.assert_close(critic.margin(asked, looks), sum(each) / 2)
    torch.testing.assert_close(member_margins(critic), torch.stack(each))


def test_over_its_two_words_both_losses_are_one(critic):
    a, b = critic.encode_images(images(2))
    logits, answer = critic.logits([LONG, SHORT], [[a, b], [b]]), torch.tensor([1, -1])
    assert logits.shape == (2, 7) and (critic.yes, critic.no) == (0, 1)
    two_way = answer_loss(critic.margin([LONG, SHORT], [[a, b], [b]]), answer)
    torch.testing.assert_close(vocabulary_loss(logits[:, :2], answer, critic.yes, critic.no), two_way)


def test_gradient_is_the_members_mean(critic):
    pictures = images(2).requires_grad_()
    a, b = critic.encode_images(pictures)
    (ours,) = torch.autograd.grad(critic.margin([LONG], [[a, b]]).sum(), pictures)
    each = []
    for member in critic.members:
        seen = member.encode_images(pictures)
        each += torch.autograd.grad(member.margin([LONG], [seen]).sum(), pictures)
    torch.testing.assert_close(ours, sum(each) / 2)
    assert all(g.abs().sum() > 0 for g in each)


def test_a_reference_is_seen_once_without_gradient(critic):
    with torch.no_grad():
        (kept,) = critic.encode_images(images(1))
    edited = images(1, 1).requires_grad_()
    critic.margin([LONG], [[kept, *critic.encode_images(edited)]]).sum().backward()
    assert not any(t.requires_grad for t in kept) and edited.grad.abs().sum() > 0


def test_its_model_is_all_members(critic):
    ours = {id(p) for p in critic.model.parameters()}
    assert ours == {id(p) for member in critic.members for p in member.model.parameters()}
    assert not any(p.requires_grad for p in critic.model.parameters())


def test_it_opens_what_a_file_lists(critic, listed):
    loaded = Ensemble.load(listed, torch.float32, CPU)
    margins = []
    for one in (critic, loaded):
        one.margin([LONG], [one.encode_images(images(2))])
        margins.append(member_margins(one))
    torch.testing.assert_close(*margins, atol=1e-6, rtol=0)
    assert loaded.device == CPU
    assert loaded.generate_text([SHORT], [[images(1)[0]]], 3) == critic.members[0].generate_text(
        [SHORT], [[images(1)[0]]], 3
    )


def test_a_recipe_names_it_and_the_file(listed):
    recipe = make_recipe(
        {
            "name": "x", "family": {"name": "flux"}, "critic": {"name": "ensemble", "weights": str(listed)},
            "data": {"name": "toy"}, "stages": [{"step": "np_edit", "updates": 1, "batch_size": 1}],
        }
    )  # fmt: skip
    assert find_class("critics", recipe.critic.name) is Ensemble
    assert recipe.critic.folder() == str(listed)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("- {name: smolvlm, weight: x}", UserError, r"0.weight.*unknown key.*'weights'"),
        ("- {name: smolvln, weights: x}\n- {name: smolvln, weights: x}", UserError, "smolvlm"),
        ("name: smolvlm", UserError, "expected a list of critics.*dict"),
        ("- {", UserError, "expected YAML"),
        ("- {name: smolvlm, name: internvl, weights: x}", UserError, "each key once; got 'name'"),
        ("[]", ValueError, "two critics or more; got 0"),
    ],
)
def test_bad_lists_are_refused(tmp_path, text, error, says):
    (tmp_path / "critics.yaml").write_text(text)
    with pytest.raises(error, match=says):
        Ensemble.load(tmp_path / "critics.yaml", torch.float32, CPU)


def test_no_list_and_a_common_resolution_are_refused(tmp_path, listed):
    with pytest.raises(FileNotFoundError, match="YAML file that lists critics"):
        Ensemble.load(tmp_path, torch.float32, CPU)
    with pytest.raises(ValueError, match="each member has its own; got 32"):
        Ensemble.load(listed, torch.float32, CPU, 32)


def test_a_training_step_logs_what_each_member_says(critic):
    frozen = replace(parts(), critic=critic)
    step = Step(
        NpEditSettings(ramp_updates=0, dmd_weight=0), frozen, frozen.create_trainable("student", 0), updates=2, seed=0
    )
    given = [batch(0, 1, 2) for _ in range(step.batches_per_update(step.settings))]
    logged = step.step(given, 0)
    assert critic.names == ["0-LlavaOnevision", "1-SmolVLM"]
    for name in critic.names:
        wanted = [q.answer for kind, words, thing in zip(given[0].edit_types, given[0].instructions, given[0].objects)
                  for q in questions_for(kind, words, thing, frozen.wording)]  # fmt: skip
        own = critic.member_logits[name]
        said = ((own[:, 0] - own[:, 1]) * torch.tensor(wanted)).sigmoid().mean()
        assert logged[f"critic/p_of/{name}"] == pytest.approx(float(said))
    assert logged["critic/p_of/0-LlavaOnevision"] != logged["critic/p_of/1-SmolVLM"]
