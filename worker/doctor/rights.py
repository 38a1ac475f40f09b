"""
What each role has to be able to do: the columns, by table and command; "" is all of them.

What a migration gives and what the doctor asks for is compared by a test, in both directions:
whoever writes a statement that needs more adds it here and in a migration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Duty = Mapping[str, Mapping[str, str]]

EVERYBODY: Duty = {
    "public.organizations": {"SELECT": "id"},
    "outbox.alembic_version": {"SELECT": ""},
}
"""Which release this is, and whether there is such an organisation."""

TRANSITIONS: Duty = {
    "public.mentors": {"SELECT": "id, organization_id"},
    "public.certifications": {
        "SELECT": "id, mentor_id, expires_on, status, expired_at, renewed_at",
        "UPDATE": "expires_on, status, expired_at, renewed_at",
    },
    "public.mentor_pauses": {
        "SELECT": "",
        "INSERT": "mentor_id, certification_id, reason",
        "UPDATE": "resumed_at",
    },
    "public.portal_visibility": {
        "SELECT": "",
        "INSERT": "mentor_id, organization_id, visible, version",
        "UPDATE": "organization_id, visible, version, changed_at",
    },
    "public.portal_confirmations": {"SELECT": ""},
    "public.dynamics_sync_failures": {"SELECT": "mentor_id, error_code, resolved_at"},
    "outbox.events": {
        "SELECT": "destination, key, organization_id, version, payload, priority, created_at,"
        " available_at, attempts, claim_token, replaced, first_attempt_at, last_error_code,"
        " traceparent",
        "INSERT": "destination, key, organization_id, version, payload, priority, traceparent",
        "UPDATE": "organization_id, version, payload, priority, created_at, available_at,"
        " attempts, replaced, first_attempt_at, last_error_code, traceparent",
    },
    "outbox.commits": {"INSERT": "id"},
}
"""Certifications, what follows from them, and waiting for the portal."""

DELIVERY: Duty = {
    "public.mentors": {"SELECT": "id, organization_id, dynamics_id"},
    "public.certifications": {"SELECT": "id, mentor_id, expires_on, status"},
    "public.mentor_pauses": {"SELECT": ""},
    "public.portal_visibility": {"SELECT": "", "UPDATE": "version"},
    "public.portal_confirmations": {
        "SELECT": "",
        "INSERT": "mentor_id, organization_id, visible, version",
        "UPDATE": "organization_id, visible, version, confirmed_at",
    },
    "public.dynamics_sync_failures": {
        "SELECT": "",
        "INSERT": "organization_id, mentor_id, certification_id, visible, version, error_code,"
        " error_message, retry_count, recoverable",
        "UPDATE": "organization_id, certification_id, visible, version, attempted_at,"
        " error_code, error_message, retry_count, recoverable, resolved_at, resolution",
    },
    "outbox.events": {"SELECT": "", "INSERT": "", "UPDATE": "", "DELETE": ""},
    # To lock a row takes the right to update some column of it.
    "outbox.settled": {"SELECT": "", "INSERT": "", "UPDATE": "id", "DELETE": ""},
    "outbox.gates": {"SELECT": "", "INSERT": "", "UPDATE": ""},
    "outbox.doubts": {"SELECT": "", "INSERT": "", "UPDATE": "", "DELETE": ""},
    "outbox.commits": {"SELECT": "committed_at", "INSERT": "id", "DELETE": ""},
    "outbox.nightly_runs": {"SELECT": ""},
}
"""Claim, settle, confirm, note failures, re-drive, forget what is old, tell how all that is."""

NIGHT: Duty = {
    "public.cert_notification_log": {
        "SELECT": "",
        "INSERT": "mentor_id, threshold_days, cert_id, expires_on",
        "UPDATE": "expires_on, notified_at",
    },
    "outbox.nightly_runs": {
        "SELECT": "",
        "INSERT": "organization_id",
        "UPDATE": "finished_at, ok, summary",
        "DELETE": "",
    },
}
"""Reminders, and how the night went."""

SESSIONS: Duty = {
    "outbox.web_sessions": {
        "SELECT": "",
        "INSERT": "token_hash, claims, expires_at",
        "UPDATE": "seen_at",
        "DELETE": "",
    },
    "outbox.idempotency": {"SELECT": "ctid, created_at", "DELETE": ""},
}
"""What the dashboard does in its own name: people's statements run as `authenticated`."""

STATUS: Duty = {
    "public.portal_visibility": {"SELECT": ""},
    "public.portal_confirmations": {"SELECT": ""},
    "public.dynamics_sync_failures": {
        "SELECT": "id, organization_id, mentor_id, visible, version, attempted_at, error_code,"
        " retry_count, recoverable, created_at, resolved_at, resolution",
    },
    "outbox.events": {
        "SELECT": "id, destination, key, organization_id, version, priority, created_at,"
        " available_at, attempts, claimed_version, replaced, first_attempt_at, last_error_code",
    },
    "outbox.gates": {"SELECT": ""},
}
"""How far the portal is, and what stands in the way."""

HISTORY: Duty = {
    "outbox.settled": {
        "SELECT": "id, event_id, destination, key, organization_id, version, outcome, attempts,"
        " error_code, created_at, settled_at",
    },
    "outbox.nightly_runs": {"SELECT": ""},
}
"""What became of events and nights; neither contents nor names."""

NAMES: Duty = {"public.mentors": {"SELECT": "full_name"}}
"""What `failures` shows."""

ROLES: Mapping[str, Sequence[Duty]] = {
    "hlf_sync_producer": (EVERYBODY, TRANSITIONS),
    "hlf_sync_worker": (EVERYBODY, DELIVERY),
    "hlf_sync_cron": (EVERYBODY, TRANSITIONS, DELIVERY, NIGHT),
    "hlf_sync_web": (EVERYBODY, SESSIONS),
    "hlf_sync_metrics": (EVERYBODY, STATUS, HISTORY),
}

BECOME_PEOPLE = ("hlf_sync_web",)
"""Who has to be able to become `authenticated`, and has nothing of it before."""

ALL: Sequence[Duty] = (EVERYBODY, TRANSITIONS, DELIVERY, NIGHT, STATUS, HISTORY, NAMES)
"""For a user who has none of the roles: whatever a command may need."""

PEOPLE: Duty = {
    "public.mentor_pauses": {"SELECT": "", "UPDATE": "resumed_at"},
    "public.portal_visibility": {"SELECT": "", "INSERT": "", "UPDATE": ""},
    "public.portal_confirmations": {"SELECT": ""},
    "public.dynamics_sync_failures": {
        "SELECT": "",
        "UPDATE": "resolved_at, resolution, resolved_by",
    },
    "outbox.events": {"SELECT": "", "INSERT": "", "UPDATE": ""},
    "outbox.settled": {"SELECT": ""},
    "outbox.gates": {"SELECT": ""},
    "outbox.nightly_runs": {"SELECT": ""},
    "outbox.audit": {"SELECT": "", "INSERT": ""},
    "outbox.idempotency": {"SELECT": "", "INSERT": ""},
    "outbox.commits": {"INSERT": ""},
}
"""
What `authenticated` has on tables of ours, row by row. Without SELECT on the failures Realtime
tells nobody of them, and does not say why.
"""
