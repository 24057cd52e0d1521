"""Qwen-Image against diffusers' own pipelines, text-to-image and edit: the same call of the net, the same pictures."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image

from npedit import flow
from npedit.families.qwen_image import TEXT_LENGTH, QwenImage
from tests.support.family_checks import (
    HEIGHT,
    PROMPTS,
    WIDTH,
    FamilyChecks,
    assert_same,
    euler,
    latents,
    pictures,
    record_calls,
)

ARGUMENTS = ("hidden_states", "timestep", "encoder_hidden_states")


def packed(pipe, x):
    return pipe._pack_latents(x, *x.shape)


def unpacked(pipe, x):
    return pipe._unpack_latents(x, HEIGHT, WIDTH, pipe.vae_scale_factor)[:, :, 0]


class TestQwenImage(FamilyChecks):
    """See `family_checks`."""

    kind, pipeline, parts = QwenImage, "QwenImagePipeline", ("transformer", "vae", "text_encoder", "tokenizer")

    def without_gradient(self, net):
        """The last block's text is never read."""
        last = f"transformer_blocks.{len(net.transformer_blocks) - 1}"
        return [n for n, _ in net.named_parameters() if n.startswith((f"{last}.txt_mlp", f"{last}.attn.to_add_out"))]

    # ---------------------------------------------------------------------------------------------- text to image

    @pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["padded", "one"])
    def test_sampling_is_the_pipelines_own(self, family, prompts):
        pipe, eps = family.pipe, latents(family, len(prompts))
        theirs, out = record_calls(
            family.base,
            lambda: pipe(
                prompts, height=HEIGHT, width=WIDTH, num_inference_steps=4, latents=packed(pipe, eps),
                output_type="latent",
            ).images,
        )  # fmt: skip
        text = family.encode_text(prompts)
        ours, x = record_calls(family.base, lambda: euler(family, eps, text))
        assert len(ours) == len(theirs) == 4
        for a, b in zip(ours, theirs):
            assert_same(a, b, ARGUMENTS)
            assert a["img_shapes"] == b["img_shapes"] == [[(1, 3, 5)]] * len(prompts)
            if len(prompts) == 1:
                assert a["encoder_hidden_states_mask"] is b["encoder_hidden_states_mask"] is None
            else:
                assert torch.equal(a["encoder_hidden_states_mask"], b["encoder_hidden_states_mask"].bool())
        torch.testing.assert_close(x, unpacked(pipe, out), atol=1e-5, rtol=0)
        assert (x - eps).abs().max() > 0.1  # the net did something

    def test_its_guidance_is_the_pipelines_default(self, family):
        assert inspect.signature(family.pipe.__call__).parameters["true_cfg_scale"].default == family.facts.guidance

    def test_decoded_pictures_are_the_pipelines_own(self, family):
        x = latents(family, 2)
        wanted = family.pipe(
            PROMPTS, height=HEIGHT, width=WIDTH, num_inference_steps=2, latents=packed(family.pipe, x), output_type="pt"
        ).images
        ours = family.decode(euler(family, x, family.encode_text(PROMPTS))).clamp(0, 1)
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)

    def test_text_is_padded_behind_the_words(self, family):
        states, mask = family.encode_text(PROMPTS).parts
        assert states.shape[1] == mask.shape[1] == TEXT_LENGTH and mask.dtype is torch.bool
        lengths = mask.sum(1)
        assert lengths[0] < lengths[1] < TEXT_LENGTH
        for row, kept, length in zip(states, mask, lengths):
            assert kept[:length].all() and not kept[length:].any() and row[length:].abs().max() == 0

    def test_a_prompt_that_is_too_long_is_cut(self, family):
        states, mask = family.encode_text(["x" * 2000]).parts
        assert states.shape[1] == TEXT_LENGTH and mask.all()

    # ------------------------------------------------------------------------------------------------- references

    @pytest.mark.parametrize("count", [1, 2])
    def test_references_are_given_as_the_edit_pipeline_gives_them(self, family, monkeypatch, count):
        """QwenImageEditPlusPipeline on the same parts and the same text: the same tokens, shapes and picture."""
        monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 32)  # so that it does not enlarge
        edit = QwenImageEditPlusPipeline(**family.pipe.components, processor=None)
        edit.set_progress_bar_config(disable=True)
        eps, text = latents(family, 1), family.encode_text(PROMPTS[:1])
        words = int(text.parts[1].sum())
        images = [pictures(1, 32, 64), pictures(1, 64, 32, seed=4)][:count]
        images = [(255 * image).round() / 255 for image in images]
        as_pil = [Image.fromarray(np.uint8((255 * i[0]).round().permute(1, 2, 0).numpy())) for i in images]
        theirs, out = record_calls(
            family.base,
            lambda: edit(
                image=as_pil, prompt_embeds=text.parts[0][:, :words], prompt_embeds_mask=text.parts[1][:, :words],
                height=HEIGHT, width=WIDTH, num_inference_steps=4, latents=packed(edit, eps), output_type="latent",
            ).images,
        )  # fmt: skip
        references = tuple(family.encode(image) for image in images)
        ours, x = record_calls(family.base, lambda: euler(family, eps, text, references))
        for a, b in zip(ours, theirs):
            assert_same(a, b, ARGUMENTS)
            assert a["img_shapes"] == b["img_shapes"] == [[(1, 3, 5), (1, 4, 8), (1, 8, 4)][: 1 + count]]
        torch.testing.assert_close(x, unpacked(edit, out), atol=1e-5, rtol=0)

    # ------------------------------------------------------------------------------------------------- schedule, VAE

    @pytest.mark.parametrize("size", [(24, 40), (64, 32), (16, 16)])
    @pytest.mark.parametrize(
        "config",
        [
            {"shift": 3.0},
            {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192},
            {
                "use_dynamic_shifting": True,
                "base_shift": 0.2,
                "max_shift": 2.0,
                "base_image_seq_len": 4,
                "max_image_seq_len": 64,
            },
        ],
        ids=["fixed", "qwen-image", "steep"],
    )
    def test_the_schedule_is_the_pipelines_own(self, family, monkeypatch, config, size):
        monkeypatch.setattr(family.pipe, "scheduler", FlowMatchEulerDiscreteScheduler(**config))
        height, width = size
        family.pipe("x", height=height, width=width, num_inference_steps=4, output_type="latent")
        ours = flow.few_step_times(4, family.noise_shift(height, width))
        torch.testing.assert_close(ours, family.pipe.scheduler.sigmas[:-1], atol=1e-6, rtol=0)

    def test_the_stretch_to_the_terminal_time_is_left_out(self, family):
        """The pipeline's times are ours, stretched: 1 - t multiplied so that the last one is 0.02."""
        family.pipe("x", height=HEIGHT, width=WIDTH, num_inference_steps=4, output_type="latent")
        theirs, ours = family.pipe.scheduler.sigmas[:-1], flow.few_step_times(4, family.noise_shift(HEIGHT, WIDTH))
        assert theirs[-1] == pytest.approx(0.02) and ours[-1] > 0.3
        torch.testing.assert_close((1 - theirs[1:]) / (1 - ours[1:]), torch.full((3,), 0.98 / float(1 - ours[-1])))
        assert family.few_step_scheduler(1.6).config.shift_terminal is None

    def test_encoding_is_the_edit_pipelines_own(self, family):
        edit = QwenImageEditPlusPipeline(**family.pipe.components, processor=None)
        wanted = edit._encode_vae_image(edit.image_processor.preprocess(pictures(2)).unsqueeze(2), generator=None)
        torch.testing.assert_close(family.encode(pictures(2)), wanted[:, :, 0], atol=1e-6, rtol=0)

    def test_decoding_is_the_vaes_own_before_its_clamp(self, family):
        vae, x = family.pipe.vae, latents(family, 2)
        mean, deviation = (torch.tensor(s).view(1, -1, 1, 1) for s in (vae.config.latents_mean, vae.config.latents_std))
        with torch.no_grad():
            ours, theirs = family.decode(x), vae.decode((x * deviation + mean).unsqueeze(2)).sample[:, :, 0]
        assert (theirs.abs() == 1).any() and (theirs.abs() < 1).any()  # some of it is clamped
        torch.testing.assert_close(ours.clamp(0, 1), theirs / 2 + 0.5, atol=1e-5, rtol=0)

    def test_its_multiple_is_the_pipelines_own(self, family):
        assert family.facts.multiple == 2 * family.pipe.vae_scale_factor
