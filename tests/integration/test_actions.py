"""
What a person does, on a real database: it happens once, is written down, and conflicts are said.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from tests.conftest import until
from tests.desk import Desk
from tests.integration.test_callers import coordinator
from worker.coordinator import callers
from worker.coordinator.actions import Actions, NoteNeededError
from worker.coordinator.idempotency import KeyReusedError
from worker.coordinator.retry import Retried
from worker.errors import (
    NotAllowedError,
    RenewalNotInFutureError,
    UnknownCertificationError,
    UnknownFailureError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.factories import World

NEXT_YEAR = date.today() + timedelta(days=365)  # noqa: DTZ011 (a year, give or take a day)


@pytest.fixture
async def actions(world: World) -> AsyncIterator[Actions]:
    """
    Of a coordinator of HLF's, unless a test says otherwise.
    """
    actions = Actions(world.engine, timezone="Europe/Oslo")
    yield actions
    await actions.aclose()


@pytest.fixture
def desk(world: World) -> Desk:
    """
    Situations to act in.
    """
    return Desk(world)


@pytest.fixture
def hlf(world: World) -> Iterator[None]:
    """
    Whoever asks in this test is HLF's coordinator.
    """
    with callers.asking(coordinator(world.hlf)):
        yield


async def audit(world: World) -> list[tuple[Any, ...]]:
    """
    Who did what, in the order it was done.
    """
    rows = await world.rows(
        "SELECT subject, action, target, mentor_id, outcome, note FROM outbox.audit ORDER BY id"
    )
    return [tuple(row) for row in rows]


async def test_what_is_done_is_written_down(world: World, desk: Desk, actions: Actions) -> None:
    """
    Who, what, about which failure and mentor, and what it came to.
    """
    mentor, failure_id = await desk.failing()
    resolved = await desk.failed(await desk.wanted(), resolved_minutes_ago=5)

    with callers.asking(coordinator(world.hlf)):
        done = await actions.retry([failure_id, resolved])

    assert done == Retried(started=1, under_way=0, resolved=1, gone=0)
    written = await audit(world)
    assert ("somebody", "retry", failure_id, mentor.id, "started", "") in written
    assert [(one[2], one[4]) for one in written if one[2] == resolved] == [(resolved, "resolved")]
    assert len(written) == 2


async def test_two_coordinators_who_press_at_once_cause_one_send(
    world: World, desk: Desk, actions: Actions
) -> None:
    """
    Both are told what happened, and both are written down.
    """
    _, failure_id = await desk.failing()

    async def press(name: str) -> Retried:
        with callers.asking(replace(coordinator(world.hlf), subject=name, name=name)):
            return await actions.retry([failure_id])

    done = await asyncio.gather(*(press(name) for name in ("one", "two", "three")))

    assert sorted(one.started for one in done) == [0, 0, 1]
    assert sum(one.under_way for one in done) == 2
    assert await world.value("SELECT count(*) FROM outbox.events") == 1
    assert await world.value("SELECT version FROM outbox.events") == 3
    assert sorted(one[4] for one in await audit(world)) == ["started", "under_way", "under_way"]


async def somebody_waits_for_a_lock(world: World) -> bool:
    """
    Whether some connection waits for another one.
    """
    return bool(
        await world.value(
            "SELECT count(*) > 0 FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
    )


@pytest.mark.usefixtures("hlf")
async def test_pressing_while_the_worker_succeeds_sends_nothing_more(
    world: World, desk: Desk, actions: Actions
) -> None:
    """
    The delivery is committed after the failure was read and before the mentor's lock: neither
    the event nor the failure is there any more, and the answer is that all is in order.
    """
    mentor, failure_id = await desk.failing()
    await desk.on_its_way(mentor)
    async with world.engine.connect() as holder:
        await holder.execute(
            text("SELECT FROM public.portal_visibility WHERE mentor_id = :id FOR NO KEY UPDATE"),
            {"id": mentor.id},
        )
        pressed = asyncio.create_task(actions.retry([failure_id]))
        await until(lambda: somebody_waits_for_a_lock(world))
        await desk.deliver()
        await holder.rollback()
        done = await pressed

    assert done == Retried(started=0, under_way=0, resolved=1, gone=0)
    assert await world.value("SELECT count(*) FROM outbox.events") == 0
    assert await world.value("SELECT resolution FROM public.dynamics_sync_failures") == "delivered"


@pytest.mark.usefixtures("hlf")
async def test_a_failure_that_is_in_order_is_not_sent_again(
    world: World, desk: Desk, actions: Actions
) -> None:
    """
    Whatever button of an old page is pressed.
    """
    resolved = await desk.failed(await desk.wanted(), resolved_minutes_ago=5)

    done = await actions.retry([resolved])
    handled = await actions.handle(resolved, note="Hidden by hand.")

    assert done == Retried(started=0, under_way=0, resolved=1, gone=0)
    assert not handled.done
    assert await world.value("SELECT count(*) FROM outbox.events") == 0
    assert await world.value("SELECT resolution FROM public.dynamics_sync_failures") == "delivered"
    assert [one[4] for one in await audit(world)] == ["resolved", "resolved"]


@pytest.mark.usefixtures("hlf")
async def test_all_are_tried_again(world: World, desk: Desk, actions: Actions) -> None:
    """
    Each is written down by itself.
    """
    for _ in range(3):
        await desk.failing()

    assert (await actions.retry_all()).started == 3
    assert len(await audit(world)) == 3


@pytest.mark.usefixtures("hlf")
async def test_what_was_done_by_hand_is_said_and_written_down(
    world: World, desk: Desk, actions: Actions
) -> None:
    """
    The failure is in order, by whom, and the note stays.
    """
    mentor, failure_id = await desk.failing()

    handled = await actions.handle(failure_id, note="  Hidden in Dynamics.\nChecked. ")
    again = await actions.handle(failure_id, note="Me too.")

    assert (handled.done, again.done) == (True, False)
    row = await world.row(
        "SELECT resolution, resolved_by, resolved_at IS NOT NULL FROM public.dynamics_sync_failures"
    )
    assert tuple(row) == ("manual", "Somebody", True)
    assert await audit(world) == [
        ("somebody", "handle", failure_id, mentor.id, "handled", "Hidden in Dynamics.\nChecked."),
        ("somebody", "handle", failure_id, mentor.id, "resolved", "Me too."),
    ]


@pytest.mark.usefixtures("hlf")
@pytest.mark.parametrize("note", ["", " \n", "x" * 1001, "a\x00b", "\x1b[2J", "\ud800"])
async def test_a_note_is_needed_and_is_text(desk: Desk, actions: Actions, note: str) -> None:
    """
    Somebody will read it.
    """
    _, failure_id = await desk.failing()
    with pytest.raises(NoteNeededError):
        await actions.handle(failure_id, note=note)


async def test_a_viewer_is_refused_and_that_is_written_down(
    world: World, desk: Desk, actions: Actions
) -> None:
    """
    Each action, in their own name.
    """
    mentor, failure_id = await desk.failing()

    with callers.asking(replace(coordinator(world.hlf), role="viewer", subject="looks")):
        for action in (
            actions.retry([failure_id]),
            actions.retry_all(),
            actions.handle(failure_id, note="Done."),
            actions.renew(mentor.certification_id, NEXT_YEAR),
        ):
            with pytest.raises(NotAllowedError):
                await action

    assert await world.value("SELECT count(*) FROM outbox.events") == 0
    refused = "refused: NotAllowedError"
    assert await audit(world) == [
        ("looks", "retry", failure_id, None, refused, ""),
        ("looks", "retry", None, None, refused, ""),
        ("looks", "handle", failure_id, None, refused, ""),
        ("looks", "renew", mentor.certification_id, None, refused, ""),
    ]


async def test_another_organisation_touches_nothing(
    world: World, desk: Desk, actions: Actions
) -> None:
    """
    What is not theirs is not there; that they tried is written down in their own history.
    """
    mentor, failure_id = await desk.failing()

    with callers.asking(coordinator(world.other)):
        with pytest.raises(UnknownFailureError):
            await actions.retry([failure_id])
        with pytest.raises(UnknownFailureError):
            await actions.handle(failure_id, note="Mine.")
        with pytest.raises(UnknownCertificationError):
            await actions.renew(mentor.certification_id, NEXT_YEAR)
        assert (await actions.retry_all()).started == 0

    assert await world.value("SELECT count(*) FROM outbox.events") == 0
    assert await world.value("SELECT resolved_at FROM public.dynamics_sync_failures") is None
    whose = {row[0] for row in await world.rows("SELECT organization_id FROM outbox.audit")}
    assert whose == {world.other}


# ------------------------------------------------------------------------------ renewing


@pytest.mark.usefixtures("hlf")
async def test_a_renewal_says_whether_the_portal_follows(
    world: World, desk: Desk, actions: Actions
) -> None:
    """
    It stands at once; waiting tells more.
    """
    mentor = await desk.wanted()

    pending = await actions.renew(mentor.certification_id, NEXT_YEAR)
    assert (pending.portal, pending.visible, pending.version) == ("pending", True, 3)

    waiting = asyncio.create_task(
        actions.renew(mentor.certification_id, NEXT_YEAR, wait_seconds=15)
    )
    while not waiting.done():
        await desk.deliver()
    assert (await waiting).portal == "confirmed"
    assert [one[1:5] for one in await audit(world)] == [
        ("renew", mentor.certification_id, mentor.id, f"until {NEXT_YEAR}")
    ] * 2


@pytest.mark.usefixtures("hlf")
async def test_a_request_that_comes_again_renews_once(
    world: World, desk: Desk, actions: Actions
) -> None:
    """
    Its key says so; the answer is the same renewal, and how the portal is by now.
    """
    mentor = await desk.wanted()

    first = await actions.renew(mentor.certification_id, NEXT_YEAR, key="once")
    await desk.deliver()
    again = await actions.renew(mentor.certification_id, NEXT_YEAR, key="once")

    assert (first.repeated, again.repeated) == (False, True)
    assert again == replace(first, repeated=True, portal="confirmed")
    assert await world.value("SELECT version FROM public.portal_visibility") == 3
    with pytest.raises(KeyReusedError):
        await actions.renew(mentor.certification_id, NEXT_YEAR + timedelta(days=1), key="once")


@pytest.mark.usefixtures("hlf")
async def test_of_many_requests_at_once_with_one_key_one_renews(
    world: World, desk: Desk, actions: Actions
) -> None:
    """
    The others wait for it, and answer as it did.
    """
    mentor = await desk.wanted()

    answers = await asyncio.gather(
        *(actions.renew(mentor.certification_id, NEXT_YEAR, key="k") for _ in range(6))
    )

    assert sum(not one.repeated for one in answers) == 1
    assert {one.version for one in answers} == {3}
    assert await world.value("SELECT count(*) FROM outbox.audit") == 1


async def test_a_key_is_its_callers_own(world: World, desk: Desk, actions: Actions) -> None:
    """
    Two people may choose the same.
    """
    mentor = await desk.wanted()
    for subject in ("one", "two"):
        with callers.asking(replace(coordinator(world.hlf), subject=subject)):
            done = await actions.renew(mentor.certification_id, NEXT_YEAR, key="k")
            assert not done.repeated


@pytest.mark.usefixtures("hlf")
async def test_a_renewal_that_is_refused_uses_up_no_key(
    world: World, desk: Desk, actions: Actions
) -> None:
    """
    The request can be mended and sent again.
    """
    mentor = await desk.wanted()
    with pytest.raises(RenewalNotInFutureError):
        await actions.renew(mentor.certification_id, date(2020, 1, 1), key="k")
    with pytest.raises(UnknownCertificationError):
        await actions.renew(uuid4(), NEXT_YEAR, key="k")

    assert not (await actions.renew(mentor.certification_id, NEXT_YEAR, key="k")).repeated
    assert [one[4] for one in await audit(world)] == [
        "refused: RenewalNotInFutureError",
        "refused: UnknownCertificationError",
        f"until {NEXT_YEAR}",
    ]
