"""
Plans: every hot statement stays on its index, however long a connection lives and however
much is waiting.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import psycopg
import pytest
from alembic import command
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from outbox import gate, store
from tests.conftest import alembic_config, environment, new_database
from tests.integration.outbox_builders import Outbox
from worker import reminding
from worker.certifications import (
    confirmations,
    pauses,
    reconciliation,
    transitions,
    visibility,
)
from worker.coordinator import alerts
from worker.portal import LINK, RECOVERABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import TextClause
    from sqlalchemy.ext.asyncio import AsyncEngine

    Connection = psycopg.Connection[dict[str, Any]]

pytestmark = pytest.mark.timeout(600)  # half a million rows are written first

WAITING = FUTURE = 250_000
EVERYTHING = WAITING + FUTURE
HISTORY = 500_000

WARM_UP = 12
"""Executions after which the server has decided between a generic and a custom plan."""

HLF = UUID("00000000-0000-4000-8000-000000000001")
BATCH = 8

CLAIM = store.claim_statement(LINK.sql)

FILL = f"""
INSERT INTO public.organizations (id, name) VALUES ('{HLF}', 'HLF');
INSERT INTO public.mentors (id, organization_id, full_name, dynamics_id)
SELECT gen_random_uuid(), '{HLF}', 'A mentor', gen_random_uuid()
  FROM generate_series(1, {WAITING + FUTURE});
INSERT INTO public.certifications (mentor_id, expires_on)
SELECT id, date '2099-12-31' FROM public.mentors;
INSERT INTO public.portal_visibility (mentor_id, organization_id, visible, version)
SELECT id, organization_id, false, 5 FROM public.mentors;
INSERT INTO public.portal_confirmations (mentor_id, organization_id, visible, version)
SELECT id, organization_id, false, 1 FROM public.mentors;
CREATE TEMPORARY TABLE numbered AS
SELECT id, organization_id, row_number() OVER () AS n FROM public.mentors;
INSERT INTO public.dynamics_sync_failures
       (organization_id, mentor_id, visible, version, error_code, error_message, retry_count,
        recoverable, resolved_at, resolution)
SELECT organization_id, id, false, 1, 'busy', 'Busy.', 3, true,
       CASE WHEN n % 50 <> 0 THEN now() END, CASE WHEN n % 50 <> 0 THEN 'delivered' END
  FROM numbered;
INSERT INTO outbox.events (destination, key, organization_id, version, payload, priority,
                           available_at)
SELECT 'dynamics', CAST(id AS text), organization_id, 5, '{{"visible": false}}', n % 2,
       now() + n * interval '1 ms'
             + CASE WHEN n <= {WAITING} THEN interval '-1 hour' ELSE interval '1 hour' END
  FROM numbered
 WHERE n % 50 <> 0;
INSERT INTO outbox.settled (event_id, destination, key, organization_id, version, payload,
                            outcome, attempts, created_at, settled_at)
SELECT n, 'dynamics', CAST(gen_random_uuid() AS text), '{HLF}', 1, '{{}}', 'delivered', 1, now(),
       now() - n * interval '1 minute'
  FROM generate_series(1, {HISTORY}) AS n;
INSERT INTO outbox.doubts (destination, key, version, until)
SELECT 'dynamics', CAST(gen_random_uuid() AS text), 1, now() + n * interval '1 second'
  FROM generate_series(1, {HISTORY}) AS n;
