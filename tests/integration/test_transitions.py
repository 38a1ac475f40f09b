"""
Transitions: everything that follows is written in one transaction, or nothing is.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError

from outbox import store
from tests.conftest import until
from tests.factories import NEXT_YEAR, TODAY, YESTERDAY
from worker import database
from worker.certifications import transitions, visibility
from worker.certifications.transitions import CertificationManagementService, Expired
from worker.errors import (
    HeldError,
    RenewalNotInFutureError,
    StillValidError,
    UnknownCertificationError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from sqlalchemy.ext.asyncio import AsyncEngine

    from tests.factories import Mentor, World
    from worker.certifications.transitions import Transition

TOMORROW = TODAY + timedelta(days=1)

WRITTEN = (
    "public.certifications",
    "public.mentor_pauses",
    "public.portal_visibility",
    "outbox.events",
)
"""Everything that a transition may touch."""


async def everything(world: World) -> dict[str, list[str]]:
    """
    Every row of every table that a transition may touch.
    """
    return {
        table: [
            row[0]
            for row in await world.rows(f"SELECT CAST(t AS text) FROM {table} AS t ORDER BY 1")  # noqa: S608 (our own names)
        ]
        for table in WRITTEN
    }


async def expire_all(world: World, *, today: date = TODAY) -> list[Expired]:
    """
    The pages of one whole bulk expiry.
    """
    return [page async for page in world.certifications.expire_all(today=today)]


async def known_mentors(world: World, number: int) -> list[Mentor]:
    """
    Mentors whose certifications have run out again after a renewal, in the order of a page.
    """
    mentors = sorted(await world.mentors(number), key=lambda mentor: mentor.id)
    for mentor in mentors:
        await world.certifications.renew(mentor.certification_id, TOMORROW, today=TODAY)
    await world.execute("UPDATE public.certifications SET expires_on = :day", day=YESTERDAY)
    return mentors


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Pages wait as long as anybody, so that a test can see them stand.
    """
    monkeypatch.setattr(transitions, "PATIENCE_MILLISECONDS", 60_000)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Pages hardly wait.
    """
    monkeypatch.setattr(transitions, "PATIENCE_MILLISECONDS", 1)


async def visible(world: World, mentor: Mentor) -> bool:
    """
    What the portal has to show for a mentor.
    """
    desired: bool = await world.value(
        "SELECT visible FROM public.portal_visibility WHERE mentor_id = :id", id=mentor.id
    )
    return desired


async def open_pauses(world: World, mentor: Mentor) -> list[tuple[str, UUID | None]]:
    """
    Reason and certification of the mentor's open pauses.
    """
    rows = await world.rows(
        "SELECT reason, certification_id FROM public.mentor_pauses"
        " WHERE mentor_id = :id AND resumed_at IS NULL ORDER BY reason, certification_id",
        id=mentor.id,
    )
    return [(row.reason, row.certification_id) for row in rows]


# ------------------------------------------------------------------ all of it, or nothing


async def test_expiry_writes_certification_pause_visibility_and_event(world: World) -> None:
    """
    One transition leaves all four rows behind.
    """
    mentor = await world.mentor()

    done = await world.certifications.expire(mentor.certification_id, today=TODAY)

    assert done is not None
    assert done.visible is False
    certification = await world.row("SELECT status, expired_at FROM public.certifications")
    assert certification.status == "expired"
    assert certification.expired_at is not None
    assert await open_pauses(world, mentor) == [("certification_expired", mentor.certification_id)]
    assert await visible(world, mentor) is False
    event = await world.row("SELECT key, version, payload FROM outbox.events")
    assert (event.key, event.version) == (str(mentor.id), done.version)
    assert event.payload == {"visible": False, "certification_id": str(mentor.certification_id)}


async def test_renewal_lifts_the_pause_and_shows_the_mentor(world: World) -> None:
    """
    After a renewal nothing of the expiry is left but history.
    """
    mentor = await world.mentor()
    await world.certifications.expire(mentor.certification_id, today=TODAY)

    done = await world.certifications.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)

    assert done.visible is True
    assert await open_pauses(world, mentor) == []
    certification = await world.row(
        "SELECT status, expires_on, expired_at, renewed_at FROM public.certifications"
    )
    assert (certification.status, certification.expires_on) == ("valid", NEXT_YEAR)
    assert certification.expired_at is None
    assert certification.renewed_at is not None
    assert await world.value("SELECT payload ->> 'visible' FROM outbox.events") == "true"


@asynccontextmanager
async def failing(world: World, when: str) -> AsyncIterator[None]:
    """
    Make the database fail at a statement: `when` is the head of a trigger.
    """
    table = when.split(" ON ")[1].split(maxsplit=1)[0]
    kind = "CONSTRAINT TRIGGER" if "DEFERRED" in when else "TRIGGER"
    await world.execute(
        "CREATE FUNCTION public.fail_on_purpose() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN RAISE EXCEPTION $m$on purpose$m$; END'"
    )
    await world.execute(
        f"CREATE {kind} fail_on_purpose {when} EXECUTE FUNCTION public.fail_on_purpose()"
    )
    try:
        yield
    finally:
        await world.execute(f"DROP TRIGGER fail_on_purpose ON {table}")
        await world.execute("DROP FUNCTION public.fail_on_purpose()")


AT_EACH_STATEMENT = [
    pytest.param("BEFORE UPDATE ON public.certifications FOR EACH ROW", id="certification"),
    pytest.param("BEFORE INSERT OR UPDATE ON public.mentor_pauses FOR EACH ROW", id="pause"),
    pytest.param("BEFORE INSERT ON public.portal_visibility FOR EACH ROW", id="version"),
    pytest.param(
        "BEFORE UPDATE ON public.portal_visibility FOR EACH ROW"
        " WHEN (NEW.changed_at IS DISTINCT FROM OLD.changed_at)",
        id="decision",
    ),
    pytest.param("BEFORE INSERT ON outbox.events FOR EACH ROW", id="event"),
    pytest.param(
        "AFTER INSERT OR UPDATE ON outbox.events DEFERRABLE INITIALLY DEFERRED FOR EACH ROW",
        id="commit",
    ),
]


@pytest.mark.parametrize("when", AT_EACH_STATEMENT)
async def test_an_expiry_that_fails_anywhere_leaves_everything_as_it_was(
    world: World, when: str
) -> None:
    """
    Whichever statement fails, the commit included, none of the others stays behind.
    """
    mentor = await world.mentor()
    before = await everything(world)

    async with failing(world, when):
        with pytest.raises(DBAPIError, match="on purpose"):
            await world.certifications.expire(mentor.certification_id, today=TODAY)

    assert await everything(world) == before
    assert await world.certifications.expire(mentor.certification_id, today=TODAY) is not None


@pytest.mark.parametrize("when", AT_EACH_STATEMENT)
async def test_a_renewal_that_fails_anywhere_leaves_everything_as_it_was(
    world: World, when: str
) -> None:
    """
    Whichever statement fails, the mentor stays expired, paused and hidden.
    """
    mentor = await world.mentor()
    await world.certifications.expire(mentor.certification_id, today=TODAY)
    before = await everything(world)

    async with failing(world, when):
        with pytest.raises(DBAPIError, match="on purpose"):
            await world.certifications.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)

    assert await everything(world) == before


@pytest.mark.parametrize("when", AT_EACH_STATEMENT)
async def test_a_bulk_expiry_that_fails_anywhere_leaves_its_page_as_it_was(
    world: World, when: str
) -> None:
    """
    A page is one transaction, so one mentor's failure leaves all of its page untouched.
    """
    await known_mentors(world, 1)
    await world.mentors(2)
    before = await everything(world)

    async with failing(world, when):
        with pytest.raises(DBAPIError, match="on purpose"):
            await expire_all(world)

    assert await everything(world) == before


# --------------------------------------------------------------------- what may expire


async def test_a_second_expiry_changes_nothing_and_draws_no_version(world: World) -> None:
    """
    Expiring twice is expiring once, to the last column.
    """
    mentor = await world.mentor()
    await world.certifications.expire(mentor.certification_id, today=TODAY)
    before = await everything(world)

    assert await world.certifications.expire(mentor.certification_id, today=TODAY) is None

    assert await everything(world) == before


@pytest.mark.parametrize("expires_on", [TODAY, TOMORROW, NEXT_YEAR])
async def test_a_certification_that_is_still_valid_cannot_expire(
    world: World, expires_on: date
) -> None:
    """
    The last valid day is a valid day; the refusal names both dates and changes nothing.
    """
    mentor = await world.mentor(expires_on=expires_on)
    before = await everything(world)

    with pytest.raises(StillValidError) as refusal:
        await world.certifications.expire(mentor.certification_id, today=TODAY)

    assert str(expires_on) in str(refusal.value)
    assert str(TODAY) in str(refusal.value)
    assert await everything(world) == before


async def test_the_day_after_the_last_valid_day_is_too_late(world: World) -> None:
    """
    Valid until yesterday is expired today, one by one and in bulk.
    """
    one = await world.mentor(expires_on=YESTERDAY)
    assert await world.certifications.expire(one.certification_id, today=TODAY) is not None

    await world.mentor(expires_on=YESTERDAY)
    await world.mentor(expires_on=TODAY)
    assert [page.certifications for page in await expire_all(world)] == [1]


async def test_an_unknown_certification_is_said_to_be_unknown(world: World) -> None:
    """
    The sentence names the id, and nothing was changed.
    """
    await world.mentor()
    before = await everything(world)
    nobody = uuid4()

    with pytest.raises(UnknownCertificationError, match=str(nobody)):
        await world.certifications.expire(nobody, today=TODAY)
    with pytest.raises(UnknownCertificationError, match=str(nobody)):
        await world.certifications.renew(nobody, NEXT_YEAR, today=TODAY)

    assert await everything(world) == before


# ------------------------------------------------------------------- whose day it is


def in_zone(world: World, timezone: str) -> CertificationManagementService:
    """
    The transitions of an organisation that lives in this zone.
    """
    return CertificationManagementService(
        world.engine, organization_id=world.hlf, timezone=timezone
    )


EAST = "Pacific/Kiritimati"
"""14 hours before UTC: here it is a later date than in `WEST`, at any moment."""

WEST = "Etc/GMT+12"
"""12 hours behind UTC."""


async def between_the_zones(world: World) -> date:
    """
    A date that is over in `EAST` and not in `WEST`, also if a day ends during the test.
    """
    east: date = await world.value("SELECT CAST(now() AT TIME ZONE :zone AS date)", zone=EAST)
    return east - timedelta(days=1)


async def test_the_zone_of_the_organisation_decides_whether_the_day_is_over(world: World) -> None:
    """
    At one and the same moment a certification has run out in the east and not in the west.
    """
    mentor = await world.mentor(expires_on=await between_the_zones(world))

    with pytest.raises(StillValidError):
        await in_zone(world, WEST).expire(mentor.certification_id)
    assert [page async for page in in_zone(world, WEST).expire_all()] == []

    assert await in_zone(world, EAST).expire(mentor.certification_id) is not None


async def test_the_zone_of_the_organisation_decides_whether_a_renewal_reaches_the_future(
    world: World,
) -> None:
    """
    A date that is over in the east is refused there, and has not begun to be over in the west.
    """
    mentor = await world.mentor()
    until_ = await between_the_zones(world)

    with pytest.raises(RenewalNotInFutureError):
        await in_zone(world, EAST).renew(mentor.certification_id, until_)


@pytest.mark.parametrize(
    ("moment", "timezone", "expected"),
    [
        pytest.param("2026-11-24 22:59+00", "Europe/Oslo", TODAY, id="Oslo in winter, before"),
        pytest.param("2026-11-24 23:30+00", "Europe/Oslo", TOMORROW, id="Oslo in winter, after"),
        pytest.param("2026-07-01 22:30+00", "Europe/Oslo", date(2026, 7, 2), id="Oslo in summer"),
        pytest.param("2026-11-24 23:30+00", "UTC", TODAY, id="UTC"),
        pytest.param("2026-11-24 23:30+00", EAST, TOMORROW, id="far east"),
        pytest.param("2026-11-24 11:30+00", WEST, YESTERDAY, id="far west"),
    ],
)
async def test_today_is_the_date_on_the_wall_of_the_organisation(
    world: World, moment: str, timezone: str, expected: date
) -> None:
    """
    Half an hour before midnight UTC it is tomorrow in Oslo.
    """
    query = transitions.TODAY.text.replace("now()", "CAST(:moment AS timestamptz)")

    assert await world.value(query, moment=moment, timezone=timezone) == expected


ZONES = ("Europe/Oslo", "America/St_Johns", "Australia/Lord_Howe", "UTC", EAST, WEST)

NIGHTS = (
    datetime(2026, 10, 25, tzinfo=UTC),  # an hour twice
    datetime(2027, 3, 28, tzinfo=UTC),  # an hour less
    datetime(2028, 2, 29, tzinfo=UTC),
    datetime(2027, 1, 1, tzinfo=UTC),
)


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    night=st.sampled_from(NIGHTS),
    seconds=st.integers(-36 * 3600, 36 * 3600),
    timezone=st.sampled_from(ZONES),
    server=st.sampled_from(ZONES),
)
async def test_today_is_that_of_the_organisation_on_every_odd_night(
    engine: AsyncEngine, night: datetime, seconds: int, timezone: str, server: str
) -> None:
    """
    When the clocks change, on a leap day and at the year's end, wherever the server is: what
    the database says is what a calendar on the wall says, and the last valid day lasts until
    the first moment of the next.
    """
    moment = night + timedelta(seconds=seconds)
    query = transitions.TODAY.text.replace("now()", "CAST(:moment AS timestamptz)")

    async with engine.begin() as connection:
        await connection.execute(
            text("SELECT set_config('timezone', :zone, true)"), {"zone": server}
        )
        today = await connection.scalar(text(query), {"moment": moment, "timezone": timezone})

    on_the_wall = moment.astimezone(ZoneInfo(timezone))
    assert today == on_the_wall.date()
    last_moment = datetime.combine(today, time.max, tzinfo=ZoneInfo(timezone)).astimezone(UTC)
    assert moment <= last_moment


async def test_a_transition_sees_the_database_date_when_none_is_given(world: World) -> None:
    """
    Without `today` the calendar decides: long over is over, far away is not.
    """
    over = await world.mentor(expires_on=date(2001, 1, 1))
    far = await world.mentor(expires_on=date(2999, 12, 31))

    assert await world.certifications.expire(over.certification_id) is not None
    with pytest.raises(StillValidError):
        await world.certifications.expire(far.certification_id)
    assert (await world.certifications.renew(over.certification_id, date(2999, 1, 1))).visible


# --------------------------------------------------------------------------- renewals


@pytest.mark.parametrize("until_", [TODAY, YESTERDAY])
async def test_a_renewal_must_reach_into_the_future(world: World, until_: date) -> None:
    """
    Today and the past are refused; the sentence names both dates.
    """
    mentor = await world.mentor()
    await world.certifications.expire(mentor.certification_id, today=TODAY)
    before = await everything(world)

    with pytest.raises(RenewalNotInFutureError) as refusal:
        await world.certifications.renew(mentor.certification_id, until_, today=TODAY)

    assert str(until_) in str(refusal.value)
    assert str(TODAY) in str(refusal.value)
    assert await everything(world) == before


async def test_a_renewal_until_tomorrow_is_enough(world: World) -> None:
    """
    One day ahead is the future.
    """
    mentor = await world.mentor()

    done = await world.certifications.renew(mentor.certification_id, TOMORROW, today=TODAY)

    assert done.visible is True


async def test_a_certification_can_be_renewed_before_it_runs_out(world: World) -> None:
    """
    Nobody has to expire first.
    """
    mentor = await world.mentor(expires_on=TOMORROW)

    done = await world.certifications.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)

    assert done.visible is True
    assert await world.value("SELECT expires_on FROM public.certifications") == NEXT_YEAR


async def test_a_renewal_with_one_certification_still_expired_keeps_the_mentor_hidden(
    world: World,
) -> None:
    """
    The portal shows a mentor only when none of the certifications has expired.
    """
    mentor = await world.mentor()
    second = await world.certification(mentor.id, expires_on=YESTERDAY)
    await expire_all(world)

    first = await world.certifications.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)
    assert first.visible is False
    assert await world.value("SELECT payload ->> 'visible' FROM outbox.events") == "false"

    both = await world.certifications.renew(second, NEXT_YEAR, today=TODAY)
    assert both.visible is True


async def test_a_certification_that_ran_out_counts_as_expired_before_anybody_swept_it(
    world: World,
) -> None:
    """
    No mentor is shown because the night job is late.
    """
    mentor = await world.mentor()
    await world.certification(mentor.id, expires_on=YESTERDAY)  # run out, status still valid

    done = await world.certifications.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)

    assert done.visible is False


async def test_a_second_certification_on_its_last_day_does_not_hide_anybody(world: World) -> None:
    """
    Today is still valid, for every one of the certifications.
    """
    mentor = await world.mentor()
    await world.certification(mentor.id, expires_on=TODAY)

    done = await world.certifications.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)

    assert done.visible is True


async def test_one_expired_certification_among_valid_ones_hides_the_mentor(world: World) -> None:
    """
    A valid certification does not make up for an expired one.
    """
    mentor = await world.mentor()
    await world.certification(mentor.id, expires_on=NEXT_YEAR)

    done = await world.certifications.expire(mentor.certification_id, today=TODAY)

    assert done is not None
    assert done.visible is False


async def test_other_mentors_are_left_alone(world: World) -> None:
    """
    A transition touches one mentor's rows and no other's.
    """
    mentor, bystander = await world.mentor(), await world.mentor()

    await world.certifications.expire(mentor.certification_id, today=TODAY)

    assert await world.value("SELECT array_agg(mentor_id) FROM public.portal_visibility") == [
        mentor.id
    ]
    assert await open_pauses(world, bystander) == []


# ------------------------------------------------------------------- other organisations


async def test_another_organisations_mentor_gets_everything_but_an_event(world: World) -> None:
    """
    The certification and the pause are everybody's; the portal is HLF's alone.
    """
    mentor = await world.mentor(organization_id=world.other)

    done = await world.certifications.expire(mentor.certification_id, today=TODAY)

    assert done is not None
    assert (done.synchronised, done.organization_id) == (False, world.other)
    assert await world.value("SELECT status FROM public.certifications") == "expired"
    assert await open_pauses(world, mentor) == [("certification_expired", mentor.certification_id)]
    assert await world.rows("SELECT FROM outbox.events") == []


async def test_a_renewal_of_another_organisations_mentor_does_not_wait_for_hlfs_portal(
    world: World,
) -> None:
    """
    Nothing is sent, so there is nothing to wait for, however long one is willing to.
    """
    mentor = await world.mentor(organization_id=world.other)

    async with asyncio.timeout(10):
        done = await world.certifications.renew(
            mentor.certification_id, NEXT_YEAR, today=TODAY, wait_seconds=15
        )

    assert (done.visible, done.synchronised) == (True, False)
    assert await open_pauses(world, mentor) == []


async def test_a_bulk_expiry_counts_the_mentors_of_others_as_skipped(world: World) -> None:
    """
    They expire like everybody, and no event tells HLF's portal.
    """
    ours = await world.mentor()
    await world.mentor(organization_id=world.other)

    assert await expire_all(world) == [Expired(certifications=2, mentors=2, skipped=1)]

    assert await world.value("SELECT array_agg(key) FROM outbox.events") == [str(ours.id)]


async def test_a_bulk_expiry_sends_nothing_about_a_mentor_who_moved(world: World) -> None:
    """
    The organisation is read anew also where there is a desired state already.
    """
    [mentor] = await known_mentors(world, 1)
    await world.execute("DELETE FROM outbox.events")
    await world.execute("UPDATE public.mentors SET organization_id = :other", other=world.other)

    assert await expire_all(world) == [Expired(certifications=1, mentors=1, skipped=1)]

    assert await visible(world, mentor) is False
    assert await world.rows("SELECT FROM outbox.events") == []


async def test_a_mentor_who_moved_belongs_to_the_new_organisation(world: World) -> None:
    """
    The organisation is read anew at each transition.
    """
    mentor = await world.mentor()
    await world.certifications.expire(mentor.certification_id, today=TODAY)
    await world.execute("UPDATE public.mentors SET organization_id = :other", other=world.other)

    done = await world.certifications.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)

    assert (done.organization_id, done.synchronised) == (world.other, False)


# --------------------------------------------------------------------------- the event


async def claim_one(world: World) -> str:
    """
    The key of the event that goes next.
    """
    async with world.engine.begin() as connection:
        claimed = await store.claim(
            connection,
            destination=visibility.DESTINATION,
            organization_id=world.hlf,
            worker_id=uuid4(),
            limit=1,
            lease_seconds=60,
            slack_seconds=1,
            doubt_seconds=150,
        )
    [event] = claimed.events
    return event.key


async def test_hiding_goes_before_showing(world: World) -> None:
    """
    A wrongly visible mentor is worse than a wrongly hidden one, so age does not matter.
    """
    shown, hidden = await world.mentor(), await world.mentor()
    await world.certifications.renew(shown.certification_id, NEXT_YEAR, today=TODAY)
    await world.certifications.expire(hidden.certification_id, today=TODAY)

    assert await claim_one(world) == str(hidden.id)
    assert await claim_one(world) == str(shown.id)


async def test_a_mentor_who_changes_from_hidden_to_shown_loses_the_priority(world: World) -> None:
    """
    One live event per mentor, with the priority of what it says now.
    """
    changed, hidden = await world.mentor(), await world.mentor()
    await world.certifications.expire(changed.certification_id, today=TODAY)
    await world.certifications.expire(hidden.certification_id, today=TODAY)
    await world.certifications.renew(changed.certification_id, NEXT_YEAR, today=TODAY)

    assert await claim_one(world) == str(hidden.id)
    assert await claim_one(world) == str(changed.id)


async def test_versions_grow_by_one_with_each_transition(world: World) -> None:
    """
    The first transition is version 1, and none is left out.
    """
    mentor = await world.mentor()
    service = world.certifications

    versions = []
    for _ in range(3):
        expired = await service.expire(mentor.certification_id, today=TODAY)
        renewed = await service.renew(mentor.certification_id, TOMORROW, today=TODAY)
        assert expired is not None
        versions += [expired.version, renewed.version]
        await world.execute(
            "UPDATE public.certifications SET expires_on = :day", day=YESTERDAY
        )  # a day goes by

    assert versions == [1, 2, 3, 4, 5, 6]


async def test_versions_of_transitions_at_once_are_all_different_and_the_last_one_is_sent(
    world: World,
) -> None:
    """
    Many transitions of one mentor at the same time leave one event: the newest state.
    """
    mentor = await world.mentor()
    certifications = [await world.certification(mentor.id, expires_on=YESTERDAY) for _ in range(7)]

    done = await asyncio.gather(
        world.certifications.expire(mentor.certification_id, today=TODAY),
        *(world.certifications.expire(one, today=TODAY) for one in certifications[:3]),
        *(world.certifications.renew(one, NEXT_YEAR, today=TODAY) for one in certifications[3:]),
    )

    assert sorted(one.version for one in done if one is not None) == list(range(1, 9))
    event = await world.row("SELECT version, payload ->> 'visible' AS visible FROM outbox.events")
    assert (event.version, event.visible) == (8, "false")


# ------------------------------------------------------------------------- bulk expiry


async def test_a_bulk_expiry_goes_page_by_page(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Each page is a transaction of its own; together they expire everybody once.
    """
    monkeypatch.setattr(transitions, "PAGE", 3)
    await world.mentors(7)
    await world.mentor(expires_on=TODAY)

    pages = await expire_all(world)

    assert [page.certifications for page in pages] == [3, 3, 1]
    assert await world.value("SELECT count(*) FROM outbox.events") == 7
    assert await world.value("SELECT count(DISTINCT CAST(xmin AS text)) FROM outbox.events") == 3


