"""A small site with a quiz, for the tests of the directive."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BOOK = Path(__file__).resolve().parents[2] / "book"
CONF = f"""
import sys
sys.path.insert(0, {str(BOOK / "_ext")!r})
extensions = ["myst_nb", "quiz", "sphinx-mathjax-offline"]
html_theme = "sphinx_book_theme"
html_static_path = [{str(BOOK / "_static")!r}]
html_css_files = ["book.css"]
html_favicon = {str(BOOK / "_static" / "favicon.svg")!r}
html_context = {{"default_mode": "auto"}}
mathjax_path = "mathjax/tex-chtml.js"
myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
nb_execution_mode = "off"
suppress_warnings = ["myst-nb.lexer"]
"""
HEAD = "---\nfile_format: mystnb\nkernelspec: {name: python3, display_name: P}\n---\n# A page\n"
GOOD = r"""
1. With $\pi = \rho$, what is `kl`? See [the other page](other.md).

   - ( ) It is $\log 2$ nats.

     That is the divergence of something else.

   - (x) It is 0.

     Equal distributions have divergence 0:

     $$
     \sum_y \pi \log 1 = 0
     $$

   - ( ) It is not defined.

     It is, where both are above 0.

2. What does this print?

   ```python
   print(round(2.5))
   ```

   - (x) 2

     To the [even]{#even} number.

   - ( ) 3

     Not in Python 3.

   - ( ) 2.0

     An integer comes back.

   - ( ) `None`

     That is what `print` returns.

3. Third?

   - ( ) Third wrong one.

     Third why A.

   - ( ) Third wrong two.

     Third why B.

   - (x) Third right.

     Third why C.

4. Fourth?

   - (x) Fourth right.

     Fourth why A.

   - ( ) Fourth wrong
     on two lines.

     Fourth why B,
     on two lines.

   - ( ) Fourth wrong three.

     Fourth why C.
"""
RIGHT = "BACA"  # of the quiz above


def page_of(quiz: str) -> str:
    """A page with a cell and a quiz."""
    return f"{HEAD}\n```{{code-cell}}\n1 + 1\n```\n\n## Quiz\n\n:::{{quiz}}{quiz}:::\n\nLast.\n"


def build(folder: Path, pages: dict[str, str], builder: str = "html") -> tuple[Path, str]:
    """Build pages with the extension; return where they are and what was said."""
    folder.mkdir(exist_ok=True)
    (folder / "conf.py").write_text(CONF)
    tree = "\n```{toctree}\n" + "\n".join(pages) + "\n```\n"
    for name, text in {**pages, "index": "# Index\n" + tree}.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    out = folder / "_build" / builder
    done = subprocess.run([sys.executable, "-m", "sphinx", "-q", "-b", builder, folder, out],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out, done.stderr
