"""Bootstrap Your Generator: losses written out, the routed gradient, a perfect inverse, what moves, repeatability."""

from __future__ import annotations

from weakref import WeakSet

import pytest
import torch
from torch import Tensor

from npedit import flow
from npedit.data import PairedBatch
from npedit.errors import UserError
from npedit.families.base import EncodedText
from npedit.generator import sample_noise, seeded_generator
from npedit.recipe.config import validate_settings
from npedit.steps import np_edit, np_edit_bootstrap
from npedit.steps._bootstrap_losses import direction_cosine, prior_loss, straight_through
from npedit.steps.bootstrap import BootstrapSettings, Step
from tests.support.parts import batch, nets, nudge, parts, weights

both = pytest.mark.parametrize("frozen", ["whole nets", "lora"], indirect=True)
SHAPE = (3, 4, 2, 2)


@pytest.fixture
def frozen(request):
    return parts(critic=False, lora=getattr(request, "param", "") == "lora")


def make(frozen, seed: int = 0, **settings) -> Step:
    return Step(BootstrapSettings(**settings), frozen, frozen.create_trainable("student", seed), 10, seed)


def random(*names: str) -> list[Tensor]:
    return [torch.randn(SHAPE, generator=seeded_generator(name), dtype=torch.float64).float() for name in names]


def test_the_gradient_of_the_prior_is_that_of_the_formula():
    """For a velocity that is linear in a weight, v = w z: dL/dw is the sum of z dL/dv, with
    dL/dv = -(e - cos d / |d|) / |d| + 2 a (v - target) / n, d = v - source, e the unit vector of target - source."""
    z, source, target = random("z", "source", "target")
    w = torch.tensor(0.8, requires_grad=True)
    (found,) = torch.autograd.grad(prior_loss(w * z, source, target, 0.3).sum(), w)
    v = 0.8 * z
    d, e = (v - source).flatten(1), (target - source).flatten(1)
    size, e = d.norm(dim=1, keepdim=True), e / e.norm(dim=1, keepdim=True)
    cos = (d * e).sum(1, keepdim=True) / size
    wanted = -(e - cos * d / size) / size + 0.3 * 2 * (v - target).flatten(1) / d.shape[1]
    torch.testing.assert_close(found, (wanted * z.flatten(1)).sum(), rtol=1e-5, atol=1e-6)


def test_the_prior_is_zero_on_the_target_and_largest_against_it():
    source, target = random("source", "target")
    torch.testing.assert_close(prior_loss(target, source, target, 0.5), torch.zeros(3))
    torch.testing.assert_close(prior_loss(2 * source - target, source, target, 0.0), torch.full((3,), 2.0))
    torch.testing.assert_close(direction_cosine(source + 0.1 * (target - source), source, target), torch.ones(3))


def test_the_gradient_is_routed_past_the_value():
    value, other, weight = random("value", "other", "weight")
    value, other = value.requires_grad_(), other.requires_grad_()
    found = straight_through(value, other)
    torch.testing.assert_close(found, value)
    (found * weight).sum().backward()
    assert value.grad is None and torch.equal(other.grad, weight)


def written_out(step: Step, given, update: int) -> dict[str, float]:
    """The losses of a first update, in which EMA and newest weights are equal; and in which the state is made again."""
    family, net, s = step.parts.family, step.learners["student"].net, step.settings
    reference, text = family.encode(given.references), family.encode_text
    schedule = flow.few_step_times(s.steps, family.noise_shift(16, 16))
    stream, rows = seeded_generator(0, "rollout", update, 0), len(given)
    k = torch.randint(s.steps, (rows,), generator=stream)
    x0, states = torch.zeros_like(reference), []
    for time, eps in zip(schedule, sample_noise(reference, s.steps, stream)):
        states.append((1 - time) * x0 + time * eps)
        v = family.velocity(net, states[-1], time.expand(rows), text(given.instructions), (reference,))
        x0 = states[-1] - time * v
    x = torch.stack([states[int(n)][i] for i, n in enumerate(k)])
    stream = seeded_generator(0, "bootstrap", update, 0)
    t = schedule[torch.randint(s.steps, (rows,), generator=stream)]
    (eps,) = sample_noise(reference, 1, stream)
    noisy = (1 - t.view(-1, 1, 1, 1)) * reference + t.view(-1, 1, 1, 1) * eps
    back_text = text([f"change the picture to {caption}" for caption in given.source_captions])
    v = family.velocity(net, x, schedule[k], text(given.instructions), (reference,))
    back = family.velocity(net, noisy, t, back_text, (x0,))
    same = family.velocity(net, noisy, t, back_text, (reference,))
    base = [
        [family.velocity(family.base, *state, text(c)) for c in (given.source_captions, given.target_captions)]
        for state in ((x, schedule[k]), (noisy, t))
    ]
    return {
        "loss/prior": float(prior_loss(v, *base[0], 0.1).mean()),
        "loss/prior_reverse": float(prior_loss(back, *base[1][::-1], 0.1).mean()),
        "loss/cycle": float((back - (eps - reference)).square().mean()),
        "loss/identity": 0.2 * float((same - (eps - reference)).square().mean()),
    }


