"""Z-Image against diffusers' own pipelines: the same call of the net, the same pictures, the same schedule."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageOmniPipeline, ZImageTransformer2DModel
from PIL import Image
from torch import Tensor
from transformers import Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from npedit import dmd, flow
from npedit.families.base import EncodedText
from npedit.families.z_image import TEXT_LENGTH, ZImage
from tests.support.family_checks import FolderChecks, latents, pictures, record_calls

HEIGHT, WIDTH = 24, 40  # not square, so that rows and columns cannot be mixed up
PROMPTS = ["a dog", "two blue squares, and a caption that takes more than a block of 32 tokens"]


@pytest.fixture(scope="module")
def family() -> ZImage:
    made = ZImage.tiny(0)
    made.pipe.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def euler(
    family: ZImage, x: Tensor, text: EncodedText, references: tuple[Tensor, ...] = (), blank: EncodedText | None = None
):
    """Ordinary Euler steps with our velocity on the times that the pipeline has just used."""
    times = family.pipe.scheduler.sigmas
    for now, then in zip(times[:-1], times[1:]):
        v = family.velocity(family.base, x, now.expand(len(x)), text, references)
        if blank is not None:
            scale = torch.full((len(x),), family.facts.guidance)
            v = dmd.classifier_free_guidance(
                v, family.velocity(family.base, x, now.expand(len(x)), blank, references), scale
            )
        x = x + (then - now) * v
    return x


def assert_same_call(ours: dict, theirs: dict) -> None:
    def flat(value) -> list[Tensor]:
        return [value] if isinstance(value, Tensor) else [t for v in value for t in flat(v)]

    for name in ("x", "t", "cap_feats"):
        a, b = flat(ours[name]), flat(theirs[name])
        assert len(a) == len(b)
        for i, (one, other) in enumerate(zip(a, b)):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0, msg=lambda m, at=f"{name}[{i}]": f"{at}: {m}")
    assert ours.get("image_noise_mask") == theirs.get("image_noise_mask")


# ------------------------------------------------------------------------------------------------- text to image


@pytest.mark.parametrize("shift", [6.0, 3.0], ids=["base", "turbo"])
def test_sampling_is_the_pipelines_own(family, shift, monkeypatch):
    monkeypatch.setattr(family.pipe, "scheduler", FlowMatchEulerDiscreteScheduler(shift=shift))
    eps = latents(family, 2)
    run = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 4, "guidance_scale": 0.0, "latents": eps}
    theirs, wanted = record_calls(
        family.base, lambda: family.pipe(list(PROMPTS), output_type="latent", **run).images.clone()
    )
    text = family.encode_text(PROMPTS)
    ours, x = record_calls(family.base, lambda: euler(family, eps, text))
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs):
        assert_same_call(a, b)
    torch.testing.assert_close(x, wanted, atol=1e-5, rtol=0)
    assert (x - eps).abs().max() > 0.1  # the net did something
    image = family.pipe(list(PROMPTS), output_type="pt", **run).images
    torch.testing.assert_close(family.decode(x).clamp(0, 1), image, atol=1e-5, rtol=0)


def test_guided_sampling_is_the_pipelines_own(family):
    """`facts.guidance` is the pipeline's default in the convention of `dmd.guided`."""
    eps = latents(family, 2)
    wanted = family.pipe(
        list(PROMPTS), height=HEIGHT, width=WIDTH, num_inference_steps=3, latents=eps, output_type="latent"
    ).images
    x = euler(family, eps, family.encode_text(PROMPTS), blank=family.encode_text(["", ""]))
    torch.testing.assert_close(x, wanted, atol=1e-4, rtol=0)


def test_text_is_the_pipelines_own(family):
    prompts = [*PROMPTS, "a long story " * 60]
    wanted, _ = family.pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    padded, lengths = family.encode_text(prompts).parts
    assert padded.shape == (3, TEXT_LENGTH, 24)
    assert lengths.tolist() == [len(w) for w in wanted] and lengths[2] == TEXT_LENGTH
    assert lengths[0] // 32 != lengths[1] // 32
    for states, n, w in zip(padded, lengths, wanted):
        assert torch.equal(states[:n], w) and not states[n:].any()


