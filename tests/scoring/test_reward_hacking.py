"""The alarm for reward hacking: it fires when critic and oracle part ways, and is silent on healthy runs."""

from __future__ import annotations

import pytest

from npedit.scoring.reward_hacking import monitor_rows, reward_hacking_alarms

# (step, critic's p_edit, p_identity, oracle's applied, preserved) at the evaluations of the run that made the shipped
# editor (recipes/toy.yaml): the critic grows content faster than the oracle, but both rise.
HEALTHY = [
    (250, 0.27, 0.85, 0.17, 0.88), (500, 0.37, 0.84, 0.32, 0.91), (750, 0.58, 0.80, 0.43, 0.79),
    (1000, 0.66, 0.79, 0.52, 0.69), (1250, 0.74, 0.78, 0.55, 0.71), (1500, 0.79, 0.79, 0.58, 0.71),
    (1750, 0.83, 0.79, 0.64, 0.69), (2000, 0.85, 0.79, 0.66, 0.66), (2250, 0.87, 0.80, 0.68, 0.68),
]  # fmt: skip
DECEIVED = [
    (100, 0.05, 0.90, 0.02, 0.88), (200, 0.30, 0.75, 0.10, 0.60), (300, 0.60, 0.80, 0.09, 0.33),
    (400, 0.85, 0.88, 0.06, 0.10),
]  # fmt: skip


def rows(points: list[tuple], held: str = "eval", every: int = 10) -> list[dict]:
    """One row each `every` updates, the figures of an evaluation filled in back to the one before."""
    names = {"eval": ("eval/applied", "eval/preserved"), "judge": ("judge/p_edit", "judge/p_identity")}[held]
    found, last = [{"step": 0}], 0
    for step, edit, identity, done, kept in points:
        for n in range(last + every, step + 1, every):
            found.append({"step": n, "critic/p_edit": edit, "critic/p_identity": identity})
        found[-1] |= dict(zip(names, (done, kept)))
        last = step
    return found


NAMED = rows(DECEIVED)[1:]


@pytest.mark.parametrize("held", ["eval", "judge"])
def test_alarm_is_raised_when_the_critic_is_deceived(held: str) -> None:
    found = reward_hacking_alarms(rows(DECEIVED, held), 180)
    assert [(a.step, a.since) for a in found] == [(300, 100), (400, 100)]
    assert found[-1].judge == {"eval": "oracle", "judge": "held-out judge"}[held]
    assert found[-1].critic == pytest.approx((0.475, 0.865)) and found[-1].held_out == pytest.approx((0.45, 0.08))
    assert found[-1].message().startswith("at update 400: since update 100 the critic's score rose from 0.4")


@pytest.mark.parametrize("held", ["eval", "judge"])
def test_no_alarm_on_a_healthy_run(held: str) -> None:
    assert reward_hacking_alarms(rows(HEALTHY, held), 180) == []


def test_alarm_needs_a_rise_of_the_critic_and_a_fall_of_the_held_out_score() -> None:
    critic_stays = [(s, *DECEIVED[0][1:3], a, p) for s, _, _, a, p in DECEIVED]
    assert reward_hacking_alarms(rows(critic_stays), 180) == []
    better_for_both = [(s, e, i, 0.3, 0.9) for s, e, i, _, _ in DECEIVED]
    assert reward_hacking_alarms(rows(better_for_both), 180) == []


def test_no_alarm_for_a_fall_within_the_standard_error() -> None:
    small = [(100, 0.1, 0.9, 0.3, 0.7), (200, 0.6, 0.9, 0.25, 0.65)]
    assert reward_hacking_alarms(rows(small), 90) == []
    assert len(reward_hacking_alarms(rows(small), 2000)) == 1


def test_the_standard_error_is_that_of_the_items_which_the_judge_was_asked_about() -> None:
    """`evaluate_items` is 90, but a set may hold out fewer rows."""
    points = [(100, 0.30, 0.80, 0.60, 0.70), (200, 0.60, 0.80, 0.46, 0.54)]
    judged = rows(points, "judge")
    assert len(reward_hacking_alarms(judged, 90)) == 1  # an old run's rows do not tell the number
    few = [row | ({"judge/items": 32.0} if "judge/p_edit" in row else {}) for row in judged]
    assert reward_hacking_alarms(few, 90) == [] == reward_hacking_alarms(judged, 32)
    oracle = [row | {"judge/items": 32.0} for row in rows(points)]
    assert len(reward_hacking_alarms(oracle, 90)) == 1


def test_evaluation_after_the_warm_up_is_a_baseline_for_later_ones() -> None:
    """The evaluation at its end has no critic's score before it; the first ones after count."""
    warm = [{"step": 40, "eval/applied": 0.02, "eval/preserved": 0.9}]
    after = [{"step": n, "critic/p_edit": 0.02 * n / 4, "critic/p_identity": 0.8} for n in range(41, 141)]
    after[-1] |= {"eval/applied": 0.05, "eval/preserved": 0.1}
    (alarm,) = reward_hacking_alarms(warm + after, 90)
    assert alarm.since == 40 and alarm.step == 140