@both
@pytest.mark.parametrize("update", [0, 3])
def test_the_losses_are_the_written_out_ones(frozen, update: int):
    step, given = make(frozen, student={"ema": 0.0}), batch(0, 1, 2)
    nudge(step.learners["student"].net)
    with torch.no_grad():
        wanted = written_out(step, given, update)
    logged = step.step([given], update)
    assert {k: v for k, v in logged.items() if k.startswith("loss/")} == pytest.approx(wanted, rel=1e-4)


def test_the_cycle_is_closed_by_a_perfect_inverse(frozen, monkeypatch):
    """An edit that adds a number, and a reverse edit that takes it away again: the cycle's loss is zero. With another
    number on the way back it is the mean of (difference / t)^2."""
    step, given = make(frozen), batch(0, 1, 2)
    added = {"back": 0.5}

    def velocity(net, x, t, text, references=()):
        wanted = references[0] + text.parts[0] if references else torch.zeros_like(x)
        return (x - wanted) / t.view(-1, 1, 1, 1)

    def encode(texts):
        change = -added["back"] if texts[0].startswith("change the picture to") else 0.5
        return EncodedText((torch.full((len(texts), 1, 1, 1), change),))

    monkeypatch.setattr(frozen.family, "velocity", velocity)
    monkeypatch.setattr(type(frozen), "encode_text", lambda self, texts: encode(texts))
    net = step.learners["student"].net
    with step.losses.with_rollouts(step.learners["student"], [given], 0):
        torch.testing.assert_close(step.losses.rollouts[0].x0, frozen.encode_images(given.references) + 0.5)
        _, logged = step.losses.loss(net, given, 0, 0)
        assert logged["loss/cycle"] == pytest.approx(0, abs=1e-9)
        added["back"] = 0.7
        _, logged = step.losses.loss(net, given, 0, 0)
    stream = seeded_generator(0, "bootstrap", 0, 0)
    t = flow.few_step_times(4, frozen.family.noise_shift(16, 16))[torch.randint(4, (3,), generator=stream)]
    assert logged["loss/cycle"] == pytest.approx(float((0.2 / t).square().mean()), rel=1e-4)


def test_the_cycle_reaches_the_student_through_the_routed_edit(frozen):
    """With the gradient cut at the edit, the student's gradient is another."""
    found = []
    for is_cut in (False, True):
        step, given = make(parts(critic=False), prior_weight=0, identity_weight=0), batch(0, 1)
        nudge(step.learners["student"].net)
        family, real = step.parts.family, step.parts.family.velocity

        def velocity(net, x, t, text, references=(), real=real, is_cut=is_cut):
            return real(net, x, t, text, tuple(r.detach() for r in references) if is_cut else references)

        vars(family)["velocity"] = velocity
        found.append(step.step([given], 0)["grad_norm/student"])
    assert found[0] != pytest.approx(found[1], rel=1e-4)


@both
def test_only_the_student_moves_and_the_loss_falls(frozen):
    step = make(frozen, student={"lr": 4e-3 if frozen.lora is None else 2e-2}, steps=2)
    fixed = {n: weights(net) for n, net in nets(frozen).items()}
    given = batch(0, 1, 2, 3)
    logged = [step.step([given], update) for update in range(30)]
    totals = [sum(v for k, v in row.items() if k.startswith("loss/")) for row in logged]
    assert set(step.learners) == {"student"} and sum(totals[-5:]) < 0.95 * sum(totals[:5])
    for name, net in nets(frozen).items():
        assert torch.equal(weights(net), fixed[name]), name


def test_an_item_with_equal_captions_has_no_prior(frozen):
    """Its own instruction is then the text of the identity loss."""
    step = make(frozen, cycle_weight=0)
    logged = step.step([batch(0, 1, nothing=(0, 1))], 0)
    assert logged["loss/prior"] == logged["loss/prior_reverse"] == 0
    assert all(value == value for value in logged.values())
    assert step.settings.identity_instructions(batch(0, 1, nothing=(0,))) == [
        "do nothing", "change the picture to a dog by a fence",
    ]  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"steps": 2}, {"prior_weight": 0}, {"identity_weight": 0, "steps": 1}])
def test_passes_per_update_are_those_that_are_made(frozen, settings: dict):
    step, made, real = make(frozen, **settings), [], frozen.family.velocity

    def counted(net, x, *given):
        made.append(len(x))
        return real(net, x, *given)

    vars(frozen.family)["velocity"] = counted
    step.step([batch(0, 1)], 0)
    assert (sum(made), 0) == Step.passes_per_update(step.settings, 2)


