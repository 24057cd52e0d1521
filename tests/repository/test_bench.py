"""The benchmarks compare equal computations: versions with and without sharing have equal losses. A page is changed
only between its markers."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.critic_bits import bits_table
from benchmarks.critic_packing import critic_table, update_table
from benchmarks.gradient_agreement import agreement, gradients, recipes
from benchmarks.inference import inference_table
from benchmarks.isolated_reference import TINY as TINY_NETS
from benchmarks.isolated_reference import _edits, _operations, isolation_table
from benchmarks.measure import fill_tables, peak_bytes_by_part, storage_bytes, table
from benchmarks.small_models import TINY
from benchmarks.train_step import (
    LORA,
    Bench,
    UnsharedCritic,
    arithmetic_table,
    largest_difference,
    memory_settings_table,
    parts_table,
    savings_table,
    static_bytes,
    variants,
)
from npedit.critics.llava_onevision import LlavaOnevision
from npedit.families.flux import Flux
from npedit.recipe.config import MemorySettings, load_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The toy recipe with tiny models, two pictures and one fake-score update an update, one batch that repeats."""
    models = tmp_path_factory.mktemp("models")
    Flux.tiny(0).pipe.save_pretrained(models / "base")
    LlavaOnevision.tiny(0).save(models / "critic")
    small = (f"family.weights={models / 'base'}", f"critic.weights={models / 'critic'}",
             "stages.1.batch_size=2", "stages.1.settings.fake_updates=1")  # fmt: skip
    return Bench(load_recipe(ROOT / "recipes" / "toy.yaml", small), groups=1)


def assert_is_table(text: str) -> None:
    """Every row has as many cells as the head, and every number is finite and not negative."""
    rows = [line.split("|")[1:-1] for line in text.splitlines()]
    assert len({len(row) for row in rows}) == 1 < len(rows)
    assert not re.search(r"nan|inf|-\d", text)


def test_every_version_has_the_losses_of_the_plain_one(bench) -> None:
    text, difference = savings_table(bench, 1)
    assert_is_table(text)
    assert difference < 1e-3
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == list(variants(bench.recipe))


def test_a_version_with_another_alpha_has_other_losses(bench) -> None:
    plain = variants(bench.recipe)["plain"]
    other = replace(variants(bench.recipe)["plain"], lora=LORA.model_copy(update={"alpha": 64.0}))
    logged = [[step.step(bench.groups[0], turn) for turn in range(2)] for step in map(bench.step, (plain, other))]
    assert largest_difference(*logged) > 1e-3


def test_the_unshared_critic_has_equal_margins_and_encodes_more_often(bench) -> None:
    critic, pictures = bench.parts.critic, bench.groups[0][0].references
    asked = ["is it red?", "is it blue?", "is it a circle?"]
    looks = [(0,), (0, 1), (1, 0)]
    answers, seen = [], []
    for one in (critic, UnsharedCritic(critic)):
        tokens = one.encode_images(pictures)
        hook = critic.model.model.vision_tower.register_forward_pre_hook(
            lambda m, a, k: seen.append(1), with_kwargs=True
        )
        answers.append(one.margin(asked, [[tokens[i] for i in look] for look in looks]))
        hook.remove()
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-4)
    assert len(seen) == 1  # the shared one had seen them before


def test_shared_storage_is_counted_once_so_one_base_takes_less(bench) -> None:
    x = torch.zeros(10)
    assert storage_bytes([x, x[2:], torch.zeros(5)]) == 60
    made = variants(bench.recipe)
    base = storage_bytes(made["plain"].family.base.parameters())
    plain, one = (static_bytes(bench.step(made[name])) for name in ("plain", "one frozen base model"))
    assert plain - one == pytest.approx(2 * base, rel=0.001)


def test_peaks_are_by_part_and_checkpointing_lowers_the_critics_peak(bench) -> None:
    found = {}
    for name, memory in (("plain", {}), ("again", {"decoder_checkpointing": True})):
        step = bench.step(replace(bench.parts, memory=MemorySettings(**memory)))
        found[name] = peak_bytes_by_part(lambda step=step: step.step(bench.groups[0], bench.two_transitions(0)))
    assert set(found["plain"]) >= {"draft", "dmd", "critic", "student", "fake"}
    assert 0 < found["again"]["critic"] < found["plain"]["critic"]


