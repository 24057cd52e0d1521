"""Several references of one example, from the data through a training step and an edit."""

from dataclasses import replace

import pytest
import torch

from npedit.data import collate, imagefolder
from npedit.data._photos import to_pil
from npedit.editor import Editor
from npedit.errors import UserError
from npedit.families.flux import Flux
from npedit.generator import edit_images
from npedit.steps import np_edit, reference_copy
from npedit.training.parts import build_source, check_recipe_fits
from tests.support.parts import example, parts, weights
from tests.support.photo_sets import plain, row, save, write_metadata
from tests.training.test_trainer import recipe


def batch_of(*seeds, count=2):
    """Items whose further references come from these seeds."""
    made = []
    for number, seed in enumerate(seeds):
        stream = torch.Generator().manual_seed(seed)
        extra = tuple(torch.rand(3, 16, 16, generator=stream) for _ in range(count))
        made.append(replace(example(number), extra_references=extra))
    return collate(made)


def trained(batch, step_kind="np_edit", **memory):
    frozen = parts(**memory)
    if step_kind == "np_edit":
        step = np_edit.Step(np_edit.NpEditSettings(fake_updates=1), frozen, frozen.family.trainable_net(), 1, 0)
    else:
        step = reference_copy.Step(reference_copy.CopySettings(), frozen, frozen.family.trainable_net(), 1, 0)
    step.step([batch], 0)
    return weights(step.learners["student"].net)


@pytest.mark.parametrize("kind", ["np_edit", "reference_copy"])
def test_further_references_reach_the_student(kind):
    one = trained(batch_of(1, 2), kind)
    assert torch.equal(one, trained(batch_of(1, 2), kind)), "the same twice"
    assert not torch.equal(one, trained(batch_of(1, 3), kind)), "another further reference trains another student"
    assert not torch.equal(one, trained(batch_of(1, 2, count=1), kind)), "and so does their number"


def test_offload_and_the_cache_of_latents_change_nothing():
    wanted = trained(batch_of(1, 2))
    assert torch.equal(trained(batch_of(1, 2), offload=True), wanted)
    assert torch.equal(trained(batch_of(1, 2), cached_latents=8), trained(batch_of(1, 2), cached_latents=8))


def test_a_batch_gives_the_edits_of_its_items_one_by_one():
    family, batch = Flux.tiny(0), batch_of(1, 2)
    net = family.trainable_net()

    def edit(part):
        return edit_images(
            family, net, part.references, part.instructions, 0, 2, extra_references=part.extra_references
        )

    both = edit(batch)
    torch.testing.assert_close(both, torch.cat([edit(batch.slice(i, i + 1)) for i in range(2)]))
    alone = edit_images(family, net, batch.references, batch.instructions, 0, 2)
    assert not torch.allclose(both, alone)


def test_an_editor_sees_further_pictures():
    family = Flux.tiny(0)
    editor = Editor(family, family.trainable_net(), 2, [(32, 32)])
    picture, other = plain(40, 32), to_pil(torch.rand(3, 50, 70, generator=torch.Generator().manual_seed(0)))
    (alone,), (beside,) = editor.edit(picture, "a"), editor.edit(picture, "a", references=[other])
    assert beside.size == (40, 32) and beside.tobytes() != alone.tobytes()
    with pytest.raises(UserError, match="further references; got 16"):
        editor.edit(picture, "a", references=[other] * 16)


def test_more_references_than_the_family_takes_are_refused_before_training(tmp_path):
    for name in ("a.png", "b.png"):
        save(tmp_path, name, plain(64, 64))
    rows = [row("a.png"), row("b.png", reference_file_names=["a.png"] * 3)]
    settings = imagefolder.Settings(path=str(write_metadata(tmp_path, rows)), sizes=((64, 64),), prefetch=0)
    source, frozen = imagefolder.Source(settings, 0), parts()
    assert source.most_references == 4
    stage, policy = ({"step": s, "updates": 1, "batch_size": 1} for s in ("np_edit", "flow_grpo"))
    stage["settings"] = {"steps": 2}
    check_recipe_fits(recipe(stages=[stage]), source, frozen)
    with pytest.raises(UserError, match=r"stages\.1: expected .* at most 1, as flow_grpo .*got 4; .*remove"):
        check_recipe_fits(recipe(stages=[stage, policy]), source, frozen)
    frozen.family.most_references = 3
    with pytest.raises(UserError, match="at most 3 references"):
        check_recipe_fits(recipe(stages=[stage]), source, frozen)


def test_rows_with_one_reference_fit_each_step():
    """Also a data source that says nothing of references."""
    made = recipe(stages=[{"step": "flow_grpo", "updates": 1, "batch_size": 1}])
    check_recipe_fits(made, build_source(made), parts())
