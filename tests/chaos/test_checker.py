"""
The checker is checked: it finds nothing in an honest history, and each lie that is planted.

One history is made by the product's own code and committed. Every test plants its violation
in a transaction of its own, has it judged inside, and rolls it back.
"""

from __future__ import annotations

import asyncio
import json
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import psycopg
import pytest
from alembic import command
from sqlalchemy.engine import make_url
from tenacity import wait_exponential

from outbox import Delivered, Destination, Relay, RetryPolicy, TransientError, store
from outbox.gate import Backoff
from outbox.outcome import Dead, Retry
from outbox.store import Landed
from tests.chaos import journal
from tests.chaos.checker import check
from tests.chaos.invariants import CLOCK_SLACK_SECONDS, INVARIANTS, MAX_ATTEMPTS
from tests.chaos.producer import AFTERWARDS, FAR, Note
from tests.conftest import alembic_config, environment, new_database, until, wakeups_told
from tests.factories import Mentor, World
from worker import database, portal
from worker.certifications import confirmations
from worker.certifications.transitions import CertificationManagementService
from worker.dynamics.sandbox import Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sqlalchemy.ext.asyncio import AsyncEngine

    from outbox import Event
    from outbox.outcome import Outcome
    from outbox.store import Settled
    from tests.chaos.checker import Findings

CANARY = "canary-of-the-checker"
LEASE_SECONDS = 0.3
CLOSED_SECONDS = 0.4
DOUBT_SECONDS = 0.5
NAMES = (
    "plain",
    "retried",
    "overtaken",
    "abandoned",
    "asserted",
    "dead",
    "redriven",
    "gated",
)

# ------------------------------------------------------------------------ an honest history


@dataclass(slots=True, kw_only=True)
class History:
    """
    What happened, as far as it is not in the database.

    Attributes:
        mentors: by what happens to them.
        entries: of Dynamics' ledger.
        rows: what Dynamics shows, by row.
        notes: of the one producer.
    """

    url: str
    organization_id: str = ""
    mentors: dict[str, Mentor] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    rows: dict[str, object] = field(default_factory=dict)
    notes: list[tuple[str, Note]] = field(default_factory=list)

    def answer(self, mentor: Mentor, version: int, *, visible: bool, status: int) -> None:
        """
        A request about a mentor, and what Dynamics does with it.
        """
        self.entries.append(
            Entry(
                seq=len(self.entries) + 1,
                kind="data",
                method="PATCH",
                row=str(mentor.dynamics_id),
                correlation_id=journal.correlation(str(mentor.id), version),
                body={"hlf_portalvisible": visible},
                status=status,
                applied=status == 204,
                started_utc=datetime.now(UTC).isoformat(),
            )
        )
        if status == 204:
            self.rows[str(mentor.dynamics_id)] = visible

    def told(self, mentor: Mentor, state: Any, **more: Any) -> None:  # noqa: ANN401 (as in Note)
        """
        What the producer noted about one operation.
        """
        number = len(self.notes)
        self.notes.append(
            ("produce-1", Note(number=number, mentor=str(mentor.id), state=state, **more))
        )


class Process:
    """
    A worker or producer: what it does bears its name.
    """

    def __init__(self, history: History, who: str) -> None:
        url = make_url(history.url).update_query_dict({"options": f"-c chaos.who={who}"})
        self.engine = database.connect(
            url.render_as_string(hide_password=False), application_name=who
        )
        self._history = history
        self._worker_id = uuid4()

    async def expire(self, mentor: Mentor) -> None:
        """
        As the producer does, and note it.
        """
        done = await self._service.expire(mentor.certification_id, today=AFTERWARDS)
        assert done is not None
        self._history.told(mentor, "saved", version=done.version)

    async def renew(self, mentor: Mentor, *, heard: bool = True) -> None:
        """
        As the producer does; if it is not heard of, the note says only that it began.
        """
        done = await self._service.renew(mentor.certification_id, FAR)
        if heard:
            self._history.told(mentor, "saved", version=done.version)
        else:
            self._history.told(mentor, "began")

    @property
    def _service(self) -> CertificationManagementService:
        return CertificationManagementService(
            self.engine,
            organization_id=cast("Any", self._history.organization_id),
            timezone="Europe/Oslo",
        )

    async def claim(self, *, lease_seconds: float = 60.0) -> Event:
        """
        Wait for the one event that is due, and take it.
        """
        claimed: list[Event] = []

        async def came() -> bool:
            async with self.engine.begin() as connection:
                found = await store.claim(
                    connection,
                    destination="dynamics",
                    organization_id=cast("Any", self._history.organization_id),
                    worker_id=self._worker_id,
                    limit=10,
                    lease_seconds=lease_seconds,
                    slack_seconds=1.0,
                    doubt_seconds=DOUBT_SECONDS,
                )
            claimed.extend(found.events)
            return bool(claimed)

        await until(came)
        [event] = claimed
        return event

    def send(self, event: Event, *, status: int = 204) -> None:
        """
        The request of an attempt.
        """
        [mentor] = [one for one in self._history.mentors.values() if str(one.id) == event.key]
        self._history.answer(mentor, event.version, visible=event.payload["visible"], status=status)

    async def settle(self, event: Event, outcome: Outcome) -> Settled:
        """
        As a relay does.
        """
        async with self.engine.begin() as connection:
            settled = await store.settle(
                connection,
                [Landed(event=event, outcome=outcome)],
                doubt_seconds=DOUBT_SECONDS,
            )
            await confirmations.record(connection, settled.written)
        return settled

    async def deliver(self) -> None:
        """
        Claim, send, settle.
        """
        event = await self.claim()
        self.send(event)
        await self.settle(event, Delivered())


