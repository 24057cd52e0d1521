"""What a recipe holds: against counts of parameters, against torch's profiler on a CPU, and against itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

from npedit import generator
from npedit.cli.main import app
from npedit.critics.llava_onevision import LlavaOnevision
from npedit.data import Batch
from npedit.errors import UserError
from npedit.families.flux import Flux
from npedit.generator import sample_training_times, seeded_generator
from npedit.recipe.config import Recipe, load_recipe, make_recipe
from npedit.steps.np_edit import NpEditSettings, Step
from npedit.training.estimate import (
    SAMPLE_PROMPT,
    Estimate,
    _largest_batch,
    estimate,
)
from npedit.training.estimate_table import estimate_table, estimate_values, fit_message
from npedit.training.models_without_weights import PUBLISHED, config_folder, open_without_weights
from npedit.training.parts import build_parts

SIDE, ITEMS = 32, 4
COPY = {"step": "reference_copy", "updates": 1, "batch_size": ITEMS}
NP_EDIT = {"step": "np_edit", "updates": 1, "batch_size": ITEMS, "settings": {"fake_updates": 2}}
BETWEEN = ("gradients", "activations")  # what comes and goes in an update


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A tiny family and critic, as folders."""
    place = tmp_path_factory.mktemp("models")
    Flux.tiny(0).pipe.save_pretrained(place / "base")
    LlavaOnevision.tiny(0).save(place / "critic")
    return place


def recipe(models: Path, **changes: Any) -> Recipe:
    """Two stages, so small that they run here too."""
    return make_recipe(
        {
            "name": "small",
            "family": {"name": "flux", "weights": str(models / "base")},
            "critic": {"name": "llava_onevision", "weights": str(models / "critic"), "wording": "short"},
            "data": {"name": "imagefolder", "path": "photos", "sizes": [[SIDE, SIDE], [16, 16]]},
            "stages": [COPY, NP_EDIT],
            "trainer": {"sample_items": 2},
        }
        | changes
    )


@pytest.fixture(scope="module")
def plain(models) -> Estimate:
    return estimate(recipe(models), at_once=False)


def worst(found: Estimate, what: str, stage: str = "np_edit: ") -> int:
    return max(p.bytes_by_part.get(what, 0) for p in found.phases if p.name.startswith(stage))


def counted(net: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in net.parameters())


def test_weights_averages_and_moments_are_counted_exactly(plain, models) -> None:
    family, critic = Flux.tiny(0), LlavaOnevision.tiny(0)
    pipe, net = family.pipe, counted(family.base)  # float32
    assert worst(plain, "base") == net == worst(plain, "student") == worst(plain, "fake")
    assert worst(plain, "averages") == 2 * net and worst(plain, "optimizer") == 2 * net
    held = {what: worst(plain, what) for what in ("text", "VAE", "critic")}
    known = {"text": counted(pipe.text_encoder) + counted(pipe.text_encoder_2), "VAE": counted(pipe.vae)}
    known["critic"] = counted(critic.model)
    for what, size in known.items():
        assert size <= held[what] <= 1.01 * size + 4096, what  # with buffers
    twice = {
        "step": "reference_copy",
        "updates": 1,
        "batch_size": 1,
        "accumulate": 2,
    }  # the first's are there meanwhile
    assert worst(estimate(recipe(models, stages=[twice])), "gradients", "reference_copy: update") == net
    assert plain.disk["finished editor:"] == net
    assert plain.disk["checkpoints, 2 kept and one being written:"] == pytest.approx(3 * 6 * net, rel=0.01)


