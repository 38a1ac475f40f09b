"""
Pauses: a mentor is paused while any pause is open, and each is lifted by who opened it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from tests.factories import NEXT_YEAR, TODAY, YESTERDAY
from worker.certifications import PauseManagementService
from worker.errors import UnknownMentorError

if TYPE_CHECKING:
    from uuid import UUID

    from tests.factories import Mentor, World


@pytest.fixture
def pauses(world: World) -> PauseManagementService:
    """
    Pauses by hand.
    """
    return PauseManagementService(world.engine)


async def open_reasons(world: World, mentor: Mentor) -> list[str]:
    """
    Why a mentor is paused.
    """
    rows = await world.rows(
        "SELECT reason FROM public.mentor_pauses"
        " WHERE mentor_id = :id AND resumed_at IS NULL ORDER BY reason",
        id=mentor.id,
    )
    return [row.reason for row in rows]


async def test_a_mentor_is_paused_by_hand_once(
    world: World, pauses: PauseManagementService
) -> None:
    """
    The second time somebody had done so already, and nothing is written.
    """
    mentor = await world.mentor()
    assert await pauses.is_paused(mentor.id) is False

    assert await pauses.pause(mentor.id) is True
    assert await pauses.pause(mentor.id) is False

    assert await pauses.is_paused(mentor.id) is True
    assert await open_reasons(world, mentor) == ["manual"]


async def test_two_people_who_pause_at_once_open_one_pause(
    world: World, pauses: PauseManagementService
) -> None:
    """
    One of them did it, the others learn that it was done.
    """
    mentor = await world.mentor()

    done = await asyncio.gather(*(pauses.pause(mentor.id) for _ in range(5)))

    assert sorted(done) == [False] * 4 + [True]
    assert await open_reasons(world, mentor) == ["manual"]


async def test_a_pause_by_hand_is_lifted_by_hand_once(
    world: World, pauses: PauseManagementService
) -> None:
    """
    The second time there is nothing to lift.
    """
    mentor = await world.mentor()
    await pauses.pause(mentor.id)

    assert await pauses.resume(mentor.id) is True
    assert await pauses.resume(mentor.id) is False

    assert await pauses.is_paused(mentor.id) is False


async def test_the_history_of_pauses_is_kept(world: World, pauses: PauseManagementService) -> None:
    """
    Each pause is a row of its own, closed ones included.
    """
    mentor = await world.mentor()
    for _ in range(2):
        await pauses.pause(mentor.id)
        await pauses.resume(mentor.id)
    await pauses.pause(mentor.id)

    rows = await world.rows("SELECT paused_at, resumed_at FROM public.mentor_pauses ORDER BY 1")

    assert [row.resumed_at is None for row in rows] == [False, False, True]
    assert all(row.resumed_at >= row.paused_at for row in rows[:2])


async def test_a_mentor_who_does_not_exist_is_not_paused(pauses: PauseManagementService) -> None:
    """
    The sentence names the id, for pausing and for resuming.
    """
    nobody = uuid4()

    with pytest.raises(UnknownMentorError, match=str(nobody)):
        await pauses.pause(nobody)
    with pytest.raises(UnknownMentorError, match=str(nobody)):
        await pauses.resume(nobody)


async def test_pausing_by_hand_does_not_change_the_portal(
    world: World, pauses: PauseManagementService
) -> None:
    """
    Certifications alone decide what the portal shows.
    """
    mentor = await world.mentor(expires_on=NEXT_YEAR)

    await pauses.pause(mentor.id)
    await pauses.resume(mentor.id)

    assert await world.rows("SELECT FROM public.portal_visibility") == []
    assert await world.rows("SELECT FROM outbox.events") == []


async def test_an_expiry_pauses_also_who_is_paused_by_hand(
    world: World, pauses: PauseManagementService
) -> None:
    """
    The two pauses are independent of each other.
    """
    mentor = await world.mentor()
    await pauses.pause(mentor.id)

    await world.certifications.expire(mentor.certification_id, today=TODAY)

    assert await open_reasons(world, mentor) == ["certification_expired", "manual"]


async def test_a_renewal_leaves_a_pause_by_hand_open(
    world: World, pauses: PauseManagementService
) -> None:
    """
    What a person paused, a person resumes; the portal shows the mentor all the same.
    """
    mentor = await world.mentor()
    await pauses.pause(mentor.id)
    await world.certifications.expire(mentor.certification_id, today=TODAY)

    done = await world.certifications.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)

    assert done.visible is True
    assert await open_reasons(world, mentor) == ["manual"]
    assert await pauses.is_paused(mentor.id) is True


async def test_resuming_by_hand_leaves_the_automatic_pause_open(
    world: World, pauses: PauseManagementService
) -> None:
    """
    Nobody resumes an expired mentor by hand.
    """
    mentor = await world.mentor()
    await world.certifications.expire(mentor.certification_id, today=TODAY)

    assert await pauses.resume(mentor.id) is False

    assert await pauses.is_paused(mentor.id) is True


async def expired_pauses(world: World) -> list[UUID]:
    """
    The certifications whose expiry still pauses a mentor.
    """
    rows = await world.rows(
        "SELECT certification_id FROM public.mentor_pauses WHERE resumed_at IS NULL"
    )
    return [row.certification_id for row in rows]


async def test_a_renewal_lifts_only_the_pause_that_its_certification_caused(world: World) -> None:
    """
    The other certification is still expired, and so the mentor is still paused.
    """
    mentor = await world.mentor()
    second = await world.certification(mentor.id, expires_on=YESTERDAY)
    await world.certifications.expire(mentor.certification_id, today=TODAY)
    await world.certifications.expire(second, today=TODAY)

    await world.certifications.renew(second, NEXT_YEAR, today=TODAY)

    assert await expired_pauses(world) == [mentor.certification_id]


async def test_a_certification_that_expires_again_pauses_again(world: World) -> None:
    """
    Renewed, run out, expired: the second pause is new, the first stays closed.
    """
    mentor = await world.mentor()
    await world.certifications.expire(mentor.certification_id, today=TODAY)
    await world.certifications.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)

    await world.certifications.expire(
        mentor.certification_id, today=NEXT_YEAR.replace(year=NEXT_YEAR.year + 1)
    )

    assert await expired_pauses(world) == [mentor.certification_id]
    assert await world.value("SELECT count(*) FROM public.mentor_pauses") == 2


async def test_an_expiry_finds_its_pause_already_open(world: World) -> None:
    """
    An open pause of the same certification, wherever it came from, is not doubled.
    """
    mentor = await world.mentor()
    await world.execute(
        "INSERT INTO public.mentor_pauses (mentor_id, certification_id, reason)"
        " VALUES (:mentor, :certification, 'certification_expired')",
        mentor=mentor.id,
        certification=mentor.certification_id,
    )

    await world.certifications.expire(mentor.certification_id, today=TODAY)

    assert await expired_pauses(world) == [mentor.certification_id]


async def test_a_pause_that_began_ahead_of_the_clock_can_be_lifted(
    world: World, pauses: PauseManagementService
) -> None:
    """
    After a failover to a server whose clock is behind, no pause ends before it began.
    """
    mentor = await world.mentor()
    await world.certifications.expire(mentor.certification_id, today=TODAY)
    await pauses.pause(mentor.id)
    await world.execute("UPDATE public.mentor_pauses SET paused_at = now() + interval '1 hour'")

    await pauses.resume(mentor.id)
    await world.certifications.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)

    assert await open_reasons(world, mentor) == []
