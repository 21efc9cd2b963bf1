"""The directive `quiz`: its form, what it writes, how it is used, and the quizzes of the book."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

for needed in ("myst_nb", "sphinx_book_theme", "yaml", "pybtex", "websocket"):
    pytest.importorskip(needed, reason="needs the extra 'book'")

BOOK = Path(__file__).resolve().parents[2] / "book"
sys.path[:0] = [str(BOOK / "_ext"), str(BOOK / "tools"), str(Path(__file__).parent)]

import book_forms  # noqa: E402
import browse  # noqa: E402
import notebooks  # noqa: E402
from quiz_site import GOOD, RIGHT, build, page_of  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The good quiz as a site, built once."""
    pages = {"page": page_of(GOOD), "other": "# Other\n\nHere.\n"}
    out, said = build(tmp_path_factory.mktemp("quiz"), pages)
    assert not said
    return out


# ---- the form ----------------------------------------------------------------------------------

FOURTH = GOOD[GOOD.index("4. Fourth?"):]
MORE = "\n   - ( ) More.\n\n     No.\n"
FAULTS = {  # name: (quiz, start of the line that is named, what is said)
    "empty": ("\n", ":::{quiz}", "is empty"),
    "prose": ("\nChoose.\n" + GOOD, "Choose.", "something besides its one numbered list"),
    "outdented": (GOOD.replace("   - (", "- (", 1), "- ( ) It is", "something besides"),
    "two-lists": (GOOD.replace("4. Fourth", "4) Fourth"), "4) Fourth", "something besides"),
    "three": (GOOD.replace(FOURTH, ""), "1. With", "3 questions; write 4 to 6"),
    "seven": (GOOD + "".join(FOURTH.replace("4.", f"{n}.") for n in (5, 6, 7)), "1. With",
              "7 questions; write 4 to 6"),
    "no-text": (GOOD.replace("3. Third?", "3. ```\n   x = 1\n   ```"), "3. ```",
                "question 3 begins with no text"),
    "no-choices": (GOOD.replace(FOURTH, "4. Fourth?\n"), "4. Fourth?",
                   "question 4 does not end with a list"),
    "after": (GOOD + "\n   Words.\n", "   Words.", "question 4 does not end with a list"),
    "two": (re.sub(r"   - \( \) Third wrong two.\n\n.*\n\n", "", GOOD), "   - ( ) Third wrong one",
            "question 3 has 2 choices; write 3 or 4"),
    "five": (GOOD + MORE + MORE, "   - (x) Fourth", "question 4 has 5 choices; write 3 or 4"),
    "no-right": (GOOD.replace("(x) 2", "( ) 2"), "   - ( ) 2", "question 2 has 0 right choices"),
    "two-right": (GOOD.replace("( ) 3", "(x) 3"), "   - (x) 2", "question 2 has 2 right choices"),
    "no-mark": (GOOD.replace("( ) 3", "3 is"), "   - 3 is", "choice B of question 2 has no mark"),
    "other-mark": (GOOD.replace("( ) 3", "(X) 3"), "   - (X) 3", "choice B of question 2 has no"),
    "mark-only": (GOOD.replace("( ) 3", "( )"), "   - ( )\n", "choice B of question 2 has no"),
    "no-why": (GOOD.replace("\n     Third why B.\n", ""), "   - ( ) Third wrong two",
               "choice B of question 3 has no explanation"),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> str:
    """What is said of the faulty pages, built once."""
    return build(tmp_path_factory.mktemp("faults"),
                 {name: page_of(quiz) for name, (quiz, _, _) in FAULTS.items()}, "dummy")[1]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_its_line(said, name):
    (found,) = re.findall(rf"{name}\.md:(\d+): WARNING: quiz: (.*)", said)
    quiz, line, what = FAULTS[name]
    assert what in found[1]
    assert int(found[0]) == page_of(quiz).split(f"\n{line}")[0].count("\n") + 2


# ---- what is written ---------------------------------------------------------------------------


class Form(HTMLParser):
    """The elements of a page as (tag, attributes), and the text inside legends and labels."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), tuple(self.open)))
        if tag not in ("input", "img", "meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data):
        for tag in ("legend", "label"):
            if tag in self.open:
                self.texts.append((tag, data))

    def all(self, tag: str, inside: str = "fieldset") -> list[dict]:
        return [attrs for name, attrs, within in self.tags if name == tag and inside in within]


def test_html_is_a_form_that_every_reader_can_use(site):
    text = (site / "page.html").read_text(encoding="utf-8")
    form = Form(text)
    assert len(form.all("fieldset", "article")) == len(form.all("legend")) == 4
    buttons, labels = form.all("input"), form.all("label")
    assert [b["type"] for b in buttons] == ["radio"] * 13
    assert [lab["for"] for lab in labels] == [b["id"] for b in buttons]
    assert len({b["id"] for b in buttons}) == 13 and len({b["name"] for b in buttons}) == 4
    right = [b["id"][-1].upper() for b in buttons if b["value"] == "right"]
    assert "".join(right) == RIGHT
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)), sorted(i for i in ids if ids.count(i) > 1)
    assert all(f"{b['id']}-why" in ids for b in buttons)
    assert all("checked" not in b and b["autocomplete"] == "off" for b in buttons)
    assert [d["aria-live"] for d in form.all("div") if "aria-live" in d] == ["polite"] * 13
    assert "( )" not in text and "(x)" not in text


def test_html_holds_formulas_links_and_code(site):
    text = (site / "page.html").read_text(encoding="utf-8")
    first, second = re.findall(r"<fieldset.*?</fieldset>", text, re.DOTALL)[:2]
    assert r"\(\pi = \rho\)" in first and r"\sum_y \pi \log 1 = 0" in first
    assert 'href="other.html"' in first and "<code" in first
    assert 'class="highlight-python' in second


def test_html_says_right_and_wrong_in_words_and_has_a_key(site):
    text = (site / "page.html").read_text(encoding="utf-8")
    whys = re.findall(r'class="quiz-why quiz-(\w+)"[^>]*><p><strong>(\w+)\.</strong> ', text)
    assert len(whys) == 13 and all(verdict == word.lower() for verdict, word in whys)
    key = text[text.index('class="quiz-key"'):]
    verdicts = re.findall(r"<strong>([A-D])\. (Right|Wrong)\.</strong>", key)
    assert len(verdicts) == 13
    assert "".join(letter for letter, word in verdicts if word == "Right") == RIGHT
    assert key.index("Equal distributions") < key.index("Fourth why C.")


@pytest.mark.parametrize("builder, name", [("text", "page.txt"), ("latex", "*.tex")])
def test_other_formats_list_the_choices_and_then_the_answers(tmp_path, builder, name):
    out, said = build(tmp_path, {"page": page_of(GOOD), "other": "# Other\n"}, builder)
    assert not said
    text = next(out.glob(name)).read_text(encoding="utf-8")
    questions, answers = text.split("Answers to the quiz")
    for choice in ("A. Third wrong one.", "B. Third wrong two.", "C. Third right."):
        assert choice in questions and choice not in answers
    assert "Third why" not in questions and answers.count("Third why") == 3
    verdicts = re.findall(r"([A-D])\. (Right|Wrong)\.", answers)
    assert "".join(letter for letter, word in verdicts if word == "Right") == RIGHT


# ---- notebooks ---------------------------------------------------------------------------------


def test_a_notebook_has_the_choices_and_folded_answers():
    page = notebooks.Page("03-tokens")
    (block,) = notebooks.split_blocks(f":::{{quiz}}{GOOD}:::")
    text = notebooks._render(page, block)
    parts = text.split("<details><summary>Answer</summary>\n\n")
    assert len(parts) == 5 and text.count("\n\n</details>") == 4
    assert parts[0].startswith("**1.** With $\\pi = \\rho$, what is `kl`? See [the other page](")
    assert "other.ipynb" in parts[0]
    assert parts[0].endswith("\n\n- **A.** It is $\\log 2$ nats.\n- **B.** It is 0.\n"
                             "- **C.** It is not defined.\n\n")
    assert parts[3].endswith("**4.** Fourth?\n\n- **A.** Fourth right.\n- **B.** Fourth wrong\n"
                             "  on two lines.\n- **C.** Fourth wrong three.\n\n")
    assert parts[4] == ("- **A. Right.** Fourth why A.\n- **B. Wrong.** Fourth why B,\n"
                        "  on two lines.\n- **C. Wrong.** Fourth why C.\n\n</details>")
    assert "  $$\n  \\sum_y \\pi \\log 1 = 0\n  $$\n" in parts[1]
    assert "\n\n```python\nprint(round(2.5))\n```\n\n- **A.** 2\n" in parts[1]
    assert "( )" not in text and "(x)" not in text


@pytest.mark.parametrize("name", FAULTS)
def test_a_notebook_does_not_lose_a_malformed_quiz(name):
    quiz, line, what = FAULTS[name]
    with pytest.raises(book_forms.Malformed, match=re.escape(what)) as raised:
        book_forms.as_markdown(quiz)
    if name != "empty":
        assert quiz.split("\n")[raised.value.line].startswith(line.removesuffix("\n"))


# ---- in a browser ------------------------------------------------------------------------------

KEYS = {"Tab": (9, ""), " ": (32, " "), "ArrowDown": (40, ""), "ArrowUp": (38, "")}


@pytest.fixture(scope="module")
def browser(site):
    """A Chromium and the address of the page."""
    if browse.find_browser() is None:
        pytest.skip("needs a Chromium")
    server, home = browse.serve(site)
    chromium = browse.Browser(browse.find_browser())
    chromium.page = f"{home}page.html"
    yield chromium
    chromium.close()
    server.shutdown()


def press(browser, key: str) -> None:
    """Press and release a key."""
    code, text = KEYS[key]
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code,
                     code="Space" if key == " " else key, text=text if kind == "keyDown" else "")


def shown(browser, what: str) -> list[str]:
    """The ids of what can be seen, of all that a selector finds."""
    return browser.evaluate(f"[...document.querySelectorAll('{what}')]"
                            ".filter(e => e.checkVisibility()).map(e => e.id || e.className)")


def score(browser) -> str:
    """The line with the score, which a screen reader reads out when it changes."""
    return browser.evaluate("document.querySelector('.quiz-score[role=status]').textContent")


def tab_to(browser, button: str) -> None:
    """Press Tab until a radio button has the focus."""
    for _ in range(200):
        press(browser, "Tab")
        if browser.evaluate("document.activeElement.id") == button:
            return
    raise AssertionError(f"Tab does not lead to {button}")


@pytest.mark.parametrize("width", [1280, 360])
def test_a_quiz_is_used_by_keyboard_alone(browser, width):
    browser.open(browser.page, width)
    tab_to(browser, "quiz-1-1-a")
    assert score(browser) == "Score: 0 of 4" and shown(browser, ".quiz-why") == []
    press(browser, " ")
    assert shown(browser, ".quiz-why") == ["quiz-1-1-a-why"]
    assert score(browser) == "Score: 0 of 4"
    press(browser, "ArrowDown")
    assert shown(browser, ".quiz-why") == ["quiz-1-1-b-why"]
    assert score(browser) == "Score: 1 of 4"
    described = "[...document.querySelectorAll('[aria-describedby^=quiz]')].map(e => "
    assert browser.evaluate(f"{described}[e.id, e.getAttribute('aria-describedby')])") == [
        ["quiz-1-1-b", "quiz-1-1-b-why"]]
    tab_to(browser, "quiz-1-2-a")
    press(browser, " ")
    assert shown(browser, ".quiz-why") == ["quiz-1-1-b-why", "quiz-1-2-a-why"]
    assert score(browser) == "Score: 2 of 4"
    press(browser, "ArrowUp")
    assert shown(browser, ".quiz-why") == ["quiz-1-1-b-why", "quiz-1-2-d-why"]
    assert score(browser) == "Score: 1 of 4"
    assert not browser.faults(browser.page.rpartition("/")[0])
    assert not browser.evaluate(browse.WIDE)
    browser.open(browser.page, width)  # nothing is remembered
    assert score(browser) == "Score: 0 of 4" and shown(browser, ".quiz-why") == []


def test_a_quiz_needs_no_script(browser):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(browser.page)
        tab_to(browser, "quiz-1-1-a")
        press(browser, " ")
        press(browser, "ArrowDown")
        assert shown(browser, ".quiz-why") == ["quiz-1-1-b-why"]
        assert shown(browser, ".quiz-score") == shown(browser, ".quiz-key") == []
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_a_quiz_is_printed_with_boxes_and_a_key(browser):
    browser.open(browser.page)
    browser.evaluate("document.getElementById('quiz-1-1-b').click(), 0")
    assert shown(browser, ".quiz-why") == ["quiz-1-1-b-why"] and not shown(browser, ".quiz-key")
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        assert shown(browser, ".quiz-why, .quiz input, .quiz-score") == []
        assert len(shown(browser, ".quiz label")) == 13
        assert shown(browser, ".quiz-key") == ["quiz-key"]
        box = "getComputedStyle(document.querySelector('.quiz-choice'), '::before').content"
        assert browser.evaluate(box) == '"\N{BALLOT BOX}"'
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")


# ---- the quizzes of the book -------------------------------------------------------------------

QUIZ = re.compile(r"^:::\{quiz\}\n(.*?)^:::$", re.MULTILINE | re.DOTALL)
QUIZZED = sorted(BOOK.glob("[0-9][0-9]-*.md"))


@pytest.mark.parametrize("page", QUIZZED, ids=lambda p: p.stem)
def test_a_chapter_has_its_quiz_before_the_recap(page):
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    place = headings.index("Quiz")
    assert headings[place + 1] == "Recap" and headings.count("Quiz") == 1
    before = {"Exercises", "Questions for a class"} & set(headings[:place])
    assert before, "a quiz stands after the exercises"
    section = text.split("\n## Quiz\n")[1].split("\n## Recap\n")[0]
    assert len(QUIZ.findall(text)) == len(QUIZ.findall(section)) == 1


@pytest.mark.parametrize("page", QUIZZED, ids=lambda p: p.stem)
def test_a_right_answer_cannot_be_guessed_from_its_looks(page):
    questions = book_forms.questions_of(QUIZ.search(page.read_text(encoding="utf-8"))[1])
    right = [[is_right for is_right, _, _ in choices].index(True) for _, choices in questions]
    assert len(set(right)) >= 3, "put the right choices in more places"
    lengths = [[len(text) for _, text, _ in choices] for _, choices in questions]
    longest = sum(row[i] == max(row) for row, i in zip(lengths, right, strict=True))
    assert longest < len(right), "every right choice is the longest one"
