"""
Who is reminded, of what, and how often: once for each certification, threshold and period.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from tests.factories import TODAY, World
from worker.certifications import PauseManagementService, reminders
from worker.certifications.reminders import CertificationReminderService, Reminded, version_of
from worker.certifications.transitions import TODAY as TODAY_IN_ZONE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from uuid import UUID

THRESHOLDS = (60, 30, 7)


def service(world: World, thresholds: Sequence[int] = THRESHOLDS) -> CertificationReminderService:
    """
    The reminders, as HLF's process has them.
    """
    return CertificationReminderService(
        world.engine, organization_id=world.hlf, timezone="Europe/Oslo", thresholds=thresholds
    )


async def remind(
    world: World, today: date | None = TODAY, thresholds: Sequence[int] = THRESHOLDS
) -> Reminded:
    """
    A whole run, its pages added up.
    """
    pages = [page async for page in service(world, thresholds).remind_all(today=today)]
    by_threshold: Counter[int] = Counter()
    for page in pages:
        by_threshold.update(page.by_threshold)
    return Reminded(
        enqueued=sum(page.enqueued for page in pages),
        by_threshold=dict(by_threshold),
        skipped=sum(page.skipped for page in pages),
    )


async def enqueued(world: World) -> dict[str, int]:
    """
    The threshold of each certification that has a reminder on its way.
    """
    rows = await world.rows(
        "SELECT key, payload FROM outbox.events WHERE destination = 'reminders'"
    )
    return {row.key: row.payload["threshold_days"] for row in rows}


async def deliver(world: World) -> None:
    """
    As if all had been sent.
    """
    await world.execute("DELETE FROM outbox.events")


# ------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize(
    ("days_left", "threshold"),
    [(61, None), (60, 60), (31, 60), (30, 30), (8, 30), (7, 7), (1, 7), (0, 7), (-1, None)],
)
async def test_the_nearest_threshold_that_was_reached_is_sent(
    world: World, days_left: int, threshold: int | None
) -> None:
    """
    To the end of the last valid day, and not before the first threshold.
    """
    mentor = await world.mentor(expires_on=TODAY + timedelta(days=days_left))

    done = await remind(world)

    assert done.by_threshold == ({threshold: 1} if threshold else {})
    expected = {str(mentor.certification_id): threshold} if threshold else {}
    assert await enqueued(world) == expected


async def test_a_reminder_says_who_when_and_which_and_no_name(world: World) -> None:
    """
    What the receiver needs, and a version that grows with period and nearness.
    """
    mentor = await world.mentor(expires_on=date(2026, 12, 1))

    await remind(world)

    event = await world.row("SELECT * FROM outbox.events")
    assert event.payload == {
        "certification_id": str(mentor.certification_id),
        "mentor_id": str(mentor.id),
        "expires_on": "2026-12-01",
        "threshold_days": 7,
    }
    assert (event.destination, event.key) == ("reminders", str(mentor.certification_id))
    assert (event.priority, event.organization_id) == (0, world.hlf)
    assert event.version == version_of(date(2026, 12, 1), 7)


def test_a_version_grows_with_the_period_and_with_nearer_thresholds() -> None:
    """
    The last of one period is before the first of the next day's.
    """
    day = date(2026, 12, 31)
    versions = [version_of(day, 60), version_of(day, 30), version_of(day, 7), version_of(day, 1)]
    versions.append(version_of(day + timedelta(days=1), 999))

    assert versions == sorted(set(versions))


async def test_each_threshold_is_sent_once_as_the_days_go_by(world: World) -> None:
    """
    A year of nights, two runs each.
    """
    await world.mentor(expires_on=TODAY + timedelta(days=70))
    sent: list[tuple[int, int]] = []
    for day in range(75):
        for _ in range(2):
            done = await remind(world, TODAY + timedelta(days=day))
            sent += [(70 - day, days) for days in done.by_threshold]
            await deliver(world)

    assert sent == [(60, 60), (30, 30), (7, 7)]
    assert await enqueued(world) == {}


async def test_a_run_missed_for_weeks_sends_one_reminder_and_notes_the_others(
    world: World,
) -> None:
    """
    The larger thresholds of the period never go out afterwards, not even with an earlier date.
    """
    mentor = await world.mentor(expires_on=TODAY + timedelta(days=5))

    assert (await remind(world)).by_threshold == {7: 1}
    await deliver(world)
    for day in (-50, -20, 0, 3):
        assert (await remind(world, TODAY + timedelta(days=day))).enqueued == 0

    noted = await world.rows("SELECT threshold_days, cert_id FROM public.cert_notification_log")
    assert {tuple(row) for row in noted} == {(d, mentor.certification_id) for d in THRESHOLDS}


async def test_after_a_renewal_the_next_years_reminders_go_out_again(world: World) -> None:
    """
    A certification keeps its id; the log tells the periods apart.
    """
    mentor = await world.mentor(expires_on=TODAY + timedelta(days=10))
    assert (await remind(world)).by_threshold == {30: 1}
    await deliver(world)

    until = TODAY + timedelta(days=375)
    await world.certifications.renew(mentor.certification_id, until, today=TODAY)
    await deliver(world)
    assert (await remind(world)).enqueued == 0

    again = [
        (await remind(world, until - timedelta(days=days))).by_threshold for days in (60, 30, 7)
    ]
    assert again == [{60: 1}, {30: 1}, {7: 1}]


async def test_a_nearer_reminder_takes_the_place_of_one_that_waits(world: World) -> None:
    """
    Whoever could not be reached for a month gets the latest, alone.
    """
    mentor = await world.mentor(expires_on=TODAY + timedelta(days=40))
    await remind(world)
    await remind(world, TODAY + timedelta(days=34))

    assert await enqueued(world) == {str(mentor.certification_id): 7}


async def test_a_period_that_is_cut_short_is_reminded_of_when_the_old_one_is_withdrawn(
    world: World,
) -> None:
    """
    The live event of the later day keeps its place, so nothing is noted that was not enqueued.
    """
    mentor = await world.mentor(expires_on=TODAY + timedelta(days=60))
    await remind(world)
    await world.execute(
        "UPDATE public.certifications SET expires_on = :day", day=TODAY + timedelta(days=20)
    )
    assert (await remind(world)).enqueued == 0

    await deliver(world)
    assert (await remind(world)).by_threshold == {30: 1}
    assert await enqueued(world) == {str(mentor.certification_id): 30}


# ---------------------------------------------------------------------------------- for whom


async def test_who_is_paused_is_not_reminded_until_the_pause_is_over(world: World) -> None:
    """
    Nothing is noted meanwhile, so afterwards the nearest one goes out.
    """
    mentor = await world.mentor(expires_on=TODAY + timedelta(days=20))
    pauses = PauseManagementService(world.engine)
    await pauses.pause(mentor.id)
    assert (await remind(world)).enqueued == 0

    await pauses.resume(mentor.id)
    assert (await remind(world)).by_threshold == {30: 1}


async def test_what_has_expired_is_not_reminded_of(world: World) -> None:
    """
    Whatever its date says.
    """
    mentor = await world.mentor(expires_on=TODAY + timedelta(days=5))
    await world.execute(
        "UPDATE public.certifications SET status = 'expired', expired_at = now() WHERE id = :id",
        id=mentor.certification_id,
    )

    assert await remind(world) == Reminded(enqueued=0, by_threshold={}, skipped=0)


async def test_mentors_of_others_are_counted_and_never_reminded(world: World) -> None:
    """
    Only those who have reached a threshold are.
    """
    await world.mentor(organization_id=world.other, expires_on=TODAY + timedelta(days=5))
    await world.mentor(organization_id=world.other, expires_on=TODAY + timedelta(days=500))

    assert await remind(world) == Reminded(enqueued=0, by_threshold={}, skipped=1)
    assert await world.value("SELECT count(*) FROM public.cert_notification_log") == 0


async def test_each_certification_of_a_mentor_has_its_own_reminders(world: World) -> None:
    """
    On the same day too.
    """
    mentor = await world.mentor(expires_on=TODAY + timedelta(days=5))
    second = await world.certification(mentor.id, expires_on=TODAY + timedelta(days=5))
    third = await world.certification(mentor.id, expires_on=TODAY + timedelta(days=50))

    await remind(world)

    assert await enqueued(world) == {
        str(mentor.certification_id): 7,
        str(second): 7,
        str(third): 60,
    }


@pytest.mark.parametrize("thresholds", [(), (0,), (-1, 7), (1000,)])
def test_thresholds_out_of_range_are_refused(world: World, thresholds: tuple[int, ...]) -> None:
    """
    With a sentence, before anything is looked at.
    """
    with pytest.raises(ValueError, match="Thresholds are days"):
        service(world, thresholds)


# ------------------------------------------------------------------------- pages and parallel


async def _due(world: World, number: int) -> None:
    """
    So many mentors whose certification runs out within the next weeks.
    """
    await world.mentors(number)
    await world.execute(
        "UPDATE public.certifications SET expires_on = :today"
        " + CAST(abs(hashtext(CAST(id AS text))) % 70 AS integer)",
        today=TODAY,
    )


async def test_pages_leave_nobody_out_and_take_nobody_twice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Also where many share a day.
    """
    monkeypatch.setattr(reminders, "PAGE", 7)
    await _due(world, 100)
    due = await world.value(
        "SELECT count(*) FROM public.certifications WHERE expires_on - :today <= 60", today=TODAY
    )

    pages = [page async for page in service(world).remind_all(today=TODAY)]

    assert sum(page.enqueued for page in pages) == due == len(await enqueued(world))
    assert max(page.enqueued for page in pages) <= 7