async def _live(history: History) -> None:
    harness = database.connect(history.url, application_name="harness")
    world = World(harness)
    await world.settle_in()
    history.organization_id = cast("Any", world.hlf)
    mentors = await world.mentors(len(NAMES))
    history.mentors = dict(zip(NAMES, mentors, strict=True))
    history.rows = {str(one.dynamics_id): True for one in mentors}
    people = [Process(history, who) for who in ("produce-1", "worker-1", "worker-2")]
    producer, one, two = people
    for name in NAMES:
        await producer.expire(history.mentors[name])
        await STORIES.get(name, _delivered)(history.mentors[name], producer, one, two)
    history.told(history.mentors["plain"], "failed", error="OperationalError")
    history.told(history.mentors["plain"], "nothing")
    for engine in (harness, *(process.engine for process in people)):
        await wakeups_told()
        await engine.dispose()


async def _delivered(_: Mentor, __: Process, one: Process, ___: Process) -> None:
    await one.deliver()


async def _retried(_: Mentor, __: Process, one: Process, two: Process) -> None:
    event = await one.claim()
    one.send(event, status=503)
    await one.settle(event, Retry(after_seconds=0.01, code="unavailable"))
    await two.deliver()


async def _overtaken(mentor: Mentor, producer: Process, one: Process, two: Process) -> None:
    event = await one.claim()
    one.send(event)
    await producer.renew(mentor, heard=False)
    await one.settle(event, Delivered())
    await two.deliver()


async def _abandoned(_: Mentor, __: Process, one: Process, two: Process) -> None:
    """
    Whoever lost it comes back, and is turned away.
    """
    event = await one.claim(lease_seconds=LEASE_SECONDS)
    one.send(event)
    mine = await two.claim()
    assert (await one.settle(event, Delivered())).lost
    two.send(mine)
    await two.settle(mine, Delivered())


async def _asserted(mentor: Mentor, producer: Process, one: Process, two: Process) -> None:
    """
    A request without an answer may arrive after the newer one, which is sent again therefore.
    """
    event = await one.claim()
    await one.settle(event, Retry(after_seconds=0.01, code="timeout", doubtful=True))
    await producer.renew(mentor)
    await two.deliver()
    await one.deliver()


async def _dead(
    _: Mentor, __: Process, one: Process, ___: Process, *, recoverable: bool = False
) -> None:
    event = await one.claim()
    one.send(event, status=503 if recoverable else 404)
    await one.settle(event, Dead(code="no", message="No.", recoverable=recoverable))


async def _gated(_: Mentor, __: Process, ___: Process, two: Process) -> None:
    """
    A relay finds an outage, closes the gate, probes it, re-drives and opens it.
    """
    history = two._history
    failures = iter([503])

    async def deliver(event: Event, _: float) -> Delivered:
        status = next(failures, 204)
        two.send(event, status=status)
        if status != 204:
            raise TransientError("unavailable", "Unavailable.")
        return Delivered()

    relay = Relay(
        two.engine,
        Destination(
            name="dynamics",
            organization_id=cast("Any", history.organization_id),
            deliver=deliver,
            record=confirmations.record,
            redrive=partial(_redrive, two.engine, history),
            policy=RetryPolicy(wait=wait_exponential(multiplier=0.01)),
            outage=Backoff(first_seconds=CLOSED_SECONDS, longest_seconds=CLOSED_SECONDS),
            breaker_keys=1,
        ),
        poll_seconds=0.02,
    )
    world = World(two.engine)

    async def over() -> bool:
        return not await world.value(
            "SELECT (SELECT count(*) FROM outbox.events)"
            " + (SELECT count(*) FROM outbox.gates WHERE trips > 0)"
        )

    running = asyncio.create_task(relay.run(grace_seconds=5))
    await until(over)
    relay.stop()
    await running


async def _redrive(engine: AsyncEngine, history: History, limit: int | None) -> int:
    return await portal.redrive_recoverable(
        engine, organization_id=cast("Any", history.organization_id), limit=limit
    )


STORIES: dict[str, Any] = {
    "retried": _retried,
    "overtaken": _overtaken,
    "abandoned": _abandoned,
    "asserted": _asserted,
    "dead": _dead,
    "redriven": partial(_dead, recoverable=True),
    "gated": _gated,
}


@pytest.fixture(scope="module")
def history(server_url: str) -> Iterator[History]:
    """
    The honest history, committed in a database of its own.
    """
    with new_database(server_url) as url:
        with environment(DATABASE_URL=url):
            command.upgrade(alembic_config(), "head")
        with psycopg.connect(url, autocommit=True) as connection:
            journal.install(connection)
        history = History(url=url)
        asyncio.run(_live(history))
        yield history


# --------------------------------------------------------------------------- one's own scene


