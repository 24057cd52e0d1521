"""The critic section: silent on the toy's critic, and a finding for each planted fault."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from npedit.check.critic import check_critic
from npedit.check.critic_answers import ask_critic, ask_own_questions, asked_kinds
from npedit.check.known_edits import COPY, LEAST_CHANGE, OBJECT_ABSENT, make_known_edits
from npedit.check.labelled_edits import read_labelled_edits, toy_labelled_edits
from npedit.check.subject import CheckOptions, Subject
from npedit.critics.llava_onevision import LlavaOnevision
from npedit.errors import UserError
from npedit.item_questions import QuestionChoice
from npedit.nets.device import CPU
from npedit.recipe.config import embedded_weights, load_recipe
from npedit.toy_models.critic import untrained_critic
from tests.check.conftest import FEW, severities
from tests.support.photo_sets import write_metadata


def changed_critic(folder, change) -> LlavaOnevision:
    """The toy's critic after `change` has edited its tokenizer's vocabulary, as its files say it."""
    opened = LlavaOnevision.load(embedded_weights("critic"), torch.float32, CPU)
    opened.save(folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    change(tokenizer["model"]["vocab"])
    file.write_text(json.dumps(tokenizer))
    return LlavaOnevision.load(folder, torch.float32, CPU)


def swap(vocabulary, a: str, b: str) -> None:
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


def use_spare_tokens(vocabulary) -> None:
    """Yes and No become tokens that the model has not been trained to say."""
    swap(vocabulary, "yes", "<spare3>")
    swap(vocabulary, "no", "<spare4>")


def test_the_toys_critic_is_silent(demo) -> None:
    section = check_critic(demo)
    assert severities(section).keys() <= {"critic-untested"}  # a small sample
    titles = {t.title: t for t in section.tables}
    accuracy = {row[0]: row for row in titles["Accuracy on edits with known answers"].rows}
    assert accuracy["edit"][4] > 0.95 and accuracy["identity"][4] > 0.95
    verdicts = titles["Is the critic good enough to teach this edit type?"].rows
    assert {row[0] for row in verdicts} == {e.edit_type for e in demo.examples}
    assert dict(section.texts)["LlavaOnevision: answer tokens"].count("is token") == 2
    assert "<image>" in section.texts[0][1]


def test_an_untrained_critic_is_weak(with_parts) -> None:
    found = severities(check_critic(with_parts(critic=untrained_critic(0))))
    assert found["critic-weak"] == found["answer-tokens"] == "will not learn"


def test_exchanged_answer_tokens_are_found(with_parts, tmp_path) -> None:
    critic = changed_critic(tmp_path, lambda vocabulary: swap(vocabulary, "yes", "no"))
    found = severities(check_critic(with_parts(critic=critic)))
    assert found["critic-reversed"] == "will not learn"


def test_answer_tokens_that_the_model_never_says_are_found(with_parts, tmp_path) -> None:
    section = check_critic(with_parts(critic=changed_critic(tmp_path, use_spare_tokens)))
    assert severities(section)["answer-tokens"] == "will not learn"
    likely = next(t for t in section.tables if "likeliest" in t.title).rows
    assert {row[0] for row in likely[:2]} == {"'<spare3>'", "'<spare4>'"}


def test_a_critic_that_takes_copies_for_edits_is_found(with_parts) -> None:
    critic = LlavaOnevision.load(embedded_weights("critic"), torch.float32, CPU)
    head = critic.model.lm_head
    wrapped = head.forward

    def always_yes(hidden):
        logits = wrapped(hidden)
        return logits + 50 * torch.nn.functional.one_hot(torch.tensor(critic.yes), logits.shape[-1])

    head.forward = always_yes
    found = severities(check_critic(with_parts(critic=critic)))
    assert found["critic-copies"] == "will not learn"


def test_words_that_the_critics_tokenizer_does_not_know_are_found(from_folder) -> None:
    def reword(rows) -> None:
        for row in rows:
            row["instruction"] += " immediately"

    subject = from_folder(reword)
    subject.options, subject.examples = CheckOptions(samples=FEW), subject.examples[:FEW]
    assert severities(check_critic(subject))["unknown-words"] == "warning"


def test_a_critic_that_is_not_finite_is_found(with_parts) -> None:
    critic = untrained_critic(0)
    with torch.no_grad():
        critic.model.lm_head.weight.fill_(float("nan"))
    assert severities(check_critic(with_parts(critic=critic)))["critic-not-finite"] == "will not learn"


TWO = 2  # examples, for speed


def with_questions(demo, *overrides: str, critic=None, examples=None) -> Subject:
    """The demo with other questions: KEY=VALUE of its second stage's settings."""
    recipe = load_recipe("demo", [f"stages.1.settings.{change}" for change in overrides])
    parts = demo.parts if critic is None else replace(demo.parts, critic=critic)
    chosen = demo.examples[:TWO] if examples is None else examples
    return Subject(recipe, demo.data, parts, CheckOptions(samples=len(chosen)), chosen)


