"""Qwen2.5-VL and Qwen3-VL against transformers' own processor and forward pass; gradient against finite differences."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLProcessor, Qwen3VLProcessor

from npedit.critics.qwen_vl import QwenVL
from tests.support.chat_critics import LONG, SHORT, ChatCriticChecks, images, photo, processor_without_video, tensor


class QwenChecks(ChatCriticChecks):
    kind: str
    hf: type

    @pytest.fixture(scope="class")
    def critic(self) -> QwenVL:
        return QwenVL.tiny(0, self.kind)

    def make(self, seed):
        return QwenVL.tiny(seed, self.kind)

    def our_pixels(self, critic, picture):
        return critic.patches(critic.pixels(picture))[0]

    def hf_inputs(self, critic, prompts, pictures):
        critic.tokenizer.padding_side = "left"
        flat = [p for looks in pictures for p in looks]
        return processor_without_video(self.hf, critic)(text=prompts, images=flat, padding=True, return_tensors="pt")

    def test_visual_tokens_keep_their_grid(self, critic):
        layers = 3 if self.kind == "qwen3_vl" else 1
        assert [s.shape for s in critic.encode_images(images(2, 40, 60))] == [(2, 4, 48 * layers)] * 2

    def test_images_of_other_shapes_in_one_batch_are_the_plain_models(self, critic):
        """Two grids of equally many tokens, and a larger one: the positions must be each image's own."""
        wide, tall, large = photo(32, 48, 0), photo(48, 32, 1), photo(48, 48, 2)
        questions, arrays = [LONG, SHORT, SHORT, LONG], [[wide, tall], [tall, wide], [large], [large, wide]]
        ours = critic.logits(questions, [self.encode_images(critic, looks) for looks in arrays])
        torch.testing.assert_close(ours, self.hf_logits(critic, questions, arrays), atol=1e-5, rtol=1e-5)

    def test_positions_are_the_plain_models(self, critic):
        seen = self.encode_images(critic, [photo(32, 48, 0), photo(48, 32, 1)])
        ids = torch.tensor([critic._prompt_ids(LONG, seen)])
        kinds = (ids == critic.model.config.image_token_id).int()
        grid = torch.tensor([[1, 4, 6], [1, 6, 4]])
        wanted, _ = critic.model.model.get_rope_index(ids, kinds, image_grid_thw=grid)
        assert torch.equal(critic._rope_positions(ids[0].tolist(), iter(seen)), wanted[:, 0])

    @pytest.mark.parametrize("side", [16, 32, 40, 80])
    def test_resolution_is_the_root_of_the_area(self, critic, side):
        other = self.rebuilt(critic, critic.template, side)
        for size in [(64, 64), (100, 50), (20, 30), (32, 32)]:
            array = photo(*size, 0)
            bounds = {"shortest_edge": side**2, "longest_edge": side**2}
            theirs = critic.processor(Image.fromarray(array), size=bounds, return_tensors="pt")
            patches, grid = other.patches(other.pixels(tensor(array)))
            assert torch.equal(grid, theirs["image_grid_thw"])
            assert patches.shape == theirs["pixel_values"].shape
        (seen,) = other.encode_images(images(1, 64, 64))
        assert seen.shape[:2] == (max(1, side // 16),) * 2

    def test_a_square_picture_gets_the_whole_resolution(self, critic):
        """Where rounding in floating point would take a row: 260 to 224 in steps of 28."""
        other = self.rebuilt(critic, critic.template, 64)
        for side in (36, 68, 72, 88, 96, 144, 260, 288):
            assert other.pixels(torch.zeros(1, 3, side, side)).shape[-2:] == (64, 64)

    def test_a_resolution_below_one_token_is_refused(self, critic):
        with pytest.raises(ValueError, match="0 or at least 16.*got 8"):
            self.rebuilt(critic, critic.template, 8)

    def test_a_picture_that_is_a_line_is_refused(self, critic):
        with pytest.raises(ValueError, match="aspect ratio"):
            critic.encode_images(images(1, 2, 500))


class TestQwen25(QwenChecks):
    kind, hf = "qwen2_5_vl", Qwen2_5_VLProcessor


class TestQwen3(QwenChecks):
    kind, hf = "qwen3_vl", Qwen3VLProcessor

    def test_deepstack_reaches_the_answer(self, critic):
        (seen,) = critic.encode_images(images(1))
        bare = torch.cat([seen[..., :48], torch.zeros_like(seen[..., 48:])], -1)
        assert (critic.logits([SHORT], [[seen]]) - critic.logits([SHORT], [[bare]])).abs().max() > 1e-3
