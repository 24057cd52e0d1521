"""The few-step editor: training's transitions are use's, each with noise of its own, each seed by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from npedit import flow
from npedit.families.flux import Flux
from npedit.generator import (
    edit_images,
    generate_few_step,
    sample_noise,
    sample_training_times,
    seeded_generator,
    seeded_noise,
)

WORDS = ["paint the circle red", "remove the dog", "do nothing"]


@pytest.fixture(scope="module")
def family() -> Flux:
    return Flux.tiny(1)


def references(count: int = 3, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


class Recorder:
    """Notes what every call of `family.velocity` is given and gives; the real method still does the work."""

    def __init__(self, family: Flux, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[dict] = []
        real = family.velocity

        def noted(net, x, t, text, references=()):
            v = real(net, x, t, text, references)
            self.calls.append({"x": x, "t": t, "text": text, "references": references, "v": v})
            return v

        monkeypatch.setattr(family, "velocity", noted)


def assert_same_call(a: dict, b: dict) -> None:
    assert torch.equal(a["x"], b["x"]) and torch.equal(a["t"], b["t"])
    assert len(a["references"]) == len(b["references"]) == 1
    assert torch.equal(a["references"][0], b["references"][0])
    assert all(torch.equal(p, q) for p, q in zip(a["text"].parts, b["text"].parts))


# ------------------------------------------------------------------------------------------- training is use


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_training_unrolls_the_very_transitions_of_use(family, monkeypatch, k):
    """Fault 2. Use's k-th transition from a given draft, and training's, call the net with the very same tensors."""
    times = flow.few_step_times(4, family.noise_shift(16, 24)).tolist()
    seen = Recorder(family, monkeypatch)
    edit_images(family, family.base, references(1), WORDS[:1], seeds=[7], steps=4)
    used = list(seen.calls)
    assert [float(c["t"]) for c in used] == pytest.approx(times)

    latents, text = family.encode(references(1)), family.encode_text(WORDS[:1])
    noise = seeded_noise(latents, [7], 4)  # the noise that use has drawn
    seen.calls.clear()
    generate_few_step(family, family.base, text, latents, times[: k + 1], noise[: k + 1])
    for ours, theirs in zip(seen.calls, used):
        assert_same_call(ours, theirs)
    assert len(seen.calls) == k + 1

    # The transition by itself, written out: x0 from the last call, re-noised with this level's own noise.
    if k:
        before, here = used[k - 1], used[k]
        x0 = before["x"] - times[k - 1] * before["v"]
        torch.testing.assert_close(here["x"], (1 - times[k]) * x0 + times[k] * noise[k], atol=1e-6, rtol=0)


def test_training_with_two_times_is_use_with_these_two(family, monkeypatch):
    seen = Recorder(family, monkeypatch)
    monkeypatch.setattr(flow, "few_step_times", lambda steps, shift: torch.tensor([1.0, 0.4]))
    image = edit_images(family, family.base, references(1), WORDS[:1], seeds=[3], steps=2)
    used = list(seen.calls)
    seen.calls.clear()
    latents, net = family.encode(references(1)), family.trainable_net()
    x0 = generate_few_step(
        family,
        net,
        family.encode_text(WORDS[:1]),
        latents,
        [1.0, 0.4],
        seeded_noise(latents, [3], 2),
    )
    assert x0.requires_grad  # training's: with gradient
    for ours, theirs in zip(seen.calls, used):
        torch.testing.assert_close(ours["x"].detach(), theirs["x"], atol=1e-6, rtol=0)
        assert torch.equal(ours["t"], theirs["t"])
    torch.testing.assert_close(family.decode(x0.detach()).clamp(0, 1), image, atol=1e-5, rtol=0)


def test_the_first_call_sees_pure_noise(family, monkeypatch):
    seen = Recorder(family, monkeypatch)
    latents = family.encode(references())
    noise = sample_noise(latents, 1, seeded_generator("x"))
    x0 = generate_few_step(family, family.base, family.encode_text(WORDS), latents, [1.0], noise)
    assert torch.equal(seen.calls[0]["x"], noise[0])
    torch.testing.assert_close(x0, noise[0] - seen.calls[0]["v"])  # x0 = eps - v


def test_each_transition_has_fresh_noise(family, monkeypatch):
    """Fault 2 again: neither the first noise once more, nor what the net predicts to be the noise."""
    seen = Recorder(family, monkeypatch)
    edit_images(family, family.base, references(1), WORDS[:1], seeds=[1], steps=4)
    times = [float(c["t"]) for c in seen.calls]
    added = [seen.calls[0]["x"]]
    for before, here, then, now in zip(seen.calls, seen.calls[1:], times, times[1:]):
        x0 = before["x"] - then * before["v"]
        added.append((here["x"] - (1 - now) * x0) / now)
    for i, one in enumerate(added):
        for other in added[:i]:
            assert (one - other).abs().mean() > 0.5
    for before, noise in zip(seen.calls, added[1:]):
        predicted = before["x"] + (1 - float(before["t"])) * before["v"]
        assert (noise - predicted).abs().mean() > 0.5
    assert torch.cat(added).std() == pytest.approx(1, abs=0.15)


def test_an_exported_scheduler_makes_the_same_transitions(family):
    """diffusers' own scheduler, as it is saved beside an editor, walks the same way with the same noise."""
    scheduler = family.few_step_scheduler(family.noise_shift(16, 24))
    times = flow.few_step_times(4, family.noise_shift(16, 24))
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(scheduler.sigmas[:-1], times, atol=1e-6, rtol=0)
    latents, text = family.encode(references(1)), family.encode_text(WORDS[:1])
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(latents.shape, generator=generator)
    noise = [x]
    state = generator.get_state()
    with torch.no_grad():
        for time, t in zip(times, scheduler.timesteps):
            v = family.velocity(family.base, x, time[None], text, (latents,))
            x = scheduler.step(v, t, x, generator=generator, return_dict=False)[0]
        generator.set_state(state)
        noise += [torch.randn(latents.shape, generator=generator) for _ in times[1:]]
        wanted = generate_few_step(family, family.base, text, latents, times.tolist(), noise)
    torch.testing.assert_close(x, wanted, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------- training times


def test_training_times_are_those_of_the_schedule():
    times = flow.few_step_times(4, 3.0)
    drawn = [sample_training_times(times, seeded_generator("t", i)) for i in range(400)]
    assert all(d[0] == 1.0 for d in drawn)
    assert {tuple(d) for d in drawn} == {(1.0,), *((1.0, float(t)) for t in times[1:])}
    shares = [sum(len(d) == 1 for d in drawn), *(sum(d[1:] == [float(t)] for d in drawn) for t in times[1:])]
    assert all(70 < n < 130 for n in shares), shares  # evenly


def test_training_times_are_equal_for_equal_seeds():
    """All ranks seed with the same words, so that all unroll the same way."""
    times = flow.few_step_times(4, 3.0)
    ways = [[sample_training_times(times, seeded_generator(0, "times", u)) for u in range(20)] for _ in range(2)]
    assert ways[0] == ways[1]
    assert ways[0] != [sample_training_times(times, seeded_generator(1, "times", u)) for u in range(20)]


def test_one_step_is_always_the_first():
    assert sample_training_times(flow.few_step_times(1, 3.0), seeded_generator(0)) == [1.0]


def test_noise_levels_are_independent_and_leave_the_global_stream_alone():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    a, b = sample_noise(torch.zeros(2, 4, 16, 16, dtype=torch.bfloat16), 2, seeded_generator("n"))
    assert torch.equal(torch.rand(3), wanted)
    assert a.dtype is torch.bfloat16
    a, b = a.float(), b.float()
    assert abs(float((a * b).mean())) < 0.1 and a.std() == pytest.approx(1, abs=0.1)
    assert abs(float((a[0] * a[1]).mean())) < 0.1


def test_seeds_depend_on_every_word():
    streams = [
        torch.rand(1, generator=seeded_generator(*k)).item()
        for k in ((0, "a"), (0, "b"), (1, "a"), ("0", "a"), (0, "a", 0))
    ]
    assert len(set(streams)) == len(streams)
    assert torch.rand(1, generator=seeded_generator(0, "a")).item() == streams[0]


# ---------------------------------------------------------------------------------------------------------- gradient


def test_gradient_reaches_the_net_through_every_call(family):
    latents, text, net = family.encode(references(1)), family.encode_text(WORDS[:1]), family.trainable_net()
    times, noise = [1.0, 0.6], sample_noise(latents, 2, seeded_generator("g"))
    generate_few_step(family, net, text, latents, times, noise).square().sum().backward()

    nets = [family.trainable_net(), family.trainable_net()]  # the same weights, one net a call
    x0 = torch.zeros_like(latents)
    for one, time, eps in zip(nets, times, noise):
        x = (1 - time) * x0 + time * eps
        x0 = x - time * family.velocity(one, x, torch.full((1,), time), text, (latents,))
    x0.square().sum().backward()
    for whole, first, second in zip(net.parameters(), *(n.parameters() for n in nets)):
        torch.testing.assert_close(first.grad + second.grad, whole.grad, atol=1e-4, rtol=1e-4)
    for one in nets:
        assert one.proj_out.weight.grad.norm() > 1e-6


def test_the_few_step_gradient_is_the_finite_difference(family):
    latents, text, net = family.encode(references(1)), family.encode_text(WORDS[:1]), family.trainable_net()
    times, noise = [1.0, 0.6], sample_noise(latents, 2, seeded_generator("g"))
    weight = net.proj_out.weight
    (gradient,) = torch.autograd.grad(
        generate_few_step(family, net, text, latents, times, noise).square().sum(), weight
    )
    way, step = gradient / gradient.norm(), 1e-2
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weight += sign * step * way
            values.append(float(generate_few_step(family, net, text, latents, times, noise).double().square().sum()))
            weight -= sign * step * way
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float((gradient * way).sum()), rel=1e-2)


