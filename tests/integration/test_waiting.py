"""
Waiting for the portal: the change is saved first, and its fate is told within bounds.
"""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Literal
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from outbox import (
    Delivered,
    Destination,
    PermanentError,
    Relay,
    RetryPolicy,
    TransientError,
)
from outbox.outcome import Dead, Settlement
from tests.conftest import until
from tests.factories import NEXT_YEAR, TODAY
from worker.certifications import DynamicsSyncException, confirmations, visibility
from worker.certifications.confirmations import wait_for
from worker.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from outbox import Event
    from tests.factories import Mentor, World
    from worker.certifications.confirmations import Progress

LONG = 15.0
"""More than any of these has to wait: it ends by the event, not by the clock."""


@asynccontextmanager
async def relaying(world: World, *answers: Callable[[], None]) -> AsyncIterator[list[Event]]:
    """
    A relay whose destination gives these answers, then confirms; yields what was sent.
    """
    sent: list[Event] = []
    left = list(answers)

    async def deliver(event: Event, _seconds: float) -> Delivered:
        sent.append(event)
        if left:
            left.pop(0)()
        return Delivered()

    async def redrive(_limit: int | None) -> int:
        return 0

    relay = Relay(
        world.engine,
        Destination(
            name=visibility.DESTINATION,
            organization_id=world.hlf,
            deliver=deliver,
            record=confirmations.record,
            redrive=redrive,
            policy=RetryPolicy(max_attempts=2, window_seconds=60),
            breaker_keys=100,
        ),
        poll_seconds=0.02,
    )
    running = asyncio.create_task(relay.run(grace_seconds=5))
    try:
        yield sent
    finally:
        relay.stop()
        await running


def missing() -> None:
    """
    Dynamics has no record of the mentor.
    """
    raise PermanentError("record_missing", "Dynamics has no such record.")


def unavailable() -> None:
    """
    Dynamics does not answer for the moment.
    """
    raise TransientError("http_503", "Dynamics did not answer.")


async def hidden(world: World) -> tuple[Mentor, int]:
    """
    A mentor who is to be hidden, and the version that says so.
    """
    mentor = await world.mentor()
    done = await world.certifications.expire(mentor.certification_id, today=TODAY)
    assert done is not None
    return mentor, done.version


async def wait(
    world: World, mentor: Mentor, version: int, *, seconds: float = LONG
) -> tuple[Progress, str | None]:
    """
    Wait for a version, but never until the test's own end.
    """
    async with asyncio.timeout(LONG + 5):
        return await wait_for(world.engine, mentor_id=mentor.id, version=version, seconds=seconds)


async def confirm(world: World, mentor: Mentor, version: int) -> None:
    """
    What the worker writes when Dynamics acknowledged a version.
    """
    await world.execute("DELETE FROM outbox.events")
    await world.execute(
        "INSERT INTO public.portal_confirmations (mentor_id, organization_id, visible, version)"
        " VALUES (:id, :organization, false, :version)",
        id=mentor.id,
        organization=world.hlf,
        version=version,
    )


# -------------------------------------------------------------------------- wait_for


async def test_what_was_delivered_before_the_waiting_began_is_seen(world: World) -> None:
    """
    No wake-up can be missed, because rows are attempted at.
    """
    mentor, version = await hidden(world)
    await confirm(world, mentor, version)

    assert await wait(world, mentor, version) == ("delivered", None)


async def test_what_is_delivered_during_the_waiting_is_seen(world: World) -> None:
    """
    The waiting ends when the confirmation comes, not when the time is over.
    """
    mentor, version = await hidden(world)
    waiting = asyncio.create_task(wait(world, mentor, version))
    attempted = asyncio.Event()

    async with relaying(world, attempted.set):
        assert await waiting == ("delivered", None)

    assert attempted.is_set()


async def test_a_newer_confirmed_version_counts(world: World) -> None:
    """
    The portal shows something later than what was asked for, so that has been overtaken.
    """
    mentor, version = await hidden(world)
    await confirm(world, mentor, version + 5)

    assert await wait(world, mentor, version) == ("delivered", None)


async def test_an_older_confirmed_version_does_not_count(world: World) -> None:
    """
    That the portal once agreed says nothing about now.
    """
    mentor, version = await hidden(world)
    await world.execute(
        "INSERT INTO public.portal_confirmations (mentor_id, organization_id, visible, version)"
        " VALUES (:id, :organization, true, :version)",
        id=mentor.id,
        organization=world.hlf,
        version=version,
    )

    assert await wait(world, mentor, version + 1, seconds=0.05) == ("pending", None)


async def test_what_is_still_waiting_at_the_end_is_pending(world: World) -> None:
    """
    With no worker about, the time runs out and no sooner.
    """
    mentor, version = await hidden(world)
    began = time.monotonic()

    assert await wait(world, mentor, version, seconds=0.2) == ("pending", None)

    assert 0.2 <= time.monotonic() - began < 5


