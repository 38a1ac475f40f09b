"""
The gate: one row that keeps every process away from a destination.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

import pytest

from outbox import gate
from tests.integration.outbox_builders import DESTINATION, Outbox

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine


@pytest.fixture
def outbox(engine: AsyncEngine) -> Outbox:
    """
    An empty outbox.
    """
    return Outbox(engine)


async def test_a_gate_that_nobody_closed_is_open(outbox: Outbox) -> None:
    """
    No row is needed for the usual case.
    """
    assert await outbox.gate() == gate.OPEN
    assert not await outbox.probe()
    assert not await outbox.open_gate()


async def test_a_closed_gate_says_why_by_whom_and_until_when(outbox: Outbox) -> None:
    """
    Whoever looks can tell a person what is going on.
    """
    assert await outbox.close_gate("throttled", seconds=30)

    closed = await outbox.gate()
    assert (closed.state, closed.reason, closed.closed_by) == ("closed", "throttled", "a relay")
    assert closed.message == "closed for throttled"
    assert 25 < closed.seconds <= 30
    assert closed.closed_until is not None


async def test_a_gate_of_another_organisation_or_destination_is_another_gate(
    outbox: Outbox,
) -> None:
    """
    An outage at one tenant closes nothing for another.
    """
    await outbox.close_gate()

    neighbour = Outbox(outbox.engine)
    assert (await neighbour.gate()).state == "open"
    async with outbox.engine.connect() as connection:
        other = await gate.look(
            connection, destination="bufdir", organization_id=outbox.organization_id
        )
    assert other.state == "open"
    assert DESTINATION != "bufdir"


async def test_a_wait_that_was_asked_for_ends_open(outbox: Outbox) -> None:
    """
    After a Retry-After everybody may go on at once; nothing has to be proved.
    """
    await outbox.close_gate("throttled", seconds=30)

    await outbox.pass_time(31)

    assert (await outbox.gate()).state == "open"
    assert not await outbox.probe()


@pytest.mark.parametrize("reason", ["outage", "configuration"])
async def test_a_gate_that_tripped_ends_half_open(outbox: Outbox, reason: str) -> None:
    """
    After an outage one event goes ahead to see.
    """
    await outbox.close_gate(reason, seconds=5)
    assert not await outbox.probe()

    await outbox.pass_time(6)

    assert (await outbox.gate()).state == "half-open"


async def test_one_of_two_processes_gets_the_probe(outbox: Outbox) -> None:
    """
    A recovering destination is met by one request, not by one per process.
    """
    await outbox.half_open_gate()

    async def ask(connection: AsyncConnection) -> UUID | None:
        got = await gate.probe(connection, **outbox.where, seconds=10)
        await connection.commit()
        return got

    async with outbox.engine.connect() as one, outbox.engine.connect() as other:
        answers = await asyncio.gather(ask(one), ask(other))

    assert sorted(token is not None for token in answers) == [False, True]
    assert (await outbox.gate()).state == "closed"


async def test_the_probe_of_a_process_that_died_frees_itself(outbox: Outbox) -> None:
    """
    Nobody has to notice the death: after the probe's time another process may try.
    """
    await outbox.half_open_gate()
    assert await outbox.probe()
    assert not await outbox.probe()

    await outbox.pass_time(11)

    assert (await outbox.gate()).state == "half-open"
    assert await outbox.probe()


async def test_a_failed_probe_does_not_wait_for_its_own_time(outbox: Outbox) -> None:
    """
    The closing that a probe causes counts from its failure; the time of the probe is dropped.
    """
    await outbox.half_open_gate()
    token = await outbox.probe(seconds=600)

    assert await outbox.close_gate("outage", seconds=5, longest_seconds=60, probe=token)

    assert 5 < (await outbox.gate()).seconds <= 10


async def test_each_closing_in_a_row_lasts_twice_as_long(outbox: Outbox) -> None:
    """
    Doubled up to the longest, however often it goes on.
    """
    lasted: list[float] = []
    for _ in range(30):
        assert await outbox.close_gate("outage", seconds=5, longest_seconds=60)
        lasted.append(round((await outbox.gate()).seconds, -1 if len(lasted) > 3 else 0))
        await outbox.pass_time(61)

    assert lasted == [5, 10, 20, 40, *[60] * 26]


async def test_a_gate_that_was_open_in_between_starts_from_the_beginning(outbox: Outbox) -> None:
    """
    Only closings in a row grow.
    """
    for _ in range(4):
        await outbox.close_gate("outage", seconds=5, longest_seconds=60)
        await outbox.pass_time(61)
    await outbox.open_gate()

    await outbox.close_gate("outage", seconds=5, longest_seconds=60)

    assert 3 < (await outbox.gate()).seconds <= 5


async def test_one_outage_seen_by_many_is_one_closing(outbox: Outbox) -> None:
    """
    Eight processes that trip together do not double the wait eight times.
    """
    closed = await asyncio.gather(
        *[outbox.close_gate("outage", seconds=5, longest_seconds=60) for _ in range(8)]
    )

    assert sum(closed) == 1
    assert (await outbox.gate()).seconds <= 5


@pytest.mark.parametrize(("asked", "lasts"), [(300, 300), (1, 60)])
async def test_a_wait_that_was_asked_for_only_prolongs(
    outbox: Outbox, asked: float, lasts: float
) -> None:
    """
    Whoever asked for the longest absence gets it.
    """
    await outbox.close_gate("outage", seconds=60)

    await outbox.close_gate("throttled", seconds=asked)

    assert lasts - 5 < (await outbox.gate()).seconds <= lasts


async def test_a_wait_that_was_asked_for_does_not_double(outbox: Outbox) -> None:
    """
    The destination knows for how long; asking three times is not a row of outages.
    """
    for _ in range(3):
        await outbox.close_gate("throttled", seconds=30)
        assert 25 < (await outbox.gate()).seconds <= 30
        await outbox.pass_time(31)


async def test_an_outage_does_not_shorten_the_wait_that_was_asked_for(outbox: Outbox) -> None:
    """
    A breaker that trips meanwhile changes nothing.
    """
    await outbox.close_gate("throttled", seconds=300)

    assert not await outbox.close_gate("outage", seconds=5)

    closed = await outbox.gate()
    assert closed.reason == "throttled"
    assert closed.seconds > 290


# ------------------------------------------------------------------------------ by hand


async def test_a_gate_closed_by_hand_stays_closed(outbox: Outbox) -> None:
    """
    It has no end of its own, and says who closed it.
    """
    await outbox.close_gate_by_hand()
    await outbox.pass_time(10**9)

    closed = await outbox.gate()
    assert (closed.state, closed.reason) == ("closed", "operator")
    assert (closed.message, closed.closed_by) == ("maintenance", "an operator")
    assert closed.seconds == math.inf
    assert closed.closed_until is None


@pytest.mark.parametrize("reason", ["throttled", "outage", "configuration"])
async def test_nothing_automatic_changes_what_a_person_closed(
    outbox: Outbox,
    reason: Any,  # noqa: ANN401
) -> None:
    """
    Neither an outage nor a Retry-After gives a pause by hand an end, nor does a recovery.
    """
    await outbox.close_gate_by_hand()

    assert not await outbox.close_gate(reason, seconds=1)
    assert not await outbox.open_gate("throttled", "outage", "configuration")
    assert not await outbox.probe()

    closed = await outbox.gate()
    assert (closed.reason, closed.seconds) == ("operator", math.inf)


@pytest.mark.parametrize("reason", ["throttled", "outage", "configuration"])
async def test_a_pause_by_hand_during_a_probe_outlives_it(
    outbox: Outbox,
    reason: Any,  # noqa: ANN401
) -> None:
    """
    An operator closes the gate while a probe is under way; the probe fails, and the pause
    still has no end.
    """
    await outbox.half_open_gate()
    token = await outbox.probe()
    await outbox.close_gate_by_hand()

    await outbox.close_gate(reason, seconds=5, probe=token)

    closed = await outbox.gate()
    assert (closed.reason, closed.seconds) == ("operator", math.inf)


async def test_a_wait_asked_for_during_a_probe_outlives_it(outbox: Outbox) -> None:
    """
    A flight from before is told to keep away for five minutes while a probe is under way; the
    failing probe does not bring the next request forward.
    """
    await outbox.half_open_gate()
    token = await outbox.probe()
    await outbox.close_gate("throttled", seconds=300)

    await outbox.close_gate("outage", seconds=5, probe=token)

    assert (await outbox.gate()).seconds > 290


async def test_a_person_takes_over_what_closed_by_itself(outbox: Outbox) -> None:
    """
    Closing by hand works at any time, and opening it again leaves nothing half-open.
    """
    await outbox.close_gate("outage", seconds=5)
    await outbox.close_gate_by_hand()
    assert (await outbox.gate()).reason == "operator"

    assert await outbox.open_gate()

    assert (await outbox.gate()).state == "open"
    assert not await outbox.open_gate()


@pytest.mark.parametrize("reason", ["throttled", "outage", "configuration"])
async def test_opening_for_a_reason_opens_nothing_else(
    outbox: Outbox,
    reason: Any,  # noqa: ANN401
) -> None:
    """
    Whoever mended the set-up opens what the set-up closed.
    """
    await outbox.close_gate(reason, seconds=60)
    others = [one for one in gate.ALL_REASONS if one != reason]

    assert not await outbox.open_gate(*others)
    assert (await outbox.gate()).state == "closed"
    assert await outbox.open_gate(reason)
    assert (await outbox.gate()).state == "open"


async def test_a_half_open_gate_can_be_opened(outbox: Outbox) -> None:
    """
    A recovery opens it for everybody, and the next closing is a first one again.
    """
    await outbox.half_open_gate()

    assert await outbox.open_gate("outage")

    assert (await outbox.gate()).state == "open"
    await outbox.close_gate("outage", seconds=5, longest_seconds=60)
    assert (await outbox.gate()).seconds <= 5
