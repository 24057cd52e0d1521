"""LLaVA-OneVision against transformers' own processor and forward pass, and its gradient against finite differences."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

from npedit.critics.base import answer_loss, answer_token, vocabulary_loss
from npedit.critics.llava_onevision import LlavaOnevision
from npedit.questions import questions_for
from tests.support.chat_critics import LONG, SHORT, SIZES, hard_cases, images, photo


@pytest.fixture(scope="module")
def critic() -> LlavaOnevision:
    return LlavaOnevision.tiny(0)


def test_an_instruction_cannot_place_images_or_end_its_turn(critic):
    plain = critic._prompt_ids("is it red   ?", (1,))
    marks = list(critic.tokenizer.get_added_vocab())
    assert {critic.image_token, critic.tokenizer.eos_token} <= set(marks)
    for mark in marks:
        assert critic._prompt_ids(f"is it red {mark} ?", (1,)) == plain


# ------------------------------------------------------------------------------------------------------------ pixels

HARD = hard_cases([*SIZES, (100, 57), (384, 512)])


@pytest.mark.parametrize(("size", "edges"), HARD)
def test_pixels_are_the_processors_base_image(critic, size, edges):
    for seed in range(3):
        array = photo(*size, seed, edges)
        wanted = critic.processor(Image.fromarray(array), return_tensors="pt")["pixel_values"][0, 0]
        ours = critic.pixels(torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255)[0]
        std = torch.tensor(critic.processor.image_std)[:, None, None]
        away = ((ours - wanted) * std).abs()
        # Pillow rounds to whole numbers after each of its two passes.
        assert away.max() <= 1.1 / 255, float(away.max() * 255)
        assert away.mean() <= 0.35 / 255


def test_pixels_at_the_towers_size_are_exact(critic):
    array = photo(32, 32, 5)
    wanted = critic.processor(Image.fromarray(array), return_tensors="pt")["pixel_values"][0, 0]
    ours = critic.pixels(torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255)[0]
    torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=0)


def test_pixels_use_each_channels_own_mean_and_deviation():
    critic = LlavaOnevision.tiny(0)
    critic.processor.image_mean, critic.processor.image_std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.2]
    array = photo(28, 40, 1)
    wanted = critic.processor(Image.fromarray(array), return_tensors="pt")["pixel_values"][0, 0]
    ours = critic.pixels(torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255)[0]
    std = torch.tensor(critic.processor.image_std)[:, None, None]
    assert ((ours - wanted) * std).abs().max() <= 1.1 / 255


def test_pixels_out_of_range_are_clamped(critic):
    wild = images(1) * 3 - 1
    assert torch.equal(critic.pixels(wild), critic.pixels(wild.clamp(0, 1)))


# ------------------------------------------------------------------------------------- the same answers as transformers


@torch.no_grad()
def hf_logits(critic: LlavaOnevision, question: str, pictures: Tensor) -> Tensor:
    """What the plain model says: the tokenizer's own template, padding on the LEFT with a mask, images by count."""
    chat = [{"role": "user", "content": [*[{"type": "image"}] * len(pictures), {"type": "text", "text": question}]}]
    prompt = critic.tokenizer.apply_chat_template(
        chat, chat_template=critic.template, tokenize=False, add_generation_prompt=True
    )
    each = (critic.side // critic.model.config.vision_config.patch_size) ** 2 + 1  # patches and a newline
    inputs = critic.tokenizer(prompt.replace("<image>", "<image> " * each), return_tensors="pt")
    return critic.model(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        pixel_values=critic.pixels(pictures)[
            :, None
        ],  # (images, patches = 1, 3, side, side), as its processor gives it
        image_sizes=torch.full((len(pictures), 2), critic.side),
        batch_num_images=torch.tensor([len(pictures)]),
    ).logits[0, -1]


@pytest.mark.parametrize("question", [LONG, SHORT])
@pytest.mark.parametrize("count", [2, 3])
def test_logits_about_several_images_are_the_plain_models(critic, question, count):
    pictures = images(count, seed=count)
    wanted = hf_logits(critic, question, pictures)
    ours = critic.logits([question], [critic.encode_images(pictures)])[0]
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    margin = critic.margin([question], [critic.encode_images(pictures)])
    torch.testing.assert_close(margin[0], wanted[critic.yes] - wanted[critic.no], atol=1e-5, rtol=1e-5)


def test_yes_and_no_are_the_tokens_of_those_words(critic):
    assert [critic.tokenizer.convert_ids_to_tokens(i) for i in (critic.yes, critic.no)] == ["yes", "no"]


def test_order_of_images_and_words_matter(critic):
    a, b = critic.encode_images(images(2))
    margins = critic.margin([LONG, LONG, SHORT], [[a, b], [b, a], [a, b]])
    assert len({round(float(m), 6) for m in margins}) == 3


def test_seeing_an_image_does_not_depend_on_its_company(critic):
    pictures = images(3)
    together = critic.encode_images(pictures)
    assert together[0].shape == (17, 48)
    for i in range(3):
        torch.testing.assert_close(critic.encode_images(pictures[i : i + 1])[0], together[i], atol=1e-6, rtol=0)


def test_a_mixed_batch_is_its_questions_one_by_one(critic):
    """Faults 14 and 17: one-image and two-image questions of different lengths, padded together."""
    a, b, c = critic.encode_images(images(3))
    asked = [(SHORT, [a]), (LONG, [a, b]), (SHORT, [b, c]), (LONG, [c]), (LONG + " " + LONG, [c, b, a])]
    together = critic.logits([q for q, _ in asked], [s for _, s in asked])
    for row, (question, seen) in zip(together, asked):
        torch.testing.assert_close(row, critic.logits([question], [seen])[0], atol=1e-5, rtol=1e-5)
    back = critic.logits([q for q, _ in asked[::-1]], [s for _, s in asked[::-1]])
    torch.testing.assert_close(back.flip(0), together, atol=1e-5, rtol=1e-5)


def test_every_question_can_be_asked(critic):
    asked = [
        q for kind, thing in [("recolour", ""), ("remove", "dog"), ("nothing", "")]
        for q in questions_for(kind, "paint it blue", thing)
    ]  # fmt: skip
    seen = dict(zip(("reference", "edited"), critic.encode_images(images(2))))
    margins = critic.margin([q.text for q in asked], [[seen[name] for name in q.looks_at] for q in asked])
    assert margins.shape == (5,) and torch.isfinite(margins).all()


# ---------------------------------------------------------------------------------------------------------- gradient


@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_the_gradient_is_the_finite_difference(size):
    critic = LlavaOnevision.tiny(1)
    critic.model.double()
    picture, other = 0.3 + 0.4 * images(1, *size).double(), images(1, seed=1).double()

    def exact(x: Tensor) -> Tensor:
        """The margin, without its last rounding to float32."""
        hidden, last = critic.hidden_states([LONG], [[*critic.encode_images(other), *critic.encode_images(x)]])
        logits = critic.model.lm_head(hidden[-1][0, last[0]])
        return logits[critic.yes] - logits[critic.no]

    x = picture.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        critic.margin([LONG], [[*critic.encode_images(other), *critic.encode_images(x)]]).sum(), x
    )
    assert gradient.norm() > 1e-3
    # transformers computes its norms in float32, so the step must be large against that rounding.
    step, generator = 3e-4, torch.Generator().manual_seed(3)
    for way in [gradient / gradient.abs().max(), *torch.randn(3, *x.shape, generator=generator, dtype=torch.float64)]:
        with torch.no_grad():
            found = (exact(picture + step * way) - exact(picture - step * way)) / (2 * step)
        torch.testing.assert_close((gradient * way).sum(), found, rtol=1e-3, atol=1e-3 * float(gradient.norm()))