class Scene:
    """
    The honest history, to be spoilt: nothing that is done to it outlives the test.

    Attributes:
        entries, rows, notes: copies of the history's.
        logs: what the processes wrote, by file name.
    """

    def __init__(self, connection: psycopg.Connection[Any], history: History, folder: Path) -> None:
        self.entries = deepcopy(history.entries)
        self.rows = dict(history.rows)
        self.notes = list(history.notes)
        self.logs = {
            "worker-1.log": '{"event": "outbox.claim_lost", "level": "warning"}\n{"event": "x"}\n',
            "worker-2.log": "ready\n",
        }
        self.organization_id = history.organization_id
        self.mentors = history.mentors
        self._connection = connection
        self._folder = folder
        self._now = datetime.now(UTC)
        self._xids = count(1 << 50)

    def key(self, name: str) -> str:
        """
        A mentor's.
        """
        return str(self.mentors[name].id)

    def sql(self, statement: str, **parameters: object) -> Any:  # noqa: ANN401 (a cursor)
        """
        Run a statement, which must touch something; the journal takes note.
        """
        cursor = self._connection.execute(cast("Any", statement), parameters)
        assert cursor.rowcount != 0, "This plants nothing."
        return cursor

    def unseen(self, statement: str, **parameters: object) -> None:
        """
        Run a statement past the journal.
        """
        self.sql("SET LOCAL session_replication_role = replica")
        self.sql(statement, **parameters)
        self.sql("SET LOCAL session_replication_role = origin")

    def after(self, seconds: float) -> datetime:
        """
        A moment, counted from this test's beginning; all of the history is before 0.
        """
        return self._now + timedelta(seconds=seconds)

    def xid(self) -> str:
        """
        Of a transaction that nobody else had.
        """
        return str(next(self._xids))

    def note(self, what: str, key: str, *, at: float = 100.0, **columns: object) -> None:
        """
        Write into the journal what no trigger saw, in a transaction of its own.
        """
        row = {
            "what": what,
            "key": key,
            "at": self.after(at),
            "began": self.after(at),
            "xid": self.xid(),
            "who": "worker-1",
        } | columns
        names = ", ".join(row)
        values = ", ".join(f"%({name})s" for name in row)
        self.sql(f"INSERT INTO chaos.journal ({names}) VALUES ({values})", **row)  # noqa: S608

    def claimed(self, name: str, *, at: float = 100.0, **columns: object) -> str:
        """
        Note a claim of a mentor's event, ended or not, and return its token.
        """
        token = str(columns.setdefault("token", str(uuid4())))
        defaults = {
            "version": 1,
            "event_id": 1 << 40,
            "attempts": 1,
            "until": self.after(at + 2),
            "first_attempt_at": self.after(at),
        }
        self.note("claimed", self.key(name), at=at, **(defaults | columns))
        return token

    def released(self, name: str, token: str, *, at: float, **columns: object) -> None:
        """
        Note that a claim was given back.
        """
        defaults = {"version": 1, "event_id": 1 << 40, "attempts": 1}
        self.note("released", self.key(name), at=at, token=token, **(defaults | columns))

    def gate(self, what: str, *, at: float, until: float | str = 0, **columns: object) -> None:
        """
        Note what became of the gate.
        """
        moment = until if isinstance(until, str) else self.after(until)
        self.note(what, "dynamics", at=at, until=moment, detail="outage", **columns)

    def requests(self, name: str, version: int = 1) -> list[Entry]:
        """
        What Dynamics was told about a version of a mentor.
        """
        wanted = journal.correlation(self.key(name), version)
        return [entry for entry in self.entries if entry.correlation_id == wanted]

    def request(self, name: str, version: int = 1, *, at: float = 0.0, **changes: Any) -> None:  # noqa: ANN401
        """
        One more request like the last one about this version.
        """
        entry = deepcopy(self.requests(name, version)[-1])
        changes = {
            "seq": len(self.entries) + 1,
            "started_utc": self.after(at).isoformat(),
        } | changes
        for field_name, value in changes.items():
            setattr(entry, field_name, value)
        self.entries.append(entry)

    def tell(self, state: Any, *, name: str = "plain", **more: Any) -> None:  # noqa: ANN401
        """
        One more note of the producer.
        """
        note = Note(number=len(self.notes), mentor=self.key(name), state=state, **more)
        self.notes.append(("produce-1", note))

    def judge(self) -> Findings:
        """
        Hand all evidence to the checker, as the ground does.
        """
        for name, text in self.logs.items():
            (self._folder / name).write_text(text)
        journal.present(
            self._connection,
            requests=self.entries,
            portal=self.rows,
            acknowledged=[
                (note.mentor, note.version)
                for _, note in self.notes
                if note.state == "saved" and note.version is not None
            ],
        )
        return check(
            self._connection,
            notes=self.notes,
            outputs=sorted(self._folder.glob("*.log")),
            canary=CANARY,
            lease_seconds=LEASE_SECONDS,
        )

    def accused(self) -> set[str]:
        """
        The names of all that is violated.
        """
        return set(self.judge().violations)


@pytest.fixture
def scene(history: History, tmp_path: Path) -> Iterator[Scene]:
    """
    To be spoilt by one test.
    """
    with psycopg.connect(history.url) as connection:
        yield Scene(connection, history, tmp_path)
        connection.rollback()


# -------------------------------------------------------------------------------- it is fair


def test_nothing_is_found_in_an_honest_history(scene: Scene) -> None:
    """
    A retry, a newer version in flight, a dead worker, a doubt, a dead event, an outage.
    """
    findings = scene.judge()

    assert findings.violations == {}
    assert (findings.lost, findings.unexpected, findings.timeline) == (0, 0, [])