async def test_a_bulk_expiry_of_nothing_yields_nothing(world: World) -> None:
    """
    Nobody ran out, so there is no page.
    """
    await world.mentor(expires_on=TODAY)

    assert await expire_all(world) == []


async def test_a_mentor_with_several_expired_certifications_counts_once(world: World) -> None:
    """
    Two certifications, one mentor, one event; and a pause for each certification.
    """
    mentor = await world.mentor()
    await world.certification(mentor.id, expires_on=YESTERDAY)

    assert await expire_all(world) == [Expired(certifications=2, mentors=1, skipped=0)]

    assert len(await open_pauses(world, mentor)) == 2
    assert await world.value("SELECT count(*) FROM outbox.events") == 1


async def test_a_mentor_on_two_pages_expires_with_the_first(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    All that have run out of a mentor go together, so there is one decision, version and event.
    """
    monkeypatch.setattr(transitions, "PAGE", 1)
    mentor = await world.mentor(expires_on=YESTERDAY - timedelta(days=2))
    await world.mentor(expires_on=YESTERDAY - timedelta(days=1))
    await world.certification(mentor.id, expires_on=YESTERDAY)

    assert await expire_all(world) == [
        Expired(certifications=2, mentors=1, skipped=0),
        Expired(certifications=1, mentors=1, skipped=0),
    ]

    assert len(await open_pauses(world, mentor)) == 2
    assert await outcome(world) == [EXPIRED_ONCE] * 3


async def test_a_bulk_expiry_leaves_certifications_of_nobody_alone(world: World) -> None:
    """
    An adopted table may have rows whose mentor is not in the register.
    """
    await world.mentor()
    await world.execute(
        "ALTER TABLE public.certifications DROP CONSTRAINT certifications_mentor_id_fkey"
    )
    try:
        await world.certification(uuid4(), expires_on=YESTERDAY)
        pages = await expire_all(world)
        left = await world.value(
            "SELECT count(*) FROM public.certifications WHERE status = 'valid'"
        )
    finally:
        await world.execute(
            "DELETE FROM public.certifications"
            " WHERE mentor_id NOT IN (SELECT id FROM public.mentors)"
        )
        await world.execute(
            "ALTER TABLE public.certifications ADD CONSTRAINT certifications_mentor_id_fkey"
            " FOREIGN KEY (mentor_id) REFERENCES public.mentors (id)"
        )

    assert pages == [Expired(certifications=1, mentors=1, skipped=0)]
    assert left == 1


async def outcome(world: World) -> list[tuple[object, ...]]:
    """
    What a bulk expiry is for: status, pauses and desired state, per certification.
    """
    rows = await world.rows(
        "SELECT certification.status, pause.reason, desired.visible, desired.version,"
        "       event.version, event.payload ->> 'visible'"
        "  FROM public.certifications AS certification"
        "  LEFT JOIN public.mentor_pauses AS pause ON pause.certification_id = certification.id"
        "  LEFT JOIN public.portal_visibility AS desired"
        "         ON desired.mentor_id = certification.mentor_id"
        "  LEFT JOIN outbox.events AS event ON event.key = CAST(desired.mentor_id AS text)"
        " ORDER BY certification.id"
    )
    return [tuple(row) for row in rows]


EXPIRED_ONCE = ("expired", "certification_expired", False, 1, 1, "false")


async def test_a_bulk_expiry_that_runs_again_does_nothing(world: World) -> None:
    """
    Twice in a row is once.
    """
    await world.mentors(5)
    await expire_all(world)
    before = await everything(world)

    assert await expire_all(world) == []
    assert await everything(world) == before


async def test_a_bulk_expiry_that_is_stopped_between_pages_is_finished_by_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    What is done stays done, and the rest is found again: in the end it is as if once.
    """
    monkeypatch.setattr(transitions, "PAGE", 2)
    await world.mentors(5)
    run = world.certifications.expire_all(today=TODAY)
    assert (await anext(run)).certifications == 2
    await run.aclose()  # type: ignore[attr-defined]  # it is an async generator

    pages = await expire_all(world)

    assert sum(page.certifications for page in pages) == 3
    assert await outcome(world) == [EXPIRED_ONCE] * 5


async def test_a_bulk_expiry_that_is_killed_within_a_page_is_finished_by_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch, patient: None
) -> None:
    """
    A page that did not commit did not happen.
    """
    monkeypatch.setattr(transitions, "PAGE", 2)
    mentors = sorted(await world.mentors(5), key=lambda mentor: mentor.id)
    async with holding_certification(world, mentors[3].certification_id):
        run = asyncio.create_task(expire_all(world))
        await until_waiting(world, 1)
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)

    statuses = await world.value(
        "SELECT count(*) FROM public.certifications WHERE status = 'expired'"
    )
    assert statuses == 2
    await expire_all(world)
    assert await outcome(world) == [EXPIRED_ONCE] * 5


