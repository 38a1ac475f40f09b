"""
The checker: what the database, its journal and Dynamics' ledger say about one run.

Each invariant is a query for its violations, over evidence that no worker can influence:
rows, the journal (`journal`), and the requests that arrived. Names are those of the
project's list: S for safety, L for liveness. Jepsen's four numbers stand beside them.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import psycopg

    from tests.chaos.producer import Note

MAX_ATTEMPTS = 4
WINDOW_SECONDS = 15.0
LEASE_SECONDS = 2.0
"""Of every process that is checked. What a row says of its lease is not believed."""

CLOCK_SLACK_SECONDS = 0.25
"""Between a commit and its being seen; all clocks are of one machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Invariant:
    """
    A claim, and a query that selects what contradicts it.
    """

    name: str
    claim: str
    violations: str


INVARIANTS = (
    Invariant(
        name="S1",
        claim="certification, pause, version and event are committed together or not at all",
        violations="""
            SELECT change.what, change.key, change.xid::text FROM chaos.journal AS change
             WHERE change.what IN ('expired', 'renewed')
               AND NOT (EXISTS (SELECT FROM chaos.journal AS other WHERE other.xid = change.xid
                                   AND other.key = change.key AND other.what = 'wanted')
                    AND EXISTS (SELECT FROM chaos.journal AS other WHERE other.xid = change.xid
                                   AND other.key = change.key AND other.what = 'enqueued')
                    AND (change.what = 'renewed'
                         OR EXISTS (SELECT FROM chaos.journal AS other
                                     WHERE other.xid = change.xid AND other.key = change.key
                                       AND other.what = 'paused')))
             UNION ALL
            SELECT 'pause', certification.mentor_id::text, certification.status
              FROM public.certifications AS certification
             WHERE EXISTS (SELECT FROM public.mentor_pauses AS pause
                            WHERE pause.certification_id = certification.id
                              AND pause.resumed_at IS NULL) <> (certification.status = 'expired')
             UNION ALL
            SELECT 'visibility', desired.mentor_id::text, desired.visible::text
              FROM public.portal_visibility AS desired
             WHERE desired.visible <> NOT EXISTS (
                   SELECT FROM public.certifications AS certification
                    WHERE certification.mentor_id = desired.mentor_id
                      AND certification.status = 'expired')
        """,
    ),
    Invariant(
        name="S2",
        claim="every request is about a committed version, and carries its value",
        violations="""
            SELECT request.seq, request.row_id, request.correlation_id
              FROM chaos.requests AS request
              LEFT JOIN chaos.versions AS version USING (correlation_id)
              LEFT JOIN public.mentors AS mentor ON CAST(mentor.id AS text) = version.key
             WHERE version.key IS NULL
                OR version.visible IS DISTINCT FROM request.visible
                OR request.row_id IS DISTINCT FROM CAST(mentor.dynamics_id AS text)
        """,
    ),
    Invariant(
        name="S3",
        claim="nothing is lost: each version ended, or a later one of its mentor did",
        violations="""
            SELECT key, max(version) FROM chaos.journal AS enqueued
             WHERE what = 'enqueued'
             GROUP BY key
            HAVING max(version) > coalesce((SELECT max(settled.version)
                                              FROM outbox.settled AS settled
                                             WHERE settled.key = enqueued.key), 0)
             UNION ALL
            SELECT acknowledged.key, acknowledged.version FROM chaos.acknowledged
             WHERE NOT EXISTS (SELECT FROM chaos.journal AS enqueued
                                WHERE enqueued.what = 'enqueued'
                                  AND enqueued.key = acknowledged.key
                                  AND enqueued.version = acknowledged.version)
             UNION ALL
            SELECT key, version FROM (
                   SELECT DISTINCT ON (key) key, version, outcome FROM outbox.settled
                    ORDER BY key, id DESC) AS newest
             WHERE newest.outcome = 'dead'
               AND NOT EXISTS (SELECT FROM public.dynamics_sync_failures AS failure
                                WHERE CAST(failure.mentor_id AS text) = newest.key
                                  AND failure.resolved_at IS NULL)
        """,
    ),
    Invariant(
        name="S4",
        claim="no version is both waiting and failed, and no mentor has two open failures",
        violations="""
            SELECT live.key, live.version FROM outbox.events AS live
              JOIN public.dynamics_sync_failures AS failure
                ON CAST(failure.mentor_id AS text) = live.key AND failure.resolved_at IS NULL
             WHERE failure.version >= live.version
             UNION ALL
            SELECT CAST(mentor_id AS text), count(*) FROM public.dynamics_sync_failures
             WHERE resolved_at IS NULL GROUP BY mentor_id HAVING count(*) > 1
        """,
    ),
    Invariant(
        name="S5",
        claim="what ended had been enqueued, and what was enqueued is alive or has ended",
        violations="""
            SELECT settled.key, settled.version FROM outbox.settled AS settled
             WHERE NOT EXISTS (SELECT FROM chaos.journal AS enqueued
                                WHERE enqueued.what = 'enqueued' AND enqueued.key = settled.key
                                  AND enqueued.version = settled.version)
             UNION ALL
            SELECT gone.key, gone.version FROM chaos.journal AS gone
             WHERE gone.what = 'gone'
               AND NOT EXISTS (SELECT FROM chaos.journal AS settled
                                WHERE settled.what = 'settled' AND settled.xid = gone.xid
                                  AND settled.key = gone.key AND settled.version = gone.version)
        """,
    ),
    Invariant(
        name="S6",
        claim="at any moment at most one process holds an event",
        violations=f"""
            SELECT later.key, later.version, later.token FROM chaos.journal AS later
              JOIN chaos.journal AS earlier
                ON earlier.what = 'claimed' AND earlier.event_id = later.event_id
               AND earlier.seq < later.seq
               AND earlier.began + make_interval(secs => {LEASE_SECONDS}) > later.began
             WHERE later.what = 'claimed'
               AND NOT EXISTS (SELECT FROM chaos.journal AS over
                                WHERE over.what IN ('released', 'gone')
                                  AND over.token = earlier.token AND over.seq < later.seq)
        """,  # noqa: S608 (a constant)
    ),
    Invariant(
        name="S7",
        claim="whoever lost a claim changes nothing: only its holder settles an event",
        violations="""
            SELECT over.key, over.version, claim.who, over.who FROM chaos.journal AS over
              JOIN chaos.journal AS claim ON claim.what = 'claimed' AND claim.token = over.token
             WHERE over.what IN ('released', 'gone')
               AND (over.who <> claim.who
                    OR EXISTS (SELECT FROM chaos.journal AS next
                                WHERE next.what = 'claimed' AND next.event_id = claim.event_id
                                  AND next.seq > claim.seq AND next.seq < over.seq))
             UNION ALL
            SELECT key, version, who, what FROM chaos.journal
             WHERE what IN ('released', 'gone') AND token IS NULL
        """,
    ),
    Invariant(
        name="S8",
        claim="attempts are counted before the call, and there is an end to them",
        violations=f"""
            SELECT version.key, version.version, count(*)
              FROM chaos.requests AS request JOIN chaos.versions AS version USING (correlation_id)
             WHERE request.status IS DISTINCT FROM 401
             GROUP BY version.key, version.version
            HAVING count(*) > (SELECT count(*) FROM chaos.journal AS claim
                                WHERE claim.what = 'claimed' AND claim.key = version.key
                                  AND claim.version = version.version
                                  AND claim.attempts <= {MAX_ATTEMPTS})
        """,  # noqa: S608 (a constant)
    ),
    Invariant(
        name="S9",
        claim="from the first attempt to the last start it is 15 s at most",
        violations=f"""
            SELECT key, version, at - first_attempt_at FROM chaos.journal
             WHERE what = 'claimed'
               AND at - first_attempt_at > make_interval(secs => {WINDOW_SECONDS})
        """,  # noqa: S608 (a constant)
    ),
    Invariant(
        name="S10",
        claim="while the gate is closed nobody claims, but the one probe",
        violations=f"""
            SELECT claim.key, claim.version, gate.detail FROM chaos.journal AS claim
              JOIN LATERAL (SELECT * FROM chaos.journal AS gate
                             WHERE gate.what IN ('closed', 'opened', 'probe')
                               AND gate.at < claim.began
                                   - make_interval(secs => {CLOCK_SLACK_SECONDS})
                             ORDER BY gate.seq DESC LIMIT 1) AS gate ON true
             WHERE claim.what = 'claimed'
               AND gate.what IN ('closed', 'probe') AND gate.until > claim.at
               -- Opened meanwhile, or this is the probe.
               AND NOT EXISTS (SELECT FROM chaos.journal AS other
                                WHERE other.what IN ('opened', 'probe')
                                  AND other.seq > gate.seq AND other.began <= claim.at)
        """,  # noqa: S608 (a constant)
    ),
    Invariant(
        name="S12",
        claim="at rest the portal shows what the database says, but where a failure is open",
        violations="""
            SELECT desired.mentor_id, desired.visible, portal.visible
              FROM public.portal_visibility AS desired
              JOIN public.mentors AS mentor ON mentor.id = desired.mentor_id
              LEFT JOIN chaos.portal AS portal
                ON portal.row_id = CAST(mentor.dynamics_id AS text)
             WHERE portal.visible IS DISTINCT FROM desired.visible
               AND NOT EXISTS (SELECT FROM public.dynamics_sync_failures AS failure
                                WHERE failure.mentor_id = desired.mentor_id
                                  AND failure.resolved_at IS NULL)
        """,
    ),
    Invariant(
        name="S15",
        claim="what is called confirmed was said, and never something older afterwards",
        violations="""
            SELECT confirmed.mentor_id, confirmed.version, confirmed.visible
              FROM public.portal_confirmations AS confirmed
             WHERE NOT EXISTS (SELECT FROM chaos.requests AS request
                                 JOIN chaos.versions AS version USING (correlation_id)
                                WHERE version.key = CAST(confirmed.mentor_id AS text)
                                  AND version.version = confirmed.version
                                  AND request.applied)
             UNION ALL
            SELECT CAST(later.key AS uuid), later.version, later.visible
              FROM chaos.journal AS later JOIN chaos.journal AS earlier
                ON earlier.what = 'confirmed' AND earlier.key = later.key
               AND earlier.seq < later.seq AND earlier.version > later.version
             WHERE later.what = 'confirmed'
        """,
    ),
    Invariant(
        name="S16",
        claim="a row is updated, never created",
        violations="SELECT seq, row_id FROM chaos.requests WHERE created",
    ),
    Invariant(
        name="S23",
        claim="an event is claimed, then released or gone; history is only written once",
        violations="""
            SELECT key, version, what FROM chaos.journal WHERE what = 'rewritten'
             UNION ALL
            SELECT over.key, over.version, over.what FROM chaos.journal AS over
             WHERE over.what IN ('released', 'gone')
               AND NOT EXISTS (SELECT FROM chaos.journal AS claim
                                WHERE claim.what = 'claimed' AND claim.token = over.token
                                  AND claim.seq < over.seq)
        """,
    ),
)

