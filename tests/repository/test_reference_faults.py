"""The faults found in the paper's public reimplementation, and the tests that keep each of them out of here.

The numbers are those of `docs/method.md`'s list of that software's weaknesses, in short words. A fault that cannot
occur here has a reason instead of a test.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

HELD: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("DMD normalised per pixel", (
        "test_dmd::test_the_normaliser_is_one_number_a_sample",
        "test_dmd::test_a_samples_gradient_does_not_depend_on_the_others",
    )),
    2: ("training and use make different transitions", (
        "test_generator::test_training_unrolls_the_very_transitions_of_use",
        "test_generator::test_each_transition_has_fresh_noise",
        "test_generator::test_an_exported_scheduler_makes_the_same_transitions",
    )),
    3: ("'do nothing' items are asked whether the edit was done", (
        "test_questions::test_do_nothing_gets_the_identity_question_alone",
        "steps/test_np_edit::test_do_nothing_items_get_the_identity_question_alone",
    )),
    4: ("bfloat16 weights without a float32 copy", (
        "nets/test_learner::test_a_bfloat16_model_trains_float32_master_weights",
    )),
    5: ("an EMA that is never built", (
        "nets/test_learner::test_the_average_really_averages",
        "training/test_trainer::test_the_final_editor_holds_the_ema_weights",
    )),
    6: ("black bars from cropping", (
        "data/test_photos::test_no_padding_for_any_aspect",
        "data/test_photos::test_a_cut_is_centred_and_keeps_the_proportions",
    )),
    7: ("one fixed schedule of items for the whole run", (
        "data/test_order::test_each_epoch_visits_every_row_once",
        "data/test_order::test_epochs_are_shuffled_anew",
    )),
    8: ("unseeded random numbers, ranks that see the same items", (
        "data/test_order::test_ranks_are_disjoint_and_make_up_the_whole",
        "data/test_order::test_a_batch_depends_on_seed_and_index_alone",
        "steps/test_np_edit::test_equal_seeds_give_equal_weights_bit_for_bit",
    )),
    9: ("options that nobody reads", ("repository/test_architecture::test_every_setting_is_read",)),
    11: ("edit type names compared before they are mapped", ("test_questions::test_other_spellings_are_known",)),
    12: ("a learning rate that runs by another clock", (
        "steps/test_np_edit::test_the_fakes_schedule_ends_with_the_run",
    )),
    14: ("batch size 1 baked into the critic", (
        "support/chat_critics::test_a_mixed_batch_is_its_questions_one_by_one",
        "steps/test_np_edit::test_a_batch_of_three_is_its_items_one_by_one",
    )),
    15: ("guidance broadcast along the width", (
        "test_dmd::test_guidance_is_one_scale_a_sample",
        "steps/test_np_edit::test_guidance_follows_the_edit_type",
    )),
    16: ("another vocabulary's padding token", (
        "support/chat_critics::test_a_mixed_batch_is_its_questions_one_by_one",
    )),
    17: ("padding that is attended to", (
        "support/chat_critics::test_a_mixed_batch_is_its_questions_one_by_one",
    )),
    18: ("one reference only, equal to the target", (
        "families/test_flux::test_several_references_of_several_sizes_in_order",
        "repository/test_no_pairs::test_no_field_could_hold_an_edited_image",
    )),
    19: ("errors swallowed and retried without end", (
        "data/test_imagefolder::test_too_many_bad_rows_stop_it_on_the_way",
        "data/test_imagefolder::test_no_good_row_at_all_stops_it",
        "data/test_imagefolder::test_folders_that_are_none",
    )),
    24: ("unknown keys ignored, ranges unchecked", (
        "recipe/test_config::test_all_mistakes_of_one_class_are_told_at_once",
        "steps/test_np_edit::test_settings_out_of_range",
        "nets/test_learner::test_settings_out_of_range",
    )),
    25: ("a GPU and a launcher needed for everything", ("training/test_trainer::test_what_a_run_leaves_behind",)),
    26: ("weights loaded that are not used", ("training/test_trainer::test_what_no_stage_needs_is_not_loaded",)),
    27: ("three whole nets in training, on every GPU", (
        "nets/test_distributed::test_two_halves_equal_one",
        "nets/test_lora::test_gradient_reaches_the_own_adapter_alone",
        "nets/test_lora::test_gradient_checkpointing_changes_no_gradient",
    )),
    28: ("edited halves of the data sets are needed", (
        "repository/test_no_pairs::test_training_opens_no_edited_image",
        "repository/test_no_pairs::test_training_is_bit_for_bit_the_same_without_and_with_other_edited_images",
    )),
    29: ("no loading without worker processes", ("data/test_order::test_batches_are_made_ahead",)),
    30: ("one critic and one base model wired in", (
        "repository/test_architecture::test_a_file_imports_no_sibling_but_base",
        "support/chat_critics::test_the_folder_is_an_ordinary_transformers_folder",
        "recipe/test_config::test_names_are_files",
    )),
    31: ("an untested LoRA, that cannot go on from the warm-up", (
        "nets/test_lora::test_the_teacher_stays_whatever_the_others_learn",
        "nets/test_lora::test_checkpoints_hold_adapters_alone_and_the_next_stage_keeps_the_students",
        "nets/test_lora::test_the_final_adapter_opens_in_diffusers_and_in_the_editor",
    )),
    32: ("evaluation on training data, keys lost, one seed for all", (
        "benchmarks/test_toy::test_training_never_draws_held_out_instructions",
        "benchmarks/test_toy::test_items_are_balanced_held_out_and_reproducible",
        "test_generator::test_a_batch_of_three_is_its_images_one_by_one",
    )),
    33: ("no look at samples during training", (
        "training/test_trainer::test_evaluation_and_samples_keep_to_their_interval",
    )),
    34: ("files named in the documents that do not exist", (
        "repository/test_readme::test_every_link_resolves",
        "repository/test_readme::test_the_tree_in_architecture_lists_the_packages_files",
        "repository/test_architecture::test_shipped_recipes_load",
    )),
    35: ("no ablation switches", (
        "steps/test_np_edit::test_without_dmd_there_is_no_fake_score",
        "steps/test_np_edit::test_without_critic_none_is_needed",
        "steps/test_np_edit::test_without_identity_weight_only_the_edit_is_asked",
        "steps/test_np_edit::test_the_vocabulary_loss_is_used_when_asked_for",
    )),
    36: ("output not resized back, base weights loaded to be overwritten", (
        "test_editor::test_each_picture_comes_back_in_its_own_size_as_rgb",
    )),
    37: ("left-over code", ("repository/test_architecture::test_outside_packages_are_imported_only_in_their_folders",)),
}  # fmt: skip

FREE: dict[int, str] = {
    10: "there are no per-parameter statistics in the loop; what is logged comes from the step's own result",
    13: "data sources are not built from keyword lists; `config.check` builds each Settings class once",
    20: "a tracker is imported only if the recipe names it: see training/test_trackers",
    21: "nothing replaces built-ins",
    22: "weights are safetensors, and no remote code is trusted: see test_no_unsafe_loading",
    23: "the garbage collector is left alone: see test_no_unsafe_loading",
}


@cache
def named_in(module: str) -> frozenset[str]:
    tree = ast.parse((TESTS / f"{module}.py").read_text())
    return frozenset(n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))


def test_every_fault_is_answered_once() -> None:
    assert sorted([*HELD, *FREE]) == list(range(1, 38))


@pytest.mark.parametrize("number", sorted(HELD))
def test_every_named_test_exists(number: int) -> None:
    _, names = HELD[number]
    assert names
    for name in names:
        module, test = name.split("::")
        assert (TESTS / f"{module}.py").is_file(), f"{module} is gone"
        assert test in named_in(module), f"fault {number}: {name} is gone; name the test that took its place"


def test_no_unsafe_loading() -> None:
    """Faults 21, 22, 23, and 19: words that may not stand in the package at all."""
    banned = {
        r"torch\.load\((?!.*weights_only=True)": "weights alone",
        r"pickle(?! import UnpicklingError)": "safetensors",
        r"^(import|from) (wandb|trackio)": "opened on request alone",
        r"gc\.disable": "left alone", r"builtins\.print": "not replaced",
    }  # fmt: skip
    files = list((TESTS.parent / "src").rglob("*.py"))
    assert len(files) > 20
    lines = [(f"{f.name}:{i}", line) for f in files for i, line in enumerate(f.read_text().splitlines(), 1)]
    lines = [(place, line) for place, line in lines if "safetensors.torch.load" not in line]
    found = [f"{place}: {why}" for place, line in lines for word, why in banned.items() if re.search(word, line)]
    assert not found, found


def test_no_call_runs_the_code_of_a_repository() -> None:
    """Fault 21: only texts that tell the user of an exported editor how to load it contain `trust_remote_code`."""
    calls = []
    for path in (TESTS.parent / "src").rglob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        calls += [f"{path.name}:{n.lineno}" for n in nodes for k in n.keywords if k.arg == "trust_remote_code"]
    assert not calls, calls


def test_no_error_is_swallowed() -> None:
    """Fault 19: no bare `except`, no `except Exception` that only passes or goes round again."""
    found = []
    for path in (TESTS.parent / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                wide = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
                idle = all(isinstance(n, ast.Pass | ast.Continue) for n in node.body)
                if node.type is None or (wide and idle):
                    found.append(f"{path.name}:{node.lineno}")
    assert not found, found
