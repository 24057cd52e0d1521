"""Decoding in little memory: blocks that are computed again change nothing, tiles only what their docstring says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC
from torch import Tensor, nn

from npedit.editor import Editor
from npedit.errors import UserError
from npedit.families._decode import MIN_TILE_LATENTS, decode_latents
from npedit.families.base import Family
from npedit.families.sana import Sana
from npedit.generator import edit_images
from npedit.recipe.config import available_names, find_class, make_recipe
from npedit.runs.editor_facts import EditorFacts
from npedit.steps.base import Parts
from npedit.steps.np_edit import NpEditSettings, Step
from npedit.training.estimate import estimate
from tests.support.parts import batch, parts


@pytest.fixture(scope="module", params=available_names("families"))
def family(request) -> Family:
    return find_class("families", request.param).tiny(0)


def latents(family: Family, height: int, width: int, items: int = 2) -> Tensor:
    shape = (items, family.facts.channels, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


def decoded(family: Family, x: Tensor, **how) -> tuple[Tensor, Tensor, int]:
    """The picture, the gradient of a nonlinear function of it, and how many bytes were kept between the two."""
    kept: dict[int, int] = {}
    frozen = {p.untyped_storage().data_ptr() for p in family.pipe.vae.parameters()}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        image = decode_latents(family, x, **how)
    (gradient,) = torch.autograd.grad(image.square().sum(), x)
    return image.detach(), gradient, sum(kept.values())


def test_blocks_that_are_computed_again_change_no_value_and_keep_less(family: Family) -> None:
    x = latents(family, 6, 9)
    plain, wanted, all_of_it = decoded(family, x)
    image, gradient, kept = decoded(family, x, checkpointing=True)
    assert torch.equal(plain, family.decode(x).detach()) and torch.equal(image, plain)
    torch.testing.assert_close(gradient, wanted, atol=1e-6 * float(wanted.abs().max()), rtol=1e-5)
    assert kept < 0.5 * all_of_it
    assert not any("forward" in vars(m) for m in family.pipe.vae.modules())  # nothing is left behind


def test_tiles_have_the_pictures_size_and_pass_gradient_to_every_latent(family: Family) -> None:
    facts, x = family.facts, latents(family, 7, 11, items=1)
    plain, wanted, all_of_it = decoded(family, x)
    image, gradient, kept = decoded(family, x, tile=6 * facts.stride - 1)  # rounded down to five latents
    assert image.shape == plain.shape == (1, 3, 7 * facts.stride, 11 * facts.stride)
    assert gradient.abs().min() > 0 and kept < 0.5 * all_of_it
    both, same, _ = decoded(family, x, tile=6 * facts.stride - 1, checkpointing=True)
    assert torch.equal(both, image)
    torch.testing.assert_close(same, gradient, atol=1e-6 * float(gradient.abs().max()), rtol=1e-5)
    for tile in (0, 11 * facts.stride, 4096):  # no longer than the tile: not cut
        whole, gradient, _ = decoded(family, x, tile=tile)
        assert torch.equal(whole, plain) and torch.equal(gradient, wanted)
    assert decode_latents(family, x, tile=7 * facts.stride).shape == plain.shape  # cut along one side alone


@pytest.mark.parametrize("tile", [1, 4 * 4 - 1])
def test_tiles_too_small_to_overlap_are_refused(tile: int) -> None:
    least = f"at least {MIN_TILE_LATENTS * 4} pixels.*got {tile}"
    made = parts(critic=False)
    assert made.family.facts.stride == 4
    with pytest.raises(UserError, match=least):
        decode_latents(made.family, latents(made.family, 8, 8), tile=tile)
    with pytest.raises(UserError, match=least):
        parts(critic=False, decode_tile=tile)
    with pytest.raises(UserError, match=least):
        Editor(made.family, made.family.base, 2, [(32, 32)], tile)


@pytest.fixture(scope="module")
def convolutional() -> Family:
    """A DC-AE without attention: its decoder has convolutions alone, and norms of single pixels."""
    made = Sana.tiny(0)
    blocks = {"block_types": ("ResBlock",) * 3, "block_out_channels": (8, 8, 16), "layers_per_block": (1, 1, 1),
              "qkv_multiscales": ((), (), ())}  # fmt: skip
    torch.manual_seed(2)
    both = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in blocks.items()}
    vae = AutoencoderDC(latent_channels=4, attention_head_dim=8, scaling_factor=0.4, **both)
    made.pipe.vae = vae.eval().requires_grad_(False)
    return made


def reach(family: Family) -> int:
    """How many pixels away from a latent's own pixels it is still seen, at most."""
    x = latents(family, 1, 33, items=1)
    (gradient,) = torch.autograd.grad(family.decode(x).unflatten(-1, (33, -1))[..., 16, :].sum(), x)
    seen = gradient.abs().sum((0, 1, 2)).nonzero().flatten()
    return int(max(16 - seen.min(), seen.max() - 16)) * family.facts.stride