def test_the_room_on_the_disk_is_that_of_the_largest_stage_with_all_that_its_step_keeps(plain, models) -> None:
    """Flow-GRPO keeps the weights of its reference policy; the last stage may be the smaller one."""
    net, disk = worst(plain, "base"), "checkpoints, 2 kept and one being written:"
    copied = estimate(recipe(models, stages=[NP_EDIT, COPY])).disk[disk]
    assert copied == pytest.approx(plain.disk[disk], rel=0.01)
    only = {"step": "flow_grpo", "updates": 1, "batch_size": 1, "settings": {"group": 2, "sampling_steps": 2}}
    for kl_weight, kept in ((0.04, 1), (0.0, 0)):
        stage = only | {"settings": only["settings"] | {"kl_weight": kl_weight}}
        found = estimate(recipe(models, stages=[stage]))
        assert found.disk[disk] == pytest.approx(3 * (3 + kept) * net, rel=0.01)


def test_what_settings_switch_off_and_what_a_type_costs(plain, models) -> None:
    """No EMA weights where `ema` is 0; a first moment only where beta1 is not 0; float32 weights beside those of
    bfloat16, in which the models compute."""
    net = worst(plain, "base")
    lean = {"step": "np_edit", "updates": 1, "batch_size": ITEMS,
            "settings": {"fake_updates": 2, "fake": {"ema": 0.0, "betas": [0.5, 0.9]}}}  # fmt: skip
    found = estimate(recipe(models, stages=[lean]))
    assert worst(found, "averages") == net and worst(found, "optimizer") == 3 * net
    family = {"name": "flux", "weights": str(models / "base"), "dtype": "bfloat16"}
    half = estimate(recipe(models, stages=[NP_EDIT], family=family))
    assert worst(half, "base") == net / 2 and worst(half, "student") == worst(half, "fake") == 1.5 * net
    sharded = estimate(recipe(models, stages=[NP_EDIT], family=family, trainer={"shard": "full"}), 2)
    assert worst(sharded, "student") == net / 2
    assert half.disk["finished editor:"] == sharded.disk["finished editor:"] == net


def update_with_two_transitions() -> int:
    """The first update after update 0 whose unroll makes two transitions: the largest one."""
    times = torch.ones(NpEditSettings().steps)
    return next(u for u in range(1, 100) if len(sample_training_times(times, seeded_generator(0, "times", u))) == 2)


def measured(of: Recipe) -> int:
    """The most bytes that an update of np_edit has on a CPU beside those from before it, by torch's profiler."""
    parts = build_parts(of)
    step = Step(NpEditSettings(fake_updates=2), parts, parts.create_trainable("student", 0), 1, 0)
    words, kinds = (SAMPLE_PROMPT,) * ITEMS, ("replace",) * ITEMS
    items = Batch(words, torch.rand(ITEMS, 3, SIDE, SIDE), words, kinds, words, words, words)
    most = 0
    for update in (0, update_with_two_transitions()):  # the first makes the optimizers' state
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            step.step([items, items], update)
        events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("memory", [{}, {"gradient_checkpointing": True}])
def test_the_estimated_peak_is_within_a_tenth_of_the_profilers(models, plain, memory) -> None:
    of = recipe(models, memory=memory, stages=[NP_EDIT])
    found = estimate(of, at_once=False) if memory else plain
    phases = [p for p in found.phases if p.name.startswith("np_edit: ") and p.name != "np_edit: set-up"]
    expected = max(sum(p.bytes_by_part.get(b, 0) for b in BETWEEN) for p in phases)
    got = measured(of)
    assert expected == pytest.approx(got, rel=0.1), f"estimated {expected}, measured {got}: {expected / got - 1:+.1%}"


@pytest.mark.parametrize("memory", [{}, pytest.param({"gradient_checkpointing": True}, marks=pytest.mark.slow)])
def test_the_estimate_knows_isolated_references(models, plain, memory) -> None:
    """Also that one pass over them is fewer operations than two, for the unroll with two transitions."""
    family = {"name": "flux", "weights": str(models / "base"), "isolated_references": True}
    of = recipe(models, family=family, memory=memory, stages=[NP_EDIT])
    found = {p.name: p for p in estimate(of, at_once=False).phases}
    expected = max(
        sum(p.bytes_by_part.get(b, 0) for b in BETWEEN)
        for name, p in found.items()
        if name.startswith("np_edit: ") and name != "np_edit: set-up"
    )
    assert expected == pytest.approx(measured(of), rel=0.1)
    if not memory:
        joint = {p.name: p for p in plain.phases}
        assert found["np_edit: draft"].flops < joint["np_edit: draft"].flops


