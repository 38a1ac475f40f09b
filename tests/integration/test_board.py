"""
What the page knows: whom it names, whom it counts, and what it tells about one mentor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from outbox import gate
from tests.desk import Desk
from tests.factories import NEXT_YEAR, TODAY
from worker.coordinator import alerts, mentors, nights

if TYPE_CHECKING:
    from outbox.outcome import AutomaticReason
    from tests.factories import Mentor, World
    from worker.coordinator.alerts import Board


@pytest.fixture
def desk(world: World) -> Desk:
    """
    A coordinator without a care.
    """
    return Desk(world)


async def _board(desk: Desk, **which: Any) -> Board:  # noqa: ANN401 (passed on)
    async with desk.engine.connect() as connection:
        forgotten = await alerts.unaccounted(connection, organization_id=desk.world.hlf)
        return await alerts.board(
            connection, organization_id=desk.world.hlf, unaccounted=forgotten, **which
        )


async def _told(desk: Desk, mentor: Mentor) -> mentors.Mentor:
    async with desk.engine.connect() as connection:
        told = await mentors.mentor(connection, mentor.id, organization_id=desk.world.hlf)
    assert told is not None
    return told


async def _close_gate(desk: Desk, reason: AutomaticReason = "outage") -> None:
    async with desk.engine.begin() as connection:
        await gate.close(
            connection,
            destination="dynamics",
            organization_id=desk.world.hlf,
            reason=reason,
            message="",
            closed_by="worker",
            backoff=gate.OUTAGE,
        )


async def _call(desk: Desk, mentor: Mentor, name: str) -> None:
    await desk.world.execute(
        "UPDATE public.mentors SET full_name = :name WHERE id = :id", id=mentor.id, name=name
    )


async def _handle(desk: Desk, mentor: Mentor, by: str = "Coordinator") -> None:
    await desk.world.execute(
        "UPDATE public.dynamics_sync_failures SET resolved_at = now(), resolution = 'manual',"
        " resolved_by = :by WHERE mentor_id = :id AND resolved_at IS NULL",
        id=mentor.id,
        by=by,
    )


# --------------------------------------------------------------------------------- board


async def test_with_no_mentors_everything_is_in_order(desk: Desk) -> None:
    """
    Nobody is named and nobody counted.
    """
    now = await _board(desk)
    assert now.in_order
    assert (now.maybe_visible, now.maybe_hidden) == (0, 0)
    assert not now.needing.first
    assert not now.waiting.first


@pytest.mark.parametrize("visible", [False, True])
async def test_each_concern_is_in_one_list(desk: Desk, visible: bool) -> None:  # noqa: FBT001
    """
    On the way: waiting, also after a failure. Failed: needs somebody. Confirmed: neither.
    """
    await desk.confirmed(await desk.wanted(visible=visible))
    waiting = await desk.wanted(visible=visible)
    await desk.on_its_way(waiting)
    failed = await desk.wanted(visible=visible)
    failure = await desk.failed(failed, visible=visible, minutes_ago=9)
    again = await desk.wanted(visible=visible)
    retried = await desk.failed(again, visible=visible, minutes_ago=5)
    await desk.on_its_way(again)

    now = await _board(desk)

    assert [one.failure_id for one in now.needing.first] == [failure]
    assert {one.mentor_id: one.failure_id for one in now.waiting.first} == {
        again.id: retried,
        waiting.id: None,
    }
    assert (now.needing.number, now.waiting.number, now.unaccounted) == (1, 2, 0)
    assert (now.maybe_visible, now.maybe_hidden) == ((0, 3) if visible else (3, 0))
    assert not now.in_order


async def test_what_is_said_once_more_is_no_concern(desk: Desk) -> None:
    """
    The portal confirmed it already.
    """
    mentor = await desk.wanted()
    await desk.confirmed(mentor)
    await desk.on_its_way(mentor)
    assert (await _board(desk)).in_order


async def test_during_an_outage_what_passes_by_itself_needs_nobody(desk: Desk) -> None:
    """
    One banner, and a list that waits; what does not pass still needs somebody.
    """
    passing = await desk.wanted()
    await desk.failed(passing, code="timeout")
    await desk.world.execute("UPDATE public.dynamics_sync_failures SET recoverable = true")
    lasting, _ = await desk.failing()
    assert (await _board(desk)).needing.number == 2

    await _close_gate(desk)

    now = await _board(desk)
    assert now.gate.reason == "outage"
    assert [one.mentor_id for one in now.needing.first] == [lasting.id]
    [waiting] = now.waiting.first
    assert (waiting.mentor_id, waiting.next_try_at, waiting.error_code) == (
        passing.id,
        None,
        "timeout",
    )
    assert now.maybe_visible == 2


async def test_hiding_comes_before_showing_and_the_oldest_first(desk: Desk) -> None:
    """
    Whom nobody may see is worse than whom nobody sees.
    """
    for visible, minutes in ((True, 9), (False, 1), (False, 5)):
        mentor = await desk.wanted(visible=visible)
        await desk.on_its_way(mentor, minutes=minutes)
    first = (await _board(desk)).waiting.first
    assert [one.visible for one in first] == [False, False, True]
    assert first[0].since < first[1].since


async def test_a_table_has_an_end_and_its_number_has_none(desk: Desk) -> None:
    """
    All are counted, also those that are not named.
    """
    for _ in range(3):
        await desk.failing()
        await desk.on_its_way(await desk.wanted())
    now = await _board(desk, shown=2)
    assert [len(now.needing.first), now.needing.number, now.needing.to_hide] == [2, 3, 3]
    assert [len(now.waiting.first), now.waiting.number, now.waiting.to_hide] == [2, 3, 3]
    assert now.needing.more


async def test_counting_ends_too(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A million on the way cost no more than the first ten thousand.
    """
    monkeypatch.setattr(alerts, "MOST_COUNTED", 2)
    for _ in range(3):
        await desk.failing()
        await desk.on_its_way(await desk.wanted())
        await desk.wanted()
    now = await _board(desk)
    assert (now.needing.number, now.waiting.number, now.unaccounted) == (2, 2, 2)


