"""How an answer is checked: property by property, up to the first that does not hold."""

from __future__ import annotations

import difflib
import inspect
import math
import re
import textwrap
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

# A property: its name, whether it holds, and what it means when it does not (never the answer).
Property = tuple[str, bool, str]
# Yields properties in the order in which a learner should meet them; may return a closing remark.
Checker = Callable[[Any], Generator[Property, None, str | None]]
EXERCISES: dict[str, Checker] = {}
WORDS = ("rises", "falls", "stays")  # what a learner predicts of a number
WIDTH = 76  # characters of a printed line: what fits into the box of an exercise
CHECKS = str(Path(__file__).parent)
LIBRARIES = r"[/\\](site-packages|dist-packages|rlhf_mini)[/\\]"


@dataclass(frozen=True)
class Report:
    """What a check says.

    Attributes:
        label: of the exercise.
        holds: whether the answer has all properties.
        passed: names of the properties that hold, in order.
        failed: name of the first that does not, "unwritten", "error" or "" if all hold.
        text: all of it in words.
    """

    label: str
    holds: bool
    passed: tuple[str, ...]
    failed: str
    text: str

    def __bool__(self) -> bool:
        return self.holds

    def _ipython_display_(self) -> None:
        """Show nothing at the end of a cell: the report has been printed."""


def exercise(label: str) -> Callable[[Checker], Checker]:
    """Register the decorated generator as the check of an exercise.

    Args:
        label: of the exercise in the book, such as "ex-masked-mean".
    """
    def register(checker: Checker) -> Checker:
        if label in EXERCISES:
            raise ValueError(f"there are two checks of {label!r}")
        EXERCISES[label] = checker
        return checker
    return register


def check(label: str, answer: Any) -> Report:
    """Check the answer to an exercise of the book, and print the report.

    Nothing that the answer does stops the notebook: an error in it is reported as such.

    Args:
        label: of the exercise, as its check cell names it.
        answer: a function, a number, a word or whatever the exercise asks for; None, or a function
            that raises NotImplementedError, counts as not written yet.

    Returns:
        The report; true if the answer is right.

    Raises:
        ValueError: if there is no such exercise.
    """
    if label not in EXERCISES:
        near = difflib.get_close_matches(str(label), EXERCISES, n=3, cutoff=0)
        raise ValueError(f"there is no exercise {label!r}; the nearest are {', '.join(near)}")
    report = _examine(label, answer)
    print("\n".join(textwrap.fill(line, WIDTH, subsequent_indent="    ", break_on_hyphens=False)
                    for line in report.text.splitlines()))
    return report


def _examine(label: str, answer: Any) -> Report:
    """Ask for one property after the other."""
    passed: list[str] = []
    try:
        if answer is None or answer is ...:
            raise NotImplementedError
        steps = EXERCISES[label](_guarded(answer) if inspect.isroutine(answer) else answer)
        while True:
            try:
                name, holds, meaning = next(steps)
            except StopIteration as end:
                return _report(label, passed, "", end.value or "")
            if not holds:
                return _report(label, passed, name, meaning)
            passed.append(name)
    except NotImplementedError as error:
        if error.args:  # torch says so where an operation is missing, such as softmax of integers
            return _report(label, passed, "error", _their_error(error))
        return Report(label, False, tuple(passed), "unwritten", f"{label}: not written yet. "
                      "Replace the stub, then run this cell again.")
    except _Fault as fault:
        return _report(label, passed, fault.name, str(fault))
    except Exception as error:
        return _report(label, passed, "error", _their_error(error))


def _report(label: str, passed: list[str], failed: str, words: str) -> Report:
    if not failed:
        names = ", ".join(dict.fromkeys(passed))
        return Report(label, True, tuple(passed), "", f"{label}: all properties hold ({names})."
                      + (f" {words}" if words else ""))
    so_far = "".join(f"\n  holds: {name}" for name in dict.fromkeys(passed))
    return Report(label, False, tuple(passed), failed,
                  f"{label}: not yet.{so_far}\n  fails: {failed}. {words}")


# ---- what goes wrong in the learner's code ------------------------------------------------------


class _Fault(Exception):
    """A property of every function does not hold."""

    def __init__(self, name: str, words: str):
        super().__init__(words)
        self.name = name


