"""
The journal: triggers that note, in the transaction itself, who did what to which row.

It is the witness that neither the workers nor their memory of things can influence: what
was committed is in it, what was rolled back is not. `who` is the session's own setting
`chaos.who`, so a claim that was written by one process and settled by another shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, uuid5

from psycopg.types.json import Jsonb

if TYPE_CHECKING:
    from collections.abc import Iterable

    import psycopg

    from worker.dynamics.sandbox import Entry

INSTALL = """
CREATE SCHEMA chaos;

CREATE TABLE chaos.journal (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    began timestamptz NOT NULL DEFAULT now(),
    xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    who text DEFAULT nullif(current_setting('chaos.who', true), ''),
    what text NOT NULL,
    key text NOT NULL,
    version bigint,
    visible boolean,
    event_id bigint,
    token uuid,
    attempts integer,
    until timestamptz,
    first_attempt_at timestamptz,
    detail text
);
CREATE INDEX ON chaos.journal (what, key, version);
CREATE INDEX ON chaos.journal (token);
CREATE INDEX ON chaos.journal (xid);

CREATE FUNCTION chaos.note_event() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' OR TG_OP = 'UPDATE' AND new.version <> old.version THEN
        INSERT INTO chaos.journal (what, key, version, visible, event_id)
        VALUES ('enqueued', new.key, new.version, (new.payload ->> 'visible')::boolean, new.id);
    END IF;
    IF TG_OP = 'UPDATE' AND new.claim_token IS DISTINCT FROM old.claim_token THEN
        IF new.claim_token IS NULL THEN
            INSERT INTO chaos.journal (what, key, version, event_id, token, attempts)
            VALUES ('released', new.key, old.claimed_version, new.id, old.claim_token,
                    new.attempts);
        ELSE
            INSERT INTO chaos.journal (what, key, version, event_id, token, attempts, until,
                                       first_attempt_at, detail)
            VALUES ('claimed', new.key, new.version, new.id, new.claim_token, new.attempts,
                    new.available_at, new.first_attempt_at,
                    CASE WHEN old.claim_token IS NOT NULL THEN 'abandoned' END);
        END IF;
    END IF;
    IF TG_OP = 'DELETE' THEN
        INSERT INTO chaos.journal (what, key, version, event_id, token)
        VALUES ('gone', old.key, old.version, old.id, old.claim_token);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON outbox.events
   FOR EACH ROW EXECUTE FUNCTION chaos.note_event();

CREATE FUNCTION chaos.note_settled() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos.journal (what, key, version, visible, event_id, attempts, detail)
    VALUES (CASE TG_OP WHEN 'INSERT' THEN 'settled' ELSE 'rewritten' END,
            coalesce(new.key, old.key), coalesce(new.version, old.version),
            (new.payload ->> 'visible')::boolean, new.event_id, new.attempts, new.outcome);
    RETURN NULL;
END $$;
CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON outbox.settled
   FOR EACH ROW EXECUTE FUNCTION chaos.note_settled();

CREATE FUNCTION chaos.note_gate() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos.journal (what, key, token, until, detail)
    VALUES (CASE WHEN new.probe IS NOT NULL THEN 'probe'
                 WHEN new.closed_until > now() THEN 'closed' ELSE 'opened' END,
            new.destination, new.probe, new.closed_until, new.reason);
    RETURN NULL;
END $$;
-- At the end of its transaction, which is when others see it.
CREATE CONSTRAINT TRIGGER note AFTER INSERT OR UPDATE ON outbox.gates
   DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION chaos.note_gate();

CREATE FUNCTION chaos.note_visibility() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos.journal (what, key, version, visible)
    VALUES ('wanted', new.mentor_id, new.version, new.visible);
    RETURN NULL;
END $$;
CREATE TRIGGER note AFTER INSERT OR UPDATE ON public.portal_visibility
   FOR EACH ROW EXECUTE FUNCTION chaos.note_visibility();

CREATE FUNCTION chaos.note_confirmation() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos.journal (what, key, version, visible)
    VALUES ('confirmed', new.mentor_id, new.version, new.visible);
    RETURN NULL;
END $$;
CREATE TRIGGER note AFTER INSERT OR UPDATE ON public.portal_confirmations
   FOR EACH ROW EXECUTE FUNCTION chaos.note_confirmation();

