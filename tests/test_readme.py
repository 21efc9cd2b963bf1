"""The README: its commands exist, its numbers are the recorded ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rlhf_mini.__main__ import build_parser
from rlhf_mini.config import load_preset, override

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^ {4}(?:for .* do )?(rlhf-mini [a-z][^#;\n]*)",
                      README.replace("\\\n", ""), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_the_flags_they_show(command):
    words = shlex.split(command.replace("$((seed - 3))", "0").replace("$seed", "1"))[1:]
    args = build_parser().parse_args(words)
    override(load_preset(getattr(args, "preset", "cpu")), getattr(args, "assignments", []))


def test_there_are_commands():
    assert len(COMMANDS) >= 6


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links), links


def test_numbers_are_the_recorded_ones():
    block = README.split("<!-- recorded: begin -->")[1].split("<!-- recorded: end -->")[0]
    rows = [line for line in block.splitlines() if line.startswith("|")]
    recorded = ROOT / "data" / "recorded" / "seeds"
    known = {line for name in ("seeds.md", "samples.md")
             for line in (recorded / name).read_text(encoding="utf-8").splitlines()}
    assert len(rows) > 20 and set(rows) <= known
