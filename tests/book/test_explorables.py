"""Explorable figures in a real browser: their numbers, their keys, and what is left without them.

A new one enters EXPLORABLES with data, a grid of parameters, and what the package says to them.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("websocket", reason="needs the extra 'book'")

BOOK = Path(__file__).resolve().parents[2] / "book"
sys.path.insert(0, str(Path(__file__).parent))

from browse import WIDE, Browser, find_browser, serve  # noqa: E402

from rlhf_mini.advantages import compute_gae  # noqa: E402
from rlhf_mini.explorable import show_explorable  # noqa: E402
from rlhf_mini.kl import compute_exact_kl  # noqa: E402
from rlhf_mini.notebook import new_figure  # noqa: E402
from rlhf_mini.ppo import policy_loss  # noqa: E402
from rlhf_mini.reward import reward_loss  # noqa: E402

pytestmark = pytest.mark.skipif(find_browser() is None, reason="there is no Chromium")
ALT = "A straight line that rises from 1 to 2."


@dataclass
class Explored:
    """Data as a page would give them, parameters to try, and what must come out.

    `expected(p, data)` returns the entries of the result that are compared, numbers or lists.
    """

    data: dict
    grid: list[dict]
    expected: Callable[[dict, dict], dict]


def grid(**values) -> list[dict]:
    """All combinations of the values."""
    return [dict(zip(values, some, strict=True)) for some in itertools.product(*values.values())]


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- what the package says ---------------------------------------------------------------------


def expected_clip(p: dict, data: dict) -> dict:
    logprob = double([[p["ratio"]]]).log().requires_grad_()
    advantage, real = double([[p["advantage"]]]), torch.ones(1, 1).bool()
    loss, stats = policy_loss(logprob, torch.zeros_like(logprob), advantage, real, p["clip"])
    loss.backward()
    return {"objective": -loss.item(), "gradient": -logprob.grad.item(),
            "binds": stats["clip_fraction"] == 1}


def expected_gae(p: dict, data: dict) -> dict:
    rewards, values = double([data["rewards"]]), double([data["values"]])
    real = torch.ones(rewards.shape).bool()
    advantages, returns = compute_gae(rewards, values, real, p["gamma"], p["lambda"])
    at, left = p["token"] - 1, rewards.shape[1] - p["token"] + 1
    estimates = []
    for n in range(1, left + 1):  # GAE looks n steps ahead where the response is cut after them
        cut = [x[:, at:at + n].clone() for x in (rewards, values)]
        if n < left:  # what the critic says of the rest is paid with the last reward
            cut[0][:, -1] += p["gamma"] * values[0, at + n]
        estimates.append(compute_gae(*cut, real[:, :n], p["gamma"], 1.0)[0][0, 0].item())
    weights = [(1 - p["lambda"]) * p["lambda"] ** k for k in range(left - 1)]
    weights.append(1 - sum(weights))
    mean = sum(w * e for w, e in zip(weights, estimates, strict=True))
    assert math.isclose(mean, advantages[0, at].item(), abs_tol=1e-9)  # of the test itself
    return {"advantages": advantages[0].tolist(), "returns": returns[0].tolist(),
            "estimates": estimates, "weights": weights}


def expected_ranking(p: dict, data: dict) -> dict:
    count = len(data["names"])
    scores = double([[p[f"score{i}"] + p["shift"] for i in range(count)]]).requires_grad_()
    ranks = torch.arange(1, count + 1)[None]
    loss, _ = reward_loss(scores, ranks, torch.ones(1, count).bool())
    loss.backward()
    chances = [[i, j, torch.sigmoid(scores[0, i] - scores[0, j]).item()]
               for i, j in itertools.combinations(range(count), 2)]
    return {"loss": loss.item(), "gradient": scores.grad[0].tolist(), "pairs": chances}


def expected_leash(p: dict, data: dict) -> dict:
    ref, scores = double(data["ref"]), double(data["scores"])
    logits = ref.log() + scores / p["beta"]
    optimum, kl = logits.softmax(-1), compute_exact_kl(logits, ref.log()).item()
    score, value = (optimum @ scores).item(), p["beta"] * logits.logsumexp(-1).item()
    assert math.isclose(score - p["beta"] * kl, value, abs_tol=1e-9)  # of the test itself
    return {"optimum": optimum.tolist(), "kl": kl, "score": score, "objective": value,
            "logZ": value / p["beta"]}


EXPLORABLES = {
    "clip": Explored(
        {}, grid(advantage=[-1.5, -0.1, 0, 0.1, 1], ratio=[0.05, 0.75, 0.7501, 1, 1.25, 1.2501, 2],
                 clip=[0.05, 0.25, 0.5]), expected_clip),
    "gae": Explored(
        {"tokens": [" No", " idea", ".", "EOS"], "rewards": [-0.3, 0.01, -1.2, 2.9],
         "values": [1.7, 2.4, 4.0, 2.3], "lambda": 0.95, "token": 2},
        [{"lambda": lam, "gamma": gamma, "token": token} for lam, gamma, token
         in itertools.product([0, 0.01, 0.95, 1], [0.8, 0.99, 1], [1, 3, 4])], expected_gae),
    "ranking": Explored(
        {"names": ["A", "B", "C", "D"], "scores": [0.5, 1.2, 0, -1]},
        grid(score0=[-3, 0.5, 800], score1=[1.2, -800], score2=[0, 3], score3=[0, -1],
             shift=[0, -2, 1000]), expected_ranking),
    "leash": Explored(
        {"names": ["Yes.", "No.", "Perhaps."], "ref": [0.25, 0.7, 0.05], "scores": [-1, 0.2, 1.3],
         "reached": [[0.5, 0.4, 0.5]]}, grid(beta=[0.002, 0.05, 0.5, 1, 31.6]), expected_leash),
}
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
            f"<article>{shown._repr_html_()}</article>", encoding="utf-8")
    server, address = serve(folder)
    yield address
    server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    one = Browser(find_browser())
    yield one
    one.close()


def wait_for(browser: Browser, script: str) -> None:
    """Wait until a script of the page returns something true."""
    for _ in range(100):
        if browser.evaluate(script):
            return
        time.sleep(0.05)
    raise AssertionError(f"never came: {script}")


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
    elif isinstance(package, bool | str):
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
        browser.open(f"{home}{name}.html")
        found = browser.evaluate("""[...document.querySelectorAll(".explorable > *")].map(
          e => [e.tagName, e.checkVisibility(), e.alt, e.naturalWidth > 0])""")
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert found == [["IMG", True, ALT, True], ["SCRIPT", False, None, False]]


@every
def test_it_fits_a_phone(browser, home, name):
    open_page(browser, home, name, 360)
    assert not browser.evaluate(WIDE)
    outside = browser.evaluate("""(() => {
      const frame = document.querySelector(".explorable-panel").getBoundingClientRect();
      const texts = [...document.querySelectorAll(".explorable-panel svg text")];
      return texts.map(t => [t.textContent, t.getBoundingClientRect()]).filter(
        ([, box]) => box.left < frame.left || box.right > frame.right).map(([text]) => text);
    })()""")
    assert not outside  # of the frame
    small = browser.evaluate("""[...document.querySelectorAll(".explorable-panel svg text")].some(
      t => parseFloat(getComputedStyle(t).fontSize) < 11)""")
    assert not small


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
