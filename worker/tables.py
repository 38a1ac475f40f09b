"""
Every table this service knows, on one `MetaData` for Alembic and for the checks.

Three tables may belong to somebody else (`ADOPTABLE`): HLF's project had mentors and
certifications before this service came. They are read and, by the transitions, updated,
never altered.

Only tables that transitions write have foreign keys. The worker's own (confirmations,
failures) have none on purpose: a foreign key would make the worker wait for a business
transaction that holds the mentor's row, and the worker never waits for one.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, UUID

from outbox.tables import SCHEMA, add_tables, timestamp

MARK = "hlf-dynamics-sync"
"""Comment on an adoptable table that our migrations made; an adopted one has no such mark."""

metadata = MetaData()
outbox_tables = add_tables(metadata)
outbox_tables.events.append_constraint(
    CheckConstraint(
        "destination <> 'dynamics' OR key ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'",
        name="events_portal_key_is_a_mentor",
    )
)


def _id() -> Column[object]:
    return Column("id", UUID, nullable=False, server_default=text("gen_random_uuid()"))


organizations = Table(
    "organizations",
    metadata,
    _id(),
    Column("name", Text, nullable=False),
    PrimaryKeyConstraint("id", name="organizations_pkey"),
    schema="public",
    comment=MARK,
)

mentors = Table(
    "mentors",
    metadata,
    _id(),
    Column("organization_id", UUID, nullable=False),
    Column("full_name", Text, nullable=False),
    Column("dynamics_id", UUID, comment="The GUID of the row in Dynamics."),
    PrimaryKeyConstraint("id", name="mentors_pkey"),
    ForeignKeyConstraint(
        ["organization_id"], ["public.organizations.id"], name="mentors_organization_id_fkey"
    ),
    Index("mentors_by_organization", "organization_id"),
    schema="public",
    comment=MARK,
)

certifications = Table(
    "certifications",
    metadata,
    _id(),
    Column("mentor_id", UUID, nullable=False),
    Column("expires_on", Date, nullable=False, comment="The last valid day."),
    Column("status", Text, nullable=False, server_default=text("'valid'")),
    timestamp("expired_at", nullable=True),
    timestamp("renewed_at", nullable=True),
    PrimaryKeyConstraint("id", name="certifications_pkey"),
    ForeignKeyConstraint(
        ["mentor_id"], ["public.mentors.id"], name="certifications_mentor_id_fkey"
    ),
    CheckConstraint("status IN ('valid', 'expired')", name="certifications_status_known"),
    CheckConstraint(
        "(status = 'expired') = (expired_at IS NOT NULL)",
        name="certifications_expired_with_a_time",
    ),
    Index("certifications_by_mentor", "mentor_id"),
    Index(
        "certifications_running_out",
        "expires_on",
        "mentor_id",
        postgresql_where=text("status = 'valid'"),
    ),
    schema="public",
    comment=MARK,
)

ADOPTABLE = (organizations, mentors, certifications)

mentor_pauses = Table(
    "mentor_pauses",
    metadata,
    _id(),
    Column("mentor_id", UUID, nullable=False),
    Column("certification_id", UUID),
    Column("reason", Text, nullable=False),
    timestamp("paused_at", default="now()"),
    timestamp("resumed_at", nullable=True),
    PrimaryKeyConstraint("id", name="mentor_pauses_pkey"),
    ForeignKeyConstraint(["mentor_id"], ["public.mentors.id"], name="mentor_pauses_mentor_id_fkey"),
    CheckConstraint(
        "reason IN ('certification_expired', 'manual')", name="mentor_pauses_reason_known"
    ),
    CheckConstraint(
        "(reason = 'certification_expired') = (certification_id IS NOT NULL)",
        name="mentor_pauses_automatic_with_its_certification",
    ),
    CheckConstraint("resumed_at >= paused_at", name="mentor_pauses_resumed_after_paused"),
    # At most one open pause per mentor, reason and certification.
    Index(
        "mentor_pauses_one_open",
        "mentor_id",
        "reason",
        "certification_id",
        unique=True,
        postgresql_where=text("resumed_at IS NULL"),
        postgresql_nulls_not_distinct=True,
    ),
    schema="public",
)

portal_visibility = Table(
    "portal_visibility",
    metadata,
    Column("mentor_id", UUID, nullable=False),
    Column("organization_id", UUID, nullable=False),
    Column("visible", Boolean, nullable=False),
    Column("version", BigInteger, nullable=False, server_default=text("1")),
    timestamp("changed_at", default="now()"),
    PrimaryKeyConstraint("mentor_id", name="portal_visibility_pkey"),
    ForeignKeyConstraint(
        ["mentor_id"], ["public.mentors.id"], name="portal_visibility_mentor_id_fkey"
    ),
    CheckConstraint("version > 0", name="portal_visibility_version_positive"),
    Index("portal_visibility_by_organization", "organization_id", "mentor_id"),
    schema="public",
)

portal_confirmations = Table(
    "portal_confirmations",
    metadata,
    Column("mentor_id", UUID, nullable=False),
    Column("organization_id", UUID, nullable=False),
    Column("visible", Boolean, nullable=False),
    Column("version", BigInteger, nullable=False),
    timestamp("confirmed_at", default="now()"),
    PrimaryKeyConstraint("mentor_id", name="portal_confirmations_pkey"),
    CheckConstraint("version > 0", name="portal_confirmations_version_positive"),
    schema="public",
)

dynamics_sync_failures = Table(
    "dynamics_sync_failures",
    metadata,
    _id(),
    Column("organization_id", UUID, nullable=False),
    Column("mentor_id", UUID, nullable=False),
    Column("certification_id", UUID),
    Column("visible", Boolean, nullable=False),
    Column("version", BigInteger, nullable=False),
    timestamp("attempted_at", default="now()"),
    Column("error_code", Text, nullable=False),
    Column("error_message", Text, nullable=False),
    Column("retry_count", Integer, nullable=False),
    # The cause may pass by itself (an outage), so a recovery tries this mentor again.
    Column("recoverable", Boolean, nullable=False),
    timestamp("created_at", default="now()"),
    timestamp("resolved_at", nullable=True),
    Column("resolution", Text),
    Column("resolved_by", Text),
    PrimaryKeyConstraint("id", name="dynamics_sync_failures_pkey"),
    CheckConstraint("version > 0", name="dynamics_sync_failures_version_positive"),
    CheckConstraint("retry_count >= 0", name="dynamics_sync_failures_retry_count_not_negative"),
    CheckConstraint(
        "resolution IN ('delivered', 'superseded', 'manual')",
        name="dynamics_sync_failures_resolution_known",
    ),
    CheckConstraint(
        "(resolved_at IS NULL) = (resolution IS NULL)"
        " AND (resolved_by IS NULL OR resolved_at IS NOT NULL)",
        name="dynamics_sync_failures_resolved_wholly_or_not_at_all",
    ),
    # One open failure per mentor: failing again updates it.
    Index(
        "dynamics_sync_failures_one_open",
        "mentor_id",
        unique=True,
        postgresql_where=text("resolved_at IS NULL"),
    ),
    Index(
        "dynamics_sync_failures_open",
        "organization_id",
        "created_at",
        postgresql_where=text("resolved_at IS NULL"),
    ),
    # What people saw to by hand: rare, and looked for again and again.
    Index(
        "dynamics_sync_failures_handled",
        "mentor_id",
        "version",
        postgresql_where=text("resolution = 'manual'"),
    ),
    Index(
        "dynamics_sync_failures_handled_lately",
        "organization_id",
        "resolved_at",
        postgresql_where=text("resolution = 'manual'"),
    ),
    schema="public",
)

cert_notification_log = Table(
    "cert_notification_log",
    metadata,
    Column("mentor_id", UUID, nullable=False),
    Column("threshold_days", Integer, nullable=False),
    Column("cert_id", UUID, nullable=False),
    Column("expires_on", Date, nullable=False),
    timestamp("notified_at", default="now()"),
    UniqueConstraint(
        "mentor_id",
        "threshold_days",
        "cert_id",
        name="cert_notification_log_once_per_threshold",
    ),
    CheckConstraint("threshold_days > 0", name="cert_notification_log_threshold_positive"),
    schema="public",
)

commits = Table(
    "commits",
    metadata,
    Column("id", UUID, nullable=False),
    timestamp("committed_at", default="now()"),
    PrimaryKeyConstraint("id", name="commits_pkey"),
    schema=SCHEMA,
)
"""Receipts of business transactions; see `worker.database`."""

nightly_runs = Table(
    "nightly_runs",
    metadata,
    Column("id", BigInteger, Identity(always=True), nullable=False),
    Column("organization_id", UUID, nullable=False),
    timestamp("started_at", default="now()"),
    timestamp("finished_at", nullable=True),
    Column("ok", Boolean),
    Column("summary", JSONB),
    PrimaryKeyConstraint("id", name="nightly_runs_pkey"),
    CheckConstraint(
        "(finished_at IS NULL) = (ok IS NULL) AND (finished_at IS NULL) = (summary IS NULL)",
        name="nightly_runs_finished_wholly_or_not_at_all",
    ),
    Index("nightly_runs_by_organization", "organization_id", "id"),
    schema=SCHEMA,
)
"""What became of each night run; see `worker.coordinator.nights`."""

audit = Table(
    "audit",
    metadata,
    Column("id", BigInteger, Identity(always=True), nullable=False),
    timestamp("at", default="clock_timestamp()"),
    Column("organization_id", UUID, nullable=False),
    Column("subject", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("action", Text, nullable=False),
    # The failure or the certification.
    Column("target", UUID),
    Column("mentor_id", UUID),
    Column("outcome", Text, nullable=False),
    Column("note", Text, nullable=False, server_default=text("''")),
    PrimaryKeyConstraint("id", name="audit_pkey"),
    CheckConstraint("action IN ('retry', 'handle', 'renew')", name="audit_action_known"),
    Index("audit_by_organization", "organization_id", "at"),
    Index("audit_by_target", "target", "at"),
    Index("audit_by_mentor", "mentor_id", "at"),
    schema=SCHEMA,
)
"""What people did; only ever added to."""

web_sessions = Table(
    "web_sessions",
    metadata,
    Column("token_hash", LargeBinary, nullable=False),
    Column("claims", JSONB, nullable=False),
    timestamp("created_at", default="now()"),
    timestamp("seen_at", default="now()"),
    timestamp("expires_at"),
    PrimaryKeyConstraint("token_hash", name="web_sessions_pkey"),
    Index("web_sessions_by_end", "expires_at"),
    schema=SCHEMA,
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("organization_id", UUID, nullable=False),
    Column("subject", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("request_hash", LargeBinary, nullable=False),
    Column("answer", JSONB, nullable=False),
    timestamp("created_at", default="now()"),
    PrimaryKeyConstraint("organization_id", "subject", "key", name="idempotency_pkey"),
    Index("idempotency_by_age", "created_at"),
    schema=SCHEMA,
)
"""What was answered to a request that an app may send again."""

OWNED = tuple(table for table in metadata.sorted_tables if table not in ADOPTABLE)
"""What only our migrations create, change and drop."""
