"""
What became of each night run: when, good or bad.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

NIGHTLY_RUNS = """
    CREATE TABLE outbox.nightly_runs (
        id bigint GENERATED ALWAYS AS IDENTITY,
        organization_id uuid NOT NULL,
        started_at timestamptz NOT NULL DEFAULT now(),
        finished_at timestamptz,
        ok boolean,
        summary jsonb,
        CONSTRAINT nightly_runs_pkey PRIMARY KEY (id),
        CONSTRAINT nightly_runs_finished_wholly_or_not_at_all
            CHECK ((finished_at IS NULL) = (ok IS NULL)
                   AND (finished_at IS NULL) = (summary IS NULL))
    );
    CREATE INDEX nightly_runs_by_organization ON outbox.nightly_runs (organization_id, id);
    REVOKE ALL ON outbox.nightly_runs FROM PUBLIC;
    DO $$
    DECLARE api_role text;
    BEGIN
        FOR api_role IN SELECT rolname FROM pg_roles
                         WHERE rolname IN ('anon', 'authenticated', 'service_role')
        LOOP
            EXECUTE format('REVOKE ALL ON outbox.nightly_runs FROM %I', api_role);
            EXECUTE format('REVOKE ALL ON SEQUENCE outbox.nightly_runs_id_seq FROM %I', api_role);
        END LOOP;
    END $$;
"""


def upgrade() -> None:
    op.execute(NIGHTLY_RUNS)


def downgrade() -> None:
    op.execute("DROP TABLE outbox.nightly_runs")
