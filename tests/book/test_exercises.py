"""The exercises of chapters 1 to 12: their form, their checks, and what the built pages show.

Those of chapters 1 and 2 are checked by the pages themselves.
"""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path

import pytest

from rlhf_mini.check import EXERCISES, hunt

for needed in ("yaml", "pybtex"):
    pytest.importorskip(needed, reason="needs the extra 'book'")

BOOK = Path(__file__).resolve().parents[2] / "book"
SITE = BOOK / "_build" / "html"
sys.path[:0] = [str(BOOK / "tools")]

import notebooks  # noqa: E402

FIRST = [page for page in notebooks.pages() if page[:2] < "03"]
CHAPTERS = [page for page in notebooks.pages() if "03" <= page[:2] <= "12"]
EXERCISE = re.compile(
    r"^```\{exercise-start\} (?P<title>[^\n]+)\n:label: (?P<label>[\w-]+)\n```\n"
    r"(?P<body>.*?)^```\{exercise-end\}\n```\n\n"
    r"^````\{solution-start\} (?P=label)\n:label: sol-[\w-]+\n:class: dropdown\n````\n"
    r"(?P<solution>.*?)^````\{solution-end\}\n````\n", re.MULTILINE | re.DOTALL)
CARD = re.compile(r"\A\*(Derive|Implement|Predict|Hunt) · \d+ minutes · (easy|medium|hard) · "
                  r"trains [^*]{10,}\*\n\n")


def exercises_of(page: str) -> list[re.Match]:
    """The exercises of a chapter, each with its solution."""
    return list(EXERCISE.finditer(notebooks.read(page)))


ALL = [(page, found) for page in CHAPTERS for found in exercises_of(page)]


@pytest.mark.parametrize("page", CHAPTERS)
def test_a_chapter_has_four_exercises_of_several_kinds_and_a_hunt(page):
    found = exercises_of(page)
    assert len(found) >= 4
    assert len(found) == notebooks.read(page).count("{exercise-start}")
    kinds = [CARD.match(one["body"])[1] for one in found]
    assert set(kinds) == {"Derive", "Implement", "Predict", "Hunt"}
    labels = [one["label"] for one in found]
    assert (f"hunt-{page[:2]}" in labels) == (page[:2] >= "05")


def test_every_check_belongs_to_an_exercise():
    labels = [found["label"] for _, found in ALL]
    assert sorted(labels) == sorted(EXERCISES)


@pytest.mark.parametrize("page, found", ALL, ids=lambda x: x["label"] if hasattr(x, "re") else x)
def test_an_exercise_has_card_stub_check_hints_and_a_solution_that_is_run(page, found):
    label, body, solution = found["label"], found["body"], found["solution"]
    assert CARD.match(body), body[:120]
    assert f'check("{label}", ' in body and f'check("{label}", ' in solution
    assert len(re.findall(r"^:::\{dropdown\} Hint [123]$", body, re.MULTILINE)) >= 2
    cells = re.findall(r"^```\{code-cell\}.*?^```$", body, re.MULTILINE | re.DOTALL)
    stub = next(cell for cell in cells if f'check("{label}", ' in cell)
    assert "raise NotImplementedError" in "".join(cells) or re.search(r"^\w+ = None", stub,
                                                                     re.MULTILINE)
    if "raise NotImplementedError" in stub and CARD.match(body)[1] == "Implement":
        assert re.search(r"def \w+\([^)]*\) -> ", stub), "types"
        assert re.search(r'"""[^"]*\([^"]*\)[^"]*"""|one number', stub), "shapes"
    if label.startswith("hunt-"):
        assert f'hunt("{label}").planted()' in body and f'print(hunt("{label}").listing)' in body
        assert hunt(label).new not in body


@pytest.mark.skipif(not (SITE / "index.html").exists(), reason="`make book` was not run")
@pytest.mark.parametrize("page", CHAPTERS)
def test_on_the_built_page_stubs_fail_politely_and_solutions_hold(page):
    text = html.unescape((SITE / f"{page}.html").read_text(encoding="utf-8"))
    for found in exercises_of(page):
        assert f"\n{found['label']}: not written yet." in text.replace("<pre>", "\n") \
            .replace("<span></span>", "")
        assert f"{found['label']}: all properties hold (" in text


@pytest.mark.parametrize("page", FIRST)
def test_the_first_chapters_have_cards_hints_and_solutions_too(page):
    found = exercises_of(page)
    assert len(found) == notebooks.read(page).count("{exercise-start}") >= 3
    for one in found:
        assert CARD.match(one["body"]), one["label"]
        assert len(re.findall(r"^:::\{dropdown\} Hint [123]$", one["body"], re.MULTILINE)) >= 2


@pytest.mark.parametrize("page", [*FIRST, *CHAPTERS])
def test_the_card_adds_up_the_minutes_of_the_exercises(page):
    minutes = sum(int(one["body"].split(" · ")[1].split()[0]) for one in exercises_of(page))
    words = f"about {minutes} minutes for all of them"
    assert words in notebooks.convert(page)
    if (built := SITE / f"{page}.html").exists():
        assert words in built.read_text(encoding="utf-8")
