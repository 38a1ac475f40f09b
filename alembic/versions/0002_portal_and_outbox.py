"""
What the portal has to show, what it confirmed, what failed; and the outbox.

Tables in `public` can be opened to people by grants and policies; the outbox is machinery
in a schema of its own, which no API exposes.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

PUBLIC = {
    "mentor_pauses": """
        CREATE TABLE public.mentor_pauses (
            id uuid NOT NULL DEFAULT gen_random_uuid(),
            mentor_id uuid NOT NULL,
            certification_id uuid,
            reason text NOT NULL,
            paused_at timestamptz NOT NULL DEFAULT now(),
            resumed_at timestamptz,
            CONSTRAINT mentor_pauses_pkey PRIMARY KEY (id),
            CONSTRAINT mentor_pauses_mentor_id_fkey
                FOREIGN KEY (mentor_id) REFERENCES public.mentors (id),
            CONSTRAINT mentor_pauses_reason_known
                CHECK (reason IN ('certification_expired', 'manual')),
            CONSTRAINT mentor_pauses_automatic_with_its_certification
                CHECK ((reason = 'certification_expired') = (certification_id IS NOT NULL)),
            CONSTRAINT mentor_pauses_resumed_after_paused CHECK (resumed_at >= paused_at)
        );
        CREATE UNIQUE INDEX mentor_pauses_one_open
            ON public.mentor_pauses (mentor_id, reason, certification_id)
            NULLS NOT DISTINCT WHERE resumed_at IS NULL;
    """,
    "portal_visibility": """
        CREATE TABLE public.portal_visibility (
            mentor_id uuid NOT NULL,
            organization_id uuid NOT NULL,
            visible boolean NOT NULL,
            version bigint NOT NULL DEFAULT 1,
            changed_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT portal_visibility_pkey PRIMARY KEY (mentor_id),
            CONSTRAINT portal_visibility_mentor_id_fkey
                FOREIGN KEY (mentor_id) REFERENCES public.mentors (id),
            CONSTRAINT portal_visibility_version_positive CHECK (version > 0)
        );
        CREATE INDEX portal_visibility_by_organization
            ON public.portal_visibility (organization_id, mentor_id);
    """,
    "portal_confirmations": """
        CREATE TABLE public.portal_confirmations (
            mentor_id uuid NOT NULL,
            organization_id uuid NOT NULL,
            visible boolean NOT NULL,
            version bigint NOT NULL,
            confirmed_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT portal_confirmations_pkey PRIMARY KEY (mentor_id),
            CONSTRAINT portal_confirmations_version_positive CHECK (version > 0)
        );
    """,
    "dynamics_sync_failures": """
        CREATE TABLE public.dynamics_sync_failures (
            id uuid NOT NULL DEFAULT gen_random_uuid(),
            organization_id uuid NOT NULL,
            mentor_id uuid NOT NULL,
            certification_id uuid,
            visible boolean NOT NULL,
            version bigint NOT NULL,
            attempted_at timestamptz NOT NULL DEFAULT now(),
            error_code text NOT NULL,
            error_message text NOT NULL,
            retry_count integer NOT NULL,
            recoverable boolean NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now(),
            resolved_at timestamptz,
            resolution text,
            resolved_by text,
            CONSTRAINT dynamics_sync_failures_pkey PRIMARY KEY (id),
            CONSTRAINT dynamics_sync_failures_version_positive CHECK (version > 0),
            CONSTRAINT dynamics_sync_failures_retry_count_not_negative CHECK (retry_count >= 0),
            CONSTRAINT dynamics_sync_failures_resolution_known
                CHECK (resolution IN ('delivered', 'superseded', 'manual')),
            CONSTRAINT dynamics_sync_failures_resolved_wholly_or_not_at_all
                CHECK ((resolved_at IS NULL) = (resolution IS NULL)
                       AND (resolved_by IS NULL OR resolved_at IS NOT NULL))
        );
        CREATE UNIQUE INDEX dynamics_sync_failures_one_open
            ON public.dynamics_sync_failures (mentor_id) WHERE resolved_at IS NULL;
        CREATE INDEX dynamics_sync_failures_open
            ON public.dynamics_sync_failures (organization_id, created_at)
            WHERE resolved_at IS NULL;
    """,
    "cert_notification_log": """
        CREATE TABLE public.cert_notification_log (
            mentor_id uuid NOT NULL,
            threshold_days integer NOT NULL,
            cert_id uuid NOT NULL,
            expires_on date NOT NULL,
            notified_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT cert_notification_log_once_per_threshold
                UNIQUE (mentor_id, threshold_days, cert_id),
            CONSTRAINT cert_notification_log_threshold_positive CHECK (threshold_days > 0)
        );
    """,
}

LOCK_UP = """
    ALTER TABLE public.{table} ENABLE ROW LEVEL SECURITY;
    REVOKE ALL ON public.{table} FROM PUBLIC;
    DO $$
    DECLARE api_role text;
    BEGIN
        FOR api_role IN SELECT rolname FROM pg_roles
                         WHERE rolname IN ('anon', 'authenticated', 'service_role')
        LOOP
            EXECUTE format('REVOKE ALL ON public.{table} FROM %I', api_role);
        END LOOP;
    END $$;