def test_an_honest_history_holds_what_the_claims_are_about(scene: Scene) -> None:
    """
    Or its innocence would prove little.
    """
    seen = dict(scene.sql("SELECT what, count(*) FROM chaos.journal GROUP BY what").fetchall())

    assert seen.keys() >= {
        *("expired", "renewed", "paused", "unpaused", "wanted", "enqueued", "claimed"),
        *("released", "gone", "settled", "confirmed", "failed", "resolved"),
        *("closed", "probe", "opened"),
    }
    assert seen["claimed"] == 15
    assert {"who": {"produce-1", "worker-1", "worker-2"}} == {
        "who": {who for (who,) in scene.sql("SELECT who FROM chaos.journal WHERE who IS NOT NULL")}
    }


def test_what_is_counted_in_an_honest_history_is_right(scene: Scene) -> None:
    """
    One claim died, one state was asserted again, one operation's outcome was found out.
    """
    findings = scene.judge()

    assert findings.extra == {scene.key("abandoned"): 1}
    assert findings.duplicated == 1
    assert findings.recovered == 2
    assert [0 <= seconds < 5 for seconds in findings.taken_over] == [True]
    assert findings.figures == {
        "versions": 11,
        "requests": 14,
        "claims_died": 1,
        "open_failures": 1,
        "dead": 2,
        "alive": 0,
        "operations": 12,
        "unknown": 1,
        "refused": 1,
        "claims_lost": 1,
    }


def test_the_timeline_is_of_the_mentor_about_whom_something_is_wrong(scene: Scene) -> None:
    """
    In the order in which things happened.
    """
    scene.rows[str(scene.mentors["overtaken"].dynamics_id)] = False

    [first, *_] = timeline = scene.judge().timeline

    assert " wanted " in first
    assert len(timeline) == 18


def test_the_last_start_may_be_just_within_the_window(scene: Scene) -> None:
    """
    15 s are allowed.
    """
    scene.claimed("plain", attempts=2, first_attempt_at=scene.after(85))

    assert scene.accused() == set()


# ------------------------------------------------------------------------- it finds each lie

LIES: list[tuple[str, set[str], Callable[[Scene], None]]] = []


def lie(name: str, *related: str) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    """
    What is planted violates this claim, and these, and no other.
    """

    def register(spoil: Callable[[Scene], None]) -> Callable[[Scene], None]:
        LIES.append((name, {name, *related}, spoil))
        return spoil

    return register


@lie("S1")
def _a_certification_expires_and_nothing_follows(scene: Scene) -> None:
    scene.sql(
        "UPDATE public.certifications SET status = 'expired', expired_at = now()"
        " WHERE mentor_id = %(key)s",
        key=scene.key("overtaken"),
    )


@lie("S1")
def _nobody_was_paused_then(scene: Scene) -> None:
    scene.sql(
        "DELETE FROM chaos.journal WHERE what = 'paused' AND key = %(key)s", key=scene.key("plain")
    )


@lie("S1")
def _the_event_came_in_another_transaction(scene: Scene) -> None:
    scene.sql(
        "UPDATE chaos.journal SET xid = '1' WHERE what = 'enqueued' AND key = %(key)s",
        key=scene.key("plain"),
    )


@lie("S1")
def _the_version_came_in_another_transaction(scene: Scene) -> None:
    scene.sql(
        "UPDATE chaos.journal SET xid = '1' WHERE what = 'wanted' AND key = %(key)s",
        key=scene.key("plain"),
    )


@lie("S1")
def _a_pause_stays_though_all_is_valid(scene: Scene) -> None:
    scene.unseen(
        "UPDATE public.mentor_pauses SET resumed_at = NULL WHERE mentor_id = %(key)s",
        key=scene.key("overtaken"),
    )


@lie("S1", "S12")
def _somebody_expired_is_to_be_visible(scene: Scene) -> None:
    scene.unseen(
        "UPDATE public.portal_visibility SET visible = true WHERE mentor_id = %(key)s",
        key=scene.key("plain"),
    )


@lie("S2")
def _a_request_is_about_a_version_that_was_rolled_back(scene: Scene) -> None:
    scene.request("plain", correlation_id=journal.correlation(scene.key("plain"), 2))


@lie("S2")
def _a_request_says_not_what_it_is_about(scene: Scene) -> None:
    scene.request("plain", correlation_id=None)


@lie("S2")
def _a_request_carries_the_wrong_value(scene: Scene) -> None:
    scene.requests("plain")[0].body = {"hlf_portalvisible": True}


@lie("S2")
def _a_request_carries_no_value(scene: Scene) -> None:
    scene.requests("plain")[0].body = None


@lie("S2")
def _a_request_is_about_somebody_else(scene: Scene) -> None:
    scene.requests("plain")[0].row = str(scene.mentors["dead"].dynamics_id)


@lie("S3")
def _a_version_is_forgotten(scene: Scene) -> None:
    scene.unseen("DELETE FROM outbox.settled WHERE key = %(key)s", key=scene.key("plain"))


@lie("S3")
def _only_an_older_version_ended(scene: Scene) -> None:
    scene.unseen(
        "DELETE FROM outbox.settled WHERE key = %(key)s AND version = 2", key=scene.key("overtaken")
    )


@lie("S3")
def _what_was_called_saved_is_not_there(scene: Scene) -> None:
    scene.tell("saved", version=77)


