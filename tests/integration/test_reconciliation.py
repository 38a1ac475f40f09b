"""
Reconciliation: whatever hand changed something, what follows from it is made up for.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.factories import NEXT_YEAR, TODAY, YESTERDAY
from tests.integration.test_statements import counted
from worker.certifications import reconciliation
from worker.certifications.reconciliation import Reconciled, ReconciliationService

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from tests.factories import Mentor, World

NOTHING = Reconciled()

CONFIRM_ALL = """
INSERT INTO public.portal_confirmations AS confirmed
       (mentor_id, organization_id, visible, version)
SELECT mentor_id, organization_id, visible, version FROM public.portal_visibility
    ON CONFLICT (mentor_id) DO UPDATE
   SET visible = excluded.visible, version = excluded.version
"""


async def reconcile(world: World) -> Reconciled:
    """
    A whole reconciliation by HLF's process.
    """
    service = ReconciliationService(world.engine, organization_id=world.hlf, timezone="Europe/Oslo")
    return sum([page async for page in service.reconcile_all(today=TODAY)], NOTHING)


async def at_rest(world: World, number: int = 1) -> list[Mentor]:
    """
    So many certified mentors whom the portal shows, confirmed, with nothing on its way.
    """
    mentors = await world.mentors(number)
    await world.execute("UPDATE public.certifications SET expires_on = :day", day=NEXT_YEAR)
    await reconcile(world)
    await delivered(world)
    return mentors


async def delivered(world: World) -> None:
    """
    Everything that is on its way arrives and is confirmed.
    """
    await world.execute(CONFIRM_ALL)
    await world.execute("DELETE FROM outbox.events")


async def expire_behind_our_back(world: World, *mentors: Mentor) -> None:
    """
    Plain SQL, as another application might write it.
    """
    await world.execute(
        "UPDATE public.certifications SET status = 'expired', expired_at = now()"
        " WHERE id = ANY (:ids)",
        ids=[one.certification_id for one in mentors],
    )


async def announced(world: World) -> dict[UUID, bool]:
    """
    What is on its way, by mentor; each of the version that is wanted.
    """
    rows = await world.rows(
        "SELECT desired.mentor_id, desired.visible, live.payload"
        "  FROM outbox.events AS live"
        "  JOIN public.portal_visibility AS desired"
        "    ON CAST(desired.mentor_id AS text) = live.key AND desired.version = live.version"
    )
    assert all(row.payload["visible"] is row.visible for row in rows)
    return {row.mentor_id: row.visible for row in rows}


async def open_pauses(world: World) -> Sequence[UUID]:
    """
    The certifications that pause their mentors.
    """
    rows = await world.rows(
        "SELECT certification_id FROM public.mentor_pauses WHERE resumed_at IS NULL"
    )
    return [row[0] for row in rows]


async def test_where_nothing_drifted_nothing_is_written_and_each_kind_is_one_query(
    world: World,
) -> None:
    """
    However many mentors there are.
    """
    await at_rest(world, 2500)

    with counted(world.engine) as statements:
        assert await reconcile(world) == NOTHING

    assert len(statements) == 2
    assert all(statement.lstrip().startswith(("WITH", "SELECT")) for statement in statements)
    assert await announced(world) == {}


async def test_an_expiry_by_plain_sql_hides_and_pauses_the_mentor(world: World) -> None:
    """
    As the transition would have done; the second time there is nothing to do.
    """
    mentor, _ = await at_rest(world, 2)
    await expire_behind_our_back(world, mentor)

    assert await reconcile(world) == Reconciled(visibility=1, pauses=1)

    assert await announced(world) == {mentor.id: False}
    assert await open_pauses(world) == [mentor.certification_id]
    assert await reconcile(world) == NOTHING


async def test_a_renewal_by_plain_sql_lifts_the_pause_and_shows_the_mentor(world: World) -> None:
    """
    As the transition would have done.
    """
    [mentor] = await at_rest(world)
    await expire_behind_our_back(world, mentor)
    await reconcile(world)
    await delivered(world)
    await world.execute(
        "UPDATE public.certifications SET status = 'valid', expired_at = NULL, expires_on = :day",
        day=NEXT_YEAR,
    )

    assert await reconcile(world) == Reconciled(visibility=1, pauses=1)

    assert await announced(world) == {mentor.id: True}
    assert await open_pauses(world) == []


async def test_a_manual_pause_is_nobodys_drift(world: World) -> None:
    """
    What a person paused, a person resumes.
    """
    [mentor] = await at_rest(world)
    await world.execute(
        "INSERT INTO public.mentor_pauses (mentor_id, reason) VALUES (:id, 'manual')", id=mentor.id
    )

    assert await reconcile(world) == NOTHING


async def test_pauses_alone_are_brought_in_line(world: World) -> None:
    """
    One that is missing is opened; one whose certification is gone is lifted.
    """
    first, second = await at_rest(world, 2)
    await expire_behind_our_back(world, first, second)
    await reconcile(world)
    await delivered(world)
    await world.execute("DELETE FROM public.mentor_pauses WHERE mentor_id = :id", id=first.id)
    await world.execute("DELETE FROM public.certifications WHERE mentor_id = :id", id=second.id)

    assert await reconcile(world) == Reconciled(pauses=2)

    assert await open_pauses(world) == [first.certification_id]
    assert await announced(world) == {first.id: False, second.id: False}


async def test_a_mentor_of_whom_nothing_is_wanted_yet_is_announced(world: World) -> None:
    """
    Somebody inserted a mentor and a certification; without a certification there is nothing.
    """
    certified = await world.mentor(expires_on=NEXT_YEAR)
    bare = await world.mentor(expires_on=NEXT_YEAR)
    await world.execute("DELETE FROM public.certifications WHERE mentor_id = :id", id=bare.id)

    assert await reconcile(world) == Reconciled(missing=1)

    assert await announced(world) == {certified.id: True}


async def test_whoever_has_no_certification_left_is_hidden(world: World) -> None:
    """
    Only certified mentors may be visible.
    """
    [mentor] = await at_rest(world)
    await world.execute("DELETE FROM public.certifications")

    assert await reconcile(world) == Reconciled(visibility=1)

    assert await announced(world) == {mentor.id: False}


@pytest.mark.parametrize("trace", ["confirmation", "event", "history", "failure", "doubt"])
async def test_a_lost_row_is_made_again_above_every_version_that_is_known(
    world: World, trace: str
) -> None:
    """
    A lower version would be taken for an old state: not sent, or never confirmed.
    """
    [mentor] = await at_rest(world)
    await world.execute("DELETE FROM public.portal_visibility")
    await world.execute("DELETE FROM public.portal_confirmations")
    await world.execute(TRACES[trace], id=mentor.id, hlf=world.hlf, key=str(mentor.id))
    await expire_behind_our_back(world, mentor)

    found = await reconcile(world)

    assert found.missing == 1
    assert await announced(world) == {mentor.id: False}
    assert await world.value("SELECT version FROM public.portal_visibility") == 42


TRACES = {
    "confirmation": "INSERT INTO public.portal_confirmations"
    " (mentor_id, organization_id, visible, version) VALUES (:id, :hlf, true, 41)",
    "event": "INSERT INTO outbox.events (destination, key, organization_id, version, payload)"
    " VALUES ('dynamics', :key, :hlf, 41, '{\"visible\": true}')",
    "history": "INSERT INTO outbox.settled (event_id, destination, key, organization_id, version,"
    " payload, outcome, attempts, created_at)"
    " VALUES (1, 'dynamics', :key, :hlf, 41, '{}', 'delivered', 1, now())",
    "failure": "INSERT INTO public.dynamics_sync_failures (organization_id, mentor_id, visible,"
    " version, error_code, error_message, retry_count, recoverable)"
    " VALUES (:hlf, :id, true, 41, 'x', 'x', 0, false)",
    "doubt": "INSERT INTO outbox.doubts (destination, key, version, until)"
    " VALUES ('dynamics', :key, 41, now())",
}
"""All that may be left of a mentor of version 41; what a trace does not name is ignored."""


async def test_an_event_that_somebody_deleted_is_said_again(world: World) -> None:
    """
    Not confirmed, nothing on its way, no failure that says why.
    """
    gone, waiting = await world.mentors(2)
    async for _ in world.certifications.expire_all(today=TODAY):
        pass
    await world.execute("DELETE FROM outbox.events WHERE key = :key", key=str(gone.id))

    assert await reconcile(world) == Reconciled(unconfirmed=1)

    assert await announced(world) == {gone.id: False, waiting.id: False}
    versions = await world.rows("SELECT mentor_id, version FROM public.portal_visibility")
    assert dict(map(tuple, versions)) == {gone.id: 2, waiting.id: 1}


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM public.portal_confirmations",
        "UPDATE public.portal_confirmations SET visible = NOT visible",
        "UPDATE public.portal_visibility SET version = version + 1",
        "UPDATE public.portal_confirmations SET version = version + 1",
    ],
    ids=["confirmation lost", "shows the other", "event lost", "older row restored"],
)
async def test_whatever_is_not_confirmed_as_it_is_wanted_is_said_again(
    world: World, damage: str
) -> None:
    """
    With a version that is confirmed when it is delivered.
    """
    [mentor] = await at_rest(world)
    await world.execute(damage)

    assert await reconcile(world) == Reconciled(unconfirmed=1)

    assert await announced(world) == {mentor.id: True}
    assert await world.value(
        "SELECT bool_and(desired.version > coalesce(confirmed.version, 0))"
        "  FROM public.portal_visibility AS desired"
        "  LEFT JOIN public.portal_confirmations AS confirmed USING (mentor_id)"
    )


@pytest.mark.parametrize(("failed", "unconfirmed"), [(2, 0), (1, 1)], ids=["this one", "another"])
async def test_an_open_failure_says_why_if_it_is_of_this_version(
    world: World, failed: int, unconfirmed: int
) -> None:
    """
    A failure of an older version hides that the newer one was never sent.
    """
    [mentor] = await at_rest(world)
    await world.execute("UPDATE public.portal_visibility SET version = 2")
    await world.execute(
        "INSERT INTO public.dynamics_sync_failures (organization_id, mentor_id, visible, version,"
        " error_code, error_message, retry_count, recoverable)"
        " VALUES (:hlf, :id, true, :version, 'x', 'x', 0, false)",
        hlf=world.hlf,
        id=mentor.id,
        version=failed,
    )

    assert await reconcile(world) == Reconciled(unconfirmed=unconfirmed)


async def test_what_has_run_out_is_left_to_expire(world: World) -> None:
    """
    It is hidden by its transition, which says so in the certification too.
    """
    [mentor] = await at_rest(world)
    await world.execute("UPDATE public.certifications SET expires_on = :day", day=YESTERDAY)

    assert await reconcile(world) == NOTHING

    assert await announced(world) == {}
    assert await world.certifications.expire(mentor.certification_id, today=TODAY) is not None


async def test_others_mentors_are_brought_in_line_and_nothing_is_sent(world: World) -> None:
    """
    One organisation's credentials never speak of another's mentors.
    """
    mentor = await world.mentor(organization_id=world.other, expires_on=NEXT_YEAR)

    assert await reconcile(world) == Reconciled(missing=1, skipped=1)

    assert await world.rows("SELECT * FROM outbox.events") == []
    assert await world.value("SELECT visible FROM public.portal_visibility") is True
    await expire_behind_our_back(world, mentor)
    assert await reconcile(world) == Reconciled(visibility=1, pauses=1, skipped=1)


async def test_a_mentor_who_came_to_us_is_announced(world: World) -> None:
    """
    What is wanted was wanted for another organisation.
    """
    mentor = await world.mentor(organization_id=world.other, expires_on=NEXT_YEAR)
    await reconcile(world)
    await world.execute("UPDATE public.mentors SET organization_id = :hlf", hlf=world.hlf)

    assert await reconcile(world) == Reconciled(visibility=1)

    assert await announced(world) == {mentor.id: True}


async def test_whom_a_person_holds_is_passed_over(world: World) -> None:
    """
    The others are done at once; the one is found the next time.
    """
    held, free = await at_rest(world, 2)
    await expire_behind_our_back(world, held, free)
    async with world.engine.begin() as person:
        await person.exec_driver_sql(
            f"SELECT FROM public.portal_visibility WHERE mentor_id = '{held.id}' FOR UPDATE"
        )
        found = await reconcile(world)

    assert (found.visibility, found.held) == (1, 1)
    assert await announced(world) == {free.id: False}
    assert (await reconcile(world)).visibility == 1


async def test_one_whom_the_database_refuses_stops_nobody_else(world: World) -> None:
    """
    Pages are halved down to the reason.
    """
    mentors = await at_rest(world, 9)
    await expire_behind_our_back(world, *mentors)
    refused = mentors[4]
    await world.execute(
        "ALTER TABLE public.mentor_pauses ADD CONSTRAINT refusal"
        f" CHECK (mentor_id <> '{refused.id}') NOT VALID"
    )
    try:
        found = await reconcile(world)
    finally:
        await world.execute("ALTER TABLE public.mentor_pauses DROP CONSTRAINT refusal")

    assert found == Reconciled(visibility=8, pauses=8, failed=1)
    assert set(await announced(world)) == {one.id for one in mentors} - {refused.id}


async def test_several_at_once_are_as_good_as_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Each drift is made up for once, whoever finds it, in pages of any size.
    """
    monkeypatch.setattr(reconciliation, "PAGE", 7)
    monkeypatch.setattr(reconciliation, "LOOK", 17)
    drifted = await at_rest(world, 30)
    await expire_behind_our_back(world, *drifted)
    for _ in range(30):
        await world.mentor(expires_on=NEXT_YEAR)
    before = await world.value("SELECT sum(version) FROM public.portal_visibility")

    found = sum(await asyncio.gather(*(reconcile(world) for _ in range(4))), NOTHING)
    found += await reconcile(world)

    assert (found.missing, found.visibility, found.pauses, found.failed) == (30, 30, 30, 0)
    assert len(await announced(world)) == 60
    after = await world.value("SELECT sum(version) FROM public.portal_visibility")
    assert after == before + 60


async def test_by_default_the_day_is_that_of_the_organisation(world: World) -> None:
    """
    No date given: the database's clock in the organisation's zone.
    """
    await world.mentor(expires_on=NEXT_YEAR)
    service = ReconciliationService(world.engine, organization_id=world.hlf, timezone="Asia/Tokyo")

    assert sum([page async for page in service.reconcile_all()], NOTHING).missing == 1
