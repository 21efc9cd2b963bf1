"""A figure with data: what a notebook shows of it, with the site's script and without."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser

import pytest
import torch
from run_folders import ATTACK

from rlhf_mini.explorable import show_explorable
from rlhf_mini.notebook import new_figure


class Parts(HTMLParser):
    """The tags of an HTML text, and what stands inside its scripts."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags[-1][0] == "script":
            self.scripts.append(data)


def shown(data, text="A line that rises from 1 to 2.", name="clip"):
    figure, axes = new_figure()
    axes.plot([1, 2])
    return show_explorable(name, data, figure, text)


def test_a_cell_shows_the_picture_and_keeps_the_numbers():
    one = shown({"values": torch.tensor([0.25, 1.0]), "names": ("a", "b"), "beta": 0.5})
    parts = Parts(one._repr_html_())
    assert [tag for tag, _ in parts.tags] == ["div", "img", "script"]
    outside, image, script = (attributes for _, attributes in parts.tags)
    assert outside["data-explorable"] == "clip" and script["type"] == "application/json"
    assert image["alt"] == "A line that rises from 1 to 2." == repr(one)
    kind, _, picture = image["src"].partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(picture) == one._repr_png_()
    assert one._repr_png_().startswith(b"\x89PNG") and image["width"] == "480"
    assert json.loads("".join(parts.scripts)) == {
        "values": [0.25, 1], "names": ["a", "b"], "beta": 0.5}


def test_numbers_are_short():
    numbers = {"x": [1 / 3, -2e-9 / 3, 2.0, 123456789.0], "n": 123456789, "yes": True}
    html = shown(numbers)._repr_html_()
    assert '{"x":[0.333333,-6.66667e-10,2,123457000],"n":123456789,"yes":true}' in html


def test_what_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match=r"clip\.scores holds nan; expected a finite number"):
        shown({"scores": [torch.tensor(float("nan"))]})


@pytest.mark.parametrize("text", [ATTACK, "</script><b>", 'a "quote" & more'])
def test_texts_stay_texts(text):
    parts = Parts(shown({"tokens": [text]}, text)._repr_html_())
    assert [tag for tag, _ in parts.tags] == ["div", "img", "script"]
    assert parts.tags[1][1]["alt"] == text
    assert json.loads("".join(parts.scripts)) == {"tokens": [text]}
