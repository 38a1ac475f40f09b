"""
Confirmations and failures: what the worker writes when events are settled, and what is made
right again afterwards.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest

from outbox.outcome import Dead, Delivered, Ending, Outcome, Retry, Settlement, Skipped
from tests.factories import NEXT_YEAR, TODAY
from worker import portal
from worker.certifications import confirmations, visibility
from worker.portal import redrive_recoverable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Row

    from tests.factories import Mentor, World


PASSES = Dead(code="http_503", message="Dynamics did not answer.", recoverable=True)
STAYS = Dead(code="record_missing", message="Dynamics has no such record.")


def settled(
    world: World,
    mentor: Mentor,
    outcome: Outcome,
    *,
    version: int = 1,
    visible: bool = False,
    retries: int = 0,
) -> Settlement:
    """
    What settling an attempt came to.
    """
    endings: dict[type, Ending] = {Delivered: "delivered", Dead: "dead", Skipped: "skipped"}
    return Settlement(
        event_id=1,
        destination=visibility.DESTINATION,
        key=str(mentor.id),
        organization_id=world.hlf,
        version=version,
        payload={"visible": visible, "certification_id": str(mentor.certification_id)},
        outcome=outcome,
        ending=endings.get(type(outcome)),
        retries=retries,
    )


async def record(world: World, *settlements: Settlement) -> None:
    """
    Record them in one transaction, as the relay does.
    """
    async with world.engine.begin() as connection:
        await confirmations.record(connection, settlements)


async def failures(world: World) -> Sequence[Row[Any]]:
    """
    All failures, oldest first.
    """
    return await world.rows("SELECT * FROM public.dynamics_sync_failures ORDER BY created_at, id")


async def confirmed(world: World) -> tuple[int, bool]:
    """
    Version and value of the one confirmation.
    """
    row = await world.row("SELECT version, visible FROM public.portal_confirmations")
    return row.version, row.visible


# ----------------------------------------------------------------------- confirmations


async def test_a_delivery_confirms_its_version(world: World) -> None:
    """
    What was acknowledged is written as it was sent.
    """
    mentor = await world.mentor()

    await record(world, settled(world, mentor, Delivered(), version=3, visible=True))

    row = await world.row("SELECT * FROM public.portal_confirmations")
    assert (row.mentor_id, row.organization_id) == (mentor.id, world.hlf)
    assert (row.version, row.visible) == (3, True)


async def test_a_confirmation_only_goes_forward(world: World) -> None:
    """
    An older delivery that is recorded late changes nothing.
    """
    mentor = await world.mentor()

    await record(world, settled(world, mentor, Delivered(), version=2, visible=True))
    await record(world, settled(world, mentor, Delivered(), version=1, visible=False))
    assert await confirmed(world) == (2, True)

    await record(world, settled(world, mentor, Delivered(), version=3, visible=False))
    assert await confirmed(world) == (3, False)


async def test_the_same_version_confirmed_again_is_confirmed_later(world: World) -> None:
    """
    Asserting a state once more renews the time, nothing else.
    """
    mentor = await world.mentor()
    await record(world, settled(world, mentor, Delivered()))
    before = await world.row("SELECT version, confirmed_at FROM public.portal_confirmations")

    await record(world, settled(world, mentor, Delivered()))

    after = await world.row("SELECT version, confirmed_at FROM public.portal_confirmations")
    assert after.version == before.version
    assert after.confirmed_at > before.confirmed_at


@pytest.mark.parametrize(
    "outcome",
    [
        Skipped(reason="other_organization"),
        Retry(after_seconds=1, code="http_503"),
        Dead(code="record_missing", message="Gone."),
    ],
)
async def test_only_a_delivery_confirms(world: World, outcome: Outcome) -> None:
    """
    Whatever else happened, Dynamics acknowledged nothing.
    """
    await record(world, settled(world, await world.mentor(), outcome))

    assert await world.rows("SELECT FROM public.portal_confirmations") == []


async def test_a_superseded_attempt_is_neither_confirmed_nor_a_failure(world: World) -> None:
    """
    It died while a newer version came, so nobody has to be told.
    """
    mentor = await world.mentor()
    one = settled(world, mentor, PASSES)
    superseded = Settlement(
        **{name: getattr(one, name) for name in Settlement.__slots__} | {"ending": "superseded"}
    )

    await record(world, superseded)

    assert await failures(world) == []


async def test_many_settlements_are_recorded_together(world: World) -> None:
    """
    Deliveries and failures of different mentors, in any order.
    """
    one, two, three = [await world.mentor() for _ in range(3)]

    await record(
        world,
        settled(world, one, Delivered()),
        settled(world, two, STAYS),
        settled(world, three, Delivered()),
    )

    rows = await world.rows("SELECT mentor_id FROM public.portal_confirmations")
    assert {row.mentor_id for row in rows} == {one.id, three.id}
    assert [failure.mentor_id for failure in await failures(world)] == [two.id]


async def test_nothing_settled_writes_nothing(world: World) -> None:
    """
    An empty flush is no error.
    """
    await record(world)

    assert await failures(world) == []


# --------------------------------------------------------------------------- failures


async def test_a_dead_event_opens_a_failure_that_says_what_a_person_needs(world: World) -> None:
    """
    Who, which certification, which value, why, how often tried, and whether it may pass.
    """
    mentor = await world.mentor()

    await record(world, settled(world, mentor, PASSES, version=4, retries=3))

    [failure] = await failures(world)
    assert (failure.mentor_id, failure.certification_id) == (mentor.id, mentor.certification_id)
    assert (failure.organization_id, failure.version) == (world.hlf, 4)
    assert (failure.visible, failure.retry_count) == (False, 3)
    assert failure.error_code == "http_503"
    assert failure.error_message == "Dynamics did not answer."
    assert failure.resolved_at is None


@pytest.mark.parametrize(("outcome", "recoverable"), [(PASSES, True), (STAYS, False)])
async def test_a_failure_says_whether_its_cause_may_pass(
    world: World,
    outcome: Dead,
    recoverable: bool,  # noqa: FBT001 (a parameter of the test)
) -> None:
    """
    An outage passes by itself, a missing record does not.
    """
    await record(world, settled(world, await world.mentor(), outcome))

    [failure] = await failures(world)
    assert failure.recoverable is recoverable


async def test_an_event_without_a_certification_can_fail_too(world: World) -> None:
    """
    A state that was asserted again has no certification as its cause.
    """
    mentor = await world.mentor()
    one = settled(world, mentor, STAYS)
    one.payload["certification_id"] = None

    await record(world, one)

    [failure] = await failures(world)
    assert failure.certification_id is None


async def test_failing_again_updates_the_open_failure_and_keeps_its_age(world: World) -> None:
    """
    One open failure per mentor: newest reason, first date.
    """
    mentor = await world.mentor()
    await record(world, settled(world, mentor, PASSES))
    [first] = await failures(world)

    await record(world, settled(world, mentor, STAYS, version=2, visible=True, retries=1))

    [again] = await failures(world)
    assert (again.id, again.created_at) == (first.id, first.created_at)
    assert (again.error_code, again.recoverable) == ("record_missing", False)
    assert (again.version, again.visible, again.retry_count) == (2, True, 1)
    assert again.attempted_at > first.attempted_at


async def test_an_older_failure_does_not_replace_a_newer_one(world: World) -> None:
    """
    Failures go forward only, as confirmations do.
    """
    mentor = await world.mentor()
    await record(world, settled(world, mentor, STAYS, version=2))

    await record(world, settled(world, mentor, PASSES, version=1))

    [failure] = await failures(world)
    assert (failure.version, failure.error_code) == (2, "record_missing")


async def test_a_failure_after_a_resolved_one_is_a_new_row(world: World) -> None:
    """
    History stays as it was.
    """
    mentor = await world.mentor()
    await record(world, settled(world, mentor, STAYS, version=1))
    await record(world, settled(world, mentor, Delivered(), version=2))

    await record(world, settled(world, mentor, STAYS, version=3))

    closed, open_ = await failures(world)
    assert (closed.version, closed.resolution) == (1, "delivered")
    assert (open_.version, open_.resolved_at) == (3, None)


@pytest.mark.parametrize(("visible", "resolution"), [(False, "delivered"), (True, "superseded")])
async def test_a_delivery_resolves_the_open_failure(
    world: World,
    visible: bool,  # noqa: FBT001 (a parameter of the test)
    resolution: str,
) -> None:
    """
    The value that failed arrived after all, or another value took its place.
    """
    mentor = await world.mentor()
    await record(world, settled(world, mentor, STAYS, version=1, visible=False))

    await record(world, settled(world, mentor, Delivered(), version=2, visible=visible))

    [failure] = await failures(world)
    assert failure.resolved_at is not None
    assert (failure.resolution, failure.resolved_by) == (resolution, None)


async def test_an_older_delivery_resolves_nothing(world: World) -> None:
    """
    What failed is newer than what arrived.
    """
    mentor = await world.mentor()
    await record(world, settled(world, mentor, STAYS, version=2))

    await record(world, settled(world, mentor, Delivered(), version=1))

    [failure] = await failures(world)
    assert failure.resolved_at is None


async def test_a_delivery_leaves_other_mentors_failures_open(world: World) -> None:
    """
    Each mentor has a failure of their own.
    """
    one, two = await world.mentor(), await world.mentor()
    await record(world, settled(world, one, STAYS), settled(world, two, STAYS))

    await record(world, settled(world, one, Delivered()))

    assert {failure.mentor_id: failure.resolution for failure in await failures(world)} == {
        one.id: "delivered",
        two.id: None,
    }


async def test_a_resolved_failure_is_not_touched_again(world: World) -> None:
    """
    What a person resolved by hand keeps the person's word.
    """
    mentor = await world.mentor()
    await record(world, settled(world, mentor, STAYS))
    await world.execute(
        "UPDATE public.dynamics_sync_failures"
        " SET resolved_at = now(), resolution = 'manual', resolved_by = 'A mentor'"
    )
    before = await failures(world)

    await record(world, settled(world, mentor, Delivered(), version=2))

    assert await failures(world) == before


# ------------------------------------------------------------------- made right again


async def failed(world: World, outcome: Dead = PASSES) -> Mentor:
    """
    A mentor whose hiding died.
    """
    mentor = await world.mentor()
    done = await world.certifications.expire(mentor.certification_id, today=TODAY)
    assert done is not None
    await world.execute("DELETE FROM outbox.events WHERE key = :key", key=str(mentor.id))
    await record(world, settled(world, mentor, outcome, version=done.version))
    return mentor


async def live(world: World) -> dict[UUID, int]:
    """
    The live events: version by mentor.
    """
    rows = await world.rows("SELECT key, version FROM outbox.events")
    return {UUID(row.key): row.version for row in rows}


async def test_a_recovery_sends_what_died_of_something_that_passes(world: World) -> None:
    """
    With a new version and the cause that is known; the failure stays open until it arrived.
    """
    mentor = await failed(world)

    assert await redrive_recoverable(world.engine, organization_id=world.hlf) == 1

    event = await world.row("SELECT key, version, payload FROM outbox.events")
    assert (event.key, event.version) == (str(mentor.id), 2)
    assert event.payload == {"visible": False, "certification_id": str(mentor.certification_id)}
    [failure] = await failures(world)
    assert failure.resolved_at is None


async def test_a_recovery_sends_the_state_of_today_not_the_one_that_died(world: World) -> None:
    """
    Renewed meanwhile means shown, whatever the failure says.
    """
    mentor = await failed(world)
    await world.certifications.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)
    await world.execute("DELETE FROM outbox.events")

    await redrive_recoverable(world.engine, organization_id=world.hlf)

    assert await world.value("SELECT payload ->> 'visible' FROM outbox.events") == "true"
    assert await live(world) == {mentor.id: 3}


async def test_a_recovery_leaves_alone_what_a_person_has_to_mend(world: World) -> None:
    """
    A missing record is as missing after the outage as before.
    """
    await failed(world, STAYS)

    assert await redrive_recoverable(world.engine, organization_id=world.hlf) == 0

    assert await live(world) == {}
    assert await world.value("SELECT version FROM public.portal_visibility") == 1


async def test_a_recovery_leaves_alone_what_is_on_its_way_already(world: World) -> None:
    """
    No second version for a mentor with a live event.
    """
    mentor = await failed(world)
    await world.certifications.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)
    before = await live(world)

    assert await redrive_recoverable(world.engine, organization_id=world.hlf) == 0

    assert await live(world) == before


async def test_a_recovery_leaves_resolved_failures_alone(world: World) -> None:
    """
    What is done is done.
    """
    mentor = await failed(world)
    await record(world, settled(world, mentor, Delivered()))

    assert await redrive_recoverable(world.engine, organization_id=world.hlf) == 0


async def test_a_recovery_never_sends_another_organisations_mentor(world: World) -> None:
    """
    Neither when the failure is theirs, nor when the mentor has moved to them since.
    """
    theirs, moved = await failed(world), await failed(world)
    await world.execute(
        "UPDATE public.dynamics_sync_failures SET organization_id = :other WHERE mentor_id = :id",
        other=world.other,
        id=theirs.id,
    )
    await world.execute(
        "UPDATE public.portal_visibility SET organization_id = :other WHERE mentor_id = :id",
        other=world.other,
        id=moved.id,
    )

    assert await redrive_recoverable(world.engine, organization_id=world.hlf) == 0

    assert await live(world) == {}


async def test_a_recovery_goes_page_by_page(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    More mentors than fit a transaction are all sent, each page in its own.
    """
    monkeypatch.setattr(portal, "REDRIVE_PAGE", 2)
    mentors = [await failed(world) for _ in range(5)]

    assert await redrive_recoverable(world.engine, organization_id=world.hlf) == 5

    assert set(await live(world)) == {mentor.id for mentor in mentors}
    pages = await world.value("SELECT count(DISTINCT CAST(xmin AS text)) FROM outbox.events")
    assert pages == 3


