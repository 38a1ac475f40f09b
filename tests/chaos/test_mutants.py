"""
The mutants fit the product, and the hunt tells the caught from the living.
"""

from __future__ import annotations

import ast
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import pytest

from tests.chaos import mutants
from tests.chaos.mutants import MUTANTS, PRODUCT, Copy, Project, WrongCopyError, find, hunt_in
from tests.chaos.mutants_model import Change, Mutant, StaleMutantError, broken
from tests.conftest import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.chaos.mutants_model import Verdict

ALL = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)

NOWHERE = "postgresql://127.0.0.1:9/x"
"""The tiny project has no database."""


@ALL
def test_a_mutant_fits_the_product(mutant: Mutant) -> None:
    """
    What it replaces is there exactly once, what comes out is another program and is Python.
    """
    for path, source in broken(mutant, ROOT).items():
        assert source != path.read_text(encoding="utf-8")


@ALL
def test_the_test_that_catches_a_mutant_exists(mutant: Mutant) -> None:
    """
    By its name in the source; a renamed test would leave its mutant alive.
    """
    file, _, name = mutant.caught_by.partition("::")
    module = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    assert name in {node.name for node in module.body if isinstance(node, functions)}


@ALL
def test_a_mutant_says_what_is_broken(mutant: Mutant) -> None:
    """
    In one sentence, with the invariant that it violates.
    """
    assert mutant.what.endswith(".")
    assert mutant.what.count(". ") == 0
    assert mutant.invariant[0] in "SL"
    assert mutant.invariant[1:].isdigit()


def test_names_are_unique_and_both_packages_are_broken() -> None:
    """
    A verdict names one mutant.
    """
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 24
    files = {change.file.split("/")[0] for mutant in MUTANTS for change in mutant.changes}
    assert files >= {"outbox", "worker"}


def test_mutants_are_found_by_name() -> None:
    """
    In the order asked for; a wrong name is refused.
    """
    first, second = MUTANTS[:2]
    assert find([]) == list(MUTANTS)
    assert find([second.name, first.name]) == [second, first]
    with pytest.raises(mutants.UnknownMutantError, match="nobody"):
        find(["nobody", first.name])


# ---------------------------------------------------------------------------- a tiny project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """
    One function, and a test that holds half of what it does.
    """
    root = tmp_path / "project"
    package = root / "product"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "def double(number):\n    return number * 2\n\ndef name():\n    return 'double'\n"
    )
    (root / "test_product.py").write_text(
        "import sys\n\nimport pytest\n\nfrom product import double\n\n"
        "@pytest.mark.parametrize('number', [0, 3])\n"
        "def test_double(number):\n    assert double(number) == number + number\n\n"
        "def test_alone():\n    assert not double(1) == 2\n"
    )
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\npythonpath = ['.']\n")
    return Project(
        root=root, parts=("product", "test_product.py", "pyproject.toml"), packages=("product",)
    )


def mutant_of(old: str, new: str, *, name: str = "one", test: str = "test_double") -> Mutant:
    """
    The tiny product, broken.
    """
    return Mutant(
        name=name,
        what="Something is broken.",
        invariant="S1",
        caught_by=f"test_product.py::{test}",
        changes=(Change("product/__init__.py", old, new),),
    )


async def test_only_a_failure_of_the_named_test_is_a_catch(project: Project) -> None:
    """
    Not that it passes, cannot be collected, or fails with the unbroken product too; whatever
    happens, the original is as it was and the next mutant meets a whole copy.
    """
    before = (project.root / "product" / "__init__.py").read_text()
    told: list[Verdict] = []

    verdicts = await hunt_in(
        project,
        [
            mutant_of("number * 2", "number * 3", name="caught"),
            mutant_of("'double'", "'triple'", name="irrelevant"),
            mutant_of("def double", "import nothing_of_that_name\n\ndef double", name="broken"),
            mutant_of("number * 2", "number * 3", name="unsound", test="test_alone"),
            mutant_of("number * 2", "number * 2 + 1", name="caught as well"),
        ],
        NOWHERE,
        advance=told.append,
    )

    assert [(one.name, one.caught) for one in verdicts] == [
        ("caught", True),
        ("irrelevant", False),
        ("broken", False),
        ("unsound", False),
        ("caught as well", True),
    ]
    details = {one.name: one.detail for one in verdicts}
    assert details["caught"] == "assert 9 == (3 + 3)"
    assert details["irrelevant"] == "survived: its test passes"
    assert "could not be run (pytest exited with" in details["broken"]
    assert details["unsound"] == "its test does not pass on the unbroken product either"
    assert sorted(told, key=lambda one: one.name) == sorted(verdicts, key=lambda one: one.name)
    assert asdict(verdicts[0])["by"] == "test_product.py::test_double"
    assert (project.root / "product" / "__init__.py").read_text() == before


async def test_a_test_that_does_not_end_catches_nothing(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    It is ended, with all that it started, and said to be what it is.
    """
    monkeypatch.setattr(mutants, "TRY_SECONDS", 2.0)
    endless = mutant_of("return number * 2", "import time; time.sleep(600)")

    [verdict] = await hunt_in(project, [endless], NOWHERE, advance=lambda _: None)

    assert not verdict.caught
    assert verdict.detail == "its test did not end within 2 s"


async def test_a_mutant_that_does_not_fit_stops_the_hunt_at_once(project: Project) -> None:
    """
    The source has moved on: whoever changed it has to change the mutant.
    """
    for stale in (mutant_of("number", "n"), mutant_of("absent", ""), mutant_of("number * 2", "(")):
        with pytest.raises(StaleMutantError, match="one"):
            await hunt_in(project, [stale], NOWHERE, advance=lambda _: None)


async def test_a_copy_that_is_not_the_one_imported_is_refused(
    project: Project, tmp_path: Path
) -> None:
    """
    Mutating what nobody imports would leave every mutant alive, and look like it.
    """
    standard = replace(project, packages=("json",))
    with pytest.raises(WrongCopyError, match="json"):
        await Copy(standard, tmp_path / "copy", NOWHERE).check_imports()


async def test_the_product_is_imported_from_its_copy(tmp_path: Path) -> None:
    """
    Although it is installed, editable, in the same environment.
    """
    copy = Copy(PRODUCT, tmp_path / "copy", NOWHERE)
    await copy.check_imports()
    assert copy.root != ROOT
