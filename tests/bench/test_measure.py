"""
Turns: who is measured when, and what happens when one fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from tests.bench.contenders.bare import BareHttp
from tests.bench.measure import FAILURES, Ground, Scale
from tests.bench.processes import ProcessFailedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.bench.contender import Contender
    from tests.bench.far_side import FarSide
    from tests.bench.postgres import Databases

ONE, OTHER = BareHttp(name="one", library="httpx"), BareHttp(name="other", library="aiohttp")


class Noted:
    """
    A ground that notes what it is told.
    """

    def __init__(self, *, rounds: int) -> None:
        self.done: list[str] = []
        self.complaints: list[str] = []
        self.ground = Ground(
            databases=cast("Databases", None),
            far_side=cast("FarSide", None),
            contenders=[ONE, OTHER],
            scale=Scale.short(rounds=rounds),
            advance=self.done.append,
            complain=self.complaints.append,
        )


async def test_contenders_take_turns_and_nobody_is_always_first() -> None:
    """
    Inside each round everybody is measured once.
    """
    order: list[str] = []

    async def turn(contender: Contender) -> Mapping[str, float]:
        order.append(contender.name)
        return {"events/s": len(order)}

    figures = await Noted(rounds=3).ground.in_turns("drain", [ONE, OTHER], turn)

    assert order == ["one", "other", "other", "one", "one", "other"]
    assert [(one.who, tuple(one.rounds), one.median) for one in figures] == [
        ("one", (1, 4, 5), 4),
        ("other", (2, 3, 6), 3),
    ]


async def test_one_that_fails_does_not_stop_the_others() -> None:
    """
    It is tried again a little, then left out, and what it said is kept.
    """
    noted = Noted(rounds=5)
    tried: list[str] = []

    async def turn(contender: Contender) -> Mapping[str, float]:
        tried.append(contender.name)
        if contender is ONE:
            raise ProcessFailedError("It ended with 78: no such setting.")
        return {"events/s": 10}

    failed, measured = await noted.ground.in_turns("drain", [ONE, OTHER], turn)

    assert (tried.count("one"), tried.count("other")) == (FAILURES, 5)
    assert (failed.median, failed.failed) == (None, "It ended with 78: no such setting.")
    assert measured.median == 10
    assert len(noted.done) == 10
    assert noted.complaints == ["drain: one: It ended with 78: no such setting."] * FAILURES


async def test_a_failed_round_leaves_a_gap() -> None:
    """
    So that the rounds of two contenders stay side by side.
    """
    calls: list[str] = []

    async def turn(contender: Contender) -> Mapping[str, float]:
        calls.append(contender.name)
        if calls.count("one") == 2 and contender is ONE:
            raise ZeroDivisionError("by nothing")
        return {"events/s": 1}

    figure, _ = await Noted(rounds=3).ground.in_turns("drain", [ONE, OTHER], turn)

    assert tuple(figure.rounds) == (1, None, 1)
    assert figure.failed == "ZeroDivisionError: by nothing"


@pytest.mark.parametrize("scale", [Scale.full(rounds=5), Scale.short(rounds=1)])
def test_every_run_covers_ten_requests_at_once_and_a_single_client(scale: Scale) -> None:
    """
    Quick or not, so that a quick run says something about most goals.
    """
    assert 10 in scale.concurrencies
    assert 1 in scale.clients
