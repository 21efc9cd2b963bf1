"""Plant a known bug in one function of the package, for as long as a block runs."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from types import ModuleType


def module_of(target: str) -> ModuleType:
    """Return the module of "module:function" or "module:Class.method" below rlhf_mini."""
    return importlib.import_module(f"rlhf_mini.{target.partition(':')[0]}")


def source_of(target: str) -> str:
    """Return the source of the module of a target."""
    return Path(module_of(target).__file__).read_text(encoding="utf-8")


def find(target: str, source: str) -> ast.FunctionDef:
    """Return the syntax tree of a target in the source of its module."""
    body = ast.parse(source).body
    *classes, name = target.partition(":")[2].split(".")
    for step in classes:
        body = next(n for n in body if isinstance(n, ast.ClassDef) and n.name == step).body
    return next(n for n in body if isinstance(n, ast.FunctionDef) and n.name == name)


def change(target: str, old: str, new: str) -> str:
    """Return the source of a module in which one piece of one function is changed.

    Args:
        target: the function, "module:function" or "module:Class.method".
        old: what is replaced; occurs exactly once in the function.
        new: what stands there instead.

    Raises:
        LookupError: if `old` does not occur exactly once in the function.
    """
    source = source_of(target)
    node = find(target, source)
    lines = source.splitlines(keepends=True)
    first, last = node.lineno - 1, node.end_lineno
    text = "".join(lines[first:last])
    if (count := text.count(old)) != 1:
        raise LookupError(f"{old!r} occurs {count} times in {target}, expected once")
    return "".join([*lines[:first], text.replace(old, new), *lines[last:]])


@contextlib.contextmanager
def planted(target: str, old: str, new: str) -> Iterator[None]:
    """Run the body with a changed function in place, in every module that imported it.

    The function is compiled anew inside its module, and its code is swapped in place.

    Args:
        target: the function, see `change`.
        old: see `change`.
        new: see `change`.

    Raises:
        LookupError: see `change`.
    """
    module = module_of(target)
    namespace = dict(module.__dict__)
    exec(compile(change(target, old, new), module.__file__, "exec"), namespace)  # our own source
    first, *rest = target.partition(":")[2].split(".")
    right = _plain(reduce(getattr, rest, getattr(module, first)))
    wrong = _plain(reduce(getattr, rest, namespace[first]))
    saved, right.__code__ = right.__code__, wrong.__code__
    try:
        yield
    finally:
        right.__code__ = saved


def _plain(function: Callable) -> Callable:
    """Return the function below classmethod and decorators such as torch.no_grad."""
    return inspect.unwrap(getattr(function, "__func__", function))