async def test_what_is_pending_after_a_failed_attempt_says_why(world: World) -> None:
    """
    The code of the last attempt comes along.
    """
    mentor, version = await hidden(world)
    await world.execute("UPDATE outbox.events SET last_error_code = 'http_503'")

    assert await wait(world, mentor, version, seconds=0) == ("pending", "http_503")


async def test_what_is_dead_has_failed_at_once(world: World) -> None:
    """
    Nobody waits for an event that is given up.
    """
    mentor, version = await hidden(world)
    await world.execute("DELETE FROM outbox.events")
    async with world.engine.begin() as connection:
        await confirmations.record(
            connection,
            [
                Settlement(
                    event_id=1,
                    destination=visibility.DESTINATION,
                    key=str(mentor.id),
                    organization_id=world.hlf,
                    version=version,
                    payload={"visible": False},
                    outcome=Dead(code="record_missing", message="Gone."),
                    ending="dead",
                    retries=0,
                )
            ],
        )

    assert await wait(world, mentor, version) == ("failed", "record_missing")


async def test_another_mentors_confirmation_does_not_count(world: World) -> None:
    """
    Versions are counted for each mentor.
    """
    mentor, version = await hidden(world)
    other = await world.mentor()
    await world.execute(
        "INSERT INTO public.portal_confirmations (mentor_id, organization_id, visible, version)"
        " VALUES (:id, :organization, false, 99)",
        id=other.id,
        organization=world.hlf,
    )

    assert await wait(world, mentor, version, seconds=0) == ("pending", None)


# ------------------------------------------------------------- transitions that wait


@pytest.mark.parametrize("seconds", [-1, -0.001, 15.001, 3600, math.nan, math.inf])
async def test_nobody_waits_longer_than_a_person_would(world: World, seconds: float) -> None:
    """
    Outside 0 to 15 seconds the request is refused before anything is changed.
    """
    mentor = await world.mentor()

    with pytest.raises(UsageError, match="0 to 15 seconds"):
        await world.certifications.renew(
            mentor.certification_id, NEXT_YEAR, today=TODAY, wait_seconds=seconds
        )
    with pytest.raises(UsageError, match="0 to 15 seconds"):
        await world.certifications.expire(
            mentor.certification_id, today=TODAY, wait_seconds=seconds
        )

    assert await world.rows("SELECT FROM public.portal_visibility") == []


async def test_a_renewal_that_waits_returns_when_the_portal_shows_the_mentor(
    world: World,
) -> None:
    """
    The confirmed version is the renewal's, and the waiting was no longer than needed.
    """
    mentor = await world.mentor()

    async with relaying(world) as sent:
        done = await world.certifications.renew(
            mentor.certification_id, NEXT_YEAR, today=TODAY, wait_seconds=LONG
        )

    row = await world.row("SELECT version, visible FROM public.portal_confirmations")
    assert (row.version, row.visible) == (done.version, True)
    assert [event.payload["visible"] for event in sent] == [True]


async def test_an_expiry_that_waits_returns_when_the_portal_hides_the_mentor(
    world: World,
) -> None:
    """
    Both transitions can be waited for.
    """
    mentor = await world.mentor()

    async with relaying(world):
        done = await world.certifications.expire(
            mentor.certification_id, today=TODAY, wait_seconds=LONG
        )

    assert done is not None
    assert await world.value("SELECT visible FROM public.portal_confirmations") is False


async def test_a_second_expiry_has_nothing_to_wait_for(world: World) -> None:
    """
    Nothing was changed, so the answer comes at once, worker or not.
    """
    mentor, _ = await hidden(world)

    async with asyncio.timeout(5):
        again = await world.certifications.expire(
            mentor.certification_id, today=TODAY, wait_seconds=LONG
        )

    assert again is None


async def assert_renewed(world: World, mentor: Mentor) -> None:
    """
    The renewal stands, whatever became of the portal.
    """
    row = await world.row(
        "SELECT status, expires_on FROM public.certifications WHERE id = :id",
        id=mentor.certification_id,
    )
    assert (row.status, row.expires_on) == ("valid", NEXT_YEAR)
    assert await world.value("SELECT visible FROM public.portal_visibility") is True
    assert await world.rows("SELECT FROM public.mentor_pauses WHERE resumed_at IS NULL") == []


async def test_a_renewal_stands_when_dynamics_refuses(world: World) -> None:
    """
    The exception says that a person is needed, and nothing is taken back.
    """
    mentor, _ = await hidden(world)
    await world.execute("DELETE FROM outbox.events")

    async with relaying(world, missing):
        with pytest.raises(DynamicsSyncException) as warning:
            await world.certifications.renew(
                mentor.certification_id, NEXT_YEAR, today=TODAY, wait_seconds=LONG
            )

    assert str(warning.value) == "Portal visibility update failed"
    assert (warning.value.state, warning.value.error_code) == ("failed", "record_missing")
    assert warning.value.mentor_id == mentor.id
    await assert_renewed(world, mentor)