async def test_eight_runs_at_once_enqueue_each_reminder_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Nobody waits for ever, nobody fails, and nobody counts what another has enqueued; also when
    they count from different days.
    """
    monkeypatch.setattr(reminders, "PAGE", 50)
    await _due(world, 1000)
    due = await world.value(
        "SELECT count(*) FROM public.certifications WHERE expires_on - :today <= 60", today=TODAY
    )

    runs = await asyncio.gather(*(remind(world) for _ in range(8)))

    assert sum(run.enqueued for run in runs) == due
    assert await world.value("SELECT sum(replaced) FROM outbox.events") == 0
    await asyncio.gather(*(remind(world, TODAY + timedelta(days=day)) for day in range(8)))
    assert (await remind(world)).enqueued == 0


async def test_a_second_run_locks_nothing(world: World) -> None:
    """
    It goes on while somebody else holds every row of the log.
    """
    await _due(world, 100)
    await remind(world)
    async with world.engine.begin() as holder:
        await holder.execute(text("SELECT FROM public.cert_notification_log FOR UPDATE"))
        async with asyncio.timeout(20):
            assert (await remind(world)).enqueued == 0


async def test_a_run_that_breaks_off_is_finished_by_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    What was committed is on its way; nothing is noted that is not.
    """
    monkeypatch.setattr(reminders, "PAGE", 10)
    await _due(world, 100)
    async for _ in service(world).remind_all(today=TODAY):
        break
    first = len(await enqueued(world))
    noted = await world.value("SELECT count(DISTINCT cert_id) FROM public.cert_notification_log")
    assert first == noted > 0

    second = (await remind(world)).enqueued

    due = await world.value(
        "SELECT count(*) FROM public.certifications WHERE expires_on - :today <= 60", today=TODAY
    )
    assert first + second == due


