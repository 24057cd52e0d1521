"""LLaVA-OneVision against transformers' own processor and forward pass, and its gradient against finite differences."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from npedit.critics.base import answer_token
from npedit.critics.llava_onevision import LlavaOnevision
from tests.support.chat_critics import SHORT, ChatCriticChecks, images, photo, tensor


@pytest.fixture(scope="module")
def critic() -> LlavaOnevision:
    return LlavaOnevision.tiny(0)


class TestLlavaOnevision(ChatCriticChecks):
    test_a_template_that_thinks_first_is_refused = None  # answers are not looked for in the template

    def make(self, seed):
        return LlavaOnevision.tiny(seed)

    def hf_pixels(self, critic, array):
        """The image as one of several, which have no tiles."""
        image = Image.fromarray(array)
        return critic.processor([[image, image]], return_tensors="pt")["pixel_values"][0]

    def hf_inputs(self, critic, prompts, pictures):
        """Images by their number: each is one square, as among several."""
        each = (critic.side // critic.model.config.vision_config.patch_size) ** 2 + 1  # patches and a newline
        critic.tokenizer.padding_side = "left"
        text = critic.tokenizer(
            [p.replace("<image>", "<image> " * each) for p in prompts], padding=True, return_tensors="pt"
        )
        seen = [critic.processor([[p, p]], return_tensors="pt")["pixel_values"][0] for looks in pictures for p in looks]
        return {
            "input_ids": text.input_ids,
            "attention_mask": text.attention_mask,
            "pixel_values": torch.stack(seen),  # (images, patches = 1, 3, side, side)
            "image_sizes": torch.full((len(seen), 2), critic.side),
            "batch_num_images": torch.tensor([max(2, len(seen))]),
        }

    def test_pixels_at_the_towers_size_are_exact(self, critic):
        array = photo(32, 32, 5)
        torch.testing.assert_close(critic.pixels(tensor(array)), self.hf_pixels(critic, array), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("size", [(40, 8), (41, 130), (130, 41), (96, 160), (160, 96), (31, 32), (33, 32)])
    def test_pixels_are_the_processors_with_edges_whatever_side_is_longer(self, critic, size):
        """Tall ones with hard edges too: what is resized is a square."""
        self.test_pixels_are_the_processors(critic, size, True)

    def test_a_picture_keeps_its_aspect_ratio_in_a_square_of_the_mean_colour(self, critic):
        for way in (torch.float32, torch.bfloat16):
            wide, tall = (critic.pixels(images(1, *size).to(way)) for size in ((24, 96), (96, 24)))
            for square in (wide, tall.transpose(-1, -2)):
                around = torch.cat([square[..., :10, :], square[..., 22:, :]], -2)  # the picture is in lines 12 to 19
                assert torch.allclose(around, torch.tensor((127 / 255 - 0.5) / 0.5), atol=1e-5)
                assert square[..., 12:20, :].std() > 0.1 and square.dtype is torch.float32

    @pytest.mark.parametrize("size", [(24, 40), (40, 24)])
    def test_every_pixel_of_a_picture_that_is_not_square_has_its_own_gradient(self, critic, size):
        """That of the padded and resized picture, and none through the colour around it."""
        picture = (0.1 + 0.8 * images(1, *size).double()).requires_grad_()
        assert torch.autograd.gradcheck(critic.pixels, picture, fast_mode=True)
        critic.margin([SHORT], [critic.encode_images(picture.float())]).sum().backward()
        assert (picture.grad.abs().amax(1) > 0).all()

    def test_pixels_use_each_channels_own_mean_and_deviation(self):
        critic = LlavaOnevision.tiny(0)
        critic.processor.image_mean, critic.processor.image_std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.2]
        self.test_pixels_are_the_processors(critic, (28, 40), True)

    def test_an_image_is_its_patches_and_a_newline(self, critic):
        assert [s.shape for s in critic.encode_images(images(2, 64, 160))] == [(17, 48)] * 2

    def test_yes_and_no_are_the_tokens_that_the_template_makes_of_them(self, critic):
        """The template of the toy critic has no answered turns."""
        assert [critic.tokenizer.convert_ids_to_tokens(i) for i in (critic.yes, critic.no)] == ["yes", "no"]

    def test_an_answer_that_melts_into_the_prompt_is_refused(self, critic):
        with pytest.raises(ValueError, match="one token after the prompt"):
            answer_token(critic.tokenizer, "is it ? do", "g")  # "dog" is one word
        for word, why in [("yes no", "to be one token"), ("zebra", "<unk>"), ("", "to be one token")]:
            with pytest.raises(ValueError, match=why):
                answer_token(critic.tokenizer, "is it ? answer ", word)

    def test_a_model_without_yes_is_refused(self):
        with pytest.raises(ValueError, match="'Yes' to be one token"):
            LlavaOnevision.untrained(["no", "answer", "is", "it"], 0, vision=(32, 64, 1), text=(48, 96, 1))

    def test_another_resolution_is_refused(self, critic):
        with pytest.raises(ValueError, match="0 or 32.*got 64"):
            self.rebuilt(critic, critic.template, 64)

    @torch.no_grad()
    def test_the_last_hidden_states_are_those_that_answer(self, critic):
        seen = [critic.encode_images(images(2)), critic.encode_images(images(1))]
        states, last = critic.hidden_states([SHORT, SHORT + SHORT], seen)
        answered = critic.model.lm_head(states[-1][[0, 1], last])
        assert torch.equal(answered, critic.logits([SHORT, SHORT + SHORT], seen)) and len(states) == 3
