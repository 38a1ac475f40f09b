"""
The report: what people read, and what a program reads.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.bench.goals import Bound, Goal
from tests.bench.measure import Figure, Ground, Measure, Scale
from tests.bench.report import Report, Taken, number, write

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

WHAT = "single PATCH, 0 ms, concurrency 10"
RATE = "events/s"


def figure(who: str, *rounds: float | None, failed: str = "") -> Figure:
    """
    Of one setting.
    """
    return Figure(what=WHAT, who=who, unit=RATE, rounds=rounds, failed=failed)


def report(*figures: Figure, failed: str = "") -> Report:
    """
    Of one measure with one goal.
    """

    async def run(_: Ground) -> Sequence[Figure]:
        return figures

    bound = Bound(factor=1.6, whom=("pgqueuer",), called="best Python peer")
    measure = Measure(
        name="drain",
        question="How fast?",
        run=run,
        goals=[Goal(what=WHAT, unit=RATE, bounds=[bound])],
    )
    return Report(
        machine={"machine": "2 cores"},
        scale=Scale.full(rounds=2),
        taken=[Taken.of(measure, figures, seconds=1, failed=failed)],
        absent={"pg-boss": "Node is not here"},
    )


def test_a_goal_stands_beside_what_was_measured() -> None:
    """
    In words, with the ratio and with what it was compared with.
    """
    lines = report(figure("ours", 1200, 1000), figure("pgqueuer", 600, 500)).summary().splitlines()

    assert (
        f"| {WHAT}, events/s: ours ≥ 1.6 × best Python peer"
        " | 1,100 events/s | pgqueuer: 550 | 2.00 | met |"
    ) in lines


def test_every_round_is_there_and_a_failed_one_too() -> None:
    """
    A median alone hides how far apart the rounds were.
    """
    text = report(figure("ours", 1200, None, failed="It hung.\nFor long.")).summary()

    assert "| ours | 1,200 | 1,200, – |" in text
    assert f"- failed, {WHAT}: ours: It hung. For long." in text


def test_who_did_not_take_part_is_named_with_the_reason() -> None:
    """
    Nobody is left out silently, and no measure either.
    """
    text = report(failed="OSError: no").summary()

    assert "- pg-boss did not take part: Node is not here" in text
    assert "- drain: OSError: no" in text
    assert "not measured: no part of this run" in text


def test_a_program_reads_the_same(tmp_path: Path) -> None:
    """
    Figures with all rounds, and verdicts.
    """
    write(report(figure("ours", 1200, 1000), figure("pgqueuer", 600, 500)), tmp_path / "new")

    document = json.loads((tmp_path / "new" / "report.json").read_text())
    [taken] = document["taken"]
    assert taken["figures"][0]["rounds"] == [1200, 1000]
    assert [one["verdict"] for one in taken["judgements"]] == ["met"]
    assert (tmp_path / "new" / "report.md").read_text().startswith("# ")


@pytest.mark.parametrize(
    ("value", "written"),
    [(12345.6, "12,346"), (99.94, "99.9"), (0.5678, "0.568"), (-0.0123, "-0.0123"), (0, "0")],
)
def test_a_number_has_three_digits_that_matter(value: float, written: str) -> None:
    """
    What is noise is not written.
    """
    assert number(value) == written
