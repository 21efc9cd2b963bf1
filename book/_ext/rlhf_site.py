"""Small changes to the site: no Thebe, buttons that point at the clean notebooks, run times."""

from __future__ import annotations

import re
import shutil
from html import escape
from pathlib import Path

from book_forms import sum_minutes
from docutils import nodes
from myst_nb.sphinx_ import NbMetadataCollector
from sphinx.transforms.post_transforms import SphinxPostTransform


class RunTime(nodes.Inline, nodes.Element):
    """Stands for how long the cells of a page took, until the page was run."""


def run_time(role, rawtext, text, lineno, inliner, options=None, content=None):
    """Make {run-time}`page` the seconds that the cells of a page took."""
    return [RunTime(page=text)], []


def exercise_minutes(role, rawtext, text, lineno, inliner, options=None, content=None):
    """Make {exercise-minutes}`page` the sum of the minutes that the page's exercises state."""
    page = Path(inliner.document.settings.env.srcdir) / f"{text}.md"
    return [nodes.Text(str(sum_minutes(page.read_text(encoding="utf-8"))))], []


class FillRunTimes(SphinxPostTransform):
    """Put the measured seconds in."""

    default_priority = 8

    def run(self, **kwargs) -> None:
        for node in list(self.document.findall(RunTime)):
            result = NbMetadataCollector.get_exec_data(self.env, node["page"])
            if not (result and result["runtime"]):
                raise ValueError(f"run-time: the page {node['page']!r} has no cell that was run")
            node.replace_self(nodes.Text(f"{result['runtime']:.0f} seconds"))


class KeepPercentSigns(SphinxPostTransform):
    """Let no line end between a number and its per cent sign."""

    default_priority = 900  # after the numbers of the cells were put in

    def run(self, **kwargs) -> None:
        for text in list(self.document.findall(nodes.Text)):
            if isinstance(text.parent, nodes.literal | nodes.literal_block | nodes.math):
                continue
            kept = re.sub(r"(?<=\d) %", "\u00a0%", str(text))
            if kept.startswith(" %") and text.parent.index(text) > 0:  # a number stands before
                kept = "\u00a0" + kept[1:]
            if kept != str(text):
                text.parent.replace(text, nodes.Text(kept))


def drop_thebe(app, config) -> None:
    """Take out the Thebe scripts, which name another host, and the comments' overlay."""
    for name in ("sphinx_thebe", "sphinx_comments"):
        if name in app.extensions:
            module = app.extensions[name].module.__name__
            for listeners in app.events.listeners.values():
                listeners[:] = [one for one in listeners
                                if not getattr(one.handler, "__module__", "").startswith(module)]
    app.registry.css_files[:] = [f for f in app.registry.css_files if "thebe" not in str(f[0])]


def point_at_notebooks(app, pagename, templatename, context, doctree) -> None:
    """Let the Colab and the download button of a page lead to book/notebooks/PAGE.ipynb."""
    clean = Path(app.srcdir) / "notebooks" / f"{pagename}.ipynb"
    if not clean.exists():
        return
    shipped = Path(app.outdir) / "_sources" / clean.name
    if shipped.exists():
        shutil.copyfile(clean, shipped)
        (shipped.parent / "solutions").mkdir(exist_ok=True)
        shutil.copyfile(clean.parent / "solutions" / clean.name,
                        shipped.parent / "solutions" / clean.name)
    for group in context.get("header_buttons", ()):
        for button in group.get("buttons", ()):
            if "colab" in button.get("url", ""):
                place = button["url"].rpartition("/")[0]
                button["url"] = f"{place}/notebooks/{clean.name}"


def describe(app, pagename, templatename, context, doctree) -> None:
    """Give the page the description of its front matter, for search engines and OpenGraph."""
    meta = context.get("meta") or {}
    if text := meta.get("description"):
        meta.setdefault("og:description", text)
        context["metatags"] = (context.get("metatags", "")
                               + f'<meta name="description" content="{escape(text)}" />\n')


CODE = re.compile(r"(\$[^$]+\$|``[^`]+``|`[^`]+`)")


def markdown_docstring(app, what, name, obj, options, lines) -> None:
    """Turn the package's docstrings, whose `code` and $formulas$ are Markdown's, into reST."""
    def rewrite(part: str) -> str:
        if part.startswith("$"):
            return f":math:`{part.strip('$')}`"
        if part.startswith("`"):
            return f"``{part.strip('`')}``"
        return re.sub(r"(?<=\w)_(?!\w)", r"\_", part.replace("|", r"\|"))

    joined = "\n".join(lines)
    if ">>>" not in joined:
        lines[:] = "".join(map(rewrite, CODE.split(joined))).split("\n")
        return
    head, _, tail = joined.partition(">>>")
    lines[:] = ("".join(map(rewrite, CODE.split(head))) + ">>>" + tail).split("\n")


def setup(app) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_node(RunTime)
    app.add_role("run-time", run_time)
    app.add_role("exercise-minutes", exercise_minutes)
    app.add_post_transform(FillRunTimes)
    app.add_post_transform(KeepPercentSigns)
    app.connect("config-inited", drop_thebe, priority=1)
    app.connect("autodoc-process-docstring", markdown_docstring, priority=100)
    app.connect("html-page-context", describe, priority=100)
    app.connect("html-page-context", point_at_notebooks, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
