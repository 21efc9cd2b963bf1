"""Exercises and quizzes as the pages write them: one reader for the site and for the notebooks.

The form of both is described in CONTRIBUTING.md.
"""

from __future__ import annotations

import re
import textwrap

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode
from mdit_py_plugins.dollarmath import dollarmath_plugin

MINUTES = re.compile(r"^\*\w+ · (\d+) minutes · ", re.MULTILINE)
MARK = re.compile(r"\(([ x])\) +")
BULLET = re.compile(r" *(?:\d+[.)]|[-+*])(?: +|$)")
MARKDOWN = MarkdownIt("commonmark").use(dollarmath_plugin)
QUESTIONS, CHOICES = range(4, 7), range(3, 5)
# A question, and for each of its choices: whether it is right, the choice, its explanation.
Question = tuple[str, list[tuple[bool, str, str]]]


class Malformed(ValueError):
    """What is wrong with a quiz, and in which line of it, from 0; None if it has no lines."""

    def __init__(self, line: int | None, what: str):
        super().__init__(f"quiz: {what}")
        self.line, self.what = line, what


def sum_minutes(text: str) -> int:
    """Return the sum of the minutes on the cards of a page's exercises."""
    return sum(map(int, MINUTES.findall(text)))


def questions_of(body: str) -> list[Question]:
    """Return the questions of a quiz, as Markdown.

    Raises:
        Malformed: says what is wrong and what would be right.
    """
    blocks, lines = SyntaxTreeNode(MARKDOWN.parse(body)).children, body.split("\n")
    if not blocks:
        raise Malformed(None, "is empty; write questions as a numbered list '1. Question?'")
    for block in blocks:
        if block.type != "ordered_list" or block is not blocks[0]:
            raise Malformed(block.map[0], "holds something besides its one numbered list of "
                            "questions; write '1. Question?' and indent all that belongs to it by "
                            "3 spaces")
    questions = blocks[0].children
    if len(questions) not in QUESTIONS:
        raise Malformed(blocks[0].map[0], f"has {_count(questions, 'question')}; write 4 to 6")
    return [_question(question, f"question {number}", lines)
            for number, question in enumerate(questions, start=1)]


def _question(item: SyntaxTreeNode, name: str, lines: list[str]) -> Question:
    blocks = item.children
    if not blocks or blocks[0].type != "paragraph":
        raise Malformed(item.map[0], f"{name} begins with no text; write '1. Question?'")
    if blocks[-1].type != "bullet_list":
        raise Malformed(blocks[-1].map[0], f"{name} does not end with a list of choices; write "
                        "'   - ( ) A choice.' below it, and its explanation 5 spaces deep")
    first, items = blocks[-1].map[0], blocks[-1].children
    if len(items) not in CHOICES:
        raise Malformed(first, f"{name} has {_count(items, 'choice')}; write 3 or 4")
    choices = [_choice(choice, f"choice {letter} of {name}", lines)
               for letter, choice in zip("ABCD", items, strict=False)]
    if (right := sum(choice[0] for choice in choices)) != 1:
        raise Malformed(first, f"{name} has {right} right choices; mark exactly one by (x)")
    return _text(lines[item.map[0]:first]), choices


def _choice(item: SyntaxTreeNode, name: str, lines: list[str]) -> tuple[bool, str, str]:
    start, end = item.map
    text, *why = item.children or [None]
    mark = text and text.type == "paragraph" and MARK.match(text.children[0].content)
    if not mark:
        raise Malformed(start, f"{name} has no mark and text; write '( ) A wrong choice.' or "
                        "'(x) The right choice.'")
    if not why or why[0].type != "paragraph":
        raise Malformed(start, f"{name} has no explanation; write a sentence below it, after an "
                        "empty line and 5 spaces deep")
    words = MARK.sub("", _text(lines[start:text.map[1]]), count=1)
    return mark[1] == "x", words, _text(lines[why[0].map[0]:end])


def _text(lines: list[str]) -> str:
    """Return lines without the sign of a list in front and without their common indentation."""
    sign = BULLET.match(lines[0])
    first = " " * sign.end() + lines[0][sign.end():] if sign else lines[0]
    return textwrap.dedent("\n".join([first, *lines[1:]])).strip()


def _count(things: list, name: str) -> str:
    return f"{len(things)} {name}" + "s" * (len(things) != 1)


def as_markdown(body: str) -> str:
    """Return a quiz as plain Markdown: lettered choices, and a fold with the answers to each."""
    parts = []
    for number, (question, choices) in enumerate(questions_of(body), start=1):
        lettered = list(zip("ABCD", choices, strict=False))
        answers = [_item(f"**{letter}. {'Right' if right else 'Wrong'}.** {why}")
                   for letter, (right, _, why) in lettered]
        parts += [f"**{number}.** {question}",
                  "\n".join(_item(f"**{letter}.** {text}") for letter, (_, text, _) in lettered),
                  "<details><summary>Answer</summary>", "\n".join(answers), "</details>"]
    return "\n\n".join(parts)


def _item(text: str) -> str:
    return "- " + textwrap.indent(text, "  ").strip()