TALLY = """
SELECT (SELECT count(*) FROM chaos.journal WHERE what = 'enqueued') AS versions,
       (SELECT count(*) FROM chaos.requests) AS requests,
       (SELECT count(*) FROM chaos.journal
         WHERE what = 'claimed' AND detail = 'abandoned') AS claims_died,
       (SELECT count(*) FROM public.dynamics_sync_failures WHERE resolved_at IS NULL)
           AS open_failures,
       (SELECT count(*) FROM outbox.settled WHERE outcome = 'dead') AS dead,
       (SELECT count(*) FROM outbox.events) AS alive
"""

# Of one version; a retry after an answer that said "no" is no duplicate.
EXTRA = """
SELECT version.key, count(*) - 1 AS extra
  FROM chaos.requests AS request JOIN chaos.versions AS version USING (correlation_id)
 WHERE request.applied
 GROUP BY version.key, version.version HAVING count(*) > 1
"""

# While a gate was closed nobody was to take over.
TAKEN_OVER = """
SELECT extract(epoch FROM later.at - earlier.until) AS seconds
  FROM chaos.journal AS later JOIN LATERAL (
       SELECT * FROM chaos.journal AS earlier
        WHERE earlier.what = 'claimed' AND earlier.event_id = later.event_id
          AND earlier.seq < later.seq
        ORDER BY earlier.seq DESC LIMIT 1) AS earlier ON true
 WHERE later.what = 'claimed' AND later.detail = 'abandoned'
   AND NOT EXISTS (SELECT FROM chaos.journal AS gate
                    WHERE gate.what IN ('closed', 'probe')
                      AND gate.at < later.at AND gate.until > earlier.until)
"""