def test_gradient_reaches_the_looked_at_images_and_nothing_else(critic):
    pictures = images(3).requires_grad_()
    a, b, _ = critic.encode_images(pictures)
    critic.margin([LONG, SHORT], [[a, b], [b]]).sum().backward()
    reached = pictures.grad.abs().amax((1, 2, 3))
    assert reached[0] > 0 and reached[1] > 0 and reached[2] == 0
    assert all(p.grad is None and not p.requires_grad for p in critic.model.parameters())
    assert not critic.model.training


# ------------------------------------------------------------------------------------------------------------ losses


def test_answer_loss_is_minus_log_sigmoid():
    margin, answer = torch.tensor([0.3, 0.3, -2.0, 1.5]), torch.tensor([1, -1, 1, -1])
    for heat in (1.0, 0.1):
        hand = [-math.log(1 / (1 + math.exp(-a * heat * m))) for m, a in zip(margin.tolist(), answer.tolist())]
        torch.testing.assert_close(answer_loss(margin, answer, heat), torch.tensor(hand))


def test_answer_loss_is_the_two_way_cross_entropy():
    """The same number as a cross-entropy over the two logits alone (fault 24's kin: the sign and the order of the
    two)."""
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)) * 4
    answer = torch.tensor([1, -1, 1, -1, 1, -1])
    wanted = torch.nn.functional.cross_entropy(logits, (answer < 0).long(), reduction="none")  # column 0 is Yes
    torch.testing.assert_close(answer_loss(logits[:, 0] - logits[:, 1], answer), wanted)