# --------------------------------------------------------------------------------------------------------------- use


def test_a_batch_of_three_is_its_images_one_by_one(family):
    images = references()
    together = edit_images(family, family.base, images, WORDS, seeds=[4, 5, 6])
    assert together.shape == images.shape
    for i in range(3):
        alone = edit_images(family, family.base, images[i : i + 1], WORDS[i : i + 1], seeds=[4 + i])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)
    shuffled = edit_images(family, family.base, images.flip(0), WORDS[::-1], seeds=[6, 5, 4])
    torch.testing.assert_close(shuffled.flip(0), together, atol=1e-5, rtol=0)


def test_equal_seeds_edit_equally_and_others_otherwise(family):
    images = references(1)
    first = edit_images(family, family.base, images, WORDS[:1], seeds=1)
    torch.manual_seed(99)
    assert torch.equal(first, edit_images(family, family.base, images, WORDS[:1], seeds=[1]))
    assert not torch.allclose(first, edit_images(family, family.base, images, WORDS[:1], seeds=2), atol=1e-3)


def test_one_seed_serves_all_images(family):
    twice = edit_images(family, family.base, references(1).expand(2, -1, -1, -1), WORDS[:1] * 2, seeds=3)
    torch.testing.assert_close(twice[0], twice[1], atol=1e-5, rtol=0)


def test_instruction_and_reference_matter(family):
    images = references(2)
    base = edit_images(family, family.base, images[:1], WORDS[:1])
    assert (base - edit_images(family, family.base, images[:1], WORDS[1:2])).abs().max() > 1e-5
    assert (base - edit_images(family, family.base, images[1:], WORDS[:1])).abs().max() > 1e-5


def test_edited_images_are_pictures(family):
    net = family.trainable_net()
    images = edit_images(family, net, references(), WORDS, steps=2)
    assert images.dtype is torch.float32 and not images.requires_grad
    assert float(images.min()) >= 0 and float(images.max()) <= 1
