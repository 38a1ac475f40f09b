"""
What a coordinator is told and what "try again" does, on a real database.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from outbox import gate
from tests.conftest import until
from tests.desk import Desk
from worker import database
from worker.coordinator import alerts, retry
from worker.errors import UnknownFailureError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.factories import Mentor, World
    from worker.coordinator.alerts import Status


@pytest.fixture
def desk(world: World) -> Desk:
    """
    A coordinator without a care.
    """
    return Desk(world)


@pytest.fixture
async def second_engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    """
    Another process on the same database.
    """
    engine = database.connect(database_url, application_name="second")
    yield engine
    await engine.dispose()


# -------------------------------------------------------------------------------- status


def _counts(now: Status) -> dict[str, int]:
    """
    What is not zero.
    """
    names = (
        "in_order",
        "waiting_to_hide",
        "waiting_to_show",
        "failed_to_hide",
        "failed_to_show",
        "by_hand",
        "unaccounted",
        "asserting_again",
    )
    return {name: count for name in names if (count := getattr(now, name))}


async def test_with_no_mentors_there_is_nothing_to_count(desk: Desk) -> None:
    """
    Zeroes, not nulls.
    """
    now = await desk.status()
    assert _counts(now) == {}
    assert (now.oldest_waiting_seconds, now.next_try_at, now.last_confirmed_at) == (0, None, None)
    assert now.gate == gate.OPEN


@pytest.mark.parametrize("visible", [False, True])
async def test_each_situation_is_counted_as_what_it_is(desk: Desk, visible: bool) -> None:  # noqa: FBT001
    """
    Waiting, failed, being retried after a failure, or forgotten: hiding and showing apart.
    """
    which = "show" if visible else "hide"
    waiting = await desk.wanted(visible=visible)
    await desk.on_its_way(waiting)
    assert _counts(await desk.status()) == {f"waiting_to_{which}": 1}

    failed = await desk.wanted(visible=visible)
    await desk.failed(failed, visible=visible)
    assert _counts(await desk.status()) == {f"waiting_to_{which}": 1, f"failed_to_{which}": 1}

    await desk.on_its_way(failed)
    now = await desk.status()
    assert _counts(now) == {f"waiting_to_{which}": 2}
    assert (now.waiting, now.failed, now.maybe_wrongly_visible) == (2, 0, 0 if visible else 2)

    await desk.wanted(visible=visible)
    assert _counts(await desk.status()) == {f"waiting_to_{which}": 2, "unaccounted": 1}


async def test_only_the_newest_version_counts_as_confirmed(desk: Desk) -> None:
    """
    An older confirmation is none; a resolved failure is none either.
    """
    mentor = await desk.wanted(version=3)
    await desk.confirmed(mentor, version=2)
    await desk.failed(mentor, resolved_minutes_ago=1)
    assert _counts(await desk.status()) == {"unaccounted": 1}

    other = await desk.wanted(version=3)
    await desk.confirmed(other, version=3)
    now = await desk.status()
    assert _counts(now) == {"unaccounted": 1, "in_order": 1}
    assert now.last_confirmed_at is not None


async def test_what_a_person_has_done_by_hand_is_counted_apart(desk: Desk) -> None:
    """
    As long as it is of the state that is wanted now, and nothing else is on its way.
    """
    mentor = await desk.wanted()
    failure = await desk.failed(mentor)
    await desk.world.execute(
        "UPDATE public.dynamics_sync_failures SET resolved_at = now(), resolution = 'manual'"
        " WHERE id = :id",
        id=failure,
    )
    assert _counts(await desk.status()) == {"by_hand": 1}

    await desk.on_its_way(mentor)
    assert _counts(await desk.status()) == {"waiting_to_hide": 1}

    await desk.world.execute("DELETE FROM outbox.events")
    await desk.world.execute("UPDATE public.portal_visibility SET version = 3")
    assert _counts(await desk.status()) == {"unaccounted": 1}


async def test_what_is_confirmed_and_said_once_more_is_in_order(desk: Desk) -> None:
    """
    A doubt about an old request is no reason to worry anybody.
    """
    mentor = await desk.wanted()
    await desk.confirmed(mentor)
    await desk.on_its_way(mentor, minutes=60)

    now = await desk.status()
    assert _counts(now) == {"in_order": 1, "asserting_again": 1}
    assert (now.waiting, now.oldest_waiting_seconds) == (0, 0)
    assert now.next_try_at is not None


async def test_another_organisations_mentors_are_never_counted(desk: Desk) -> None:
    """
    Neither what they wait for nor their failures, their gate or their list.
    """
    theirs = [await desk.wanted(organization_id=desk.world.other) for _ in range(3)]
    await desk.on_its_way(theirs[0])
    await desk.failed(theirs[1], organization_id=desk.world.other)
    await desk.confirmed(theirs[2])
    async with desk.engine.begin() as connection:
        await gate.close_by_hand(
            connection,
            destination="dynamics",
            organization_id=desk.world.other,
            message="Theirs.",
            closed_by="them",
        )

    now = await desk.status()
    assert _counts(now) == {}
    assert (now.oldest_waiting_seconds, now.next_try_at, now.last_confirmed_at) == (0, None, None)
    assert now.gate == gate.OPEN
    assert await desk.failures(resolved_too=True) == []
    async with desk.engine.connect() as connection:
        assert await alerts.open_failures(connection, organization_id=desk.world.hlf) == 0


async def test_the_oldest_wait_is_that_of_what_is_on_its_way(desk: Desk) -> None:
    """
    Since it was put there: not the age of the decision, nor of what failed long ago.
    """
    asked_again = await desk.wanted(days_old=40)
    await desk.on_its_way(asked_again, minutes=5)
    failed = await desk.wanted(days_old=9)
    await desk.failed(failed)
    assert 299 < (await desk.status()).oldest_waiting_seconds < 330


async def test_a_clock_that_was_ahead_gives_no_negative_wait(desk: Desk) -> None:
    """
    Nothing waits for less than no time.
    """
    await desk.on_its_way(await desk.wanted(), minutes=-60)
    assert (await desk.status()).oldest_waiting_seconds == 0


async def test_the_gate_is_part_of_the_status(desk: Desk) -> None:
    """
    Why nothing is sent, and who said so.
    """
    async with desk.engine.begin() as connection:
        await gate.close_by_hand(
            connection,
            destination="dynamics",
            organization_id=desk.world.hlf,
            message="Upgrade.",
            closed_by="IT",
        )
    now = (await desk.status()).gate
    assert (now.state, now.reason, now.message, now.closed_by) == (
        "closed",
        "operator",
        "Upgrade.",
        "IT",
    )


async def test_a_failure_of_a_mentor_who_is_gone_is_not_forgotten(desk: Desk) -> None:
    """
    Deleted here, or moved to another organisation: the portal may show them still, whatever is
    known of them besides.
    """
    deleted, moved = await desk.wanted(), await desk.wanted(visible=True)
    await desk.failed(deleted)
    await desk.failed(moved, visible=True)
    await desk.confirmed(deleted)
    await desk.on_its_way(moved)
    await _delete(desk.world, deleted)
    await desk.world.execute(
        "UPDATE public.portal_visibility SET organization_id = :other WHERE mentor_id = :id",
        other=desk.world.other,
        id=moved.id,
    )
    now = await desk.status()
    assert _counts(now) == {"failed_to_hide": 1, "failed_to_show": 1}
    assert (now.next_try_at, now.last_confirmed_at) == (None, None)
    assert now.failed == len(await desk.failures())


async def _delete(world: World, mentor: Mentor) -> None:
    for statement in (
        "DELETE FROM public.portal_visibility WHERE mentor_id = :id",
        "DELETE FROM public.certifications WHERE mentor_id = :id",
        "DELETE FROM public.mentors WHERE id = :id",
    ):
        await world.execute(statement, id=mentor.id)


# ------------------------------------------------------------------------------ failures


async def test_failures_come_oldest_first_and_resolved_ones_last(desk: Desk) -> None:
    """
    Who has waited longest needs a person most; what was resolved last is most of interest.
    """
    young = await desk.failed(await desk.wanted(), minutes_ago=5)
    old = await desk.failed(await desk.wanted(), minutes_ago=50)
    long_resolved = await desk.failed(
        await desk.wanted(), minutes_ago=900, resolved_minutes_ago=800
    )
    resolved = await desk.failed(await desk.wanted(), minutes_ago=70, resolved_minutes_ago=60)

    assert [failure.id for failure in await desk.failures()] == [old, young]
    everything = await desk.failures(resolved_too=True)
    assert [failure.id for failure in everything] == [old, young, resolved, long_resolved]
    assert [failure.consequence for failure in everything][1:3] == [
        "may still be visible",
        "in order",
    ]


async def test_one_odd_row_does_not_hide_the_others(desk: Desk) -> None:
    """
    A mentor who was deleted, a name like markup, a code from the future.
    """
    deleted, odd = await desk.wanted(), await desk.wanted(visible=True)
    await desk.failed(deleted, minutes_ago=3, code="from_the_future")
    await desk.failed(odd, visible=True, minutes_ago=2)
    await desk.failed(await desk.wanted(), minutes_ago=1)
    await _delete(desk.world, deleted)
    await desk.world.execute(
        "UPDATE public.mentors SET full_name = '[/red]' WHERE id = :id", id=odd.id
    )

    first, second, third = await desk.failures()
    assert (first.mentor_id, first.mentor_name) == (deleted.id, "")
    assert alerts.reason(first.error_code)
    assert (second.mentor_name, second.consequence) == ("[/red]", "may not be visible yet")
    assert third.mentor_name == "A mentor"


async def test_a_failure_says_whether_it_is_being_tried_again(desk: Desk) -> None:
    """
    Only while it is open and its mentor's state is on the way.
    """
    retried, idle, resolved = [await desk.wanted() for _ in range(3)]
    for mentor in (retried, resolved):
        await desk.on_its_way(mentor)
    await desk.failed(retried, minutes_ago=3)
    await desk.failed(idle, minutes_ago=2)
    await desk.failed(resolved, minutes_ago=1, resolved_minutes_ago=0)

    found = await desk.failures(resolved_too=True)
    assert [failure.trying_again for failure in found] == [True, False, False]


async def test_the_list_has_an_end(desk: Desk) -> None:
    """
    The oldest so many.
    """
    ids = [await desk.failed(await desk.wanted(), minutes_ago=9 - n) for n in range(3)]
    assert [failure.id for failure in await desk.failures(limit=2)] == ids[:2]


# --------------------------------------------------------------------------------- retry


async def test_a_retry_sends_what_is_to_be_shown_now(desk: Desk) -> None:
    """
    The newer state with a new version, ahead of none, and with the certification it is about.
    """
    mentor = await desk.wanted(visible=True, version=5)
    failure_id = await desk.failed(mentor, visible=False)

    assert await desk.retry(failure_id) == (1, 0, 0, 0)

    event = await desk.world.row("SELECT key, version, payload FROM outbox.events")
    assert (event.key, event.version) == (str(mentor.id), 6)
    assert event.payload == {"visible": True, "certification_id": str(mentor.certification_id)}
    [failure] = await desk.failures()
    assert failure.trying_again  # and open, until Dynamics confirms


async def test_a_retry_that_arrives_resolves_the_failure(desk: Desk) -> None:
    """
    From "needs a person" to "in order" without anything else.
    """
    _, failure_id = await desk.failing()
    await desk.retry(failure_id)
    await desk.deliver()

    assert await desk.failures() == []
    [failure] = await desk.failures(resolved_too=True)
    assert (failure.id, failure.resolution) == (failure_id, "delivered")
    assert _counts(await desk.status()) == {"in_order": 1}


async def test_two_coordinators_at_once_cause_one_send(
    desk: Desk, second_engine: AsyncEngine
) -> None:
    """
    Both wait for the mentor's lock; one starts it, the other hears that it is under way.
    """
    mentor, failure_id = await desk.failing()
    async with desk.engine.begin() as holding:
        await holding.execute(
            text("SELECT 1 FROM public.portal_visibility WHERE mentor_id = :id FOR UPDATE"),
            {"id": mentor.id},
        )
        both = [
            asyncio.create_task(desk.retry(failure_id)),
            asyncio.create_task(desk.retry(failure_id, engine=second_engine)),
        ]

        async def both_wait() -> bool:
            return bool(
                await desk.world.value(
                    "SELECT count(*) = 2 FROM pg_stat_activity"
                    " WHERE datname = current_database() AND wait_event_type = 'Lock'"
                )
            )

        await until(both_wait)

    assert sorted(await asyncio.gather(*both)) == [(0, 1, 0, 0), (1, 0, 0, 0)]
    assert await desk.events() == {str(mentor.id): 3}
    assert await desk.world.value("SELECT replaced FROM outbox.events") == 0


async def test_a_retry_while_the_state_is_in_flight_adds_nothing(desk: Desk) -> None:
    """
    The one on its way says the same.
    """
    mentor, failure_id = await desk.failing()
    await desk.on_its_way(mentor)
    await desk.world.execute(
        "UPDATE outbox.events SET claim_token = gen_random_uuid(), claimed_version = version,"
        " claimed_by = gen_random_uuid(), attempts = 1, first_attempt_at = now()"
    )
    assert await desk.retry(failure_id) == (0, 1, 0, 0)
    assert await desk.events() == {str(mentor.id): 2}


async def test_a_retry_of_something_resolved_does_nothing(desk: Desk) -> None:
    """
    Somebody was quicker.
    """
    mentor = await desk.wanted()
    await desk.confirmed(mentor)
    resolved = await desk.failed(mentor, resolved_minutes_ago=1)
    assert await desk.retry(resolved) == (0, 0, 1, 0)
    assert await desk.events() == {}


async def test_named_twice_is_tried_once(desk: Desk) -> None:
    """
    Also next to a resolved failure of the same mentor.
    """
    mentor, failure_id = await desk.failing()
    resolved = await desk.failed(mentor, resolved_minutes_ago=5)
    assert await desk.retry(failure_id, failure_id, resolved) == (1, 0, 1, 0)
    assert await desk.events() == {str(mentor.id): 3}


@pytest.mark.parametrize("whose", ["nobody's", "another organisation's"])
async def test_an_id_that_is_not_ours_is_refused_and_nothing_is_changed(
    desk: Desk, whose: str
) -> None:
    """
    All or nothing: the good id beside it is not tried either, and the bad one is named.
    """
    _, good = await desk.failing()
    theirs = await desk.wanted(organization_id=desk.world.other)
    bad = await desk.failed(theirs, organization_id=desk.world.other)
    if whose == "nobody's":
        bad = uuid4()

    with pytest.raises(UnknownFailureError, match=str(bad)):
        await desk.retry(good, bad)

    assert await desk.events() == {}
    assert await desk.world.value("SELECT max(version) FROM public.portal_visibility") == 2


async def test_a_mentor_who_is_gone_is_not_said_to_be_on_the_way(desk: Desk) -> None:
    """
    Nothing can be sent for somebody who is not ours; the others are tried.
    """
    deleted, lost = await desk.failing()
    here, kept = await desk.failing()
    await _delete(desk.world, deleted)
    assert await desk.retry(lost, kept) == (1, 0, 0, 1)
    assert list(await desk.events()) == [str(here.id)]


async def test_retrying_everything_goes_through_all_pages(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Each open failure of ours once, whatever the pages; nobody else's.
    """
    monkeypatch.setattr(retry, "PAGE", 2)
    mentors = [(await desk.failing())[0] for _ in range(5)]
    await desk.on_its_way(mentors[3])
    await desk.failed(await desk.wanted(), resolved_minutes_ago=1)
    theirs = await desk.wanted(organization_id=desk.world.other)
    await desk.failed(theirs, organization_id=desk.world.other)

    async def retry_all() -> retry.Retried:
        return await retry.retry_all(desk.engine, organization_id=desk.world.hlf, actor="someone")

    assert await retry_all() == retry.Retried(started=4, under_way=1, resolved=0, gone=0)
    assert set(await desk.events()) == {str(mentor.id) for mentor in mentors}
    assert await retry_all() == retry.Retried(started=0, under_way=5, resolved=0, gone=0)
    await desk.deliver()
    assert await retry_all() == retry.Retried(started=0, under_way=0, resolved=0, gone=0)


