"""The load test of `npedit serve` at a small size: what must hold of every run."""

from __future__ import annotations

import pytest

from benchmarks import serving
from benchmarks.serving_requests import Outcome, make_load


def test_an_answer_with_another_status_is_counted() -> None:
    load = make_load(pictures=1)
    outcomes = [
        Outcome("edit", 200, 0.1),
        Outcome("edit", 500, 0.1),
        Outcome("SVG", 400, 0.1),
        Outcome("SVG", 200, 0.1),
    ]
    assert serving.wrong_answers(outcomes, load) == {("edit", 500): 1, ("SVG", 200): 1}
    mixed = serving.Mixed(outcomes, (1000 * 2**20, 1010 * 2**20), (20, 20), 1)
    text = serving.mixed_table(mixed, load)
    assert "| 2; 1 |" in text and "+1.00%" in text


@pytest.mark.slow
def test_a_server_under_load_answers_everyone_and_ends_well() -> None:
    load = make_load()
    with serving.serving() as server:
        speed = serving.measure_speed(server, load, 1, 8)
        pictures, batches = (server.metric(f"npedit_batch_items_{name}") for name in ("sum", "count"))
        mixed = serving.measure_mixed(server, load, 200, warm=100)
        end = serving.measure_end(server, load)
        log = server.log.read_text()
    assert len(speed[serving.CLIENTS].seconds) == 4 * len(speed[1].seconds)
    assert pictures > 1.5 * batches  # clients share batches; how much faster that is depends on the machine
    assert not serving.wrong_answers(mixed.outcomes, load)
    good, gone = (sum(o.kind == kind for o in mixed.outcomes) for kind in ("edit", "client goes away"))
    assert good <= mixed.edited <= good + gone
    assert mixed.growth < 0.05 and abs(mixed.open_files[1] - mixed.open_files[0]) <= 4
    assert end.statuses == {200: serving.CLIENTS} and end.code == 128 + 15
    assert "Traceback" not in log
