"""What must not be overwritten, who may write, and what is said when nobody can."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from rlhf_mini.files import (
    OutputError,
    check_replaceable,
    could_be_hub_name,
    lock_directory,
    name_full_folder,
    output_error,
)


@pytest.mark.parametrize("holds", [None, [], ["mark", "other"]])
def test_nothing_empty_and_our_own_may_be_replaced(tmp_path, holds):
    path = tmp_path / "stage"
    if holds is not None:
        path.mkdir()
    for name in holds or []:
        (path / name).write_text("")
    check_replaceable(path, "mark", "another")


def test_a_folder_of_something_else_may_not(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError) as error:
        check_replaceable(tmp_path, "world.json", "stage.json")
    assert str(error.value) == (
        f"{tmp_path}: holds other files, which would be lost (it has no world.json or stage.json); "
        "move them, or choose another output folder")


def test_nor_may_a_file(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputError, match="file: File exists; there is a file of that name; choose"
                                          " another output folder"):
        check_replaceable(tmp_path / "file", "mark")


LOCK = """
import sys
from rlhf_mini.files import lock_directory
try:
    with lock_directory(sys.argv[1]):
        print("mine")
except ValueError as error:
    print(error)
"""


def test_a_folder_is_locked_for_other_processes_while_it_is_used(tmp_path):
    def other() -> str:
        return subprocess.run([sys.executable, "-c", LOCK, str(tmp_path)], text=True, check=True,
                              capture_output=True).stdout.strip()

    with lock_directory(tmp_path):
        assert other() == (f"{tmp_path}: another process is at work in this folder; wait for its "
                           "end, or choose another output folder")
    assert other() == "mine"
    assert not list(tmp_path.iterdir())  # nothing is left that could lock a later run out


def test_the_lock_ends_when_the_body_raises(tmp_path):
    with pytest.raises(KeyError), lock_directory(tmp_path):
        raise KeyError
    with lock_directory(tmp_path):
        pass


@pytest.mark.parametrize(("error", "words"), [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space"),
    (OSError(errno.EROFS, "Read-only file system"), "Read-only file system; .* make it writable"),
    (SafetensorError("Error while serializing: I/O error: full (os error 28)"), "free some space"),
])
def test_a_full_or_read_only_disk_is_told_with_its_folder(tmp_path, error, words):
    with pytest.raises(OutputError, match=f"cannot write to folder {tmp_path}: .*{words}"), \
            name_full_folder(tmp_path):
        raise error


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "none"),
                                   SafetensorError("invalid header"), ValueError("other")])
def test_other_errors_pass(tmp_path, error):
    with pytest.raises(type(error)) as caught, name_full_folder(tmp_path):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("number", [errno.EEXIST, errno.ENOTDIR])
def test_a_file_in_the_way_needs_no_space(tmp_path, number):
    text = str(output_error(tmp_path, OSError(number, os.strerror(number))))
    assert "there is a file of that name; choose another output folder" in text
    assert "free some space" not in text


@pytest.mark.parametrize(("name", "possible"), [
    ("gpt2", True), ("owner/gpt2-large", True), ("my_model.v2", True), ("./gpt2", False),
    ("/models/gpt2", False), ("a/b/c", False), ("..", False), ("~/gpt2", False), ("", False),
])
def test_names_of_the_hub(name, possible):
    assert could_be_hub_name(name) is possible
