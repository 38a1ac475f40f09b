"""
Calls that are carried out together, and know nothing of each other.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.conftest import until
from worker.gathering import Gathering

if TYPE_CHECKING:
    from collections.abc import Sequence

FOREVER = 3600.0


class Work:
    """
    Doubles numbers, refuses odd ones, and can be held up.
    """

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.held = asyncio.Event()
        self.held.set()
        self.broken: Exception | None = None

    async def __call__(self, items: Sequence[int]) -> Sequence[int | Exception]:
        """
        One result each.
        """
        self.calls.append(list(items))
        await self.held.wait()
        if self.broken:
            raise self.broken
        return [ValueError(str(item)) if item % 2 else 2 * item for item in items]


@pytest.fixture
async def work() -> Work:
    """
    Work that is ready.
    """
    return Work()


async def test_calls_of_one_moment_are_one_call(work: Work) -> None:
    """
    And each has its own result.
    """
    gathering = Gathering(work, most=10, seconds=0)

    assert await asyncio.gather(*[gathering(number) for number in (2, 4, 6)]) == [4, 8, 12]
    assert work.calls == [[2, 4, 6]]


async def test_as_many_as_fit_do_not_wait_for_others(work: Work) -> None:
    """
    A full call goes at once, the rest when its time has come.
    """
    gathering = Gathering(work, most=2, seconds=FOREVER)

    assert await asyncio.gather(*[gathering(number) for number in (2, 4)]) == [4, 8]
    assert work.calls == [[2, 4]]


async def test_one_that_fails_fails_alone(work: Work) -> None:
    """
    Its neighbours do not hear of it.
    """
    gathering = Gathering(work, most=10, seconds=0)

    two, three = await asyncio.gather(gathering(2), gathering(3), return_exceptions=True)

    assert two == 4
    assert isinstance(three, ValueError)


async def test_what_fails_as_a_whole_fails_for_everybody(work: Work) -> None:
    """
    Nobody waits for ever.
    """
    work.broken = OSError("away")
    gathering = Gathering(work, most=10, seconds=0)

    answers = await asyncio.gather(gathering(2), gathering(4), return_exceptions=True)

    assert [type(answer) for answer in answers] == [OSError, OSError]


async def test_who_gave_up_before_it_began_is_left_out(work: Work) -> None:
    """
    Nothing is done for nobody.
    """
    gathering = Gathering(work, most=2, seconds=FOREVER)
    given_up = asyncio.create_task(gathering(2))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)

    assert await gathering(4) == 8
    assert work.calls == [[4]]


async def test_who_gives_up_meanwhile_does_not_end_it_for_the_others(work: Work) -> None:
    """
    A deadline is one's own.
    """
    work.held.clear()
    gathering = Gathering(work, most=2, seconds=FOREVER)
    given_up, patient = (asyncio.create_task(gathering(number)) for number in (2, 4))
    await until(lambda: work.calls)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)

    work.held.set()

    assert await patient == 8


async def test_closing_ends_what_is_under_way(work: Work) -> None:
    """
    And leaves no task behind.
    """
    work.held.clear()
    gathering = Gathering(work, most=1, seconds=0)
    call = asyncio.create_task(gathering(2))
    await until(lambda: work.calls)

    await gathering.aclose()

    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert asyncio.all_tasks() == {asyncio.current_task()}
