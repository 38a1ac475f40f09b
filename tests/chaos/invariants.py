"""
The invariants, each a query for what contradicts it.

The queries read rows, the journal and the presented evidence (`journal`), and believe nothing
that the judged processes say of themselves. The lease is a setting of the session that asks,
`chaos.lease`, in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_ATTEMPTS = 4
WINDOW_SECONDS = 15.0
SLACK_SECONDS = 1.0
"""Of the retry policy: what starts later than that begins a new window."""

CLOCK_SLACK_SECONDS = 0.25
"""Between a commit and its being seen; all clocks are of one machine."""

LONGEST_COUNT = MAX_ATTEMPTS + 3
"""A process may die once more between claiming what ran out of attempts and burying it."""

GATES = "('closed', 'opened', 'probe')"


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
 UNION ALL
SELECT 'wanted', wanted.key, wanted.xid::text FROM chaos.journal AS wanted
 WHERE wanted.what = 'wanted'
   AND NOT EXISTS (SELECT FROM chaos.journal AS enqueued
                    WHERE enqueued.what = 'enqueued' AND enqueued.xid = wanted.xid
                      AND enqueued.key = wanted.key AND enqueued.version = wanted.version)
""",
    ),
    Invariant(
        name="S2",
        claim="every request is about a committed version, and says that and nothing else",
        violations="""
SELECT request.seq, request.row_id, request.correlation_id, request.method, request.body
  FROM chaos.requests AS request
  LEFT JOIN chaos.versions AS version USING (correlation_id)
  LEFT JOIN public.mentors AS mentor ON CAST(mentor.id AS text) = version.key
 WHERE version.key IS NULL
    OR (request.kind, request.method) <> ('data', 'PATCH')
    OR request.body IS DISTINCT FROM jsonb_build_object('hlf_portalvisible', version.visible)
    OR request.row_id IS DISTINCT FROM CAST(mentor.dynamics_id AS text)
""",
    ),
    Invariant(
        name="S3",
        claim="nothing is lost: each version ended, or a later one of its mentor did",
        violations="""
SELECT key, max(version) AS version FROM chaos.journal AS enqueued
 WHERE what = 'enqueued'
 GROUP BY key
HAVING max(version) > coalesce((SELECT max(settled.version) FILTER (WHERE outcome <> 'superseded')
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
 UNION ALL
SELECT settled.key, settled.version FROM outbox.settled AS settled
 WHERE settled.outcome = 'delivered'
   AND NOT EXISTS (SELECT FROM public.portal_confirmations AS confirmed
                    WHERE CAST(confirmed.mentor_id AS text) = settled.key
                      AND confirmed.version >= settled.version)
""",
    ),
    Invariant(
        name="S4",
        claim="what failed is not waiting, is open once, and is not what was confirmed since",
        violations="""
SELECT live.key, live.version FROM outbox.events AS live
  JOIN public.dynamics_sync_failures AS failure
    ON CAST(failure.mentor_id AS text) = live.key AND failure.resolved_at IS NULL
 WHERE failure.version >= live.version
 UNION ALL
SELECT CAST(mentor_id AS text), count(*) FROM public.dynamics_sync_failures
 WHERE resolved_at IS NULL GROUP BY mentor_id HAVING count(*) > 1
 UNION ALL
SELECT failed.key, failed.version FROM chaos.journal AS failed
 WHERE failed.what = 'failed'
   AND NOT EXISTS (SELECT FROM chaos.journal AS settled
                    WHERE settled.what = 'settled' AND settled.detail = 'dead'
                      AND settled.xid = failed.xid AND settled.key = failed.key
                      AND settled.version = failed.version)
 UNION ALL
SELECT CAST(failure.mentor_id AS text), failure.version
  FROM public.dynamics_sync_failures AS failure
  JOIN public.portal_confirmations AS confirmed USING (mentor_id)
 WHERE failure.resolved_at IS NULL AND failure.version < confirmed.version
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
        violations="""
SELECT later.key, later.version, later.token FROM chaos.journal AS later
  JOIN chaos.journal AS earlier
    ON earlier.what = 'claimed' AND earlier.event_id = later.event_id
   AND earlier.seq < later.seq
   AND later.began < earlier.began
       + make_interval(secs => CAST(current_setting('chaos.lease') AS float))
 WHERE later.what = 'claimed'
   AND NOT EXISTS (SELECT FROM chaos.journal AS over
                    WHERE over.what IN ('released', 'gone')
                      AND over.token = earlier.token AND over.seq < later.seq)
""",
    ),
    Invariant(
        name="S7",
        claim="whoever lost a claim changes nothing: only its holder settles an event",
        violations="""
SELECT over.key, over.version, claim.who, over.who FROM chaos.journal AS over
  JOIN chaos.journal AS claim ON claim.what = 'claimed' AND claim.token = over.token
 WHERE over.what IN ('released', 'gone')
   AND (over.who IS DISTINCT FROM claim.who
        OR EXISTS (SELECT FROM chaos.journal AS next
                    WHERE next.what = 'claimed' AND next.event_id = claim.event_id
                      AND next.seq > claim.seq AND next.seq < over.seq))
 UNION ALL
SELECT key, version, who, what FROM chaos.journal
 WHERE what IN ('released', 'gone') AND token IS NULL
 UNION ALL
SELECT beside.key, beside.version, beside.who, beside.what FROM chaos.journal AS beside
 WHERE beside.what IN ('settled', 'confirmed', 'failed')
   AND NOT EXISTS (SELECT FROM chaos.journal AS over
                    WHERE over.what IN ('released', 'gone')
                      AND over.xid = beside.xid AND over.key = beside.key)
 UNION ALL
SELECT settled.key, settled.version, settled.who, 'attempt ' || settled.attempts
  FROM chaos.journal AS settled
  JOIN chaos.journal AS over ON over.xid = settled.xid AND over.key = settled.key
   AND over.what IN ('released', 'gone')
  JOIN chaos.journal AS claim ON claim.what = 'claimed' AND claim.token = over.token
 WHERE settled.what = 'settled'
   AND (settled.version, settled.attempts) <> (claim.version, claim.attempts)
""",
    ),
    Invariant(
        name="S8",
        claim="attempts are counted before the call, and there is an end to them",
        violations=f"""
SELECT version.key, version.version, count(*)
  FROM chaos.requests AS request JOIN chaos.versions AS version USING (correlation_id)
 GROUP BY version.key, version.version, request.status IS NOT DISTINCT FROM 401
HAVING count(*) > (SELECT count(*) FROM chaos.journal AS claim
                    WHERE claim.what = 'claimed' AND claim.key = version.key
                      AND claim.version = version.version AND claim.attempts <= {MAX_ATTEMPTS})
 UNION ALL
SELECT key, version, attempts FROM chaos.journal
 WHERE what = 'claimed' AND attempts > {LONGEST_COUNT}
 UNION ALL
SELECT version.key, version.version, request.seq
  FROM chaos.requests AS request JOIN chaos.versions AS version USING (correlation_id)
 WHERE NOT EXISTS (SELECT FROM chaos.journal AS claim
                    WHERE claim.what = 'claimed' AND claim.key = version.key
                      AND claim.version = version.version AND claim.at <= request.started_at)
 UNION ALL
SELECT claim.key, claim.version, claim.attempts FROM chaos.journal AS claim
  JOIN LATERAL (SELECT * FROM chaos.journal AS before
                 WHERE before.what IN ('claimed', 'released')
                   AND before.event_id = claim.event_id AND before.seq < claim.seq
                 ORDER BY before.seq DESC LIMIT 1) AS before ON before.version = claim.version
 WHERE claim.what = 'claimed' AND claim.attempts <> before.attempts + 1
   -- Or a gate was closed meanwhile, which gives the attempts back.
   AND NOT (claim.attempts = 1
            AND EXISTS (SELECT FROM chaos.journal AS gate
                         WHERE gate.what IN ('closed', 'probe') AND gate.at < claim.at
                           AND gate.until > before.at - make_interval(secs => {WINDOW_SECONDS})))
""",  # noqa: S608 (constants)
    ),
    Invariant(
        name="S9",
        claim="the requests of one series begin within 15 s",
        violations=f"""
SELECT key, version, began - first_attempt_at FROM chaos.journal
 WHERE what = 'claimed' AND began - first_attempt_at > make_interval(secs => {WINDOW_SECONDS})
 UNION ALL
SELECT version.key, version.version, request.started_at - claim.first_attempt_at
  FROM chaos.requests AS request JOIN chaos.versions AS version USING (correlation_id)
  JOIN LATERAL (SELECT * FROM chaos.journal AS claim
                 WHERE claim.what = 'claimed' AND claim.key = version.key
                   AND claim.version = version.version AND claim.at <= request.started_at
                 ORDER BY claim.seq DESC LIMIT 1) AS claim ON true
 WHERE request.started_at - claim.first_attempt_at
       > make_interval(secs => {WINDOW_SECONDS + CLOCK_SLACK_SECONDS})
 UNION ALL
SELECT claim.key, claim.version, claim.first_attempt_at - earlier.first_attempt_at
  FROM chaos.journal AS claim
  JOIN LATERAL (SELECT * FROM chaos.journal AS released
                 WHERE released.what IN ('claimed', 'released')
                   AND released.event_id = claim.event_id AND released.seq < claim.seq
                 ORDER BY released.seq DESC LIMIT 1) AS released
    ON released.what = 'released' AND released.version = claim.version AND released.attempts > 0
  JOIN chaos.journal AS earlier ON earlier.what = 'claimed' AND earlier.token = released.token
 WHERE claim.what = 'claimed' AND claim.attempts > 1
   AND claim.first_attempt_at > earlier.first_attempt_at
   AND claim.began < released.at + make_interval(secs => {SLACK_SECONDS})
""",  # noqa: S608 (constants)
    ),
    Invariant(
        name="S10",
        claim="while the gate is closed nobody claims, but one probe with one event",
        violations=f"""
SELECT claim.key, claim.version, gate.detail FROM chaos.journal AS claim
  JOIN LATERAL (SELECT * FROM chaos.journal AS gate
                 WHERE gate.what IN {GATES}
                   AND gate.at < claim.began - make_interval(secs => {CLOCK_SLACK_SECONDS})
                 ORDER BY gate.seq DESC LIMIT 1) AS gate ON true
 WHERE claim.what = 'claimed'
   AND gate.what IN ('closed', 'probe') AND gate.until > claim.at
   AND NOT EXISTS (SELECT FROM chaos.journal AS other
                    WHERE other.what = 'opened'
                      AND other.seq > gate.seq AND other.began <= claim.at
                       OR other.what = 'probe' AND other.xid = claim.xid)
 UNION ALL
SELECT probe.key, count(*), 'claims of one probe' FROM chaos.journal AS probe
  JOIN chaos.journal AS claim ON claim.what = 'claimed' AND claim.xid = probe.xid
 WHERE probe.what = 'probe' GROUP BY probe.seq, probe.key HAVING count(*) > 1
 UNION ALL
SELECT later.key, later.seq, later.what || ' after ' || gate.what FROM chaos.journal AS later
  JOIN LATERAL (SELECT * FROM chaos.journal AS gate
                 WHERE gate.what IN {GATES} AND gate.key = later.key AND gate.seq < later.seq
                 ORDER BY gate.seq DESC LIMIT 1) AS gate ON true
 WHERE later.what = 'probe' AND gate.what IN ('closed', 'probe') AND gate.until > later.at
    OR later.what = 'opened' AND later.who ~ '^(worker|drain)-'
       AND (gate.what <> 'probe' OR gate.who IS DISTINCT FROM later.who)
""",  # noqa: S608 (constants)
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
SELECT confirmed.key, confirmed.version, confirmed.visible FROM chaos.journal AS confirmed
 WHERE confirmed.what = 'confirmed'
   AND NOT EXISTS (SELECT FROM chaos.requests AS request
                     JOIN chaos.versions AS version USING (correlation_id)
                    WHERE version.key = confirmed.key AND version.version = confirmed.version
                      AND version.visible = confirmed.visible
                      AND request.applied AND request.started_at <= confirmed.at)
 UNION ALL
SELECT CAST(shown.mentor_id AS text), shown.version, shown.visible
  FROM public.portal_confirmations AS shown
 WHERE NOT EXISTS (SELECT FROM chaos.journal AS confirmed
                    WHERE confirmed.what = 'confirmed'
                      AND confirmed.key = CAST(shown.mentor_id AS text)
                      AND confirmed.version = shown.version
                      AND confirmed.visible = shown.visible)
 UNION ALL
SELECT later.key, later.version, later.visible
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