"""

OUTBOX = """
    CREATE TABLE outbox.events (
        id bigint GENERATED ALWAYS AS IDENTITY,
        destination text NOT NULL,
        key text NOT NULL,
        organization_id uuid NOT NULL,
        version bigint NOT NULL,
        payload jsonb NOT NULL,
        priority smallint NOT NULL DEFAULT 0,
        created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        available_at timestamptz NOT NULL DEFAULT now(),
        attempts integer NOT NULL DEFAULT 0,
        claim_token uuid,
        claimed_version bigint,
        claimed_by uuid,
        replaced integer NOT NULL DEFAULT 0,
        first_attempt_at timestamptz,
        last_error_code text,
        traceparent text,
        CONSTRAINT events_pkey PRIMARY KEY (id),
        CONSTRAINT events_one_live_per_key UNIQUE (destination, key),
        CONSTRAINT events_version_positive CHECK (version > 0),
        CONSTRAINT events_attempts_not_negative CHECK (attempts >= 0),
        CONSTRAINT events_replaced_not_negative CHECK (replaced >= 0),
        CONSTRAINT events_claimed_wholly_or_not_at_all
            CHECK ((claim_token IS NULL) = (claimed_version IS NULL)
                   AND (claim_token IS NULL) = (claimed_by IS NULL)),
        CONSTRAINT events_claimed_no_future_version CHECK (claimed_version <= version),
        CONSTRAINT events_claim_counts_as_attempt
            CHECK (claim_token IS NULL OR (attempts > 0 AND first_attempt_at IS NOT NULL))
    ) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01,
            autovacuum_vacuum_threshold = 500, autovacuum_vacuum_cost_delay = 0);
    CREATE INDEX events_claim_order
        ON outbox.events (destination, organization_id, priority, available_at, id);

    CREATE TABLE outbox.settled (
        id bigint GENERATED ALWAYS AS IDENTITY,
        event_id bigint NOT NULL,
        destination text NOT NULL,
        key text NOT NULL,
        organization_id uuid NOT NULL,
        version bigint NOT NULL,
        payload jsonb NOT NULL,
        outcome text NOT NULL,
        attempts integer NOT NULL,
        error_code text,
        created_at timestamptz NOT NULL,
        settled_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        CONSTRAINT settled_pkey PRIMARY KEY (id),
        CONSTRAINT settled_outcome_known
            CHECK (outcome IN ('delivered', 'superseded', 'dead', 'skipped'))
    );
    CREATE INDEX settled_by_key ON outbox.settled (destination, key, version);
    CREATE INDEX settled_by_age ON outbox.settled (outcome, settled_at);

    CREATE TABLE outbox.gates (
        destination text NOT NULL,
        organization_id uuid NOT NULL,
        closed_until timestamptz NOT NULL,
        reason text NOT NULL,
        message text NOT NULL DEFAULT '',
        closed_by text NOT NULL,
        trips integer NOT NULL DEFAULT 0,
        probe uuid,
        CONSTRAINT gates_pkey PRIMARY KEY (destination, organization_id),
        CONSTRAINT gates_reason_known
            CHECK (reason IN ('throttled', 'outage', 'configuration', 'operator')),
        CONSTRAINT gates_trips_not_negative CHECK (trips >= 0)
    );

    CREATE TABLE outbox.doubts (
        destination text NOT NULL,
        key text NOT NULL,
        version bigint NOT NULL,
        until timestamptz NOT NULL,
        CONSTRAINT doubts_pkey PRIMARY KEY (destination, key, version)
    );
    CREATE INDEX doubts_by_age ON outbox.doubts (until);

    REVOKE ALL ON SCHEMA outbox FROM PUBLIC;
    REVOKE ALL ON ALL TABLES IN SCHEMA outbox FROM PUBLIC;
    DO $$
    DECLARE api_role text;
    BEGIN
        FOR api_role IN SELECT rolname FROM pg_roles
                         WHERE rolname IN ('anon', 'authenticated', 'service_role')
        LOOP
            EXECUTE format('REVOKE ALL ON SCHEMA outbox FROM %I', api_role);
            EXECUTE format('REVOKE ALL ON ALL TABLES IN SCHEMA outbox FROM %I', api_role);
            EXECUTE format('REVOKE ALL ON ALL SEQUENCES IN SCHEMA outbox FROM %I', api_role);
        END LOOP;
    END $$;
"""


def upgrade() -> None:
    for table, statements in PUBLIC.items():
        op.execute(statements)
        op.execute(LOCK_UP.format(table=table))
    op.execute(OUTBOX)


def downgrade() -> None:
    for table in ("doubts", "gates", "settled", "events"):
        op.execute(f"DROP TABLE outbox.{table}")
    for table in reversed(PUBLIC):
        op.execute(f"DROP TABLE public.{table}")
