"""
Where claims go on in a backlog.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from outbox.cursor import Cursor
from outbox.store import START, Claimed, Position

HERE = Position(priority=0, available_at=datetime(2026, 11, 24, tzinfo=UTC), id=10)
FURTHER = HERE._replace(id=20)


class Clock:
    """
    Monotonic seconds that pass when they are told to.
    """

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """
        The time.
        """
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """
    The clock that cursors go by.
    """
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def claimed(number: int, last: Position, *, overtaken: int = 0) -> Claimed:
    """
    What a claim of so many events found.
    """
    events = cast("Any", [None] * number)
    return Claimed(gate="open", events=events, last=last, due=number + overtaken)


def test_a_claim_goes_on_after_a_full_one(clock: Clock) -> None:
    """
    As long as claims are full there is a backlog.
    """
    cursor = Cursor()
    assert cursor.begin() == START
    clock.now += 0.001
    assert not cursor.move(claimed(5, HERE), wanted=5)
    assert cursor.begin() == HERE
    assert not cursor.move(claimed(5, FURTHER), wanted=5)
    assert cursor.begin() == FURTHER


def test_a_claim_from_the_start_that_is_short_has_seen_everything(clock: Clock) -> None:
    """
    Nothing is looked for at once.
    """
    cursor = Cursor()
    cursor.begin()
    assert not cursor.move(claimed(4, HERE), wanted=5)
    assert cursor.begin() == START


def test_a_claim_from_the_middle_that_is_short_asks_for_one_from_the_start(clock: Clock) -> None:
    """
    What came in before its place is not left lying.
    """
    cursor = Cursor()
    cursor.begin()
    clock.now += 0.001
    cursor.move(claimed(5, HERE), wanted=5)
    cursor.begin()
    assert cursor.move(claimed(4, FURTHER), wanted=5)
    assert cursor.begin() == START


def test_a_claim_that_was_overtaken_is_followed_by_another(clock: Clock) -> None:
    """
    What changed while it was claimed is due, though this claim has seen everything.
    """
    cursor = Cursor()
    cursor.begin()
    assert cursor.move(claimed(3, HERE, overtaken=1), wanted=5)
    assert cursor.begin() == START


def test_a_full_claim_that_was_overtaken_goes_on(clock: Clock) -> None:
    """
    What was left is found by the next look at everything, which comes before any end.
    """
    cursor = Cursor()
    cursor.begin()
    clock.now += 0.001
    assert not cursor.move(claimed(4, HERE, overtaken=1), wanted=5)
    assert cursor.begin() == HERE
    assert cursor.move(claimed(2, FURTHER), wanted=5)
    assert cursor.begin() == START


@pytest.mark.parametrize("seconds", [0.0001, 0.1])
def test_in_a_backlog_a_fiftieth_of_the_time_goes_into_looking_at_everything(
    clock: Clock, seconds: float
) -> None:
    """
    The longer it takes, the less often.
    """
    cursor = Cursor()
    cursor.begin()
    clock.now += seconds
    cursor.move(claimed(5, HERE), wanted=5)

    clock.now += 49 * seconds
    assert cursor.begin() == HERE
    clock.now += 2 * seconds
    assert cursor.begin() == START
