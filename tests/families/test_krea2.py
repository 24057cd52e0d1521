"""Krea 2 against diffusers' own pipeline: the same net's output, the same pictures, the same schedule."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline
from diffusers.configuration_utils import FrozenDict

from npedit import flow
from npedit.families.krea2 import Krea2
from tests.support.family_checks import HEIGHT, PROMPTS, WIDTH, FamilyChecks, assert_same, euler, latents, record_calls


def packed(pipe, x):
    return pipe._pack_latents(x, *x.shape)


def unpacked(pipe, x):
    return pipe._unpack_latents(x, HEIGHT, WIDTH)[:, :, 0]


class TestKrea2(FamilyChecks):
    """See `family_checks`."""

    kind, pipeline, parts = Krea2, "Krea2Pipeline", ("transformer", "vae", "text_encoder", "tokenizer")

    # ---------------------------------------------------------------------------------------------- text to image

    @pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["padded", "one"])
    def test_sampling_is_the_pipelines_own(self, family, prompts):
        pipe, eps = family.pipe, latents(family, len(prompts))
        theirs, out = record_calls(
            family.base,
            lambda: pipe(
                prompts, height=HEIGHT, width=WIDTH, num_inference_steps=4, latents=packed(pipe, eps),
                output_type="latent", guidance_scale=0.0, max_sequence_length=family.text_length,
            ).images,
        )  # fmt: skip
        text = family.encode_text(prompts)
        ours, x = record_calls(family.base, lambda: euler(family, eps, text))
        assert len(ours) == len(theirs) == 4
        for a, b in zip(ours, theirs):
            assert_same(a, b, ("hidden_states", "timestep"))
            kept = b["encoder_attention_mask"].any(0)
            assert torch.equal(a["encoder_hidden_states"], b["encoder_hidden_states"][:, kept])
            words = int(kept.sum())
            assert words < len(kept)  # there is padding to leave out
            assert torch.equal(a["position_ids"][words:], b["position_ids"][len(kept) :])
            assert not a["position_ids"][:words].any() and not b["position_ids"][: len(kept)].any()
        torch.testing.assert_close(x, unpacked(pipe, out), atol=1e-5, rtol=0)
        assert (x - eps).abs().max() > 0.1  # the net did something

    def test_its_guidance_is_the_pipelines_default(self, family):
        """Which counts from the conditional velocity, so it is one less than ours."""
        scale = inspect.signature(family.pipe.__call__).parameters["guidance_scale"].default
        assert family.facts.guidance == 1 + scale and Krea2.tiny(1).facts.guidance == 1
        eps = latents(family, 2)
        out = family.pipe(
            PROMPTS, height=HEIGHT, width=WIDTH, num_inference_steps=4, latents=packed(family.pipe, eps),
            output_type="latent", max_sequence_length=family.text_length,
        ).images  # fmt: skip
        x = euler(family, eps, family.encode_text(PROMPTS), guidance=family.facts.guidance)
        torch.testing.assert_close(x, unpacked(family.pipe, out), atol=1e-4, rtol=0)

    def test_decoded_pictures_are_the_pipelines_own(self, family):
        x = latents(family, 2)
        wanted = family.pipe(
            PROMPTS, height=HEIGHT, width=WIDTH, num_inference_steps=2, latents=packed(family.pipe, x),
            output_type="pt", guidance_scale=0.0, max_sequence_length=family.text_length,
        ).images  # fmt: skip
        ours = family.decode(euler(family, x, family.encode_text(PROMPTS))).clamp(0, 1)
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)

    # ------------------------------------------------------------------------------------------------- references

    def test_a_reference_has_the_next_first_coordinate(self, family):
        x, text, t = latents(family, 1), family.encode_text(PROMPTS[:1]), torch.tensor([0.7])
        references = (latents(family, 1, seed=1), latents(family, 1, 16, 16, seed=2))
        with torch.no_grad():
            calls, _ = record_calls(family.base, lambda: family.velocity(family.base, x, t, text, references))
        tokens, ids = calls[0]["hidden_states"], calls[0]["position_ids"][-(15 + 15 + 4) :]
        assert tokens.shape[1] == len(ids) == 15 + 15 + 4
        assert [int((ids[:, 0] == i).sum()) for i in range(3)] == [15, 15, 4]
        assert torch.equal(ids[:15, 1:], ids[15:30, 1:]) and ids[-1].tolist() == [2, 1, 1]
        assert torch.equal(tokens[:, 15:30], packed(family.pipe, references[0]))

    # --------------------------------------------------------------------------------------------- schedule, facts

    @pytest.mark.parametrize("size", [(24, 40), (64, 32)])
    @pytest.mark.parametrize("distilled", [False, True], ids=["base", "distilled"])
    @pytest.mark.parametrize(
        "config",
        [
            {"shift": 3.0},
            {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "max_image_seq_len": 6400},
            {
                "use_dynamic_shifting": True,
                "base_shift": 0.2,
                "max_shift": 2.0,
                "base_image_seq_len": 4,
                "max_image_seq_len": 64,
            },
        ],
        ids=["fixed", "krea2", "steep"],
    )
    def test_the_schedule_is_the_pipelines_own(self, family, monkeypatch, config, distilled, size):
        monkeypatch.setattr(family.pipe, "scheduler", FlowMatchEulerDiscreteScheduler(**config))
        monkeypatch.setattr(family.pipe, "_internal_dict", FrozenDict(family.pipe.config | {"is_distilled": distilled}))
        height, width = size
        family.pipe(
            "x", height=height, width=width, num_inference_steps=4, output_type="latent", guidance_scale=0.0,
            max_sequence_length=family.text_length,
        )  # fmt: skip
        ours = flow.few_step_times(4, family.noise_shift(height, width))
        torch.testing.assert_close(ours, family.pipe.scheduler.sigmas[:-1], atol=1e-6, rtol=0)

    def test_what_the_folder_says_of_the_pipeline_is_kept(self, tmp_path):
        """Tapped layers and whether it is distilled stand in the index, not in a part."""
        Krea2.tiny(1).pipe.save_pretrained(tmp_path)
        loaded = Krea2.load(tmp_path, torch.float32, torch.device("cpu"))
        assert loaded.pipe.config.is_distilled and tuple(loaded.pipe.text_encoder_select_layers) == (1, 3)

    def test_its_multiple_is_the_pipelines_own(self, family):
        assert family.facts.multiple == family.pipe.vae_scale_factor * family.pipe.patch_size

    def test_other_patches_are_refused(self, family):
        pipe = Krea2Pipeline(**family.pipe.components, text_encoder_select_layers=(1, 3), patch_size=1)
        with pytest.raises(ValueError, match="2 x 2 latents; got 1"):
            Krea2(pipe, torch.device("cpu"))