"""  # noqa: S608 (nothing from outside)

TABLES = """
outbox.events, outbox.settled, outbox.doubts, outbox.gates, public.mentors,
public.certifications, public.portal_visibility, public.portal_confirmations,
public.dynamics_sync_failures
"""

BIG = {
    "events",
    "settled",
    "doubts",
    "mentors",
    "certifications",
    "portal_visibility",
    "portal_confirmations",
    "dynamics_sync_failures",
}


@pytest.fixture(scope="module")
def full_database(server_url: str) -> Iterator[str]:
    """
    A database of its own with 500,000 mentors, of whom almost all have a live event.
    """
    with new_database(server_url) as url:
        with environment(DATABASE_URL=url):
            command.upgrade(alembic_config(), "head")
        with psycopg.connect(url, autocommit=True) as connection:
            # What refers to what is known here, and need not be looked up row by row.
            connection.execute("SET session_replication_role = replica")
            connection.execute(FILL)
            connection.execute(f"VACUUM (ANALYZE) {TABLES}")
        yield url


@pytest.fixture
def empty_database(server_url: str) -> Iterator[str]:
    """
    A database of its own, with our tables.
    """
    with new_database(server_url) as url:
        with environment(DATABASE_URL=url):
            command.upgrade(alembic_config(), "head")
        yield url


@pytest.fixture
def connection(full_database: str) -> Iterator[Connection]:
    """
    A connection that prepares every statement and commits each one: a rollback would drop what
    was prepared, and hide what happens in production.
    """
    with psycopg.connect(
        full_database,
        autocommit=True,
        row_factory=dict_row,
        prepare_threshold=0,
        cursor_factory=psycopg.ClientCursor,
    ) as connection:
        yield connection


# -------------------------------------------------------------------------- the statements


def mentors(connection: Connection, number: int, where: str = "true") -> list[UUID]:
    """
    Some mentors, others each time.
    """
    query = f"SELECT mentor_id FROM public.portal_visibility WHERE {where}"  # noqa: S608
    rows = connection.execute(
        f"{query} AND mentor_id > gen_random_uuid() ORDER BY mentor_id LIMIT {number}"
    ).fetchall()
    return [row["mentor_id"] for row in rows]


def claim_parameters(_: Connection) -> dict[str, Any]:
    """
    A claim as a relay asks for it.
    """
    return {
        "destination": "dynamics",
        "organization_id": HLF,
        "worker_id": uuid4(),
        "limit": BATCH,
        "lease_seconds": 3600.0,
        "slack_seconds": 1.0,
        "doubt_seconds": 150.0,
        "after_priority": store.START.priority,
        "after_available_at": store.START.available_at,
        "after_id": store.START.id,
    }


def enqueued(connection: Connection) -> dict[str, Any]:
    """
    A page of newer states.
    """
    rows = [
        {
            "destination": "dynamics",
            "key": str(mentor),
            "organization_id": str(HLF),
            "version": 6,
            "payload": {"visible": True},
            "priority": 1,
        }
        for mentor in mentors(connection, 100)
    ]
    return {"events": Jsonb(rows)}


def enqueued_alone(connection: Connection) -> dict[str, Any]:
    """
    One newer state.
    """
    row: dict[str, Any] = enqueued(connection)["events"].obj[0]
    return row | {"payload": Jsonb(row["payload"]), "traceparent": None}


def landed(connection: Connection) -> dict[str, Any]:
    """
    A batch of flights, just claimed, that were delivered or failed.
    """
    query, names = positional(CLAIM)
    parameters = claim_parameters(connection)
    flights = connection.execute(
        re.sub(r"\$\d+", "%s", query), [parameters[name] for name in in_order(query, names)]
    ).fetchall()
    return {
        "attempts": Jsonb(
            [
                {
                    "id": flight["id"],
                    "token": str(flight["claim_token"]),
                    "version": flight["version"],
                    "payload": flight["payload"],
                    "created_at": flight["created_at"].isoformat(),
                    "attempts": flight["attempts"],
                    "outcome": "delivered" if number % 2 else "retry",
                    "after_seconds": 60.0,
                    "code": "busy",
                }
                for number, flight in enumerate(flights)
            ]
        ),
    }


def doubted(connection: Connection) -> dict[str, Any]:
    """
    As many that no answer came about.
    """
    names = ("destination", "key", "version")
    rows = [{name: row[name] for name in names} for row in enqueued(connection)["events"].obj]
    return {"doubts": Jsonb(rows), "doubt_seconds": 150.0}


def still_held(connection: Connection) -> dict[str, Any]:
    """
    The same flights, asked for again.
    """
    return {"attempts": landed(connection)["attempts"]}


def where(_: Connection) -> dict[str, Any]:
    """
    HLF's gate.
    """
    return {"destination": "dynamics", "organization_id": HLF}


def delivered(connection: Connection) -> dict[str, Any]:
    """
    Confirmations of a batch.
    """
    rows = [
        {"mentor_id": str(mentor), "organization_id": str(HLF), "visible": False, "version": 5}
        for mentor in mentors(connection, BATCH)
    ]
    return {"delivered": Jsonb(rows)}


def dead(connection: Connection) -> dict[str, Any]:
    """
    Failures of a batch.
    """
    rows = [
        {
            "mentor_id": str(mentor),
            "organization_id": str(HLF),
            "visible": False,
            "version": 5,
            "error_code": "gone",
            "error_message": "Gone.",
            "retry_count": 0,
            "recoverable": False,
        }
        for mentor in mentors(connection, BATCH)
    ]
    return {"dead": Jsonb(rows)}


def progress(connection: Connection) -> dict[str, Any]:
    """
    One mentor, whom somebody waits for.
    """
    [mentor] = mentors(connection, 1)
    return {"mentor_id": mentor, "key": str(mentor), "version": 5}


def recoverable(connection: Connection) -> dict[str, Any]:
    """
    A page of a re-drive, from somewhere in the middle.
    """
    return {"organization_id": HLF, "after": UUID(int=0), "limit": 100}


def some_mentors(connection: Connection) -> dict[str, Any]:
    """
    A page of mentors.
    """
    ids = mentors(connection, 100)
    return {"mentor_ids": ids, "keys": [str(one) for one in ids], "failing": False}


def our_mentors(connection: Connection) -> dict[str, Any]:
    """
    A page of mentors of one organisation.
    """
    return {**some_mentors(connection), "organization_id": HLF}


def one_mentor(connection: Connection) -> dict[str, Any]:
    """
    One mentor.
    """
    return {"mentor_id": mentors(connection, 1)[0]}


def drifted(connection: Connection) -> dict[str, Any]:
    """
    A page of mentors who may have drifted.
    """
    return our_mentors(connection) | {"today": "2026-11-24", "page": 100}


def whole_table(_: Connection) -> dict[str, Any]:
    """
    The first page of a reconciliation, or a count of all.
    """
    return {
        "after": UUID(int=0),
        "today": "2026-11-24",
        "page": 1000,
        "most": 10_000,
        "organization_id": HLF,
    }


def run_out(connection: Connection) -> dict[str, Any]:
    """
    A page of a night on which everybody's certification has run out.
    """
    return {
        "today": "2100-01-01",
        "after_day": "2000-01-01",
        "after_mentor": mentors(connection, 1)[0],
        "page": 100,
        "organization_id": HLF,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Hot:
    """
    A statement that runs all the time.

    Args:
        indexes: it has to use these, each of them.
        blocks: it may touch so many pages at most, writes and their indexes included.
        rows: none of its steps may handle more, whatever the server believes. Where it is
            everything, at least nothing is read twice.
    """

    statement: TextClause
    parameters: Callable[[Connection], dict[str, Any]]
    indexes: set[str]
    blocks: int
    rows: int = 5000


HOT = {
    "enqueue": Hot(
        statement=store.ENQUEUE,
        parameters=enqueued,
        indexes={"events_one_live_per_key"},
        blocks=6000,
    ),
    "enqueue: what is new": Hot(
        statement=store.ENQUEUE_NEW,
        parameters=enqueued_alone,
        indexes={"events_one_live_per_key"},
        blocks=60,
    ),
    "claim": Hot(
        statement=CLAIM,
        parameters=claim_parameters,
        indexes={"events_claim_order", "mentors_pkey"},
        blocks=600,
        rows=EVERYTHING,
    ),
    "settle": Hot(
        statement=store.SETTLE,
        parameters=landed,
        indexes={"events_pkey", "doubts_pkey"},
        blocks=1000,
    ),
    "settle: doubts": Hot(
        statement=store.DOUBT, parameters=doubted, indexes={"doubts_pkey"}, blocks=2000
    ),
    "settle: what is busy": Hot(
        statement=store.STILL_HELD, parameters=still_held, indexes={"events_pkey"}, blocks=100
    ),
    "look": Hot(statement=gate.LOOK, parameters=where, indexes=set(), blocks=10),
    "confirm": Hot(
        statement=confirmations.CONFIRM,
        parameters=delivered,
        indexes={"portal_confirmations_pkey", "dynamics_sync_failures_one_open"},
        blocks=600,
    ),
    "fail": Hot(
        statement=confirmations.FAIL,
        parameters=dead,
        indexes={"dynamics_sync_failures_one_open"},
        blocks=600,
    ),
    "wait for the outcome": Hot(
        statement=confirmations.PROGRESS,
        parameters=progress,
        indexes={
            "portal_confirmations_pkey",
            "events_one_live_per_key",
            "dynamics_sync_failures_one_open",
        },
        blocks=60,
    ),
    "re-drive": Hot(
        statement=RECOVERABLE,
        parameters=recoverable,
        indexes={"dynamics_sync_failures_one_open", "events_one_live_per_key"},
        blocks=4000,
    ),
    "assert again: lock": Hot(
        statement=visibility.LOCK,
        parameters=our_mentors,
        indexes=set(),  # that of the key or that of the organisation
        blocks=1000,
    ),
    "assert again: versions": Hot(
        statement=visibility.RENEW_VERSIONS,
        parameters=some_mentors,
        indexes={"portal_visibility_pkey", "events_one_live_per_key"},
        blocks=2000,
        rows=EVERYTHING,
    ),
    "draw": Hot(
        statement=visibility.DRAW,
        parameters=some_mentors,
        indexes={"mentors_pkey", "portal_visibility_pkey"},
        blocks=4000,
    ),
    "expire a page": Hot(
        statement=transitions.EXPIRE_PAGE,
        parameters=run_out,
        indexes={"certifications_running_out", "mentors_pkey", "portal_visibility_pkey"},
        blocks=8000,
        rows=EVERYTHING,
    ),
    "decide": Hot(
        statement=visibility.DECIDE,
        parameters=lambda connection: {
            **some_mentors(connection),
            "today": "2026-11-24",
        },
        indexes={"certifications_by_mentor", "portal_visibility_pkey"},
        blocks=4000,
    ),
    "reconcile: lock": Hot(
        statement=visibility.LOCK_FREE,
        parameters=some_mentors,
        indexes={"portal_visibility_pkey"},
        blocks=1000,
    ),
    "reconcile: still astray": Hot(
        statement=reconciliation.STILL_ASTRAY,
        parameters=drifted,
        indexes={"certifications_by_mentor", "mentors_pkey", "portal_visibility_pkey"},
        blocks=4000,
    ),
    "reconcile: still unconfirmed": Hot(
        statement=reconciliation.STILL_UNCONFIRMED,
        parameters=drifted,
        indexes={"portal_confirmations_pkey", "events_one_live_per_key"},
        blocks=4000,
        rows=EVERYTHING,
    ),
    "reconcile: make": Hot(
        statement=visibility.MAKE_MISSING,
        parameters=some_mentors,
        indexes={"mentors_pkey", "portal_visibility_pkey"},
        blocks=4000,
    ),
    "reconcile: versions": Hot(
        statement=visibility.DRAW_ABOVE,
        parameters=some_mentors,
        indexes={"portal_visibility_pkey", "events_one_live_per_key", "settled_by_key"},
        blocks=6000,
    ),
    "reconcile: pause": Hot(
        statement=pauses.OPEN_MISSING,
        parameters=some_mentors,
        indexes={"certifications_by_mentor"},
        blocks=2000,
    ),
    "reconcile: resume": Hot(
        statement=pauses.LIFT_BASELESS, parameters=some_mentors, indexes=set(), blocks=2000
    ),
}


# ----------------------------------------------------------------------------- the explaining


def positional(statement: TextClause) -> tuple[str, list[str]]:
    """
    A statement with numbered parameters, and their names by number.
    """
    names: list[str] = []

    def number(match: re.Match[str]) -> str:
        if match[1] not in names:
            names.append(match[1])
        return f"${names.index(match[1]) + 1}"

    return re.sub(r"(?<!:):([a-z_]+)", number, str(statement)), names


def in_order(query: str, names: list[str]) -> list[str]:
    """
    The names as they occur in a statement with numbered parameters.
    """
    return [names[int(number) - 1] for number in re.findall(r"\$(\d+)", query)]


def explained(
    connection: Connection, hot: Hot, *, mode: str, warm_up: int = WARM_UP
) -> dict[str, Any]:
    """
    The plan that a long-lived connection runs a statement with, as measured while running it; as
    a role that row-level security binds, and which runs all of them.
    """
    query, names = positional(hot.statement)
    connection.execute("SET ROLE hlf_sync_cron")
    connection.execute(f"SET plan_cache_mode = {mode}")
    connection.execute("DEALLOCATE ALL")
    connection.execute(f"PREPARE hot AS {query}")

    def run(prefix: str) -> list[dict[str, Any]]:
        parameters = hot.parameters(connection)
        holes = ", ".join(["%s"] * len(names))
        return connection.execute(
            f"{prefix} EXECUTE hot ({holes})", [parameters[name] for name in names]
        ).fetchall()

    for _ in range(warm_up):
        run("EXPLAIN (ANALYZE, FORMAT JSON)")
    [row] = run("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON)")
    plan: dict[str, Any] = row["QUERY PLAN"][0]["Plan"]
    return plan


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """
    All nodes of a plan.
    """
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def blocks(plan: dict[str, Any]) -> int:
    """
    The pages that were touched, in memory or not.
    """
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


@pytest.mark.parametrize("mode", ["auto", "force_custom_plan"])
@pytest.mark.parametrize("name", HOT)
def test_a_hot_statement_stays_on_its_index(connection: Connection, name: str, mode: str) -> None:
    """
    With 250,000 events waiting and 250,000 more to come, no big table is read from end to end,
    and the work depends on the batch, not on the backlog; also when a long-lived connection
    has prepared the statement, and the server has chosen how to plan it from then on.
    """
    hot = HOT[name]

    plan = explained(connection, hot, mode=mode)

    read = {node["Relation Name"] for node in nodes(plan) if node["Node Type"].endswith("Seq Scan")}
    used = {node["Index Name"] for node in nodes(plan) if "Index Name" in node}
    used |= {one for node in nodes(plan) for one in node.get("Conflict Arbiter Indexes", [])}
    picture = json.dumps(plan, indent=1)
    assert not read & BIG, picture
    assert hot.indexes <= used, picture
    assert blocks(plan) <= hot.blocks, picture


# As after an analysis that met them while they were empty, or while what fills them was not yet
# committed.
BELIEVED_EMPTY = """
UPDATE pg_class SET reltuples = 0
 WHERE oid = ANY (ARRAY['outbox.events', 'outbox.settled', 'outbox.doubts', 'outbox.gates',
                        'public.certifications', 'public.mentor_pauses']::regclass[])
