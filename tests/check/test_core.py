"""What all checks share: reports, errors of the learner, comparisons that never raise."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch

from rlhf_mini.check import EXERCISES, check, core, hunt
from rlhf_mini.check.hunts import HUNTS


@pytest.fixture
def doubled():
    """An exercise of its own: double x (2,)."""
    @core.exercise("ex-doubled")
    def checker(f):
        x = torch.tensor([1.0, 2.0])
        yield core.shaped(f(x), (2,))
        yield "twice", core.close(f(x), [2.0, 4.0]), "Every entry should be twice as large."
        return "Well done."

    yield
    del EXERCISES["ex-doubled"]


def test_a_report_names_what_holds_and_what_fails(doubled):
    assert check("ex-doubled", lambda x: x + x).text == (
        "ex-doubled: all properties hold (shape, twice). Well done.")
    report = check("ex-doubled", lambda x: x + 1)
    assert report.passed == ("shape",) and report.failed == "twice"
    assert report.text == ("ex-doubled: not yet.\n  holds: shape\n  fails: twice. Every entry "
                            "should be twice as large.")
    assert check("ex-doubled", lambda x: x.sum()).text.endswith(
        "fails: shape. Expected the result of shape (2,), got shape ().")
    assert "got a str." in check("ex-doubled", lambda x: "x").text


def test_a_report_is_printed_once_wherever_the_check_stands(doubled, capsys):
    report = check("ex-doubled", lambda x: x)
    assert capsys.readouterr().out == report.text + "\n"
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    with redirect_stdout(io.StringIO()) as shown:
        shell.run_cell("from rlhf_mini.check import check\ncheck('ex-doubled', None)")
        shell.run_cell("check('ex-doubled', None); 1")
    assert shown.getvalue().count("ex-doubled: not written yet") == 2


def test_nothing_returned_and_arguments_changed_are_faults(doubled):
    assert "Is a `return` missing?" in check("ex-doubled", lambda x: None).text
    guarded = core._guarded(lambda x, rows: rows[0].append(1) or x)
    with pytest.raises(core._Fault, match="or a list"):
        guarded(torch.ones(2), [[0]])
    assert core._guarded(lambda x, rows: x)(1.0, [torch.tensor([float("nan")]), ["a"]]) == 1.0
    report = check("ex-doubled", lambda x: x.mul_(2))
    assert report.failed == "inputs" and "changes a tensor" in report.text


def test_arrays_of_numpy_are_as_good_as_tensors():
    @core.exercise("ex-arrays")
    def checker(f):
        x = np.array([1.0, 2.0])
        yield core.shaped(f(x), (2,))
        yield "twice", core.close(f(x), 2 * x), "Every entry should be twice as large."

    def changes(x):
        x *= 2
        return x

    assert check("ex-arrays", lambda x: 2 * x).holds
    assert check("ex-arrays", lambda x: x.sum()).text.endswith("got shape ().")
    assert check("ex-arrays", changes).failed == "inputs"
    del EXERCISES["ex-arrays"]


def test_errors_are_those_of_the_learner(doubled):
    def divides(x):
        return x / (0 // 0)

    report = check("ex-doubled", divides)
    assert report.failed == "error" and "`return x / (0 // 0)`" in report.text
    assert "Your code stopped in divides (line " in report.text and "ZeroDiv" in report.text
    missing = check("ex-doubled", lambda x: x.long().softmax(-1))
    assert missing.failed == "error" and "not implemented for" in missing.text
    inside_torch = check("ex-doubled", lambda x: torch.cat([x, "x"]))
    assert "Your code stopped in <lambda>" in inside_torch.text
    assert "a form that this check cannot read" in check("ex-doubled", lambda: 1).text
    assert "a form that this check cannot read" in check("ex-gae", 3).text


def test_labels_are_known_and_unique(doubled):
    with pytest.raises(ValueError, match="no exercise 'ex-doubles'; the nearest are ex-doubled, "):
        check("ex-doubles", 1)
    with pytest.raises(ValueError, match="two checks of 'ex-doubled'"):
        core.exercise("ex-doubled")(None)
    with pytest.raises(ValueError, match="there is no hunt 'hunt-99'; there are hunt-"):
        hunt("hunt-99")


def test_comparisons_never_raise():
    for odd in ("x", None, [1, [2]], object(), torch.ones(3), {}):
        assert not core.close(odd, 1.0) and not core.finite("x")
        assert core.shaped(odd, (2, 2))[1] is False
    assert core.close([1, 2], torch.tensor([1.0, 2.0 + 1e-7])) and not core.close(1.0, 1.001)
    assert not core.close(float("nan"), 1.0) and core.finite(1) and not core.finite(float("inf"))


def test_lists_of_words_are_read_without_raising():
    assert core.worded(["rises", "falls"], 2) and core.worded(("stays",), 1)
    assert core.worded([("stays", "falls"), ["rises", "rises"]], 2, 2)
    for odd in ("rises", ["rises"], ["rises", "up"], ["rises", ["falls"]], ["rises", None], None,
                ["rises", "falls", "stays"], {"rises", "falls"}, ["stays", np.array(["a"] * 2)]):
        assert core.worded(odd, 2) is False
    assert not core.worded([["rises"], ["up"]], 2, 1) and not core.worded(["rises"] * 2, 2, 1)


def test_a_number_moves_if_it_moves_enough():
    assert [core.moved(1.0, after) for after in (1.5, 0.5, 1.0, 1 + 1e-12)] == [
        "rises", "falls", "stays", "stays"]
    assert [core.moved(-1.0, after, 0.1) for after in (-0.8, -1.2, -1.05)] == [
        "rises", "falls", "stays"]


def test_a_gradient_that_is_not_there_is_zero():
    x = torch.tensor([1.0, 2.0])
    assert core.gradient(lambda t: t**2, x).tolist() == [2.0, 4.0]
    assert core.gradient(lambda t: torch.ones(()), x).tolist() == [0.0, 0.0]
    assert core.gradient(lambda t: t.detach(), x).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("label", HUNTS)
def test_a_hunt_lists_the_sick_code_and_plants_it(label):
    sought = hunt(label)
    healthy, sick = sought.lines(False), sought.lines(True)
    assert healthy != sick and 1 <= len(sought.wrong_lines()) <= 2
    assert 12 <= len(sick) <= 60 and '"""' not in sought.listing
    assert all(sought.listing.splitlines()[n - 1].startswith(f"{n:3}") for n in (1, len(sick)))
    with sought.planted():
        pass