# -------------------------------------------------------------------------------- resync


async def test_resync_goes_through_all_pages_and_skips_what_is_on_its_way(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Confirmed or not, each of our mentors is asserted once, and nobody else's.
    """
    monkeypatch.setattr(retry, "PAGE", 2)
    mentors = [await desk.wanted() for _ in range(5)]
    await desk.confirmed(mentors[0])
    await desk.on_its_way(mentors[4])
    await desk.wanted(organization_id=desk.world.other)

    pages = [page async for page in retry.resync(desk.engine, organization_id=desk.world.hlf)]

    assert [seen for seen, _ in pages] == [2, 2, 1]
    assert sum(enqueued for _, enqueued in pages) == 4
    versions = await desk.events()
    assert sorted(versions.values()) == [2, 3, 3, 3, 3]
    assert versions[str(mentors[4].id)] == 2
    await desk.deliver()
    assert _counts(await desk.status()) == {"in_order": 5}


# --------------------------------------------------------------------------------- plans


async def _explain(world: World, query: str, **parameters: object) -> dict[str, Any]:
    [plan] = await world.value("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + query, **parameters)
    document: dict[str, Any] = plan["Plan"]
    return document


def _nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for child in plan.get("Plans", []) for node in _nodes(child))]


@pytest.fixture
async def crowd(world: World) -> World:
    """
    20,000 mentors: all wanted, most confirmed, with failures of a year behind them.
    """
    await world.execute(
        "INSERT INTO public.mentors (id, organization_id, full_name)"
        " SELECT gen_random_uuid(), :hlf, 'A mentor' FROM generate_series(1, 20000)",
        hlf=world.hlf,
    )
    await world.execute(
        "INSERT INTO public.portal_visibility (mentor_id, organization_id, visible, version)"
        " SELECT id, organization_id, random() < 0.5, 2 FROM public.mentors"
    )
    await world.execute(
        "INSERT INTO public.portal_confirmations (mentor_id, organization_id, visible, version)"
        " SELECT mentor_id, organization_id, visible, version FROM public.portal_visibility"
        " WHERE random() < 0.95"
    )
    await world.execute(
        "INSERT INTO outbox.events (destination, key, organization_id, version, payload)"
        " SELECT 'dynamics', mentor_id, organization_id, version, '{}'"
        " FROM public.portal_visibility LIMIT 500"
    )
    await world.execute(
        "INSERT INTO public.dynamics_sync_failures (organization_id, mentor_id, visible, version,"
        " error_code, error_message, retry_count, recoverable, resolved_at, resolution)"
        " SELECT organization_id, mentor_id, visible, 1, 'timeout', '', 3, true,"
        "  CASE WHEN n > 50 THEN now() END, CASE WHEN n > 50 THEN 'delivered' END"
        " FROM (SELECT *, row_number() OVER () AS n FROM public.portal_visibility) AS desired"
    )
    for table in (
        "public.mentors",
        "public.portal_visibility",
        "public.portal_confirmations",
        "public.dynamics_sync_failures",
        "outbox.events",
    ):
        await world.execute(f"ANALYZE {table}")
    return world


async def test_the_status_of_20000_mentors_reads_each_table_once(crowd: World) -> None:
    """
    No table is gone through again and again, and little more is read than there is.
    """
    plan = await _explain(crowd, alerts.STATUS.text, organization_id=crowd.hlf)
    again = [
        (node["Node Type"], node.get("Relation Name"), node["Actual Loops"])
        for node in _nodes(plan)
        if node["Node Type"] == "Seq Scan" and node["Actual Loops"] > 3  # parallel workers
    ]
    assert again == [], json.dumps(plan, indent=1)
    # The tables have about 700 pages of 8 kB in all.
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 5000


async def test_the_list_of_open_failures_reads_open_failures_only(crowd: World) -> None:
    """
    50 of 20,000: by index, in a few hundred pages.
    """
    plan = await _explain(
        crowd, alerts.FAILURES.text, organization_id=crowd.hlf, resolved_too=False, limit=1000
    )
    scanned = {
        node.get("Relation Name") for node in _nodes(plan) if node["Node Type"] == "Seq Scan"
    }
    assert scanned.isdisjoint({"dynamics_sync_failures", "mentors"}), json.dumps(plan, indent=1)
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 1000