"""


@pytest.mark.parametrize("name", HOT)
def test_a_hot_statement_does_not_rely_on_what_the_server_believes(
    connection: Connection, name: str
) -> None:
    """
    Where the server believes that what comes and goes is never there, nothing is compared with
    everything else, and next to nothing reads a backlog.
    """
    hot = HOT[name]
    with connection.transaction(force_rollback=True):
        connection.execute(BELIEVED_EMPTY)
        connection.execute("SET LOCAL statement_timeout = '5s'")
        plan = explained(connection, hot, mode="force_custom_plan", warm_up=0)

    most = max(map(handled, nodes(plan)))
    assert most <= hot.rows, json.dumps(plan, indent=1)


NOTHING_LANDED = {"attempts": Jsonb([])}


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("claim", None),
        ("settle", NOTHING_LANDED),
        ("settle: what is busy", NOTHING_LANDED),
    ],
)
def test_a_plan_that_was_kept_since_the_queue_was_empty_serves_a_backlog(
    empty_database: str, name: str, before: dict[str, Any] | None
) -> None:
    """
    As long as nobody has analysed the table, a relay's connection goes on with what it planned
    when there was one page; that reads no backlog either.
    """
    hot = HOT[name]
    query, names = positional(hot.statement)
    holes = ", ".join(["%s"] * len(names))
    with psycopg.connect(
        empty_database, autocommit=True, row_factory=dict_row, cursor_factory=psycopg.ClientCursor
    ) as connection:
        connection.execute("ALTER TABLE outbox.events SET (autovacuum_enabled = off)")
        connection.execute(BACKLOG.format(destination="somewhere else", number=5))
        connection.execute("VACUUM ANALYZE outbox.events")
        connection.execute("SET enable_seqscan = off")  # as `database.connect` does for relays
        connection.execute("SET plan_cache_mode = force_generic_plan")
        connection.execute(f"PREPARE kept AS {query}")
        given = before or hot.parameters(connection)
        connection.execute(f"EXECUTE kept ({holes})", [given[one] for one in names])
        connection.execute(BACKLOG.format(destination="dynamics", number=20_000))

        given = hot.parameters(connection)
        [row] = connection.execute(
            f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE kept ({holes})", [given[one] for one in names]
        ).fetchall()

    plan = row["QUERY PLAN"][0]["Plan"]
    assert max(map(handled, nodes(plan))) <= 1000, json.dumps(plan, indent=1)


BACKLOG = f"""
INSERT INTO outbox.events (destination, key, organization_id, version, payload)
SELECT '{{destination}}', CAST(gen_random_uuid() AS text), '{HLF}', 1, '{{{{"visible": false}}}}'
  FROM generate_series(1, {{number}})
