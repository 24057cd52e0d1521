"""Sana against diffusers' own pipeline: the same call of the net, the same pictures, the same schedule."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

from npedit import dmd, flow
from npedit.families.base import EncodedText
from npedit.families.sana import INSTRUCTION, REFERENCES, TEXT_LENGTH, Sana
from tests.support.family_checks import FolderChecks, record_calls

HEIGHT, WIDTH = 32, 64  # not square, so that rows and columns cannot be mixed up; the pipeline wants multiples of 32
PROMPTS = ["a dog", "Two BLUE squares, and a caption that is somewhat longer"]
both_kinds = pytest.mark.parametrize("seed", [0, 1], ids=["1.0", "1.5"])


@pytest.fixture(scope="module")
def families() -> list[Sana]:
    made = [Sana.tiny(0), Sana.tiny(1)]
    assert [f.base.config.qk_norm for f in made] == [None, "rms_norm_across_heads"]
    for family in made:
        family.pipe.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def texts(families) -> list[EncodedText]:
    return [family.encode_text(PROMPTS) for family in families]


@pytest.fixture(scope="module")
def reader(families) -> torch.nn.Module:
    """A net that has learnt to look at its references; a new one has zero weights for them."""
    net = families[0].trainable_net().requires_grad_(False)
    torch.nn.init.normal_(net.patch_embed.proj.weight, generator=torch.Generator().manual_seed(0))
    return net


def latents(family: Sana, batch: int, height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Tensor:
    stride, generator = family.facts.stride, torch.Generator().manual_seed(seed)
    return torch.randn(batch, family.facts.channels, height // stride, width // stride, generator=generator)


def pictures(batch: int, height: int = HEIGHT, width: int = WIDTH, seed: int = 3) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def walk(
    family: Sana, net: torch.nn.Module, x: Tensor, text: EncodedText, steps: int, blank: EncodedText | None = None
) -> Tensor:
    """Our velocity under the pipeline's own solver, at the times that the pipeline states."""
    scheduler = type(family.pipe.scheduler).from_config(family.pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    for step in scheduler.timesteps:
        t = (step / 1000).expand(len(x))
        v = family.velocity(net, x, t, text)
        if blank is not None:
            scale = torch.full((len(x),), family.facts.guidance)
            v = dmd.classifier_free_guidance(v, family.velocity(net, x, t, blank), scale)
        x = scheduler.step(v, step, x, return_dict=False)[0]
    return x


def sampled(family: Sana, eps: Tensor, **run) -> Tensor:
    return family.pipe(
        list(PROMPTS), height=HEIGHT, width=WIDTH, latents=eps, use_resolution_binning=False, **run
    ).images  # fmt: skip


# ------------------------------------------------------------------------------------------------- text to image


@both_kinds
@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler])
def test_sampling_is_the_pipelines_own(families, texts, seed, kind, monkeypatch):
    """With the base and with a widened net, whose slots stay empty."""
    family, eps = families[seed], latents(families[seed], 2)
    if kind is FlowMatchEulerDiscreteScheduler:
        monkeypatch.setattr(family.pipe, "scheduler", kind(shift=3.0))
    theirs, wanted = record_calls(
        family.base,
        lambda: sampled(family, eps, num_inference_steps=4, guidance_scale=1.0, output_type="latent"),
    )
    ours, x = record_calls(family.base, lambda: walk(family, family.base, eps, texts[seed], 4))
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs):
        assert torch.equal(a["encoder_attention_mask"], b["encoder_attention_mask"])
        for name in ("hidden_states", "encoder_hidden_states", "timestep"):
            torch.testing.assert_close(a[name], b[name].float(), atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(x, wanted, atol=1e-4, rtol=0)
    assert (x - eps).abs().max() > 0.1  # the net did something
    torch.testing.assert_close(walk(family, family.trainable_net(), eps, texts[seed], 4), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("negative", ["", "low quality, artifacts"])
def test_guided_sampling_and_decoding_are_the_pipelines_own(families, texts, negative):
    """The default guidance against a negative prompt, which the pipeline encodes without its instruction."""
    family, eps = families[0], latents(families[0], 2)
    wanted = sampled(family, eps, negative_prompt=negative, num_inference_steps=3, output_type="pt")
    x = walk(family, family.base, eps, texts[0], 3, blank=family.encode_negative_text([negative] * 2))
    torch.testing.assert_close(family.decode(x).clamp(0, 1), wanted, atol=1e-4, rtol=0)


def test_a_timestep_scale_and_a_predicted_variance_are_the_pipelines_own():
    family = Sana.tiny(0)
    config = {**family.base.config, "timestep_scale": 0.01, "out_channels": 8}
    family.base = SanaTransformer2DModel.from_config(config).eval().requires_grad_(False)
    family.pipe.register_modules(transformer=family.base)
    family.pipe.set_progress_bar_config(disable=True)
    eps, text = latents(family, 2), family.encode_text(PROMPTS)
    wanted = sampled(family, eps, num_inference_steps=3, guidance_scale=1.0, output_type="latent")
    torch.testing.assert_close(walk(family, family.base, eps, text, 3), wanted, atol=1e-4, rtol=0)
    net = family.trainable_net()
    assert net.config.out_channels == 8
    torch.testing.assert_close(walk(family, net, eps, text, 3), wanted, atol=1e-4, rtol=0)


def test_text_is_the_pipelines_own(families):
    """Prompts and negative prompts, the empty ones too."""
    family = families[0]
    prompts = ["A dog", "", "a long story " * 40, " ", "low quality, artifacts"]
    encoded, negative = family.encode_text(prompts).parts, family.encode_negative_text(prompts).parts
    assert encoded[0].shape == (5, TEXT_LENGTH, 16) and encoded[1].shape == (5, TEXT_LENGTH)
    assert encoded[1].sum(1).tolist()[2] == TEXT_LENGTH
    for i, prompt in enumerate(prompts):
        wanted = family.pipe.encode_prompt(
            prompt, negative_prompt=prompt, max_sequence_length=TEXT_LENGTH, complex_human_instruction=INSTRUCTION
        )
        for (states, mask), (wanted_states, wanted_mask) in ((encoded, wanted[:2]), (negative, wanted[2:])):
            assert torch.equal(mask[i], wanted_mask[0])
            here = mask[i].bool()
            torch.testing.assert_close(states[i][here], wanted_states[0][here], atol=1e-5, rtol=0)
    assert (encoded[0][0] - encoded[0][2]).abs().max() > 1e-3
    assert (encoded[0][4] - negative[0][4]).abs().max() > 1e-3


def test_texts_can_be_taken_apart_and_put_together(families, texts):
    """Whatever their lengths, and whoever was encoded beside them."""
    family, text = families[0], texts[0]
    alone = [family.encode_text([p]) for p in PROMPTS]
    joined = EncodedText.cat([alone[1], text.select([0]), alone[0]])
    assert len(joined) == 3
    x, t = latents(family, 3), torch.tensor([0.9, 0.5, 0.3])
    with torch.no_grad():
        a = family.velocity(family.base, x, t, joined)
        b = family.velocity(family.base, x, t, text.select([1, 0, 0]))
        other = family.velocity(family.base, x, t, text.select([0, 1, 1]))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert (a - other).abs().max() > 1e-4


# ----------------------------------------------------------------------------------------------------- references


@both_kinds
def test_a_new_net_is_the_base_until_it_learns_to_look(families, texts, seed):
    """It starts as the base exactly; one update opens the slot that was used, and no other."""
    family, net = families[seed], families[seed].trainable_net()
    x, t, text = latents(family, 2), torch.tensor([0.7, 0.2]), texts[seed]
    ref, other = latents(family, 2, seed=1), latents(family, 2, seed=2)
    v = family.velocity(net, x, t, text, (ref,))
    assert torch.equal(v.detach(), family.velocity(net, x, t, text).detach())
    torch.testing.assert_close(v, family.velocity(family.base, x, t, text), atol=1e-6, rtol=0)
    F.mse_loss(v, x - ref).backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    changed = net.patch_embed.proj.weight.detach().unflatten(1, (1 + REFERENCES, 4)).abs().amax((0, 2, 3, 4))
    assert (changed[:2] > 0).all() and not changed[2:].any()
    ref.requires_grad_()
    one, two = (family.velocity(net, x, t, text, (r,)) for r in (ref, other))
    assert (one - two).abs().max() > 1e-4
    one.square().sum().backward()
    assert ref.grad.abs().sum() > 0


def test_several_references_of_several_sizes_in_order(families, texts, reader):
    family = families[0]
    x, t = latents(family, 2), torch.tensor([0.7, 0.2])
    a, b = latents(family, 2, seed=1), latents(family, 2, 16, 16, seed=2)
    calls = [(), (a,), (a, b), (b, a), (a, b, a), (a, b, a, a)]
    with torch.no_grad():
        seen, outs = record_calls(reader, lambda: [family.velocity(reader, x, t, texts[0], refs) for refs in calls])
    assert all(o.shape == x.shape for o in outs)
    for i, one in enumerate(outs):
        assert all((one - other).abs().max() > 1e-4 for other in outs[:i])
    planes = seen[2]["hidden_states"].unflatten(1, (1 + REFERENCES, 4)).unbind(1)
    assert torch.equal(planes[0], x) and torch.equal(planes[1], a) and not planes[3].any()
    torch.testing.assert_close(planes[2][:, :, :4, :8], F.interpolate(b, (8, 16), mode="bilinear")[:, :, :4, :8])


def test_more_references_than_slots_are_refused(families, texts, reader):
    family = families[0]
    x, t = latents(family, 2), torch.tensor([0.7, 0.2])
    with pytest.raises(ValueError, match="at most 0 references.*got 1"):
        family.velocity(family.base, x, t, texts[0], (x,))
    with pytest.raises(ValueError, match=f"at most {REFERENCES} references.*got {REFERENCES + 1}"):
        family.velocity(reader, x, t, texts[0], (x,) * (REFERENCES + 1))


@both_kinds
def test_gradient_flows_to_everything(families, texts, seed):
    family, net = families[seed], families[seed].trainable_net()
    torch.nn.init.normal_(net.patch_embed.proj.weight)
    x, t = latents(family, 1).requires_grad_(), torch.tensor([0.5])
    references = [latents(family, 1, seed=1).requires_grad_(), latents(family, 1, 16, 16, seed=2).requires_grad_()]
    family.velocity(net, x, t, texts[seed].select([1]), references).square().sum().backward()
    for tensor in (x, *references):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    assert all(p.grad is None and not p.requires_grad for p in family.base.parameters())


@pytest.mark.parametrize("count", [0, 2])
def test_a_batch_is_its_items_one_by_one(families, texts, reader, count):
    family = families[0]
    x, t = latents(family, 3), torch.tensor([1.0, 0.6, 0.1])
    text = EncodedText.cat([texts[0], family.encode_text([""])])
    refs = [latents(family, 3, seed=9 + i) for i in range(count)]
    with torch.no_grad():
        together = family.velocity(reader, x, t, text, refs)
        apart = [
            family.velocity(reader, x[i : i + 1], t[i : i + 1], text.select([i]), [r[i : i + 1] for r in refs])
            for i in range(3)
        ]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------- schedule and VAE


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_schedule_is_the_pipelines_own(families, shift, monkeypatch):
    """The DPM solver's grid ends at 1/1000 and begins as much below 1, so it differs by up to a thousandth."""
    family, ours = families[0], flow.few_step_times(4, shift)
    run = {"height": HEIGHT, "width": WIDTH, "output_type": "latent", "use_resolution_binning": False}
    dpm = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    monkeypatch.setattr(family.pipe, "scheduler", dpm)
    assert family.noise_shift(HEIGHT, WIDTH) == shift
    family.pipe("x", num_inference_steps=4, guidance_scale=1.0, **run)
    torch.testing.assert_close(dpm.sigmas[:-1], ours, atol=1.1e-3, rtol=0)
    saved = family.few_step_scheduler(shift)
    monkeypatch.setattr(family.pipe, "scheduler", saved)
    assert family.noise_shift(HEIGHT, WIDTH) == shift and saved.config.stochastic_sampling
    family.pipe("x", sigmas=[1.0, 0.75, 0.5, 0.25], guidance_scale=1.0, **run)
    torch.testing.assert_close(saved.sigmas[:-1], ours, atol=1e-6, rtol=0)


def test_decoding_undoes_the_scaling_passes_gradient_and_is_not_clamped(families):
    family = families[0]
    x, vae = (4 * latents(family, 1)).requires_grad_(), family.pipe.vae
    image = family.decode(x)
    assert image.shape == (1, 3, HEIGHT, WIDTH)
    image.square().sum().backward()
    assert x.grad.abs().sum() > 0
    raw = vae.decode(x.detach() / vae.config.scaling_factor).sample
    torch.testing.assert_close(image.detach(), raw / 2 + 0.5, atol=1e-6, rtol=0)
    assert float(family.decode(100 * x.detach()).min()) < 0
    latent = family.encode(pictures(2))
    torch.testing.assert_close(latent / 0.4, vae.encode(pictures(2) * 2 - 1).latent, atol=1e-6, rtol=0)
    assert not latent.requires_grad and all(p.grad is None for p in vae.parameters())


def test_facts_are_those_of_the_parts(families, texts, reader):
    """Sizes of `multiple` go all the way; of half of it, they do not."""
    family, t = families[0], torch.tensor([0.5])
    facts, text = family.facts, texts[0].select([0])
    for height, width in ((1, 3), (5, 2)):
        image = pictures(1, height * facts.multiple, width * facts.multiple)
        x = family.encode(image)
        assert x.shape == (1, facts.channels, image.shape[2] // facts.stride, image.shape[3] // facts.stride)
        with torch.no_grad():
            assert family.decode(family.velocity(reader, x, t, text, (x,))).shape == image.shape
    with pytest.raises(RuntimeError):
        family.encode(pictures(1, 32, 32 + facts.multiple // 2))
    names = dict(family.base.named_modules())
    assert all(len(names[b]) for b in facts.blocks)


# ----------------------------------------------------------------------------------------------------- nets, folders


def test_a_net_is_a_trainable_copy_saved_and_opened(families, texts, tmp_path):
    family, net = families[1], families[1].trainable_net()
    before = [p.clone() for p in family.base.parameters()]
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert family.base.config.in_channels == 4 and net.config.in_channels == 4 * (1 + REFERENCES)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.01)
    assert all(torch.equal(a, b) for a, b in zip(before, family.base.parameters()))
    net.save_pretrained(tmp_path / "transformer")
    opened = family.open_net(tmp_path / "transformer")
    plain = SanaTransformer2DModel.from_pretrained(tmp_path / "transformer")  # diffusers alone opens it too
    x, t, text = latents(family, 1), torch.tensor([0.5]), texts[1].select([0])
    with torch.no_grad():
        outs = [family.velocity(n, x, t, text, (x,)) for n in (net, opened, plain)]
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
        assert not torch.allclose(outs[0], family.velocity(family.base, x, t, text))


class TestFolder(FolderChecks):
    kind, pipeline, parts = Sana, "SanaPipeline", ("transformer", "vae", "text_encoder")
    seed = 1
    size = (HEIGHT, WIDTH)
