"""What every critic with a chat template must do, against transformers' own processor and forward pass.

A test file makes a child of `ChatCriticChecks` whose fixture `critic` is a tiny model, and says how transformers itself
would prepare the same question (`hf_inputs`).
"""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer

from npedit.critics._bits import quantisation_arguments
from npedit.critics._chat import ChatCritic
from npedit.critics.base import answer_token
from npedit.questions import questions_for

LONG, SHORT = "was this edit done : paint the red circle blue and remove the dog ?", "is there a fence ?"
SIZES = [(32, 32), (64, 64), (33, 31), (24, 24), (8, 40), (40, 8), (17, 130), (256, 192), (31, 32), (240, 320)]


def hard_cases(sizes: list[tuple[int, int]]) -> list[tuple[tuple[int, int], bool]]:
    """(size, edges): sizes with and without black and white edges; tall ones without. Pillow 13 resizes some tall
    pictures' height first, where edges that overshoot are clipped in another order."""
    return [(size, edges) for size in sizes for edges in (False, True) if not edges or size[0] <= size[1]]


HARD = hard_cases(SIZES)


def images(count: int, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def photo(height: int, width: int, seed: int, edges: bool = True) -> np.ndarray:
    """uint8 (H, W, 3) with smooth parts and noise, and with black and white edges unless `edges` is false."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    plain = 127 + 60 * np.sin(rows / 7)[..., None] * np.cos(columns[..., None] / 5 + np.arange(3))
    if edges:
        plain[height // 3 :, : width // 2] = rng.integers(0, 2, 3) * 255
    return np.clip(plain + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255


def processor_without_video(kind: type, critic: ChatCritic, **options):
    """transformers' own processor for text and images. Its part for videos needs torchvision and is left out."""
    parts = ["image_processor", "tokenizer"]
    child = type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: parts)})
    return child(critic.processor, critic.tokenizer, chat_template=critic.template, **options)


