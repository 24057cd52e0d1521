"""FLUX against diffusers' own pipelines: the same call of the net, the same pictures, the same schedule."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from torch import Tensor

from npedit import flow
from npedit.families.base import EncodedText
from npedit.families.flux import Flux
from tests.support.family_checks import HEIGHT, PROMPTS, WIDTH, FolderChecks, latents, pictures, record_calls

both_kinds = pytest.mark.parametrize("seed", [0, 1], ids=["schnell", "dev"])  # without and with embedded guidance


@pytest.fixture(scope="module")
def families() -> list[Flux]:
    made = [Flux.tiny(0), Flux.tiny(1)]
    assert [f.base.config.guidance_embeds for f in made] == [False, True]
    for family in made:
        family.pipe.set_progress_bar_config(disable=True)
    return made


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(pipe, x: Tensor) -> Tensor:
    return pipe._pack_latents(x, *x.shape)


def unpacked(pipe, x: Tensor) -> Tensor:
    return pipe._unpack_latents(x, HEIGHT, WIDTH, pipe.vae_scale_factor)


@torch.no_grad()
def euler(family: Flux, x: Tensor, text: EncodedText, references: tuple[Tensor, ...] = ()) -> Tensor:
    """Four ordinary Euler steps with our velocity on the times that the pipeline has just used."""
    times = family.pipe.scheduler.sigmas
    for now, then in zip(times[:-1], times[1:]):
        x = x + (then - now) * family.velocity(family.base, x, now.expand(len(x)), text, references)
    return x


def assert_same_call(ours: dict, theirs: dict) -> None:
    for name in ("hidden_states", "timestep", "pooled_projections", "encoder_hidden_states", "txt_ids", "img_ids"):
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    if theirs["guidance"] is None:
        assert ours["guidance"] is None
    else:
        assert torch.equal(ours["guidance"], theirs["guidance"])


# ------------------------------------------------------------------------------------------------- text to image


@both_kinds
def test_sampling_is_the_pipelines_own(families, seed):
    family = families[seed]
    pipe, eps = family.pipe, latents(families[seed], 2)
    theirs, out = record_calls(
        family.base,
        lambda: pipe(
            PROMPTS, height=HEIGHT, width=WIDTH, num_inference_steps=4, guidance_scale=3.5, latents=packed(pipe, eps),
            output_type="latent", max_sequence_length=family.text_length,
        ).images,
    )  # fmt: skip
    text = family.encode_text(PROMPTS)
    ours, x = record_calls(family.base, lambda: euler(family, eps, text))
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs):
        assert_same_call(a, b)
    torch.testing.assert_close(x, unpacked(pipe, out), atol=1e-5, rtol=0)
    assert (x - eps).abs().max() > 0.1  # the net did something


@both_kinds
def test_decoded_pictures_are_the_pipelines_own(families, seed):
    family, x = families[seed], latents(families[seed], 2)
    wanted = family.pipe(
        PROMPTS, height=HEIGHT, width=WIDTH, num_inference_steps=2, latents=packed(family.pipe, x), output_type="pt",
        max_sequence_length=family.text_length,
    ).images  # fmt: skip
    ours = family.decode(euler(family, x, family.encode_text(PROMPTS))).clamp(0, 1)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)


def test_text_depends_on_the_prompt_and_is_padded_to_one_length(families):
    sequence, pooled = families[0].encode_text(PROMPTS).parts
    assert sequence.shape == (2, families[0].text_length, 24)
    assert pooled.shape == (2, 16)
    assert not torch.allclose(sequence[0], sequence[1])
    assert not torch.allclose(pooled[0], pooled[1])
    one = families[0].encode_text(PROMPTS[1:])
    torch.testing.assert_close(one.parts[0][0], sequence[1], atol=1e-5, rtol=0)


def test_texts_can_be_taken_apart_and_put_together(families):
    text = families[0].encode_text(PROMPTS)
    swapped = text.select([1, 0])
    assert len(swapped) == 2
    assert torch.equal(swapped.parts[1][0], text.parts[1][1])
    again = EncodedText.cat([swapped.select([1]), swapped.select([0])])
    assert all(torch.equal(a, b) for a, b in zip(again.parts, text.parts))


# ----------------------------------------------------------------------------------------------------- references


@both_kinds
def test_a_reference_is_given_as_kontext_gives_it(families, seed):
    """FLUX.1-Kontext's pipeline on the same parts: the same tokens, the same ids, the same picture."""
    family = families[seed]
    parts = {k: v for k, v in family.pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    kontext = FluxKontextPipeline(**parts)
    kontext.set_progress_bar_config(disable=True)
    eps, image = latents(family, 2), pictures(2)
    theirs, out = record_calls(
        family.base,
        lambda: kontext(
            image=image, prompt=PROMPTS, height=HEIGHT, width=WIDTH, max_area=HEIGHT * WIDTH, num_inference_steps=4,
            guidance_scale=3.5, latents=packed(kontext, eps), output_type="latent", _auto_resize=False,
            max_sequence_length=family.text_length,
        ).images,
    )  # fmt: skip
    reference, text = family.encode(image), family.encode_text(PROMPTS)
    ours, x = record_calls(family.base, lambda: euler(family, eps, text, (reference,)))
    for a, b in zip(ours, theirs):
        assert_same_call(a, b)
    torch.testing.assert_close(x, unpacked(kontext, out), atol=1e-5, rtol=0)


def test_a_reference_changes_the_output(families):
    family = families[0]
    x, text, t = latents(family, 1), family.encode_text(PROMPTS[:1]), torch.tensor([0.7])
    with torch.no_grad():
        plain, one, other = (
            family.velocity(family.base, x, t, text, refs)
            for refs in ((), (latents(family, 1, seed=1),), (latents(family, 1, seed=2),))
        )
    assert plain.shape == one.shape == x.shape
    assert (plain - one).abs().max() > 1e-4
    assert (one - other).abs().max() > 1e-4


def test_several_references_of_several_sizes_in_order(families):
    family = families[0]
    x, text, t = latents(family, 2), family.encode_text(PROMPTS), torch.tensor([0.7, 0.2])
    a, b = latents(family, 2, seed=1), latents(family, 2, 16, 16, seed=2)
    with torch.no_grad():
        calls, outs = record_calls(
            family.base, lambda: [family.velocity(family.base, x, t, text, refs) for refs in ((a,), (a, b), (b, a))]
        )
    assert all(o.shape == x.shape for o in outs)
    assert (outs[0] - outs[1]).abs().max() > 1e-5
    assert (outs[1] - outs[2]).abs().max() > 1e-5  # the first coordinate of the ids tells them apart
    ids = calls[1]["img_ids"]
    assert [int((ids[:, 0] == i).sum()) for i in range(3)] == [3 * 5, 3 * 5, 2 * 2]
    assert ids[-1].tolist() == [2, 1, 1]


def test_gradient_flows_to_everything(families):
    family, net = families[1], families[1].trainable_net()
    x, t, text = latents(family, 1).requires_grad_(), torch.tensor([0.5]), family.encode_text(PROMPTS[:1])
    references = [latents(family, 1, seed=s).requires_grad_() for s in (1, 2)]
    family.velocity(net, x, t, text, references).square().sum().backward()
    for tensor in (x, *references):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0
    without = [n for n, p in net.named_parameters() if p.grad is None]
    # The last block of the two-stream half still feeds the single-stream half, so every weight takes part.
    assert without == []
    assert all(p.grad is None and not p.requires_grad for p in family.base.parameters())


def test_a_batch_is_its_items_one_by_one(families):
    family = families[1]
    x, text, t = latents(family, 3), family.encode_text([*PROMPTS, "a dog"]), torch.tensor([1.0, 0.6, 0.1])
    ref = latents(family, 3, seed=9)
    with torch.no_grad():
        together = family.velocity(family.base, x, t, text, (ref,))
        apart = [
            family.velocity(family.base, x[i : i + 1], t[i : i + 1], text.select([i]), (ref[i : i + 1],))
            for i in range(3)
        ]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------- schedule and VAE


@pytest.mark.parametrize("size", [(24, 40), (64, 32), (16, 16)])
@pytest.mark.parametrize(
    "config",
    [
        {"shift": 1.0},
        {"shift": 3.0},
        {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "max_image_seq_len": 4096},
        {
            "use_dynamic_shifting": True,
            "base_shift": 0.2,
            "max_shift": 2.0,
            "base_image_seq_len": 4,
            "max_image_seq_len": 64,
        },
    ],
    ids=["none", "fixed", "flux-dev", "steep"],
)
def test_the_schedule_is_the_pipelines_own(config, size):
    family = Flux.tiny(0)
    family.pipe.scheduler = FlowMatchEulerDiscreteScheduler(**config)
    family.pipe.set_progress_bar_config(disable=True)
    height, width = size
    family.pipe("x", height=height, width=width, num_inference_steps=4, output_type="latent", max_sequence_length=128)
    ours = flow.few_step_times(4, family.noise_shift(height, width))
    torch.testing.assert_close(ours, family.pipe.scheduler.sigmas[:-1], atol=1e-6, rtol=0)


@both_kinds
def test_encoding_is_the_pipelines_own(families, seed):
    family, image = families[seed], pictures(2)
    parts = {k: v for k, v in family.pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    kontext = FluxKontextPipeline(**parts)
    wanted = kontext._encode_vae_image(kontext.image_processor.preprocess(image), generator=None)
    ours = family.encode(image)
    assert ours.shape == (2, family.facts.channels, HEIGHT // family.facts.stride, WIDTH // family.facts.stride)
    torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=0)
    assert torch.equal(family.encode(image), ours)  # the posterior's mean, no draw
    assert not ours.requires_grad


def test_latents_of_a_bfloat16_vae_are_float32():
    """So that neither x_t nor DMD's gap is rounded to 8 bits; only the nets work in bfloat16."""
    family = Flux.tiny(0)
    for part in (family.pipe.vae, family.pipe.transformer, family.pipe.text_encoder, family.pipe.text_encoder_2):
        part.to(torch.bfloat16)
    x0 = family.encode(pictures(2))
    mean = family.pipe.vae.encode((pictures(2) * 2 - 1).bfloat16()).latent_dist.mean
    config = family.pipe.vae.config
    assert mean.dtype is torch.bfloat16 and x0.dtype is torch.float32
    assert torch.equal(x0, (mean.float() - config.shift_factor) * config.scaling_factor)
    eps, t = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), torch.full((2,), 0.3)
    x = flow.add_noise(x0, eps, t)
    assert x.dtype is torch.float32 and not torch.equal(x, x.bfloat16().float())
    v = family.velocity(family.trainable_net(), x, t, family.encode_text(["a", "b"]), (x0,))
    assert v.dtype is torch.float32 and family.decode(x0).isfinite().all()


def test_decoding_passes_gradient_and_is_not_clamped(families):
    family, x = families[0], (4 * latents(families[0], 1)).requires_grad_()
    image = family.decode(x)
    assert image.shape == (1, 3, HEIGHT, WIDTH)
    image.square().sum().backward()
    assert x.grad.abs().min() > 0
    vae = family.pipe.vae
    raw = vae.decode(x.detach() / vae.config.scaling_factor + vae.config.shift_factor).sample
    torch.testing.assert_close(image.detach(), raw / 2 + 0.5, atol=1e-6, rtol=0)
    assert all(p.grad is None for p in vae.parameters())
    assert float(family.decode(100 * x.detach()).min()) < 0


def test_facts_are_those_of_the_parts(families):
    facts = families[0].facts
    image = pictures(1, 32, 32)
    assert families[0].encode(image).shape == (1, facts.channels, 32 // facts.stride, 32 // facts.stride)
    assert facts.multiple == families[0].pipe.vae_scale_factor * 2
    names = dict(families[0].base.named_modules())
    assert all(len(names[b]) for b in facts.blocks)


# ----------------------------------------------------------------------------------------------------- nets, folders


def test_a_net_is_a_trainable_copy(families):
    family, net = families[0], families[0].trainable_net()
    assert net.training and all(p.requires_grad for p in net.parameters())
    before = [p.clone() for p in family.base.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(before, family.base.parameters()))


def test_a_net_is_saved_and_opened(families, tmp_path):
    family, net = families[1], families[1].trainable_net()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.01)
    net.save_pretrained(tmp_path / "transformer")
    opened = family.open_net(tmp_path / "transformer")
    plain = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer")  # diffusers alone opens it too
    x, t, text = latents(family, 1), torch.tensor([0.5]), family.encode_text(PROMPTS[:1])
    with torch.no_grad():
        outs = [family.velocity(n, x, t, text) for n in (net, opened, plain, family.base)]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    assert not torch.allclose(outs[0], outs[3])


class TestFolder(FolderChecks):
    kind, pipeline, parts = Flux, "FluxPipeline", ("transformer", "vae", "text_encoder_2")
    seed = 1
