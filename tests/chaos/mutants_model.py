"""
What a mutant is, and what became of it.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Change:
    """
    One replacement in a source file.

    Args:
        file: from the root of the project.
        old: occurs exactly once in it.
    """

    file: str
    old: str
    new: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """
    The product, broken on purpose in one way.

    Args:
        what: what is broken, in one sentence.
        invariant: that it violates.
        caught_by: id of the test that has to fail.
    """

    name: str
    what: str
    invariant: str
    caught_by: str
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """
    What became of a mutant.

    Args:
        by: the test that had to fail.
        detail: how the test failed, or why the mutant counts as alive.
    """

    name: str
    what: str
    invariant: str
    caught: bool
    by: str
    seconds: float
    detail: str


class StaleMutantError(Exception):
    """
    The source has moved on, and a mutant does not fit it any more.
    """


def broken(mutant: Mutant, root: Path) -> Mapping[Path, str]:
    """
    The sources of the files that a mutant changes, broken.

    Raises:
        StaleMutantError: a text to be replaced is not there exactly once, or what comes out
            is no Python.
    """
    sources: dict[Path, str] = {}
    for change in mutant.changes:
        path = root / change.file
        source = sources.get(path) or path.read_text(encoding="utf-8")
        if (times := source.count(change.old)) != 1:
            raise StaleMutantError(
                f"{mutant.name}: {change.file} has this text {times} times:\n{change.old}"
            )
        sources[path] = source.replace(change.old, change.new)
    for path, source in sources.items():
        try:
            ast.parse(source)
        except SyntaxError as error:
            raise StaleMutantError(f"{mutant.name}: {path.name} is no Python: {error}") from None
    return sources
