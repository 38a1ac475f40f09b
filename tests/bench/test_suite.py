"""
The suite: every measure gets its turn, whatever becomes of the others.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, cast

import pytest

from tests.bench import suite
from tests.bench.measure import Figure, Ground, Measure, Scale

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.far_side import FarSide
    from tests.bench.postgres import Databases

FIGURE = Figure(what="drain", who="ours", unit="events/s", rounds=(1,))


async def measured(_: Ground) -> Sequence[Figure]:
    """
    Something.
    """
    return [FIGURE]


async def failing(_: Ground) -> Sequence[Figure]:
    """
    Nothing.
    """
    raise OSError("No space left.")


async def test_a_measure_that_fails_does_not_stop_the_others() -> None:
    """
    The report says of it why.
    """
    complaints: list[str] = []
    ground = Ground(
        databases=cast("Databases", None),
        far_side=cast("FarSide", None),
        contenders=[],
        scale=Scale.short(rounds=1),
        advance=lambda _: None,
        complain=complaints.append,
    )
    measures = [
        Measure(name="one", question="?", run=failing),
        Measure(name="other", question="?", run=measured),
    ]

    taken = [one async for one in suite.run(ground, measures)]

    assert [(one.name, one.failed, list(one.figures)) for one in taken] == [
        ("one", "OSError: No space left.", []),
        ("other", "", [FIGURE]),
    ]
    assert complaints == ["one: OSError: No space left."]


async def test_a_module_that_cannot_be_imported_is_a_measure_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    It is there, by its name, and says why when its turn comes.
    """
    monkeypatch.setattr(suite, "MODULES", ("contender",))  # it has no measures

    [measure] = suite.all_measures()

    assert measure.name == "contender"
    with pytest.raises(AttributeError, match="MEASURES"):
        await measure.run(cast("Ground", None))


def test_measures_are_told_apart_by_their_names() -> None:
    """
    `--only` means one of them.
    """
    names = [one.name for one in suite.all_measures()]

    assert len(set(names)) == len(names)


def test_the_benchmark_needs_nothing_that_its_own_environment_lacks() -> None:
    """
    That environment has the peers, not the tests' tools.
    """
    program = f"""
import sys
sys.modules["pytest"] = None
import tests.bench.__main__
for name in {suite.MODULES!r}:
    __import__(f"tests.bench.{{name}}")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
