"""Every check of every exercise: right answers pass, each wrong one fails for the right reason."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from rlhf_mini.check import EXERCISES, check

MODULES = [importlib.import_module(f"check.{path.stem}")
           for path in sorted(Path(__file__).parent.glob("answers_*.py"))]
# Label: the right answer, and pairs of a wrong answer and the property that it must fail at.
ANSWERS = {label: case for module in MODULES for label, case in module.ANSWERS.items()}
WRONG = [(label, i) for label, (_, wrong) in ANSWERS.items() for i in range(len(wrong))]


def test_every_exercise_has_answers_and_none_is_listed_twice():
    assert set(ANSWERS) == set(EXERCISES)
    assert len(ANSWERS) == sum(len(module.ANSWERS) for module in MODULES)


@pytest.mark.parametrize("label", ANSWERS)
def test_the_right_answer_has_all_properties(label):
    report = check(label, ANSWERS[label][0])
    assert report.holds and report, report.text
    assert report.text.startswith(f"{label}: all properties hold") and not report.failed


@pytest.mark.parametrize("label", ANSWERS)
def test_five_wrong_answers_at_least_are_tried(label):
    assert len(ANSWERS[label][1]) >= 5


@pytest.mark.parametrize("label, number", WRONG)
def test_a_wrong_answer_fails_at_the_right_property(label, number):
    answer, failed = ANSWERS[label][1][number]
    report = check(label, answer)
    assert not report.holds and report.failed == failed, report.text
    assert report.text.startswith(f"{label}: not yet.") and f"fails: {failed}. " in report.text
    assert len(report.text.partition("fails: ")[2].split()) >= 8  # says what it means
    if isinstance(right := ANSWERS[label][0], float | str) and len(str(right)) > 2:
        assert str(right) not in report.text


@pytest.mark.parametrize("label", ANSWERS)
def test_what_is_not_written_yet_is_said_politely(label):
    def stub(*args, **kwargs):
        raise NotImplementedError

    answers = [None, ...] + ([stub] if callable(ANSWERS[label][0]) else [])
    for answer in answers:
        report = check(label, answer)
        assert report.failed == "unwritten" and not report.holds
        assert report.text == (f"{label}: not written yet. Replace the stub, then run this cell "
                               "again.")


@pytest.mark.parametrize("label", [k for k, (right, _) in ANSWERS.items() if callable(right)])
def test_an_error_of_the_learner_is_shown_as_theirs(label):
    def broken(*args, **kwargs):
        return missing_name  # noqa: F821

    report = check(label, broken)
    assert report.failed == "error" and not report.holds
    assert "Your code stopped in broken (line " in report.text
    assert "NameError: name 'missing_name' is not defined" in report.text
    assert check(label, lambda *args, **kwargs: "a word").failed != "error"  # a form of its own
