"""`make bench-gpu`: which recipes it rehearses, its table, and what it says without a GPU."""

import pytest

from benchmarks import gpu
from npedit.nets.device import is_accelerator, pick_device


def test_it_rehearses_the_recipes_of_real_models() -> None:
    assert gpu.real_recipes() == ["paper", "sana-24gb", "z-image-80gb", "z-image-8x80gb", "z-image-scene-80gb"]


@pytest.mark.skipif(is_accelerator(pick_device()), reason="this machine has a GPU")
def test_without_a_gpu_it_says_what_to_do(capsys) -> None:
    assert gpu.main([]) == 2
    assert "expected a GPU; got none" in capsys.readouterr().out


def test_a_row_has_the_last_stages_update_and_the_largest_phase() -> None:
    values = {
        "recipe": "sana-24gb",
        "processes": 2,
        "updates": {
            "reference_copy": {"seconds": 1.0, "flops": 1e12, "share": 0.1},
            "np_edit": {"seconds": 4.06, "flops": 250e12, "share": 0.425},
        },
        "peak_gib": {"np_edit: critic": 18.26, "np_edit: draft": 12.0},
        "estimate": {"np_edit: critic": {"estimate_gib": 19.92}, "np_edit: draft": {"estimate_gib": 13.0}},
    }
    assert gpu.table_row(values) == "| sana-24gb: np_edit | 2 | 4.1 | 250 | 42% | 18.3 | 19.9 |"
    assert gpu.HEAD.count("|") == gpu.table_row(values).count("|")


@pytest.mark.gpu
def test_a_shallow_recipe_is_measured_on_a_gpu(capsys) -> None:
    assert gpu.main(["--recipes", "sana-24gb", "--layers", "1"]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| sana-24gb: np_edit |") and "failed" not in row