@lie("S3", "S12")
def _somebody_died_and_nobody_is_told(scene: Scene) -> None:
    scene.unseen("DELETE FROM public.dynamics_sync_failures WHERE resolved_at IS NULL")


@lie("S3 acknowledged", "S3")
def _more_is_called_saved_than_was_committed(scene: Scene) -> None:
    scene.tell("saved")
    scene.tell("saved")  # the first could be the one whose outcome is unknown


@lie("S4")
def _a_version_is_waiting_and_failed(scene: Scene) -> None:
    scene.unseen(
        "INSERT INTO outbox.events (destination, key, organization_id, version, payload)"
        " SELECT destination, key, organization_id, version, payload FROM outbox.settled"
        " WHERE key = %(key)s",
        key=scene.key("dead"),
    )


@lie("S4")
def _a_mentor_has_two_open_failures(scene: Scene) -> None:
    scene.sql("DROP INDEX public.dynamics_sync_failures_one_open")
    scene.unseen("UPDATE public.dynamics_sync_failures SET resolved_at = NULL, resolution = NULL")
    scene.unseen(
        "UPDATE public.dynamics_sync_failures SET mentor_id = %(key)s", key=scene.key("dead")
    )


@lie("S5", "S3")
def _something_ended_that_was_never_enqueued(scene: Scene) -> None:
    scene.unseen(
        "INSERT INTO outbox.settled (event_id, destination, key, organization_id, version,"
        " payload, outcome, attempts, created_at) SELECT event_id, destination, key,"
        " organization_id, 50, payload, outcome, attempts, created_at FROM outbox.settled"
        " WHERE key = %(key)s",
        key=scene.key("plain"),
    )


@lie("S5")
def _an_event_vanishes_without_an_ending(scene: Scene) -> None:
    scene.sql(
        "DELETE FROM chaos.journal WHERE what = 'settled' AND key = %(key)s", key=scene.key("plain")
    )


@lie("S5", "S7")
def _the_ending_was_written_in_another_transaction(scene: Scene) -> None:
    scene.sql(
        "UPDATE chaos.journal SET xid = '1' WHERE what = 'settled' AND key = %(key)s",
        key=scene.key("plain"),
    )


@lie("S6", "S9")
def _somebody_takes_what_another_still_holds(scene: Scene) -> None:
    scene.sql(
        "UPDATE chaos.journal SET began = began + interval '1 hour'"
        " WHERE what = 'claimed' AND attempts = 1 AND key = %(key)s",
        key=scene.key("abandoned"),
    )


@lie("S7")
def _somebody_else_gives_a_claim_back(scene: Scene) -> None:
    scene.sql(
        "UPDATE chaos.journal SET who = 'worker-2' WHERE what = 'released' AND key = %(key)s",
        key=scene.key("retried"),
    )


@lie("S7")
def _somebody_else_settles(scene: Scene) -> None:
    scene.sql(
        "UPDATE chaos.journal SET who = 'worker-2' WHERE what = 'gone' AND key = %(key)s",
        key=scene.key("plain"),
    )


@lie("S7")
def _whoever_lost_a_claim_still_gives_it_back(scene: Scene) -> None:
    scene.sql(
        "INSERT INTO chaos.journal (what, who, key, version, event_id, token)"
        " SELECT 'released', who, key, version, event_id, token FROM chaos.journal"
        " WHERE what = 'claimed' AND attempts = 1 AND key = %(key)s",
        key=scene.key("abandoned"),
    )


@lie("S7", "S23")
def _an_event_goes_that_nobody_had_claimed(scene: Scene) -> None:
    scene.sql(
        "UPDATE chaos.journal SET token = NULL WHERE what = 'gone' AND key = %(key)s",
        key=scene.key("plain"),
    )


@lie("S8")
def _there_is_no_end_to_the_attempts(scene: Scene) -> None:
    scene.claimed("plain", attempts=MAX_ATTEMPTS + 1)
    scene.request("plain", at=100.1)


@lie("S8")
def _a_request_was_not_counted(scene: Scene) -> None:
    scene.request("plain")


@lie("S8")
def _a_request_without_an_answer_was_not_counted(scene: Scene) -> None:
    scene.request("plain", status=None, applied=False)


@lie("S9")
def _an_attempt_starts_after_the_window(scene: Scene) -> None:
    scene.claimed("plain", attempts=2, first_attempt_at=scene.after(84.9))


@lie("S10")
def _somebody_claims_while_the_gate_is_closed(scene: Scene) -> None:
    scene.gate("closed", at=100, until=160)
    scene.claimed("plain", at=110)


@lie("S10")
def _somebody_claims_though_an_operator_closed_the_gate(scene: Scene) -> None:
    scene.gate("closed", at=100, until="infinity")
    scene.claimed("plain", at=1000)


@lie("S10")
def _somebody_claims_while_another_probes(scene: Scene) -> None:
    scene.gate("probe", at=100, until=160, token=str(uuid4()))
    scene.claimed("plain", at=110, who="worker-2")


@lie("S12")
def _the_portal_shows_something_else(scene: Scene) -> None:
    scene.rows[str(scene.mentors["plain"].dynamics_id)] = True


@lie("S12")
def _the_portal_has_no_such_row(scene: Scene) -> None:
    del scene.rows[str(scene.mentors["plain"].dynamics_id)]


@lie("S15")
def _what_is_confirmed_took_no_effect(scene: Scene) -> None:
    scene.requests("plain")[0].applied = False