CREATE FUNCTION chaos.note_failure() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos.journal (what, key, version, visible, detail)
    VALUES (CASE WHEN new.resolved_at IS NULL THEN 'failed' ELSE 'resolved' END,
            new.mentor_id, new.version, new.visible, new.error_code);
    RETURN NULL;
END $$;
CREATE TRIGGER note AFTER INSERT OR UPDATE ON public.dynamics_sync_failures
   FOR EACH ROW EXECUTE FUNCTION chaos.note_failure();

CREATE FUNCTION chaos.note_certification() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos.journal (what, key, detail)
    VALUES (CASE new.status WHEN 'expired' THEN 'expired' ELSE 'renewed' END,
            new.mentor_id, new.id);
    RETURN NULL;
END $$;
CREATE TRIGGER note AFTER UPDATE ON public.certifications
   FOR EACH ROW EXECUTE FUNCTION chaos.note_certification();

CREATE FUNCTION chaos.note_pause() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO chaos.journal (what, key, detail)
    VALUES (CASE WHEN new.resumed_at IS NULL THEN 'paused' ELSE 'unpaused' END,
            new.mentor_id, new.certification_id);
    RETURN NULL;
END $$;
CREATE TRIGGER note AFTER INSERT OR UPDATE ON public.mentor_pauses
   FOR EACH ROW EXECUTE FUNCTION chaos.note_pause();
"""

EVIDENCE = """
CREATE TABLE chaos.requests (
    seq bigint, kind text, method text, row_id text, correlation_id text,
    started_at timestamptz, status integer, applied boolean, created boolean, body jsonb
);
CREATE TABLE chaos.versions (
    key text, version bigint, visible boolean, correlation_id text PRIMARY KEY
);
CREATE TABLE chaos.portal (row_id text PRIMARY KEY, visible boolean);
CREATE TABLE chaos.acknowledged (key text, version bigint);
"""

ENVELOPES = {"token", "discovery", "batch"}
"""Say nothing about a mentor themselves; the values in a batch have entries of their own."""

CLEAR = "DROP TABLE IF EXISTS chaos.requests, chaos.versions, chaos.portal, chaos.acknowledged"

# The last word about a version is what its transaction decided.
VERSIONS = """
SELECT DISTINCT ON (key, version) key, version, visible
  FROM chaos.journal WHERE what = 'wanted'
 ORDER BY key, version, seq DESC
"""


def install(connection: psycopg.Connection[Any]) -> None:
    """
    Begin to take notes.
    """
    connection.execute(INSTALL)


def present(
    connection: psycopg.Connection[Any],
    *,
    requests: Iterable[Entry],
    portal: dict[str, object],
    acknowledged: Iterable[tuple[str, int]],
) -> None:
    """
    Lay the other side's evidence beside the journal, so that SQL can compare the two.

    Args:
        requests: what arrived at Dynamics.
        portal: what it shows, by row.
        acknowledged: (mentor, version) that a producer was told is saved.
    """
    connection.execute(CLEAR)
    connection.execute(EVIDENCE)
    cursor = connection.cursor()
    cursor.executemany(
        "INSERT INTO chaos.versions VALUES (%s, %s, %s, %s)",
        [
            (key, version, visible, correlation(key, version))
            for key, version, visible in cursor.execute(VERSIONS).fetchall()
        ],
    )
    cursor.executemany(
        "INSERT INTO chaos.requests VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
        [_request(entry) for entry in requests if entry.kind not in ENVELOPES],
    )
    cursor.executemany("INSERT INTO chaos.portal VALUES (%s, %s)", portal.items())
    cursor.executemany("INSERT INTO chaos.acknowledged VALUES (%s, %s)", list(acknowledged))


def correlation(key: str, version: int) -> str:
    """
    The correlation id of every request about a version: stable per event.
    """
    return str(uuid5(NAMESPACE_URL, f"outbox:dynamics/{key}/{version}"))


def _request(entry: Entry) -> tuple[object, ...]:
    return (
        entry.seq,
        entry.kind,
        entry.method,
        entry.row or entry.key,
        entry.correlation_id,
        entry.started_utc,
        entry.status,
        entry.applied,
        entry.created,
        Jsonb(entry.body),
    )
