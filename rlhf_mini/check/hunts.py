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
               f"Expected a whole number, 1 to {length}: that of a line of the listing.")
        yield ("line", line in sought.wrong_lines(),
               "The bug is not in this line. Which number on the page is the first that cannot be "
               "right, and which lines make it?")
        return sought.why
    return checker


HUNTS = {h.label: h for h in (
    Hunt("hunt-05", "training:epoch_batch",
         "order[turn * batch_size:(turn + 1) * batch_size]", "order[turn:turn + batch_size]",
         ("sft:sft_loss", "models:compute_response_logprobs", "models:set_residual_dropout",
          "training:epoch_batch", "data:collate"),
         "Batch after batch starts one item further, not one batch further. So an epoch shows the "
         "first few of the sorted items again and again, the shortest, and never most of them."),
    Hunt("hunt-06", "data:pack_rankings", "mask=_rows(mask, 0)", "mask=_rows(mask, 1)",
         ("data:_rows", "data:pack_rankings", "reward:reward_loss"),
         "A row with fewer responses is filled up with ones, so the mask says that responses exist "
         "where there are none. Their rank is 0, better than the best, and they win every pair."),
    Hunt("hunt-07", "tensors:masked_whiten", "if not shift_mean:", "if shift_mean:",
         ("tensors:masked_mean", "tensors:masked_var", "tensors:masked_whiten", "ppo:policy_loss"),
         "The mean that was taken off is added again, unless somebody asks to keep it. So the "
         "advantages have the right spread and the wrong centre: no baseline is left."),
    Hunt("hunt-08", "rollout:compute_rollout_stats", "kl.sum(1).mean()", "kl.sum(0).mean()",
         ("advantages:compute_rewards", "kl:estimate_kl", "rollout:compute_rollout_stats",
          "kl:KLController.update"),
         "The sum runs over the responses, not over the tokens of a response. So the log-ratio of "
         "the whole batch is divided by the number of places, and the KL looks the larger the more "
         "responses a rollout has."),
    Hunt("hunt-09", "ppo:value_loss",
         "values.clamp(old_values - value_clip_range, old_values + value_clip_range)",
         "(values - old_values).clamp(-value_clip_range, value_clip_range)",
         ("advantages:compute_rewards", "advantages:compute_gae", "ppo:value_loss"),
         "What is clipped here is the change of the value, and nobody adds the old value again. So "
         "a change of at most 0.2 is compared with a whole return, and found too small for ever: "
         "every guess is pushed on in the direction of its return, far beyond it."),
    Hunt("hunt-10", "ppo:update", "Targets(targets.advantages[rows], targets.returns[rows])",
         "Targets(*(x[i * size:(i + 1) * size] for x in vars(targets).values()))",
         ("rollout:compute_targets", "ppo:value_loss", "ppo:update"),
         "The minibatch takes its episodes in the new random order and their targets in the old "
         "one. So each token is pushed by an advantage that some other token has earned."),
    Hunt("hunt-11", "evaluation:measure_reward_model",
         "own = [~(d[:, None] | d[None, :]) for d in decoys]",
         "own = [~(d[:, None] & d[None, :]) for d in decoys]",
         ("evaluation:measure_reward_model", "evaluation:compute_pair_accuracy"),
         "A pair is left out only if both of its responses are decoys. So a decoy next to one of "
         "the policy's responses counts, and such pairs are easy: they hide those at which the "
         "judge has gone stale."),
    Hunt("hunt-12", "evaluation:_score_tokens", "scores[rows] =",
         "scores[start:start + batch_size] =",
         ("evaluation:evaluate_policy", "evaluation:_score_tokens", "evaluation:compute_win_rate"),
         "Responses are scored in the order of their lengths, and the scores are written down in "
         "that order too. So every score is there, but at another response: means are right, and "
         "whatever compares single responses is not."),
)}
for _hunt in HUNTS.values():
    exercise(_hunt.label)(_checker(_hunt))
