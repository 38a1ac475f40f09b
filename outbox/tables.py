"""
The library's tables, in a schema of their own: machinery that no API should expose.

The application calls `add_tables(metadata)` once, so that its migrations know them.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Identity,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, UUID

SCHEMA = "outbox"

HOT_TABLE_OPTIONS = {
    "fillfactor": "70",  # room for a new version of a row beside the old one
    "autovacuum_vacuum_scale_factor": "0.01",
    "autovacuum_vacuum_threshold": "500",
    "autovacuum_vacuum_cost_delay": "0",
}
"""Storage options of `outbox.events`: rows live for seconds, so dead ones must go fast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """
    What `add_tables` made.
    """

    events: Table
    settled: Table
    gates: Table
    doubts: Table


def add_tables(metadata: MetaData) -> Tables:
    """
    Define the four tables on the application's metadata.
    """
    return Tables(
        events=_events(metadata),
        settled=_settled(metadata),
        gates=_gates(metadata),
        doubts=_doubts(metadata),
    )


def timestamp(name: str, *, nullable: bool = False, default: str | None = None) -> Column[object]:
    """
    A `timestamptz` column; `default` is an SQL expression.
    """
    return Column(
        name,
        DateTime(timezone=True),
        nullable=nullable,
        server_default=text(default) if default else None,
    )


def _events(metadata: MetaData) -> Table:
    return Table(
        "events",
        metadata,
        Column("id", BigInteger, Identity(always=True), nullable=False),
        Column("destination", Text, nullable=False),
        Column("key", Text, nullable=False),
        Column("organization_id", UUID, nullable=False),
        Column("version", BigInteger, nullable=False),
        Column("payload", JSONB, nullable=False),
        Column("priority", SmallInteger, nullable=False, server_default=text("0")),
        # Not now(): that is the start of a business transaction that may have taken long.
        timestamp("created_at", default="clock_timestamp()"),
        timestamp("available_at", default="now()"),
        Column("attempts", Integer, nullable=False, server_default=text("0")),
        Column("claim_token", UUID),
        Column("claimed_version", BigInteger),
        Column("claimed_by", UUID),
        Column("replaced", Integer, nullable=False, server_default=text("0")),
        timestamp("first_attempt_at", nullable=True),
        Column("last_error_code", Text),
        Column("traceparent", Text),
        PrimaryKeyConstraint("id", name="events_pkey"),
        UniqueConstraint("destination", "key", name="events_one_live_per_key"),
        CheckConstraint("version > 0", name="events_version_positive"),
        CheckConstraint("attempts >= 0", name="events_attempts_not_negative"),
        CheckConstraint("replaced >= 0", name="events_replaced_not_negative"),
        CheckConstraint(
            "(claim_token IS NULL) = (claimed_version IS NULL)"
            " AND (claim_token IS NULL) = (claimed_by IS NULL)",
            name="events_claimed_wholly_or_not_at_all",
        ),
        CheckConstraint("claimed_version <= version", name="events_claimed_no_future_version"),
        CheckConstraint(
            "claim_token IS NULL OR (attempts > 0 AND first_attempt_at IS NOT NULL)",
            name="events_claim_counts_as_attempt",
        ),
        # Of use to whoever asks when an event is due, and to nobody else: see migration 0007.
        Index(
            "events_claim_order",
            "destination",
            "organization_id",
            "priority",
            "available_at",
            "id",
            postgresql_where=text("available_at IS NOT NULL"),
        ),
        schema=SCHEMA,
        postgresql_with=HOT_TABLE_OPTIONS,
    )


def _settled(metadata: MetaData) -> Table:
    return Table(
        "settled",
        metadata,
        Column("id", BigInteger, Identity(always=True), nullable=False),
        Column("event_id", BigInteger, nullable=False),
        Column("destination", Text, nullable=False),
        Column("key", Text, nullable=False),
        Column("organization_id", UUID, nullable=False),
        Column("version", BigInteger, nullable=False),
        Column("payload", JSONB, nullable=False),
        Column("outcome", Text, nullable=False),
        Column("attempts", Integer, nullable=False),
        Column("error_code", Text),
        timestamp("created_at"),
        timestamp("settled_at", default="clock_timestamp()"),
        PrimaryKeyConstraint("id", name="settled_pkey"),
        CheckConstraint(
            "outcome IN ('delivered', 'superseded', 'dead', 'skipped')",
            name="settled_outcome_known",
        ),
        Index("settled_by_key", "destination", "key", "version"),
        Index("settled_by_age", "outcome", "settled_at"),
        schema=SCHEMA,
    )


def _gates(metadata: MetaData) -> Table:
    return Table(
        "gates",
        metadata,
        Column("destination", Text, nullable=False),
        Column("organization_id", UUID, nullable=False),
        timestamp("closed_until"),
        Column("reason", Text, nullable=False),
        Column("message", Text, nullable=False, server_default=text("''")),
        Column("closed_by", Text, nullable=False),
        # How often in a row it closed by itself; above 0 it opens for one probe only.
        Column("trips", Integer, nullable=False, server_default=text("0")),
        # Token of whoever probes it now.
        Column("probe", UUID),
        PrimaryKeyConstraint("destination", "organization_id", name="gates_pkey"),
        CheckConstraint(
            "reason IN ('throttled', 'outage', 'configuration', 'operator')",
            name="gates_reason_known",
        ),
        CheckConstraint("trips >= 0", name="gates_trips_not_negative"),
        schema=SCHEMA,
    )


def _doubts(metadata: MetaData) -> Table:
    return Table(
        "doubts",
        metadata,
        Column("destination", Text, nullable=False),
        Column("key", Text, nullable=False),
        Column("version", BigInteger, nullable=False),
        timestamp("until"),
        PrimaryKeyConstraint("destination", "key", "version", name="doubts_pkey"),
        Index("doubts_by_age", "until"),
        schema=SCHEMA,
    )