"""  # noqa: S608 (nothing from outside)


def handled(node: dict[str, Any]) -> int:
    """
    How many rows a node of a plan had in its hands.
    """
    thrown = [key for key in node if key.startswith("Rows Removed by")]
    each = node["Actual Rows"] + sum(node[key] for key in thrown)
    return int(each * node["Actual Loops"])


def test_a_claim_reads_no_more_rows_than_it_takes(connection: Connection) -> None:
    """
    The order comes from the index: nothing is sorted and nothing is read to be thrown away.
    """
    plan = explained(connection, HOT["claim"], mode="auto")

    [scan] = [node for node in nodes(plan) if node.get("Index Name") == "events_claim_order"]
    assert scan["Actual Rows"] <= BATCH
    assert scan.get("Rows Removed by Filter", 0) == 0
    assert "Sort" not in {node["Node Type"] for node in nodes(plan)}


def test_a_claim_that_goes_on_reads_nothing_of_what_is_behind_it(connection: Connection) -> None:
    """
    Its place is part of the index condition: with 10,000 events before it, it touches no more
    pages than one from the start.
    """
    row = connection.execute(
        "SELECT priority, available_at, id FROM outbox.events WHERE priority = 1"
        " AND available_at <= now() ORDER BY priority, available_at, id OFFSET 1000 LIMIT 1"
    ).fetchone()
    assert row is not None
    place = {f"after_{name}": value for name, value in row.items()}

    def parameters(connection: Connection) -> dict[str, Any]:
        return claim_parameters(connection) | place

    hot = replace(HOT["claim"], parameters=parameters)
    plan = explained(connection, hot, mode="auto")

    [scan] = [node for node in nodes(plan) if node.get("Index Name") == "events_claim_order"]
    assert "ROW(priority, available_at, id) > ROW(" in scan["Index Cond"]
    assert scan["Actual Rows"] <= BATCH
    assert blocks(plan) <= hot.blocks


SUDDENLY_EXPIRED = """
WITH expired AS (
    UPDATE public.certifications SET status = 'expired', expired_at = now()
     WHERE id IN (SELECT id FROM public.certifications WHERE status = 'valid' LIMIT 3000)
 RETURNING id, mentor_id
)
INSERT INTO public.mentor_pauses (mentor_id, certification_id, reason)
SELECT mentor_id, id, 'certification_expired' FROM expired
"""


@pytest.mark.parametrize("meanwhile", [SUDDENLY_EXPIRED, BELIEVED_EMPTY], ids=["sudden", "empty"])
@pytest.mark.parametrize(
    "statement",
    [reconciliation.ASTRAY, reconciliation.UNCONFIRMED, alerts.STATUS, alerts.UNACCOUNTED],
    ids=["astray", "unconfirmed", "status", "unaccounted"],
)
def test_a_look_at_everybody_reads_nothing_twice(
    connection: Connection, statement: TextClause, meanwhile: str
) -> None:
    """
    One statement, and none of its steps handles more rows than there are mentors and events; also
    when so many have just expired that the server's statistics know nothing of it, or when it
    believes that what comes and goes is never there.
    """
    hot = Hot(statement=statement, parameters=whole_table, indexes=set(), blocks=0)
    with connection.transaction(force_rollback=True):
        connection.execute(meanwhile)
        connection.execute("SET LOCAL statement_timeout = '10s'")
        plan = explained(connection, hot, mode="force_custom_plan", warm_up=0)

    assert max(map(handled, nodes(plan))) <= 2 * EVERYTHING, json.dumps(plan, indent=1)


IN_TROUBLE = f"""
INSERT INTO public.organizations (id, name) VALUES ('{HLF}', 'HLF');
INSERT INTO public.mentors (id, organization_id, full_name)
SELECT gen_random_uuid(), '{HLF}', 'A mentor' FROM generate_series(1, 2000);
INSERT INTO public.certifications (mentor_id, expires_on)
SELECT id, date '2099-12-31' FROM public.mentors;
INSERT INTO public.portal_visibility (mentor_id, organization_id, visible, version)
SELECT id, organization_id, true, 2 FROM public.mentors;
INSERT INTO public.portal_confirmations (mentor_id, organization_id, visible, version)
SELECT id, organization_id, false, 1 FROM public.mentors;
INSERT INTO public.dynamics_sync_failures
       (organization_id, mentor_id, visible, version, error_code, error_message, retry_count,
        recoverable)
