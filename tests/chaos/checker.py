"""
The checker: what the database, its journal and Dynamics' ledger say about one run.

It looks for violations of each invariant (`invariants`), compares producers' notes with what
was committed, reads the logs, and counts Jepsen's four numbers.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from tests.chaos.invariants import INVARIANTS, Invariant

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import psycopg

    from tests.chaos.producer import Note

NO_SURPRISE = "no surprise in the logs"

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

# Of one version; what was settled twice was said again on purpose, because of a doubt.
EXTRA = """
SELECT version.key, count(*) - greatest(1, (
           SELECT count(*) FROM outbox.settled AS settled
            WHERE settled.key = version.key AND settled.version = version.version
              AND settled.outcome = 'delivered')) AS extra
  FROM chaos.requests AS request JOIN chaos.versions AS version USING (correlation_id)
 WHERE request.applied
 GROUP BY version.key, version.version
"""

# While a gate is closed nobody is to take over.
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
                      AND gate.at < later.at AND gate.until > earlier.until
                      AND NOT EXISTS (SELECT FROM chaos.journal AS opened
                                       WHERE opened.what = 'opened' AND opened.seq > gate.seq
                                         AND opened.at <= earlier.until))
"""

PRODUCED = """
SELECT who, key, count(DISTINCT xid) FROM chaos.journal
 WHERE what IN ('expired', 'renewed') AND who LIKE 'produce-%'
 GROUP BY who, key
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
    figures: Counter[str] = field(default_factory=Counter)
    taken_over: list[float] = field(default_factory=list)
    extra: dict[str, int] = field(default_factory=dict)
    timeline: list[str] = field(default_factory=list)

    def violate(self, name: str, *evidence: str) -> None:
        """
        Note what contradicts an invariant.
        """
        self.violations.setdefault(name, []).extend(evidence)


def check(
    connection: psycopg.Connection[Any],
    *,
    notes: Sequence[tuple[str, Note]],
    outputs: Sequence[Path],
    canary: str,
    lease_seconds: float,
) -> Findings:
    """
    Compare everything; the evidence has been presented, and nothing runs any more.

    Args:
        lease_seconds: of every process that is judged.
    """
    connection.execute("SELECT set_config('chaos.lease', %s, false)", (str(lease_seconds),))
    findings = Findings()
    for invariant in INVARIANTS:
        _look(connection, invariant, findings)
    _count(connection, findings)
    _compare_producers(connection, notes, findings)
    _search_for_secrets(connection, outputs, canary, findings)
    _read_outputs(outputs, findings)
    findings.lost = len({line.split()[0] for line in findings.violations.get("S3", [])})
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
        if extra > 0:
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
    findings.checked.append("S1 (COMMIT)")
    committed = {
        (who, key): number
        for who, key, number in connection.execute(cast("Any", PRODUCED)).fetchall()
    }
    operations: dict[tuple[str, int], Note] = {}
    for who, note in notes:
        operations[who, note.number] = note  # the last word about it
    told: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for (who, _), note in operations.items():
        unknown = note.state == "began" or note.error == "CommitUnknownError"
        told[who, note.mentor]["unknown" if unknown else note.state] += 1
    for who, mentor in committed.keys() | told.keys():
        states = told[who, mentor]
        found = committed.get((who, mentor), 0) - states["saved"]
        findings.recovered += max(0, found)
        if found < 0:
            findings.violate("S3", f"{mentor} {who}: {-found} acknowledged, not committed")
        if found > states["unknown"]:
            findings.violate("S1 (COMMIT)", f"{mentor} {who}: failed or unheard of, yet committed")
    everything = sum(told.values(), Counter[str]())
    findings.figures["operations"] = len(operations)
    findings.figures["unknown"] = everything["unknown"]
    findings.figures["refused"] = everything["failed"]


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
    findings.checked.append(NO_SURPRISE)
    for path in outputs:
        for line in path.read_text(errors="replace").splitlines():
            fields = _fields_of(line)
            findings.figures["claims_lost"] += fields.get("event") == "outbox.claim_lost"
            if _surprises(line, fields):
                findings.violate(NO_SURPRISE, f"{path.name}: {line[:300]}")


def _surprises(line: str, fields: Mapping[str, object]) -> bool:
    """
    An error, a trace, a warning of Python's, or an attempt that failed of a bug: its code is
    then the name of an exception.
    """
    if fields.get("level") in {"error", "critical"} or fields.get("logger") == "py.warnings":
        return True
    if fields.get("event") == "outbox.attempt_failed":
        return str(fields.get("code"))[:1].isupper()
    return not fields and ("Traceback" in line or "Warning:" in line)


def _fields_of(line: str) -> Mapping[str, object]:
    try:
        fields = json.loads(line)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}