def test_a_judge_is_counted_as_a_frozen_model_that_looks_at_few_pictures_at_a_time(models, monkeypatch) -> None:
    judge = {"name": "llava_onevision", "weights": str(models / "critic"), "wording": "short", "resolution": 0}
    of = recipe(models, stages=[{**COPY, "batch_size": 1}], critic=None, judge=judge, memory={"offload": True})
    measured, size = estimate(of, at_once=False), counted(LlavaOnevision.tiny(0).model)
    found = {p.name: p for p in measured.phases}
    opened, without = (e.disk["models to open, in the recipe's types:"] for e in (measured, estimate(
        recipe(models, stages=[{**COPY, "batch_size": 1}], critic=None), at_once=False)))  # fmt: skip
    assert opened - without == size
    assert size <= found["judge"].bytes_by_part["judge"] <= 1.01 * size + 4096
    assert found["samples"].bytes_by_part["judge"] == 0
    monkeypatch.setattr(generator, "BATCH_PIXELS", SIDE * SIDE)
    one = {p.name: p for p in estimate(of, at_once=False).phases}
    for name in ("samples", "judge"):
        activations = [phases[name].bytes_by_part["activations"] for phases in (one, found)]
        assert activations[0] < 0.2 * activations[1], name
    with pytest.raises(UserError, match=r"judge\.name: expected a single critic"):
        estimate(recipe(models, judge={"name": "ensemble", "weights": "x.yaml"}))


def test_loading_is_a_phase_in_which_offloaded_models_are_never_together(models, plain) -> None:
    """Without offload it holds all models. With offload each model leaves before the next one opens;
    a quantised critic stays, and is never whole."""
    judge = {"name": "llava_onevision", "weights": str(models / "critic"), "wording": "plain"}
    base, text, vae, critic = (worst(plain, column) for column in ("base", "text", "VAE", "critic"))
    first = plain.phases[0]
    assert first.name == "loading" and first.total == base + text + vae + critic and plain.offloaded == 0
    small = {"step": "np_edit", "updates": 1, "batch_size": 1, "settings": {"dmd_weight": 0.0}}
    away = {"judge": judge, "memory": {"offload": True}, "lora": {"rank": 1, "alpha": 1}, "stages": [small]}
    found = estimate(recipe(models, **away))
    assert found.phases[0].total == base + max(text + vae, critic)
    weights = text + vae + 2 * critic
    assert weights <= found.offloaded <= 2 * weights  # tiny arenas; those of real models: tests/nets/test_offload.py
    few = {"name": "llava_onevision", "weights": str(models / "critic"), "bits": 4}
    quantised = estimate(recipe(models, critic=few, **away))
    held = worst(quantised, "critic", "np_edit: set-up")
    assert quantised.phases[0].total == base + max(text + vae, held + critic) and 0 < held < critic
    assert text + vae + critic <= quantised.offloaded < found.offloaded
    line = f"CPU memory: {found.offloaded / 2**30:.1f} GiB in each process, for memory.offload."
    assert line in estimate_table(found) and not any("CPU memory" in line for line in estimate_table(plain))
    assert estimate_values(found)["offloaded_bytes"] == found.offloaded


