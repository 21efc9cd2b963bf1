"""A figure that the site makes explorable: sliders and a drawing where there is a script.

What is drawn, and from which numbers, stands in `book/_static/explorables/NAME.js`.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from html import escape
from typing import Any

from matplotlib.figure import Figure

from rlhf_mini.notebook import show_figure

DIGITS = 6  # significant ones: more than a picture can show, few enough for a small page


class Explorable:
    """A picture with data: as HTML for the site, as PNG for print, as text elsewhere."""

    def __init__(self, html: str, png: bytes, text: str):
        self.html, self.png, self.text = html, png, text

    def _repr_html_(self) -> str:
        return self.html

    def _repr_png_(self) -> bytes:
        return self.png

    def __repr__(self) -> str:
        return self.text


def show_explorable(name: str, data: Mapping[str, Any], figure: Figure, text: str) -> Explorable:
    """Return a figure that readers of the site can explore, as a cell shows it.

    Without the site's script the picture is what is seen. The caption is the cell's, as for other
    figures.

    Args:
        name: of the script, `book/_static/explorables/NAME.js`.
        data: what the script draws from: texts, numbers, tensors, and lists and dicts of them.
        figure: the picture, with the sliders where they start.
        text: alt text of the picture, shapes and trends.

    Raises:
        ValueError: if a number is not finite.
    """
    png, width = show_figure(figure)._repr_png_()
    numbers = json.dumps(_plain(data, name), ensure_ascii=False, separators=(",", ":"))
    numbers = numbers.replace("<", "\\u003c")  # a text may hold </script>
    picture = base64.b64encode(png).decode()
    return Explorable(
        f'<div class="explorable" data-explorable="{escape(name)}">'
        f'<img src="data:image/png;base64,{picture}" alt="{escape(text)}" width="{width["width"]}">'
        f'<script type="application/json">{numbers}</script></div>', png, text)


def _plain(value: Any, name: str) -> Any:
    """Return a value as JSON knows it, numbers rounded."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {str(key): _plain(part, f"{name}.{key}") for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, name) for part in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"show_explorable: {name} holds {value}; expected a finite number")
        rounded = float(f"{value:.{DIGITS}g}")
        return int(rounded) if rounded.is_integer() else rounded
    return value