def test_texts_can_be_taken_apart_and_put_together(family):
    """Whatever their lengths, and whoever was encoded beside them."""
    text, alone = family.encode_text(PROMPTS), [family.encode_text([p]) for p in PROMPTS]
    joined = EncodedText.cat([alone[1], text.select([0]), alone[0]])
    assert len(joined) == 3
    x, t = latents(family, 3), torch.tensor([0.9, 0.5, 0.3])
    with torch.no_grad():
        a = family.velocity(family.base, x, t, joined)
        b = family.velocity(family.base, x, t, text.select([1, 0, 0]))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert (family.encode_text(["a dog"]).parts[0] - family.encode_text(["a cat"]).parts[0]).abs().max() > 1e-3


# ----------------------------------------------------------------------------------------------------- references


def test_a_reference_is_given_as_the_omni_pipeline_gives_it():
    """ZImageOmniPipeline on the same parts, with one reference of another size: the same lists, the same picture.

    Its SigLIP states have no effect on a transformer without weights for them, whatever width its config states. It
    encodes in bfloat16. The captions have a multiple of 32 tokens: for others the two differ on purpose, see the next
    test.
    """
    family = ZImage.tiny(1)
    family.base.register_to_config(siglip_feat_dim=16)
    family.pipe.vae.to(torch.bfloat16)
    siglip = Siglip2VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_patches=16, patch_size=4
    )
    omni = ZImageOmniPipeline(
        **family.pipe.components, siglip=Siglip2VisionModel(siglip),
        siglip_processor=Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16),
    )  # fmt: skip
    omni.set_progress_bar_config(disable=True)
    image = pictures(1, 64, 96)
    pixels = (image[0].permute(1, 2, 0) * 255).round().byte().numpy()
    text, eps = family.encode_text([prompt_of_tokens(family, n) for n in (64, 96)]), latents(family, 2)
    captions = [[states[:0], states[:n]] for states, n in zip(*text.parts)]
    theirs, wanted = record_calls(
        family.base,
        lambda: omni(
            image=[Image.fromarray(pixels)], prompt_embeds=captions, height=HEIGHT, width=WIDTH, num_inference_steps=4,
            guidance_scale=0.0, latents=eps, output_type="latent",
        ).images,
    )  # fmt: skip
    reference = torch.stack([item[0].squeeze(1) for item in theirs[0]["x"]])
    ours, x = record_calls(family.base, lambda: euler(family, eps, text, (reference,)))
    for a, b in zip(ours, theirs):
        assert_same_call(a, b)
    torch.testing.assert_close(x, wanted, atol=1e-5, rtol=0)
    exact = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(family.encode(exact), reference[:1], atol=0.03, rtol=0.02)


def prompt_of_tokens(family: ZImage, count: int) -> str:
    """A prompt that has so many tokens together with the chat template."""
    return "x" * (count - int(family.encode_text([""]).parts[1][0]))


