"""Write the pages of the book as plain notebooks, for Jupyter and Colab.

    python book/tools/notebooks.py

A page becomes two notebooks: one for students, book/notebooks/NAME.ipynb, with stubs and hints but
no solutions, and one with them, book/notebooks/solutions/NAME.ipynb. A page is MyST Markdown, which
plain Jupyter does not know. Directives become what it does know: cards and admonitions are quotes,
citations are links, labelled equations get a tag, an included function is its source. Code cells
stay as they are.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml
from pybtex.database import parse_file

BOOK = Path(__file__).resolve().parent.parent
sys.path.append(str(BOOK / "_ext"))

from book_forms import as_markdown, sum_minutes  # noqa: E402

OUT = BOOK / "notebooks"
FENCE = re.compile(r"^(?P<mark>`{3,}|:{3,}|~{3,})(?:\{(?P<name>[\w:+-]+)\})?(?P<rest>.*)$")
QUOTES = {"note": "Note", "tip": "Tip", "important": "Important", "warning": "Warning",
          "caution": "Caution", "hint": "Hint", "seealso": "See also", "attention": "Attention",
          "danger": "Danger", "card": "", "admonition": "", "topic": "", "epigraph": "",
          "prf:theorem": "Theorem", "prf:proof": "Proof", "prf:definition": "Definition",
          "prf:lemma": "Lemma", "prf:algorithm": "Algorithm", "prf:example": "Example",
          "prf:remark": "Remark", "prf:proposition": "Proposition", "prf:property": "Property",
          "prf:corollary": "Corollary"}
DROPPED = {"toctree", "tableofcontents", "nb-exec-table", "index", "raw", "contents", "margin-end",
           "exercise-end", "solution-end"}


@dataclass
class Page:
    """What is known of a page while it is rewritten."""

    name: str
    equations: dict[str, int] = field(default_factory=dict)
    cells: list[dict] = field(default_factory=list)
    hidden: bool = False  # inside a solution: its code is folded, or left out
    solutions: bool = True  # whether they are shown


@cache
def config() -> dict:
    """Return the book's settings."""
    return yaml.safe_load((BOOK / "_config.yml").read_text(encoding="utf-8"))


@cache
def references() -> dict:
    """Return the entries of references.bib by key."""
    return dict(parse_file(str(BOOK / "references.bib")).entries)


def pages() -> list[str]:
    """Return the names of the pages that hold code, in the order of the book."""
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))
    names = [c["file"] for part in toc["parts"] for c in part.get("chapters") or ()]
    return [n for n in names if "\n```{code-cell}" in read(n)]


def read(name: str) -> str:
    """Return the text of a page."""
    return (BOOK / f"{name}.md").read_text(encoding="utf-8")


@cache
def title_of(name: str) -> str:
    """Return the title of a page, or its name if it is not written yet."""
    path = BOOK / f"{name}.md"
    found = re.search(r"^# (.+)$", read(name), re.MULTILINE) if path.exists() else None
    return found[1] if found else name


@cache
def page_of(label: str) -> str | None:
    """Return the page that sets a label above a heading or behind an equation, or None."""
    place = re.compile(rf"^\({re.escape(label)}\)=$|^\$\$ *\({re.escape(label)}\)$|"
                       rf"^:label: *{re.escape(label)}$", re.MULTILINE)
    return next((p.stem for p in sorted(BOOK.glob("*.md")) if place.search(read(p.stem))), None)


@cache
def equations_of(name: str) -> dict[str, int]:
    """Return the numbers of a page's labelled equations."""
    labels = re.findall(r"^\$\$ *\(([\w:.-]+)\)$|^`{3,}\{math\}\n:label: *([\w:.-]+)", read(name),
                        re.MULTILINE)
    return {a or b: i for i, (a, b) in enumerate(labels, start=1)}


@cache
def numbered(name: str) -> dict[str, str]:
    """Return what a page calls its named figures and tables, such as "Figure 3", by their names."""
    found = re.findall(r"^ *:?name: *((fig|tab)-[\w-]+)$", read(name), re.MULTILINE)
    words = {"fig": "Figure", "tab": "Table"}
    return {label: f"{words[kind]} {[k for _, k in found[:i + 1]].count(kind)}"
            for i, (label, kind) in enumerate(found)}