@lie("S15")
def _what_is_confirmed_was_never_sent(scene: Scene) -> None:
    scene.unseen(
        "UPDATE public.portal_confirmations SET version = 9 WHERE mentor_id = %(key)s",
        key=scene.key("plain"),
    )


@lie("S15")
def _a_confirmation_goes_backwards(scene: Scene) -> None:
    scene.unseen(
        "INSERT INTO chaos.journal (what, key, version, visible, xid)"
        " SELECT what, key, 1, visible, xid FROM chaos.journal"
        " WHERE what = 'confirmed' AND version = 2 AND key = %(key)s",
        key=scene.key("overtaken"),
    )


@lie("S16")
def _a_row_is_created(scene: Scene) -> None:
    scene.requests("plain")[0].created = True


@lie("S23")
def _history_is_written_anew(scene: Scene) -> None:
    scene.sql("UPDATE outbox.settled SET attempts = attempts WHERE version = 2")


@lie("S23", "S3")
def _history_is_removed(scene: Scene) -> None:
    scene.sql("DELETE FROM outbox.settled WHERE key = %(key)s", key=scene.key("plain"))


@lie("S23")
def _a_claim_is_given_back_that_nobody_had(scene: Scene) -> None:
    scene.released("plain", str(uuid4()), at=100)


@lie("S1 (COMMIT)")
def _what_failed_was_committed(scene: Scene) -> None:
    who, note = scene.notes[0]
    scene.notes.append((who, Note(number=note.number, mentor=note.mentor, state="failed")))


@lie("S1 (COMMIT)")
def _there_was_nothing_to_do_yet_something_was_done(scene: Scene) -> None:
    who, note = scene.notes[0]
    scene.notes.append((who, Note(number=note.number, mentor=note.mentor, state="nothing")))


@lie("S22")
def _a_secret_is_in_a_log(scene: Scene) -> None:
    scene.logs["worker-2.log"] += f"Bearer x{CANARY}x\n"


@lie("S22")
def _a_secret_is_in_a_table(scene: Scene) -> None:
    scene.unseen(
        "UPDATE public.dynamics_sync_failures SET error_message = %(text)s",
        text=f"client_secret={CANARY}",
    )


@lie("S22")
def _a_secret_is_in_an_event(scene: Scene) -> None:
    scene.unseen(
        "UPDATE outbox.settled SET payload = payload || jsonb_build_object('x', %(text)s::text)",
        text=CANARY,
    )


@lie("no surprise in the logs")
def _settling_failed(scene: Scene) -> None:
    scene.logs["worker-2.log"] += (
        json.dumps({"event": "outbox.settle_failed", "level": "error"}) + "\n"
    )


@lie("no surprise in the logs")
def _a_redrive_failed(scene: Scene) -> None:
    scene.logs["worker-2.log"] += (
        json.dumps({"event": "outbox.redrive_failed", "level": "error"}) + "\n"
    )


@lie("no surprise in the logs")
def _something_was_never_awaited(scene: Scene) -> None:
    scene.logs["worker-2.log"] += "x.py:1: RuntimeWarning: coroutine 'x' was never awaited\n"


@lie("no surprise in the logs")
def _something_was_raised_to_the_top(scene: Scene) -> None:
    scene.logs["worker-2.log"] += "Traceback (most recent call last):\n"


def test_each_claim_is_violated_somewhere_above() -> None:
    """
    A query that never finds anything would go unnoticed.
    """
    others = {"S1 (COMMIT)", "S22", "no surprise in the logs", "S3 acknowledged"}

    assert {name for name, _, _ in LIES} == {one.name for one in INVARIANTS} | others


def test_the_producers_notes_alone_show_that_something_is_lost(scene: Scene) -> None:
    """
    Also where the note holds no version.
    """
    _more_is_called_saved_than_was_committed(scene)

    findings = scene.judge()
    assert list(findings.violations) == ["S3"]
    assert "acknowledged, not committed" in findings.violations["S3"][0]


@lie("S7")
def _whoever_lost_a_claim_confirms(scene: Scene) -> None:
    scene.note("confirmed", scene.key("abandoned"), version=1, visible=False)


@lie("S7")
def _whoever_lost_a_claim_writes_history(scene: Scene) -> None:
    scene.note(
        "settled", scene.key("abandoned"), version=1, event_id=4, attempts=1, detail="delivered"
    )


@lie("S7", "S4")
def _whoever_lost_a_claim_opens_a_failure(scene: Scene) -> None:
    scene.note("failed", scene.key("abandoned"), version=1, visible=False, detail="timeout")


@lie("S7")
def _somebody_without_a_name_settles(scene: Scene) -> None:
    scene.sql(
        "UPDATE chaos.journal SET who = NULL WHERE what = 'gone' AND key = %(key)s",
        key=scene.key("plain"),
    )


@lie("S7")
def _an_older_flight_of_the_same_process_settles(scene: Scene) -> None:
    scene.sql(
        "UPDATE chaos.journal SET who = 'worker-1' WHERE key = %(key)s AND what IN"
        " ('claimed', 'released', 'gone', 'settled')",
        key=scene.key("abandoned"),
    )
    scene.sql(
        "UPDATE chaos.journal SET attempts = 1 WHERE key = %(key)s AND what = 'settled'",
        key=scene.key("abandoned"),
    )