async def test_a_renewal_stands_when_no_worker_is_about(world: World) -> None:
    """
    The exception says that the portal is not there yet, in the words the app shows.
    """
    mentor, _ = await hidden(world)

    with pytest.raises(DynamicsSyncException) as warning:
        await world.certifications.renew(
            mentor.certification_id, NEXT_YEAR, today=TODAY, wait_seconds=0.05
        )

    assert str(warning.value) == "Portal visibility update pending"
    assert (warning.value.state, warning.value.error_code) == ("pending", None)
    await assert_renewed(world, mentor)


async def test_a_renewal_during_an_outage_is_pending_and_says_why(world: World) -> None:
    """
    The event has failed once and will be tried again.
    """
    mentor = await world.mentor()

    async with relaying(world, unavailable):
        with pytest.raises(DynamicsSyncException) as warning:
            await world.certifications.renew(
                mentor.certification_id, NEXT_YEAR, today=TODAY, wait_seconds=0.5
            )

    assert (warning.value.state, warning.value.error_code) == ("pending", "http_503")
    await assert_renewed(world, mentor)


async def test_a_renewal_that_does_not_wait_says_nothing_of_the_portal(world: World) -> None:
    """
    By default it returns as soon as it is saved.
    """
    mentor = await world.mentor()

    done = await world.certifications.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)

    assert done.synchronised is True
    await assert_renewed(world, mentor)


async def test_a_renewal_that_replaces_a_hiding_in_flight_is_waited_for(world: World) -> None:
    """
    The flight lands with the old value first; only the renewal's own version will do.
    """
    mentor, _ = await hidden(world)
    in_flight, land = asyncio.Event(), asyncio.Event()

    async def deliver(event: Event, _seconds: float) -> Delivered:
        if not event.payload["visible"]:
            in_flight.set()
            await land.wait()
        return Delivered()

    async def redrive(_limit: int | None) -> int:
        return 0

    relay = Relay(
        world.engine,
        Destination(
            name=visibility.DESTINATION,
            organization_id=world.hlf,
            deliver=deliver,
            record=confirmations.record,
            redrive=redrive,
            policy=RetryPolicy(),
        ),
        poll_seconds=0.02,
    )
    running = asyncio.create_task(relay.run(grace_seconds=5))
    await in_flight.wait()
    renewal = asyncio.create_task(
        world.certifications.renew(
            mentor.certification_id, NEXT_YEAR, today=TODAY, wait_seconds=LONG
        )
    )

    async def replaced() -> bool:
        return bool(await world.rows("SELECT FROM outbox.events WHERE replaced = 1"))

    await until(replaced)
    land.set()
    done = await renewal
    relay.stop()
    await running

    row = await world.row("SELECT version, visible FROM public.portal_confirmations")
    assert (row.version, row.visible) == (done.version, True)


async def test_a_renewal_stands_when_the_database_fails_while_it_is_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The change is committed, so the caller may not be told otherwise: it is pending.
    """
    mentor, _ = await hidden(world)

    async def look(*_: object) -> tuple[Progress, str | None]:
        raise OperationalError("SELECT", {}, OSError("the connection is gone"))

    monkeypatch.setattr(confirmations, "_look", look)

    with pytest.raises(DynamicsSyncException) as warning:
        await world.certifications.renew(
            mentor.certification_id, NEXT_YEAR, today=TODAY, wait_seconds=0.1
        )

    assert warning.value.state == "pending"
    await assert_renewed(world, mentor)


async def test_waiting_ends_in_time_when_the_database_does_not_answer(world: World) -> None:
    """
    Rows that cannot be read, here because somebody holds the table, keep nobody for ever.
    """
    mentor, version = await hidden(world)

    async with world.engine.connect() as other, asyncio.timeout(2):
        await other.execute(text("LOCK TABLE public.portal_confirmations"))
        progress, _ = await wait_for(
            world.engine, mentor_id=mentor.id, version=version, seconds=0.1
        )

    assert progress == "pending"


@pytest.mark.parametrize("state", ["pending", "failed"])
def test_the_exception_is_a_sentence_with_its_facts(state: Literal["pending", "failed"]) -> None:
    """
    A sentence for the app, and fields for whoever wants to know more.
    """
    mentor_id = uuid4()

    warning = DynamicsSyncException(mentor_id, state=state, error_code="http_503")

    assert str(warning) == f"Portal visibility update {state}"
    assert (warning.mentor_id, warning.state, warning.error_code) == (
        mentor_id,
        state,
        "http_503",
    )