async def test_the_log_and_the_event_are_written_together_or_not_at_all(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A run that fails while it enqueues leaves nothing noted.
    """

    async def fail(*_: object) -> None:
        raise ZeroDivisionError

    await world.mentor(expires_on=TODAY)
    monkeypatch.setattr(reminders, "enqueue", fail)
    with pytest.raises(ZeroDivisionError):
        await remind(world)

    assert await world.value("SELECT count(*) FROM public.cert_notification_log") == 0


# -------------------------------------------------------------------------------------- dates


def _nearest(days_left: int, thresholds: Sequence[int]) -> int | None:
    """
    What the rule says, in plain Python.
    """
    reached = [days for days in thresholds if 0 <= days_left <= days]
    return min(reached, default=None)


DATES = st.sampled_from(
    [
        date(2026, 10, 25),  # clocks go back in Oslo
        date(2027, 3, 28),  # and forward
        date(2028, 2, 29),
        date(2026, 12, 31),
        date(2027, 1, 1),
        date(1999, 12, 31),
        date(2400, 2, 29),
    ]
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    today=DATES.flatmap(lambda day: st.integers(-3, 3).map(lambda n: day + timedelta(days=n))),
    offsets=st.lists(st.integers(-70, 70), min_size=1, max_size=8),
    thresholds=st.sets(st.integers(1, 65), min_size=1, max_size=4),
)
async def test_whatever_the_date_days_are_counted_by_the_calendar(
    world: World, today: date, offsets: list[int], thresholds: set[int]
) -> None:
    """
    Nights of 23 and of 25 hours, leap days and the turn of the year are days like others.
    """
    await world.execute("DELETE FROM outbox.events")
    await world.execute("DELETE FROM public.cert_notification_log")
    await world.execute("DELETE FROM public.certifications")
    await world.execute("DELETE FROM public.mentors")
    mentors = [await world.mentor(expires_on=today + timedelta(days=n)) for n in offsets]

    await remind(world, today, tuple(thresholds))

    expected = {
        str(mentor.certification_id): days
        for mentor, left in zip(mentors, offsets, strict=True)
        if (days := _nearest(left, tuple(thresholds)))
    }
    assert await enqueued(world) == expected


@pytest.mark.parametrize(
    ("moment", "zone", "today"),
    [
        ("2026-10-24 21:59:59+00", "Europe/Oslo", date(2026, 10, 24)),
        ("2026-10-24 22:00:00+00", "Europe/Oslo", date(2026, 10, 25)),
        ("2026-10-25 22:59:59+00", "Europe/Oslo", date(2026, 10, 25)),  # 25 hours later
        ("2026-10-25 23:00:00+00", "Europe/Oslo", date(2026, 10, 26)),
        ("2027-03-27 23:00:00+00", "Europe/Oslo", date(2027, 3, 28)),
        ("2027-03-28 22:00:00+00", "Europe/Oslo", date(2027, 3, 29)),  # 23 hours later
        ("2026-12-31 23:00:00+00", "Europe/Oslo", date(2027, 1, 1)),
        ("2028-02-28 23:00:00+00", "Europe/Oslo", date(2028, 2, 29)),
        ("2026-12-31 23:00:00+00", "America/New_York", date(2026, 12, 31)),
        ("2026-12-31 09:59:59+00", "Pacific/Kiritimati", date(2026, 12, 31)),
        ("2026-12-31 10:00:00+00", "Pacific/Kiritimati", date(2027, 1, 1)),
    ],
)
@pytest.mark.parametrize("server", ["UTC", "Asia/Tokyo"])
async def test_today_is_the_organisations_wherever_the_server_is(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    zone: str,
    today: date,
    server: str,
) -> None:
    """
    By the database's clock: it is the threshold on that day, and was not the day before.
    """
    statement = str(TODAY_IN_ZONE).replace("now()", f"timestamptz '{moment}'")
    monkeypatch.setattr(
        reminders,
        "TODAY",
        text(f"{statement} FROM set_config('TimeZone', '{server}', false)"),
    )
    reached = await world.mentor(expires_on=today + timedelta(days=7))
    await world.mentor(expires_on=today + timedelta(days=61))

    ours = CertificationReminderService(
        world.engine, organization_id=world.hlf, timezone=zone, thresholds=THRESHOLDS
    )
    pages = [page async for page in ours.remind_all()]

    assert [page.by_threshold for page in pages] == [{7: 1}]
    assert await enqueued(world) == {str(reached.certification_id): 7}


# -------------------------------------------------------------------------------------- plan

MANY = 50_000


@pytest.fixture
async def emptied(world: World) -> AsyncIterator[None]:
    """
    So many rows are not left for the next test to delete, one by one.
    """
    yield
    await world.execute(
        "TRUNCATE public.organizations, public.cert_notification_log, outbox.events CASCADE"
    )


@pytest.mark.usefixtures("emptied")
async def test_a_page_reads_an_index_however_many_certifications_there_are(
    world: World, database_url: str
) -> None:
    """
    With 50,000 of them, all noted before, no big table is read from end to end.
    """
    await world.execute(
        "INSERT INTO public.mentors (id, organization_id, full_name)"
        " SELECT gen_random_uuid(), :hlf, 'A mentor' FROM generate_series(1, :many)",
        hlf=world.hlf,
        many=MANY,
    )
    await world.execute(
        "INSERT INTO public.certifications (mentor_id, expires_on)"
        " SELECT id, :today + CAST(random() * 700 AS integer) FROM public.mentors",
        today=TODAY,
    )
    await world.execute(
        "INSERT INTO public.cert_notification_log (mentor_id, threshold_days, cert_id, expires_on)"
        " SELECT mentor_id, 60, id, expires_on - 365 FROM public.certifications"
    )
    await world.execute(
        "INSERT INTO public.mentor_pauses (mentor_id, reason, resumed_at)"
        " SELECT id, 'manual', CASE WHEN random() < 0.9 THEN now() END FROM public.mentors"
    )
    await world.execute(
        "INSERT INTO outbox.events (destination, key, organization_id, version, payload)"
        " SELECT 'reminders', CAST(id AS text), :hlf, 1,"
        "        jsonb_build_object('expires_on', expires_on - 365) FROM public.certifications",
        hlf=world.hlf,
    )
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "VACUUM (ANALYZE) public.mentors, public.certifications,"
            " public.cert_notification_log, public.mentor_pauses, outbox.events"
        )
    async with world.engine.begin() as connection_:
        rows = await connection_.execute(
            text(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {reminders.REMIND_PAGE}"),
            _parameters(world.hlf),
        )
        [plan] = rows.scalar_one()
        await connection_.rollback()

    nodes = list(_nodes(plan["Plan"]))
    read = {node["Relation Name"] for node in nodes if node["Node Type"].endswith("Seq Scan")}
    used = {node["Index Name"] for node in nodes if "Index Name" in node}
    assert read <= {"organizations"}, read
    assert "certifications_running_out" in used
    blocks = plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"]
    assert blocks < 40_000  # of 1,000 certifications, each with 3 rows to write


def _parameters(organization_id: UUID) -> dict[str, Any]:
    return {
        "organization_id": organization_id,
        "today": TODAY,
        "thresholds": sorted(THRESHOLDS),
        "longest": 60,
        "after_day": TODAY + timedelta(days=20),
        "after_mentor": "00000000-0000-0000-0000-000000000000",
        "after_certification": "00000000-0000-0000-0000-000000000000",
        "page": 1000,
    }


def _nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for child in plan.get("Plans", []) for node in _nodes(child))]
