"""Write a quiz as plain Markdown, for notebooks; its form is checked by book/_ext/quiz.py."""

from __future__ import annotations

import re
import textwrap

QUESTION = re.compile(r"^\d+\.[ ]+(?=\S)", re.MULTILINE)
CHOICE = re.compile(r"^[ ]{3,4}- \(([ x])\) ", re.MULTILINE)


def questions_of(body: str) -> list[tuple[str, list[tuple[bool, str, str]]]]:
    """Return the questions, each with its choices: (is it right, choice, explanation)."""
    found = []
    for part in QUESTION.split(body)[1:]:
        question, *marked = CHOICE.split(part)
        choices = [(mark == "x", *_choice(text))
                   for mark, text in zip(marked[::2], marked[1::2], strict=True)]
        found.append((_dedent(question, 3), choices))
    if not found or not all(choices for _, choices in found):
        raise ValueError("a quiz is a numbered list of questions with choices '- ( ) ...'")
    return found


def as_markdown(body: str) -> str:
    """Return the questions with lettered choices, each followed by a fold with the answers."""
    parts = []
    for number, (question, choices) in enumerate(questions_of(body), start=1):
        lettered = list(zip("ABCD", choices, strict=False))
        answers = [_item(f"**{letter}. {'Right' if right else 'Wrong'}.** {why}")
                   for letter, (right, _, why) in lettered]
        parts += [f"**{number}.** {question}",
                  "\n".join(_item(f"**{letter}.** {text}") for letter, (_, text, _) in lettered),
                  "<details><summary>Answer</summary>", "\n".join(answers), "</details>"]
    return "\n\n".join(parts)


def _choice(text: str) -> tuple[str, str]:
    text, _, why = _dedent(text, 5).partition("\n\n")
    return text, why.strip()


def _dedent(text: str, spaces: int) -> str:
    return textwrap.dedent(" " * spaces + text.strip())


def _item(text: str) -> str:
    return "- " + textwrap.indent(text, "  ").strip()