def test_rubrics_are_tested_where_the_recipe_asks_them(demo) -> None:
    section = check_critic(with_questions(demo, "rubric=beside"))
    titles = {table.title: table.rows for table in section.tables}
    found = {row[1]: row for row in titles["Rubrics and grades on edits with known answers"]}
    assert set(found) == {"carried out", "not carried out", "an unedited photo"} and {r[0] for r in found.values()} == {
        "rubric"
    }
    assert found["an unedited photo"][2] == TWO
    accuracy = {row[0]: row for row in titles["Accuracy on edits with known answers"]}
    assert set(accuracy) == {"edit", "presence", "identity", "rubric"} and accuracy["rubric"][1] > 4 * TWO
    assert "Rubrics" not in " ".join(table.title for table in check_critic(with_questions(demo)).tables)


def test_a_grade_is_tested_with_a_critic_that_has_digits(demo) -> None:
    section = check_critic(with_questions(demo, "grade=instead", critic=LlavaOnevision.tiny(0)))
    rows = next(t.rows for t in section.tables if t.title == "Rubrics and grades on edits with known answers")
    assert {row[0] for row in rows} == {"grade"}
    assert all(row[4] == pytest.approx(1 + 4 * row[3]) and 1 <= row[4] <= 5 for row in rows)


def wrong_in(demo, words: str, critic=None) -> LlavaOnevision:
    """The toy's critic, or another, with Yes and No exchanged in the questions that contain these words."""
    critic = critic or LlavaOnevision.load(embedded_weights("critic"), torch.float32, CPU)
    real = critic.logits

    def swapped(questions, seen, packed=False, answers=()):
        out = real(questions, seen, packed, answers)
        for i in (i for i, question in enumerate(questions) if words in question):
            out[i, [critic.yes, critic.no]] = out[i, [critic.no, critic.yes]]
        return out

    critic.logits = swapped
    return critic


@pytest.mark.parametrize(
    ("words", "setting"), [("is all else", "identity_weight=0"), ("was this edit done", "rubric=instead")]
)
def test_a_question_that_the_recipe_does_not_ask_is_in_the_table_alone(demo, words, setting) -> None:
    kind = "identity" if "else" in words else "edit"
    examples = [e for e in demo.examples if e.edit_type not in ("remove", "nothing")][:3]
    assert all(e.questions for e in examples)
    for change, expected in (("rubric='off'", {"will not learn"}), (setting, set())):
        section = check_critic(with_questions(demo, change, critic=wrong_in(demo, words), examples=examples))
        found = {f.severity for f in section.findings if f.measured.startswith(f"Question {kind}:")}
        assert found == expected
    names = [row[0] for t in section.tables if t.title.startswith("Accuracy on edits") for row in t.rows]
    assert f"{kind} (not asked)" in names
    assert "critic-copies" not in severities(section) and "critic-types" not in severities(section)


def test_the_kinds_of_questions_that_training_asks(demo) -> None:
    edit = {"edit", "presence", "returned"}
    for changes, kinds in (
        ((), {*edit, "identity"}),
        (("identity_weight=0",), edit),
        (("grade=beside",), {*edit, "identity", "grade"}),
        (("grade=instead",), {"identity", "grade"}),
        (("grade=instead", "identity_weight=0"), {"grade"}),
        (("rubric=instead",), {"rubric"}),
        (("rubric=beside",), {*edit, "identity", "rubric"}),
    ):
        assert asked_kinds(with_questions(demo, *changes)) == kinds, changes


def test_a_critic_without_digits_and_data_without_rubrics_are_found(demo) -> None:
    bare = [replace(e, questions="") for e in demo.examples[:TWO]]
    assert severities(check_critic(with_questions(demo, "rubric=beside", examples=bare)))["rubrics"] == "warning"
    assert severities(check_critic(with_questions(demo, "grade=beside")))["critic-grades"] == "will not learn"


def test_a_rubric_is_passed_if_all_its_answers_are_as_wanted(demo) -> None:
    """The lowest p of the item's questions counts."""
    edits = [e for e in toy_labelled_edits(9, 0) if e.example.edit_type in ("recolour", "background")]
    texts = [json.loads(e.example.questions)[0] for e in edits]
    twice = [
        replace(
            e,
            example=replace(
                e.example, questions=json.dumps([q, q | {"answer": {"yes": "no", "no": "yes"}[q["answer"]]}])
            ),
        )
        for e, q in zip(edits, texts)
    ]
    choice = QuestionChoice(rubric="beside")
    single = ask_own_questions(demo.parts.critic, "short", edits, choice)
    both = ask_own_questions(demo.parts.critic, "short", twice, choice)
    assert [a.p for a in both] == pytest.approx([min(a.p, 1 - a.p) for a in single], abs=1e-5)
    assert [a.truth for a in single] == [e.applied for e in edits]


def test_a_recipe_without_critic_is_a_note(with_parts) -> None:
    assert severities(check_critic(with_parts(critic=None))) == {"no-critic": "note"}


# -------------------------------------------------------------------------------------------------------- known edits