@pytest.mark.parametrize("references", [1, 3])
@pytest.mark.parametrize("tokens", [63, 64, 65, 90])
def test_a_reference_does_not_move_the_picture_relative_to_its_caption(family, monkeypatch, tokens, references):
    """RoPE ids: with references, caption and picture are as far apart as in text-to-image, for any prompt length."""
    x, t, refs = (
        latents(family, 1),
        torch.tensor([0.7]),
        [latents(family, 1, 16, 16, seed=s) for s in range(references)],
    )
    text = family.encode_text([prompt_of_tokens(family, tokens)])
    ids, rope = [], family.base.rope_embedder
    monkeypatch.setattr(family.base, "rope_embedder", lambda places: ids.append(places) or rope(places))
    with torch.no_grad():
        family.velocity(family.base, x, t, text)
        family.velocity(family.base, x, t, text, refs)
    plain_picture, plain_caption, omni_images, omni_caption = ids
    shift = torch.tensor([2 * references, 0, 0])
    length = -(-tokens // 32) * 32
    assert torch.equal(omni_caption[:length], plain_caption[:length] + shift)
    picture, padding = plain_picture[: 3 * 5], plain_picture[3 * 5 :]
    assert torch.equal(omni_images[-32 : -32 + 3 * 5], picture + shift) and not padding.any()
    assert not omni_images[-32 + 3 * 5 :].any()  # padding has no place
    assert "patchify_and_embed_omni" not in vars(family.base)


def test_a_reference_changes_the_output(family):
    x, text, t = latents(family, 1), family.encode_text(PROMPTS[:1]), torch.tensor([0.7])
    with torch.no_grad():
        plain, one, other = (
            family.velocity(family.base, x, t, text, refs)
            for refs in ((), (latents(family, 1, seed=1),), (latents(family, 1, seed=2),))
        )
    assert plain.shape == one.shape == x.shape
    assert (plain - one).abs().max() > 1e-3
    assert (one - other).abs().max() > 1e-3


def test_several_references_of_several_sizes_in_order(family, monkeypatch):
    x, text, t = latents(family, 2), family.encode_text(PROMPTS), torch.tensor([0.7, 0.2])
    a, b = latents(family, 2, seed=1), latents(family, 2, 16, 16, seed=2)
    ids, rope = [], family.base.rope_embedder
    monkeypatch.setattr(family.base, "rope_embedder", lambda places: ids.append(places) or rope(places))
    with torch.no_grad():
        outs = [family.velocity(family.base, x, t, text, refs) for refs in ((a, b), (b, a), (a,), (a, b, a))]
    assert all(o.shape == x.shape for o in outs)
    for i, one in enumerate(outs):
        assert all((one - other).abs().max() > 1e-4 for other in outs[:i])
    images, captions = ids[0][: len(ids[0]) // 2], ids[1]  # those of the first item, and of both
    ends = -(-int(text.parts[1][0]) // 32) * 32 + 5
    frames = [int(f) for f in images[:, 0].unique() if f]  # the padding has frame 0
    assert frames == [1, 3, ends]
    assert [int((images[:, 0] == f).sum()) for f in frames] == [3 * 5, 2 * 2, 3 * 5]
    assert captions[0].tolist() == [5, 0, 0] and captions[ends - 6].tolist() == [ends - 1, 0, 0]


def test_references_are_clean_whatever_the_time(family):
    """A reference's tokens are modulated with the clean time: at t = 0 all tokens are, and there the two agree."""
    x, text, ref = latents(family, 1), family.encode_text(PROMPTS[:1]), latents(family, 1, seed=1)
    seen = []
    hook = family.base.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        for t in (0.6, 0.0):
            family.velocity(family.base, x, torch.tensor([t]), text, (ref,))
    hook.remove()
    assert torch.equal(seen[0][6], seen[1][6]) and torch.equal(seen[1][5], seen[1][6])
    assert (seen[0][5] - seen[0][6]).abs().max() > 1e-4
    caption = -(-int(text.parts[1][0]) // 32) * 32
    assert seen[0][4][0].tolist() == [1] * caption + [0] * 32 + [1] * 32  # caption, reference, picture


def test_gradient_flows_to_everything(family):
    net = family.trainable_net()
    x, t, text = latents(family, 1).requires_grad_(), torch.tensor([0.5]), family.encode_text(PROMPTS[:1])
    references = [latents(family, 1, seed=s).requires_grad_() for s in (1, 2)]
    family.velocity(net, x, t, text, references).square().sum().backward()
    for tensor in (x, *references):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    assert all(p.grad is None and not p.requires_grad for p in family.base.parameters())


@pytest.mark.parametrize("sizes", [(), ((HEIGHT, WIDTH),), ((16, 32), (HEIGHT, WIDTH))], ids=["none", "one", "two"])
def test_a_batch_is_its_items_one_by_one(family, sizes):
    """Texts of one, two and more blocks of 32 tokens, so that the net pads the shorter ones."""
    x, t = latents(family, 3), torch.tensor([1.0, 0.6, 0.1])
    text = family.encode_text([*PROMPTS, "a dog " * 40])
    assert len({-(-int(n) // 32) for n in text.parts[1]}) == 3
    refs = [latents(family, 3, *size, seed=9 + i) for i, size in enumerate(sizes)]
    with torch.no_grad():
        together = family.velocity(family.base, x, t, text, refs)
        apart = [
            family.velocity(family.base, x[i : i + 1], t[i : i + 1], text.select([i]), [r[i : i + 1] for r in refs])
            for i in range(3)
        ]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=0)


def test_other_numbers_are_refused(family):
    x, t, text = latents(family, 2), torch.tensor([0.5, 0.5]), family.encode_text(PROMPTS)
    with pytest.raises(ValueError, match="expected 2 of each; got 1 prompts"):
        family.velocity(family.base, x, t, text.select([0]))
    with pytest.raises(ValueError, match=r"references for \[1\] items"):
        family.velocity(family.base, x, t, text, (x[:1],))


# ------------------------------------------------------------------------------------------------- schedule and VAE


@pytest.mark.parametrize("size", [(24, 40), (64, 32)])
@pytest.mark.parametrize(
    "config",
    [{"shift": 6.0}, {"use_dynamic_shifting": True, "base_shift": 0.2, "max_shift": 2.0, "max_image_seq_len": 64,
                      "base_image_seq_len": 4}],
    ids=["fixed", "by-size"],
)  # fmt: skip
def test_the_schedule_is_the_pipelines_own(family, config, size, monkeypatch):
    monkeypatch.setattr(family.pipe, "scheduler", FlowMatchEulerDiscreteScheduler(**config))
    family.pipe("x", *size, num_inference_steps=4, output_type="latent", guidance_scale=0.0)
    ours = flow.few_step_times(4, family.noise_shift(*size))
    torch.testing.assert_close(ours, family.pipe.scheduler.sigmas[:-1], atol=1e-6, rtol=0)
    saved = family.few_step_scheduler(family.noise_shift(*size))
    saved.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(saved.sigmas[:-1], ours, atol=1e-6, rtol=0)
    assert saved.config.stochastic_sampling


def test_decoding_undoes_the_scaling_passes_gradient_and_is_not_clamped(family):
    x, vae = (4 * latents(family, 1)).requires_grad_(), family.pipe.vae
    image = family.decode(x)
    assert image.shape == (1, 3, HEIGHT, WIDTH)
    image.square().sum().backward()
    assert x.grad.abs().min() > 0
    raw = vae.decode(x.detach() / vae.config.scaling_factor + vae.config.shift_factor).sample
    torch.testing.assert_close(image.detach(), raw / 2 + 0.5, atol=1e-6, rtol=0)
    assert float(family.decode(100 * x.detach()).min()) < 0
    mean = vae.encode(pictures(2) * 2 - 1).latent_dist.mode()
    latent = family.encode(pictures(2))
    torch.testing.assert_close(latent / 1.3 + 0.1, mean, atol=1e-6, rtol=0)
    assert not latent.requires_grad and all(p.grad is None for p in vae.parameters())


def test_facts_are_those_of_the_parts(family):
    """Sizes of `multiple` go all the way; of half of it, they do not."""
    facts, text, t = family.facts, family.encode_text(["x"]), torch.tensor([0.5])
    for height, width in ((1, 3), (5, 2)):
        image = pictures(1, height * facts.multiple, width * facts.multiple)
        x = family.encode(image)
        assert x.shape == (1, facts.channels, image.shape[2] // facts.stride, image.shape[3] // facts.stride)
        with torch.no_grad():
            assert family.decode(family.velocity(family.base, x, t, text, (x,))).shape == image.shape
    with pytest.raises(RuntimeError):
        family.velocity(family.base, latents(family, 1, 24, 24 + facts.multiple // 2), t, text)
    names = dict(family.base.named_modules())
    assert all(len(names[b]) for b in facts.blocks)
    blocks = [n for n, m in names.items() if type(m).__name__ in ZImageTransformer2DModel._no_split_modules]
    assert blocks and all(n.rsplit(".", 1)[0] in facts.blocks for n in blocks)


# ----------------------------------------------------------------------------------------------------- nets, folders


def test_a_net_is_a_trainable_copy_saved_and_opened(family, tmp_path):
    net, before = family.trainable_net(), [p.clone() for p in family.base.parameters()]
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.01)
    assert all(torch.equal(a, b) for a, b in zip(before, family.base.parameters()))
    net.save_pretrained(tmp_path / "transformer")
    opened = family.open_net(tmp_path / "transformer")
    x, t, text = latents(family, 1), torch.tensor([0.5]), family.encode_text(PROMPTS[:1])
    with torch.no_grad():
        outs = [family.velocity(n, x, t, text, (x,)) for n in (net, opened, family.base)]
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2])


class TestFolder(FolderChecks):
    kind, pipeline, parts = ZImage, "ZImagePipeline", ("transformer", "vae", "tokenizer")