def test_scenes_of_photos_and_of_the_toy_have_another_photo_in_the_critic(models, plain) -> None:
    photos = {"name": "imagefolder", "path": "photos", "sizes": [[SIDE, SIDE], [16, 16]], "shares": {"scene": 0.3}}
    for data in (photos, {"name": "toy", "edit_types": ["scene"]}):
        batch = _largest_batch(recipe(models, data=data), ITEMS)
        assert batch.other_photos is not None and set(batch.edit_types) == {"scene"}
    found = estimate(recipe(models, data=photos, stages=[NP_EDIT]), at_once=False)
    assert worst(found, "activations", "np_edit: critic") > worst(plain, "activations", "np_edit: critic")


def test_lora_offload_and_checkpointing_lower_the_estimate(plain, models) -> None:
    """Each in the stage where the saving shows; LoRA and offload do not touch the same figures."""
    lora = estimate(recipe(models, stages=[NP_EDIT], lora={"rank": 2, "alpha": 2}, memory={"offload": True}))
    assert worst(lora, "base") >= worst(plain, "base")
    for what in ("student", "fake", "averages", "optimizer"):
        assert 0 < worst(lora, what) < 0.5 * worst(plain, what), what
    again = estimate(recipe(models, stages=[COPY], memory={"gradient_checkpointing": True}), at_once=False)
    assert worst(again, "activations", "reference_copy: update") < worst(plain, "activations", "reference_copy: update")
    away = {p.name: p.bytes_by_part for p in lora.phases}
    assert away["np_edit: fake"]["critic"] == 0 < away["np_edit: critic"]["critic"]


def test_two_processes_hold_half_a_batch_and_with_sharding_half_the_weights(plain, models) -> None:
    """Two processes: half of the batch each; sharded, half of all that is trained too."""
    both = recipe(models, trainer={"sample_items": 2, "shard": "full"})
    whole = estimate(recipe(models, stages=[NP_EDIT]), 2, at_once=False)
    halves = estimate(both, 2)
    assert worst(whole, "student") == worst(plain, "student") == 2 * worst(halves, "student")
    assert worst(halves, "optimizer") == worst(plain, "optimizer") / 2
    assert worst(halves, "base") == pytest.approx(worst(plain, "base") / 2, rel=0.01)
    assert worst(whole, "activations") < 0.7 * worst(plain, "activations")
    assert worst(halves, "gathered") > 0 == worst(whole, "gathered")
    with pytest.raises(UserError, match="expected a multiple of the 3 processes"):
        estimate(recipe(models), 3)


def test_the_table_and_whether_a_gpu_is_large_enough(plain) -> None:
    lines = estimate_table(plain)
    assert lines[0].split()[0] == "GiB" and "optimizer" in lines[0] and "gathered" not in lines[0]
    assert any(line.startswith("Peak: ") for line in lines) and any("checkpoints" in line for line in lines)
    peak = plain.peak.total / 2**30
    assert fit_message(plain, "24GB").startswith("fits 24 GB")
    assert fit_message(plain, f"{peak * 1.05}").startswith("tight")
    assert fit_message(plain, f"{peak / 2}GiB").startswith("does not fit")
    verdicts = [estimate_values(plain, size)["fit"]["verdict"] for size in ("24GB", f"{peak * 1.05}", f"{peak / 2}GiB")]
    assert verdicts == ["fits", "tight", "does not fit"] and estimate_values(plain)["fit"] is None
    for bad in ("", "large", "-3GB", "0"):
        with pytest.raises(UserError, match="expected --gpu as in 24GB"):
            fit_message(plain, bad)


def test_the_estimate_command_prints_phases_and_fit(models, tmp_path) -> None:
    import yaml

    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe(models).as_dict()))
    fewer = ["stages.0=null", "stages.1.batch_size=2", "stages.1.settings.fake_updates=1"]
    done = CliRunner().invoke(app, ["estimate", str(path), *fewer, "--gpu", "24GB"])
    assert done.exit_code == 0, done.output
    assert "np_edit: critic" in done.output and "fits 24 GB" in done.output


