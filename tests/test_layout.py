"""Limits that keep the code readable: lengths of files and functions."""

import ast

import pytest

from conftest import ROOT, once

pytestmark = once
MOST_LINES, MOST_OF_FUNCTION = 500, 60  # docstring aside
AT_ROOT = sorted(ROOT.glob("*.py"))
FILES = [*AT_ROOT, *sorted(ROOT.glob("recipe/*.py")), *sorted(ROOT.glob("demo/*.py"))]


def lines_of(function):
    """How many it has, from `def` to its end, but for the docstring."""
    docstring = function.body[0] if ast.get_docstring(function) else None
    lines = function.end_lineno - function.lineno + 1
    return lines - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    source = path.read_text(encoding="utf-8")
    if path in AT_ROOT:
        assert len(source.splitlines()) <= MOST_LINES
    functions = (
        each for each in ast.walk(ast.parse(source)) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert [each.name for each in functions if lines_of(each) > MOST_OF_FUNCTION] == []


def test_lengths_are_counted_without_docstrings():
    (function,) = ast.parse('def f(\n    x,\n):\n    """A\n    b."""\n    return x\n').body
    assert lines_of(function) == 4