async def test_another_organisations_mentors_are_not_on_the_board(desk: Desk) -> None:
    """
    Neither counted nor named, and their gate is not ours.
    """
    theirs = await desk.wanted(organization_id=desk.world.other)
    await desk.on_its_way(theirs)
    failing = await desk.wanted(organization_id=desk.world.other)
    await desk.failed(failing, organization_id=desk.world.other)
    await desk.wanted(organization_id=desk.world.other)
    assert (await _board(desk)).in_order


async def test_whom_somebody_saw_to_is_not_forgotten_until_something_changes(desk: Desk) -> None:
    """
    Handled by hand is no worry; a newer wish that nobody sends is one.
    """
    mentor, _ = await desk.failing()
    await _handle(desk, mentor)
    assert (await _board(desk)).in_order

    await desk.world.execute("UPDATE public.portal_visibility SET version = version + 1")
    assert (await _board(desk)).unaccounted == 1


async def test_lately_settled_are_confirmed_or_handled_and_the_latest_come_first(
    desk: Desk,
) -> None:
    """
    By Dynamics without a name, by a person with one.
    """
    delivered = await desk.wanted()
    await desk.on_its_way(delivered)
    await desk.deliver()
    handled, _ = await desk.failing()
    await _handle(desk, handled, by="Coordinator")
    async with desk.engine.connect() as connection:
        lately = await alerts.settled_lately(connection, organization_id=desk.world.hlf)
        theirs = await alerts.settled_lately(connection, organization_id=desk.world.other)
    assert [(one.mentor_id, one.by) for one in lately] == [
        (handled.id, "Coordinator"),
        (delivered.id, None),
    ]
    assert not theirs


async def test_without_a_night_run_nothing_is_said_about_one(desk: Desk) -> None:
    """
    And what another organisation ran is none of ours.
    """
    async with desk.engine.connect() as connection:
        await nights.begin(connection, organization_id=desk.world.other)
        assert await nights.last(connection, organization_id=desk.world.hlf) is None


# -------------------------------------------------------------------------------- mentors