def test_known_edits_say_what_is_true(demo) -> None:
    edits = make_known_edits(demo.examples)
    copies = [e for e in edits if e.probe == COPY]
    assert len(copies) == len(demo.examples)
    assert all(torch.equal(e.edited, e.example.reference) and not e.applied and e.preserved for e in copies)
    changed = [e for e in edits if e.preserved is False]
    assert {"unrelated photo", "colour", "brightness", "crop", "patch pasted"} <= {e.probe for e in changed}
    assert all(float((e.edited - e.example.reference).abs().mean()) > 0.2 * LEAST_CHANGE for e in changed)
    assert all(
        e.edited.shape == e.example.reference.shape and 0 <= e.edited.min() <= e.edited.max() <= 1 for e in edits
    )
    carried_out = [e for e in edits if e.applied]
    assert all(e.probe in (OBJECT_ABSENT, "own instruction: carried out") for e in carried_out)


def test_known_edits_do_not_depend_on_anything_but_the_seed(demo) -> None:
    first, second = (make_known_edits(demo.examples, 3) for _ in range(2))
    assert [e.probe for e in first] == [e.probe for e in second]
    assert all(torch.equal(a.edited, b.edited) for a, b in zip(first, second))


def test_the_critic_answers_only_what_is_known(demo) -> None:
    edits = toy_labelled_edits(9, 0)
    answers = ask_critic(demo.parts.critic, "short", edits)
    assert len(answers) == 18
    assert {a.kind for a in answers} == {"edit", "presence", "identity"}
    half_known = [type(e)(e.probe, e.example, e.edited, None, e.preserved) for e in edits]
    assert {a.kind for a in ask_critic(demo.parts.critic, "short", half_known)} == {"identity"}


# ----------------------------------------------------------------------------------------------------- labelled edits


def labelled_row(**more):
    row = {"file_name": "a.png", "edited_file_name": "b.png", "instruction": "make it blue", "edit_type": "color",
           "applied": True, "preserved": False}  # fmt: skip
    return {key: value for key, value in (row | more).items() if value is not None}


@pytest.fixture
def labelled(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (40, 60), colour).save(tmp_path / name)
    return lambda *rows: write_metadata(tmp_path, rows)


def test_a_labelled_folder_is_read(labelled) -> None:
    (edit, other) = read_labelled_edits(labelled(labelled_row(), labelled_row(applied=None)), (32, 48))
    assert (edit.applied, edit.preserved, edit.example.edit_type) == (True, False, "recolour")
    assert edit.edited.shape == edit.example.reference.shape == (3, 32, 48)
    assert float(edit.edited[2].mean()) == float(edit.example.reference[0].mean()) == 1.0
    assert other.applied is None


def test_a_labelled_edit_may_have_a_rubric(labelled) -> None:
    own = [{"question": "is it blue ?", "answer": "Yes"}]
    (edit, other) = read_labelled_edits(labelled(labelled_row(questions=own), labelled_row()), (32, 32))
    assert json.loads(edit.example.questions) == [{"question": "is it blue ?", "answer": "yes"}]
    assert other.example.questions == ""


def test_labels_may_be_in_a_csv_file(labelled, tmp_path) -> None:
    labelled(labelled_row())
    (tmp_path / "metadata.jsonl").unlink()
    head = "file_name,edited_file_name,instruction,edit_type,applied,preserved"
    (tmp_path / "metadata.csv").write_text(f"{head}\na.png,b.png,make it blue,color,True,\n")
    (edit,) = read_labelled_edits(tmp_path, (32, 48))
    assert (edit.applied, edit.preserved, edit.example.edit_type) == (True, None, "recolour")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (labelled_row(edited_file_name=None), "expected text in 'edited_file_name'"),
        (labelled_row(applied="yes"), "expected true or false"),
        (labelled_row(applied=None, preserved=None), "expected true or false"),
        (labelled_row(edit_type="remove"), "expected an 'object'"),
        (labelled_row(edit_type="recolor it"), "no question is known"),
        (labelled_row(edited_file_name="missing.png"), "no such file"),
        (labelled_row(edited_file_name="../b.png"), "out of the data folder"),
    ],
)
def test_a_wrong_label_is_named_with_its_line(labelled, row, words) -> None:
    with pytest.raises(UserError, match=r"metadata\.jsonl:2") as caught:
        read_labelled_edits(labelled(labelled_row(), row), (32, 32))
    assert words in str(caught.value)


def test_a_folder_without_labels_is_an_error(tmp_path) -> None:
    with pytest.raises(UserError, match=r"--labelled: expected a folder with metadata\.jsonl"):
        read_labelled_edits(tmp_path, (32, 32))


def test_labelled_edits_are_asked_too(demo, labelled) -> None:
    demo_with_labels = type(demo)(
        demo.recipe,
        demo.data,
        demo.parts,
        CheckOptions(samples=4, labelled=labelled(labelled_row())),
        demo.examples[:4],
    )
    rows = next(t for t in check_critic(demo_with_labels).tables if t.title.startswith("Accuracy by how")).rows
    assert {(row[0], row[1]) for row in rows if row[0] == "labelled"} == {
        ("labelled", "edit"),
        ("labelled", "identity"),
    }
