"""Files that are there as a whole or not at all: JSON, checkpoints, fingerprints of contents.

Everything is written beside its place and moved in by a rename, so a stage that is killed leaves
either the old file or the new one, never half of one. Used through `rlhf_mini.runtime`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or made with something else."""


class OutputError(ValueError):
    """A folder or file that cannot be written."""


def fingerprint(*objects: Any) -> str:
    """Return the sha256 (64 hex digits) of the objects' contents.

    Args:
        *objects: a `Path` stands for the bytes of that file, or of all files below that folder but
            hidden ones; a dataclass for its fields; anything else for its JSON with sorted keys.
    """
    digest = hashlib.sha256()
    for item in objects:
        if isinstance(item, Path):
            files = [item] if item.is_file() else sorted(
                p for p in item.rglob("*") if p.is_file()
                and not any(part.startswith(".") for part in p.relative_to(item).parts))
            parts = [[p.relative_to(item).as_posix(), file_sha256(p)] for p in files]
            if not item.exists():
                raise ValueError(f"{item}: no such file or folder")
        else:
            is_record = dataclasses.is_dataclass(item) and not isinstance(item, type)
            parts = dataclasses.asdict(item) if is_record else item
        digest.update(json.dumps(parts, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 (64 hex digits) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_IN_THE_WAY = {errno.EEXIST, errno.ENOTDIR}


def output_error(folder: Path, error: Exception) -> OutputError:
    """Return the `OutputError` that names the folder and why it cannot be written."""
    reason = getattr(error, "strerror", None) or str(error)
    remedy = ("there is a file of that name;" if getattr(error, "errno", 0) in _IN_THE_WAY
              else "free some space there, make it writable, or")
    return OutputError(f"cannot write to folder {folder}: {reason}; {remedy} choose another output "
                       "folder")


@contextlib.contextmanager
def name_full_folder(folder: Path) -> Iterator[None]:
    """Turn the error of a library that met a full or read-only disk into an `OutputError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", 0) in _FULL or "os error" in str(error):
            raise output_error(folder, error) from error
        raise


@contextlib.contextmanager
def lock_directory(path: Path) -> Iterator[None]:
    """Keep other processes that ask for the same folder out of it; the lock ends with the process.

    Raises:
        OutputError: if another process has it.
    """
    descriptor = os.open(path, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise OutputError(f"{path}: another process is at work in this folder; wait for its end, "
                          "or choose another output folder") from error
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        if fcntl:
            os.close(descriptor)


def check_replaceable(path: str | Path, *marks: str) -> None:
    """Refuse to replace what we did not write.

    Args:
        path: a folder that is about to be replaced as a whole.
        marks: files of which it must hold one, unless it is empty or not there.

    Raises:
        OutputError: if it is a file, or a folder of something else.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise output_error(path, FileExistsError(errno.EEXIST, "File exists"))
    if path.is_dir() and any(path.iterdir()) and not any((path / m).is_file() for m in marks):
        raise OutputError(f"{path}: holds other files, which would be lost (it has no "
                          f"{' or '.join(marks)}); move them, or choose another output folder")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) so that it is there as a whole or not at all; make its folder.

    Raises:
        OutputError: if the folder cannot be written or is full; an older file is then untouched.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise output_error(path.parent, error) from error


@contextlib.contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success it takes the place of `path` as a whole.

    If the body raises, `path` is as it was. If the process dies, `recover_directory` puts it right.

    Raises:
        OutputError: if the place cannot be written or is full.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        recover_directory(path)
        partial.mkdir()
    except OSError as error:
        raise output_error(path.parent, error) from error
    try:
        with name_full_folder(path.parent):
            yield partial
            replace_directory(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replace_directory(complete: Path, path: str | Path) -> None:
    """Move a complete folder, which lies beside `path`, into the place of `path`."""
    path = Path(path)
    for item in [*complete.rglob("*"), complete]:
        _sync(item)
    complete.rename(path.with_name(f".{path.name}.ready"))
    recover_directory(path)


def recover_directory(path: str | Path) -> bool:
    """Finish or undo what a killed `atomic_directory(path)` left behind.

    Returns:
        Whether the folder `path` is there. Ask this, not `path.exists()`, before you resume.
    """
    path = Path(path)
    partial, ready, old = (path.with_name(f".{path.name}.{word}")
                           for word in ("partial", "ready", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    if ready.exists():  # complete: only the swap is missing
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        ready.rename(path)
        _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)
    return path.is_dir()


def could_be_hub_name(name: str) -> bool:
    """Say whether a name that is no file or folder may be one of the Hugging Face hub.

    >>> could_be_hub_name("gpt2"), could_be_hub_name("owner/gpt2"), could_be_hub_name("./gpt2")
    (True, True, False)
    """
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name))


def write_json(path: str | Path, obj: Any) -> None:
    """Write JSON with sorted keys, indented, atomically. A NaN is an error (ValueError)."""
    try:
        text = json.dumps(obj, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be written as JSON: {error}") from error
    atomic_write(path, text + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: naming file and line, if it is missing or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def save_checkpoint(directory: str | Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """Write a checkpoint folder: `tensors.safetensors` and `checkpoint.json` with checksums.

    Args:
        directory: replaced as a whole if it exists; a crash leaves the old one in place.
        tensors: any names, dtypes and shapes; no two may share memory (`pack_state` sees to it).
        meta: JSON; numbers (infinity and NaN too) come back bit for bit, tuples as lists.

    Raises:
        OutputError: if the folder cannot be written or is full.
    """
    with atomic_directory(directory) as folder:
        safetensors.torch.save_file(tensors, folder / "tensors.safetensors")
        meta = json.loads(json.dumps(meta))  # as it will be read: no tuples, text keys
        record = {"meta": meta, "meta_sha256": fingerprint(meta),
                  "tensors_sha256": file_sha256(folder / "tensors.safetensors")}
        text = json.dumps(record, sort_keys=True, indent=1)
        atomic_write(folder / "checkpoint.json", text + "\n")


def load_checkpoint(directory: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Read a folder that `save_checkpoint` wrote.

    Returns:
        The tensors, on the CPU, and the meta data.

    Raises:
        CheckpointError: if there is none, or if a byte of it is missing or changed.
    """
    if not recover_directory(directory):
        raise CheckpointError(f"there is no checkpoint in {directory}")
    file = Path(directory) / "tensors.safetensors"
    try:
        record = read_json(Path(directory) / "checkpoint.json")
        if fingerprint(record["meta"]) != record["meta_sha256"]:
            raise ValueError("checkpoint.json was changed (its checksum differs)")
        if file_sha256(file) != record["tensors_sha256"]:
            raise ValueError(f"{file.name} was changed or cut short (its checksum differs)")
        return safetensors.torch.load_file(file), record["meta"]
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"checkpoint {directory} is damaged: {why}; "
                              "delete it to start the stage again") from error
