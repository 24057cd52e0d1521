"""InternVL against transformers' own processor and forward pass, and its gradient against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import InternVLProcessor

from npedit.critics.internvl import InternVL
from tests.support.chat_critics import LONG, ChatCriticChecks, images, photo, processor_without_video, tensor


@pytest.fixture(scope="module")
def critic() -> InternVL:
    return InternVL.tiny(0)


class TestInternVL(ChatCriticChecks):
    def make(self, seed):
        return InternVL.tiny(seed)

    def hf_inputs(self, critic, prompts, pictures, **options):
        processor = processor_without_video(
            InternVLProcessor, critic, image_seq_length=options.pop("image_seq_length", 4)
        )
        flat = [p for looks in pictures for p in looks]
        return processor(
            text=prompts, images=flat, crop_to_patches=False, padding=True, return_tensors="pt", **options
        )  # fmt: skip

    def test_an_image_is_one_tile_of_four_tokens(self, critic):
        assert [s.shape for s in critic.encode_images(images(2, 64, 160))] == [(4, 48)] * 2

    @pytest.mark.parametrize("side", [16, 48, 64])
    def test_another_resolution_is_the_plain_models_at_that_size(self, critic, side):
        other = self.rebuilt(critic, critic.template, side)
        array, size = photo(side, side, 0), {"height": side, "width": side}
        inputs = self.hf_inputs(
            critic, [critic._prompt(LONG, 1)], [[Image.fromarray(array)]], size=size, image_seq_length=(side // 16) ** 2
        )
        assert inputs["pixel_values"].shape[-2:] == (side, side)
        with torch.no_grad():
            wanted = critic.model(**inputs).logits[:, -1]
        torch.testing.assert_close(
            other.logits([LONG], [other.encode_images(tensor(array))]), wanted, atol=1e-5, rtol=1e-5
        )
        scaled = photo(40, 56, 1)
        theirs = critic.processor(Image.fromarray(scaled), size=size, return_tensors="pt")["pixel_values"]
        std = torch.tensor(critic.processor.image_std)[:, None, None]
        assert (255 * ((other.pixels(tensor(scaled)) - theirs) * std).abs()).max() <= self.away_most

    def test_a_resolution_that_cuts_tokens_is_refused(self, critic):
        with pytest.raises(ValueError, match="0 or a multiple of 16.*got 40"):
            self.rebuilt(critic, critic.template, 40)

    def test_each_channel_has_its_own_mean_and_deviation(self, critic):
        even = critic.pixels(torch.full((1, 3, 8, 8), 0.5))[0].mean((1, 2)).numpy()
        wanted = (0.5 - np.array(critic.processor.image_mean)) / np.array(critic.processor.image_std)
        np.testing.assert_allclose(even, wanted, rtol=1e-5)