def test_missing_or_wrong_configs_are_named(models, tmp_path) -> None:
    with pytest.raises(
        UserError, match=r"family\.weights: expected a local folder, or one of these.*Tongyi-MAI/Z-Image"
    ):
        config_folder("family", "somebody/something", str)
    for changes, said in (
        ({"family": {"name": "flux", "weights": str(tmp_path)}}, "expected model_index.json"),
        ({"family": {"name": "sd3", "weights": str(models / "base")}}, "expected a StableDiffusion3Pipeline"),
        ({"critic": {"name": "internvl", "weights": str(models / "critic")}}, "expected a model of internvl"),
        ({"critic": {"name": "ensemble", "weights": "x.yaml"}}, "expected a single critic"),
    ):
        with pytest.raises(UserError, match=said):
            open_without_weights(recipe(models, **changes))


# --------------------------------------------------------------------------------------------------- the recipes

MILLIONS = {  # of parameters, as published: denoiser, text encoders, VAE, critic
    "sana-24gb": (1604, 2614, 312, 2247),
    "z-image-80gb": (6155, 4022, 84, 7944),
    "z-image-scene-80gb": (6155, 4022, 84, 7944),
    "z-image-8x80gb": (6155, 4022, 84, 15117),
    "paper": (2243, 5581, 84, 8030),
}


@pytest.mark.parametrize("name", MILLIONS)
def test_a_recipe_builds_its_models_without_weights(name: str) -> None:
    path = Path(__file__).parents[2] / "recipes" / f"{name}.yaml"
    of = load_recipe(path)
    assert (
        of.name == name
        and not of.is_trained_with_pairs()
        and [s.step for s in of.stages] == ["reference_copy", "np_edit"]
    )
    family, critic = open_without_weights(of)
    pipe = {n: m for n, m in family.pipe.components.items() if isinstance(m, nn.Module)}
    text = [m for n, m in pipe.items() if n.startswith("text_encoder")]
    sizes = [
        sum(p.numel() for p in m.parameters()) for m in (family.base, nn.ModuleList(text), pipe["vae"], critic.model)
    ]
    assert [round(size / 1e6) for size in sizes] == list(MILLIONS[name])
    assert all(h % family.facts.multiple == 0 == w % family.facts.multiple for h, w in of.data.settings.sizes)
    for block in family.facts.blocks:
        assert len(family.base.get_submodule(block)) > 1
    head = path.read_text().split("name:")[0]
    assert "The first command estimates the memory" in head and "because no GPU was available" in head.replace(
        "\n# ", " "
    )


def test_published_configs_say_where_they_are_from() -> None:
    import json

    found = sorted(PUBLISHED.rglob("*.json"))
    assert len(found) > 20
    for path in found:
        source = json.loads(path.read_text())["_source"]
        assert "published architecture" in source or "at commit" in source, path
        assert "no weights" in source.lower(), path


@pytest.mark.slow
@pytest.mark.parametrize("fake_samples", ["fresh", "replay"])
def test_operations_of_an_update_are_extrapolated_from_a_smaller_one(models, fake_samples) -> None:
    """Counted are at most two batches and two fake score updates. A fake score update after the first also draws its
    samples, unless they are replayed."""

    def operations(accumulate: int, fake_updates: int) -> dict[str, float]:
        settings = {"fake_updates": fake_updates, "fake_samples": fake_samples, "dmd_weight": 1.0, "critic_weight": 0.0}
        stage = {**NP_EDIT, "accumulate": accumulate, "settings": settings}
        found = estimate(recipe(models, stages=[stage]), at_once=False)
        return {phase.name.removeprefix("np_edit: "): phase.flops for phase in found.phases}

    one, two, many = operations(1, 1), operations(1, 2), operations(6, 5)
    first, second = one["fake"], two["fake"] - one["fake"]
    assert many["dmd"] == 6 * one["dmd"] > 0
    assert many["fake"] == pytest.approx(6 * (first + 4 * second), rel=1e-6)
    assert (second > 1.1 * first) == (fake_samples == "fresh")
