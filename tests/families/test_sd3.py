"""SD3 against diffusers' own pipeline: the same call of the net, the same pictures, the same schedule."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Img2ImgPipeline

from npedit import flow
from npedit.families.sd3 import SD3, _place_references
from tests.support.family_checks import (
    GRID,
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


class TestSD3(FamilyChecks):
    """See `family_checks`."""

    kind, pipeline, parts = SD3, "StableDiffusion3Pipeline", ("transformer", "vae", "text_encoder_3", "tokenizer")

    # ---------------------------------------------------------------------------------------------- text to image

    def test_sampling_is_the_pipelines_own(self, family):
        eps = latents(family, 2)
        theirs, out = record_calls(
            family.base,
            lambda: family.pipe(
                PROMPTS, height=HEIGHT, width=WIDTH, num_inference_steps=4, guidance_scale=1.0, latents=eps,
                output_type="latent", max_sequence_length=family.text_length,
            ).images,
        )  # fmt: skip
        text = family.encode_text(PROMPTS)
        ours, x = record_calls(family.base, lambda: euler(family, eps, text))
        assert len(ours) == len(theirs) == 4
        for a, b in zip(ours, theirs):
            assert_same(a, b, ("hidden_states", "encoder_hidden_states", "pooled_projections"))
            torch.testing.assert_close(a["timestep"], b["timestep"], atol=1e-3, rtol=0)  # of 1000
        torch.testing.assert_close(x, out, atol=1e-5, rtol=0)
        assert (x - eps).abs().max() > 0.1  # the net did something

    def test_its_guidance_is_the_pipelines_default(self, family):
        assert inspect.signature(family.pipe.__call__).parameters["guidance_scale"].default == family.facts.guidance
        eps = latents(family, 2)
        out = family.pipe(
            PROMPTS, height=HEIGHT, width=WIDTH, num_inference_steps=4, latents=eps, output_type="latent",
            max_sequence_length=family.text_length,
        ).images  # fmt: skip
        x = euler(family, eps, family.encode_text(PROMPTS), guidance=family.facts.guidance)
        torch.testing.assert_close(x, out, atol=1e-4, rtol=0)

    def test_decoded_pictures_are_the_pipelines_own(self, family):
        x = latents(family, 2)
        wanted = family.pipe(
            PROMPTS, height=HEIGHT, width=WIDTH, num_inference_steps=2, guidance_scale=1.0, latents=x, output_type="pt",
            max_sequence_length=family.text_length,
        ).images  # fmt: skip
        ours = family.decode(euler(family, x, family.encode_text(PROMPTS))).clamp(0, 1)
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)

    def test_encoding_is_the_pipelines_own(self, family):
        """Its image-to-image sister draws from the posterior and noises; with its draws, our mean gives its latents."""
        parts = {k: v for k, v in family.pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
        sister, seeded = StableDiffusion3Img2ImgPipeline(**parts), torch.Generator().manual_seed
        sister.scheduler.set_timesteps(4)
        image, time = sister.image_processor.preprocess(pictures(1)), sister.scheduler.timesteps[2:3]
        theirs = sister.prepare_latents(image, time, 1, 1, torch.float32, torch.device("cpu"), seeded(0))
        posterior, generator = family.pipe.vae.encode(image).latent_dist, seeded(0)
        from_mean, eps = (torch.randn(posterior.mean.shape, generator=generator) for _ in range(2))
        x0 = family.encode(pictures(1)) + posterior.std * from_mean * family.pipe.vae.config.scaling_factor
        torch.testing.assert_close(flow.add_noise(x0, eps, time / 1000), theirs, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("size", [(24, 40), (64, 32), (16, 16)])
    @pytest.mark.parametrize(
        "config",
        [
            {"shift": 1.0},
            {"shift": 3.0},
            {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "max_image_seq_len": 4096},
            {"use_dynamic_shifting": True, "base_shift": 0.2, "max_shift": 2.0, "base_image_seq_len": 4,
             "max_image_seq_len": 64, "time_shift_type": "linear"},
        ],
        ids=["none", "sd3", "dynamic", "linear"],
    )  # fmt: skip
    def test_the_schedule_is_the_pipelines_own_on_the_methods_grid(self, family, monkeypatch, config, size):
        monkeypatch.setattr(family.pipe, "scheduler", FlowMatchEulerDiscreteScheduler(**config))
        height, width = size
        family.pipe(
            "x", height=height, width=width, sigmas=GRID, guidance_scale=1.0, output_type="latent",
            max_sequence_length=family.text_length, num_inference_steps=4,
        )  # fmt: skip
        ours = flow.few_step_times(4, family.noise_shift(height, width))
        torch.testing.assert_close(ours, family.pipe.scheduler.sigmas[:-1], atol=1e-6, rtol=0)

    # ------------------------------------------------------------------------------------------------- references

    def test_references_enter_as_one_canvas_would_hold_them(self, family):
        """A picture and its reference are what the net's own forward makes of both on one canvas, when that canvas is
        given the codes of the same places: only the codes are ours."""
        net, t, text = family.trainable_net().eval(), torch.tensor([0.6]), family.encode_text(PROMPTS[:1])
        x, r = latents(family, 1), latents(family, 1, seed=1)
        table, wide = net.config.pos_embed_max_size, WIDTH // family.facts.multiple
        grid = net.pos_embed.pos_embed.view(table, table, -1)
        shift = (table - 2 * wide) // 2 - (table - wide) // 2  # both are cut from the middle
        with torch.no_grad():
            ours = family.velocity(net, x, t, text, (r,))
            net.pos_embed.pos_embed.copy_(grid.roll(shift, 1).reshape(1, table * table, -1))
            canvas = family.velocity(net, torch.cat([x, r], 3), t, text)
        torch.testing.assert_close(ours, canvas[..., : x.shape[3]], atol=1e-5, rtol=0)

    def test_a_reference_lies_on_the_first_side_with_room(self):
        same = (4, 6)
        assert _place_references(4, 6, [same] * 4, 24) == [(10, 15), (14, 9), (10, 3), (6, 9)]
        assert _place_references(4, 6, [(2, 2)], 24) == [(11, 15)]
        assert _place_references(4, 10, [(4, 10)], 24) == [(14, 7)]  # no room on the right
        for sizes in ([same] * 5, [(4, 30)], [(25, 1)]):
            with pytest.raises(ValueError, match="24 x 24.*smaller pictures or fewer"):
                _place_references(4, 6, sizes, 24)

    def test_too_many_references_leave_the_net_as_it_was(self, family):
        x, t, text = latents(family, 1), torch.tensor([0.6]), family.encode_text(PROMPTS[:1])
        with torch.no_grad():
            before = family.velocity(family.base, x, t, text)
            with pytest.raises(ValueError, match="fewer"):
                family.velocity(family.base, x, t, text, [x] * 5)
            with pytest.raises(RuntimeError):
                family.velocity(family.base, x, t, text, [x[:, :1]])  # fails inside the net
            assert torch.equal(family.velocity(family.base, x, t, text), before)

    # ------------------------------------------------------------------------------------------------ facts, folders

    def test_its_multiple_is_the_pipelines_own(self, family):
        assert family.facts.multiple == family.pipe.vae_scale_factor * family.pipe.patch_size
        with pytest.raises(ValueError, match=f"divisible by {family.facts.multiple}"):
            family.pipe("x", height=family.facts.multiple + 4, width=WIDTH)

    def test_a_folder_without_t5_is_loaded(self, folder, family, tmp_path):
        """SD3 is often kept without its largest text encoder; the pipeline then gives zeros in its place."""
        parts = {k: v for k, v in family.pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
        type(family.pipe)(**{**parts, "text_encoder_3": None, "tokenizer_3": None}).save_pretrained(tmp_path / "base")
        assert json.loads((tmp_path / "base" / "model_index.json").read_text())["text_encoder_3"] == [None, None]
        loaded = SD3.load(tmp_path / "base", torch.float32, torch.device("cpu"))
        states = loaded.encode_text(PROMPTS).parts[0]
        assert states.shape[0] == 2 and states[:, 64:].abs().max() == 0 and states[:, :64].abs().max() > 0