async def test_two_bulk_expiries_at_once_expire_each_certification_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Together they count every certification exactly once, with one pause and one live event.
    """
    monkeypatch.setattr(transitions, "PAGE", 4)
    await world.mentors(20)

    runs = await asyncio.gather(*(expire_all(world) for _ in range(3)))

    assert sum(page.certifications for run in runs for page in run) == 20
    rows = await outcome(world)
    assert [row[:3] for row in rows] == [EXPIRED_ONCE[:3]] * 20


async def test_a_bulk_expiry_that_comes_second_draws_no_version(
    world: World, patient: None
) -> None:
    """
    Two runs that found the same page leave what one would: not one version more.
    """
    [mentor] = await world.mentors(1)
    async with holding_certification(world, mentor.certification_id):
        first = asyncio.create_task(expire_all(world))
        await until_waiting(world, 1)
        second = asyncio.create_task(expire_all(world))
        await until_waiting(world, 2)
    await asyncio.gather(first, second)

    assert await outcome(world) == [EXPIRED_ONCE]


EXPIRED_TWICE = ("expired", "certification_expired", False, 2, 2, "false")
"""With the renewal before it, that is."""


async def test_the_second_of_two_bulk_expiries_goes_on_where_the_first_is_not(
    world: World, monkeypatch: pytest.MonkeyPatch, patient: None
) -> None:
    """
    It passes over the page that the first has in its hands, and does the others meanwhile.
    """
    monkeypatch.setattr(transitions, "PAGE", 2)
    mentors = await known_mentors(world, 6)
    async with holding_certification(world, mentors[0].certification_id):
        first = asyncio.create_task(expire_all(world))
        await until_waiting(world, 1)
        second = asyncio.create_task(expire_all(world))
        await until_waiting(world, 2)
        done = await expired_mentors(world)
    runs = await asyncio.gather(first, second)

    assert done == {mentor.id for mentor in mentors[2:]}
    assert sum(page.certifications for run in runs for page in run) == 6
    assert await outcome(world) == [EXPIRED_TWICE] * 6


# ---------------------------------------------------- two connections, one at a time


@asynccontextmanager
async def holding(world: World, statement: str, **parameters: object) -> AsyncIterator[None]:
    """
    Another connection that holds what `statement` locks, until the block ends.
    """
    async with world.engine.connect() as connection:
        await connection.execute(text(statement), parameters)
        yield
        await connection.commit()


def holding_certification(world: World, certification_id: UUID) -> Any:  # noqa: ANN401 (a context)
    """
    Whoever transitions this certification stops half-way: versions drawn, nothing written.
    """
    return holding(
        world,
        "SELECT FROM public.certifications WHERE id = :id FOR UPDATE",
        id=certification_id,
    )


async def expired_mentors(world: World) -> set[UUID]:
    """
    Mentors with an expired certification.
    """
    rows = await world.rows("SELECT mentor_id FROM public.certifications WHERE status = 'expired'")
    return {row.mentor_id for row in rows}


def holding_mentor(world: World, mentor: Mentor) -> Any:  # noqa: ANN401 (a context)
    """
    Whoever transitions this mentor stops before the first version is drawn.
    """
    return holding(
        world,
        "SELECT FROM public.portal_visibility WHERE mentor_id = :id FOR UPDATE",
        id=mentor.id,
    )


def holding_new_mentor(world: World, mentor: Mentor) -> Any:  # noqa: ANN401 (a context)
    """
    Whoever makes the first transition of this mentor stops when the first version is drawn.
    """
    return holding(
        world,
        "INSERT INTO public.portal_visibility (mentor_id, organization_id, visible)"
        " SELECT id, organization_id, true FROM public.mentors WHERE id = :id",
        id=mentor.id,
    )


async def until_waiting(world: World, number: int) -> None:
    """
    Wait until so many transitions stand at a lock.
    """

    async def they_stand() -> bool:
        waiting: int = await world.value(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return waiting == number

    await until(they_stand)


@pytest.mark.parametrize("held", ["mentor", "certification"])
async def test_a_renewal_gives_way_to_whoever_does_not_let_go_and_changed_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    """
    A person is told in a sentence, long before the transaction's own time is over.
    """
    monkeypatch.setattr(transitions, "RENEWAL_PATIENCE_SECONDS", 0.05)
    mentor = await world.mentor()
    await world.certifications.expire(mentor.certification_id, today=NEXT_YEAR + timedelta(days=1))
    before = await everything(world)
    holder = (
        holding_mentor(world, mentor)
        if held == "mentor"
        else holding_certification(world, mentor.certification_id)
    )

    async with holder:
        with pytest.raises(HeldError, match="nothing was changed") as error:
            await world.certifications.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)

    assert error.value.exit_code == 69
    assert await everything(world) == before


async def one_after_the_other(
    world: World,
    mentor: Mentor,
    first: Callable[[], Awaitable[object]],
    second: Callable[[], Awaitable[object]],
) -> list[Any]:
    """
    Start both so that the first holds the mentor's row while the second waits for it.
    """
    async with holding_certification(world, mentor.certification_id):
        one = asyncio.ensure_future(first())
        await until_waiting(world, 1)
        other = asyncio.ensure_future(second())
        await until_waiting(world, 2)
    return list(await asyncio.gather(one, other, return_exceptions=True))


async def test_the_second_of_two_expiries_at_once_changes_nothing(world: World) -> None:
    """
    It waits, finds the certification expired, and draws no version.
    """
    mentor = await world.mentor()

    async def expire() -> Transition | None:
        return await world.certifications.expire(mentor.certification_id, today=TODAY)

    first, second = await one_after_the_other(world, mentor, expire, expire)

    assert first.version == 1
    assert second is None
    assert await outcome(world) == [EXPIRED_ONCE]


async def test_an_expiry_that_waited_for_the_renewal_is_refused(world: World) -> None:
    """
    It judges the renewed certification, not the one it was started for.
    """
    mentor = await world.mentor()
    service = world.certifications

    renewed, refused = await one_after_the_other(
        world,
        mentor,
        lambda: service.renew(mentor.certification_id, NEXT_YEAR, today=TODAY),
        lambda: service.expire(mentor.certification_id, today=TODAY),
    )

    assert (renewed.visible, renewed.version) == (True, 1)
    assert isinstance(refused, StillValidError)
    assert await outcome(world) == [("valid", None, True, 1, 1, "true")]


async def test_a_renewal_that_waited_for_the_expiry_lifts_its_pause(world: World) -> None:
    """
    It sees the pause that was opened while it waited, and the later version shows the mentor.
    """
    mentor = await world.mentor()
    service = world.certifications

    expired, renewed = await one_after_the_other(
        world,
        mentor,
        lambda: service.expire(mentor.certification_id, today=TODAY),
        lambda: service.renew(mentor.certification_id, NEXT_YEAR, today=TODAY),
    )

    assert (expired.visible, expired.version) == (False, 1)
    assert (renewed.visible, renewed.version) == (True, 2)
    assert await open_pauses(world, mentor) == []
    assert await outcome(world) == [("valid", "certification_expired", True, 2, 2, "true")]


@pytest.mark.parametrize("number", [0, 1])
async def test_a_bulk_expiry_that_waited_for_the_renewal_does_not_hide_the_mentor(
    world: World, number: int, patient: None
) -> None:
    """
    What a page found before it had the locks is not what it acts on: it gives back what it
    drew, and the others of the page are found again.
    """
    mentors = sorted(await world.mentors(2), key=lambda mentor: mentor.id)
    renewed = mentors.pop(number)

    _, pages = await one_after_the_other(
        world,
        renewed,
        lambda: world.certifications.renew(renewed.certification_id, NEXT_YEAR, today=TODAY),
        lambda: expire_all(world),
    )

    assert pages == [Expired(certifications=1, mentors=1, skipped=0)]
    assert await visible(world, renewed) is True
    assert await open_pauses(world, renewed) == []
    valid = ("valid", None, True, 1, 1, "true")
    assert sorted(await outcome(world)) == sorted([EXPIRED_ONCE, valid])


async def test_two_renewals_at_once_leave_the_date_of_the_later_one(world: World) -> None:
    """
    The last to commit has the higher version and the last word.
    """
    mentor = await world.mentor()
    service = world.certifications
    later = NEXT_YEAR + timedelta(days=7)

    first, second = await one_after_the_other(
        world,
        mentor,
        lambda: service.renew(mentor.certification_id, NEXT_YEAR, today=TODAY),
        lambda: service.renew(mentor.certification_id, later, today=TODAY),
    )

    assert (first.version, second.version) == (1, 2)
    assert await world.value("SELECT expires_on FROM public.certifications") == later


async def test_versions_follow_the_order_of_the_lock_also_between_certifications(
    world: World,
) -> None:
    """
    Transitions of two certifications of one mentor wait for each other, so none decides on
    what the other is about to change.
    """
    mentor = await world.mentor()
    second_certification = await world.certification(mentor.id, expires_on=YESTERDAY)
    service = world.certifications

    first, second = await one_after_the_other(
        world,
        mentor,
        lambda: service.renew(mentor.certification_id, NEXT_YEAR, today=TODAY),
        lambda: service.renew(second_certification, NEXT_YEAR, today=TODAY),
    )

    assert (first.visible, first.version) == (False, 1)
    assert (second.visible, second.version) == (True, 2)


@pytest.mark.parametrize("others", [0, 1])
async def test_a_renewal_of_a_certification_that_vanishes_meanwhile_is_no_success(
    world: World, others: int
) -> None:
    """
    Deleted between look-up and lock is as unknown as never made, whatever else there is.
    """
    mentor = await world.mentor()
    for _ in range(others):
        await world.certification(mentor.id)

    async with holding(
        world, "DELETE FROM public.certifications WHERE id = :id", id=mentor.certification_id
    ):
        renewal = asyncio.ensure_future(
            world.certifications.renew(mentor.certification_id, NEXT_YEAR, today=TODAY)
        )
        await until_waiting(world, 1)
    [result] = await asyncio.gather(renewal, return_exceptions=True)

    assert isinstance(result, UnknownCertificationError)


async def test_an_expiry_of_a_certification_that_vanishes_meanwhile_is_refused(
    world: World,
) -> None:
    """
    Deleted between look-up and lock is as unknown as never made.
    """
    mentor = await world.mentor()

    async with holding(
        world, "DELETE FROM public.certifications WHERE id = :id", id=mentor.certification_id
    ):
        expiry = asyncio.ensure_future(
            world.certifications.expire(mentor.certification_id, today=TODAY)
        )
        await until_waiting(world, 1)
    [result] = await asyncio.gather(expiry, return_exceptions=True)

    assert isinstance(result, UnknownCertificationError)


# -------------------------------------------------------------- never before the lock


@pytest.mark.parametrize("way", ["expire", "renew", "expire_all", "assert_again"])
async def test_no_way_through_the_api_touches_an_event_before_the_mentor_is_locked(
    world: World, way: str
) -> None:
    """
    Whoever waits for the mentor's row holds nothing of the outbox.
    """
    mentor = await world.mentor()
    await world.certifications.renew(mentor.certification_id, TOMORROW, today=TODAY)
    await world.execute("UPDATE public.certifications SET expires_on = :day", day=YESTERDAY)

    async def assert_again() -> object:
        async with world.engine.begin() as connection:
            return await visibility.assert_again(connection, [mentor.id], organization_id=world.hlf)

    ways: dict[str, Callable[[], Awaitable[object]]] = {
        "expire": lambda: world.certifications.expire(mentor.certification_id, today=TODAY),
        "renew": lambda: world.certifications.renew(
            mentor.certification_id, NEXT_YEAR, today=TODAY
        ),
        "expire_all": lambda: expire_all(world),
        "assert_again": assert_again,
    }
    async with holding_mentor(world, mentor):
        task = asyncio.ensure_future(ways[way]())
        await until_waiting(world, 1)
        touched = await world.rows(
            "SELECT CAST(relation AS regclass) AS name FROM pg_locks"
            " WHERE granted AND locktype = 'relation' AND mode <> 'AccessShareLock'"
            "   AND pid IN (SELECT pid FROM pg_locks WHERE NOT granted)"
        )
    await task

    assert {row.name for row in touched} & {"outbox.events", "outbox.settled"} == set()


@pytest.mark.parametrize("way", ["expire_all", "draw_versions"])
async def test_mentors_of_a_page_are_locked_in_ascending_order(
    world: World, way: str, patient: None
) -> None:
    """
    Two that lock several mentors meet at the first one, so neither can wait in a circle.
    """
    mentors = sorted(await world.mentors(4), key=lambda mentor: mentor.id)

    async def draw_versions() -> object:
        async with world.engine.begin() as connection:
            return await visibility.draw_versions(connection, [one.id for one in mentors])

    ways: dict[str, Callable[[], Awaitable[object]]] = {
        "expire_all": lambda: expire_all(world),
        "draw_versions": draw_versions,
    }
    async with holding_new_mentor(world, mentors[2]):
        run = asyncio.ensure_future(ways[way]())
        await until_waiting(world, 1)
        free = [await is_new(world, mentor) for mentor in mentors]
    await run

    assert free == [False, False, False, True]


async def is_new(world: World, mentor: Mentor) -> bool:
    """
    Whether nobody is about to make this mentor's first transition.
    """
    async with world.engine.connect() as connection:
        await connection.execute(text("SET LOCAL lock_timeout = 1"))
        try:
            await connection.execute(visibility.DRAW, {"mentor_ids": [mentor.id]})
        except OperationalError:
            return False
        finally:
            await connection.rollback()
    return True


# ------------------------------------------------------- a night run, and people beside it


async def test_a_bulk_expiry_passes_over_whom_a_person_holds(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Everybody else is done while the person takes their time; then that one is, too.
    """
    monkeypatch.setattr(transitions, "PAGE", 2)
    mentors = await known_mentors(world, 5)
    async with holding_mentor(world, mentors[1]):
        run = asyncio.create_task(expire_all(world))
        await until_waiting(world, 1)
        done = await expired_mentors(world)

    assert [page.certifications for page in await run] == [1, 2, 1, 1]
    assert done == {mentor.id for mentor in mentors if mentor != mentors[1]}
    assert await outcome(world) == [EXPIRED_TWICE] * 5