@pytest.mark.parametrize(("limit", "sent"), [(0, 0), (1, 1), (3, 3), (9, 4)])
async def test_a_recovery_sends_no_more_than_it_is_asked_to(
    world: World, monkeypatch: pytest.MonkeyPatch, limit: int, sent: int
) -> None:
    """
    A probe needs one mentor, not a backlog.
    """
    monkeypatch.setattr(portal, "REDRIVE_PAGE", 2)
    for _ in range(4):
        await failed(world)

    assert await redrive_recoverable(world.engine, organization_id=world.hlf, limit=limit) == sent

    assert len(await live(world)) == sent


async def test_a_limited_recovery_looks_past_mentors_it_may_not_send(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Who moved to another organisation does not use up the limit.
    """
    monkeypatch.setattr(portal, "REDRIVE_PAGE", 1)
    first, second = sorted([await failed(world), await failed(world)], key=lambda one: one.id)
    await world.execute(
        "UPDATE public.portal_visibility SET organization_id = :other WHERE mentor_id = :id",
        other=world.other,
        id=first.id,
    )

    assert await redrive_recoverable(world.engine, organization_id=world.hlf, limit=1) == 1

    assert set(await live(world)) == {second.id}


async def test_two_recoveries_at_once_send_each_mentor_once(world: World) -> None:
    """
    Together they enqueue every mentor exactly once, with one new version.
    """
    mentors = [await failed(world) for _ in range(6)]

    counts = await asyncio.gather(
        *(redrive_recoverable(world.engine, organization_id=world.hlf) for _ in range(3))
    )

    assert sum(counts) == 6
    assert await live(world) == {mentor.id: 2 for mentor in mentors}


async def assert_again(world: World, *mentors: UUID) -> set[UUID]:
    """
    Ask for these mentors' states to be sent once more.
    """
    async with world.engine.begin() as connection:
        return await visibility.assert_again(connection, mentors, organization_id=world.hlf)


async def test_two_people_who_ask_at_once_cause_one_event(world: World) -> None:
    """
    One of them caused it; the others learn that it is on its way.
    """
    mentor = await failed(world, STAYS)

    done = await asyncio.gather(*(assert_again(world, mentor.id) for _ in range(5)))

    assert sorted(len(one) for one in done) == [0, 0, 0, 0, 1]
    assert await live(world) == {mentor.id: 2}


async def test_asking_for_unknown_mentors_does_nothing(world: World) -> None:
    """
    Nobody the portal has never been told about, and nobody who does not exist.
    """
    new = await world.mentor()

    assert await assert_again(world, new.id, uuid4()) == set()

    assert await live(world) == {}


async def test_a_state_that_is_asserted_again_keeps_its_value_and_priority(world: World) -> None:
    """
    Only the version is new.
    """
    hidden, shown = await failed(world), await failed(world)
    await world.certifications.renew(shown.certification_id, NEXT_YEAR, today=TODAY)
    await world.execute("DELETE FROM outbox.events")

    assert await assert_again(world, hidden.id, shown.id) == {hidden.id, shown.id}

    rows = await world.rows(
        "SELECT key, payload ->> 'visible' AS visible, priority FROM outbox.events"
    )
    assert {(UUID(row.key), row.visible, row.priority) for row in rows} == {
        (hidden.id, "false", 0),
        (shown.id, "true", 1),
    }