PRODUCED = """
SELECT who, count(DISTINCT xid) FROM chaos.journal
 WHERE what IN ('expired', 'renewed') AND who LIKE 'produce-%'
 GROUP BY who
"""

TIMELINE = """
SELECT at, who, what, version, visible, attempts, token, until, detail
  FROM chaos.journal WHERE key = %s ORDER BY seq LIMIT 100
"""

UUIDS = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

TABLES = """
SELECT table_schema, table_name FROM information_schema.tables
 WHERE table_schema IN ('public', 'outbox', 'chaos') AND table_type = 'BASE TABLE'
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loose:
    """
    What a scenario's own faults allow.

    Args:
        invariants: names that cannot hold in it, each with the reason.
    """

    invariants: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Findings:
    """
    What came out.

    Args:
        lost, unexpected, duplicated, recovered: Jepsen's numbers: acknowledged and gone;
            arrived and never committed; the same version applied again; outcome unknown to
            its caller, or claim of a dead worker, and found done.
        violations: by invariant, a few of what contradicts it.
        checked: invariants that were looked at.
        loose: invariants that were not, and why.
        figures: everything else that was counted.
        taken_over: seconds from the end of a dead claim's lease to the next claim.
        extra: by mentor, how often the same version was applied again.
        timeline: the journal of a mentor about whom something is wrong.
    """

    lost: int = 0
    unexpected: int = 0
    duplicated: int = 0
    recovered: int = 0
    violations: dict[str, list[str]] = field(default_factory=dict)
    checked: list[str] = field(default_factory=list)
    loose: dict[str, str] = field(default_factory=dict)
    figures: Counter[str] = field(default_factory=Counter)
    taken_over: list[float] = field(default_factory=list)
    extra: dict[str, int] = field(default_factory=dict)
    timeline: list[str] = field(default_factory=list)

    def violate(self, name: str, *evidence: str) -> None:
        """
        Note what contradicts an invariant.
        """
        self.violations.setdefault(name, []).extend(evidence[:5])


def check(
    connection: psycopg.Connection[Any],
    *,
    notes: Sequence[tuple[str, Note]],
    outputs: Sequence[Path],
    canary: str,
    loose: Loose,
) -> Findings:
    """
    Compare everything; the evidence has been presented, and nothing runs any more.
    """
    findings = Findings(loose=dict(loose.invariants))
    for invariant in INVARIANTS:
        if invariant.name not in loose.invariants:
            _look(connection, invariant, findings)
    _count(connection, findings)
    _compare_producers(connection, notes, findings)
    _search_for_secrets(connection, outputs, canary, findings)
    _read_outputs(outputs, findings)
    findings.lost += len(findings.violations.get("S3", []))
    findings.unexpected = len(findings.violations.get("S2", []))
    findings.timeline = _timeline(connection, findings)
    return findings


def _timeline(connection: psycopg.Connection[Any], findings: Findings) -> list[str]:
    """
    What happened to the first mentor about whom something is wrong.
    """
    evidence = " ".join(line for lines in findings.violations.values() for line in lines)
    if (found := UUIDS.search(evidence)) is None:
        return []
    rows = connection.execute(cast("Any", TIMELINE), (found[0],)).fetchall()
    return [" ".join(str(value) for value in row if value is not None) for row in rows]


def _look(connection: psycopg.Connection[Any], invariant: Invariant, findings: Findings) -> None:
    rows = connection.execute(cast("Any", invariant.violations)).fetchall()
    findings.checked.append(invariant.name)
    if rows:
        findings.violate(invariant.name, *(" ".join(map(str, row)) for row in rows))


def _count(connection: psycopg.Connection[Any], findings: Findings) -> None:
    cursor = connection.execute(cast("Any", TALLY))
    assert cursor.description is not None
    row = cursor.fetchone()
    assert row is not None
    findings.figures.update(
        {column.name: value for column, value in zip(cursor.description, row, strict=True)}
    )
    for key, extra in connection.execute(cast("Any", EXTRA)):
        findings.extra[key] = findings.extra.get(key, 0) + extra
    findings.duplicated = sum(findings.extra.values())
    findings.taken_over = [
        float(seconds) for (seconds,) in connection.execute(cast("Any", TAKEN_OVER))
    ]
    findings.recovered = findings.figures["claims_died"]


def _compare_producers(
    connection: psycopg.Connection[Any], notes: Sequence[tuple[str, Note]], findings: Findings
) -> None:
    """
    What a producer was told is saved is saved, what failed is not, and the rest is known now.
    """
    committed: dict[str, int] = dict(connection.execute(cast("Any", PRODUCED)).fetchall())
    states: dict[str, dict[int, Note]] = defaultdict(dict)
    for who, note in notes:
        states[who][note.number] = note  # the last word about an operation
    findings.checked.append("S1 (COMMIT)")
    for who, operations in states.items():
        last = Counter(note.state for note in operations.values())
        unknown = last["began"] + sum(
            note.error == "CommitUnknownError" for note in operations.values()
        )
        found = committed.get(who, 0) - last["saved"]
        findings.figures["operations"] += len(operations)
        findings.figures["unknown"] += unknown
        findings.figures["refused"] += last["failed"]
        findings.recovered += max(0, found)
        if found < 0:
            findings.lost -= found
            findings.violate("S3", f"{who}: {-found} acknowledged, not committed")
        if found > unknown:
            findings.violate("S1 (COMMIT)", f"{who}: {found - unknown} failed, yet committed")


def _search_for_secrets(
    connection: psycopg.Connection[Any],
    outputs: Sequence[Path],
    canary: str,
    findings: Findings,
) -> None:
    findings.checked.append("S22")
    for path in outputs:
        if canary in path.read_text(errors="replace"):
            findings.violate("S22", f"secret in {path.name}")
    for schema, table in connection.execute(cast("Any", TABLES)).fetchall():
        query = f'SELECT count(*) FROM "{schema}"."{table}" AS r WHERE CAST(r AS text) LIKE %s'  # noqa: S608
        row = connection.execute(cast("Any", query), (f"%{canary}%",)).fetchone()
        if row and row[0]:
            findings.violate("S22", f"secret in {schema}.{table}")


def _read_outputs(outputs: Sequence[Path], findings: Findings) -> None:
    """
    What the processes logged: claims lost, and anything that was nobody's plan.
    """
    findings.checked.append("no surprise in the logs")
    for path in outputs:
        for line in path.read_text(errors="replace").splitlines():
            event = _event_of(line)
            if event == "outbox.claim_lost":
                findings.figures["claims_lost"] += 1
            elif (
                event in {"outbox.settle_failed", "outbox.redrive_failed"}
                or "Traceback" in line
                or "Warning:" in line
            ):
                findings.violate("no surprise in the logs", f"{path.name}: {line[:300]}")


def _event_of(line: str) -> str:
    try:
        fields = json.loads(line)
    except ValueError:
        return ""
    return str(fields.get("event", "")) if isinstance(fields, dict) else ""