@torch.no_grad()
def test_seams_of_convolutions_do_not_show(convolutional: Family) -> None:
    """Exactly the whole but for rounding where their reach is a sixteenth of a tile; below that, seams alone differ."""
    stride = convolutional.facts.stride
    with torch.enable_grad():
        far = reach(convolutional)
    assert 4 * stride < far < 12 * stride
    tile = 16 * far
    x = latents(convolutional, tile // stride + 3, 5, items=1)
    whole = convolutional.decode(x)
    torch.testing.assert_close(decode_latents(convolutional, x, tile=tile), whole, atol=1e-5, rtol=1e-5)

    x = latents(convolutional, 5, 56, items=1)  # two tiles of 32 latents, from 0 and from 24
    whole = convolutional.decode(x)
    off = (decode_latents(convolutional, x, tile=32 * stride) - whole).abs().amax((0, 1, 2)) / whole.std()
    near = torch.zeros(len(off), dtype=torch.bool)
    near[32 * stride - far : 24 * stride + far] = True
    assert off[~near].max() < 1e-5
    assert 0 < off[near].max() < 0.05


# ------------------------------------------------------------------------------------------------------ in training


def trained(**memory) -> tuple[Parts, Tensor]:
    """Parts, and the student's weights after an update."""
    made = parts(**memory)
    step = Step(NpEditSettings(fake_updates=1, steps=2), made, made.create_trainable("student", 0), 10, 0)
    step.step([batch(0, 1)], 0)
    return made, torch.cat([p.detach().flatten() for p in step.learners["student"].net.parameters()])


def test_an_update_is_the_same_with_blocks_computed_again_and_another_in_tiles() -> None:
    _, plain = trained()
    _, again = trained(decoder_checkpointing=True, offload=True)
    torch.testing.assert_close(again, plain, atol=1e-6, rtol=0)
    _, whole = trained(decode_tile=16)
    assert torch.equal(whole, plain)
    assert parts(critic=False).memory.decode_tile == 0


def test_editor_and_training_decode_the_same_way(tmp_path: Path) -> None:
    made = parts(critic=False, decode_tile=16)
    family, x = made.family, torch.rand(1, 3, 32, 40)
    plain, tiled = (edit_images(family, family.base, x, ["a"], steps=1, tile=tile) for tile in (0, 16))
    editor = Editor(family, family.base, 1, [(32, 40)], made.memory.decode_tile)
    assert torch.equal(editor.edit_tensor(x, ["a"]), tiled) and not torch.equal(tiled, plain)
    facts = {"format": 1, "family": "flux", "base": "embedded", "steps": 2, "sizes": [[32, 32]]}
    (tmp_path / "npedit.json").write_text(json.dumps(facts | {"tile": 16}))
    assert EditorFacts.read(tmp_path).tile == 16
    (tmp_path / "npedit.json").write_text(json.dumps(facts))
    assert EditorFacts.read(tmp_path).tile == 0
    (tmp_path / "npedit.json").write_text(json.dumps(facts | {"tile": -1}))
    with pytest.raises(UserError, match="tile >= 0"):
        EditorFacts.read(tmp_path)


def test_the_estimate_shows_what_is_saved(tmp_path: Path) -> None:
    made = parts()
    made.family.pipe.save_pretrained(tmp_path / "base")
    made.critic.save(tmp_path / "critic")

    def held(**memory) -> int:
        raw = {
            "name": "small",
            "family": {"name": "flux", "weights": str(tmp_path / "base")},
            "critic": {"name": "llava_onevision", "weights": str(tmp_path / "critic"), "wording": "short"},
            "data": {"name": "imagefolder", "path": "photos", "sizes": [[96, 48]]},
            "stages": [{"step": "np_edit", "updates": 1, "batch_size": 4, "settings": {"dmd_weight": 0}}],
            "trainer": {"sample_items": 1},
            "memory": memory,
        }
        found = {p.name: p.bytes_by_part["activations"] for p in estimate(make_recipe(raw), at_once=False).phases}
        return found["np_edit: critic"]

    plain, again, tiles = held(), held(decoder_checkpointing=True), held(decode_tile=48, cached_latents=4)
    assert again < 0.9 * plain and tiles < 0.9 * plain


# ----------------------------------------------------------------------------------------------- references' latents


def test_latents_are_kept_by_the_pixels_that_were_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = parts(critic=False, cached_latents=2), []
    real = made.family.encode
    monkeypatch.setattr(made.family, "encode", lambda images: asked.append(images.clone()) or real(images))
    a, b, c = (torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    other = a.clone()
    other[0, 3, 3] += 1e-6  # the same item, another pixel
    missed = made.encode_images(torch.stack([a, b, a]))
    assert [x.shape for x in asked] == [(1, 3, 16, 16)] * 2 and torch.equal(missed[0], missed[2])
    hit = made.encode_images(torch.stack([b, a]))
    assert len(asked) == 2 and torch.equal(hit, missed[[1, 0]])
    assert torch.equal(made.encode_images(a[None]), real(a[None]))
    torch.testing.assert_close(missed, real(torch.stack([a, b, a])), atol=1e-5, rtol=1e-4)
    for wrong in (other, a.reshape(3, 8, 32), a.bfloat16()):
        before = len(asked)
        made.encode_images(wrong[None])
        assert len(asked) == before + 1
    made.encode_images(torch.stack([c, b, a, c]))  # more than there is room for
    assert len(made.latents) == 2 and len(parts(critic=False).latents) == 0
    assert all(kept.device.type == "cpu" for kept in made.latents.values())


def test_a_run_that_goes_on_with_an_empty_cache_repeats_itself() -> None:
    """Two updates; in between, the second one's cache is lost. The pictures are the same, in other batches."""
    ends: list[Tensor] = []
    for lost in (False, True):
        made = parts(cached_latents=3)
        step = Step(NpEditSettings(fake_updates=1, steps=2), made, made.create_trainable("student", 0), 10, 0)
        step.step([batch(0, 1)], 0)
        assert len(made.latents) == 2
        if lost:
            made.latents.clear()
        step.step([batch(1, 2)], 1)
        net: nn.Module = step.learners["student"].net
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    assert torch.equal(*ends)