def convert(name: str, solutions: bool = False) -> str:
    """Return a page as the text of an .ipynb file, with or without solutions."""
    text = re.sub(r"\A---\n.*?\n---\n", "", read(name), flags=re.DOTALL)
    page = Page(name, solutions=solutions)
    page.equations = equations_of(name)
    package = f"git+{config()['repository']['url']}"
    heading, rest = re.match(r"(\s*(?:\([\w-]+\)=\s*)?# [^\n]+\n)(.*)\Z", text, re.DOTALL).groups()
    _add_markdown(page, _inline(page, heading))
    _add_code(page, "import importlib.util\nimport warnings\n\n"
              "warnings.filterwarnings(\"ignore\", message=\"IProgress not found\")\n"
              "if importlib.util.find_spec(\"rlhf_mini\") is None:  # as on Colab\n"
              f"    %pip install -q {package}")
    _add_markdown(page, "*A name such as `tokens_prompt` in the text stands for a number that is "
                  "printed by a cell nearby, above or below.*" if "{glue:" in text else "")
    _add_blocks(page, rest)
    for number, cell in enumerate(page.cells):
        cell["id"] = f"cell-{number:03}"
    notebook = {
        "cells": page.cells, "nbformat": 4, "nbformat_minor": 5,
        "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python",
                                    "name": "python3"},
                     "language_info": {"name": "python"}}}
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


# ---- blocks ------------------------------------------------------------------------------------


@dataclass
class Block:
    """A run of plain lines (name None), or a fenced directive."""

    name: str | None
    title: str = ""
    options: dict[str, str] = field(default_factory=dict)
    body: str = ""


def split_blocks(text: str) -> Iterator[Block]:
    """Yield the directives of a text and the plain text between them."""
    lines, plain, i = text.split("\n"), [], 0
    while i < len(lines):
        found = FENCE.match(lines[i])
        if not found:
            plain.append(lines[i])
            i += 1
            continue
        end = next((j for j in range(i + 1, len(lines))
                    if re.fullmatch(rf"{found['mark'][0]}{{{len(found['mark'])},}}",
                                    lines[j].rstrip())), len(lines))
        if found["name"]:
            if plain:
                yield Block(None, body="\n".join(plain))
                plain = []
            options, body = _split_options(lines[i + 1:end])
            yield Block(found["name"], found["rest"].strip(), options, "\n".join(body))
        else:
            plain += lines[i:end + 1]
        i = end + 1
    if plain:
        yield Block(None, body="\n".join(plain))


def _split_options(lines: list[str]) -> tuple[dict, list[str]]:
    if lines and lines[0] == "---":
        end = lines.index("---", 1)
        return yaml.safe_load("\n".join(lines[1:end])) or {}, lines[end + 1:]
    options = {}
    while lines and (found := re.match(r":([\w-]+):\s*(.*)$", lines[0])):
        options[found[1]], lines = found[2], lines[1:]
    return options, lines


def _add_blocks(page: Page, text: str) -> None:
    """Turn a text into cells: code cells as they are, all else as Markdown."""
    prose: list[str] = []
    for block in split_blocks(text):
        if not page.solutions and (page.hidden or _tells(block)):
            if not page.hidden:
                prose.append("*The solution is in the notebook "
                             f"[solutions/{page.name}.ipynb](solutions/{page.name}.ipynb).*")
            page.hidden = block.name == "solution-start" or (
                page.hidden and block.name != "solution-end")
        elif block.name == "code-cell":
            _add_markdown(page, "\n\n".join(prose))
            prose = []
            _add_code(page, block.body, block.options)
        else:
            prose.append(_render(page, block))
    _add_markdown(page, "\n\n".join(prose))


def _tells(block: Block) -> bool:
    """Whether a block is what a student should not see before trying."""
    return block.name in ("solution", "solution-start") or (
        block.name == "dropdown" and block.title == "Answers")


def _add_markdown(page: Page, text: str) -> None:
    for part in re.split(r"^\+\+\+.*$", text, flags=re.MULTILINE):
        if part := re.sub(r"\n{3,}", "\n\n", part).strip():
            page.cells.append({"cell_type": "markdown", "metadata": {}, "source": _lines(part)})


def _add_code(page: Page, code: str, options: dict | None = None) -> None:
    options = options or {}
    metadata: dict = {}
    tags = options.get("tags", [])
    if isinstance(tags, str):
        tags = yaml.safe_load(tags)
    if page.hidden or {"hide-input", "hide-cell", "remove-input", "remove-cell"} & set(tags):
        metadata = {"jupyter": {"source_hidden": True}, "cellView": "form"}
    page.cells.append({"cell_type": "code", "execution_count": None, "metadata": metadata,
                       "outputs": [], "source": _lines(code.strip())})
    figure = ((options.get("mystnb") or {}).get("figure") or {})
    if caption := figure.get("caption"):
        label = numbered(page.name).get(figure.get("name"), "")
        _add_markdown(page, f"*{label}{': ' if label else ''}{_inline(page, caption.strip())}*")


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def _nested(page: Page, text: str) -> str:
    return "\n\n".join(_render(page, block) for block in split_blocks(text)).strip()


