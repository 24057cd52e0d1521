"""A critic's weights in 8 or 4 bits: what is refused here, what is counted, and on a GPU how near it stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from npedit.critics._bits import NOT_QUANTISED, bytes_per_weight, is_quantised, quantisable_weights
from npedit.critics.llava_onevision import LlavaOnevision
from npedit.errors import UserError
from npedit.nets.device import pick_device
from npedit.recipe.config import find_class, make_recipe
from npedit.training.estimate import estimate
from npedit.training.parts import build_parts
from tests.support.parts import parts

NAMES = ("llava_onevision", "internvl", "qwen_vl", "smolvlm")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("critic")
    LlavaOnevision.tiny(0).save(place)
    return place


def recipe(folder: Path, bits: int, **changes):
    stage = {"step": "np_edit", "updates": 1, "batch_size": 1, "settings": {"fake_updates": 1}}
    critic = {"name": "llava_onevision", "weights": str(folder), "wording": "short", "bits": bits}
    family, data = {"name": "flux", "weights": "embedded"}, {"name": "imagefolder", "path": "x", "sizes": [[32, 32]]}
    return make_recipe(
        {"name": "r", "family": family, "critic": critic, "data": data, "stages": [stage],
         "trainer": {"sample_items": 1}, **changes}
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_is_quantised_is_the_language_model(name):
    """All of its layers but the one that makes logits, and nothing of the part that sees."""
    model = find_class("critics", name).tiny(0).model
    chosen = {id(w) for w in quantisable_weights(model)}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    inside = {n for n, m in linear.items() if id(m.weight) in chosen}
    assert inside == {n for n in linear if "language_model" in n or "text_model" in n} != set()
    assert all(set(NOT_QUANTISED) & set(n.split(".")) for n in linear if n not in inside)
    assert id(model.get_output_embeddings().weight) not in chosen


@pytest.mark.parametrize("name", NAMES)
def test_a_machine_without_cuda_is_told_so_before_anything_is_opened(name, tmp_path):
    with pytest.raises(ValueError, match=r"CUDA device and the package bitsandbytes for weights of 4 bits; got cpu"):
        find_class("critics", name).load(tmp_path / "nothing", torch.float32, CPU, bits=4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA says")
def test_the_recipe_hands_it_on_and_other_numbers_are_refused(folder):
    with pytest.raises(UserError, match=r"^critic.bits: .*weights of 8 bits; got cpu"):
        build_parts(recipe(folder, 8))
    with pytest.raises(UserError, match=r"critic.bits"):
        recipe(folder, 5)
    assert recipe(folder, 4).as_dict()["critic"]["bits"] == 4


@pytest.fixture(scope="module")
def held(folder) -> dict[int, dict[str, int]]:
    """Bits -> phase -> bytes of the critic's weights, with `offload`, where others are moved away."""
    found = {bits: estimate(recipe(folder, bits, memory={"offload": True})).phases for bits in (0, 8, 4)}
    return {bits: {p.name: p.bytes_by_part.get("critic", 0) for p in phases} for bits, phases in found.items()}


@pytest.mark.parametrize("bits", [8, 4])
def test_the_estimate_counts_the_quantised_weights_at_their_size(held, bits):
    saved = held[0]["np_edit: critic"] - held[bits]["np_edit: critic"]
    numbers = sum(w.numel() for w in quantisable_weights(LlavaOnevision.tiny(0).model))
    assert saved == pytest.approx(numbers * (4 - bytes_per_weight(bits)), rel=1e-6)
    assert bytes_per_weight(4) == 0.5625 and bytes_per_weight(8) == 1


def test_a_quantised_critic_is_never_offloaded(held):
    assert held[0]["np_edit: fake"] == 0 < held[8]["np_edit: fake"] == held[8]["np_edit: critic"]
    made = parts()
    assert made.frozen_modules("critic") == [made.critic.model] and not is_quantised(made.critic.model)
    made.critic.model.is_quantized = True
    assert made.frozen_modules("critic") == []


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_the_answer_stays_near_and_the_gradient_flows(name, bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    kind, device = find_class("critics", name), pick_device()
    kind.tiny(0).save(tmp_path)
    tiny = kind.tiny(0).model
    wanted = {
        n for n, m in tiny.named_modules() if any(getattr(m, "weight", 0) is w for w in quantisable_weights(tiny))
    }
    margins = []
    for held in (0, bits):
        critic = kind.load(tmp_path, torch.float32, device, bits=held)
        pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        margin = critic.margin(["is it a dog?"], [critic.encode_images(pictures)])
        (gradient,) = torch.autograd.grad(margin.sum(), pictures)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0
        assert is_quantised(critic.model) == bool(held) and not any(p.requires_grad for p in critic.model.parameters())
        few = {n for n, m in critic.model.named_modules() if type(m).__name__ in ("Linear8bitLt", "Linear4bit")}
        assert few == (wanted if held else set())
        margins.append(float(margin))
    assert margins[1] == pytest.approx(margins[0], abs=0.5 * abs(margins[0]) + 0.1)