async def test_whoever_was_let_go_meanwhile_is_on_a_page_of_the_next_round(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    One by one is for those whom nobody lets go of.
    """
    monkeypatch.setattr(transitions, "PAGE", 2)
    mentors = await known_mentors(world, 5)
    run = world.certifications.expire_all(today=TODAY)
    async with holding_mentor(world, mentors[0]), holding_mentor(world, mentors[2]):
        pages = [await anext(run), await anext(run)]
    pages += [page async for page in run]

    assert [page.certifications for page in pages] == [1, 1, 1, 2]
    assert await outcome(world) == [EXPIRED_TWICE] * 5


async def test_whoever_waits_for_a_person_keeps_nobody_else_waiting(world: World) -> None:
    """
    When a night run comes to wait at last, it has let go of everybody.
    """
    mentors = await known_mentors(world, 3)
    async with holding_mentor(world, mentors[0]):
        run = asyncio.create_task(expire_all(world))
        await until_waiting(world, 1)
        free = await world.rows(
            "SELECT mentor_id FROM public.portal_visibility FOR UPDATE SKIP LOCKED"
        )
    await run

    assert {row.mentor_id for row in free} == {mentor.id for mentor in mentors[1:]}


async def test_what_was_held_counts_as_skipped_if_it_is_another_organisations(
    world: World,
) -> None:
    """
    However a mentor expires, nothing is sent for others.
    """
    [mentor] = await known_mentors(world, 1)
    await world.execute("UPDATE public.mentors SET organization_id = :other", other=world.other)
    async with holding_mentor(world, mentor):
        run = asyncio.create_task(expire_all(world))
        await until_waiting(world, 1)

    assert await run == [Expired(certifications=1, mentors=1, skipped=1)]


@pytest.mark.parametrize("what", ["certification", "first version"])
async def test_a_page_gives_way_to_whoever_holds_what_it_cannot_pass_over(
    world: World, monkeypatch: pytest.MonkeyPatch, what: str, impatient: None
) -> None:
    """
    It leaves nothing behind and the next page goes on; afterwards it is done all the same.
    """
    monkeypatch.setattr(transitions, "PAGE", 2)
    mentors = sorted(await world.mentors(4), key=lambda mentor: mentor.id)
    held = (
        holding_certification(world, mentors[0].certification_id)
        if what == "certification"
        else holding_new_mentor(world, mentors[0])
    )
    others = {mentor.id for mentor in mentors[2:]}

    async def others_are_done() -> bool:
        return others <= await expired_mentors(world)

    async with held:
        run = asyncio.create_task(expire_all(world))
        await until(others_are_done)

    assert sum(page.certifications for page in await run) == 4
    assert [row[:3] for row in await outcome(world)] == [EXPIRED_ONCE[:3]] * 4


async def test_a_bulk_expiry_does_all_the_others_before_it_complains(
    world: World, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    """
    Also those who shared a page with somebody that nobody lets go of.
    """
    monkeypatch.setattr(database, "TRANSACTION_SECONDS", 2.0)
    mentors = await known_mentors(world, 4)
    held = min(mentors, key=lambda mentor: mentor.certification_id)  # the first to be waited for
    async with holding_certification(world, held.certification_id):
        with pytest.raises(TimeoutError):
            await expire_all(world)
        done = await expired_mentors(world)

    assert done == {mentor.id for mentor in mentors if mentor != held}
    assert await expire_all(world) == [Expired(certifications=1, mentors=1, skipped=0)]
    assert await outcome(world) == [EXPIRED_TWICE] * 4
