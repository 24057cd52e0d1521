"""A critic that computes its layers again in the backward pass: the same values and gradients in less memory."""

from __future__ import annotations

import pytest
import torch

from npedit.critics.base import Critic
from npedit.critics.ensemble import Ensemble
from npedit.critics.internvl import InternVL
from npedit.critics.smolvlm import SmolVLM
from tests.critics.test_packing import ask
from tests.support.chat_critics import images
from tests.support.critics import MAKERS


@pytest.fixture(scope="module", params=MAKERS)
def critic(request) -> Critic:
    return MAKERS[request.param](0)


def saved_numbers(critic: Critic, checkpointing: bool) -> int:
    """Numbers that the forward pass keeps for the backward pass, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in critic.model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    kept = []  # so that no storage is freed and its address used again
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), note(t))[1], lambda t: t):
        pictures = images(2).requires_grad_()
        with critic.gradient_checkpointing(checkpointing):
            margin = critic.margin(["is it red ?"], [critic.encode_images(pictures)])
    assert margin.requires_grad
    return sum(found.values())


def test_logits_and_gradients_are_those_without(critic):
    plain, again = ask(critic, packed=False), ask(critic, packed=False, checkpointing=True)
    assert torch.equal(plain[0], again[0])
    torch.testing.assert_close(again[1], plain[1], atol=1e-8, rtol=1e-6)


def test_less_is_kept_for_the_backward_pass(critic):
    assert saved_numbers(critic, True) < 0.5 * saved_numbers(critic, False)


def test_the_model_stays_in_evaluation_mode_without_dropout(critic):
    """transformers' own switch acts in training mode only, where this dropout would act too."""
    for module in critic.model.modules():
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.5)
    plain, again = ask(critic, packed=False), ask(critic, packed=False, checkpointing=True)
    assert torch.equal(plain[0], again[0]) and not critic.model.training
    torch.testing.assert_close(again[1], plain[1], atol=1e-8, rtol=1e-6)


def test_outside_the_block_nothing_is_changed(critic):
    before = [dict(vars(module)) for module in critic.model.modules()]
    with pytest.raises(RuntimeError), critic.gradient_checkpointing():
        raise RuntimeError
    with critic.gradient_checkpointing(False):
        assert [vars(m) for m in critic.model.modules()] == before
    assert [vars(m) for m in critic.model.modules()] == before


def test_a_forward_that_a_hook_has_replaced_is_kept():
    """As accelerate leaves the layers of a quantised model."""
    critic, calls = InternVL.tiny(0), []
    layer = critic.model.model.language_model.layers[0]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1]
    replaced = layer.forward
    plain, again = ask(critic, packed=False), ask(critic, packed=False, checkpointing=True)
    assert torch.equal(plain[0], again[0]) and layer.forward is replaced
    assert len(calls) == 3  # once plain, once checkpointed, once more in its backward pass


def test_all_members_of_an_ensemble_are_checkpointed():
    critic = Ensemble([InternVL.tiny(0), SmolVLM.tiny(0)])
    assert saved_numbers(critic, True) < 0.5 * saved_numbers(critic, False)