async def test_a_name_is_found_by_its_parts_as_they_are_written(desk: Desk) -> None:
    """
    In any case; a percent sign is a percent sign; and nobody of another organisation.
    """
    for name in ("Ærlig Østby", "100% Sikker", "Åse_Lie"):
        await _call(desk, await desk.wanted(), name)
    await _call(desk, await desk.wanted(organization_id=desk.world.other), "Ærlig Annen")

    async def found(words: str) -> list[str]:
        async with desk.engine.connect() as connection:
            rows, _ = await mentors.search(connection, words, organization_id=desk.world.hlf)
        return [one.mentor_name for one in rows]

    assert await found("ærlig") == ["Ærlig Østby"]
    assert await found("ær øst") == ["Ærlig Østby"]
    assert await found("0%") == ["100% Sikker"]
    assert await found("_") == ["Åse_Lie"]
    assert await found("!") == []


async def test_a_search_says_that_there_are_more(desk: Desk) -> None:
    """
    The first so many by name.
    """
    for name in ("C", "A", "B"):
        await _call(desk, await desk.wanted(), name)
    async with desk.engine.connect() as connection:
        found, more = await mentors.search(connection, "", organization_id=desk.world.hlf, limit=2)
    assert [one.mentor_name for one in found] == ["A", "B"]
    assert more


async def test_each_state_has_its_name(desk: Desk) -> None:
    """
    As the page calls it, in the list as on the mentor's own page.
    """
    states: dict[str, Mentor] = {"untouched": await desk.world.mentor()}
    states["ok"] = await desk.wanted()
    await desk.confirmed(states["ok"])
    states["pending"] = await desk.wanted()
    await desk.on_its_way(states["pending"])
    states["failed"], _ = await desk.failing()
    states["handled"], _ = await desk.failing()
    await _handle(desk, states["handled"])
    for state, mentor in states.items():
        await _call(desk, mentor, state)
        assert (await _told(desk, mentor)).state == state
    async with desk.engine.connect() as connection:
        found, _ = await mentors.search(connection, "", organization_id=desk.world.hlf)
    assert {one.mentor_name: one.state for one in found} == {state: state for state in states}


async def test_the_time_line_tells_a_whole_year(desk: Desk) -> None:
    """
    Ran out, paused, hidden; renewed, resumed, shown.
    """
    mentor = await desk.world.mentor()
    certifications = desk.world.certifications
    await certifications.expire(mentor.certification_id, today=TODAY)
    await desk.deliver()
    expired = await _told(desk, mentor)
    assert (expired.state, expired.visible) == ("ok", False)
    assert sorted(entry.what for entry in expired.history) == [
        "delivered_hidden",
        "expired",
        "paused",
    ]

    await certifications.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)
    waiting = await _told(desk, mentor)
    assert (waiting.state, waiting.visible, waiting.live) == ("pending", True, True)
    await desk.deliver()

    told = await _told(desk, mentor)
    assert sorted(entry.what for entry in told.history) == [
        "delivered_hidden",
        "delivered_shown",
        "paused",
        "renewed",
        "resumed",
    ]
    assert [one.expires_on for one in told.certifications] == [NEXT_YEAR]


async def test_a_failure_is_told_with_its_cause(desk: Desk) -> None:
    """
    What to press, since when, and what IT wants to know.
    """
    mentor, failure = await desk.failing()
    told = await _told(desk, mentor)
    assert (told.failure_id, told.error_code, told.failure_message) == (
        failure,
        "record_not_found",
        "A sentence.",
    )
    assert told.since is not None


async def test_whoever_left_the_register_is_told_of_while_a_failure_is_open(desk: Desk) -> None:
    """
    The portal may still show them; afterwards there is nobody to tell about.
    """
    mentor, _ = await desk.failing()
    await desk.world.execute("DELETE FROM public.portal_visibility")
    await desk.world.execute("DELETE FROM public.certifications")
    await desk.world.execute("DELETE FROM public.mentors")
    told = await _told(desk, mentor)
    assert (told.state, told.in_register, told.name) == ("failed", False, "")
    await _handle(desk, mentor)
    async with desk.engine.connect() as connection:
        found = await mentors.mentor(connection, mentor.id, organization_id=desk.world.hlf)
    assert found is None


async def test_nobody_and_others_are_not_told_of(desk: Desk) -> None:
    """
    Whatever id is asked for.
    """
    theirs = await desk.wanted(organization_id=desk.world.other)
    await desk.on_its_way(theirs)
    async with desk.engine.connect() as connection:
        for mentor_id in (uuid4(), theirs.id):
            assert (
                await mentors.mentor(connection, mentor_id, organization_id=desk.world.hlf) is None
            )
