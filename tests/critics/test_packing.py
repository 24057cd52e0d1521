"""Questions about the same pictures in one row: the same answers and gradients as one by one, for less arithmetic."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from npedit.critics._packing import PackedRow, block_causal_mask, can_pack, pack_rows
from npedit.critics.base import Critic
from npedit.critics.ensemble import Ensemble
from npedit.critics.llava_onevision import LlavaOnevision
from npedit.critics.qwen_vl import QwenVL
from npedit.questions import questions_for
from tests.support.chat_critics import images
from tests.support.critics import MAKERS

ASKED = [q for kind in ("recolour", "remove", "nothing") for q in questions_for(kind, "paint it blue", "dog")]
LOOKS_AT = {"reference": 0, "edited": 1}


@pytest.fixture(scope="module", params=MAKERS)
def critic(request) -> Critic:
    return MAKERS[request.param](0)


def ask(critic: Critic, packed: bool, checkpointing: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits about the questions of two items, and the gradient of their margins at all pictures."""
    pictures = images(4, 40, 24).requires_grad_()
    with critic.gradient_checkpointing() if checkpointing else nullcontext():
        visual = critic.encode_images(pictures)
        seen = [[visual[2 * item + LOOKS_AT[name]] for name in q.looks_at] for item in range(2) for q in ASKED]
        logits = critic.logits([q.text for q in ASKED] * 2, seen, packed)
    answers = torch.tensor([q.answer for q in ASKED] * 2)
    (gradient,) = torch.autograd.grad((answers * (logits[:, critic.yes] - logits[:, critic.no])).sum(), pictures)
    return logits.detach(), gradient


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_questions_have_the_logits_and_gradients_of_single_ones(critic, checkpointing):
    plain, packed = ask(critic, False), ask(critic, True, checkpointing)
    torch.testing.assert_close(packed[0], plain[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(packed[1], plain[1], atol=2e-7, rtol=0)
    assert plain[0].std() > 1e-2 and plain[1].abs().max() > 1e-4  # so the differences are small against the values
    assert not torch.equal(packed[0], plain[0])  # rounding shows that it was another computation


def test_packed_questions_compute_the_pictures_once(critic):
    (a, b), counts = critic.encode_images(images(2)), {}
    for packed in (False, True):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            critic.logits([q.text for q in ASKED if len(q.looks_at) == 2], [[a, b]] * 4, packed)
        counts[packed] = counter.get_total_flops()
    assert counts[True] < 0.85 * counts[False]


def rows_of(critic: Critic, texts: list[str], seen: list[list[torch.Tensor]]) -> list[list[int]]:
    return [critic._prompt_ids(text, looks) for text, looks in zip(texts, seen)]


def test_the_removal_question_stays_apart(critic):
    """The presence question sees the edited image alone, so it has no prefix in common with the others."""
    visual = critic.encode_images(images(2))
    seen = [[visual[LOOKS_AT[name]] for name in q.looks_at] for q in ASKED]
    packed = pack_rows(rows_of(critic, [q.text for q in ASKED], seen), seen, critic.model.config.image_token_id)
    assert sorted(tuple(row.questions) for row in packed) == [(0, 1, 3, 4), (2,)]
    shared = next(row for row in packed if len(row.questions) == 4)
    mark = critic.model.config.image_token_id
    assert shared.ids.count(mark) == shared.ids[: shared.prefix].count(mark)


def test_equal_questions_and_other_orders_of_pictures(critic):
    a, b = critic.encode_images(images(2))
    texts, seen = [ASKED[0].text] * 2 + [ASKED[1].text], [[a, b], [a, b], [b, a]]
    plain, packed = critic.logits(texts, seen), critic.logits(texts, seen, True)
    torch.testing.assert_close(packed, plain, atol=2e-6, rtol=0)
    assert (plain[1] - critic.logits([ASKED[0].text], [[b, a]])[0]).abs().max() > 1e-4


def test_a_template_with_words_first_changes_nothing():
    """As the embedded toy critic has it: its results must stay the same bit for bit."""
    critic = LlavaOnevision.tiny(0)
    plain, packed = ask(critic, False), ask(critic, True)
    assert torch.equal(plain[0], packed[0]) and torch.equal(plain[1], packed[1])


def test_a_language_model_with_sliding_windows_is_asked_one_by_one():
    critic = QwenVL.tiny(0, "qwen2_5_vl")
    assert can_pack(critic.model)
    decoder = critic.model.get_decoder()
    decoder.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    decoder.config.sliding_window, decoder.has_sliding_layers = 8, True
    assert not can_pack(critic.model)
    assert torch.equal(ask(critic, True)[0], ask(critic, False)[0])


def test_an_ensemble_passes_packing_to_its_members():
    critic = Ensemble([MAKERS["internvl"](0), MAKERS["smolvlm"](0)])
    plain, packed = ask(critic, False), ask(critic, True)
    torch.testing.assert_close(packed[0], plain[0], atol=2e-6, rtol=0)
    assert not torch.equal(packed[0], plain[0])


def test_a_token_sees_the_prefix_and_its_own_question():
    row = pack_rows([[9, 9, 1, 2], [9, 9, 3]], [[picture := torch.zeros(2, 1)]] * 2, 9)[0]
    assert (row.ids, row.prefix, row.questions, row.ends) == ([9, 9, 1, 2, 3], 2, [0, 1], [3, 4])
    assert (list(row.blocks()), list(row.shifts())) == ([0, 0, 1, 1, 2], [0, 0, 0, 0, 2])
    alone = PackedRow([9, 9, 4], 2, [2], [2], [picture])
    mask = block_causal_mask([row, alone], torch.device("cpu"))
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1],
    ]  # fmt: skip
    assert mask[1, 0].any(-1).all()  # padding sees something, so no row of the softmax is empty
