"""The training step: what moves and what does not, the gradient written out, ablations, repeatability."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from npedit import dmd, flow
from npedit.critics.base import answer_loss
from npedit.errors import UserError
from npedit.generator import seeded_generator
from npedit.questions import WORDINGS, questions_for
from npedit.recipe.config import validate_settings
from npedit.steps import _distribution_matching, np_edit
from npedit.steps.base import Timers
from npedit.steps.np_edit import NpEditSettings, Step
from tests.support.parts import batch, nets, nudge, parts, trained, weights

WHOLE = {"critic_weight": 0.5, "fake_updates": 2, "ramp_updates": 0}


both = pytest.mark.parametrize("frozen", ["whole nets", "lora"], indirect=True)


@pytest.fixture
def frozen(request):
    """Parts that train whole nets; with `@both`, also some that train adapters of one base."""
    return parts(lora=getattr(request, "param", "") == "lora")


def make(frozen, seed: int = 0, **settings) -> Step:
    chosen = NpEditSettings(**{**WHOLE, **settings})
    return Step(chosen, frozen, frozen.create_trainable("student", seed), updates=10, seed=seed)


def batches(step: Step, accumulate: int = 1):
    count = accumulate * step.batches_per_update(step.settings)
    return [batch(i, i + 1, i + 2) for i in range(count)]


def watched(frozen, monkeypatch) -> list[tuple]:
    """(net, references, text, t) of every call of `family.velocity`."""
    calls, real = [], frozen.family.velocity

    def noted(net, x, t, text, references=()):
        calls.append((net, references, text, t))
        return real(net, x, t, text, references)

    monkeypatch.setattr(frozen.family, "velocity", noted)
    return calls


def still_noise(monkeypatch) -> None:
    """One noise for all items and levels, so that a batch can be compared with its parts."""

    def same(like: Tensor, count: int, generator: torch.Generator) -> list[Tensor]:
        one = torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(5)).to(like)
        return [one.expand(like.shape) for _ in range(count)]

    for module in (np_edit, _distribution_matching):
        monkeypatch.setattr(module, "sample_noise", same)


def student_gradient(step: Step, given, update: int = 0) -> list[Tensor]:
    """The gradient that one step would give the student; nothing is changed."""
    for learner in step.learners.values():
        learner.update = lambda losses: {}

    def collect(losses) -> dict[str, float]:
        for loss in losses:
            (loss() / len(losses)).backward()
        return {}

    step.learners["student"].update = collect
    step._update_fake_score = lambda *args: {}
    step.step(given, update)
    return [p.grad.clone() for p in trained(step.learners["student"].net)]


# ------------------------------------------------------------------------------------------------- gradient routing


@both
def test_one_step_moves_student_and_fake_and_nothing_else(frozen):
    step = make(frozen)
    fixed = {n: weights(net) for n, net in nets(frozen).items()}
    moving = {n: weights(learner.net) for n, learner in step.learners.items()}
    metrics = step.step(batches(step), 0)
    assert set(moving) == {"student", "fake"}
    for name, learner in step.learners.items():
        assert not torch.equal(weights(learner.net), moving[name]), name
        assert metrics[f"grad_norm/{name}"] > 0
    for name, net in nets(frozen).items():
        assert torch.equal(weights(net), fixed[name]), name
        own = [p for n, p in net.named_parameters() if ".lora_" not in n]
        assert all(p.grad is None and not p.requires_grad for p in own), name
        assert not net.training, name


@both
def test_each_update_moves_one_net(frozen):
    """The student moves in its own update only, the fake score in its own, in this order."""
    step, moved = make(frozen), []
    for name, learner in step.learners.items():

        def update(losses, name=name, real=learner.update):
            before = {n: weights(one.net) for n, one in step.learners.items()}
            result = real(losses)
            changed = [n for n, one in step.learners.items() if not torch.equal(weights(one.net), before[n])]
            with_gradient = [
                n for n, one in step.learners.items() if any(p.grad is not None for p in one.net.parameters())
            ]
            moved.append((name, changed, with_gradient))
            return result

        learner.update = update
    step.step(batches(step), 0)
    assert moved == [("student", ["student"], [])] + [("fake", ["fake"], [])] * 2


@both
@pytest.mark.parametrize("weight", ["critic_weight", "dmd_weight", "copy_weight"])
def test_each_loss_alone_reaches_the_student(frozen, weight):
    off = {"critic_weight": 0.0, "dmd_weight": 0.0, "copy_weight": 0.0}
    step = make(frozen, **(off | {weight: 1.0}))
    before = weights(step.learners["student"].net)
    metrics = step.step([batch(0, 1, nothing=(1,)) for _ in batches(step)], 0)
    assert metrics["grad_norm/student"] > 0
    assert not torch.equal(weights(step.learners["student"].net), before)
    named = {"critic_weight": "loss/critic_edit", "dmd_weight": "loss/dmd", "copy_weight": "loss/copy"}
    assert {k for k in named if named[k] in metrics} == {weight}


@both
def test_without_any_loss_the_student_stands_still(frozen):
    step = make(frozen, critic_weight=0.0, dmd_weight=0.0, copy_weight=0.0)
    before = weights(step.learners["student"].net)
    assert step.step(batches(step), 0)["grad_norm/student"] == 0
    assert torch.equal(weights(step.learners["student"].net), before)


# ------------------------------------------------------------------------------------------- the loss, written out


def written_out(step: Step, given, update: int) -> Tensor:
    """The whole loss of one student update as one differentiable scalar, from the formulas and the same random
    numbers."""
    s, family, critic = step.settings, step.parts.family, step.parts.critic
    student, fake, teacher = step.learners["student"].net, step.learners["fake"].net, family.base
    b, generator = len(given), seeded_generator(step.seed, "student", update, 0)
    references = family.encode(given.references)
    k = int(torch.randint(4, (), generator=seeded_generator(step.seed, "times", update)))
    schedule = flow.few_step_times(4, family.noise_shift(16, 16)).tolist()
    x0, words = None, family.encode_text(given.instructions)
    for time in schedule[:1] + ([schedule[k]] if k else []):
        noise = torch.randn(references.shape, generator=generator)
        x = noise if x0 is None else (1 - time) * x0 + time * noise
        x0 = x - time * family.velocity(student, x, torch.full((b,), time), words, (references,))

    t = s.t_min + (s.t_max - s.t_min) * torch.rand(b, generator=generator)
    column, eps = t.view(-1, 1, 1, 1), torch.randn(references.shape, generator=generator)
    with torch.no_grad():
        x = (1 - column) * x0 + column * eps
        wanted, blank = family.encode_text(given.target_captions), family.encode_negative_text([s.negative_prompt] * b)
        guesses = [
            x - column * family.velocity(n, x, t, w) for n, w in ((fake, wanted), (teacher, wanted), (teacher, blank))
        ]
        scale = torch.tensor([s.guidance_by_type.get(k, s.guidance) for k in given.edit_types]).view(-1, 1, 1, 1)
        real = guesses[2] + scale * (guesses[1] - guesses[2])
        g = (guesses[0] - real) / (x0 - real).abs().mean((1, 2, 3), keepdim=True)
        aim = x0 - g
    total = s.dmd_weight * 0.5 * F.mse_loss(x0, aim)

    images, ramp = family.decode(x0), s.ramp_from + (1 - s.ramp_from) * min(1, update / s.ramp_updates)
    for i in range(b):
        pictures = {"reference": given.references[i], "edited": images[i]}
        for q in questions_for(given.edit_types[i], given.instructions[i], given.objects[i], "short"):
            seen = [critic.encode_images(pictures[name][None])[0] for name in q.looks_at]
            p = torch.sigmoid(q.answer * ramp * critic.margin([q.text], [seen]))
            total = total - s.critic_weight * (1.0 if q.kind == "edit" else s.identity_weight) * p.log().sum() / b
        if given.edit_types[i] == "nothing":
            total = total + s.copy_weight * (x0[i] - references[i]).square().mean() / b
    return total


@both
@pytest.mark.parametrize("update", [0, 1, 3])
def test_the_students_gradient_is_that_of_the_written_out_loss(frozen, update, monkeypatch):
    encode = frozen.family.encode_text  # a family may encode negative prompts in another way, as Sana does
    monkeypatch.setattr(frozen.family, "encode_negative_text", lambda texts: encode([f"not {t}" for t in texts]))
    step = make(frozen, critic_weight=0.7, dmd_weight=0.8, copy_weight=0.3, identity_weight=0.6, ramp_updates=5,
                guidance=2.0, guidance_by_type={"remove": 6.0}, negative_prompt="low quality")  # fmt: skip
    given = batch(0, 1, 2, 3, nothing=(2,))
    for number, learner in enumerate(step.learners.values()):  # student, fake and teacher are three
        nudge(learner.net, number)
    wanted = torch.autograd.grad(written_out(step, given, update), trained(step.learners["student"].net))
    ours = student_gradient(step, [given] * 2, update)
    size = torch.stack([w.norm() for w in wanted]).norm()
    assert size > 1e-4
    for a, b in zip(ours, wanted):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(size))


def test_both_unrollings_are_met(frozen):
    """The updates above draw different transitions, the first call alone among them."""
    lengths = {int(torch.randint(4, (), generator=seeded_generator(0, "times", u))) for u in (0, 1, 3, 4, 5, 6)}
    assert len(lengths) >= 3


def test_the_vocabulary_loss_is_used_when_asked_for(frozen):
    given, gradients = batch(0, 1), []
    x0 = frozen.family.encode(given.references)
    for answer in ("two_way", "vocabulary"):
        step = make(frozen, answer=answer, dmd_weight=0.0)
        gradient, metrics = step._gradient_at_x0(given, x0, x0, 0, seeded_generator("g"), Timers())
        gradients.append((gradient, metrics["loss/critic_edit"]))
    assert gradients[1][1] > gradients[0][1]  # the other words take probability
    assert not torch.allclose(gradients[0][0], gradients[1][0], rtol=0.1)


# --------------------------------------------------------------------------------------------------------- the critic


def test_a_constant_margin_gives_no_gradient(frozen):
    """Upside down: a critic that does not look at the image cannot teach."""
    with torch.no_grad():
        frozen.critic.model.model.multi_modal_projector.linear_2.weight.zero_()
    given = batch(0, 1, 2)
    x0 = frozen.family.encode(given.references)
    step = make(frozen, dmd_weight=0.0)
    gradient, metrics = step._gradient_at_x0(given, x0, x0 + 0.1, 0, seeded_generator("g"), Timers())
    assert metrics["grad_norm/from_critic"] == 0 and not gradient.any()
    assert metrics["loss/critic_edit"] > 0
    with_eyes = make(parts(), dmd_weight=0.0)
    assert (
        with_eyes._gradient_at_x0(given, x0, x0 + 0.1, 0, seeded_generator("g"), Timers())[1]["grad_norm/from_critic"]
        > 1e-6
    )


def test_do_nothing_items_get_the_identity_question_alone(frozen, monkeypatch):
    """Fault 3: the edit question, the removal question and the edited caption would all contradict the copy loss."""
    step, given = make(frozen), batch(0, 1, nothing=(1,))  # item 1 would be a removal
    asked, prompts = [], []
    real, real_text = frozen.critic.logits, frozen.family.encode_text
    monkeypatch.setattr(
        frozen.critic, "logits", lambda q, seen, packed, answers: asked.extend(zip(q, map(len, seen))) or real(q, seen)
    )
    monkeypatch.setattr(frozen.family, "encode_text", lambda p: prompts.append(tuple(p)) or real_text(p))
    metrics = step.step([given] * 2, 0)
    short = WORDINGS["short"]
    words = {"instruction": "paint the circle red"}
    assert asked == [(short["edit"].format(**words), 2), (short["identity"].format(**words), 2), (short["same"], 2)]
    assert ("a red circle", "a dog by a fence") in prompts  # DMD: the source's caption for the second
    assert all("a fence" not in p for p in prompts)
    assert metrics["loss/copy"] > 0


def test_the_removal_question_looks_at_the_edit_alone(frozen, monkeypatch):
    step, given, looks = make(frozen, dmd_weight=0.0), batch(1), []
    real, real_encode = frozen.critic.logits, frozen.critic.encode_images
    seen_images = []
    monkeypatch.setattr(
        frozen.critic, "encode_images", lambda images: seen_images.append(real_encode(images)) or seen_images[-1]
    )
    monkeypatch.setattr(frozen.critic, "logits", lambda q, seen, packed, answers: looks.extend(seen) or real(q, seen))
    step.step([given], 0)
    reference, edited = seen_images[0][0], seen_images[1][0]
    assert [len(s) for s in looks] == [1, 2]
    assert looks[0][0] is edited and looks[1][0] is reference and looks[1][1] is edited
    assert not reference.requires_grad


def test_the_copy_loss_is_for_do_nothing_items_only(frozen):
    given = batch(0, 1, 2, nothing=(1,))
    references = frozen.family.encode(given.references)
    step = make(frozen, critic_weight=0.0, dmd_weight=0.0, copy_weight=2.0)
    x0 = references + 1
    gradient, metrics = step._gradient_at_x0(given, references, x0, 0, seeded_generator("g"), Timers())
    assert not gradient[0].any() and not gradient[2].any()
    torch.testing.assert_close(gradient[1], torch.full_like(gradient[1], 2.0 * 2 / references.numel()))
    assert metrics["loss/copy"] == pytest.approx(1)
    assert (
        "loss/copy"
        not in step._gradient_at_x0(batch(0, 2), references[:2], x0[:2], 0, seeded_generator("g"), Timers())[1]
    )


def test_logged_answers_are_those_of_the_critic(frozen):
    given = batch(0, 1, 2)
    x0 = frozen.family.encode(given.references)
    step = make(frozen, dmd_weight=0.0)
    _, metrics = step._gradient_at_x0(given, x0, x0, 0, seeded_generator("g"), Timers())
    images, critic = frozen.family.decode(x0), frozen.critic
    margins = {}
    for i, kind in enumerate(given.edit_types):
        for q in questions_for(kind, given.instructions[i], given.objects[i], "short"):
            pictures = {"reference": given.references[i], "edited": images[i]}
            seen = [critic.encode_images(pictures[n][None])[0] for n in q.looks_at]
            margins[kind, q.kind] = (float(critic.margin([q.text], [seen])), q.answer)
    for kind in given.edit_types:
        margin, answer = margins[kind, "edit"]
        assert metrics[f"critic/p_yes/{kind}"] == pytest.approx(
            float(torch.sigmoid(torch.tensor(answer * margin))), abs=1e-5
        )
    for kind in ("edit", "identity"):
        values = [
            float(answer_loss(torch.tensor(m), torch.tensor(a))) for (_, k), (m, a) in margins.items() if k == kind
        ]
        assert metrics[f"loss/critic_{kind}"] == pytest.approx(sum(values) / 3, rel=1e-4)


def test_the_critics_logits_start_soft(frozen):
    given = batch(0, 1)
    x0 = frozen.family.encode(given.references)
    step, seen = make(frozen, dmd_weight=0.0, ramp_from=0.2, ramp_updates=10), {}
    for update in (0, 5, 10, 1000):
        _, metrics = step._gradient_at_x0(given, x0, x0, update, seeded_generator("g"), Timers())
        seen[update] = (metrics["critic/inverse_temperature"], metrics["grad_norm/from_critic"])
    assert [seen[u][0] for u in (0, 5, 10, 1000)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    assert seen[0][1] < 0.4 * seen[10][1]
    at_once = make(frozen, dmd_weight=0.0, ramp_updates=0)
    assert (
        at_once._gradient_at_x0(given, x0, x0, 0, seeded_generator("g"), Timers())[1]["critic/inverse_temperature"] == 1
    )


# ----------------------------------------------------------------------------------------------------------- the DMD


@both
def test_teacher_and_fake_see_the_caption_and_no_reference(frozen, monkeypatch):
    step = make(frozen, fake_updates=1)
    calls = watched(frozen, monkeypatch)
    given = batch(0, 1)
    step.step([given], 2)
    student, fake, teacher = step.learners["student"].net, step.learners["fake"].net, frozen.family.base
    assert {id(net) for net, *_ in calls} == {id(student), id(fake), id(teacher)}
    for net, references, _, _ in calls:
        assert len(references) == (1 if net is student else 0)
    caption, blank = (frozen.family.encode_text(words).parts[0] for words in (given.target_captions, ("", "")))
    scoring = [(net, text.parts[0]) for net, _, text, _ in calls if net is not student]
    assert [net for net, _ in scoring] == [fake, teacher, teacher, fake]  # the last is the fake score's own lesson
    for (_, seen), wanted in zip(scoring, (caption, caption, blank, caption)):
        assert torch.equal(seen, wanted)


@both
def test_the_first_fake_update_takes_the_students_own_draft(frozen, monkeypatch):
    """The second takes a draft of a further batch; both unroll the same transitions in one update."""
    step, taught, made = make(frozen), [], []
    calls, real, generate = watched(frozen, monkeypatch), dmd.fake_score_loss, step._generate
    monkeypatch.setattr(dmd, "fake_score_loss", lambda v, x0, eps: taught.append(x0) or real(v, x0, eps))
    step._generate = lambda *given: made.append(generate(*given)) or made[-1]
    step.step(batches(step), 2)
    assert len(made) == len(taught) == 2
    for draft, lesson in zip(made, taught):
        assert torch.equal(draft.detach(), lesson) and not lesson.requires_grad
    times = [float(t[0]) for net, _, _, t in calls if net is step.learners["student"].net]
    assert times[: len(times) // 2] == times[len(times) // 2 :]


def test_guidance_follows_the_edit_type(frozen, monkeypatch):
    step, scales, real = make(frozen, guidance=2.0, guidance_by_type={"remove": 7.5}), [], dmd.classifier_free_guidance
    monkeypatch.setattr(dmd, "classifier_free_guidance", lambda c, u, scale: scales.append(scale) or real(c, u, scale))
    step.step(batches(step), 0)
    assert scales[0].tolist() == [2.0, 7.5, 2.0]  # recolour, remove, add


def test_dmd_times_stay_in_their_range(frozen, monkeypatch):
    step = make(frozen, t_min=0.4, t_max=0.5, critic_weight=0.0)
    calls = watched(frozen, monkeypatch)
    for update in range(3):
        step.step(batches(step), update)
    times = torch.cat([t for net, _, _, t in calls if net is frozen.family.base])
    assert 0.4 <= float(times.min()) < float(times.max()) <= 0.5
    assert len(times.unique()) == 9  # one an item and an update, shared by the teacher's two calls


# --------------------------------------------------------------------------------------------------------- ablations


def test_without_dmd_there_is_no_fake_score(frozen, monkeypatch):
    step = make(frozen, dmd_weight=0.0)
    assert set(step.learners) == {"student"}
    assert Step.batches_per_update(step.settings) == 1
    assert Step.requirements(step.settings) == {"critic"}
    calls = watched(frozen, monkeypatch)
    metrics = step.step([batch(0, 1)], 0)
    assert all(net is step.learners["student"].net for net, *_ in calls)
    assert "loss/dmd" not in metrics and "loss/fake" not in metrics and metrics["grad_norm/from_dmd"] == 0


def test_without_critic_none_is_needed():
    step = make(parts(critic=False), critic_weight=0.0)
    assert Step.requirements(step.settings) == {"target_caption"}
    metrics = step.step(batches(step), 0)
    assert metrics["grad_norm/from_critic"] == 0 and metrics["grad_norm/from_dmd"] > 0
    assert not [k for k in metrics if k.startswith(("critic/", "loss/critic"))]


def test_without_identity_weight_only_the_edit_is_asked(frozen, monkeypatch):
    step, asked, real = make(frozen, identity_weight=0.0, dmd_weight=0.0), [], frozen.critic.logits
    monkeypatch.setattr(frozen.critic, "logits", lambda q, seen, packed, answers: asked.extend(q) or real(q, seen))
    metrics = step.step([batch(0, 1, 2, nothing=(2,))], 0)
    assert asked == [
        WORDINGS["short"]["edit"].format(instruction="paint the circle red"),
        WORDINGS["short"]["presence"].format(object="dog"),
    ]
    assert "loss/critic_identity" not in metrics
    alone = step.step([batch(2, nothing=(2,))], 1)  # then nothing at all is asked
    assert alone["grad_norm/from_critic"] == 0 and alone["loss/copy"] > 0


def test_needs_and_batches_of_the_whole_method():
    settings = NpEditSettings(fake_updates=5)
    assert Step.requirements(settings) == {"critic", "target_caption"}
    assert Step.batches_per_update(settings) == 5


@pytest.mark.parametrize(
    "wrong",
    [{"critic_weight": -1}, {"t_min": 0.0}, {"t_max": 1.0}, {"ramp_from": 0}, {"fake_updates": 0}, {"answer": "yes"},
     {"dmd_wieght": 1}, {"steps": 0}, {"t_min": 0.9, "t_max": 0.5}, {"guidance_by_type": {"remov": 7.5}}],
)  # fmt: skip
def test_settings_out_of_range(wrong):
    with pytest.raises(UserError):
        validate_settings(NpEditSettings, wrong, "stages.0.settings")


# ------------------------------------------------------------------------------------- batches and accumulation


def test_a_batch_of_three_is_its_items_one_by_one(frozen, monkeypatch):
    """Faults 14 and 15: mixed edit types, one-image and two-image questions, guidance by type, a "do nothing" among
    them."""
    still_noise(monkeypatch)
    step = make(frozen, t_min=0.5, t_max=0.5, guidance_by_type={"remove": 6.0})
    given = batch(0, 1, 2, nothing=(2,))
    x0 = frozen.family.encode(given.references) + 0.2 * torch.randn(3, 4, 4, 4, generator=seeded_generator("away"))
    references = frozen.family.encode(given.references)
    together, _ = step._gradient_at_x0(given, references, x0, 0, seeded_generator("g"), Timers())
    for i in range(3):
        one = batch(i, nothing=(2,))
        alone, _ = step._gradient_at_x0(one, references[i : i + 1], x0[i : i + 1], 0, seeded_generator("g"), Timers())
        assert alone.norm() > 1e-5
        torch.testing.assert_close(3 * together[i], alone[0], rtol=1e-3, atol=1e-4 * float(alone.abs().max()))


def test_four_at_once_are_two_and_two(frozen, monkeypatch):
    still_noise(monkeypatch)
    found = []
    for sizes in ([(0, 1, 2, 3)], [(0, 1), (2, 3)]):
        step = make(frozen, t_min=0.5, t_max=0.5, fake_updates=1)
        given = [batch(*numbers, nothing=(3,)) for numbers in sizes]
        found.append(student_gradient(step, given))
    size = torch.stack([g.norm() for g in found[0]]).norm()
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(size))


@both
def test_accumulation_gives_every_batch_one_place(frozen):
    """Each update of each net takes `accumulate` batches, and no batch serves twice."""
    step, given, used, taken = make(frozen), [batch(i) for i in range(4)], [], []
    for name, learner in step.learners.items():

        def update(losses, name=name, real=learner.update):
            used.append((name, len(losses)))
            return real(losses)

        learner.update = update
    real = step._generate
    step._generate = lambda one, *rest: taken.append(one) or real(one, *rest)
    step.step(given, 0)
    assert used == [("student", 2), ("fake", 2), ("fake", 2)]
    assert sorted(map(id, taken)) == sorted(map(id, given))


def test_the_fakes_schedule_ends_with_the_run(frozen):
    """Fault 12: the fake score is updated several times a step, so its schedule must be as much longer."""
    cosine = {"lr": 1e-3, "decay": "cosine"}
    step = make(frozen, student=cosine, fake=cosine, critic_weight=0.0, fake_updates=2)  # ten updates in all
    given, rates = [batch(0)] * 3, []
    for update in range(10):
        metrics = step.step(given, update)
        rates.append((metrics["lr/student"], metrics["lr/fake"]))
    assert step.learners["student"].learning_rate() == pytest.approx(0, abs=1e-9)
    assert step.learners["fake"].learning_rate() == pytest.approx(0, abs=1e-9)
    for student, fake in rates:
        assert fake == pytest.approx(student, abs=1e-4) and fake > 0


# ----------------------------------------------------------------------------------------------------- repeatability


def run(seed: int = 0, updates: int = 2, noise: int = 0, **settings) -> Step:
    torch.manual_seed(noise)
    step = make(parts(), seed, **settings)
    for update in range(updates):
        torch.manual_seed(noise + update)  # the global stream must not matter
        step.step(batches(step), update)
    return step


def test_equal_seeds_give_equal_weights_bit_for_bit():
    a, b, c = run(noise=1, balance="match"), run(noise=2, balance="match"), run(seed=1, balance="match")
    for name in ("student", "fake"):
        assert torch.equal(weights(a.learners[name].net), weights(b.learners[name].net))
        assert not torch.equal(weights(a.learners[name].net), weights(c.learners[name].net))


def test_a_step_goes_on_bit_for_bit_from_its_saved_state():
    whole, first = run(updates=2, balance="match"), run(updates=1, balance="match")
    state = {
        n: ({k: v.clone() for k, v in t.items()}, m)
        for n, (t, m) in ((n, s.state()) for n, s in first.learners.items())
    }
    extra = copy.deepcopy(first.extra_state())
    second = make(parts(), 0, balance="match")
    for name, (tensors, numbers) in state.items():
        second.learners[name].load_state(tensors, numbers)
    second.load_extra_state(extra)
    second.step(batches(second), 1)
    for name in ("student", "fake"):
        assert torch.equal(weights(whole.learners[name].net), weights(second.learners[name].net))
    assert torch.equal(whole.extra_state()["sizes"], second.extra_state()["sizes"])


def test_everything_logged_is_a_number(frozen):
    step = make(frozen, balance="match")
    metrics = step.step([batch(0, 1, 2, nothing=(2,)) for _ in batches(step)], 0)
    wanted = {
        "loss/critic_edit", "loss/critic_identity", "loss/dmd", "loss/fake", "loss/copy", "grad_norm/student",
        "grad_norm/fake", "grad_norm/from_critic", "grad_norm/from_dmd", "critic/p_yes/recolour", "critic/p_yes/remove",
        "critic/inverse_temperature", "time/fake", "time/student",
    }  # fmt: skip
    assert wanted <= set(metrics)
    assert all(isinstance(v, float) and v == v for v in metrics.values()), metrics
