"""Explorable figures in a real browser: their numbers, their keys, and what is left without them.

A new one enters EXPLORABLES in explored.py.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("websocket", reason="needs the extra 'book'")

BOOK = Path(__file__).resolve().parents[2] / "book"
sys.path.insert(0, str(Path(__file__).parent))

from browse import WIDE, Browser, find_browser, serve  # noqa: E402
from explored import EXPLORABLES  # noqa: E402

from rlhf_mini.explorable import show_explorable  # noqa: E402
from rlhf_mini.notebook import new_figure  # noqa: E402

pytestmark = pytest.mark.skipif(find_browser() is None, reason="there is no Chromium")
ALT = "A straight line that rises from 1 to 2."
every = pytest.mark.parametrize("name", EXPLORABLES)


# ---- the browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[str]:
    """The address of a folder with a page for each explorable, served."""
    folder = tmp_path_factory.mktemp("explorables")
    shutil.copytree(BOOK / "_static", folder / "_static")
    for name, explored in EXPLORABLES.items():
        figure, axes = new_figure()
        axes.plot([1, 2])
        shown = show_explorable(name, explored.data, figure, ALT)
        (folder / f"{name}.html").write_text(
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>page</title>'
            '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
            '<link rel="stylesheet" href="_static/book.css">'
            '<link rel="stylesheet" href="_static/explorables.css">'
            '<script src="_static/explorables.js"></script>'
            # as narrow as a figure of the book, in a wide type
            "<article style='margin: 0 1.25rem; font-family: DejaVu Sans'>"
            f"{shown._repr_html_()}</article>", encoding="utf-8")
    server, address = serve(folder)
    yield address
    server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    one = Browser(find_browser())
    yield one
    one.close()


def wait_for(browser: Browser, script: str) -> None:
    """Wait until a script of the page returns something true, at most five seconds."""
    assert browser.evaluate(f"""new Promise(done => {{
      let left = 250;
      const look = () => {script} ? done(true) : left-- ? setTimeout(look, 20) : done(false);
      look();
    }})"""), f"never came: {script}"


def open_page(browser: Browser, home: str, name: str, width: int = 800) -> None:
    browser.open(f"{home}{name}.html", width)
    wait_for(browser, "document.querySelector('.explorable-sentence')?.textContent")


def press(browser: Browser, key: str) -> None:
    """Press and release a key."""
    code = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39, "Enter": 13,
            "ArrowDown": 40}[key]
    for kind in ("rawKeyDown", *(["char"] if key == "Enter" else []), "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key,
                     windowsVirtualKeyCode=code, **({"text": "\r"} if kind == "char" else {}))


STATE = """(() => {
  const now = document.activeElement, panel = document.querySelector(".explorable-panel");
  return {tag: now.tagName, type: now.type, value: now.value,
          spoken: now.getAttribute("aria-valuetext"),
          label: now.labels && now.labels[0] && now.labels[0].textContent,
          output: (panel.querySelector(`output[for="${now.id}"]`) || {}).textContent,
          ring: getComputedStyle(now).outlineStyle,
          drawing: panel.querySelector("svg[role=img]").innerHTML,
          described: panel.querySelector("svg[role=img]").getAttribute("aria-label"),
          sentence: panel.querySelector(".explorable-sentence").textContent};
})()"""


# ---- the tests ---------------------------------------------------------------------------------


def assert_close(mine, package, where: str) -> None:
    if isinstance(package, list | tuple):
        assert len(mine) == len(package), where
        for i, (a, b) in enumerate(zip(mine, package, strict=True)):
            assert_close(a, b, f"{where}[{i}]")
    elif isinstance(package, dict):
        assert set(mine) == set(package), where
        for key, value in package.items():
            assert_close(mine[key], value, f"{where}.{key}")
    elif package is None or isinstance(package, bool | str):
        assert mine == package, where
    else:
        assert math.isclose(mine, package, rel_tol=1e-6, abs_tol=1e-9), (where, mine, package)


@every
def test_numbers_are_those_of_the_package(browser, home, name):
    open_page(browser, home, name)
    explored = EXPLORABLES[name]
    data = json.loads(browser.evaluate("document.querySelector('.explorable script').textContent"))
    mine = browser.evaluate(f"""(() => {{
      const data = {json.dumps(data)}, before = JSON.stringify(data);
      const all = {json.dumps(explored.grid)}.map(p => Explorables["{name}"].compute(p, data));
      if (JSON.stringify(data) !== before) throw new Error("compute changed its data");
      return all;
    }})()""")
    for p, result in zip(explored.grid, mine, strict=True):
        wanted = explored.expected(p, data)
        assert wanted
        for key, value in wanted.items():
            assert_close(result[key], value, f"{name}.{key} at {p}")


@every
def test_the_keyboard_is_enough(browser, home, name):
    open_page(browser, home, name)
    count = browser.evaluate("document.querySelectorAll('.explorable-control').length")
    assert count >= 1
    begin = browser.evaluate(STATE)
    for _ in range(count):
        press(browser, "Tab")
        start = browser.evaluate(STATE)
        assert start["label"] and start["ring"] == "solid"
        if start["tag"] == "SELECT":
            press(browser, "ArrowDown")
            changed = browser.evaluate(STATE)
            assert changed["value"] != start["value"]
            assert changed["drawing"] != start["drawing"]
            continue
        if start["type"] == "radio":
            press(browser, "ArrowRight")
            changed = browser.evaluate(STATE)
            assert changed["value"] != start["value"] and changed["label"] != start["label"]
            continue
        assert start["type"] == "range" and start["spoken"] == start["output"]
        seen = {}
        for key in ("Home", "ArrowRight", "End", "ArrowLeft"):
            press(browser, key)
            seen[key] = browser.evaluate(STATE)
            assert seen[key]["spoken"] == seen[key]["output"]
        assert len({state["value"] for state in seen.values()}) >= 3
        assert len({state["output"] for state in seen.values()}) >= 3
        assert seen["Home"]["drawing"] != seen["End"]["drawing"]
    wait_for(browser, "(x => x.described === x.sentence)" f"({STATE})")
    assert browser.evaluate(STATE)["sentence"] != begin["sentence"]
    press(browser, "Tab")
    press(browser, "Enter")  # the button that leads back
    wait_for(browser, f"({STATE}).sentence === {json.dumps(begin['sentence'])}")
    assert browser.evaluate(STATE)["drawing"] == begin["drawing"]
    assert not browser.faults(home)


def test_tokens_are_walked_by_arrow_keys(browser, home):
    open_page(browser, home, "samples")
    tokens = browser.evaluate("""[...document.querySelectorAll(".explorable [role=option]")].map(
      t => t.firstChild.textContent.trim())""")
    first = EXPLORABLES["samples"].data["prompts"][9]["responses"][-1]
    assert tokens == [token.strip() for token in first["tokens"]]
    for _ in range(5):  # prompt, step, colour, button: the tokens are one stop of the Tab key
        press(browser, "Tab")
    picked = """(() => {
      const now = document.activeElement, all = [...now.parentElement.children];
      return [all.indexOf(now), all.findIndex(t => t.getAttribute("aria-selected") === "true"),
              all.filter(t => t.tabIndex === 0).length, getComputedStyle(now).outlineStyle];
    })()"""
    last = len(tokens) - 1
    for key, place in ((None, 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1),
                       ("End", last), ("ArrowRight", last), ("Home", 0)):
        if key:
            press(browser, key)
        assert browser.evaluate(picked) == [place, place, 1, "solid"]
        wait_for(browser, "document.querySelector('.explorable-sentence').textContent.includes("
                          f"'Token {place + 1}, “{tokens[place]}”')")


def test_tokens_answer_to_the_pointer(browser, home):
    open_page(browser, home, "samples")
    place = browser.evaluate("""(() => {
      const box = document.querySelectorAll(".explorable [role=option]")[2]
        .getBoundingClientRect();
      return [box.x + box.width / 2, box.y + box.height / 2];
    })()""")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    wait_for(browser, "document.querySelector('.explorable-sentence').textContent.includes("
                      "'Token 3,')")


@every
@pytest.mark.parametrize("pointer", ["mouse", "finger"])
def test_a_pointer_moves_the_slider(browser, home, name, pointer):
    open_page(browser, home, name)
    box = browser.evaluate("""(() => {
      const slider = document.querySelector(".explorable input[type=range]");
      if (slider) slider.scrollIntoView({block: "center"});
      return slider && slider.getBoundingClientRect().toJSON();
    })()""")
    if box is None:
        pytest.skip("it has no slider")
    before, middle = browser.evaluate(STATE)["drawing"], box["y"] + box["height"] / 2
    for share in (0.2, 0.9):
        at = {"x": box["x"] + share * box["width"], "y": middle}
        if pointer == "mouse":
            for kind in ("mousePressed", "mouseReleased"):
                browser.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1,
                             **at)
        else:
            browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[at])
            browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        after = browser.evaluate(STATE)["drawing"]
        assert after != before
        before = after


@every
def test_screen_readers_are_told(browser, home, name):
    open_page(browser, home, name)
    found = browser.evaluate("""(() => {
      const drawing = document.querySelector(".explorable-panel svg[role=img]");
      return {named: drawing.getAttribute("aria-label"),
              live: document.querySelector(".explorable-sentence").getAttribute("aria-live"),
              picture: document.querySelector(".explorable img").checkVisibility(),
              broken: /NaN|undefined|Infinity/.test(
                document.querySelector(".explorable-panel").outerHTML)};
    })()""")
    assert re.fullmatch(r"[A-Z].{30,}\.", found["named"])
    assert found["live"] == "polite" and not found["picture"] and not found["broken"]


@every
def test_without_a_script_the_picture_is_there(browser, home, name):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(f"{home}{name}.html", 360)
        found = browser.evaluate("""[...document.querySelectorAll(".explorable > *")].map(
          e => [e.tagName, e.checkVisibility(), e.alt, e.naturalWidth > 0])""")
        wide = browser.evaluate(WIDE)
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert found == [["IMG", True, ALT, True], ["SCRIPT", False, None, False]] and not wide


@every
def test_it_fits_a_phone(browser, home, name):
    open_page(browser, home, name, 360)
    assert not browser.evaluate(WIDE)
    outside = browser.evaluate("""(() => {
      const frame = document.querySelector("svg[role=img]").getBoundingClientRect();
      const texts = [...document.querySelectorAll(".explorable-panel svg text")];
      return texts.map(t => [t.textContent, t.getBoundingClientRect()]).filter(
        ([, box]) => box.left < frame.left || box.right > frame.right).map(([text]) => text);
    })()""")
    assert not outside  # of the drawing, which cuts them off
    small = browser.evaluate("""[...document.querySelectorAll(".explorable-panel svg text")].some(
      t => parseFloat(getComputedStyle(t).fontSize) < 11)""")
    assert not small


@every
def test_labels_keep_clear_of_dots_and_arrows(browser, home, name):
    open_page(browser, home, name, 360)
    hit = browser.evaluate("""(() => {
      const svg = document.querySelector("svg[role=img]"), hit = [];
      const labels = [...svg.querySelectorAll(".label")].filter(one => one.textContent);
      const others = [...svg.querySelectorAll("g > circle, g > path:not([class])")];
      for (const label of labels) for (const other of [...labels, ...others]) {
        const [a, b] = [label, other].map(one => one.getBoundingClientRect());
        const beside = Math.max(a.left - b.right, b.left - a.right);
        const above = Math.max(a.top - b.bottom, b.top - a.bottom) + 3;  // no letter fills its line
        if (label !== other && Math.max(beside, above) < 0)
          hit.push(label.textContent + " on " + (other.textContent || other.tagName));
      }
      return hit;
    })()""")
    assert not hit


@every
def test_print_hides_the_controls(browser, home, name):
    open_page(browser, home, name)
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        seen = browser.evaluate("""["controls", "panel > svg", "sentence"].map(
          part => document.querySelector(".explorable-" + part).checkVisibility())""")
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")
    assert seen == [False, True, True]


def test_every_explorable_is_tested_and_has_a_page():
    scripts = {path.stem for path in (BOOK / "_static" / "explorables").glob("*.js")}
    assert scripts == set(EXPLORABLES)
    cells = re.findall(r"^```\{code-cell\}.*?^```$", "\n".join(
        page.read_text(encoding="utf-8") for page in BOOK.glob("[0-9]*.md")), re.DOTALL | re.M)
    used = [cell for cell in cells if "show_explorable(" in cell and "mystnb:" in cell]
    assert scripts == {re.search(r'show_explorable\(\s*"([\w-]+)"', cell)[1] for cell in used}
    assert all(re.search(r"^ +caption:", cell, re.M) for cell in used)