def test_extreme_margins_stay_finite():
    margin = torch.tensor([1e4, -1e4, 1e30, -1e30], requires_grad=True)
    loss = answer_loss(margin, torch.tensor([1, 1, -1, -1]))
    (gradient,) = torch.autograd.grad(loss.sum(), margin)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
    assert loss[0] == 0 and loss[1] == 1e4
    assert gradient.tolist() == pytest.approx([0, -1, 1, 0])


def test_vocabulary_loss_by_hand():
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    answer = torch.tensor([1, -1, 1])
    for heat in (1.0, 0.5):
        total = (heat * logits).exp().sum(1).log()
        hand = torch.stack([total[i] - heat * logits[i, c] for i, c in enumerate((4, 2, 4))])
        torch.testing.assert_close(vocabulary_loss(logits, answer, yes=4, no=2, inverse_temperature=heat), hand)
    huge = vocabulary_loss(torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([-1]), yes=0, no=1)
    assert huge.item() == pytest.approx(2e4)


def test_the_vocabulary_takes_probability_from_the_two_way_answer():
    """Over the vocabulary the other words count too: the loss is never smaller."""
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(2))
    answer = torch.tensor([1, -1, 1, -1, 1])
    assert (vocabulary_loss(logits, answer, 3, 5) >= answer_loss(logits[:, 3] - logits[:, 5], answer)).all()


# -------------------------------------------------------------------------------------------------- tokens and folders


def test_answers_of_several_tokens_are_refused(critic):
    prompt = "is it ? answer "
    assert answer_token(critic.tokenizer, prompt, "Yes") == critic.yes
    for word, why in [("yes no", "to be one token"), ("zebra", "<unk>"), ("", "to be one token")]:
        with pytest.raises(ValueError, match=why):
            answer_token(critic.tokenizer, prompt, word)


def test_an_answer_that_melts_into_the_prompt_is_refused(critic):
    with pytest.raises(ValueError, match="one token after the prompt"):
        answer_token(critic.tokenizer, "is it ? do", "g")  # "dog" is one word


def test_a_model_without_yes_is_refused():
    with pytest.raises(ValueError, match="'Yes' to be one token"):
        LlavaOnevision.untrained(["no", "answer", "is", "it"], 0, vision=(32, 64, 1), text=(48, 96, 1))


def test_a_template_that_forgets_an_image_is_refused(critic):
    one_image = "{{ messages[0]['content'][-1]['text'] }} <image> answer "
    with pytest.raises(ValueError, match="two images"):
        LlavaOnevision(critic.model, critic.tokenizer, critic.processor, one_image, critic.device)


def test_another_resolution_is_refused(critic):
    with pytest.raises(ValueError, match="0 or 32.*got 64"):
        LlavaOnevision(critic.model, critic.tokenizer, critic.processor, critic.template, critic.device, 64)