def test_edited_images_are_not_looked_at():
    found = []
    for edited in (None, torch.full((2, 3, 16, 16), torch.nan)):
        step, given = make(parts(critic=False)), batch(0, 1)
        step.step([given if edited is None else PairedBatch(**vars(given), edited=edited)], 0)
        found.append(weights(step.learners["student"].net))
    assert torch.equal(*found)
    assert Step.requirements(BootstrapSettings()) == {"source_caption", "target_caption"}


def test_the_rollout_is_the_ema_copys(frozen):
    step, given = make(frozen, student={"lr": 1e-2, "ema": 0.9}), batch(0, 1)
    step.step([given], 0)
    learner = step.learners["student"]
    newest = step.losses.roll_out(learner.net, given, 1, 0)
    with learner.use_ema_weights():
        wanted = step.losses.roll_out(learner.net, given, 1, 0)
    with step.losses.with_rollouts(learner, [given], 1):
        assert torch.equal(step.losses.rollouts[0].x0, wanted.x0)
    assert not torch.allclose(newest.x0, wanted.x0) and not step.losses.rollouts


@both
def test_a_step_goes_on_bit_for_bit_from_its_saved_state(frozen):
    lora = frozen.lora is not None
    whole, first, second = (make(parts(critic=False, lora=lora), steps=2) for _ in range(3))
    for update in range(2):
        torch.manual_seed(update)  # the global stream must not matter
        whole.step([batch(0, 1), batch(2, 3)], update)
    first.step([batch(0, 1), batch(2, 3)], 0)
    tensors, numbers = first.learners["student"].state()
    second.learners["student"].load_state({k: v.clone() for k, v in tensors.items()}, numbers)
    second.step([batch(0, 1), batch(2, 3)], 1)
    states = [step.learners["student"].state()[0] for step in (whole, second)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@both
def test_offloading_changes_nothing(frozen):
    found = []
    for memory in ({}, {"offload": True}):
        step = make(parts(critic=False, lora=frozen.lora is not None, **memory), steps=2)
        step.step([batch(0, 1)], 0)
        found.append(torch.cat([p.detach().flatten() for p in step.learners["student"].net.parameters()]))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"prior_weight": -1}, {"reverse_instruction": "undo it"},
     {"reverse_instruction": "{source_caption} {edit}"}, {"student": {"lr": -1}}],
)  # fmt: skip
def test_settings_out_of_range(wrong: dict):
    with pytest.raises(UserError):
        validate_settings(BootstrapSettings, wrong, "stages.0.settings")


NO_LOSS = {"critic_weight": 0.0, "dmd_weight": 0.0}  # of NP-Edit but the copy loss


def student_gradient(module, **settings) -> Tensor:
    """The student's gradient in the step of `module`, with the copy loss alone beside these settings."""
    frozen, found = parts(critic=False), []
    chosen = module.Step.Settings(**NO_LOSS, **settings)
    step = module.Step(chosen, frozen, frozen.create_trainable("student", 0), 10, 0)
    net = step.learners["student"].net
    nudge(net)

    def collect(losses) -> dict[str, float]:
        for loss in losses:
            (loss() / len(losses)).backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
        return {}

    step.learners["student"].update = collect
    step.step([batch(0, 1, nothing=(1,))], 0)
    return found[0]


def test_np_edit_gets_the_losses_added_with_their_weight():
    without = student_gradient(np_edit)
    one, two = (student_gradient(np_edit_bootstrap, bootstrap_weight=weight) for weight in (1.0, 2.0))
    assert not torch.allclose(without, one)
    torch.testing.assert_close(two - without, 2 * (one - without), rtol=1e-3, atol=1e-5)


def test_one_loss_at_a_time_has_its_graph_in_memory():
    """No tensor that a backward pass needs is alive when the next loss begins, also with accumulation."""

    class Saved:
        def __init__(self, tensor: Tensor):
            self.tensor = tensor

    alive, at_start = WeakSet[Saved](), []

    def keep(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    frozen = parts(critic=False)
    step = np_edit_bootstrap.Step(
        np_edit_bootstrap.NpEditBootstrapSettings(**NO_LOSS), frozen, frozen.create_trainable("student", 0), 10, 0
    )
    for owner, name in ((step, "_student_loss"), (step.bootstrap, "loss")):
        own = getattr(owner, name)
        setattr(owner, name, lambda *given, own=own: at_start.append(len(alive)) or own(*given))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        step.step([batch(0, 1), batch(2, 3)], 0)
    assert at_start == [0, 0, 0, 0]


def test_np_edit_needs_both_captions_for_them():
    alone = np_edit_bootstrap.NpEditBootstrapSettings(**NO_LOSS)
    assert np_edit_bootstrap.Step.requirements(alone) == {"source_caption", "target_caption"}
    assert np_edit.Step.requirements(alone) == frozenset()
