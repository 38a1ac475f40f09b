"""
Receipts by which a transaction whose COMMIT had no answer finds out whether it happened.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

COMMITS = """
    CREATE TABLE outbox.commits (
        id uuid NOT NULL,
        committed_at timestamptz NOT NULL DEFAULT now(),
        CONSTRAINT commits_pkey PRIMARY KEY (id)
    );
    REVOKE ALL ON outbox.commits FROM PUBLIC;
    DO $$
    DECLARE api_role text;
    BEGIN
        FOR api_role IN SELECT rolname FROM pg_roles
                         WHERE rolname IN ('anon', 'authenticated', 'service_role')
        LOOP
            EXECUTE format('REVOKE ALL ON outbox.commits FROM %I', api_role);
        END LOOP;
    END $$;
"""


def upgrade() -> None:
    op.execute(COMMITS)


def downgrade() -> None:
    op.execute("DROP TABLE outbox.commits")
