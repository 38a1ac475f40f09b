"""
Draining: how many events a turn gets, and which turns count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest
from typing_extensions import override

from tests.bench import drain
from tests.bench.contenders.bare import BareHttp
from tests.bench.drain import CPU, RATE, Moment, single
from tests.bench.measure import Ground, Scale
from tests.bench.processes import ProcessFailedError

if TYPE_CHECKING:
    from tests.bench.far_side import FarSide
    from tests.bench.postgres import Databases

WANTED = Scale.full(rounds=1).drain_seconds

BARE = BareHttp(name="bare:aiohttp", library="aiohttp")


class Counter:
    """
    A far side at which so many have arrived.
    """

    def __init__(self, arrived: int) -> None:
        self._arrived = arrived

    def counted(self) -> dict[str, int]:
        """
        What it is asked for.
        """
        return {"updates": self._arrived}


class Keeper(BareHttp):
    """
    A contender that has so many events left.
    """

    def __init__(self, left: int) -> None:
        super().__init__(name="keeper", library="aiohttp")
        self._left = left

    @override
    def left(self, database_url: str) -> int:
        """
        What it is asked for.
        """
        return self._left


def ground(far_side: object = None) -> Ground:
    """
    With nothing but a far side.
    """
    return Ground(
        databases=cast("Databases", None),
        far_side=cast("FarSide", far_side),
        contenders=[],
        scale=Scale.full(rounds=1),
        advance=lambda _: None,
        complain=lambda _: None,
    )


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """
    The events of each turn, with a worker that does 20,000 a second for 0.05 CPU ms each.
    """
    taken: list[int] = []

    async def take(_: object, __: object, ___: object, events: int) -> tuple[Moment, Moment]:
        taken.append(events)
        warm = min(events, round(20_000 * drain.WARM_SECONDS))
        counted = min(events - warm, round(20_000 * WANTED))
        return moment(warm), moment(warm + counted)

    def moment(arrived: int) -> Moment:
        seconds = arrived / 20_000
        return Moment(
            arrived=arrived, seconds=50 + seconds, since_first=seconds, cpu=arrived * 5e-5
        )

    monkeypatch.setattr(drain, "_drain", take)
    return taken


async def test_a_turn_that_was_too_short_is_taken_again_with_more_events(turns: list[int]) -> None:
    """
    And the next round knows how many it takes.
    """
    here = ground()
    setting = single(10)

    measured = await drain.drain(here, setting, BARE)

    assert measured == pytest.approx({RATE: 20_000, CPU: 0.05})
    assert len(turns) > 1
    assert turns == sorted(turns)
    turns.clear()
    await drain.drain(here, setting, BARE)
    assert turns == [pytest.approx(20_000 * (drain.WARM_SECONDS + WANTED) * drain.SPARE, rel=0.01)]


async def test_another_setting_begins_with_what_is_known(turns: list[int]) -> None:
    """
    Not so when the far side takes its time, which changes everything.
    """
    here = ground()
    await drain.drain(here, single(10), BARE)

    turns.clear()
    await drain.drain(here, single(50), BARE)
    assert len(turns) == 1

    turns.clear()
    await drain.drain(here, single(50, latency_ms=50), BARE)
    assert len(turns) > 1


async def test_what_arrived_has_to_be_durably_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A worker that kept in mind what it sent would send it again after a crash.
    """
    monkeypatch.setattr(drain, "DURABLE_SECONDS", 0.0)
    here = ground(Counter(arrived=90))
    check: Any = drain._must_be_durable

    await check(here, Keeper(left=10), "postgresql://", 100)
    with pytest.raises(ProcessFailedError, match="90 of 100 events arrived, but 11 are not"):
        await check(here, Keeper(left=11), "postgresql://", 100)