@lie("S15")
def _what_is_confirmed_is_the_opposite(scene: Scene) -> None:
    scene.unseen(
        "UPDATE public.portal_confirmations SET visible = NOT visible WHERE mentor_id = %(key)s",
        key=scene.key("plain"),
    )


@lie("S15")
def _something_is_confirmed_before_it_is_said(scene: Scene) -> None:
    scene.requests("plain")[0].started_utc = scene.after(5).isoformat()


@lie("S15")
def _an_earlier_confirmation_was_untrue(scene: Scene) -> None:
    scene.sql(
        "UPDATE chaos.journal SET detail = 'delivered' WHERE what = 'settled' AND version = 1"
        " AND key = %(key)s",
        key=scene.key("redriven"),
    )
    scene.sql(
        "UPDATE chaos.journal SET what = 'confirmed' WHERE what = 'failed' AND key = %(key)s",
        key=scene.key("redriven"),
    )


@lie("S10")
def _somebody_probes_a_gate_that_is_closed(scene: Scene) -> None:
    xid = scene.xid()
    scene.gate("closed", at=100, until=160)
    scene.gate("probe", at=110, until=112, xid=xid, token=str(uuid4()))
    scene.claimed("plain", at=110, xid=xid)


@lie("S10")
def _two_probe_at_a_time(scene: Scene) -> None:
    for who, at in (("worker-1", 100.0), ("worker-2", 101.0)):
        xid = scene.xid()
        scene.gate("probe", at=at, until=at + 10, who=who, xid=xid, token=str(uuid4()))
        scene.claimed("plain", at=at, who=who, xid=xid, event_id=int(at), until=scene.after(at + 1))


@lie("S10")
def _a_probe_takes_everything(scene: Scene) -> None:
    xid = scene.xid()
    scene.gate("closed", at=90, until=95)
    scene.gate("probe", at=100, until=110, xid=xid, token=str(uuid4()))
    scene.claimed("plain", at=100, xid=xid, event_id=1 << 41)
    scene.claimed("gated", at=100, xid=xid, event_id=1 << 42)


@lie("S10")
def _somebody_opens_who_did_not_probe(scene: Scene) -> None:
    scene.gate("closed", at=100, until=160)
    scene.gate("opened", at=101, until=101, who="worker-2")


@lie("S2")
def _a_request_says_something_else_as_well(scene: Scene) -> None:
    scene.requests("plain")[0].body = {"hlf_portalvisible": False, "fullname": "-"}


@lie("S2", "S8")
def _a_row_is_deleted(scene: Scene) -> None:
    scene.request("plain", kind="other", method="DELETE", body=None)


@lie("S8")
def _a_request_is_sent_before_it_is_counted(scene: Scene) -> None:
    scene.requests("plain")[0].started_utc = scene.after(-600).isoformat()


@lie("S8")
def _attempts_are_not_counted(scene: Scene) -> None:
    for turn in range(20):
        at = 100.0 + turn / 10
        token = scene.claimed("plain", at=at)
        scene.request("plain", at=at + 0.01, status=503, applied=False)
        scene.released("plain", token, at=at + 0.02)


@lie("S8")
def _a_refused_token_is_tried_for_ever(scene: Scene) -> None:
    for _ in range(20):
        scene.request("plain", status=401, applied=False)


@lie("S8")
def _an_event_kills_its_workers_for_ever(scene: Scene) -> None:
    for attempts in range(1, 20):
        at = 100.0 + attempts * 10
        scene.claimed("plain", at=at, attempts=attempts, detail="abandoned")


@lie("S9")
def _a_request_starts_after_the_window(scene: Scene) -> None:
    scene.claimed(
        "plain", at=100, attempts=2, first_attempt_at=scene.after(86), until=scene.after(160)
    )
    scene.request("plain", at=130)


@lie("S9")
def _the_window_begins_anew_each_time(scene: Scene) -> None:
    for attempts in range(1, 5):
        at = 100.0 + attempts * 0.5
        token = scene.claimed("plain", at=at, attempts=attempts)
        scene.released("plain", token, at=at + 0.2, attempts=attempts)


@lie("S1")
def _a_version_is_drawn_and_nothing_is_enqueued(scene: Scene) -> None:
    scene.note("wanted", scene.key("dead"), version=2, visible=False)


@lie("S1", "S2")
def _the_event_bears_another_version(scene: Scene) -> None:
    scene.sql(
        "UPDATE chaos.journal SET version = 7 WHERE what = 'wanted' AND key = %(key)s",
        key=scene.key("dead"),
    )


@lie("S1 (COMMIT)")
def _one_outcome_is_taken_for_another(scene: Scene) -> None:
    """
    The renewal of which nothing was heard did not happen; an expiry that failed did.
    """
    scene.sql(
        "DELETE FROM chaos.journal WHERE what = 'renewed' AND key = %(key)s",
        key=scene.key("overtaken"),
    )
    [number] = [one.number for _, one in scene.notes if one.mentor == scene.key("gated")]
    scene.notes.append(
        ("produce-1", Note(number=number, mentor=scene.key("gated"), state="failed"))
    )


@lie("S1 (COMMIT)")
def _a_producer_without_notes_committed(scene: Scene) -> None:
    scene.note("renewed", scene.key("overtaken"), who="produce-2", xid=_xid_of(scene, "overtaken"))


@lie("S3")
def _the_newest_version_was_superseded(scene: Scene) -> None:
    scene.unseen(
        "UPDATE outbox.settled SET outcome = 'superseded' WHERE key = %(key)s",
        key=scene.key("plain"),
    )


