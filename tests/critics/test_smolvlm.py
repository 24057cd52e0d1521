"""SmolVLM2 against transformers' own processor and forward pass, and its gradient against finite differences."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from npedit.critics.smolvlm import SmolVLM, resize_lanczos
from tests.support.chat_critics import SHORT, ChatCriticChecks, images


@pytest.fixture(scope="module")
def critic() -> SmolVLM:
    return SmolVLM.tiny(0)


class TestSmolVLM(ChatCriticChecks):
    away_most, away_mean = 2.2, 0.6  # the processor scales twice what is not square
    answers = (" Yes", " No")

    def make(self, seed):
        return SmolVLM.tiny(seed)

    def hf_pixels(self, critic, array):
        return critic.processor(Image.fromarray(array), do_image_splitting=False, return_tensors="pt")["pixel_values"][
            0
        ]

    def hf_inputs(self, critic, prompts, pictures):
        """Its processor as a whole needs a package for numerals; this is what it does with images."""
        one = get_image_prompt_string(0, 0, 4, "<fake_token_around_image>", "<image>", "<global-img>")
        critic.tokenizer.padding_side = "left"
        text = critic.tokenizer([p.replace("<image>", one) for p in prompts], padding=True, return_tensors="pt")
        seen = critic.processor(pictures, do_image_splitting=False, return_tensors="pt")
        return {"input_ids": text.input_ids, "attention_mask": text.attention_mask, **seen}

    def test_pixels_scaled_up_first_are_the_processors(self):
        """As the real models' processors do: to 4 times the tower's side, then down."""
        critic = SmolVLM.tiny(0)
        critic.processor.size = {"longest_edge": 128}
        for size in ((32, 32), (40, 57), (24, 24), (192, 256), (150, 150)):
            for edges in (False, True):
                self.test_pixels_are_the_processors(critic, size, edges)

    def test_an_image_is_four_tokens(self, critic):
        assert [s.shape for s in critic.encode_images(images(2, 64, 160))] == [(4, 48)] * 2

    def test_an_evenly_grey_image_is_seen(self, critic):
        """transformers' own get_image_features takes it for padding."""
        grey = critic.encode_images(torch.full((2, 3, 32, 32), 0.5))
        assert torch.equal(grey[0], grey[1]) and torch.isfinite(critic.margin([SHORT], [grey])).all()

    def test_another_resolution_is_refused(self, critic):
        with pytest.raises(ValueError, match="0 or 32.*got 64"):
            self.rebuilt(critic, critic.template, 64)

    def test_lanczos_keeps_an_even_picture_and_does_nothing_at_its_own_size(self):
        even = torch.full((1, 3, 17, 40), 0.7, dtype=torch.float64)
        torch.testing.assert_close(resize_lanczos(even, 23, 9), torch.full((1, 3, 23, 9), 0.7, dtype=torch.float64))
        assert torch.equal(resize_lanczos(images(1), 32, 32), images(1))