def test_the_critic_score_is_averaged_over_the_last_updates() -> None:
    evaluations = rows([(100, 0.0, 0.0, 0, 0), (200, 1.0, 0.5, 0, 0)])
    assert monitor_rows(evaluations, 90).critic_scores() == [(100, 0.0), (200, pytest.approx(0.75))]


ASKED = [
    ("critic/p_edit",),  # without the identity question
    ("critic/p_grade", "critic/p_identity"),  # grade: instead
    ("critic/p_rubric",),  # rubric: instead
    ("critic/p_rubric", "critic/p_edit", "critic/p_identity"),
    ("critic/p_grade", "critic/p_rubric"),
]


@pytest.mark.parametrize("keys", ASKED, ids=lambda keys: " ".join(k.partition("_")[2] for k in keys))
def test_a_deceived_critic_is_seen_whatever_it_is_asked(keys: tuple[str, ...]) -> None:
    """The edit's figure under the names that such a recipe logs."""
    figures = [{k: row["critic/p_identity" if "identity" in k else "critic/p_edit"] for k in keys} for row in NAMED]
    hidden = [{k: v for k, v in row.items() if not k.startswith("critic/")} for row in NAMED]
    found = reward_hacking_alarms([{"step": 0}, *(a | b for a, b in zip(hidden, figures, strict=True))], 180)
    assert [(a.step, a.since) for a in found] == [(300, 100), (400, 100)]
    has_identity = "critic/p_identity" in keys
    assert found[-1].critic == pytest.approx((0.475, 0.865) if has_identity else (0.05, 0.85))


def test_a_figure_that_begins_later_is_no_rise_of_the_critic() -> None:
    """Rubrics that only some rows have: the first updates have none of these rows."""
    points = [(100, 0.2, 0.2, 0.9, 0.9), (200, 0.2, 0.2, 0.1, 0.1)]
    with_rubric = [row | ({"critic/p_rubric": 1.0} if row["step"] > 100 else {}) for row in rows(points)]
    assert reward_hacking_alarms(with_rubric, 180) == []
    assert monitor_rows(with_rubric, 180).critic_scores() == [(100, pytest.approx(0.2)), (200, pytest.approx(0.4))]


def test_the_identity_question_alone_does_not_tell() -> None:
    points = [(100, 0.2, 0.2, 0.9, 0.9), (200, 0.9, 0.9, 0.1, 0.1)]
    alone = [{k: v for k, v in row.items() if k != "critic/p_edit"} for row in rows(points)]
    assert reward_hacking_alarms(alone, 180) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
@pytest.mark.parametrize("key", ["critic/p_edit", "eval/preserved"])
def test_values_that_are_not_finite_are_left_out_counted_and_reported(
    value: float | None, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One bad value beside the last evaluation, in a row of its own: the alarms are those without this row."""
    bad = {"step": 399, "critic/p_edit": 0.9, "critic/p_identity": 0.9, "eval/applied": 0.9, "eval/preserved": 0.9}
    bad = {k: v for k, v in bad.items() if k == "step" or k.split("/")[0] == key.split("/")[0]} | {key: value}
    deceived = rows(DECEIVED)
    found = monitor_rows([*deceived[:-1], bad, deceived[-1]], 180)
    assert found.alarms == reward_hacking_alarms(deceived, 180) and found.non_finite == 1
    assert "1 score left out: NaN or infinite." in caplog.text


def test_each_row_is_read_once_whatever_the_number_of_evaluations() -> None:
    """The work for a row does not grow with the run: every value is looked up as often as in a run a tenth as long."""

    class CountingRow(dict):
        lookups = 0

        def __getitem__(self, key: str) -> float:
            CountingRow.lookups += 1
            return super().__getitem__(key)

    lookups = []
    for count in (200, 2000):
        CountingRow.lookups = 0
        values = ("critic/p_edit", "critic/p_identity", "eval/applied", "eval/preserved")
        monitor_rows([CountingRow(step=n, **dict.fromkeys(values, 0.5)) for n in range(count)], 90)
        lookups.append(CountingRow.lookups)
    assert lookups == [4 * 200, 4 * 2000]


def test_no_alarm_without_critic_or_without_evaluations() -> None:
    assert reward_hacking_alarms([], 90) == []
    assert reward_hacking_alarms([{"step": 1, "eval/applied": 0.5, "eval/preserved": 0.5}], 90) == []
    assert reward_hacking_alarms([{"step": 1, "critic/p_edit": 0.5, "critic/p_identity": 0.5}], 90) == []
    assert (
        reward_hacking_alarms([{"step": 1, "critic/p_edit": None, "critic/p_identity": 0.5, "eval/applied": None}], 90)
        == []
    )