def _quote(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))


def _render(page: Page, block: Block) -> str:
    """Return a block as plain Markdown."""
    name, title = block.name, _inline(page, block.title)
    if name is None:
        return _inline(page, block.body)
    if name in DROPPED:
        page.hidden = page.hidden and name != "solution-end"
        return "***" if name == "solution-end" else ""
    if name == "bibliography":
        return "\n".join(f"- {_cite(key)}" for key in cited(read(page.name)))
    if name in ("exercise", "exercise-start"):
        return f"### Exercise: {title.strip('()') or 'your turn'}\n\n{_nested(page, block.body)}"
    if name in ("solution", "solution-start"):
        page.hidden = name == "solution-start"
        return ("### Solution\n\nTry first; the code below is folded.\n\n" if page.hidden
                else "") + _folded(page, "Solution", block.body, fold=not page.hidden)
    if name in QUOTES:
        words = f"{QUOTES[name]}: {title}" if QUOTES[name] and title else QUOTES[name] or title
        body = _nested(page, block.body.replace("\n^^^\n", "\n\n").replace("\n+++\n", "\n\n"))
        if "dropdown" in block.options.get("class", ""):
            return _folded(page, words, block.body)
        return _quote(f"**{words}**\n\n{body}" if words else body)
    if name == "dropdown":
        return _folded(page, title or "More", block.body)
    if name in ("figure", "image"):
        caption = _nested(page, block.body)
        up = "../../" if page.solutions else "../"
        picture = f"![{block.options.get('alt', '')}]({up}{block.title})"
        label = numbered(page.name).get(block.options.get("name"), "")
        return picture + (f"\n\n*{label}{': ' if label else ''}{caption}*" if caption else "")
    if name == "literalinclude":
        return _source(block)
    if name == "math":
        return _equation(page, block.body, block.options.get("label"))
    if name == "list-table":
        label = numbered(page.name).get(block.options.get("name"), "")
        return (f"**{label}{': ' if label and title else ''}{title}**\n\n" if label or title
                else "") + _list_table(page, block.body)
    if name in ("table", "csv-table", "grid", "grid-item", "grid-item-card",
                "tab-set", "tab-item", "div", "margin", "sidebar", "container"):
        return (f"**{title}**\n\n" if title and name != "grid" else "") + _nested(page, block.body)
    if name == "quiz":
        return _nested(page, as_markdown(block.body))
    if name in ("code-block", "code", "sourcecode"):
        return f"```{block.title}\n{block.body}\n```"
    raise ValueError(f"{page.name}.md: no plain Markdown is known for the directive {{{name}}}; "
                     "add it to book/tools/notebooks.py")


def _list_table(page: Page, body: str) -> str:
    rows = [[_inline(page, cell.strip().replace("\n", " "))
             for cell in re.split(r"^[* ] -(?: |$)", row, flags=re.MULTILINE)[1:]]
            for row in re.split(r"^(?=\* - )", body, flags=re.MULTILINE) if row.strip()]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _folded(page: Page, title: str, body: str, fold: bool = True) -> str:
    text = _nested(page, body)
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>" if fold else text


def _source(block: Block) -> str:
    path = (BOOK / block.title).resolve()
    source = path.read_text(encoding="utf-8")
    if wanted := block.options.get("pyobject"):
        body = ast.parse(source).body
        for part in wanted.split("."):
            node = next(n for n in body if getattr(n, "name", None) == part)
            body = getattr(node, "body", [])
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        source = textwrap.dedent("\n".join(source.split("\n")[first - 1:node.end_lineno]))
    elif lines := block.options.get("lines"):
        first, _, last = lines.partition("-")
        source = "\n".join(source.split("\n")[int(first) - 1:int(last or first)])
    where = path.relative_to(BOOK.parent).as_posix()
    return f"`{where}`:\n\n```python\n{source.rstrip()}\n```"


def _equation(page: Page, body: str, label: str | None) -> str:
    tag = f" \\tag{{{page.equations[label]}}}" if label else ""
    return f"$$\n{body.strip()}{tag}\n$$"


# ---- inline ------------------------------------------------------------------------------------


def cited(text: str) -> list[str]:
    """Return the keys that a text cites, in order, each once."""
    keys = [k.strip() for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text)
            for k in keys.split(",")]
    return list(dict.fromkeys(keys))