@lie("S3")
def _what_was_delivered_is_not_confirmed(scene: Scene) -> None:
    scene.unseen(
        "DELETE FROM public.portal_confirmations WHERE mentor_id = %(key)s", key=scene.key("plain")
    )


@lie("S4")
def _a_version_failed_that_was_tried_again(scene: Scene) -> None:
    token = scene.claimed("plain")
    xid = scene.xid()
    scene.released("plain", token, at=101, xid=xid)
    scene.note("failed", scene.key("plain"), at=101, xid=xid, version=1, visible=False)


@lie("S4")
def _a_failure_stays_open_though_a_newer_version_came_through(scene: Scene) -> None:
    scene.unseen(
        "UPDATE public.dynamics_sync_failures SET resolved_at = NULL, resolution = NULL"
        " WHERE mentor_id = %(key)s",
        key=scene.key("redriven"),
    )


@lie("no surprise in the logs")
def _a_handler_has_a_bug(scene: Scene) -> None:
    scene.logs["worker-2.log"] += (
        json.dumps({"event": "outbox.attempt_failed", "code": "TypeError"}) + "\n"
    )


@lie("no surprise in the logs")
def _something_is_logged_as_an_error(scene: Scene) -> None:
    scene.logs["worker-2.log"] += (
        json.dumps({"event": "outbox.flight_left", "level": "error"}) + "\n"
    )


@pytest.mark.parametrize(
    ("name", "names", "spoil"),
    [pytest.param(*one, id=f"{one[0]}{one[-1].__name__}") for one in LIES],
)
def test_a_lie_is_named_and_nothing_else(
    scene: Scene, name: str, names: set[str], spoil: Callable[[Scene], None]
) -> None:
    """
    By the claim it violates, and at most by those that follow from the same rows.
    """
    spoil(scene)

    assert {name.removesuffix(" acknowledged")} <= scene.accused() <= names


def _xid_of(scene: Scene, name: str) -> str:
    [xid] = scene.sql(
        "SELECT xid::text FROM chaos.journal WHERE what = 'renewed' AND key = %(key)s",
        key=scene.key(name),
    ).fetchone()
    return str(xid)


def test_a_claim_may_take_a_moment(scene: Scene) -> None:
    """
    What decides is when its transaction began, not when the row was written.
    """
    scene.claimed("plain", at=115.05, began=scene.after(114.95), first_attempt_at=scene.after(100))


def test_what_is_lost_is_counted_once(scene: Scene) -> None:
    """
    One acknowledged change that is not there is one.
    """
    scene.notes = [pair for pair in scene.notes if pair[1].state != "began"]
    scene.sql(
        "DELETE FROM chaos.journal WHERE what = 'renewed' AND key = %(key)s",
        key=scene.key("overtaken"),
    )
    scene.tell("saved", version=77)

    assert scene.judge().lost == 1


def test_all_that_is_lost_or_unexpected_is_counted(scene: Scene) -> None:
    """
    Also when it is more than anybody wants to read.
    """
    for version in range(70, 90):
        scene.request("plain", correlation_id=journal.correlation(scene.key("plain"), version))

    assert scene.judge().unexpected == 20


def test_a_take_over_counts_once_the_gate_was_opened_again(scene: Scene) -> None:
    """
    An operator closed it for ever, and opened it long before.
    """
    scene.gate("closed", at=-7200, until="infinity")
    scene.gate("opened", at=-3600, until=-3600)

    assert len(scene.judge().taken_over) == 1


def test_what_is_said_again_because_of_a_doubt_is_no_duplicate(scene: Scene) -> None:
    """
    The outbox repeats a state when an older request may have arrived after it.
    """
    assert scene.judge().extra == {scene.key("abandoned"): 1}


@pytest.fixture
def continued(history: History, server_url: str) -> Iterator[History]:
    """
    A copy of the honest history that may go on, and be committed.
    """
    source = make_url(history.url).database
    with new_database(server_url) as url:
        name = make_url(url).database
        with psycopg.connect(server_url, autocommit=True) as admin:
            admin.execute(cast("Any", f'DROP DATABASE "{name}"'))
            admin.execute(cast("Any", f'CREATE DATABASE "{name}" TEMPLATE "{source}"'))
        yield replace(
            history,
            url=url,
            entries=deepcopy(history.entries),
            rows=dict(history.rows),
            notes=list(history.notes),
        )


def test_who_claims_before_a_slow_closing_is_committed_is_not_accused(
    continued: History, tmp_path: Path
) -> None:
    """
    The gate was open to everybody until its COMMIT, however late that came.
    """
    with psycopg.connect(continued.url) as closing:
        closing.execute("UPDATE outbox.gates SET closed_until = now() + interval '1 hour'")
        closing.execute("SELECT pg_sleep(%s)", (CLOCK_SLACK_SECONDS + 0.1,))
        asyncio.run(_expire_and_deliver(continued))

    with psycopg.connect(continued.url) as connection:
        assert Scene(connection, continued, tmp_path).accused() == set()


async def _expire_and_deliver(history: History) -> None:
    producer, worker = (Process(history, who) for who in ("produce-1", "worker-1"))
    await producer.expire(history.mentors["overtaken"])
    await worker.deliver()
    await wakeups_told()
    await producer.engine.dispose()
    await worker.engine.dispose()