SELECT organization_id, id, true, 2, 'busy', 'Busy.', 3, true FROM public.mentors;
INSERT INTO outbox.events (destination, key, organization_id, version, payload)
SELECT 'dynamics', CAST(id AS text), organization_id, 2, '{{"visible": true}}' FROM public.mentors;
INSERT INTO outbox.settled (event_id, destination, key, organization_id, version, payload,
                            outcome, attempts, error_code, created_at)
SELECT 1, 'reminders', CAST(id AS text), '{HLF}', 1, jsonb_build_object('expires_on', expires_on),
       'dead', 10, 'webhook_unreachable', now()
  FROM public.certifications;
"""  # noqa: S608 (nothing from outside)

# What is adopted was there before, and was analysed long ago.
ALL_BELIEVED_EMPTY = """
UPDATE pg_class SET reltuples = 0
 WHERE relkind = 'r' AND relnamespace IN ('public'::regnamespace, 'outbox'::regnamespace)
   AND relname <> 'mentors'
"""


def all_in_trouble(_: Connection) -> dict[str, Any]:
    """
    Everybody, and every reminder that was given up lately.
    """
    return {
        "organization_id": HLF,
        "days": 7,
        "final": [],
        "after": 0,
        "timezone": "UTC",
        "limit": 2000,
    }


@pytest.mark.parametrize(
    "statement",
    [alerts.STATUS, alerts.REMINDERS, reminding.RECOVERABLE],
    ids=["status", "reminders", "re-drive reminders"],
)
def test_in_trouble_nothing_is_compared_with_everything(
    empty_database: str, statement: TextClause
) -> None:
    """
    When thousands wait, failed or were given up, and the server believes that nobody did.
    """
    hot = Hot(statement=statement, parameters=all_in_trouble, indexes=set(), blocks=0)
    with psycopg.connect(
        empty_database, autocommit=True, row_factory=dict_row, cursor_factory=psycopg.ClientCursor
    ) as connection:
        connection.execute(IN_TROUBLE)
        connection.execute(f"VACUUM {TABLES}")
        connection.execute(ALL_BELIEVED_EMPTY)
        plan = explained(connection, hot, mode="force_custom_plan", warm_up=0)

    assert max(map(handled, nodes(plan))) <= hot.rows, json.dumps(plan, indent=1)


async def test_a_hot_key_is_one_row_however_often_it_changes(
    engine: AsyncEngine, database_url: str
) -> None:
    """
    Twenty thousand changes of mind about one key, each in a transaction of its own, leave one
    event, which is claimed like any other and says how many it replaced.
    """
    outbox = Outbox(engine)
    new = json.dumps([asdict(outbox.new("hot", 1))], default=str)
    event = f"jsonb_set(CAST('{new}' AS jsonb), '{{0,version}}', to_jsonb(turn))"
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("SET synchronous_commit = off")
        connection.execute(
            "DO $$ BEGIN FOR turn IN 1..20000 LOOP "
            + str(store.ENQUEUE).replace(":events", event)
            + "; COMMIT; END LOOP; END $$"
        )

    [claimed] = await outbox.claim()

    assert claimed.version == 20_000
    [row] = await outbox.rows("SELECT count(*), max(replaced) FROM outbox.events")
    assert tuple(row) == (1, 19_999)
    [row] = await outbox.rows("SELECT pg_relation_size('outbox.events') AS bytes")
    # Half of what 20,000 versions need if the room of old ones is not used again; other
    # tests leave dead rows here too.
    assert row.bytes < 2_500_000