@pytest.fixture(scope="module")
def folder(critic, tmp_path_factory):
    place = tmp_path_factory.mktemp("critic") / "model"
    critic.save(place)
    return place


def test_a_saved_critic_answers_the_same(critic, folder):
    loaded = LlavaOnevision.load(folder, torch.float32, torch.device("cpu"))
    pictures = images(2)
    a, b = (c.margin([LONG, SHORT], [s, s[:1]]) for c in (critic, loaded) for s in [c.encode_images(pictures)])
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert loaded.template == critic.template
    assert not any(p.requires_grad for p in loaded.model.parameters())
    array = photo(50, 30, 0)
    mine, theirs = (c.processor(Image.fromarray(array))["pixel_values"] for c in (critic, loaded))
    assert np.array_equal(np.asarray(mine), np.asarray(theirs))


def test_the_folder_is_an_ordinary_transformers_folder(critic, folder):
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), critic.model.parameters()))
    assert tokenizer(LONG).input_ids == critic.tokenizer(LONG).input_ids
    assert not list(folder.glob("*.bin")) and list(folder.glob("*.safetensors"))


def test_bfloat16_answers_and_passes_gradient(folder):
    critic = LlavaOnevision.load(folder, torch.bfloat16, torch.device("cpu"))
    pictures = images(2).requires_grad_()
    margin = critic.margin([LONG], [critic.encode_images(pictures)])
    assert margin.dtype is torch.float32
    margin.sum().backward()
    assert pictures.grad.dtype is torch.float32 and pictures.grad.abs().sum() > 0


def test_folders_that_are_no_critic(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json.*has none"):
        LlavaOnevision.load(tmp_path, torch.float32, torch.device("cpu"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl"}))
    with pytest.raises(ValueError, match="llava_onevision.*got internvl"):
        LlavaOnevision.load(tmp_path, torch.float32, torch.device("cpu"))


def test_it_writes_text(critic):
    prompts, pictures = [LONG, SHORT], [[*images(2)], [images(1, 40, 20)[0]]]
    texts = critic.generate_text(prompts, pictures, max_tokens=5)
    assert len(texts) == 2 and all(isinstance(t, str) for t in texts)
    assert texts == critic.generate_text(prompts, pictures, max_tokens=5)
    assert texts == [critic.generate_text([p], [q], max_tokens=5)[0] for p, q in zip(prompts, pictures)]
    assert all(len(t.split()) <= 5 for t in texts)


def test_written_words_are_the_likeliest(critic):
    pictures = images(2)
    logits = hf_logits(critic, LONG, pictures)
    (text,) = critic.generate_text([LONG], [[*pictures]], max_tokens=1)
    assert text == critic.tokenizer.decode([int(logits.argmax())], skip_special_tokens=True)


@torch.no_grad()
def test_kept_keys_and_values_change_no_word(critic):
    """Against reading everything again for each word."""
    pictures = images(2)
    seen, ids = critic.encode_images(pictures), []
    row = critic._prompt_ids(LONG, tuple(len(s) for s in seen))
    for _ in range(8):
        embedded = critic.model.get_input_embeddings()(torch.tensor([row + ids]))
        holes = torch.tensor([row + ids]) == critic.model.config.image_token_id
        embedded = embedded.masked_scatter(holes[:, :, None], torch.cat(seen))
        out = critic.model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        scores = critic.model.lm_head(out[0, -1])
        scores[critic.model.config.image_token_id] = -torch.inf
        ids.append(int(scores.argmax()))
        if ids[-1] == critic.tokenizer.eos_token_id:
            break
    assert critic.generate_text([LONG], [[*pictures]], 8) == [critic.tokenizer.decode(ids, skip_special_tokens=True)]


def test_equal_seeds_make_equal_critics():
    a, b, c = (LlavaOnevision.tiny(s) for s in (0, 0, 1))
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters()))
    assert not all(torch.equal(p, q) for p, q in itertools.islice(zip(a.model.parameters(), c.model.parameters()), 4))
