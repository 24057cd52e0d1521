"""The benchmarks measure the same computation: versions that share and that do not have equal losses; pages are filled
between their markers and nowhere else."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import filled
from benchmarks.inference import inference
from benchmarks.measure import peaks, storages, table
from benchmarks.train_step import (
    LORA,
    Bench,
    Unshared,
    arithmetic,
    by_part,
    difference,
    exchanges,
    held,
    savings,
    variants,
)
from npedit.recipe.config import MemorySettings, load_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench() -> Bench:
    small = ("stages.1.batch_size=2", "stages.1.settings.fake_updates=2")
    return Bench(load_recipe(ROOT / "recipes" / "toy.yaml", small))


def test_versions_have_equal_losses_and_a_changed_one_has_not(bench) -> None:
    logged = {}
    for name, parts in variants(bench.recipe).items():
        step = bench.step(parts)
        logged[name] = [step.step(bench.groups[turn % 2], turn) for turn in range(3)]
    assert set(logged) > {"plain", "all three (npedit)"}
    for name, seen in logged.items():
        assert difference(logged["plain"], seen) < 1e-3, name
    lora = LORA.model_copy(update={"alpha": 64.0})
    other = bench.step(replace(variants(bench.recipe)["plain"], lora=lora))
    seen = [other.step(bench.groups[turn % 2], turn) for turn in range(3)]
    assert difference(logged["plain"], seen) > 1e-3


def test_a_critic_unshared_answers_the_same_and_looks_more_often(bench) -> None:
    critic, pictures = bench.parts.critic, bench.groups[0][0].references
    asked = ["is it red?", "is it blue?", "is it a circle?"]
    looks = [(0,), (0, 1), (1, 0)]
    answers, seen = [], []
    for one in (critic, Unshared(critic)):
        tokens = one.encode_images(pictures)
        hook = critic.model.model.vision_tower.register_forward_pre_hook(
            lambda m, a, k: seen.append(1), with_kwargs=True
        )
        answers.append(one.margin(asked, [[tokens[i] for i in look] for look in looks]))
        hook.remove()
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-4)
    assert len(seen) == 1  # the shared one had seen them before


def test_shared_memory_counts_once_and_one_base_is_less(bench) -> None:
    x = torch.zeros(10)
    assert storages([x, x[2:], torch.zeros(5)]) == 60
    made = variants(bench.recipe)
    base = storages(made["plain"].family.base.parameters())
    plain, one = (held(bench.step(made[name])) for name in ("plain", "one base for all"))
    assert plain - one == pytest.approx(2 * base, rel=0.001)


def test_peaks_are_by_part_and_checkpointing_lowers_the_critics(bench) -> None:
    found = {}
    for name, memory in (("plain", {}), ("again", {"decoder_checkpointing": True})):
        step = bench.step(replace(bench.parts, memory=MemorySettings(**memory)))
        found[name] = peaks(lambda step=step: step.step(bench.groups[0], bench.two_transitions(0)))
    assert set(found["plain"]) >= {"draft", "dmd", "critic", "student", "fake"}
    assert 0 < found["again"]["critic"] < found["plain"]["critic"]


def test_the_tables(bench) -> None:
    for text in (
        by_part(bench, 1),
        savings(bench, 1)[0],
        exchanges(bench, 1),
        arithmetic(bench, 1),
        inference(1, (1,)),
    ):
        rows = [line.split("|")[1:-1] for line in text.splitlines()]
        assert len({len(row) for row in rows}) == 1 < len(rows)
        assert not re.search(r"nan|inf|-\d", text)


def test_a_page_is_filled_between_its_markers() -> None:
    page = "a\n<!-- x -->\nold\n<!-- end x -->\nb\n"
    text = table(("k",), [(1,)])
    assert filled(page, {"x": text}) == f"a\n<!-- x -->\n{text}\n<!-- end x -->\nb\n"
    assert filled(filled(page, {"x": text}), {"x": "new"}) == "a\n<!-- x -->\nnew\n<!-- end x -->\nb\n"
    with pytest.raises(ValueError, match="markers of y"):
        filled(page, {"y": text})


def test_the_page_has_all_markers() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    names = ("machine", "parts", "savings", "exchanges", "arithmetic", "inference", "processes")
    assert filled(page, dict.fromkeys(names, "x")) != page
