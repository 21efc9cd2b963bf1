"""Bug hunts: known bugs of published code, planted in the package; readers look for the line."""

from __future__ import annotations

import ast
import contextlib
import difflib
import textwrap
from collections.abc import Callable, Generator
from dataclasses import dataclass

from rlhf_mini.check.core import Property, exercise
from rlhf_mini.check.planting import change, find, planted, source_of


@dataclass(frozen=True)
class Hunt:
    """A bug that can be planted, and the code among which it hides.

    Attributes:
        label: of the exercise, "hunt-" and the chapter's number.
        target: the function with the bug, "module:function".
        old: what is right.
        new: what stands there instead, on the line to be found.
        among: the functions that are listed, in this order; the target is one of them.
        why: what the line does, said once it is found.
    """

    label: str
    target: str
    old: str
    new: str
    among: tuple[str, ...]
    why: str

    def planted(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the package has the bug."""
        return planted(self.target, self.old, self.new)

    @property
    def listing(self) -> str:
        """The sick code without docstrings, its lines numbered from 1; print it."""
        return "\n".join(f"{i:3}  {line}".rstrip() for i, line in enumerate(self.lines(True), 1))

    def lines(self, sick: bool) -> list[str]:
        """Return the lines of the listing, with or without the bug."""
        lines: list[str] = []
        for target in self.among:
            source = change(target, self.old, self.new) if sick and target == self.target \
                else source_of(target)
            lines += [*_code(find(target, source), source), ""]
        return lines[:-1]

    def wrong_lines(self) -> set[int]:
        """Return the numbers of the lines with the bug."""
        matcher = difflib.SequenceMatcher(None, self.lines(False), self.lines(True), autojunk=False)
        return {line + 1 for kind, _, _, first, last in matcher.get_opcodes() if kind != "equal"
                for line in range(first, last)}


def _code(node: ast.FunctionDef, source: str) -> list[str]:
    """Return the lines of a function without decorators and docstring."""
    lines, first = source.splitlines(), node.body[0]
    text = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
    return textwrap.dedent("\n".join(lines[node.lineno - 1:first.lineno - 1] +
                                     lines[text:node.end_lineno])).splitlines()


def hunt(label: str) -> Hunt:
    """Return a bug hunt of the book by its label, such as "hunt-09".

    Raises:
        ValueError: if there is none.
    """
    if label not in HUNTS:
        raise ValueError(f"there is no hunt {label!r}; there are {', '.join(HUNTS)}")
    return HUNTS[label]


def _checker(sought: Hunt) -> Callable[[object], Generator[Property, None, str]]:
    def checker(line: object) -> Generator[Property, None, str]:
        length = len(sought.lines(True))
        number = isinstance(line, int) and not isinstance(line, bool)
        yield ("number", number and 1 <= line <= length,
               f"Expected the number of a line of the listing, 1 to {length}.")
        yield ("line", line in sought.wrong_lines(),
               "This line does what it should. Which quantity of the sick run leaves the healthy "
               "one first, and which lines make it?")
        return sought.why
    return checker


HUNTS = {h.label: h for h in (
    Hunt("hunt-07", "tensors:masked_whiten", "if not shift_mean:", "if shift_mean:",
         ("tensors:masked_mean", "tensors:masked_var", "tensors:masked_whiten", "ppo:policy_loss"),
         "The mean that was taken off is added again, unless somebody asks to keep it. So the "
         "advantages have the right spread and the wrong centre: no baseline is left."),
    Hunt("hunt-08", "advantages:compute_rewards", "(old_logprobs - ref_logprobs)",
         "(old_logprobs - ref_logprobs).abs()",
         ("advantages:compute_rewards", "kl:estimate_kl", "kl:KLController.update",
          "ppo:policy_loss"),
         "The penalty is never negative. So a token that the policy has given up costs as much as "
         "one that it says too often, where it should earn a bonus, and nothing ever comes back."),
    Hunt("hunt-09", "advantages:compute_gae", "gamma * next_value -", "gamma * values[:, t] -",
         ("advantages:compute_rewards", "advantages:compute_gae"),
         "The TD error compares the value of a state with itself instead of with that of the next "
         "state, so with gamma = 1 it is the token's reward alone, and the critic is never heard."),
)}
for _hunt in HUNTS.values():
    exercise(_hunt.label)(_checker(_hunt))