def _guarded(function: Callable) -> Callable:
    """Return the function; it fails if it returns nothing or changes what it was given."""
    def call(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        before = [_frozen(x) for x in given]
        result = function(*args, **kwargs)
        if result is None:
            raise _Fault("return", "Your function returns nothing (None). Is a `return` missing?")
        if any(not _same(old, _frozen(new)) for old, new in zip(before, given, strict=True)):
            raise _Fault("inputs", "Your function changes a tensor or a list that it was given; "
                         "the caller still needs it. Make a new one: no `x[...] =`, no `x += ...`, "
                         "no `x.append(...)`, no function whose name ends in `_`.")
        return result
    return call


def _frozen(x: Any) -> Any:
    """Return a copy of tensors, arrays, numbers, words and lists of them; None of all else."""
    if isinstance(x, torch.Tensor | np.ndarray):
        return torch.as_tensor(x).detach().clone()
    if isinstance(x, list):
        return [_frozen(part) for part in x]
    return x if isinstance(x, int | float | str) else None


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, torch.Tensor):
        return torch.equal(torch.nan_to_num(old), torch.nan_to_num(new))
    if isinstance(old, list):
        return len(old) == len(new) and all(map(_same, old, new))
    return old == new or old != old  # nan


def _their_error(error: Exception) -> str:
    """Say where in the learner's code an error arose."""
    frames = traceback.extract_tb(error.__traceback__)
    called = max(i for i, f in enumerate(frames) if f.filename.startswith(CHECKS))
    frames = [f for f in frames[called + 1:] if not re.search(LIBRARIES, f.filename)]
    what = f"{type(error).__name__}: {error}"
    if not frames:
        return ("Your answer has a form that this check cannot read. Look at the shapes and types "
                f"in the task. ({what})")
    place = f"line {frames[-1].lineno}" + (f", `{frames[-1].line}`" if frames[-1].line else "")
    return f"Your code stopped in {frames[-1].name} ({place}):\n    {what}"


# ---- helpers of the checks: they compare anything and never raise --------------------------------


def close(got: Any, expected: Any, tolerance: float = 1e-5) -> bool:
    """Whether two tensors or numbers are equal up to a tolerance, absolute and relative.

    Args:
        got: what the learner made: any shape, or not even a tensor.
        expected: a tensor of any shape, a number, or lists of them.
        tolerance: of an entry, times 1 plus its size.
    """
    try:
        a, b = (torch.as_tensor(x).detach().double() for x in (got, expected))
    except (TypeError, ValueError, RuntimeError):
        return False
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def shaped(got: Any, shape: Sequence[int], what: str = "the result") -> Property:
    """Return the property "shape": the answer is a tensor or an array of this shape.

    Args:
        got: what the learner made: a tensor or array of any shape, or something else.
        shape: expected; () also admits a plain number.
        what: how the message calls it.
    """
    array = isinstance(got, torch.Tensor | np.ndarray | np.generic)
    there = tuple(got.shape) if array else None
    if there is None and isinstance(got, int | float) and not isinstance(got, bool):
        there = ()
    found = f"a {type(got).__name__}" if there is None else f"shape {there}"
    return "shape", there == tuple(shape), f"Expected {what} of shape {tuple(shape)}, got {found}."


def finite(got: Any) -> bool:
    """Whether all entries are numbers, neither inf nor nan.

    Args:
        got: a tensor of any shape, or a number.
    """
    if isinstance(got, torch.Tensor):
        return bool(torch.isfinite(got).all())
    return isinstance(got, int | float) and math.isfinite(got)


def worded(answer: Any, *counts: int) -> bool:
    """Whether an answer is a list of words, each one of `WORDS`, or a list of such lists.

    Args:
        answer: what the learner predicts.
        counts: how many words there should be, or how many rows and how many words in each.
    """
    if not counts:
        return isinstance(answer, str) and answer in WORDS
    return isinstance(answer, list | tuple) and len(answer) == counts[0] and all(
        worded(part, *counts[1:]) for part in answer)


def moved(before: float, after: float, least: float = 1e-9) -> str:
    """Return what a number did, in one of `WORDS`.

    Args:
        before: the number.
        after: the same number, later.
        least: a change that is not larger counts as none.
    """
    change = after - before
    return "stays" if abs(change) <= least else "rises" if change > 0 else "falls"


def gradient(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a function's sum at x; zeros where it does not depend on x.

    Args:
        function: from a tensor of the shape of x to a tensor of any shape.
        x: any shape.
    """
    x = x.detach().clone().requires_grad_(True)
    result = function(x)
    if not (isinstance(result, torch.Tensor) and result.requires_grad):
        return torch.zeros_like(x)
    return torch.autograd.grad(result.sum(), x, allow_unused=True, materialize_grads=True)[0]