def _cite(key: str, with_title: bool = True) -> str:
    if key not in references():
        raise ValueError(f"references.bib has no entry {key!r}")
    entry = references()[key]
    people = [" ".join(p.last_names).strip("{}") for p in entry.persons.get("author", [])]
    who = people[0] if len(people) == 1 else (
        f"{people[0]} and {people[1]}" if len(people) == 2 else f"{people[0]} et al.")
    name = f"{who} {entry.fields['year']}"
    url = entry.fields.get("url") or (f"https://arxiv.org/abs/{entry.fields['eprint']}"
                                      if "eprint" in entry.fields else "")
    link = f"[{name}]({url})" if url else name
    return f"{link}: {entry.fields['title'].replace('{', '').replace('}', '')}" if with_title \
        else link


def _inline(page: Page, text: str) -> str:
    """Rewrite roles, targets, labels and links of a text, but not those inside code."""
    kept: list[str] = []

    def hide(found: re.Match) -> str:
        if found["role"]:
            return found[0]
        kept.append(found[0])
        return f"\0{len(kept) - 1}\0"

    text = re.sub(r"^```.*?^```|(?P<role>\{[\w:.+-]+\}`[^`]+`)|``.+?``|`[^`\n]+`", hide, text,
                  flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\0(\d+)\0", lambda m: kept[int(m[1])], _rewrite(page, text))


def _rewrite(page: Page, text: str) -> str:
    text = text.replace("**Try.**", "**Try**, on the site, where this figure has controls.")
    text = re.sub(r"^\([\w:.-]+\)=\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^%.*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^(?![-*>] |[:| ])(.+)\n: +", r"- \1: ", text, flags=re.MULTILINE)
    text = re.sub(r"^\$\$\n(.*?)\n\$\$ *\(([\w:.-]+)\)$",
                  lambda m: _equation(page, m[1], m[2]), text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\{([\w:.+-]+)\}`([^`]+)`", lambda m: _role(page, m[1], m[2]), text)
    text = re.sub(r"\]\(([\w-]+)\.md(#[\w-]+)?\)", r"](\1.ipynb)", text)
    text = re.sub(r"\[\]\(([\w-]+)\.ipynb\)", lambda m: f"[{title_of(m[1])}]({m[1]}.ipynb)", text)
    return re.sub(r"(?<=\S)\{[.#][A-Za-z][\w .#-]*\}", "", text)


def _role(page: Page, role: str, text: str) -> str:
    shown, target = (re.fullmatch(r"(.*?)\s*<([^<>]*)>", text, re.DOTALL) or
                     re.fullmatch(r"(()?.*)", text, re.DOTALL)).groups()
    if role.startswith("cite"):
        links = ", ".join(_cite(key.strip(), with_title=False) for key in text.split(","))
        return links if role == "cite:t" else f"({links})"
    if role.startswith("glue"):
        return f"`{text.partition(':')[0]}`"  # printed by the cell that computed it
    if role == "run-time":
        return "at most 3 minutes"
    if role == "exercise-minutes":
        return str(sum_minutes(read(text)))
    if role == "eq":
        if text in page.equations:
            return f"({page.equations[text]})"
        home = page_of(text)
        return f"[equation ({equations_of(home)[text]}) of *{title_of(home)}*]({home}.ipynb)"
    if role == "doc":
        name = (target or shown).lstrip("/")
        return f"[{shown if target else title_of(name)}]({name}.ipynb)"
    if role == "numref" and not target:
        if shown in numbered(page.name):
            return numbered(page.name)[shown]
        home = next(p for p in pages() if shown in numbered(p))
        return f"[{numbered(home)[shown]} of *{title_of(home)}*]({home}.ipynb)"
    if role == "ref" and (home := page_of(target or shown)):
        return f"[{shown if target else title_of(home)}]({home}.ipynb)"
    if role in ("numref", "ref", "prf:ref"):
        return shown if target else f"*{shown}*"
    if role.startswith("py:") or role in ("func", "class", "mod", "meth", "file", "command"):
        return f"`{(target and shown) or text.lstrip('~')}`"
    if role in ("term", "abbr", "sub", "sup", "download", "kbd", "math"):
        return f"${text}$" if role == "math" else shown
    raise ValueError(f"{page.name}.md: no plain Markdown is known for the role {{{role}}}; add it "
                     "to book/tools/notebooks.py")


def main() -> None:
    """Write all notebooks and remove those of pages that are gone."""
    for folder, solutions in ((OUT, False), (OUT / "solutions", True)):
        folder.mkdir(exist_ok=True)
        for path in folder.glob("*.ipynb"):
            if path.stem not in pages():
                path.unlink()
        for name in pages():
            (folder / f"{name}.ipynb").write_text(convert(name, solutions), encoding="utf-8")
            print((folder / f"{name}.ipynb").relative_to(BOOK.parent))


if __name__ == "__main__":
    main()