SLOW_TABLES = [pytest.param(make, marks=pytest.mark.slow) for make in (memory_settings_table, arithmetic_table)]


@pytest.mark.parametrize("make", [parts_table, *SLOW_TABLES])
def test_a_benchmark_makes_a_table(bench, make) -> None:
    assert_is_table(make(bench, 1))


def test_the_benchmark_of_edits_makes_a_table() -> None:
    assert_is_table(inference_table(1, (1,)))


def test_the_benchmark_of_the_critic_shows_fewer_operations_when_packed() -> None:
    text = critic_table(1, TINY, (4,))
    assert_is_table(text)
    ratios = {cells[2].strip(): float(cells[4]) for cells in (line.split("|") for line in text.splitlines()[2:])}
    assert ratios["packed"] > 1.5 > ratios["packed, checkpointing"] > 1 > ratios["one row a question, checkpointing"]


def test_the_benchmark_of_isolated_references_counts_fewer_operations_with_fewer_passes() -> None:
    """Between what all linear layers and what all attention would have, with one reference pass instead of `steps`."""
    text = isolation_table(1, TINY_NETS, (2, 4), TINY_NETS)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[name, n] for name in ("FLUX", "Qwen-Image", "Z-Image") for n in "24"]
    ratio = {(row[0], int(row[1])): float(row[4]) for row in rows}
    for name in ("FLUX", "Qwen-Image", "Z-Image"):
        assert 0.4 < ratio[name, 4] < ratio[name, 2] < 1
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _edits("FLUX", 4, TINY_NETS, torch.device("cpu"))["isolated"]()
    assert counter.get_total_flops() == _operations("FLUX", 4, TINY_NETS)["isolated"]
    assert not [row for row in rows if any(word in " ".join(row) for word in ("nan", "inf"))]


@pytest.mark.slow
def test_the_benchmark_of_small_models_shows_fewer_operations_with_replay() -> None:
    text = update_table(1, TINY, 64)
    assert_is_table(text)
    ratios = {cells[1].strip(): float(cells[3]) for cells in (line.split("|") for line in text.splitlines()[2:])}
    assert ratios["fake_samples: replay"] > 1.2 and ratios["critic_checkpointing"] < 1 < ratios["packed_questions"]


def test_only_text_between_markers_is_replaced() -> None:
    page = "a\n<!-- x -->\nold\n<!-- end x -->\nb\n"
    text = table(("k",), [(1,)])
    assert fill_tables(page, {"x": text}) == f"a\n<!-- x -->\n{text}\n<!-- end x -->\nb\n"
    assert fill_tables(fill_tables(page, {"x": text}), {"x": "new"}) == "a\n<!-- x -->\nnew\n<!-- end x -->\nb\n"
    with pytest.raises(ValueError, match="markers of y"):
        fill_tables(page, {"y": text})


def test_the_benchmarks_page_has_the_markers_of_every_table() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    names = (
        "machine",
        "parts",
        "savings",
        "exchanges",
        "arithmetic",
        "inference",
        "processes",
        "critic",
        "small models",
        "isolated references",
    )
    assert fill_tables(page, dict.fromkeys(names, "x")) != page


def test_fewer_bits_change_answers_and_gradients_more() -> None:
    """The table of the toy's critic: 4 bits differ more than 8 bits, and 8 bits differ."""
    eight, four = (list(map(float, re.findall(r"0\.\d+", row))) for row in bits_table(2).splitlines()[2:])
    assert all(0 <= a < b for a, b in zip(eight, four)) and eight[1] > 0


def test_the_agreement_of_gradients_is_their_mean_cosine():
    east, north = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])
    assert agreement([east, 3 * east, east])[0] == pytest.approx(1)
    assert agreement([east, north, east])[0] == pytest.approx(1 / 3)
    assert agreement([east, east, -east])[0] == pytest.approx(-1 / 3)


def test_each_update_has_one_gradient_of_the_student():
    recipe = recipes("embedded")["np_edit"]
    stage = recipe.stages[0].model_copy(update={"batch_size": 2})
    recipe = recipe.model_copy(update={"stages": (stage,)})
    (alone,), (first, second) = gradients(recipe, 1), gradients(recipe, 2)
    assert torch.equal(alone, first) and first.shape == second.shape and not torch.equal(first, second)