class ChatCriticChecks:
    """See the module's head."""

    away_most, away_mean = 1.1, 0.35  # of 255: Pillow rounds to whole numbers after each of its two passes
    answers = ("Yes", "No")
    own = (32, 32)  # a picture's size that needs no scaling

    def make(self, seed: int) -> ChatCritic:
        raise NotImplementedError

    def hf_inputs(self, critic: ChatCritic, prompts: list[str], pictures: list[list[Image.Image]]) -> dict[str, Tensor]:
        """What transformers' processor makes of prompts and pictures, the padding on the LEFT."""
        raise NotImplementedError

    def hf_pixels(self, critic: ChatCritic, array: np.ndarray) -> Tensor:
        return critic.processor(Image.fromarray(array), return_tensors="pt")["pixel_values"]

    def our_pixels(self, critic: ChatCritic, picture: Tensor) -> Tensor:
        return critic.pixels(picture)

    @torch.no_grad()
    def hf_logits(self, critic: ChatCritic, questions: list[str], arrays: list[list[np.ndarray]]) -> Tensor:
        prompts = []
        for question, looks in zip(questions, arrays):
            content = [*[{"type": "image"}] * len(looks), {"type": "text", "text": question}]
            prompts.append(
                critic.tokenizer.apply_chat_template(
                    [{"role": "user", "content": content}], chat_template=critic.template, tokenize=False,
                    add_generation_prompt=True,
                )
            )  # fmt: skip
        pictures = [[Image.fromarray(a) for a in looks] for looks in arrays]
        return critic.model(**self.hf_inputs(critic, prompts, pictures)).logits[:, -1]

    def encode_images(self, critic: ChatCritic, arrays: list[np.ndarray]) -> list[Tensor]:
        return [critic.encode_images(tensor(a))[0] for a in arrays]

    # -------------------------------------------------------------------------------------------------------- pixels

    @pytest.mark.parametrize(("size", "edges"), HARD)
    def test_pixels_are_the_processors(self, critic, size, edges):
        for seed in range(2):
            array = photo(*size, seed, edges)
            ours, wanted = self.our_pixels(critic, tensor(array)), self.hf_pixels(critic, array)
            assert ours.numel() == wanted.numel()
            std = torch.tensor(critic.processor.image_std)[:, None]
            away = 255 * ((ours.flatten() - wanted.flatten()).reshape(len(ours), 3, -1) * std).abs()
            assert away.max() <= self.away_most, float(away.max())
            assert away.mean() <= self.away_mean, float(away.mean())

    def test_pixels_out_of_range_are_clamped(self, critic):
        wild = images(1, 40, 24) * 3 - 1
        assert torch.equal(critic.pixels(wild), critic.pixels(wild.clamp(0, 1)))

    # --------------------------------------------------------------------------------- the same answers as transformers

    @pytest.mark.parametrize("question", [LONG, SHORT])
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_logits_are_the_plain_models(self, critic, question, count):
        arrays = [photo(*self.own, seed) for seed in range(count)]
        wanted = self.hf_logits(critic, [question], [arrays])
        ours = critic.logits([question], [self.encode_images(critic, arrays)])
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
        margin = critic.margin([question], [self.encode_images(critic, arrays)])
        torch.testing.assert_close(margin, wanted[:, critic.yes] - wanted[:, critic.no], atol=1e-5, rtol=1e-5)

    def test_a_mixed_batch_is_the_plain_models(self, critic):
        """Padding on the other side, and one image beside two."""
        a, b, c = (photo(*self.own, seed) for seed in range(3))
        questions, arrays = [SHORT, LONG, LONG], [[a], [b, c], [c]]
        ours = critic.logits(questions, [self.encode_images(critic, looks) for looks in arrays])
        torch.testing.assert_close(ours, self.hf_logits(critic, questions, arrays), atol=1e-5, rtol=1e-5)

    def test_logits_about_scaled_pictures_are_the_plain_models_to_rounding(self, critic):
        arrays = [photo(40, 70, 0), photo(80, 80, 1)]
        ours = critic.logits([LONG], [self.encode_images(critic, arrays)])
        wanted = self.hf_logits(critic, [LONG], [arrays])
        assert (ours - wanted).norm() < 0.02 * wanted.norm()

    def test_a_mixed_batch_is_its_questions_one_by_one(self, critic):
        a, b = critic.encode_images(images(2))
        (c,) = critic.encode_images(images(1, 48, 24, 1))
        asked = [(SHORT, [a]), (LONG, [a, b]), (SHORT, [b, c]), (LONG, [c]), (LONG + " " + LONG, [c, b, a])]
        together = critic.logits([q for q, _ in asked], [s for _, s in asked])
        for row, (question, seen) in zip(together, asked):
            torch.testing.assert_close(row, critic.logits([question], [seen])[0], atol=1e-5, rtol=1e-5)
        back = critic.logits([q for q, _ in asked[::-1]], [s for _, s in asked[::-1]])
        torch.testing.assert_close(back.flip(0), together, atol=1e-5, rtol=1e-5)

    def test_order_of_images_and_words_matter(self, critic):
        a, b = critic.encode_images(images(2))
        margins = critic.margin([LONG, LONG, SHORT], [[a, b], [b, a], [a, b]])
        assert len({round(float(m), 6) for m in margins}) == 3

    def test_seeing_an_image_does_not_depend_on_its_company(self, critic):
        pictures = images(3)
        together = critic.encode_images(pictures)
        for i in range(3):
            torch.testing.assert_close(critic.encode_images(pictures[i : i + 1])[0], together[i], atol=1e-6, rtol=0)

    def test_every_question_can_be_asked(self, critic):
        asked = [
            q for kind, thing in [("recolour", ""), ("remove", "dog"), ("nothing", "")]
            for q in questions_for(kind, "paint it blue", thing)
        ]  # fmt: skip
        seen = dict(zip(("reference", "edited"), critic.encode_images(images(2))))
        margins = critic.margin([q.text for q in asked], [[seen[name] for name in q.looks_at] for q in asked])
        assert margins.shape == (5,) and torch.isfinite(margins).all()

    def test_an_instruction_cannot_place_images_or_end_its_turn(self, critic):
        seen = [critic.encode_images(images(1))]
        end = critic.tokenizer.eos_token
        plain = critic.logits(["is it red   ?"], seen)
        torch.testing.assert_close(critic.logits([f"is it red {critic.image_token} ?"], seen), plain)
        torch.testing.assert_close(critic.logits([f"is it red {end} ?"], seen), plain)

    def test_visual_tokens_of_other_images_than_the_prompt_places_are_refused(self, critic):
        rows = [critic._prompt_ids(SHORT, critic.encode_images(images(1)))]
        with pytest.raises(ValueError, match="one mark in the prompts for each of"):
            critic._last_states(rows, [critic.encode_images(images(2))])

    # ------------------------------------------------------------------------------------------------------ gradient

    def test_the_gradient_is_the_finite_difference(self):
        critic = self.make(1)
        critic.model.double()
        picture, other = 0.3 + 0.4 * images(1, 40, 24).double(), images(1, seed=1).double()

        def exact(x: Tensor) -> Tensor:
            """The margin, without its last rounding to float32."""
            (logits,) = critic.model.lm_head(
                critic.states([LONG], [[*critic.encode_images(other), *critic.encode_images(x)]])
            )
            return logits[critic.yes] - logits[critic.no]

        x = picture.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            critic.margin([LONG], [[*critic.encode_images(other), *critic.encode_images(x)]]).sum(), x
        )
        assert gradient.norm() > 1e-3
        # transformers computes norms and rotations in float32, so the step must be large against that rounding.
        step, ways = 1e-3, torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        for way in [gradient / gradient.abs().max(), *ways]:
            with torch.no_grad():
                found = (exact(picture + step * way) - exact(picture - step * way)) / (2 * step)
            torch.testing.assert_close((gradient * way).sum(), found, rtol=1e-3, atol=2e-3 * float(gradient.norm()))

    def test_gradient_reaches_the_looked_at_images_and_nothing_else(self, critic):
        pictures = images(3).requires_grad_()
        a, b, _ = critic.encode_images(pictures)
        critic.margin([LONG, SHORT], [[a, b], [b]]).sum().backward()
        reached = pictures.grad.abs().amax((1, 2, 3))
        assert reached[0] > 0 and reached[1] > 0 and reached[2] == 0
        assert all(p.grad is None and not p.requires_grad for p in critic.model.parameters())
        assert not critic.model.training

    def test_a_reference_is_seen_once_without_gradient(self, critic):
        reference, edited = images(1), images(1, seed=1).requires_grad_()
        with torch.no_grad():
            (kept,) = critic.encode_images(reference)
        assert not kept.requires_grad
        margin = critic.margin([LONG, SHORT], [[kept, *critic.encode_images(edited)]] * 2)
        fresh = critic.margin([LONG, SHORT], [[*critic.encode_images(reference), *critic.encode_images(edited)]] * 2)
        torch.testing.assert_close(margin, fresh)
        margin.sum().backward()
        assert edited.grad.abs().sum() > 0

    # ---------------------------------------------------------------------------------------------- tokens and folders

    def test_yes_and_no_are_the_tokens_that_the_template_makes_of_them(self, critic):
        assert tuple(critic.tokenizer.decode([i]) for i in (critic.yes, critic.no)) == self.answers
        for word, token in (("Yes", critic.yes), ("No", critic.no)):
            chat = [
                {"role": r, "content": [{"type": "text", "text": t}]} for r, t in (("user", "it"), ("assistant", word))
            ]
            said = critic.tokenizer.apply_chat_template(chat, chat_template=critic.template, tokenize=False)
            prompt = critic._chat(chat[:1], add_generation_prompt=True)
            ids, before = (critic.tokenizer(t, add_special_tokens=False).input_ids for t in (said, prompt))
            assert ids[: len(before)] == before and ids[len(before)] == token

    def test_answers_of_several_tokens_are_refused(self, critic):
        with pytest.raises(ValueError, match="to be one token"):
            answer_token(critic.tokenizer, "is it ? ", "Yes No")

    def rebuilt(self, critic: ChatCritic, template: str, resolution: int = 0) -> ChatCritic:
        return type(critic)(critic.model, critic.tokenizer, critic.processor, template, critic.device, resolution)

    def test_a_template_that_forgets_an_image_is_refused(self, critic):
        with pytest.raises(ValueError, match="two images"):
            self.rebuilt(critic, "{{ messages[0]['content'][-1]['text'] }} " + critic.image_token)

    def test_a_template_that_thinks_first_is_refused(self, critic):
        with pytest.raises(ValueError, match="answers at once"):
            self.rebuilt(critic, critic.template + "{% if add_generation_prompt %}<think>{% endif %}")

    @pytest.fixture(scope="class")
    def folder(self, critic, tmp_path_factory):
        place = tmp_path_factory.mktemp("critic") / "model"
        critic.save(place)
        return place

    def test_a_saved_critic_answers_the_same(self, critic, folder):
        loaded = type(critic).load(folder, torch.float32, torch.device("cpu"))
        pictures = images(2, 50, 30)
        a, b = (c.margin([LONG, SHORT], [s, s[:1]]) for c in (critic, loaded) for s in [c.encode_images(pictures)])
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        assert loaded.template == critic.template and loaded.stop_tokens == critic.stop_tokens
        assert not any(p.requires_grad for p in loaded.model.parameters())

    def test_the_folder_is_an_ordinary_transformers_folder(self, critic, folder):
        model = type(critic.model).from_pretrained(folder)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), critic.model.parameters()))
        assert AutoTokenizer.from_pretrained(folder)(LONG).input_ids == critic.tokenizer(LONG).input_ids
        assert not list(folder.glob("*.bin")) and list(folder.glob("*.safetensors"))

    @pytest.mark.parametrize(
        "part", ["preprocessor_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
    )
    def test_a_missing_part_is_refused(self, critic, folder, tmp_path, part):
        for path in folder.iterdir():
            if path.name != part:
                (tmp_path / path.name).symlink_to(path)
        with pytest.raises((OSError, ValueError)):
            type(critic).load(tmp_path, torch.float32, torch.device("cpu"))

    def test_folders_that_are_no_critic(self, critic, tmp_path):
        with pytest.raises(FileNotFoundError, match="config.json.*has none"):
            type(critic).load(tmp_path, torch.float32, torch.device("cpu"))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl_chat"}))
        with pytest.raises(ValueError, match="got internvl_chat.*-hf"):
            type(critic).load(tmp_path, torch.float32, torch.device("cpu"))

    def test_bfloat16_answers_and_passes_gradient(self, critic, folder):
        critic = type(critic).load(folder, torch.bfloat16, torch.device("cpu"))
        pictures = images(2).requires_grad_()
        margin = critic.margin([LONG], [critic.encode_images(pictures)])
        assert margin.dtype is torch.float32
        margin.sum().backward()
        assert pictures.grad.dtype is torch.float32 and pictures.grad.abs().sum() > 0

    def test_few_bits_need_cuda(self, critic, folder):
        with pytest.raises(ValueError, match="CUDA device and the package bitsandbytes.*got cpu"):
            type(critic).load(folder, torch.float32, torch.device("cpu"), bits=4)
        with pytest.raises(ValueError, match="bits 0, 4 or 8; got 2"):
            quantisation_arguments(2, torch.float32, torch.device("cpu"))

    def test_it_writes_the_likeliest_words(self, critic):
        arrays = [photo(*self.own, seed) for seed in range(2)]
        pictures = [tensor(a)[0] for a in arrays]
        (first,) = critic.generate_text([LONG], [pictures], max_tokens=1)
        scores = self.hf_logits(critic, [LONG], [arrays])[0]
        scores[critic.model.config.image_token_id] = -torch.inf
        assert first == critic.tokenizer.decode([int(scores.argmax())], skip_special_tokens=True).strip()
        texts = critic.generate_text([LONG, SHORT], [pictures, pictures[:1]], max_tokens=5)
        assert texts == [
            critic.generate_text([p], [q], max_tokens=5)[0] for p, q in ((LONG, pictures), (SHORT, pictures[:1]))
        ]

    @torch.no_grad()
    def test_kept_keys_and_values_change_no_word(self, critic):
        """Against reading everything again for each word."""
        for count, size in ((2, self.own), (1, (24, 40))):
            pictures = [tensor(photo(*size, seed))[0] for seed in range(count)]
            seen = [critic.encode_images(p[None])[0] for p in pictures]
            row = critic._prompt_ids(LONG, seen)
            start = len(row)
            while len(row) - start < 8 and (len(row) == start or row[-1] not in critic.stop_tokens):
                scores = critic.model.lm_head(critic._last_states([row], [seen]))[0]
                scores[critic.model.config.image_token_id] = -torch.inf
                row.append(int(scores.argmax()))
            written = critic.tokenizer.decode(row[start:], skip_special_tokens=True).strip()
            assert critic.generate_text([LONG], [pictures], 8) == [written]

    def test_equal_seeds_make_equal_critics(self):
        a, b, c = (self.make(s).model for s in (0, 0, 1))
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
        assert not all(torch.equal(p, q) for p, q in itertools.islice(zip(a.parameters(), c.parameters()), 8))
