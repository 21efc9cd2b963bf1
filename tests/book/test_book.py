"""The pages of the book: their form, their commands, their notebooks, and the built site."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from rlhf_mini.__main__ import build_parser
from rlhf_mini.config import load_preset, override

for needed in ("yaml", "pybtex", "websocket"):
    pytest.importorskip(needed, reason="needs the extra 'book'")

ROOT = Path(__file__).resolve().parents[2]
BOOK, SITE = ROOT / "book", ROOT / "book" / "_build" / "html"
sys.path[:0] = [str(BOOK / "tools"), str(Path(__file__).parent)]

import commands as printed  # noqa: E402
import notebooks  # noqa: E402

PAGES = sorted(BOOK.glob("*.md"))
CHAPTERS = notebooks.pages()
CODE = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def cells_in(text: str) -> list[str]:
    """The code of the cells of a text, without their options."""
    options = re.compile(r"\A(---\n.*?\n---\n|(:[\w-]+:[^\n]*\n)+)", re.DOTALL)
    return [options.sub("", cell) for cell in CODE.findall(text)]


def cells_of(name: str) -> list[str]:
    """The code of a page's cells, without their options."""
    return cells_in(notebooks.read(name))


@pytest.mark.parametrize("page", CHAPTERS)
def test_code_cells_are_short_and_narrow(page):
    for cell in cells_of(page):
        lines = cell.strip().split("\n")
        assert len(lines) <= 15, cell
        assert max(map(len, lines)) <= 88, cell


@pytest.mark.parametrize("page", CHAPTERS)
def test_chapters_are_mostly_prose(page):
    cells = json.loads(notebooks.convert(page))["cells"]
    text = re.sub(r"^```.*?^```$|^---\n.*?^---$", "", notebooks.read(page),
                  flags=re.MULTILINE | re.DOTALL)
    assert len(cells) > 10 or not page[:2].isdigit()  # an appendix may be short
    assert len(text.split()) > sum(len(cell.split()) for cell in cells_of(page))


@pytest.mark.parametrize("page", CHAPTERS)
def test_figures_have_caption_and_alt_text(page):
    for block in CODE.findall(notebooks.read(page)):
        if "show_figure(" in block and "remove-output" not in block:
            assert re.search(r"^ +caption:", block, re.MULTILINE), block
            assert re.search(r"^ +alt: .{30}", block, re.MULTILINE), block
            assert "progress(" not in block  # the bar would become a second figure


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_pages_describe_themselves(page):
    if page.stem != "CONTRIBUTING":
        assert re.search(r'\A---\n(?:.*\n)*?description: ".{20,200}"\n', page.read_text("utf-8"))


def commands() -> list[str]:
    """Every `rlhf-mini ...` that a page prints."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", "")
        found += re.findall(r"^ *(?:\$ )?(?:for .* do )?(rlhf-mini [a-z][^#;\n]*)", text,
                            re.MULTILINE)
    return found


@pytest.mark.parametrize("command", commands())
def test_commands_have_the_flags_they_show(command):
    args = build_parser().parse_args(shlex.split(command.replace("$seed", "1"))[1:])
    override(load_preset(getattr(args, "preset", "cpu")), getattr(args, "assignments", []))


def test_there_are_commands():
    assert commands()


def test_printed_commands_are_found_in_all_their_forms():  # tests/book/commands.py runs them
    page = ("Say:\n\n    make run  # all\n    pip list\n\n    a word of quoted text\n\n"
            "```console\n$ rlhf-mini run \\\n    --seed 1\n```\n\nor `make book`, `python`.\n")
    assert printed.blocks_of(page) == [
        "make run  # all\npip list", "rlhf-mini run \\\n    --seed 1", "make book"]
    found = " ".join(block for _, block in printed.printed_commands()).replace("\\\n", "").split()
    assert all(" ".join(command.split()) in " ".join(found) for command in commands())


# ---- the notebooks -----------------------------------------------------------------------------


@pytest.mark.parametrize("solutions", [False, True])
def test_notebooks_are_in_step_with_the_pages(solutions):
    folder = notebooks.OUT / "solutions" if solutions else notebooks.OUT
    assert {p.stem for p in folder.glob("*.ipynb")} == set(CHAPTERS)
    for name in CHAPTERS:
        there = (folder / f"{name}.ipynb").read_text(encoding="utf-8")
        assert there == notebooks.convert(name, solutions), f"{name}: run `make notebooks`"


@pytest.mark.parametrize("solutions", [False, True])
@pytest.mark.parametrize("page", CHAPTERS)
def test_notebooks_hold_all_code_and_no_directive(page, solutions):
    cells = json.loads(notebooks.convert(page, solutions))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    assert "git+https://" in code[0] and all(c["cell_type"] == "markdown" or not c["outputs"]
                                             for c in cells)
    text = notebooks.read(page)
    if not solutions:
        text = re.sub(r"^`{3,4}\{solution-start.*?^`{3,4}\{solution-end\}", "", text,
                      flags=re.MULTILINE | re.DOTALL)
    assert code[1:] == [c.strip() for c in cells_in(text)]
    prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    prose = re.sub(r"^```.*?^```$", "", prose, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"\{[\w:-]+\}`|^:{3,}|^`{3,}\{|^\([\w-]+\)=", prose, re.MULTILINE)
    assert ("<summary>Answers" in prose) <= solutions and ("### Solution" in prose) <= solutions


def test_no_cell_of_a_student_needs_a_solution(tmp_path):
    for page in CHAPTERS:
        cells = json.loads(notebooks.convert(page))["cells"][1:]
        code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        (tmp_path / f"{page}.py").write_text("\n\n".join(code[1:]), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", tmp_path],
        capture_output=True, text=True)  # F821: a name that is nowhere defined
    assert done.returncode == 0, done.stdout


def test_directives_become_markdown():
    page = notebooks.Page("03-tokens", {"eq-a": 4})
    blocks = list(notebooks.split_blocks(":::{note}\nSee {eq}`eq-a` and `{eq}` here.\n:::\nplain"))
    assert [notebooks._render(page, b) for b in blocks] == [
        "> **Note**\n>\n> See (4) and `{eq}` here.", "plain"]
    assert notebooks._inline(page, "By {eq}`eq-optimum` it is.") == (
        "By [equation (10) of *The KL leash*](08-kl.ipynb) it is.")
    table = notebooks.Block("list-table", "", {}, "* - a\n  -\n  - c\n* - d\n  - e\n  - f")
    assert notebooks._render(page, table) == "| a |  | c |\n|---|---|---|\n| d | e | f |"
    with pytest.raises(ValueError, match="no plain Markdown is known for the directive {mermaid}"):
        notebooks._render(page, notebooks.Block("mermaid"))


# ---- the site, if it was built -----------------------------------------------------------------

built = pytest.mark.skipif(not (SITE / "index.html").exists(), reason="`make book` was not run")


@built
def test_no_script_or_style_comes_from_another_host():
    foreign = re.compile(
        r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=\"(?:https?:)?//[^\"]*\"[^>]*>"
        r"|@import[^;]*//|unpkg\.com|jsdelivr|cdnjs")
    for page in SITE.glob("*.html"):
        found = [f for f in foreign.findall(page.read_text(encoding="utf-8"))
                 if 'rel="canonical"' not in f]
        assert not found, (page.name, found)


class Links(HTMLParser):
    """The targets and the links of a page."""

    def __init__(self, page: Path):
        super().__init__()
        self.ids, self.links = set(), set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids |= {values.get("id"), values.get("name")} - {None}
        for name in ("href", "src"):
            if name in values:
                self.links.add(values[name])


@built
def test_links_between_pages_lead_somewhere():
    pages = {page.name: Links(page) for page in SITE.glob("*.html")}
    broken = []
    for name, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = pages.get(url.path or name)
            fragment = unquote(url.fragment)
            there = target or (SITE / unquote(url.path)).exists()
            if not there or (target and fragment and fragment not in target.ids):
                broken.append((name, link))
    assert not broken and len(pages) > 20


@built
def test_pages_are_described_for_link_previews():
    for page in CHAPTERS:
        text = (SITE / f"{page}.html").read_text(encoding="utf-8")
        assert all(f'property="og:{name}"' in text for name in (
            "title", "type", "url", "site_name", "description", "image", "image:alt"))
        assert 'rel="icon"' in text or 'rel="shortcut icon"' in text
